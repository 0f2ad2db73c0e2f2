"""What a fit of a marginal likelihood found, from its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import nan

import torch
from torch import Tensor

from openreml_nn.estimation.curvature import CURVATURE
from openreml_nn.estimation.derivatives import jacobian
from openreml_nn.estimation.marginal_steps import CONVERGED, MarginalFit
from openreml_nn.families import Family
from openreml_nn.likelihood.laplace_evaluation import LaplaceEvaluation
from openreml_nn.result import (
    Component,
    Estimate,
    FixedEffects,
    Label,
    Result,
    Source,
)
from openreml_nn.support.solving import invert_named
from openreml_nn.support.spectrum import eigenvalues
from openreml_nn.terms.term import Term

__all__ = ["marginal_outcome"]

#: A standard deviation of the linear predictor below this is none.
_VANISHED = 1e-4


def marginal_outcome(
    fit: MarginalFit, names: Sequence[str], labels: Mapping[str, Label], converged: bool
) -> tuple[Result, LaplaceEvaluation]:
    """The result at the end of the steps, and the likelihood there."""
    loss, part, p, m = fit.loss, fit.fixed, fit.p, fit.m
    inner = fit.settle()
    with torch.no_grad():
        found = fit.found(fit.x)  # where the last evaluation was
        fit.hessian, J = fit.differences()
        H = fit.hessian
        spread = _inverse(H, inner, fit)
        gamma = fit.x[:p] if loss.method == "ml" else found.coefficients
        if loss.method == "ml":
            covariance = spread[:p, :p]
        else:
            known = spread.nan_to_num()
            covariance = found.coefficient_covariance + J @ known @ J.mT
        kept = tuple(names[j] for j in part.columns)
        fixed = FixedEffects(
            kept, fit.T @ gamma, fit.T @ covariance @ fit.T.mT, tuple(part.columns), part.aliases
        )
        u, of_u = fit.x[p : p + m], spread[p : p + m, p : p + m]
        components = _components(fit, labels, u, of_u)
        predictor = found.predictor
        fitted = residuals = predictor.new_empty(0)
        family = loss.family.of_rows(loss.family.inputs_of(fit.y))
        if type(family).mean is not Family.mean:
            fitted = family.mean(predictor)
            residuals = loss.family.observed(fit.y).to(fitted) - fitted
        slope, inside = fit.slope[inner], spread[inner][:, inner]
        norm = float((slope @ inside @ slope).clamp(min=0).sqrt())
        boundary = tuple(fit.at.names[j] for j in range(m) if p + j not in inner)
        result = Result(
            method=loss.method,
            converged=converged and not norm > CONVERGED,
            singular=tuple(dict.fromkeys(c.group for c in components if c.singular)),
            indistinct=(),
            boundary=boundary,
            score_norm=norm,
            condition=_condition(H[inner][:, inner]),
            rows=len(fit.X),
            log_likelihood=-fit.value + fit.jacobian,
            log_likelihood_error=found.error,
            fixed=fixed,
            parameters=_parameters(fit, u, of_u),
            components=components,
            random=found.random,
            fitted=fitted,
            residuals=residuals,
            history=tuple(fit.history),
            plan=replace(loss.plan, fixed_effects=fit.Q.shape[1]),
            num_params=m + sum(x.numel() for x in fit.own),
            source=Source(
                loss.covariance,
                fit.y,
                fit.X,
                None,
                tuple(names),
                labels,
                offset=fit.offset,
                weights=fit.weights,
            ),
            optimizer="BFGS",
            family=loss.family.name or type(loss.family).__name__,
            link=loss.family.link,
            quadrature=loss.quadrature,
            family_parameters=_family_parameters(fit, spread[p + m :, p + m :]),
        )
        return result, found


def _inverse(H: Tensor, inner: Sequence[int], fit: MarginalFit) -> Tensor:
    """The covariance of the estimates; NaN for what is at a boundary."""
    found = torch.full_like(H, nan)
    at = torch.tensor(inner, dtype=torch.long)
    if not len(at):
        return found
    part = H[at][:, at]
    scale = part.diagonal().abs().clamp(min=1e-300).sqrt()
    unit = part / (scale[:, None] * scale)
    values = eigenvalues(unit, CURVATURE)
    if not bool(values[0] > 1e-9):
        if fit.p and bool((part.diagonal()[: fit.p] < 1e-6 * fit.count).any()):
            raise fit.separated()
        inverse = invert_named(unit, CURVATURE, pseudo=True)
    else:
        inverse = invert_named(unit, CURVATURE)
    found[at[:, None], at] = inverse / (scale[:, None] * scale)
    return found


def _condition(H: Tensor) -> float:
    if not len(H):
        return 1.0
    scale = H.diagonal().abs().clamp(min=1e-300).sqrt()
    values = eigenvalues(H / (scale[:, None] * scale), CURVATURE).abs()
    return float(values.max() / values.min())


def _parameters(fit: MarginalFit, u: Tensor, spread: Tensor) -> tuple[Estimate, ...]:
    """Covariance parameters on both scales."""
    place = {id(e.tensor): j for j, e in enumerate(fit.at.entries)}
    found = []
    for e in fit.loss.covariance.parameter_entries().entries:
        x = e.tensor.detach().to(u)
        value, stored = float(e.trans(x)), float(x)
        j = place.get(id(e.tensor))
        error = stored_error = nan
        if j is not None:
            own = u[j : j + 1]
            sd = float(spread[j, j].clamp(min=0).sqrt())
            (slope,) = jacobian(lambda v, e=e: (e.trans.at_coordinate(v),), own)  # type: ignore[misc]
            (back,) = jacobian(lambda v, e=e: (e.trans.from_coordinate(v),), own)  # type: ignore[misc]
            error, stored_error = float(slope.abs()) * sd, float(back.abs()) * sd
        found.append(Estimate(e.name, value, error, stored, stored_error, j is None))
    return tuple(found)


def _family_parameters(fit: MarginalFit, spread: Tensor) -> tuple[Estimate, ...]:
    """The family's parameters, with standard errors by the delta method."""
    family, own = fit.loss.family, fit.own
    like = fit.x
    with torch.enable_grad():
        quantities = family.quantities(like)
        found = []
        for name, value in quantities.items():
            error = nan
            if value.requires_grad:
                parts = torch.autograd.grad(
                    value.sum(), own, retain_graph=True, allow_unused=True, materialize_grads=True
                )
                g = torch.cat([part.reshape(-1) for part in parts]).to(spread)
                error = float((g @ spread @ g).clamp(min=0).sqrt())
            known = name in family.param_names
            stored = float((family.stored(name) if known else value).detach())
            fixed = not value.requires_grad
            found.append(Estimate(name, float(value.detach()), error, stored, nan, fixed))
    return tuple(found)


def _components(
    fit: MarginalFit, labels: Mapping[str, Label], u: Tensor, spread: Tensor
) -> tuple[Component, ...]:
    """The covariance of each term, with standard errors of its entries."""

    def terms(x: Tensor) -> list[Term]:
        with fit.loss.covariance.given(fit.at.natural(0, x)):
            return fit.loss.covariance.terms()

    def matrices(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(_shown(term, labels) for term in terms(x))

    here = [term.detach() for term in terms(u)]
    with torch.enable_grad():
        jacobians = jacobian(matrices, u) if len(u) else [None] * len(here)
    known, missing = spread.nan_to_num(), spread.diagonal().isnan()
    found = []
    for term, J in zip(here, jacobians, strict=True):
        matrix = _shown(term, labels)
        error = torch.zeros_like(matrix)
        if J is not None:
            error = torch.einsum("i...,ij,j...->...", J, known, J).clamp(min=0).sqrt()
            lost = (J[missing] != 0).any(0) | (matrix == 0)
            error = torch.where(lost, nan, error)
        label = labels.get(term.name) or _label(term, matrix)
        met = term.met(matrix)
        variances = met if met.dim() == 1 else met.diagonal()
        least = (
            variances.min()
            if met.dim() == 1
            else eigenvalues(met, f"the covariance of {term.name!r}")[0]
        )
        gone = variances < _VANISHED**2
        found.append(
            Component(
                term.name,
                label.group,
                tuple(label.effects),
                tuple(label.levels),
                matrix,
                error,
                bool(least < _VANISHED**2),
                tuple(e for e, g in zip(label.effects, gone.tolist(), strict=False) if g),
            )
        )
    return tuple(found)


def _shown(term: Term, labels: Mapping[str, Label]) -> Tensor:
    """The covariance of the effects of a level, on average where levels have their own."""
    matrix = term.shown()
    if term.name in labels and matrix.dim() == 2:
        k = len(labels[term.name].effects)
        if len(matrix) > k:
            blocks = matrix.unflatten(1, (-1, k)).unflatten(0, (-1, k))
            return blocks.diagonal(dim1=0, dim2=2).mean(-1)
    return matrix


def _label(term: Term, matrix: Tensor) -> Label:
    k = len(matrix)
    effects = ("(Intercept)",) if k == 1 else tuple(f"effect_{i}" for i in range(k))
    return Label(term.name, effects, tuple(map(str, range(term.design.shape[1] // k))))
