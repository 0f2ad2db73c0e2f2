"""Profile likelihood."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from scipy.interpolate import CubicSpline
from scipy.stats import norm
from torch import Tensor

from openreml_nn.estimation import Result
from openreml_nn.estimation.aireml import Curvature
from openreml_nn.estimation.fit import iterate
from openreml_nn.inference.refit import Refit, matrix_entries
from openreml_nn.likelihood.problem import NotPositiveDefiniteError

__all__ = ["Curve", "Profile", "profile"]

#: How far each curve goes, in zeta, and by what steps.
_REACH, _STEP = 2.8, 0.4


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
        """Where the likelihood-ratio test of a level accepts; a bound where it is not left."""
        z = float(norm.ppf((1 + level) / 2))
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
            ValueError: if the level is not between 0 and 0.99, beyond which no curve goes.
        """
        if not 0 < level <= 0.99:
            raise ValueError(f"`level` is {level}: expected a number between 0 and 0.99")
        rows = [(name, c.estimate, *c.interval(level)) for name, c in self.curves.items()]
        return pd.DataFrame(rows, columns=["name", "estimate", "low", "high"])


def profile(result: Result, names: Sequence[str] | None = None) -> Profile:
    r"""Profile the likelihood of standard deviations, correlations and fixed effects.

    Of the full likelihood, as only that has all of them as parameters: a fit by REML is first made
    again by maximum likelihood. Each point maximises the likelihood over all other
    parameters under the constraint that one has a value, by Newton steps on the Lagrangian.

    Args:
        result: a fit.
        names: which parameters; all by default.

    Raises:
        ValueError: if a name is unknown.

    Reference:
        Bates, Mächler, Bolker and Walker, Journal of Statistical Software 67(1) (2015), section 5.1.
    """
    return _Profiler(result).run(names)


Quantity = Callable[[Tensor], Tensor]


class _Profiler:
    def __init__(self, result: Result) -> None:
        self.refit = Refit(result)
        self.fitted = self.refit.fit("ml")
        self.objective = self.refit.objective(method="ml")
        curvature = Curvature([self.objective])
        self.at, self.u = curvature.at, curvature.u
        self.best = float(self.objective.evaluate().log_likelihood)

    def run(self, names: Sequence[str] | None) -> Profile:
        quantities = self._quantities()
        fixed = self.fitted.fixed
        known = [*quantities, *fixed.names]
        unknown = [name for name in names or () if name not in known]
        if unknown:
            raise ValueError(f"`names` has {unknown[0]!r}: expected some of {known}")
        curves = {}
        for name in known if names is None else names:
            self._reset()
            if name in quantities:
                curves[name] = self._covariance_curve(name, quantities[name])
            else:
                curves[name] = self._fixed_curve(fixed.names.index(name))
        return Profile(curves)

    def _reset(self) -> None:
        with torch.no_grad():
            self.at.write(self.u)

    # ------------------------------------------------------------------ covariances

    def _quantities(self) -> dict[str, Quantity]:
        """Standard deviations and correlations as functions of the coordinates."""
        moving = {}
        for name, (index, i, j) in matrix_entries(self.fitted).items():
            if i != j and self.fitted.components[index].group == "Residual":
                continue
            quantity = self._entry(index, i, j)
            value, slope, _ = self._slope(quantity, self.u)
            # A correlation with an effect of no variance does not exist.
            if value == value and bool((slope != 0).any()):
                moving[name] = quantity
        return moving

    def _entry(self, index: int, i: int, j: int) -> Quantity:
        def sd_or_correlation(u: Tensor) -> Tensor:
            matrix = self.objective.terms(self.at.natural(0, u))[index].covariance.shown()
            if i == j:
                return matrix[i, i].sqrt()
            return matrix[i, j] / (matrix[i, i] * matrix[j, j]).sqrt()

        return sd_or_correlation

    @staticmethod
    def _slope(quantity: Quantity, u: Tensor) -> tuple[float, Tensor, Tensor]:
        """Value, gradient and Hessian."""
        with torch.enable_grad():
            x = u.detach().clone().requires_grad_()
            value = quantity(x)
            if not value.requires_grad:
                return float(value), torch.zeros_like(u), u.new_zeros(len(u), len(u))
            (slope,) = torch.autograd.grad(value, x, create_graph=True, materialize_grads=True)
            bend = torch.stack([
                torch.autograd.grad(part, x, retain_graph=True, materialize_grads=True)[0]
                if part.requires_grad
                else torch.zeros_like(u)
                for part in slope
            ])  # fmt: skip
        return float(value.detach()), slope.detach(), bend.detach()

    def _covariance_curve(self, name: str, quantity: Quantity) -> Curve:
        value, slope, _ = self._slope(quantity, self.u)
        spread = torch.linalg.pinv(Curvature([self.objective]).hessian, hermitian=True)
        error = float((slope @ spread @ slope).clamp(min=0).sqrt())
        if not value:
            error = self.fitted.residual_variance**0.5 / 10
        lower, upper = (-1.0, 1.0) if name.startswith("cor_") else (0.0, np.inf)
        return self._curve(value, error, lambda c: self._constrained(quantity, c), lower, upper)

    def _constrained(self, quantity: Quantity, target: float) -> float:
        """The maximum of the log-likelihood where a quantity has a value."""
        scale = max(abs(target), 1e-8)
        for _ in range(60):
            curvature = Curvature([self.objective])
            u = curvature.u
            value, a, bend = self._slope(quantity, u)
            if not value:
                # A standard deviation has no slope at zero: on from where it is what is wanted.
                gone = (u == 0) & torch.tensor(self.at.vanishing, device=u.device)
                with torch.no_grad():
                    self.at.write(torch.where(gone & a.isnan(), target, u))
                continue
            gap = target - value
            multiplier = 0.0
            for _ in range(2):
                K = curvature.hessian + multiplier * bend
                size = K.diagonal().abs()
                unit = torch.where(size > 0, size, 1).sqrt()
                values, vectors = torch.linalg.eigh(K / (unit[:, None] * unit))
                values = values.abs().clamp(min=1e-10 * float(values.abs().max()))
                inverse = (vectors / values) @ vectors.mT / (unit[:, None] * unit)
                multiplier = float((a @ inverse @ curvature.score - gap) / (a @ inverse @ a))
            move = inverse @ (curvature.score - multiplier * a)
            if float(move @ K @ move) < 1e-12 and abs(gap) < 1e-10 * scale:
                break
            self._step(u, move, quantity, target, abs(multiplier))
        else:
            warnings.warn(
                f"the maximum of the likelihood where a parameter is {target:.6g} was not found in "
                "60 steps: its profile is approximate there",
                RuntimeWarning,
                stacklevel=2,
            )
        return float(self.objective.evaluate().log_likelihood)

    def _step(
        self, u: Tensor, move: Tensor, quantity: Quantity, target: float, price: float
    ) -> None:
        """Move, by less where the likelihood less the price of the gap falls."""

        def merit(x: Tensor) -> float:
            with torch.no_grad():
                self.at.write(x)
                try:
                    value = float(self.objective.evaluate().log_likelihood)
                except NotPositiveDefiniteError:
                    return -np.inf
                return value - 2 * price * abs(float(quantity(self.at.read(x))) - target)

        start = merit(u)
        length = 1.0
        for _ in range(12):
            if merit(u + length * move) >= start - 1e-9 * (1 + abs(start)):
                return
            length /= 2

    # ------------------------------------------------------------------ fixed effects

    def _fixed_curve(self, j: int) -> Curve:
        fixed, refit = self.fitted.fixed, self.refit
        others = [i for i in range(refit.X.shape[1]) if i != j]
        estimate, error = float(fixed.estimate[j]), float(fixed.std_error[j])

        def at(value: float) -> float:
            y = refit.y - value * refit.X[:, j]
            objective = refit.objective(y, refit.X[:, others], "ml")
            iterate(objective, 100)
            return float(objective.evaluate().log_likelihood)

        return self._curve(estimate, error, at, -np.inf, np.inf)

    # ------------------------------------------------------------------ curves

    def _curve(
        self,
        estimate: float,
        error: float,
        at: Callable[[float], float],
        lower: float,
        upper: float,
    ) -> Curve:
        points = {estimate: 0.0}
        for sign, bound in ((-1, lower), (1, upper)):
            if estimate == bound:
                continue
            self._reset()
            value, zeta, step = estimate, 0.0, _STEP * error
            # Short of the bound itself, where standard deviations and correlations are no
            # smooth coordinates.
            end = bound - sign * 1e-4 * (abs(estimate) if bound == 0 else 1.0)
            for _ in range(40):
                new = value + sign * step
                if sign * (new - end) > 0:
                    new = end
                found = sign * (2 * max(self.best - at(new), 0.0)) ** 0.5
                points[new] = found
                gained = abs(found - zeta)
                if abs(found) > _REACH or new == end:
                    break
                rate = gained / abs(new - value)
                step = min(_STEP / rate, 3 * step) if rate > 0 else 3 * step
                value, zeta = new, found
        at_values = np.array(sorted(points))
        zetas = np.array([points[v] for v in at_values])
        kept = np.concatenate([[True], np.diff(np.maximum.accumulate(zetas)) > 0])
        return Curve(estimate, at_values[kept], zetas[kept], lower, upper)
