"""A known matrix between the levels of a factor, and tensors whose contents are compared."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy.linalg import qr
from scipy.sparse import csc_matrix
from scipy.sparse.linalg import splu
from torch import Tensor

from openreml_nn.support.errors import NotPositiveDefiniteError
from openreml_nn.support.modes import outside_inference
from openreml_nn.terms.descent import Descent

__all__ = ["Kernel", "private", "same_content"]


class Kernel:
    """A known symmetric matrix K, given itself or by its sparse inverse.

    What is computed of an inverse is kept, so the kernel holds a copy of that: compare it with
    :func:`same_content` before the kernel is used again.

    Args:
        matrix: K, (q, q).
        inverse: its inverse in place of it, (q, q), sparse or dense.
        null: what the inverse is zero on, (q, k) orthonormal; K is then its pseudo-inverse.

    Attributes:
        source: the one that was given.
        size: q.
    """

    def __init__(
        self,
        matrix: Tensor | None = None,
        inverse: Tensor | None = None,
        null: Tensor | None = None,
    ) -> None:
        self.null = null
        self.inverse = None if inverse is None else private(inverse)
        given = self.inverse if matrix is None else matrix
        assert given is not None
        self.source, self.size = given, given.shape[0]
        self._dense = matrix

    def __getstate__(self) -> dict[str, Any]:
        """What a copy and a pickle take: all but the factor, which cannot be copied."""
        return {name: value for name, value in self.__dict__.items() if name != "_factor"}

    def private(self) -> Kernel:
        """A copy of the kernel with contents that nobody else can change."""
        return self if self.inverse is not None else Kernel(private(self.source))

    def dense(self) -> Tensor:
        """K itself; from its inverse it is computed once.

        Raises:
            NotPositiveDefiniteError: if the inverse is not positive definite.
        """
        if self._dense is None:
            assert self.inverse is not None
            # A constant, outside of any transform: torch 2.6 takes sparse tensors within one for dense.
            with torch._C._DisableFuncTorch(), torch.inference_mode(False), torch.no_grad():
                inverse, N = self.inverse.to_dense(), self.null
                scale = inverse.diagonal().mean()
                if N is not None:
                    inverse = inverse + scale * N @ N.mT
                factor, info = torch.linalg.cholesky_ex(inverse)
                if int(info):
                    raise NotPositiveDefiniteError("`inverse` is not positive definite")
                found = torch.cholesky_inverse(factor)
                self._dense = found if N is None else found - N @ N.mT / scale
        return self._dense

    def multiply(self, x: Tensor) -> Tensor:
        """:math:`K x` for x (q, m), by a sparse solve where only the inverse is known."""
        if self._dense is not None:
            return self._dense.to(x) @ x
        if x.requires_grad or torch._C._are_functorch_transforms_active():
            return self.dense().to(x) @ x  # no derivative passes through a sparse factor
        y = self._within(x.detach().cpu().double().numpy())
        return torch.from_numpy(self._within(self._factor.solve(y))).to(x)

    def _within(self, x: np.ndarray) -> np.ndarray:
        """x (q, m) less what it has of the null space."""
        if self.null is None:
            return x
        N = self.null.detach().cpu().double().numpy()
        return np.asarray(x - N @ (N.T @ x))

    def log_det(self) -> float:
        r""":math:`\log|K|` of a kernel known by its inverse, which is zero on nothing."""
        factor = self._factor
        if isinstance(factor, Descent):
            return -factor.log_det
        return -float(np.log(factor.U.diagonal()).sum())

    @cached_property
    def _factor(self) -> Any:
        """What solves with the inverse: its descent, or else SuperLU's factor without pivoting."""
        assert self.inverse is not None
        sparse = self.inverse.detach().cpu().double().to_sparse_coo().coalesce()
        index, size = sparse.indices().numpy(), (self.size, self.size)
        matrix = csc_matrix((sparse.values().numpy(), (index[0], index[1])), shape=size)
        descent = Descent.of(matrix) if self.null is None else None
        if descent is not None:
            return descent
        if self.null is not None:
            # Of what has nothing of the null space the solution is zero at corners: any will do there.
            N = self.null.detach().cpu().double().numpy()
            corners = qr(N.T, mode="r", pivoting=True)[1][: N.shape[1]]
            weight = np.full(len(corners), matrix.diagonal().mean())
            matrix = matrix + csc_matrix((weight, (corners, corners)), shape=size)
        options = {"SymmetricMode": True}
        try:
            factor = splu(matrix, "MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options=options)
        except RuntimeError:
            raise NotPositiveDefiniteError("`inverse` is singular") from None
        if not (factor.U.diagonal() > 0).all():
            raise NotPositiveDefiniteError("`inverse` is not positive definite")
        return factor


def private(tensor: Tensor) -> Tensor:
    """A copy of the content, outside of any graph and of inference mode."""
    with outside_inference(recording=False):
        return tensor.detach().clone()


def same_content(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two tensors hold the same numbers in the same form, or both are None."""
    if one is None or other is None:
        return one is other
    forms = [(x.shape, x.dtype, x.device, x.layout) for x in (one, other)]
    if forms[0] != forms[1]:
        return False
    if one.layout == torch.strided:
        return torch.equal(one, other)
    parts = [x.detach().to_sparse_coo().coalesce() for x in (one, other)]
    return torch.equal(parts[0].indices(), parts[1].indices()) and torch.equal(
        parts[0].values(), parts[1].values()
    )
