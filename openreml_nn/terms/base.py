r"""What a structured covariance :math:`G` of a term is, held by its entries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from openreml_nn.support.errors import NumericalError
from openreml_nn.support.spectrum import decomposed
from openreml_nn.terms.design import Design
from openreml_nn.terms.kernel import Kernel

__all__ = ["Covariance", "LinearCovariance", "Meeting", "condition", "square_root"]

#: A part of the largest eigenvalue by which rounding to single precision moves the others.
_FEW_DIGITS = 1e-6


class Meeting(NamedTuple):
    """Which rows share an independent block of a covariance.

    Attributes:
        together: (n, n) ones for those that do, zeros for the others.
        rows: entries of each row within its blocks, (n, copies, k); None where each is a one.
    """

    together: Tensor
    rows: Tensor | None


@dataclass(frozen=True)
class Covariance:
    r"""A structured square matrix :math:`G`, held as the entries in ``matrix``."""

    matrix: Tensor

    def with_matrix(self, matrix: Tensor) -> Covariance:
        """A covariance of this structure with other entries."""
        return type(self)(matrix)

    def map(self, function: Callable[[Tensor], Tensor]) -> Covariance:
        """A copy of the covariance with ``function`` applied to its tensors."""
        return self.with_matrix(function(self.matrix))

    def times(self, scale: Tensor) -> Covariance:
        """A multiple of it, of the same structure."""
        return self.with_matrix(scale * self.matrix)

    @property
    def form(self) -> tuple[object, ...]:
        """What it is beside its numbers."""
        return type(self), self.matrix.shape

    @property
    def constants(self) -> list[Tensor | None]:
        """What it holds beside its entries."""
        return []

    def private(self) -> Covariance:
        """A copy of the covariance with constants that nobody else can change."""
        return self

    @property
    def block(self) -> int:
        """Size of the independent blocks along its diagonal; 0 where there are none."""
        return 0

    @property
    def width(self) -> int:
        """Effects of a level that share ``matrix``; 1 where it says nothing of effects."""
        return 1

    @property
    def is_scalar(self) -> bool:
        """Whether it is known to be a multiple of the identity."""
        return False

    @property
    def is_diagonal(self) -> bool:
        """Whether it is known to be diagonal."""
        return False

    @property
    def is_solid(self) -> bool:
        """Whether it is ``matrix`` itself, (q, q)."""
        return False

    @property
    def is_chained(self) -> bool:
        """Whether its inverse, or that of each side of it, is known to be tridiagonal."""
        return False

    @property
    def is_related(self) -> bool:
        """Whether its levels are related, by a known matrix between them or by a precision."""
        return False

    @property
    def known_kernel(self) -> Kernel | None:
        """The known matrix between levels; None where these are independent, or all is estimated."""
        return None

    def without_kernel(self) -> Covariance:
        """The covariance with independent levels in place of those that :attr:`known_kernel` or a
        precision relates."""
        return self

    def with_effects(self, sigma: Tensor) -> Covariance | None:
        r""":math:`G \otimes \Sigma` for related levels, with Σ (t, t) among the effects of each; None
        where levels are not related, or have several effects already."""
        return None

    def take(self, rows: Tensor) -> Covariance | None:
        """That of distinct rows, where it keeps its structure; None where it does not."""
        return None

    def shown(self) -> Tensor:
        """What tables show of it."""
        return self.matrix

    def multiply(self, x: Tensor, transpose: bool = False) -> Tensor:
        """:math:`G x`, or :math:`G^\\top x`, for ``x`` of shape (q, m)."""
        raise NotImplementedError

    def along(self, derivative: Tensor, x: Tensor) -> Tensor:
        """The derivative of G, by that of its entries, times ``x`` (q, m)."""
        return self.with_matrix(derivative).multiply(x)

    def whole(self, size: int) -> Tensor:
        """G itself, (q, q)."""
        eye = torch.eye(size, dtype=self.matrix.dtype, device=self.matrix.device)
        return self.multiply(eye)

    def meeting(self, design: Design) -> Meeting | None:
        """Which rows of a design share a block of G, where G has blocks that the design's levels
        divide into; None elsewhere. It is what both of the following start with."""
        return None

    def sandwich(self, design: Design, meeting: Meeting | None = None) -> Tensor:
        r"""The summand :math:`Z G Z^\top` of a design, (n, n), which nobody else holds.

        Args:
            design: Z.
            meeting: that of the design, where it is known.
        """
        z = design.dense(self.matrix)
        return design.matmul(self.multiply(z.mT))

    def fold_sandwich(
        self, design: Design, cotangent: Tensor, meeting: Meeting | None = None
    ) -> Tensor:
        r"""From a symmetric cotangent of :meth:`sandwich`, (n, n), to that of ``matrix``."""
        return self.fold(design.t_matmul(design.t_matmul(cotangent).mT))

    def root(self) -> Covariance:
        r"""Some :math:`\Lambda` of the same structure with :math:`G = \Lambda\Lambda^\top`.

        Raises:
            NumericalError: if G is not positive semi-definite.
        """
        raise NotImplementedError

    def root_condition(self) -> float:
        """How many times rounding is magnified in :meth:`root`; 1 where it is exact."""
        return condition(self.matrix)

    def fold(self, cotangent: Tensor) -> Tensor:
        """From a cotangent of all of G, (q, q), to that of ``matrix``."""
        raise NotImplementedError

    def inner(self, folded: Tensor) -> Tensor:
        r""":math:`\langle S, G\rangle = \sum_{ij} S_{ij} G_{ij}` from :meth:`fold` of S."""
        raise NotImplementedError

    def blocks(self, levels: int, effects: int) -> Tensor:
        """Diagonal blocks of G level by level, (levels or 1, effects, effects)."""
        raise NotImplementedError

    def fold_blocks(self, cotangent: Tensor) -> Tensor:
        """From a cotangent of :meth:`blocks`, (levels, k, k), to that of ``matrix``."""
        raise NotImplementedError

    def places(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """For columns of G, (n,), which of its independent blocks, and the position there."""
        raise NotImplementedError

    def among(self, at: Tensor, joint: Tensor) -> Tensor:
        """Entries of G among m rows.

        Args:
            at: (…, m) positions of :meth:`places`.
            joint: (…, m, m) whether two rows are of one block.

        Shape:
            Output: (…, m, m).
        """
        raise NotImplementedError


class LinearCovariance(Covariance):
    """A covariance that is linear in its entries."""

    def inner(self, folded: Tensor) -> Tensor:
        return (folded * self.matrix).sum()


def square_root(matrix: Tensor) -> Tensor:
    """A square root of a positive semi-definite matrix: Cholesky's, else the symmetric one."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    if not int(info):
        return factor
    values, vectors = decomposed(matrix, "the covariance of a term")
    most = values.abs().max()
    if not bool(values[0] >= -matrix.shape[0] * torch.finfo(matrix.dtype).eps * most):
        found = f"its smallest eigenvalue is {float(values[0]):.6g}"
        if bool(values[0] > -_FEW_DIGITS * most):
            found += (
                f"; its numbers, or its distances, seem to have fewer digits than {matrix.dtype}"
            )
        raise NumericalError(found)
    return vectors * values.clamp(min=0).sqrt()


def condition(matrix: Tensor) -> float:
    """How many times rounding is magnified in the root of a positive semi-definite matrix."""
    if not bool(matrix.any()):
        return 1.0
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info):
        return inf
    return float((matrix.diagonal() / factor.diagonal() ** 2).max())
