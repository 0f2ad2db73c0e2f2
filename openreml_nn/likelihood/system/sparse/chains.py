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
from scipy.sparse import block_diag, coo_matrix, csc_matrix, eye, kron
from torch import Tensor

from openreml_nn.support.errors import NotPositiveDefiniteError
from openreml_nn.terms.base import Covariance
from openreml_nn.terms.covariance import KroneckerCovariance
from openreml_nn.terms.direct_sum import DirectSumCovariance
from openreml_nn.terms.precision import PrecisionCovariance
from openreml_nn.terms.series import SeriesPrecision

__all__ = ["Chain", "ChainAt"]


@dataclass(frozen=True)
class ChainAt:
    r"""A chained covariance :math:`\Lambda Q^{-1} \Lambda` at one point, of one field or several.

    Attributes:
        variances: :math:`\lambda^2` of each field, its first entry.
        entries: of the lower triangle of Q, in the order of the pattern.
        log_det: :math:`\log|Q|`.
        kernel: entries of :math:`Q^{-1}` in the same order.
    """

    variances: Tensor
    entries: Tensor
    log_det: Tensor
    kernel: Tensor


class Chain:
    """The pattern of the inverse of a chained covariance, of one field or several.

    Args:
        g: the covariance; its sides may move, its sizes not.

    Attributes:
        fields: how many independent fields it has.
        of: (q,) the field of each column.
        pattern: (q, q), both triangles.
        row, column: of its lower triangle.
    """

    def __init__(self, g: Covariance) -> None:
        self._fields = [_Field(form) for form in _parts(g)]
        self.fields = len(self._fields)
        sizes = [field.size for field in self._fields]
        self.of = np.repeat(np.arange(self.fields), sizes)
        start = np.cumsum([0, *sizes])[:-1]
        self.pattern = csc_matrix(block_diag([field.pattern for field in self._fields]))
        self.pattern.sort_indices()
        self.row, self.column = (
            np.concatenate([at + x for at, x in zip(start, each, strict=True)])
            for each in zip(*((field.row, field.column) for field in self._fields), strict=True)
        )

    def at(self, g: Covariance) -> ChainAt:
        """The covariance at one point, differentiable in its entries.

        Raises:
            NotPositiveDefiniteError: if it is not positive definite.
        """
        found = [field.at(part) for field, part in zip(self._fields, _parts(g), strict=True)]
        variances, entries, log_dets, kernels = zip(*found, strict=True)
        return ChainAt(
            torch.stack(variances),
            torch.cat(entries),
            torch.stack(log_dets).sum(),
            torch.cat(kernels),
        )

    def roots(self, g: Covariance) -> np.ndarray:
        """Λ of each column, (q, 1, 1), or (1, 1, 1) of a single field."""
        root = self.at(g).variances.numpy() ** 0.5
        return (root if self.fields == 1 else root[self.of])[:, None, None]

    def score(
        self, g: Covariance, variances: np.ndarray, inverse: np.ndarray, u: np.ndarray
    ) -> Tensor:
        r"""The derivative of the log-likelihood by the entries of the covariance.

        It is :math:`\tfrac12 (Q^{-1} - M^{-1} - u u^\top)` by Q.

        Args:
            g: the covariance.
            variances: the derivative by :math:`\lambda^2` of each field.
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
            value = torch.from_numpy(variances) @ at.variances + S @ at.entries
            (found,) = torch.autograd.grad(value, entries)
        return found

    def matrix(self, entries: np.ndarray) -> csc_matrix:
        """Q from the entries of its lower triangle."""
        q = len(self.of)
        off = self.row > self.column
        row = np.concatenate([self.row, self.column[off]])
        column = np.concatenate([self.column, self.row[off]])
        return coo_matrix((np.concatenate([entries, entries[off]]), (row, column)), (q, q)).tocsc()


def _parts(g: Covariance) -> list[Covariance]:
    return g.parts() if isinstance(g, DirectSumCovariance) else [g]


class _Field:
    """The pattern of one field, or of one chain."""

    def __init__(self, g: Covariance) -> None:
        self.sizes = len(g.matrix), 1
        if isinstance(g, KroneckerCovariance):
            self.sizes = g.sizes
        elif isinstance(g, PrecisionCovariance):
            self.sizes = g.precision.size, 1
        self.size = self.sizes[0] * self.sizes[1]
        sides = [eye(n) + eye(n, k=1) + eye(n, k=-1) for n in self.sizes]
        self.pattern = csc_matrix(kron(*sides, format="coo"))
        self.pattern.sort_indices()
        whole = self.pattern.tocoo()
        low = whole.row >= whole.col
        self.row, self.column = whole.row[low].astype(np.int64), whole.col[low].astype(np.int64)
        c = self.sizes[1]
        self._sides = [
            _band(self.row // c, self.column // c, self.sizes[0]),
            _band(self.row % c, self.column % c, c),
        ]

    def at(self, g: Covariance) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The variance, and entries, log-determinant and kernel of Q."""
        if isinstance(g, KroneckerCovariance):
            one, other = (_side(part) for part in g.parts())
        elif isinstance(g, PrecisionCovariance):
            one, other = _series(g), _side(torch.ones_like(g.parts()[0]))
        else:
            one, other = _side(g.matrix), _side(torch.ones_like(g.matrix[:1, :1]))
        index, second = (torch.from_numpy(side) for side in self._sides)
        r, c = self.sizes
        entries, kernel = (one[i][index] * other[i][second] for i in (1, 2))
        return one[0] * other[0], entries, c * one[3] + r * other[3], kernel


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
    return first, *_of_chain(phi, d, torch.cat([on, off]))


def _series(g: PrecisionCovariance) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`_side` of series by their numbers."""
    assert isinstance(g.precision, SeriesPrecision)
    (first,), rho = g.parts()
    steps = torch.from_numpy(g.precision.since[1:])
    phi = torch.where(steps > 0, rho**steps, 0)
    one = torch.ones_like(first)
    return first[0], *_of_chain(
        phi, torch.cat([one, 1 - phi**2]), torch.cat([one.expand(len(phi) + 1), phi])
    )


def _of_chain(phi: Tensor, d: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The band of the inverse of a chain, that of its own, and minus its log-determinant."""
    if not bool((d > 0).all()):
        raise NotPositiveDefiniteError("V is not positive definite: an autoregression is not")
    own = 1 / d
    band = torch.cat([own + torch.nn.functional.pad(phi**2 * own[1:], (0, 1)), -phi * own[1:]])
    return band, kernel, -d.log().sum()
