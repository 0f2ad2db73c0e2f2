"""Where a fit of a marginal likelihood begins."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from openreml_nn.estimation.marginal_steps import MarginalFit
from openreml_nn.likelihood.system.crossproducts import same_codes
from openreml_nn.likelihood.system.roles import by_levels, grid_of
from openreml_nn.support.errors import NumericalError
from openreml_nn.support.solving import invert_named
from openreml_nn.terms.design import IndexedDesign

__all__ = ["set_start"]

#: With more rows than these a fit begins at that of this part of them, of at least so many rows.
_MANY_ROWS = 50_000
_PART, _LEAST = 16, 10_000
#: The fit of a part ends this far from its optimum, in standard errors, or after so many steps.
_NEAR, _MOST_STEPS = 0.1, 30
#: That by a likelihood near by ends this far from the optimum.
_CLOSE = 0.02


@torch.no_grad()
def set_start(fit: MarginalFit, begin: Callable[[], None] | None = None) -> None:
    """Begin at penalised quasi-likelihood for variances of the order of the data's, or for those
    that a call sets after these; with many levels of one factor, at the fit of a part of them.

    Raises:
        NumericalError: if the likelihood is not found there.
    """
    loss, rows = fit.loss, len(fit.X)
    near = loss.family.start(fit.y).to(fit.Q) - fit.offset
    rough = fit.Q.mT @ near / rows
    rest = near - fit.Q @ rough
    spread = rest.var() if rows > 1 else rest.new_ones(())
    spread = torch.where(spread > 1e-8 * near.square().mean() + 1e-30, spread, 1.0)
    loss.covariance.moment_start((spread / 2).expand(rows))
    scale = fit.at.read(near)
    if begin is not None:
        begin()
    part = _sample(fit) if rows > _MANY_ROWS else None
    if part is None or not _from_part(fit, part, rough, scale):
        _penalised(fit, rough, scale)


def _penalised(fit: MarginalFit, rough: Tensor, scale: Tensor) -> None:
    """From coefficients and effects that are a mode together."""
    if fit.Q.shape[1]:
        loss, known = fit.loss, (fit.y, fit.offset, fit.Q)
        gamma, spread = loss.penalised(*known, rough, fit.rows, fit.weights)
    else:
        gamma, spread = rough.new_zeros(0), rough.new_zeros(0, 0)
    u = fit.at.read(rough)
    # The likelihood is even about a standard deviation of zero: no step would leave it.
    vanishing = fit.at.vanishing(u)
    u = torch.where(vanishing & (u == 0), scale / 10, u)
    phi = [p.detach().reshape(-1).to(rough) for p in fit.own]
    fit.x = torch.cat([gamma[: fit.p], u, *phi])
    fit.hessian = rough.new_zeros(len(fit.x), len(fit.x))
    if fit.p:
        fit.hessian[: fit.p, : fit.p] = invert_named(
            spread, "the covariance of the fixed effects at the start"
        )
    near = fit.nearby(_CLOSE)
    if near is None or not _climbed(fit, near, scale):
        _evaluate(fit)


def _evaluate(fit: MarginalFit) -> None:
    """The likelihood and its curvature where a fit begins."""
    fit.value, fit.slope = fit.evaluate(fit.x)
    fit.replace(range(fit.p + fit.m, len(fit.x)))
    fit.refresh()


def _climbed(fit: MarginalFit, near: MarginalFit, scale: Tensor) -> bool:
    """From the optimum of a likelihood that is near, with its curvature; whether there is one within the
    bounds."""
    own = [p.detach().clone() for p in fit.own]
    try:
        _evaluate(near)
        if near.climb(_MOST_STEPS) and _is_inside(near, scale):
            fit.x, fit.hessian = near.x, near.hessian
            fit.value, fit.slope = fit.evaluate(fit.x)
            return True
    except NumericalError:
        pass  # the near one may have no optimum
    _restore(fit, own)
    return False


def _is_inside(fit: MarginalFit, scale: Tensor) -> bool:
    """Whether no standard deviation has gone next to zero, at the scale of the data."""
    u = fit.split(fit.x)[1]
    vanishing = fit.at.vanishing(u)
    return bool((~vanishing | (u.abs() > scale.abs() / 10)).all())


def _restore(fit: MarginalFit, own: list[Tensor]) -> None:
    """Set the family's parameters back."""
    for parameter, value in zip(fit.own, own, strict=True):
        parameter.copy_(value)


def _sample(fit: MarginalFit) -> Tensor | None:
    """Rows of every so many levels of the only grouping factor; None if there are others."""
    terms = [by_levels(term) for term in fit.loss.covariance.terms()]
    first = terms[0].design
    for term in terms:
        design = term.design
        if grid_of(term) is None or not isinstance(design, IndexedDesign):
            return None
        if not isinstance(first, IndexedDesign) or not same_codes(first, design):
            return None
    assert isinstance(first, IndexedDesign)
    every = min(_PART, len(fit.X) // _LEAST)
    found = (first.codes % every == 0).nonzero()[:, 0]
    return found if _LEAST / 2 < len(found) < len(fit.X) / 2 else None


def _from_part(fit: MarginalFit, rows: Tensor, rough: Tensor, scale: Tensor) -> bool:
    """From the fit of some rows, with its curvature; whether there is one within the bounds."""
    part, own = fit.part(rows, _NEAR), [p.detach().clone() for p in fit.own]
    try:
        _penalised(part, rough, scale)
        if part.climb(_MOST_STEPS) and _is_inside(part, scale):
            fit.x, fit.hessian = part.x, part.curvature() * (fit.count / part.count)
            fit.value, fit.slope = fit.evaluate(fit.x)
            return True
    except NumericalError:
        pass  # a part may be separated where the whole is not
    _restore(fit, own)
    return False
