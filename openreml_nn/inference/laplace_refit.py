"""A fitted model with a family that can be moved and fitted again."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from openreml_nn.estimation.curvature import CURVATURE
from openreml_nn.estimation.marginal_result import marginal_outcome
from openreml_nn.estimation.marginal_start import set_start
from openreml_nn.estimation.marginal_steps import MarginalFit
from openreml_nn.families import Family
from openreml_nn.inference.refit import matrix_entries, source_of
from openreml_nn.inference.response import family_at
from openreml_nn.likelihood import LaplaceLoss
from openreml_nn.result import Result
from openreml_nn.support.errors import InputError, NumericalError
from openreml_nn.support.solving import solve_named
from openreml_nn.support.spectrum import eigenvalues

__all__ = ["LaplaceRefit", "bfgs", "numbers_of"]

#: Steps of a fit, at most.
_MOST = 100
#: Where a fit of some rows ends, in standard errors.
_AIM = 1e-4
#: A standard deviation of the linear predictor that is nearly none.
_SMALL = 1e-3
#: Coefficients of columns of unit size beyond this may have no finite estimate.
_LARGE = 5.0
#: and have none where a row, on average, has less information on them than this.
_LITTLE = 1e-6


class LaplaceRefit:
    """A copy of a fit of a family, at its estimates.

    Args:
        result: the fit.
        method: ``"ml"`` or ``"reml"``; its own by default.

    Attributes:
        loss: its marginal likelihood.
        y, X, offset, weights: the data; X has the columns that were kept.

    Raises:
        InputError: if the fit has no family or no data.
        TypeError: if it is no result.
    """

    def __init__(self, result: Result, method: str | None = None) -> None:
        self.result, self.source = result, source_of(result)
        where = self.source.y.device  # as Refit has it
        family = copy.deepcopy(family_at(result)).to(where)
        covariance = copy.deepcopy(self.source.covariance).to(where)
        stored = {estimate.name: estimate.untransformed for estimate in result.parameters}
        with torch.no_grad():
            for entry in covariance.parameter_entries().entries:
                entry.tensor.fill_(stored[entry.name])
        method = method or result.method
        solver = result.plan.choice
        self.loss = LaplaceLoss(covariance, family, method, result.quadrature, solver)
        self.X = self.source.X.detach()[:, list(result.fixed.columns)]
        self.y = self.source.y.detach()
        offset = self.source.offset
        self.offset = self.X.new_zeros(len(self.X)) if offset is None else offset.detach()
        self.weights = self.source.weights

    @cached_property
    def maximum(self) -> tuple[Tensor, Tensor]:
        """The parameters of the maximum as :class:`MarginalFit` has them, x, and the observed
        information there."""
        fit = self._begun(self.y)
        fit.x = self._x(fit)
        fit.value, fit.slope = fit.evaluate(fit.x)
        fit.hessian = torch.eye(len(fit.x)).to(fit.x)  # of which differences have their steps
        fit.hessian = fit.curvature()
        if self.loss.method != self.result.method:
            fit.climb(_MOST)
            fit.hessian = fit.curvature()
        return fit.x, fit.hessian

    def _begun(self, y: Tensor) -> MarginalFit:
        names = list(self.result.fixed.names)
        return MarginalFit(self.loss, y, self.X, self.offset, names, self.weights)

    def _x(self, fit: MarginalFit) -> Tensor:
        """The estimates as the parameters of a fit."""
        gamma = solve_named(
            fit.T, self.result.fixed.estimate.to(fit.T), "the basis of the fixed effects"
        )
        own = [p.detach().reshape(-1).to(gamma) for p in fit.own]
        return torch.cat([gamma[: fit.p], fit.at.read(gamma), *own])

    def fit(self, y: Tensor | None = None) -> MarginalFit:
        """At the estimates with some responses, of which the curvature is that of the fit's own."""
        found = self._begun(self.y if y is None else y)
        found.x, found.hessian = (part.clone() for part in self.maximum)
        found.value, found.slope = found.evaluate(found.x)
        return found

    def draw(self, samples: int, seed: int) -> Tensor:
        """Responses (n, samples), or (n, 2, samples), from effects that are drawn anew for each.

        Raises:
            InputError: if the family cannot draw, or rows have weights, which are no part of a
                distribution.
        """
        self.refuse_weights("of which responses are drawn")
        family = self.loss.family
        if type(family).draw is Family.draw:
            raise InputError(
                f"`result` is of the family {type(family).__name__}, which has no draw(): expected one "
                "that says how its responses are simulated"
            )
        generator, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
        with torch.no_grad():
            terms = self.loss.covariance.terms(None, self.X.dtype)
            eta = self.predictor[:, None].repeat(1, samples)
            for term in terms:
                q = term.design.shape[1]
                noise = torch.randn(q, samples, generator=generator, dtype=eta.dtype)
                eta += term.design.matmul(term.covariance.root().multiply(noise.to(eta)))
            return torch.stack([family.draw(self.y, e, rng) for e in eta.unbind(1)], -1)

    def refuse_weights(self, why: str) -> None:
        """Refuse rows whose log-densities count more or less than once.

        Raises:
            InputError: if there are some.
        """
        if self.weights is not None:
            raise InputError(
                f"`result` has prior weights, and a power of a density is no distribution {why}: expected a "
                "fit without weights; trials are no such weights"
            )

    @property
    def predictor(self) -> Tensor:
        """The linear predictor of the rows at the estimates, but for the random effects, (n,)."""
        return self.offset + self.X @ self.result.fixed.estimate

    def project(self, columns: Tensor) -> Tensor:
        """P of the working linear model at the estimates times columns (n, k), see
        :meth:`LaplaceLoss.project`."""
        return self.loss.project(self.y, self.predictor, self.X, columns, self.weights)

    def again(self, y: Tensor, aim: float | None = None) -> MarginalFit:
        """The maximum of the likelihood of other responses.

        Args:
            y: the responses.
            aim: how near to it the steps end, in standard errors; as those of a fit do by default.

        Raises:
            NumericalError: if it was not found, or the responses are separated.
        """
        self.loss.family.check(y)
        fit = self.fit(y)
        fit.aim = fit.aim if aim is None else aim
        if _leaves_zero(fit):
            # The likelihood is even about a standard deviation of zero: no step leaves it.
            set_start(fit)
        if not fit.climb(_MOST):
            # The way from the estimates led nowhere: from the start that these responses have.
            set_start(fit)
            if not fit.climb(_MOST):
                raise NumericalError(f"the fit did not converge in {_MOST} iterations")
        _refuse_endless(fit)
        return fit

    def without(self, keep: Tensor) -> MarginalFit:
        """The maximum of the likelihood of some rows (m,).

        Raises:
            NumericalError: as :meth:`again` does.
        """
        fit = self.fit().part(keep, _AIM)
        fit.x = fit.x.clone()
        fit.value, fit.slope = fit.evaluate(fit.x)
        if not fit.climb(_MOST):
            raise NumericalError(f"the fit did not converge in {_MOST} iterations")
        _refuse_endless(fit)
        return fit

    def result_of(self, fit: MarginalFit) -> Result:
        """What a fit found, as :func:`openreml_nn.glmm` has it without a table."""
        names, labels = list(self.result.fixed.names), self.source.labels
        return marginal_outcome(fit, names, labels, True)[0]

    def numbers(self, fit: MarginalFit) -> dict[str, float]:
        """Numbers as :func:`numbers_of` has them, where a fit is."""
        fit.write(fit.x)
        gamma, u, _ = fit.split(fit.x)
        with torch.no_grad(), self.loss.covariance.given(fit.at.natural(0, u)):
            matrices = [term.shown() for term in self.loss.covariance.terms()]
            beta = fit.T @ (gamma if fit.p else fit.found(fit.x).coefficients)
            own = self.loss.family.quantities(u)
        found = _of_matrices(self.result, matrices)
        found |= dict(zip(self.result.fixed.names, beta.tolist(), strict=True))
        return found | {name: float(value.detach()) for name, value in own.items()}


def _leaves_zero(fit: MarginalFit) -> bool:
    """Whether the likelihood rises from a standard deviation of zero."""
    for j in ((fit.split(fit.x)[1] == 0) & fit.at.vanishing(fit.x)).nonzero()[:, 0].tolist():
        moved = fit.x.clone()
        moved[fit.p + j] = _SMALL
        if float(fit.evaluate(moved)[1][fit.p + j]) < 0:
            return True
    return False


def _refuse_endless(fit: MarginalFit) -> None:
    """Refuse coefficients that have no finite estimate."""
    p = fit.p
    if p and float(fit.x[:p].abs().max()) > _LARGE:
        least = float(eigenvalues(fit.curvature()[:p, :p], CURVATURE)[0])
        if least < _LITTLE * fit.count:
            raise NumericalError("the responses are separated: there is no finite estimate")


def numbers_of(result: Result) -> dict[str, float]:
    """Standard deviations, correlations, fixed effects and the family's parameters, by name.

    Raises:
        InputError: if a parameter of the family and a fixed effect have one name.
    """
    found = _of_matrices(result, [c.covariance for c in result.components])
    found |= dict(zip(result.fixed.names, result.fixed.estimate.tolist(), strict=True))
    for parameter in result.family_parameters:
        if parameter.name in found:
            raise InputError(
                f"`result` has a fixed effect {parameter.name!r}, as a parameter of its family is "
                "named: expected another name of the column"
            )
        found[parameter.name] = parameter.value
    return found


def _of_matrices(result: Result, matrices: Sequence[Tensor]) -> dict[str, float]:
    """Standard deviations and correlations of the terms' covariances."""
    found: dict[str, float] = {}
    for name, (index, i, j) in matrix_entries(result).items():
        matrix = matrices[index]
        scale = float((matrix[i, i] * matrix[j, j]).clamp(min=0).sqrt())
        own = float(matrix[i, j])
        found[name] = scale**0.5 if i == j else (own / scale if scale else math.nan)
    return found


def bfgs(B: Tensor, s: Tensor, d: Tensor) -> Tensor:
    """The curvature B after a step s along which the gradient changed by d, by BFGS, damped so that the
    curvature stays positive along the step (Powell 1978)."""
    Bs = B @ s
    along, bend = float(s @ Bs), float(s @ d)
    if not along > 0:
        return B
    if bend < 0.2 * along:
        weight = 0.8 * along / (along - bend)
        d = weight * d + (1 - weight) * Bs
        bend = float(s @ d)
    return B + torch.outer(d, d) / bend - torch.outer(Bs, Bs) / along
