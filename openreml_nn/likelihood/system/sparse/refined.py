r"""Solutions of the sparse equations with the digits that their factor has lost.

Reference:
    Higham, Accuracy and Stability of Numerical Algorithms (2002), chapter 12.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from openreml_nn.likelihood.system.sparse.bordered import Factored
from openreml_nn.likelihood.system.sparse.equations import Equations
from openreml_nn.likelihood.system.sparse.terms import TermAt

__all__ = ["noise_of", "solved"]

#: Solutions are refined, so often, where rounding is magnified so many times in the factor.
_REFINED, _TIMES = 1e6, 2
#: What rounding leaves unknown of the log-likelihood is not told below this.
_SEEN = 1e-6


def solved(
    equations: Equations,
    points: Sequence[TermAt],
    moved: Sequence[np.ndarray],
    factor: Factored,
    right: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    r""":math:`L^{-1} b` (q, m) and :math:`b^\top M^{-1} b` (m, m), with :math:`u = M^{-1} b` where that
    was refined, else None.

    There the second is :math:`b^\top u + u^\top b - u^\top M u`, in which an error of u is squared.

    Args:
        equations: their pattern.
        points: the random terms at the point.
        moved: the blocks of :math:`\Lambda^\top Z^\top R^{-1} Z \Lambda`.
        factor: of M.
        right: b, (q, m).
    """
    half = factor.half(right)
    if factor.loss < _REFINED or not _move(points):
        return half, factor.inner(half, half), None

    def products(u: np.ndarray) -> np.ndarray:
        pairs = zip(points, equations.split(u), strict=True)
        prior = [point.times_prior(part) for point, part in pairs]
        return equations.times(moved, u) + np.concatenate(prior)

    u = factor.back(half)
    for _ in range(_TIMES):
        u = u + factor.back(factor.half(right - products(u)))
    pairs = zip(points, equations.split(u), strict=True)
    inner = u.T @ equations.times(moved, u) + sum(point.inner_prior(x) for point, x in pairs)
    twice = right.T @ u
    return half, np.asarray(twice + twice.T - inner), u


def noise_of(factor: Factored, points: Sequence[TermAt]) -> float:
    """What rounding leaves unknown of the log-likelihood.

    A precision that moves may have entries far beyond what the data say of its effects, as of places
    that their neighbours all but determine.
    """
    found = factor.noise / 2 if _move(points) else 0.0
    return found if found > _SEEN else 0.0


def _move(points: Sequence[TermAt]) -> bool:
    """Whether the precision of a term moves with parameters."""
    return any(point.moving is not None for point in points)
