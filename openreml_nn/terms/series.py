r"""Precisions of series, of which each place depends on those before it through the last alone."""

from __future__ import annotations

import numpy as np
import torch
from scipy.linalg.lapack import dtbtrs
from torch import Tensor

from openreml_nn.support.errors import NumericalError
from openreml_nn.terms.base import Covariance
from openreml_nn.terms.precision import Precision, PrecisionCovariance

__all__ = [
    "LONG",
    "ChainPrecision",
    "DecayPrecision",
    "RepeatedPrecision",
    "SeriesPrecision",
    "StepPrecision",
    "chained",
    "is_series",
    "repeated",
]

#: A series of more times than these is lowered to its precision, which holds less.
LONG = 200


class ChainPrecision(Precision):
    r"""Places of variance 1 in series, each of which depends on those before it through the last alone.

    With :math:`\varphi_i` the correlation with the place before, zero at the start of a series, and
    :math:`d_i = 1 - \varphi_i^2`, it is :math:`Q = (I - \Phi)^\top D^{-1} (I - \Phi)`, which is
    tridiagonal in the order of the series: :math:`Q_{ii} = 1 / d_i + \varphi_{i+1}^2 / d_{i+1}` and
    :math:`Q_{i,i-1} = -\varphi_i / d_i`.

    Args:
        follows: (q,) whether a place follows another one, series by series.
        order: (q,) the places series by series, each in order; as they stand by default.
    """

    def __init__(self, follows: np.ndarray, order: np.ndarray | None = None) -> None:
        self.size = len(follows)
        self._at = np.arange(self.size) if order is None else order
        self._later = np.flatnonzero(follows)
        self._own, self._before = self._at[self._later], self._at[self._later - 1]
        own = np.arange(self.size)
        row = np.concatenate([own, np.maximum(self._own, self._before)])
        column = np.concatenate([own, np.minimum(self._own, self._before)])
        self._order = np.lexsort((row, column))
        self.row, self.column = row[self._order], column[self._order]

    def steps(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """φ and d of the places that follow another.

        Raises:
            NumericalError: if one of them is determined by the place before.
        """
        raise NotImplementedError

    def push_steps(self, x: np.ndarray, dx: np.ndarray) -> np.ndarray:
        """The derivative of these φ along dx."""
        raise NotImplementedError

    def pull_steps(self, x: np.ndarray, cotangent: np.ndarray) -> np.ndarray:
        """The derivative by x of the sum of these φ, each times its cotangent."""
        raise NotImplementedError

    def entries(self, x: np.ndarray) -> np.ndarray:
        phi, d = self.steps(x)
        own = np.ones(self.size)
        own[self._own] = 1 / d
        own[self._before] += phi**2 / d
        return np.concatenate([own, -phi / d])[self._order]

    def pull(self, x: np.ndarray, cotangent: np.ndarray) -> np.ndarray:
        phi, d = self.steps(x)
        c = np.empty_like(cotangent)
        c[self._order] = cotangent
        by_phi = 2 * phi * (c[self._own] + c[self._before]) - (1 + phi**2) * c[self.size :]
        return self.pull_steps(x, by_phi / d**2)

    # What a near place all but determines has a variance next to nothing: products with Q, whose
    # entries are then huge and cancel, are taken by way of what is left, (I - Φ) u.

    def pull_square(self, x: np.ndarray, u: np.ndarray) -> np.ndarray:
        phi, d = self.steps(x)
        before = u[self._before]
        left = (u[self._own] - phi[:, None] * before) / d[:, None]
        return self.pull_steps(x, phi * (left * left).sum(1) - (left * before).sum(1))

    def times(self, x: np.ndarray, u: np.ndarray) -> np.ndarray:
        phi, d = self.steps(x)
        left = u.copy()
        left[self._own] = (u[self._own] - phi[:, None] * u[self._before]) / d[:, None]
        return self._back(left, phi[:, None] * left[self._own])

    def inner(self, x: np.ndarray, u: np.ndarray, effects: int) -> np.ndarray:
        phi, d = self.steps(x)
        by_level = u.reshape(self.size, -1)
        half: np.ndarray = by_level.copy()
        half[self._own] -= phi[:, None] * by_level[self._before]
        half[self._own] /= np.sqrt(d)[:, None]
        half = half.reshape(u.shape)
        return np.asarray(half.T @ half)

    def along(self, x: np.ndarray, dx: np.ndarray, u: np.ndarray) -> np.ndarray:
        (phi, d), moved = self.steps(x), self.push_steps(x, dx)[:, None]
        phi, d = phi[:, None], d[:, None]
        before = u[self._before]
        left = (u[self._own] - phi * before) / d
        change = (2 * phi * left - before) * moved / d
        found = np.zeros_like(u)
        found[self._own] = change
        return self._back(found, phi * change + moved * left)

    def _back(self, left: np.ndarray, moved: np.ndarray) -> np.ndarray:
        """What is left, less what the places that follow take from each."""
        left[self._before] -= moved  # each is before one place at most
        return left

    def log_det(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        phi, d = self.steps(x)
        return -float(np.log(d).sum()), self.pull_steps(x, 2 * phi / d)

    def variances(self, x: np.ndarray) -> np.ndarray:
        return np.ones(self.size)

    def solve(self, x: np.ndarray, u: np.ndarray) -> np.ndarray:
        phi, d = self.steps(x)
        if not u.shape[1]:
            return u
        band = np.zeros((2, self.size))
        band[1, self._later - 1] = -phi
        half = dtbtrs(band, u[self._at], uplo="L", trans="T", diag="U")[0]
        half[self._later] *= d[:, None]
        found = np.empty_like(half)
        found[self._at] = dtbtrs(band, half, uplo="L", trans="N", diag="U")[0]
        return found


class SeriesPrecision(ChainPrecision):
    r"""Autoregression in whole steps, :math:`Q^{-1}_{ij} = \rho^{|t_i - t_j|}` within a series.

    The number x is ρ, and :math:`\varphi_i = \rho^{s_i}` for s steps since the time before.

    Args:
        steps: (q,) since the time before, each series in order; zero at the start of one.
    """

    def __init__(self, steps: np.ndarray) -> None:
        super().__init__(steps > 0)
        self.since = steps.astype(np.int64)
        self._powers = self.since[self._later].astype(float)

    @property
    def constants(self) -> list[Tensor]:
        return [torch.from_numpy(self.since)]

    def steps(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rho = float(x[0])
        if not abs(rho) < 1:
            raise NumericalError(f"the correlation of a series is {rho:.6g}")
        phi = np.power(rho, self._powers)
        return phi, 1 - phi**2

    def push_steps(self, x: np.ndarray, dx: np.ndarray) -> np.ndarray:
        return dx[0] * self._powers * np.power(float(x[0]), self._powers - 1)

    def pull_steps(self, x: np.ndarray, cotangent: np.ndarray) -> np.ndarray:
        return np.array([self.push_steps(x, np.ones(1)) @ cotangent])

    def covariance(self, x: Tensor) -> Tensor:
        lags, together = self._lags(x)
        return together * _powers_of(x, int(lags.max()))[lags]

    def covariance_along(self, x: Tensor, dx: Tensor) -> Tensor:
        lags, together = self._lags(x)
        powers = _powers_of(x, max(int(lags.max()) - 1, 0))
        return dx * together * lags * powers[(lags - 1).clamp(min=0)]

    def _lags(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Lags of times (q, q), and whether they are of one series."""
        steps = torch.from_numpy(self.since).to(like.device)
        series, times = (steps == 0).cumsum(0), steps.cumsum(0)
        together = series[:, None] == series
        return (times[:, None] - times).abs() * together, together


class DecayPrecision(ChainPrecision):
    r"""Correlation that decays with the time between, :math:`Q^{-1}_{ij} = e^{-\lambda |t_i - t_j|}` within
    a series.

    The number x is the rate λ, and :math:`\varphi_i = e^{-\lambda s_i}` for a time s since the one
    before.

    Args:
        times: (q,) in any order.
        series: (q,) which series each is of; one of all by default.
    """

    def __init__(self, times: np.ndarray, series: np.ndarray | None = None) -> None:
        self._series = np.zeros(len(times), np.int64) if series is None else series
        self._times = times
        order = np.lexsort((times, self._series))
        together = np.diff(self._series[order], prepend=-1) == 0
        super().__init__(together, order)
        self._since = self._times[self._own] - self._times[self._before]

    @property
    def constants(self) -> list[Tensor]:
        return [torch.from_numpy(self._times), torch.from_numpy(self._series)]

    def steps(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        since = float(x[0]) * self._since
        d = -np.expm1(-2 * since)
        if not (d > 0).all():
            apart = float(self._since[int((~(d > 0)).argmax())])
            raise NumericalError(f"times {apart:.6g} apart in a series have a correlation of 1")
        return np.exp(-since), d

    def push_steps(self, x: np.ndarray, dx: np.ndarray) -> np.ndarray:
        return -dx[0] * self._since * np.exp(-float(x[0]) * self._since)

    def pull_steps(self, x: np.ndarray, cotangent: np.ndarray) -> np.ndarray:
        return np.array([self.push_steps(x, np.ones(1)) @ cotangent])

    def covariance(self, x: Tensor) -> Tensor:
        apart, together = self._apart(x)
        return together * torch.exp(-x * apart)

    def covariance_along(self, x: Tensor, dx: Tensor) -> Tensor:
        return -dx * self._apart(x)[0] * self.covariance(x)

    def _apart(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Times between (q, q), and whether they are of one series."""
        times, series = (torch.from_numpy(of).to(like.device) for of in (self._times, self._series))
        together = series[:, None] == series
        return ((times[:, None] - times).abs() * together).to(like), together


class StepPrecision(ChainPrecision):
    r"""One series with a correlation of its own for each step, :math:`Q^{-1}_{ij} = \prod_{i < k \le j}
    \varphi_k`; the numbers x are these φ, (q - 1,).

    Args:
        size: q.
    """

    def __init__(self, size: int) -> None:
        super().__init__(np.arange(size) > 0)

    @property
    def constants(self) -> list[Tensor]:
        return []

    def steps(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        d = (1 - x) * (1 + x)
        if not (d > 0).all():
            raise NumericalError(f"a correlation of a series is {x[int((~(d > 0)).argmax())]:.6g}")
        return x, d

    def push_steps(self, x: np.ndarray, dx: np.ndarray) -> np.ndarray:
        return dx

    def pull_steps(self, x: np.ndarray, cotangent: np.ndarray) -> np.ndarray:
        return cotangent

    def covariance(self, x: Tensor) -> Tensor:
        upper = self._upper(x)
        return upper + upper.triu(1).mT

    def covariance_along(self, x: Tensor, dx: Tensor) -> Tensor:
        upper = self._upper(x)
        change = (upper[:, :-1] * dx) @ upper[1:]
        return change + change.mT

    def _upper(self, x: Tensor) -> Tensor:
        """The upper triangle of the correlations, (q, q)."""
        # Row i multiplies the correlations after i: ones before, then their running product.
        step = torch.cat([x.new_ones(1), x]).expand(self.size, self.size)
        after = torch.ones_like(step, dtype=torch.bool).triu(1)
        return torch.where(after, step, 1.0).cumprod(1).triu()


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

    def pull_square(self, x: np.ndarray, u: np.ndarray) -> np.ndarray:
        return self.one.pull_square(x, self._apart(u))

    def times(self, x: np.ndarray, u: np.ndarray) -> np.ndarray:
        return self._back(self.one.times(x, self._apart(u)))

    def along(self, x: np.ndarray, dx: np.ndarray, u: np.ndarray) -> np.ndarray:
        return self._back(self.one.along(x, dx, self._apart(u)))

    def log_det(self, x: np.ndarray) -> tuple[float, np.ndarray] | None:
        found = self.one.log_det(x)
        return None if found is None else (self.copies * found[0], self.copies * found[1])

    def variances(self, x: np.ndarray) -> np.ndarray:
        return np.tile(self.one.variances(x), self.copies)

    def scales(self, x: Tensor) -> Tensor | None:
        return self.one.scales(x)

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
        one = SeriesPrecision(np.tile(one.since, copies))
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
