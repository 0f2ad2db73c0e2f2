"""Profile likelihood."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.interpolate import CubicSpline
from scipy.stats import norm
from torch import Tensor

from openreml_nn.estimation import Result
from openreml_nn.inference.constrained import Ascent, Natural, Quantity
from openreml_nn.inference.refit import Refit, matrix_entries, source_of, tracked
from openreml_nn.support.checks import check_count, check_flag, check_names, check_number
from openreml_nn.support.errors import InputError

__all__ = ["Curve", "Profile", "profile"]

#: How far each curve goes, in zeta, and by what steps.
_REACH, _STEP = 2.9, 0.4
#: A log-likelihood this much higher than the fit's is another maximum.
_HIGHER = 1e-3
#: Levels that the curves reach.
_MOST_LEVEL = 0.995


@dataclass(frozen=True)
class Curve:
    r"""The profile of one parameter.

    Attributes:
        estimate: the maximum-likelihood estimate.
        values: values of the parameter, ascending.
        zeta: :math:`\pm\sqrt{2(\hat\ell - \ell_p)}` at these, ℓ_p the maximum over all else.
        lower, upper: bounds of the parameter.
    """

    estimate: float
    values: np.ndarray
    zeta: np.ndarray
    lower: float
    upper: float

    def interval(self, level: float) -> tuple[float, float]:
        """Where the likelihood-ratio test of a level accepts; a bound where it is not left.

        Raises:
            InputError: if the level is not between 0 and 0.995, beyond which no curve goes.
            TypeError: if it is no number.
        """
        level = check_number("level", level, above=0, below=_MOST_LEVEL)
        z = float(norm.ppf((1 + level) / 2))
        if len(self.zeta) < 2:
            # The likelihood says nothing of it.
            return self.lower, self.upper
        inverse = CubicSpline(self.zeta, self.values)
        low = float(inverse(-z)) if self.zeta[0] <= -z else self.lower
        high = float(inverse(z)) if self.zeta[-1] >= z else self.upper
        return low, high


@dataclass(frozen=True)
class Profile:
    """Profiles by the names of parameters: ``sd_(Intercept)|Subject``,
    ``cor_Days.(Intercept)|Subject``, ``sigma``, and fixed effects."""

    curves: dict[str, Curve]

    def intervals(self, level: float = 0.95) -> pd.DataFrame:
        """Confidence intervals: name, estimate, low, high.

        Raises:
            InputError: if the level is not between 0 and 0.995, beyond which no curve goes.
            TypeError: if it is no number.
        """
        rows = [(name, c.estimate, *c.interval(level)) for name, c in self.curves.items()]
        return pd.DataFrame(rows, columns=["name", "estimate", "low", "high"])


def profile(
    result: Result,
    names: Sequence[str] | None = None,
    max_iterations: int = 60,
    progress: bool = True,
) -> Profile:
    r"""Profile the likelihood of standard deviations, correlations and fixed effects.

    Of the full likelihood, as only that has all of them as parameters: a fit by REML is first made
    again by maximum likelihood. Each point maximises the likelihood over all other
    parameters under the constraint that one has a value. A curve ends at the bound of its parameter,
    a standard deviation of 0 or a correlation of ±1, where the likelihood falls too little before it.

    Args:
        result: a fit.
        names: which parameters; all by default.
        max_iterations: steps to the maximum at each point, at most.
        progress: whether a bar shows on stderr.

    Warns:
        RuntimeWarning: that names the parameter where a point of its curve is not a maximum, or is
            higher than the fit itself.

    Raises:
        InputError: if a name is unknown, the rows were streamed, a design is estimated, or parameters
            have bounds, see :func:`lmm`.
        TypeError: if an argument is of another kind.

    Reference:
        Bates, Mächler, Bolker and Walker, Journal of Statistical Software 67(1) (2015), section 5.1.
    """
    check_flag("progress", progress)
    max_iterations = check_count("max_iterations", max_iterations, 1)
    return _Profiler(result, max_iterations).run(names, progress)


class _Profiler:
    def __init__(self, result: Result, max_iterations: int) -> None:
        source_of(result)
        for name, limit in result.constraints.items():
            if isinstance(limit, tuple | list):
                raise InputError(
                    f"`result` has the bounds {limit!r} of {name!r}, beyond which a profile goes: "
                    "expected parameters that are free, held or tied"
                )
        self.max_iterations = max_iterations
        self.refit = Refit(result)
        self.fitted = self.refit.fit("ml")
        self.objective = self.refit.objective(method="ml")
        if self.objective.moves:
            raise InputError(
                "`result` has a design that is estimated: profiles are for models of known designs"
            )
        self.natural = Natural(self.objective)
        self.best = float(self.objective.evaluate().log_likelihood)
        #: Values at which the maximum was missed, and by how much the fit was surpassed, of a curve.
        self.missed: list[float] = []
        self.highest = 0.0

    def run(self, names: Sequence[str] | None, progress: bool) -> Profile:
        held = self._held()
        fixed = self.fitted.fixed
        known = [*held, *fixed.names]
        wanted = known if names is None else check_names("names", names)
        for name in wanted:
            if name not in known:
                raise InputError(f"`names` has {name!r}: expected some of {known}")
        curves = {}
        for name in tracked(wanted, "profile", progress):
            self.missed, self.highest = [], 0.0
            if name in held:
                curves[name] = self._covariance_curve(held[name])
            else:
                curves[name] = self._fixed_curve(fixed.names.index(name))
            self._warn(name, len(curves[name].values))
        return Profile(curves)

    def _warn(self, name: str, points: int) -> None:
        """Say what is not as it should be with the curve of a parameter."""
        if self.missed:
            warnings.warn(
                f"the profile of {name!r} is approximate at {len(self.missed)} of its {points} "
                f"points, such as {self.missed[0]:.6g}: the maximum over the other parameters was "
                f"not found in {self.max_iterations} steps",
                RuntimeWarning,
                stacklevel=4,
            )
        if self.highest > _HIGHER:
            warnings.warn(
                f"the profile of {name!r} rises above the fit by {self.highest:.3g}: the fit is not at "
                "the maximum of its likelihood, and intervals are too narrow; fit again from another "
                "start",
                RuntimeWarning,
                stacklevel=4,
            )

    def _seen(self, ascent: Ascent, value: float, log_likelihood: float) -> float:
        """The log-likelihood at a point, of which is kept whether it is one of the maximum."""
        if not ascent.arrived:
            self.missed.append(value)
        self.highest = max(self.highest, log_likelihood - self.best)
        return log_likelihood

    # ------------------------------------------------------------------ covariances

    def _held(self) -> dict[str, Quantity]:
        """Standard deviations and correlations that the likelihood depends on."""
        found = {}
        for name, (index, i, j) in matrix_entries(self.fitted).items():
            if i != j and self.fitted.components[index].is_residual:
                continue
            held = self.natural.held(index, i, j)
            if held is not None:
                found[name] = held
        return found

    def _covariance_curve(self, held: Quantity) -> Curve:
        start = self.natural.start
        spread = Ascent(self.natural, start).spread()
        _, slope, _ = held.slope(start)
        error = float((slope @ spread @ slope).clamp(min=0).sqrt())
        if not 0 < error < held.longest:
            error = held.longest / 10
        estimate = held.at(start)

        def branch() -> Callable[[float], float]:
            path = _Path(start, estimate)

            def at(t: float) -> float:
                ascent = Ascent(self.natural, path.ahead(t), self.max_iterations)
                found = ascent.hold(held, t)
                path.add(ascent.v, t)
                return self._seen(ascent, held.value(t), found)

            return at

        low, high = held.bounds
        points = self._points(estimate, error, branch, low, high)
        values = {held.value(t): zeta for t, zeta in points.items()}
        lower, upper = sorted((held.value(low), held.value(high)))
        return _curve(held.value(estimate), values, lower, upper)

    # ------------------------------------------------------------------ fixed effects

    def _fixed_curve(self, j: int) -> Curve:
        fixed, refit = self.fitted.fixed, self.refit
        others = [i for i in range(refit.X.shape[1]) if i != j]
        estimate, error = float(fixed.estimate[j]), float(fixed.std_error[j])

        def branch() -> Callable[[float], float]:
            path = _Path(self.natural.start, estimate)

            def at(value: float) -> float:
                y = refit.y - value * refit.X[:, j]
                objective = refit.objective(y, refit.X[:, others], "ml")
                ascent = Ascent(self.natural.of(objective), path.ahead(value), self.max_iterations)
                found = ascent.climb()
                path.add(ascent.v, value)
                return self._seen(ascent, value, found)

            return at

        points = self._points(estimate, error, branch, -np.inf, np.inf)
        return _curve(estimate, points, -np.inf, np.inf)

    # ------------------------------------------------------------------ curves

    def _points(
        self,
        estimate: float,
        error: float,
        branch: Callable[[], Callable[[float], float]],
        lower: float,
        upper: float,
    ) -> dict[float, float]:
        """Distances :math:`\\sqrt{2(\\hat\\ell - \\ell_p)}` at values to both sides of an estimate."""
        points = {estimate: 0.0}
        for sign, bound in ((-1, lower), (1, upper)):
            if estimate == bound:
                continue
            at = branch()
            value, reached, step = estimate, 0.0, _STEP * error
            for _ in range(60):
                new = value + sign * step
                if sign * (new - bound) > -1e-12 * abs(bound):
                    new = bound
                found = (2 * max(self.best - at(new), 0.0)) ** 0.5
                points[new] = found
                if found > _REACH or new == bound:
                    break
                rate = (found - reached) / abs(new - value)
                step = min(max(_STEP / rate, step / 4), 3 * step) if rate > 0 else 3 * step
                value, reached = new, found
        return points


class _Path:
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


def _curve(estimate: float, points: dict[float, float], lower: float, upper: float) -> Curve:
    """The curve through distances at values; zeta has the sign of the way from the estimate."""
    values = np.array(sorted(points))
    zeta = np.array([points[v] for v in values]) * np.sign(values - estimate)
    kept = np.concatenate([[True], np.diff(np.maximum.accumulate(zeta)) > 0])
    return Curve(estimate, values[kept], zeta[kept], lower, upper)
