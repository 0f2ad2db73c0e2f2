"""Profile likelihood."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from openreml_nn.estimation import Result
from openreml_nn.inference.constrained import Ascent, Natural, Quantity
from openreml_nn.inference.curves import Curve, Path, curve_through, points_of
from openreml_nn.inference.laplace_profile import LaplaceProfiler
from openreml_nn.inference.refit import Refit, family_of, matrix_entries, source_of, tracked
from openreml_nn.support.checks import check_count, check_flag, check_names
from openreml_nn.support.errors import InputError
from openreml_nn.support.warning import warn

__all__ = ["Curve", "Profile", "profile"]

#: A log-likelihood this much higher than the fit's is another maximum.
_HIGHER = 1e-3


@dataclass(frozen=True)
class Profile:
    """Profile likelihoods, as :func:`profile` yields them.

    Attributes:
        curves: a :class:`Curve` for each parameter by its name: ``sd_(Intercept)|Subject``,
            ``cor_Days.(Intercept)|Subject``, ``sigma``, fixed effects, and the parameters of a
            family.
    """

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
    r"""Profile the likelihood of standard deviations, correlations, fixed effects, and the parameters
    of a family.

    The full likelihood is profiled, as only that has all of them as parameters: a fit by REML is first
    made again by maximum likelihood. Each point maximises the likelihood over all other
    parameters under the constraint that one has a value. A curve ends at the bound of its parameter,
    a standard deviation of 0 or a correlation of ±1, where the likelihood falls too little before it.

    Args:
        result: a fit.
        names: which parameters; by default all but the correlations of residuals, which are as many
            as pairs of positions: ``cor_1.0|Residual`` is the one of an ``ar1(time | group)``.
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
    is_linear = family_of(result) is None
    profiler = (_Profiler if is_linear else LaplaceProfiler)(result, max_iterations)
    wanted = profiler.names if names is None else check_names("names", names)
    for name in wanted:
        if not profiler.has(name):
            raise InputError(f"`names` has {name!r}: expected some of {profiler.names}")
    curves = {}
    for name in tracked(wanted, "profile", progress):
        curves[name] = profiler.curve(name)
        _warn(name, profiler, len(curves[name].values), max_iterations)
    return Profile(curves)


def _warn(name: str, profiler: _Profiler | LaplaceProfiler, points: int, steps: int) -> None:
    """Say what is not as it should be with the curve of a parameter."""
    if profiler.missed:
        warn(
            f"the profile of {name!r} is approximate at {len(profiler.missed)} of its {points} "
            f"points, such as {profiler.missed[0]:.6g}: the maximum over the other parameters was "
            f"not found in {steps} steps"
        )
    if profiler.highest > _HIGHER:
        warn(
            f"the profile of {name!r} rises above the fit by {profiler.highest:.3g}: the fit is not "
            "at the maximum of its likelihood, and intervals are too narrow; fit again from another "
            "start"
        )


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
        self._entries = matrix_entries(self.fitted)
        self._known: dict[str, Quantity | None] = {}
        self.best = float(self.objective.evaluate().log_likelihood)
        #: Values at which the maximum was missed, and by how much the fit was surpassed, of a curve.
        self.missed: list[float] = []
        self.highest = 0.0

    @property
    def names(self) -> list[str]:
        """What is profiled by default."""
        found = [
            name
            for name, (index, i, j) in self._entries.items()
            if not (i != j and self.fitted.components[index].is_residual) and self.has(name)
        ]
        return [*found, *self.fitted.fixed.names]

    def has(self, name: str) -> bool:
        """Whether there is such a parameter, on which the likelihood depends."""
        return self._held(name) is not None or name in self.fitted.fixed.names

    def curve(self, name: str) -> Curve:
        """The profile of a parameter."""
        self.missed, self.highest = [], 0.0
        held = self._held(name)
        if held is not None:
            return self._covariance_curve(held)
        return self._fixed_curve(self.fitted.fixed.names.index(name))

    def _seen(self, ascent: Ascent, value: float, log_likelihood: float) -> float:
        """The log-likelihood at a point, of which is kept whether it is one of the maximum."""
        if not ascent.arrived:
            self.missed.append(value)
        self.highest = max(self.highest, log_likelihood - self.best)
        return log_likelihood

    # ------------------------------------------------------------------ covariances

    def _held(self, name: str) -> Quantity | None:
        """A standard deviation or a correlation that the likelihood depends on."""
        if name not in self._known:
            entry = self._entries.get(name)
            self._known[name] = None if entry is None else self.natural.held(*entry)
        return self._known[name]

    def _covariance_curve(self, held: Quantity) -> Curve:
        start = self.natural.start
        spread = Ascent(self.natural, start).spread()
        _, slope, _ = held.slope(start)
        error = float((slope @ spread @ slope).clamp(min=0).sqrt())
        estimate = held.at(start)
        # At a bound the slope may be of rounding alone.
        if estimate + error / 1000 == estimate or not error < held.longest:
            error = held.longest / 10

        def branch() -> Callable[[float], float]:
            path = Path(start, estimate)

            def at(t: float) -> float:
                ascent = Ascent(self.natural, path.ahead(t), self.max_iterations)
                found = ascent.hold(held, t)
                path.add(ascent.v, t)
                return self._seen(ascent, held.value(t), found)

            return at

        low, high = held.bounds
        points = points_of(self.best, estimate, error, branch, low, high)
        values = {held.value(t): zeta for t, zeta in points.items()}
        return curve_through(held.value(estimate), values, *held.limits)

    # ------------------------------------------------------------------ fixed effects

    def _fixed_curve(self, j: int) -> Curve:
        fixed, refit = self.fitted.fixed, self.refit
        others = [i for i in range(refit.X.shape[1]) if i != j]
        estimate, error = float(fixed.estimate[j]), float(fixed.std_error[j])

        def branch() -> Callable[[float], float]:
            path = Path(self.natural.start, estimate)

            def at(value: float) -> float:
                y = refit.y - value * refit.X[:, j]
                objective = refit.objective(y, refit.X[:, others], "ml")
                ascent = Ascent(self.natural.of(objective), path.ahead(value), self.max_iterations)
                found = ascent.climb()
                path.add(ascent.v, value)
                return self._seen(ascent, value, found)

            return at

        points = points_of(self.best, estimate, error, branch, -np.inf, np.inf)
        return curve_through(estimate, points, -np.inf, np.inf)
