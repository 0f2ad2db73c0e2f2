"""The maximum of a family's likelihood where a quantity has a value."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from math import inf, isfinite
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from openreml_nn.covariance import Matrix
from openreml_nn.covariance.parametrized import FreeParams
from openreml_nn.estimation.curvature import CURVATURE, spectrum_in_scales
from openreml_nn.estimation.derivatives import jacobian
from openreml_nn.estimation.marginal_steps import MarginalFit
from openreml_nn.families import Family
from openreml_nn.inference.constrained import Natural, Quantity
from openreml_nn.inference.curves import Curve, Path, curve_through, points_of
from openreml_nn.inference.laplace_refit import LaplaceRefit, bfgs, numbers_of
from openreml_nn.inference.refit import matrix_entries
from openreml_nn.likelihood.loss import Objective
from openreml_nn.result import Result
from openreml_nn.support.errors import NumericalError
from openreml_nn.support.solving import solve_named
from openreml_nn.terms.term import Term

__all__ = ["LaplaceProfiler"]

#: The way to a maximum ends this near to it, in standard errors,
_AIM = 1e-5
#: or here, where rounding lets it come no nearer.
_NEAR = 1e-3
#: What a family stores, mostly a logarithm, is looked at this far from its estimate.
_FAR = 25.0
#: Curvature by it where a way begins, at least: where the likelihood is flat, as of an overdispersion
#: without end, a step by less leads to where nothing is finite.
_FLAT = 1e-3


@dataclass(frozen=True)
class _Lowered:
    """The covariance of the predictor, as coordinates and terms need it."""

    covariance: Matrix
    like: Tensor

    def terms(self, free_params: FreeParams = None) -> list[Term]:
        with nullcontext() if free_params is None else self.covariance.given(free_params):
            return self.covariance.terms(None, self.like.dtype)


class _Quantities(nn.Module):
    """The parameters of a family as a function of what it stores."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        self.family = family

    def forward(self, like: Tensor) -> dict[str, Tensor]:
        return self.family.quantities(like)


class _Way:
    """Ways to maxima under a constraint, in the parameters w.

    Attributes:
        fit: the likelihood in x.
        natural: standard deviations and angles of its covariance.
        start: w at the maximum.
    """

    def __init__(self, refit: LaplaceRefit, max_iterations: int) -> None:
        self.fit: MarginalFit = refit.fit()
        gamma, u, phi = self.fit.split(self.fit.x)
        self.fit.at.write(u)
        lowered = _Lowered(refit.loss.covariance, self.fit.x)
        self.natural = Natural(cast(Objective, lowered), self.fit.x)
        self.start = torch.cat([gamma, self.natural.start, phi])
        self._most = max_iterations

    def x(self, w: Tensor) -> Tensor:
        """Parameters of the fit."""
        p, m = self.fit.p, self.fit.m
        return torch.cat([w[:p], self.natural.coordinates(w[p : p + m]), w[p + m :]])

    def evaluate(self, w: Tensor) -> tuple[float, Tensor]:
        """The negative log-likelihood and its gradient; infinite where it does not exist."""
        at = w.detach().requires_grad_()
        with torch.enable_grad():
            x = self.x(at)
            if not bool(x.isfinite().all()):
                return inf, torch.zeros_like(w)
            try:
                value, slope = self.fit.evaluate(x.detach())
            except NumericalError:
                return inf, torch.zeros_like(w)
            (found,) = torch.autograd.grad(x, at, slope)
        return value, found

    def hold(
        self, held: Quantity, t: float, w: Tensor, B: Tensor
    ) -> tuple[float, Tensor, Tensor, bool]:
        """The highest log-likelihood where a quantity is t, where that is, the curvature there, and
        whether it was found."""
        scale = max(abs(t), 1e-3 * held.longest)
        w, B = self._off_boundary(w, B, held), self._steep(B)
        value, slope = self.evaluate(w)
        if not isfinite(value):
            w = self.start
            value, slope = self.evaluate(w)
        arrived = False
        for _ in range(self._most):
            at, a, _ = held.slope(w)
            gap = t - at
            inner = solve_named(B, torch.stack([slope, a], 1), CURVATURE)
            # The multiplier of the Lagrangian f - k (q - t), and the step to where both vanish.
            k = float((a @ inner[:, 0] + gap) / (a @ inner[:, 1]))
            along = float(a @ inner[:, 0] / (a @ inner[:, 1]))
            left = slope - along * a
            norm = float(left @ solve_named(B, left, CURVATURE)) ** 0.5
            arrived = abs(gap) < 1e-9 * scale and norm < _NEAR
            if abs(gap) < 1e-9 * scale and norm < _AIM:
                break
            step = k * inner[:, 1] - inner[:, 0]
            moved = self._searched(held, t, w, value, slope, step, k)
            if moved is None:
                break
            s = moved[0] - w
            new = held.slope(moved[0])[1]
            B = bfgs(B, s, (moved[2] - k * new) - (slope - k * a))
            w, value, slope = moved
        return -value, w, B, arrived

    def _searched(
        self,
        held: Quantity,
        t: float,
        w: Tensor,
        value: float,
        slope: Tensor,
        step: Tensor,
        price: float,
    ) -> tuple[Tensor, float, Tensor] | None:
        """A part of a step that lowers the loss with the price of the gap; None if there is none."""
        cost = 2 * abs(price) + 1e-8
        before = value + cost * abs(t - held.slope(w)[0])
        slack, part = 1e-12 * (1 + abs(value)), 1.0
        for _ in range(25):
            at = w + part * step
            own, new = self.evaluate(at)
            if own + cost * abs(t - held.slope(at)[0]) <= before + slack:
                return at, own, new
            part /= 2
        return None

    def _steep(self, B: Tensor) -> Tensor:
        """A curvature that is not flat by what the family stores."""
        least = torch.zeros_like(B.diagonal())
        least[self.fit.p + self.fit.m :] = _FLAT
        return B + torch.diag((least - B.diagonal()).clamp(min=0))

    def _off_boundary(self, w: Tensor, B: Tensor, held: Quantity) -> Tensor:
        """Off points about which the likelihood is even, whose gradient shows no way up."""
        w, p = w.clone(), self.fit.p
        own = held.slope(self.start)[1] != 0
        for j, edge, sign in self.natural.even():
            if bool(own[p + j]):
                continue
            away = min(0.1 / float(B[p + j, p + j].clamp(min=1e-12)) ** 0.5, 0.1)
            if abs(float(w[p + j]) - edge) < 1e-3 * away:
                w[p + j] = edge + sign * away
        return w


class LaplaceProfiler:
    r"""Profiles of a fit of a family, under its full likelihood.

    Parameters are w: the coefficients, the standard deviations and angles of
    :class:`Natural`, and what the family stores. Each point of a curve is had by quasi-Newton steps on
    the Lagrangian, with exact gradients.

    Args:
        result: the fit.
        max_iterations: steps to a maximum, at most.

    Attributes:
        best: the log-likelihood at the maximum.
        missed: values of the present curve at which the maximum was not found.
        highest: by how much the present curve surpasses the fit.
    """

    def __init__(self, result: Result, max_iterations: int) -> None:
        self._refit = LaplaceRefit(result, "ml")
        self._way = way = _Way(self._refit, max_iterations)
        self._start = way.start
        (J,) = jacobian(lambda w: (way.x(w),), way.start)
        self._hessian = _made_positive(J.mT @ way.fit.hessian @ J)
        self.best = -way.fit.value
        self.missed: list[float] = []
        self.highest = 0.0
        self._known = self._quantities(result)

    @property
    def names(self) -> list[str]:
        """What is profiled by default."""
        return list(self._known)

    def has(self, name: str) -> bool:
        """Whether there is such a parameter."""
        return name in self._known

    def curve(self, name: str) -> Curve:
        """The profile of a quantity."""
        self.missed, self.highest = [], 0.0
        held = self._known[name]
        value, slope, _ = held.slope(self._start)
        estimate = held.at(self._start)
        error = float(slope @ solve_named(self._hessian, slope, CURVATURE)) ** 0.5
        if not 0 < error < held.longest:
            error = held.longest / 10

        def branch() -> Callable[[float], float]:
            path, hessian = Path(self._start, value), self._hessian

            def at(t: float) -> float:
                nonlocal hessian
                found, w, hessian, arrived = self._way.hold(held, t, path.ahead(t), hessian)
                if not arrived:
                    self.missed.append(held.value(t))
                path.add(w, t)
                self.highest = max(self.highest, found - self.best)
                return found

            return at

        low, high = held.bounds
        points = points_of(self.best, estimate, error, branch, low, high)
        values = {held.value(t): zeta for t, zeta in points.items()}
        is_log = held.trans is not None and held.limits == (0.0, inf)
        return curve_through(held.value(estimate), values, *held.limits, is_log)

    # ------------------------------------------------------------------ quantities

    def _quantities(self, result: Result) -> dict[str, Quantity]:
        fit, natural = self._way.fit, self._way.natural
        p, m = fit.p, fit.m
        numbers_of(result)  # which refuses names of two things
        found: dict[str, Quantity] = {}
        unit = natural.unit if natural.unit > 1e-3 else 1.0
        for name, (index, i, j) in matrix_entries(result).items():
            held = natural.held(index, i, j)
            if held is not None:
                longest = unit if i == j else held.longest
                found[name] = Quantity(
                    lambda w, of=held.function: of(w[p : p + m]),  # type: ignore[misc]
                    held.bounds,
                    longest,
                    held.correlation,
                    held.angle,
                )
        errors = result.fixed.std_error.tolist()
        for name, row, error in zip(result.fixed.names, fit.T, errors, strict=True):
            found[name] = Quantity(
                lambda w, row=row: row @ w[:p],  # type: ignore[misc]
                (-inf, inf),
                10 * error,
            )
        own = _Quantities(self._refit.loss.family)
        places = [name for name, x in own.named_parameters() if x.requires_grad]
        sizes = [x.numel() for x in fit.own]
        shapes = [x.shape for x in fit.own]

        def parameter(w: Tensor, name: str) -> Tensor:
            parts = w[p + m :].split(sizes)
            stored = {n: v.reshape(s) for n, v, s in zip(places, parts, shapes, strict=True)}
            return functional_call(own, stored, (w,))[name].reshape(())

        starts = dict(zip(places, range(p + m, len(fit.x)), strict=False))
        parts = [part for part in own.modules() if isinstance(part, Family)]
        transforms = {name: t for part in parts for name, t in part.own_trans.items()}
        stored = {place.rpartition(".")[2]: at for place, at in starts.items()}
        for estimate in result.family_parameters:
            name = estimate.name
            trans = transforms.get(name)
            if trans is None or name not in stored:
                found[name] = Quantity(
                    lambda w, name=name: parameter(w, name),  # type: ignore[misc]
                    (-inf, inf),
                    10 * max(abs(estimate.value), 1.0),
                )
                continue
            # By what is stored, which has no bounds, and from which a likelihood may not fall.
            at, own_value = stored[name], float(self._start[stored[name]])
            found[name] = Quantity(
                lambda w, at=at: w[at],  # type: ignore[misc]
                (own_value - _FAR, own_value + _FAR),
                _FAR,
                trans=trans,
            )
        return found


def _made_positive(H: Tensor) -> Tensor:
    """A curvature without what is not positive in it."""
    scale = H.diagonal().abs().clamp(min=1e-6).sqrt()
    values, vectors = spectrum_in_scales(H, scale)
    return (vectors * values.abs().clamp(min=1e-4)) @ vectors.mT * (scale[:, None] * scale)
