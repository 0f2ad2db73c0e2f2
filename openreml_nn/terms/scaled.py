"""A sparse precision of which the places are scaled."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from openreml_nn.support.errors import NumericalError
from openreml_nn.terms.precision import Precision

__all__ = ["ScaledPrecision"]


class ScaledPrecision(Precision):
    r""":math:`Q = S^{-1} P S^{-1}` of a precision P; x are the scales on the diagonal of S (q,), of
    either sign, and then the numbers of P.

    Args:
        one: P.
    """

    def __init__(self, one: Precision) -> None:
        self.one, self.size, self.row, self.column = one, one.size, one.row, one.column

    @property
    def constants(self) -> list[Tensor]:
        return self.one.constants

    def covariance(self, x: Tensor) -> Tensor:
        s = x[: self.size]
        return s[:, None] * self.one.covariance(x[self.size :]) * s

    def covariance_along(self, x: Tensor, dx: Tensor) -> Tensor:
        s, K, d = x[: self.size], self.one.covariance(x[self.size :]), dx[: self.size]
        moved = self.one.covariance_along(x[self.size :], dx[self.size :])
        return (d[:, None] * s + s[:, None] * d) * K + s[:, None] * moved * s

    def _split(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """S, and the numbers of P."""
        s = x[: self.size]
        if not (np.isfinite(s) & (s != 0)).all():
            raise NumericalError("a scale of a covariance is zero or not finite")
        return s, x[self.size :]

    def entries(self, x: np.ndarray) -> np.ndarray:
        s, own = self._split(x)
        return self.one.entries(own) / (s[self.row] * s[self.column])

    def pull(self, x: np.ndarray, cotangent: np.ndarray) -> np.ndarray:
        s, own = self._split(x)
        c = cotangent / (s[self.row] * s[self.column])
        share = c * self.one.entries(own)
        by_log = np.bincount(self.row, share, self.size) + np.bincount(
            self.column, share, self.size
        )
        return np.concatenate([-by_log / s, self.one.pull(own, c)])

    def pull_square(self, x: np.ndarray, u: np.ndarray) -> np.ndarray:
        s, own = self._split(x)
        v = u / s[:, None]
        by_log = (v * self.one.times(own, v)).sum(1)
        return np.concatenate([-by_log / s, self.one.pull_square(own, v)])

    def times(self, x: np.ndarray, u: np.ndarray) -> np.ndarray:
        s, own = self._split(x)
        return self.one.times(own, u / s[:, None]) / s[:, None]

    def inner(self, x: np.ndarray, u: np.ndarray, effects: int) -> np.ndarray:
        s, own = self._split(x)
        scaled = u.reshape(self.size, -1) / s[:, None]
        return self.one.inner(own, scaled.reshape(u.shape), effects)

    def along(self, x: np.ndarray, dx: np.ndarray, u: np.ndarray) -> np.ndarray:
        s, own = self._split(x)
        s, d = s[:, None], (dx[: self.size] / s)[:, None]  # of log S
        v = u / s
        moved = self.one.along(own, dx[self.size :], v) - self.one.times(own, d * v)
        return (moved - d * self.one.times(own, v)) / s

    def log_det(self, x: np.ndarray) -> tuple[float, np.ndarray] | None:
        s, own = self._split(x)
        found = self.one.log_det(own)
        if found is None:
            return None
        return found[0] - 2 * float(np.log(np.abs(s)).sum()), np.concatenate([-2 / s, found[1]])

    def variances(self, x: np.ndarray) -> np.ndarray:
        s, own = self._split(x)
        return s**2 * self.one.variances(own)

    def scales(self, x: Tensor) -> Tensor:
        own, further = x[: self.size] ** 2, self.one.scales(x[self.size :])
        return own if further is None else own * further

    def solve(self, x: np.ndarray, u: np.ndarray) -> np.ndarray:
        s, own = self._split(x)
        return s[:, None] * self.one.solve(own, s[:, None] * u)
