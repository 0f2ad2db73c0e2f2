"""Places at which levels are predicted that were not in the data: kriging."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from openreml_nn.terms.design import IndexedDesign

__all__ = ["Kriging", "PlacedDesign"]


class Kriging(NamedTuple):
    r"""Places whose effects are regressed on those of the levels: with K the covariance of the
    levels and c that with a place, :math:`E(b_* \mid b) = c^\top K^{-1} b`.

    Attributes:
        rows: (m,) the rows.
        weights: (m, q) :math:`K^{-1} c` of each.
        left: (m,) the part of the prior variance that is left, :math:`1 - c^\top K^{-1} c / k_{**}`.
    """

    rows: Tensor
    weights: Tensor
    left: Tensor

    @classmethod
    def of(cls, rows: Tensor, K: Tensor, c: Tensor) -> Kriging:
        """Those of rows with covariances c (m, q) with the levels, all of the variance of K."""
        variance = K.diagonal().mean()
        factor, info = torch.linalg.cholesky_ex(K)
        ends = factor.diagonal().square()
        if not int(info) and bool(ends.min() > 1e4 * len(K) * torch.finfo(K.dtype).eps * variance):
            weights = torch.cholesky_solve(c.mT, factor).mT
        else:
            # Smooth kernels of near places: directions that rounding hides have no variance.
            values, vectors = torch.linalg.eigh(K)
            seen = values > len(K) * torch.finfo(K.dtype).eps * values[-1]
            inverse = torch.where(seen, 1 / torch.where(seen, values, 1), 0)
            weights = ((c @ vectors) * inverse) @ vectors.mT
        left = 1 - (weights * c).sum(1) / variance
        return cls(rows, weights, left.clamp(min=0))


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
        """That of some rows."""
        where = torch.full((len(self.z),), -1, device=rows.device)
        where[self.kriging.rows] = torch.arange(len(self.kriging.rows), device=rows.device)
        own = where[rows]
        at = (own >= 0).nonzero()[:, 0]
        kriging = Kriging(at, self.kriging.weights[own[at]], self.kriging.left[own[at]])
        return PlacedDesign(self.levels.take(rows), kriging, self.z[rows])  # type: ignore[arg-type]

    def combinations(self, like: Tensor) -> Tensor:
        """Columns of all levels for the rows at places, (m, q k)."""
        z = self.z[self.kriging.rows].to(like)
        return (self.kriging.weights.to(like)[:, :, None] * z[:, None, :]).flatten(1)
