r"""Covariances whose inverse is sparse by a chain along each side: AR(1), and AR(1) by AR(1).

Where each place depends on those before it through the last alone, the inverse of a covariance A
is tridiagonal: with :math:`\phi_i = A_{i,i-1} / A_{i-1,i-1}` and
:math:`d_i = A_{ii} - \phi_i A_{i,i-1}` it is :math:`(I - \Phi)^\top D^{-1} (I - \Phi)`.

Reference:
    Rue and Held, Gaussian Markov Random Fields (2005), section 1.1; Martin, Biometrika 66 (1979) 209.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import coo_matrix, csc_matrix, kron
from torch import Tensor

from openreml_nn.support.errors import NotPositiveDefiniteError
from openreml_nn.terms.base import Covariance
from openreml_nn.terms.covariance import KroneckerCovariance

__all__ = ["Chain", "ChainAt"]


@dataclass(frozen=True)
class ChainAt:
    r"""A chained covariance :math:`\lambda^2 Q^{-1}` at one point.

    Attributes:
        variance: :math:`\lambda^2`, its first entry.
        entries: of the lower triangle of Q, in the order of the pattern.
        log_det: :math:`\log|Q|`.
        kernel: entries of :math:`Q^{-1}` in the same order.
    """

    variance: Tensor
    entries: Tensor
    log_det: Tensor
    kernel: Tensor


class Chain:
    """The pattern of the inverse of a chained covariance.

    Args:
        g: the covariance; its sides may move, its sizes not.

    Attributes:
        pattern: (q, q), both triangles.
        row, column: of its lower triangle.
    """

    def __init__(self, g: Covariance) -> None:
        self.sizes = g.sizes if isinstance(g, KroneckerCovariance) else (len(g.matrix), 1)
        sides = [csc_matrix(np.tri(n, k=1) * np.tri(n, k=1).T) for n in self.sizes]
        self.pattern = csc_matrix(kron(*sides, format="coo"))
        self.pattern.eliminate_zeros()
        whole = self.pattern.tocoo()
        low = whole.row >= whole.col
        self.row, self.column = whole.row[low].astype(np.int64), whole.col[low].astype(np.int64)
        c = self.sizes[1]
        self._sides = [
            _band(self.row // c, self.column // c, self.sizes[0]),
            _band(self.row % c, self.column % c, c),
        ]

    def at(self, g: Covariance) -> ChainAt:
        """The covariance at one point, differentiable in its entries.

        Raises:
            NotPositiveDefiniteError: if it is not positive definite.
        """
        if isinstance(g, KroneckerCovariance):
            parts = list(g.parts())
        else:
            parts = [g.matrix, torch.ones_like(g.matrix[:1, :1])]
        sides = [_side(part) for part in parts]
        indices = [torch.from_numpy(side) for side in self._sides]
        (r, c) = self.sizes
        entries = sides[0][1][indices[0]] * sides[1][1][indices[1]]
        kernel = sides[0][2][indices[0]] * sides[1][2][indices[1]]
        log_det = c * sides[0][3] + r * sides[1][3]
        return ChainAt(sides[0][0] * sides[1][0], entries, log_det, kernel)

    def score(self, g: Covariance, variance: float, inverse: np.ndarray, u: np.ndarray) -> Tensor:
        r"""The derivative of the log-likelihood by the entries of the covariance.

        It is :math:`\tfrac12 (Q^{-1} - M^{-1} - u u^\top)` by Q.

        Args:
            g: the covariance.
            variance: the derivative by :math:`\lambda^2`.
            inverse: entries of :math:`M^{-1}` in the order of the pattern.
            u: effects over λ, (q, m).
        """
        square = np.zeros(len(self.row))
        for column in u.T:
            square += column[self.row] * column[self.column]
        with torch.enable_grad():
            entries = g.matrix.detach().requires_grad_()
            at = self.at(g.with_matrix(entries))
            S = at.kernel.detach() - torch.from_numpy(inverse + square)
            S = S * torch.from_numpy(np.where(self.row > self.column, 1.0, 0.5))
            (found,) = torch.autograd.grad(variance * at.variance + S @ at.entries, entries)
        return found

    def matrix(self, entries: np.ndarray) -> csc_matrix:
        """Q from the entries of its lower triangle."""
        q = self.sizes[0] * self.sizes[1]
        off = self.row > self.column
        row = np.concatenate([self.row, self.column[off]])
        column = np.concatenate([self.column, self.row[off]])
        return coo_matrix((np.concatenate([entries, entries[off]]), (row, column)), (q, q)).tocsc()


def _band(row: np.ndarray, column: np.ndarray, size: int) -> np.ndarray:
    """Places of entries of a tridiagonal matrix among its diagonal and then its other entries."""
    return np.where(row == column, row, size + np.minimum(row, column))


def _side(A: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """First entry of A; of A over that, the band of its inverse, its own, and minus log|A|."""
    first = A[0, 0]
    if not bool(first > 0):
        raise NotPositiveDefiniteError(
            "V is not positive definite: an autoregression has no variance"
        )
    on, off = A.diagonal() / first, A.diagonal(1) / first
    phi = off / on[:-1]
    d = torch.cat([on[:1], on[1:] - phi * off])
    if not bool((d > 0).all()):
        raise NotPositiveDefiniteError("V is not positive definite: an autoregression is not")
    own = 1 / d
    band = torch.cat([own + torch.nn.functional.pad(phi**2 * own[1:], (0, 1)), -phi * own[1:]])
    return first, band, torch.cat([on, off]), -d.log().sum()
