"""Curves of a profile likelihood."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import exp

import numpy as np
from torch import Tensor

from openreml_nn.support.checks import check_number

__all__ = ["Curve", "Path", "curve_through", "points_of"]

#: How far each curve goes, in zeta, and by what steps.
_REACH, _STEP = 2.9, 0.4
#: Points are no further from each other, in zeta, where halves of a step lead between them, and a step
#: is divided at most so many times.
_WIDE, _MOST_PARTS = 1.5 * _STEP, 20
#: Levels that the curves reach.
_MOST_LEVEL = 0.995
#: Errors away from the estimate at which a likelihood that still has not fallen says nothing.
_FAR = 1e6
#: Where slopes between points differ by more than this factor, as where a likelihood is flat and falls
#: all at once, a cubic spline swings.
_UNEVEN = 20.0


@dataclass(frozen=True)
class Curve:
    r"""The profile of one parameter.

    Attributes:
        estimate: the maximum-likelihood estimate.
        values: values of the parameter, ascending.
        zeta: :math:`\pm\sqrt{2(\hat\ell - \ell_p)}` at these, ℓ_p the maximum over all else.
        lower: lower bound of the parameter.
        upper: upper bound of the parameter.
        logarithmic: whether its logarithm is interpolated, as of a positive one that may be very large.
    """

    estimate: float
    values: np.ndarray
    zeta: np.ndarray
    lower: float
    upper: float
    logarithmic: bool = False

    def interval(self, level: float) -> tuple[float, float]:
        """Where the likelihood-ratio test of a level accepts; a bound where it is not left.

        Raises:
            InputError: if the level is not between 0 and 0.995, beyond which no curve goes.
            TypeError: if it is no number.
        """
        from scipy.interpolate import CubicSpline, PchipInterpolator
        from scipy.stats import norm

        level = check_number("level", level, above=0, below=_MOST_LEVEL)
        z = float(norm.ppf((1 + level) / 2))
        if len(self.zeta) < 2:
            # The likelihood says nothing of it.
            return self.lower, self.upper
        values = np.log(self.values) if self.logarithmic else self.values
        slopes = np.diff(values) / np.diff(self.zeta)
        is_even = slopes.max() < _UNEVEN * slopes.min()
        inverse = (CubicSpline if is_even else PchipInterpolator)(self.zeta, values)

        def at(zeta: float) -> float:
            found = float(inverse(zeta))
            return exp(found) if self.logarithmic else found

        low = at(-z) if self.zeta[0] <= -z else self.lower
        high = at(z) if self.zeta[-1] >= z else self.upper
        return low, high


def points_of(
    best: float,
    estimate: float,
    error: float,
    branch: Callable[[], Callable[[float], float]],
    lower: float,
    upper: float,
) -> dict[float, float]:
    r"""Distances :math:`\sqrt{2(\hat\ell - \ell_p)}` at values to both sides of an estimate.

    Args:
        best: the log-likelihood at the estimate.
        estimate: the value there.
        error: its standard error, roughly.
        branch: what begins a side; it yields the profile log-likelihood at values further and further.
        lower, upper: bounds of the value.
    """
    points = {estimate: 0.0}
    for sign, bound in ((-1, lower), (1, upper)):
        if estimate == bound:
            continue
        at = branch()
        value, reached, step, parts = estimate, 0.0, _STEP * error, 0
        for _ in range(80):
            new = value + sign * step
            if sign * (new - bound) > -1e-12 * abs(bound):
                new = bound
            found = (2 * max(best - at(new), 0.0)) ** 0.5
            if found > reached + _WIDE and parts < _MOST_PARTS:
                # Beyond a flat part the likelihood falls all at once.
                step, parts = abs(new - value) / 2, parts + 1
                continue
            points[new] = found
            if found > _REACH or new == bound or abs(new - estimate) > _FAR * error:
                break
            rate = (found - reached) / abs(new - value)
            step = min(max(_STEP / rate, step / 4), 3 * step) if rate > 0 else 3 * step
            value, reached = new, found
    return points


class Path:
    """The maxima along a curve, the last two."""

    def __init__(self, v: Tensor, t: float) -> None:
        self._known = [(v, t)]

    def add(self, v: Tensor, t: float) -> None:
        """Go on."""
        self._known = [*self._known[-1:], (v, t)]

    def ahead(self, t: float) -> Tensor:
        """Where the maximum may be next, on a straight line."""
        v, last = self._known[-1]
        if len(self._known) < 2:
            return v
        before, first = self._known[0]
        return v + (v - before) * ((t - last) / (last - first))


def curve_through(
    estimate: float,
    points: dict[float, float],
    lower: float,
    upper: float,
    logarithmic: bool = False,
) -> Curve:
    """The curve through distances at values; zeta has the sign of the way from the estimate."""
    values = np.array(sorted(points))
    zeta = np.array([points[v] for v in values]) * np.sign(values - estimate)
    kept = np.concatenate([[True], np.diff(np.maximum.accumulate(zeta)) > 0])
    return Curve(estimate, values[kept], zeta[kept], lower, upper, logarithmic)
