"""Quasi-Newton steps on a marginal likelihood, with differences of gradients as its curvature."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from math import inf, isfinite, nan
from typing import cast

import torch
from torch import Tensor

from openreml_nn.covariance import Matrix
from openreml_nn.estimation.coordinates import Coordinates
from openreml_nn.estimation.curvature import spectrum_in_scales
from openreml_nn.estimation.derivatives import jacobian
from openreml_nn.estimation.separation import separation_of, tells_responses, told_exactly
from openreml_nn.families import Binomial, Ordinal
from openreml_nn.likelihood import LaplaceLoss
from openreml_nn.likelihood.fixed import FixedPart
from openreml_nn.likelihood.laplace_evaluation import LaplaceEvaluation
from openreml_nn.likelihood.loss import Objective
from openreml_nn.result import Record
from openreml_nn.support.errors import InputError, NumericalError

__all__ = ["MarginalFit"]

#: No linear predictor of categories is so far from zero, on the scale of a link.
_ENDLESS = 50.0
#: Of a precision beyond this, responses have no spread beside the linear predictor.
_EXACT = 1e12

#: A fit has converged this far from the optimum, in standard errors,
CONVERGED = 1e-3
#: but where steps take no time they are taken until they are as short as this.
_AIM = 1e-4
#: Further away than this, in standard errors, the average information tells more of the curvature
#: than the gradients of the last steps.
_FAR = 10.0
#: Step of the differences of gradients: of coordinates, and of coefficients in standard errors.
_STEP = 1e-4
#: A fit that is not near after so many steps may have no optimum.
_LONG = 8
#: With more rows than these a step takes time.
_MANY_ROWS = 20_000
#: What the likelihood of a mode that is found roughly may be off by.
_NOISE = 0.5
#: Differences for standard errors are over this part of one, with few and with many rows.
_PARTS = 1e-4, 3e-4


@dataclass(frozen=True)
class _Holder:
    """What coordinates are of."""

    covariance: Matrix


class MarginalFit:
    """The parameters as one vector x: coefficients of orthonormal columns of X (with ML), coordinates
    of the covariance, and what the family stores."""

    def __init__(
        self,
        loss: LaplaceLoss,
        y: Tensor,
        X: Tensor,
        offset: Tensor,
        names: Sequence[str],
        weights: Tensor | None = None,
    ) -> None:
        self.loss, self.y, self.X, self.offset, self.weights = loss, y, X, offset, weights
        # Columns of unit mean square, so that a coefficient is in units of the predictor.
        part = FixedPart.of(X.new_zeros(len(X)), X, names)
        self.fixed, self.size = part, len(X) ** 0.5
        self.Q, self.T = part.Q * self.size, part.T * self.size
        objective = cast(Objective, _Holder(loss.covariance))
        self.at = Coordinates([objective])
        if self.at.loose:
            raise InputError(
                f"parameter {self.at.loose[0].name!r} is no covariance parameter: train it by "
                "LaplaceLoss and an optimizer of torch, or freeze it by requires_grad_(False)"
            )
        self.own = [p for p in loss.family.parameters() if p.requires_grad]
        self.p = self.Q.shape[1] if loss.method == "ml" else 0
        # REML integrates over coefficients of X, not over those of the orthonormal columns.
        volume = self.T.diagonal().abs().log().sum() if loss.method == "reml" else 0.0
        self.jacobian = float(volume)
        self.m = len(self.at)
        self.of_categories = isinstance(loss.family, Binomial | Ordinal)
        self.rows: Tensor | None = None
        self.history: list[Record] = []
        self.x = X.new_zeros(0)
        self.value, self.slope = nan, self.x
        self.hessian = X.new_zeros(0, 0)
        self.aim = _AIM if len(X) <= _MANY_ROWS else CONVERGED
        #: What the likelihood may be off by beside rounding.
        self.noise = 0.0

    # ------------------------------------------------------------------ the function

    @property
    def count(self) -> float:
        """How many rows there are, each counting by its weight."""
        return float(len(self.X) if self.weights is None else self.weights.sum())

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Coefficients, coordinates and the family's."""
        gamma, u, phi = x.split([self.p, self.m, len(x) - self.p - self.m])
        return gamma, u, phi

    def write(self, x: Tensor) -> None:
        """Set the parameters of the family to those of x."""
        at = 0
        with torch.no_grad():
            for parameter in self.own:
                part = self.split(x)[2][at : at + parameter.numel()]
                parameter.copy_(part.reshape(parameter.shape))
                at += parameter.numel()

    def predictor(self, gamma: Tensor) -> Tensor:
        """The known part of the linear predictor."""
        return torch.addmv(self.offset, self.Q, gamma) if self.p else self.offset

    def evaluate(self, x: Tensor) -> tuple[float, Tensor]:
        """The negative log-likelihood and its gradient."""
        self.write(x)
        gamma, u, _ = (part.detach().requires_grad_() for part in self.split(x))
        with torch.enable_grad(), self.loss.covariance.given(self.at.natural(0, u)):
            X = None if self.loss.method == "ml" else self.Q
            value = self.loss(self.y, self.predictor(gamma), X, self.rows, self.weights)
            parts = torch.autograd.grad(
                value, [gamma, u, *self.own], allow_unused=True, materialize_grads=True
            )
        return float(value.detach()), torch.cat([part.reshape(-1) for part in parts])

    def found(self, x: Tensor) -> LaplaceEvaluation:
        """What the likelihood says at x."""
        self.write(x)
        gamma, u, _ = self.split(x)
        with torch.no_grad(), self.loss.covariance.given(self.at.natural(0, u)):
            X = None if self.loss.method == "ml" else self.Q
            return self.loss.evaluate(self.y, self.predictor(gamma), X, self.rows, self.weights)

    # ------------------------------------------------------------------ the way

    def part(self, rows: Tensor, aim: float) -> MarginalFit:
        """The fit of some rows, whose steps end so near the optimum."""
        found = copy(self)
        found.y, found.X, found.Q = self.y[rows], self.X[rows], self.Q[rows]
        found.offset, found.rows, found.aim, found.history = self.offset[rows], rows, aim, []
        found.weights = None if self.weights is None else self.weights[rows]
        return found

    def nearby(self, aim: float) -> MarginalFit | None:
        """The fit by a likelihood that is near and takes far less work, whose steps end so near the
        optimum; None where there is none."""
        loss = self.loss.nearby()
        if loss is None:
            return None
        found = copy(self)
        found.loss, found.aim, found.history, found.noise = loss, aim, [], _NOISE
        return found

    def replace(self, places: range) -> None:
        """Rows and columns of the curvature, anew by differences."""
        H = self.hessian.clone()
        for j, column in zip(places, self._differences(places), strict=True):
            H[j], H[:, j] = column, column
        corner = H[places.start :, places.start :].clone()
        H[places.start :, places.start :] = (corner + corner.mT) / 2
        self.hessian = H

    def refresh(self) -> None:
        """The curvature by covariance parameters, anew by the average information."""
        self.write(self.x)
        gamma, u, _ = self.split(self.x)

        def matrices(x: Tensor) -> tuple[Tensor, ...]:
            with self.loss.covariance.given(self.at.natural(0, x)):
                return tuple(term.covariance.matrix for term in self.loss.covariance.terms())

        if not self.m:
            return
        slopes = jacobian(matrices, u)
        with self.loss.covariance.given(self.at.natural(0, u)):
            X = None if self.loss.method == "ml" else self.Q
            eta = self.predictor(gamma)
            known = self.loss.information(self.y, eta, X, slopes, self.rows, self.weights)
        # Where a standard deviation is too large the information says little: with what the
        # likelihood's own curvature has beside it, no step goes beyond zero.
        own = slice(self.p, self.p + self.m)
        vanishing = self.at.vanishing(u) & (u != 0)
        beside = torch.where(vanishing, self.slope[own] / torch.where(vanishing, u, 1), 0)
        self.hessian[own, own] = known + torch.diag(beside.clamp(min=0))

    def _differences(self, places: range) -> list[Tensor]:
        """Columns of the curvature by one-sided differences."""
        found = []
        for j in places:
            moved = self.x.clone()
            step = _STEP * (1 + float(moved[j].abs()))
            moved[j] += step
            found.append((self.evaluate(moved)[1] - self.slope) / step)
        return found

    def climb(self, most: int) -> bool:
        """Steps to the optimum; whether it was reached.

        Raises:
            NumericalError: if coefficients go to infinity, or a precision does that still raises the
                likelihood.
        """
        period = max(4 if len(self.X) <= _MANY_ROWS else 10, len(self.x) - self.p)
        last = inf
        for step in range(1, most + 1):
            direction, norm = self._direction()
            if norm < self.aim:
                return True
            if norm > 1 and (told := told_exactly(self.loss.family, self.x, _EXACT)):
                raise NumericalError(told)
            if norm > 1 and step == _LONG and self._is_told():
                raise NumericalError(
                    "the likelihood has no maximum: the linear predictor tells the responses without error"
                )
            before = self.value
            accepted = self._search(direction, norm)
            if self.p and self.of_categories and float(self.x[: self.p].abs().max()) > _ENDLESS:
                raise self.separated()
            self._record(norm, accepted)
            if not accepted:
                self.hessian = self.curvature()
                direction, norm = self._direction()
                if norm < self.aim or not self._search(direction, norm):
                    return norm < CONVERGED
            elif norm < CONVERGED and before - self.value < 1e-12 * (1 + abs(before)):
                return True
            elif norm > _FAR:
                self.refresh()
            elif step % period == 0:
                # A curvature that is only updated is far from its own where it changes its sign. Where
                # coefficients grow with the variances, as of responses that are near to separated, theirs
                # changes as much.
                if norm < last / 2:
                    self.replace(range(self.p, len(self.x)))
                else:
                    self.hessian = self.curvature()
                last = norm
        return self._direction()[1] < CONVERGED

    def _is_told(self) -> bool:
        """Whether the linear predictor tells the responses without error."""
        with torch.no_grad():
            terms = self.loss.covariance.terms(self.rows)
        return tells_responses(self.loss.family, self.y, self.offset, terms, self.Q)

    def separated(self) -> NumericalError:
        """What is raised of responses whose likelihood has no maximum."""
        with torch.no_grad():
            terms = self.loss.covariance.terms(self.rows)
        return NumericalError(separation_of(self.loss.family, self.y, terms, self.X))

    def _positive(self) -> tuple[Tensor, Tensor, Tensor]:
        """The curvature made positive: its eigenvalues and eigenvectors in scales of unit diagonal."""
        scale = self.hessian.diagonal().abs().clamp(min=1e-10).sqrt()
        values, vectors = spectrum_in_scales(self.hessian, scale)
        return values.abs().clamp(min=1e-8), vectors, scale

    def _direction(self) -> tuple[Tensor, float]:
        """The step by the curvature made positive, and its length in standard errors."""
        values, vectors, scale = self._positive()
        g = vectors.mT @ (self.slope / scale)
        return -(vectors @ (g / values)) / scale, float((g * g / values).sum().sqrt())

    def _search(self, direction: Tensor, norm: float) -> float:
        """A step of a part of the direction that lowers the loss; 0 if there is none."""
        # No parameter moves by more than a unit of its scale at a time.
        part = 1.0 / max(1.0, float((direction.abs() / (1 + self.x.abs())).max()) / 2)
        expected = float(self.slope @ direction)
        slack = 1e-13 * (1 + abs(self.value)) + self.noise
        for _ in range(30):
            x = self.x + part * direction
            try:
                value, slope = self.evaluate(x)
            except NumericalError:
                value, slope = nan, self.slope
            # Of a length far below all distances the slope is 0 times infinity.
            exists = isfinite(value) and bool(torch.isfinite(slope).all())
            if exists and value <= self.value + 1e-4 * part * expected + slack:
                self._update(x - self.x, slope - self.slope)
                self.x, self.value, self.slope = x, value, slope
                return part
            part /= 2
        self.evaluate(self.x)
        return 0.0

    def _update(self, s: Tensor, d: Tensor) -> None:
        """BFGS, damped so that the curvature stays positive along the step (Powell 1978)."""
        # From that by which the step was made: an indefinite one would be driven away from zero.
        values, vectors, scale = self._positive()
        root = scale[:, None] * vectors
        H = (root * values) @ root.mT
        Hs = H @ s
        along, bend = float(s @ Hs), float(s @ d)
        if bend < 0.2 * along:
            weight = 0.8 * along / (along - bend)
            d = weight * d + (1 - weight) * Hs
            bend = float(s @ d)
        self.hessian = H + torch.outer(d, d) / bend - torch.outer(Hs, Hs) / along

    def _record(self, norm: float, accepted: float) -> None:
        u = self.split(self.x)[1]
        with torch.no_grad(), self.loss.covariance.given(self.at.natural(0, u)):
            values = self.loss.covariance.build_params(out_format="dict")
            own = self.loss.family.quantities(u)
        found = {name: float(value.detach()) for name, value in {**values, **own}.items()}
        self.history.append(Record(-self.value + self.jacobian, norm, accepted, found))

    def curvature(self) -> Tensor:
        """The observed information by differences of gradients."""
        return self.differences()[0]

    def differences(self) -> tuple[Tensor, Tensor]:
        """The curvature, and the derivatives of the coefficients by x where X is integrated, (p, len(x)).

        Gradients are exact, so that differences to one side do, over a part of a standard error so small
        that the curvature hardly moves: of many rows it moves less, and gradients are rounded more.
        """
        integrated = self.loss.method == "reml" and self.Q.shape[1] > 0
        here = self.found(self.x).coefficients if integrated else self.x[:0]
        scale = self.hessian.diagonal().abs().clamp(min=1e-6).rsqrt()
        count, part = len(self.x), _PARTS[len(self.X) > _MANY_ROWS]
        H, moves = self.x.new_zeros(count, count), []
        for j in range(count):
            moved = self.x.clone()
            moved[j] += part * scale[j]
            step = moved[j] - self.x[j]
            H[j] = (self.evaluate(moved)[1] - self.slope) / step
            if integrated:
                moves.append((self.found(moved).coefficients - here) / step)
        self.write(self.x)
        J = torch.stack(moves, 1) if moves else self.x.new_zeros(self.Q.shape[1], count)
        return (H + H.mT) / 2, J

    def settle(self) -> list[int]:
        """Take negligible standard deviations as zero; what is inside the bounds."""
        vanishing = self.at.vanishing(self.x)
        u = self.x[self.p : self.p + self.m]
        small = [j for j in range(self.m) if bool(vanishing[j]) and float(u[j].abs()) < 1e-3]
        for j in small:
            x = self.x.clone()
            x[self.p + j] = 0
            value, slope = self.evaluate(x)
            if value <= self.value + 1e-6:
                self.x, self.value, self.slope = x, value, slope
        # In their canonical signs, of which the likelihood does not depend.
        own = slice(self.p, self.p + self.m)
        self.at.write(self.x[own])
        canonical = self.at.read(self.x)
        if not torch.allclose(canonical, self.x[own], rtol=1e-12, atol=0):
            x = self.x.clone()
            x[own] = canonical
            self.x = x
            self.value, self.slope = self.evaluate(x)
        ends = self.at.on_boundary(self.x[own])
        gone = {self.p + j for j in range(self.m) if bool(ends[j])}
        return [j for j in range(len(self.x)) if j not in gone]
