r"""The inverse of a relationship matrix, :math:`Q = W^\top D^{-1} W`, taken apart again.

Row i of W is 1 at level i and elsewhere only at a few levels before it, its parents. Where levels
stand after their parents, those without offspring are eliminated side by side, generation by
generation. What that adds between parents takes away what their offspring have put there, so that W
has no entry more than the pedigree, while a factor that knows the pattern alone fills up.

Reference:
    Henderson, Biometrics 32 (1976) 69; Quaas, Biometrics 32 (1976) 949.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy.sparse import csc_matrix, csr_matrix, diags
from scipy.sparse.linalg import splu

__all__ = ["Descent"]

#: What is left of an entry, beside its diagonal ones, is rounding.
_ROUNDING = 1e-12
#: A generation that is a smaller part of those before it, and itself, is none.
_LEAST = 0.005


@dataclass(frozen=True)
class Descent:
    r""":math:`Q = W^\top D^{-1} W`.

    Attributes:
        W: lower triangular with a diagonal of ones, (n, n).
        precision: the diagonal of :math:`D^{-1}`, (n,).
    """

    W: csr_matrix
    precision: np.ndarray

    @classmethod
    def of(cls, Q: csc_matrix) -> Descent | None:
        """From a symmetric matrix (n, n); None where it is not of this form, or not positive
        definite."""
        n = Q.shape[0]
        scale = Q.diagonal()
        if not n or not (scale > 0).all():
            return None
        root = diags(scale**-0.5)
        start = S = csr_matrix(root @ Q @ root)  # to have ones on its diagonal
        left, precision, rows = np.arange(n), np.zeros(n), []
        while len(left):
            S.eliminate_zeros()
            S.sort_indices()
            diagonal = S.diagonal()
            if not (diagonal > _ROUNDING).all():
                return None
            last = S.indices[S.indptr[1:] - 1] == np.arange(len(left))
            if last.sum() < _LEAST * len(left):
                return None
            precision[left[last]] = pivot = diagonal[last]
            own = S[last]
            w = (diags(1 / pivot) @ own).tocoo()
            rows.append((left[last][w.row], left[w.col], w.data))
            rest = own[:, ~last]
            before, left = S[~last][:, ~last], left[~last]
            S = csr_matrix(before - rest.T @ diags(1 / pivot) @ rest)
            S.data[np.abs(S.data) < _ROUNDING] = 0.0
            if S.count_nonzero() > before.nnz:
                return None
        row, column, data = (np.concatenate(x) for x in zip(*rows, strict=True))
        W = csr_matrix((data, (row, column)), (n, n))
        if abs(W.T @ diags(precision) @ W - start).max() > _ROUNDING:
            return None
        return cls(csr_matrix(diags(scale**-0.5) @ W @ diags(scale**0.5)), precision * scale)

    @property
    def log_det(self) -> float:
        r""":math:`\log|Q|`."""
        return float(np.log(self.precision).sum())

    def solve(self, x: np.ndarray) -> np.ndarray:
        r""":math:`Q^{-1} x` for x (n, m)."""
        inner = self._triangle.solve(x, "T") / self.precision[:, None]
        return np.asarray(self._triangle.solve(inner))

    @cached_property
    def _triangle(self) -> Any:
        # What is triangular has no fill.
        options = {"SymmetricMode": True}
        return splu(csc_matrix(self.W), "NATURAL", diag_pivot_thresh=0.0, options=options)
