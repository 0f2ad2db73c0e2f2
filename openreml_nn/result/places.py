"""Places at which levels are predicted that were not in the data: kriging."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from openreml_nn.support.spectrum import decomposed
from openreml_nn.terms.design import IndexedDesign

__all__ = ["Kriging", "PlacedDesign"]


class Kriging(NamedTuple):
    r"""Places whose effects are regressed on those of the levels: with K the covariance of the
    levels and c that with a place, :math:`E(b_* \mid b) = c^\top K^{-1} b`.

    Attributes:
        rows: (m,) the rows.
        levels: (m, s) the levels on which each is regressed: all, or its neighbours.
        weights: (m, s) :math:`K^{-1} c` of each.
        left: (m,) the part of the prior variance that is left, :math:`1 - c^\top K^{-1} c / k_{**}`.
    """

    rows: Tensor
    levels: Tensor
    weights: Tensor
    left: Tensor

    @classmethod
    def of(cls, rows: Tensor, K: Tensor, c: Tensor) -> Kriging:
        """The kriging of rows whose effects have covariances c (m, q) with those of the levels, K (q, q),
        and the same variance."""
        variance = K.diagonal().mean()
        factor, info = torch.linalg.cholesky_ex(K)
        ends = factor.diagonal().square()
        if not int(info) and bool(ends.min() > 1e4 * len(K) * torch.finfo(K.dtype).eps * variance):
            weights = torch.cholesky_solve(c.mT, factor).mT
        else:
            # Smooth kernels of near places: directions that rounding hides have no variance.
            values, vectors = decomposed(K, "the covariance of the places")
            seen = values > len(K) * torch.finfo(K.dtype).eps * values[-1]
            inverse = torch.where(seen, 1 / torch.where(seen, values, 1), 0)
            weights = ((c @ vectors) * inverse) @ vectors.mT
        left = 1 - (weights * c).sum(1) / variance
        levels = torch.arange(len(K), device=rows.device).expand_as(weights)
        return cls(rows, levels, weights, left.clamp(min=0))

    def take(self, at: Tensor, rows: Tensor) -> Kriging:
        """Some of the places, ``at``, for other rows."""
        return Kriging(rows, self.levels[at], self.weights[at], self.left[at])

    def means(self, values: Tensor) -> Tensor:
        """What the effects of levels (q, k) say of those of each place, (m, k)."""
        return (self.weights.to(values)[:, :, None] * values[self.levels]).sum(1)

    def bound(self, z: Tensor, variances: Tensor) -> Tensor:
        r"""The most that the variance of the error of :meth:`means`, times z (m, k), can be, whatever
        the covariances of levels, (m,): :math:`(\sum_i |w_i| \sqrt{z^\top P_i z})^2`.

        Args:
            z: values of the effects.
            variances: (q, k, k) prediction-error variances P of the levels.
        """
        own = torch.einsum("mk,mskl,ml->ms", z, variances.to(z)[self.levels], z)
        return (self.weights.to(z).abs() * own.clamp(min=0).sqrt()).sum(1) ** 2


@dataclass(frozen=True)
class PlacedDesign:
    """A design in which some rows are at places: combinations of all levels.

    Attributes:
        levels: of the others; rows at places are of no level there.
        kriging: the places.
        z: (n, k) values of the effects of all rows.
    """

    levels: IndexedDesign
    kriging: Kriging
    z: Tensor

    def take(self, rows: Tensor) -> PlacedDesign:
        """The design of some rows."""
        where = torch.full((len(self.z),), -1, device=rows.device)
        where[self.kriging.rows] = torch.arange(len(self.kriging.rows), device=rows.device)
        own = where[rows]
        at = (own >= 0).nonzero()[:, 0]
        kriging = self.kriging.take(own[at], at)
        return PlacedDesign(self.levels.take(rows), kriging, self.z[rows])

    def entries(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Columns and entries of the rows at places, (m, s k) each."""
        z, k = self.z[self.kriging.rows].to(like), self.z.shape[1]
        columns = self.kriging.levels[:, :, None] * k + torch.arange(k, device=z.device)
        entries = self.kriging.weights.to(like)[:, :, None] * z[:, None, :]
        return columns.flatten(1), entries.flatten(1)
