"""The system of the other terms, scaled by its own diagonal blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.linalg import solve_triangular

from openreml_nn.likelihood.problem import cholesky
from openreml_nn.likelihood.system.blocks import block_times
from openreml_nn.likelihood.system.listed import Levels

__all__ = ["ScaledSystem"]


class ScaledSystem:
    r"""The system :math:`B + \Lambda^\top E_{22} \Lambda`, scaled by its own diagonal blocks
    :math:`C C^\top` to :math:`\hat M`; B is the identity, or the inverse of a kernel.

    Args:
        others: the levels of the terms.
        times: :math:`E_{22} x`.
        own: own blocks of :math:`E_{22}`, (levels, k, k) for each term.
        roots: blocks of :math:`\Lambda`, (levels or 1, k, k) for each term.
    """

    def __init__(
        self,
        others: Levels,
        times: Callable[[Tensor], Tensor],
        own: Sequence[Tensor],
        roots: Sequence[Tensor],
    ) -> None:
        self._others, self._times_e22, self.roots = others, times, roots
        blocks = [L.mT @ block @ L for L, block in zip(roots, own, strict=True)]
        for block, kernel in zip(blocks, others.diagonals, strict=True):
            block.diagonal(dim1=1, dim2=2).add_(kernel)
        factors = [cholesky(block, "V") for block in blocks]
        self.log_det = 2 * sum(C.diagonal(dim1=1, dim2=2).log().sum() for C in factors)
        # C^-1 and C^-1 Lambda', which moves effects to the system, for each term (levels, k, k).
        self.inverses = [_inverse(C) for C in factors]
        self.halves = [C @ L.mT for C, L in zip(self.inverses, roots, strict=True)]

    def to(self, x: Tensor) -> Tensor:
        r""":math:`C^{-1} \Lambda^\top x`, from random effects to the system."""
        return self._each(self.halves, x)

    def back(self, x: Tensor) -> Tensor:
        r""":math:`\Lambda C^{-\top} x`, from the system to random effects."""
        return self._each([block.mT for block in self.halves], x)

    def scaled(self, x: Tensor) -> Tensor:
        r""":math:`C^{-1} x`."""
        return self._each(self.inverses, x)

    def unscaled(self, x: Tensor) -> Tensor:
        r""":math:`C^{-\top} x`."""
        return self._each([block.mT for block in self.inverses], x)

    def _each(self, blocks: Sequence[Tensor], x: Tensor) -> Tensor:
        parts = zip(blocks, self._others.by_levels(x), strict=True)
        return self._others.flat([block_times(block, part) for block, part in parts], x)

    def times(self, x: Tensor) -> Tensor:
        r""":math:`\hat M x`."""
        prior = self.scaled(self._others.times_priors(self.unscaled(x)))
        return prior + self.to(self._times_e22(self.back(x)))


def _inverse(C: Tensor) -> Tensor:
    """Inverses of small triangles."""
    eye = torch.eye(C.shape[-1], dtype=C.dtype, device=C.device)
    return solve_triangular(C, eye.expand_as(C), upper=False)
