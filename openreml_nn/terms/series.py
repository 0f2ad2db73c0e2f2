r"""Precisions of autoregressive series, and of independent copies of a field."""

from __future__ import annotations

import numpy as np
import torch
from scipy.linalg import solveh_banded
from torch import Tensor

from openreml_nn.support.errors import NumericalError
from openreml_nn.terms.base import Covariance
from openreml_nn.terms.precision import Precision, PrecisionCovariance

__all__ = ["RepeatedPrecision", "SeriesPrecision", "chained", "is_series", "repeated"]


class SeriesPrecision(Precision):
    r"""Autoregression in whole steps, :math:`Q^{-1}_{ij} = \rho^{|t_i - t_j|}` within a series.

    The number x is ρ. With :math:`\varphi_i = \rho^{s_i}` for s steps since the time before,
    :math:`d_i = 1 - \varphi_i^2` and zero for φ at the start of a series, Q is tridiagonal:
    :math:`Q_{ii} = 1 / d_i + \varphi_{i+1}^2 / d_{i+1}` and :math:`Q_{i,i-1} = -\varphi_i / d_i`.

    Args:
        steps: (q,) since the time before, each series in order; zero at the start of one.
    """

    def __init__(self, steps: np.ndarray) -> None:
        self.steps, self.size = steps.astype(np.int64), len(steps)
        later = np.flatnonzero(self.steps)
        own = np.arange(self.size)
        row, column = np.concatenate([own, later]), np.concatenate([own, later - 1])
        self._order = np.lexsort((row, column))
        self.row, self.column = row[self._order], column[self._order]
        self._later = later

    @property
    def constants(self) -> list[Tensor]:
        return [torch.from_numpy(self.steps)]

    def _powers(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """φ and its derivative, of the times that follow another."""
        rho, s = float(x[0]), self.steps[self._later].astype(float)
        if not abs(rho) < 1:
            raise NumericalError(f"the correlation of a series is {rho:.6g}")
        return np.power(rho, s), s * np.power(rho, s - 1)

    def covariance(self, x: Tensor) -> Tensor:
        lags, together = self._lags(x)
        return together * _powers_of(x, int(lags.max()))[lags]

    def covariance_along(self, x: Tensor, dx: Tensor) -> Tensor:
        lags, together = self._lags(x)
        powers = _powers_of(x, max(int(lags.max()) - 1, 0))
        return dx * together * lags * powers[(lags - 1).clamp(min=0)]

    def _lags(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Lags of times (q, q), and whether they are of one series."""
        steps = torch.from_numpy(self.steps).to(like.device)
        series, times = (steps == 0).cumsum(0), steps.cumsum(0)
        together = series[:, None] == series
        return (times[:, None] - times).abs() * together, together

    def entries(self, x: np.ndarray) -> np.ndarray:
        phi, _ = self._powers(x)
        d = 1 - phi**2
        own = np.ones(self.size)
        own[self._later] = 1 / d
        own[self._later - 1] += phi**2 / d
        return np.concatenate([own, -phi / d])[self._order]

    def pull(self, x: np.ndarray, cotangent: np.ndarray) -> np.ndarray:
        return np.array([self._slope(x) @ cotangent])

    def _slope(self, x: np.ndarray) -> np.ndarray:
        """Derivatives of the entries by ρ."""
        phi, slope = self._powers(x)
        d = 1 - phi**2
        by_own = 2 * phi * slope / d**2  # of 1 / d, and of φ² / d alike
        own = np.zeros(self.size)
        own[self._later] = by_own
        own[self._later - 1] += by_own
        return np.concatenate([own, -slope * (1 + phi**2) / d**2])[self._order]

    def along(self, x: np.ndarray, dx: np.ndarray, u: np.ndarray) -> np.ndarray:
        return np.asarray(self.matrix(float(dx[0]) * self._slope(x)) @ u)

    def log_det(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        phi, slope = self._powers(x)
        d = 1 - phi**2
        return -float(np.log(d).sum()), np.array([(2 * phi * slope / d).sum()])

    def variance_of_new(self, x: np.ndarray) -> float:
        return 1.0

    def solve(self, x: np.ndarray, u: np.ndarray) -> np.ndarray:
        entries = self.entries(x)
        if self.size == 1:  # of which LAPACK has no band
            return u / entries
        on = self.row == self.column
        band = np.zeros((2, self.size))
        band[0] = entries[on]
        band[1, self._later - 1] = entries[~on]
        return np.asarray(solveh_banded(band, u, lower=True))


class RepeatedPrecision(Precision):
    """Independent copies of a precision, all made of the same numbers.

    Args:
        one: what is copied.
        copies: how many.
    """

    def __init__(self, one: Precision, copies: int) -> None:
        self.one, self.copies, self.size = one, copies, copies * one.size
        start = np.arange(copies)[:, None] * one.size
        self.row, self.column = ((start + x).reshape(-1) for x in (one.row, one.column))

    @property
    def constants(self) -> list[Tensor]:
        return self.one.constants

    def covariance(self, x: Tensor) -> Tensor:
        return self._every(self.one.covariance(x))

    def covariance_along(self, x: Tensor, dx: Tensor) -> Tensor:
        return self._every(self.one.covariance_along(x, dx))

    def _every(self, K: Tensor) -> Tensor:
        return torch.block_diag(*[K] * self.copies)

    def entries(self, x: np.ndarray) -> np.ndarray:
        return np.tile(self.one.entries(x), self.copies)

    def pull(self, x: np.ndarray, cotangent: np.ndarray) -> np.ndarray:
        return self.one.pull(x, cotangent.reshape(self.copies, -1).sum(0))

    def along(self, x: np.ndarray, dx: np.ndarray, u: np.ndarray) -> np.ndarray:
        return self._back(self.one.along(x, dx, self._apart(u)))

    def log_det(self, x: np.ndarray) -> tuple[float, np.ndarray] | None:
        found = self.one.log_det(x)
        return None if found is None else (self.copies * found[0], self.copies * found[1])

    def variance_of_new(self, x: np.ndarray) -> float:
        return self.one.variance_of_new(x)

    def solve(self, x: np.ndarray, u: np.ndarray) -> np.ndarray:
        return self._back(self.one.solve(x, self._apart(u)))

    def _apart(self, u: np.ndarray) -> np.ndarray:
        """A column for each copy and each of u, (q, copies m)."""
        by_copy = u.reshape(self.copies, self.one.size, -1)
        return np.ascontiguousarray(by_copy.transpose(1, 0, 2)).reshape(self.one.size, -1)

    def _back(self, u: np.ndarray) -> np.ndarray:
        by_level = u.reshape(self.one.size, self.copies, -1)
        return by_level.transpose(1, 0, 2).reshape(self.size, -1)


def repeated(g: PrecisionCovariance, copies: int) -> PrecisionCovariance:
    r""":math:`I \otimes G` of a covariance by a precision."""
    one: Precision = g.precision
    if copies == 1:
        return g
    if isinstance(one, SeriesPrecision):
        one = SeriesPrecision(np.tile(one.steps, copies))
    else:
        one = RepeatedPrecision(one, copies)
    return PrecisionCovariance(g.matrix, one, g.effects)


def is_series(g: Covariance) -> bool:
    """Whether it is of series by their precision, with one effect a time."""
    is_precise = isinstance(g, PrecisionCovariance) and isinstance(g.precision, SeriesPrecision)
    return is_precise and g.width == 1


def chained(g: Covariance, size: int) -> Tensor | None:
    """G itself, (q, q), where its inverse is known to be tridiagonal; None where it is not."""
    return g.whole(size) if (g.is_chained and g.is_solid) or is_series(g) else None


def _powers_of(x: Tensor, last: int) -> Tensor:
    """ρ to the powers of 0 … last."""
    # By products: the second derivative of a power is NaN at zero in torch.
    powers, step = torch.ones_like(x), x
    while len(powers) <= last:
        powers = torch.cat([powers, powers * step])
        step = step * step
    return powers[: last + 1]
