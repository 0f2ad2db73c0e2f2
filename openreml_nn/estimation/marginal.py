r"""Maximum of the marginal likelihood of responses that are not Gaussian.

Coefficients, covariance parameters and the family's own are estimated together by quasi-Newton steps
on exact gradients. The first curvature, and that of which standard errors come, are differences of
gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from openreml_nn.estimation.marginal_result import marginal_outcome
from openreml_nn.estimation.marginal_several import climb_from_reaches, may_end
from openreml_nn.estimation.marginal_start import set_start
from openreml_nn.estimation.marginal_steps import MarginalFit
from openreml_nn.estimation.outcome import unreached
from openreml_nn.estimation.separation import separated_levels, told_exactly
from openreml_nn.families import Binomial
from openreml_nn.likelihood import LaplaceLoss
from openreml_nn.likelihood.laplace_evaluation import LaplaceEvaluation
from openreml_nn.result import Estimate, Label, Result, Start
from openreml_nn.support.errors import NumericalError
from openreml_nn.support.warning import warn

__all__ = ["endless", "fit_laplace"]

#: A precision, or a shape, beyond this leaves no spread of its own.
_ENDLESS = 1e8
#: A standard deviation of effects on the scale of a link that leaves nearly every level one category.
_LARGE = 10.0


def fit_laplace(
    loss: LaplaceLoss,
    y: Tensor,
    X: Tensor,
    offset: Tensor | None = None,
    *,
    max_iterations: int = 200,
    names: Sequence[str] | None = None,
    labels: Mapping[str, Label] | None = None,
    begin: Callable[[], None] | None = None,
    weights: Tensor | None = None,
) -> tuple[Result, LaplaceEvaluation]:
    r"""Fit a generalised linear mixed model, in the precision of :meth:`LaplaceLoss.precision`, to which
    the parameters are brought.

    Args:
        loss: the marginal likelihood, whose covariance and family hold the parameters.
        y: the responses.
        X: model matrix of the fixed effects (n, p), maybe without columns.
        offset: (n,) known part of the linear predictor.
        max_iterations: after so many steps the fit stops, with a warning.
        names: of the columns of X.
        labels: name of a term to names for the tables.
        begin: sets covariance parameters that are to start elsewhere than at the scale of the data; without
            it a correlation that ends at a length, as a spherical one, starts from several lengths.
        weights: (n,) of the rows, see :meth:`LaplaceLoss.forward`.

    Returns:
        The result and the likelihood there. Of the result ``fixed`` and ``random`` are coefficients
        and modes, ``parameters`` those of the covariance, ``family_parameters`` those of the family.

    Raises:
        NumericalError: if the data are separated.
        InputError: if the data do not fit.
    """
    X = X.to(loss.precision(y, X))
    if weights is not None:
        y, weights = loss.family.with_weights(y, weights.to(X))
    loss.family.check(y)
    names = [f"X{j}" for j in range(X.shape[1])] if names is None else list(names)
    loss.covariance.to(X)
    loss.family.to(X)
    offset = X.new_zeros(len(X)) if offset is None else offset.to(X)
    fit = MarginalFit(loss, y, X, offset, names, weights)
    try:
        result, found = _climbed(fit, max_iterations, names, labels or {}, begin)
    except NumericalError as error:
        told = told_exactly(loss.family, offset, _ENDLESS)
        if not told:
            raise
        raise NumericalError(told) from error
    if not result.converged:
        warn(
            f"the fit did not converge in {result.iterations} iterations: "
            + unreached(result.score_norm, result.history)
            + "".join(f"; {text}" for text in endless(result.family_parameters))
        )
    return result, found


def _climbed(
    fit: MarginalFit,
    most: int,
    names: Sequence[str],
    labels: Mapping[str, Label],
    begin: Callable[[], None] | None,
) -> tuple[Result, LaplaceEvaluation]:
    """The result from the start, or the best of several, by so many steps."""
    others: list[Start] = []
    if begin is None and may_end(fit):
        fit, converged, others = climb_from_reaches(fit, most)
    else:
        set_start(fit, begin)
        converged = fit.climb(most)
    result, found = marginal_outcome(fit, names, labels, converged)
    left = most - len(fit.history)
    if converged and not result.converged and left > 0:
        # The curvature of the last steps was too large: go on by the one that was found there.
        converged = fit.climb(left)
        result, found = marginal_outcome(fit, names, labels, converged)
    if _is_endless(fit, result):
        raise fit.separated()
    return replace(result, starts=tuple(others)), found


def _is_endless(fit: MarginalFit, result: Result) -> bool:
    """Whether binary responses that a grouping factor tells apart end at a large variance of it, where
    Laplace's approximation may have a maximum though the likelihood has none."""
    large = {c.name for c in result.components if float(c.covariance.abs().max()) > _LARGE**2}
    free = {e.name.split("/")[0] for e in result.parameters if not e.fixed}
    if not large & free or not isinstance(fit.loss.family.base, Binomial):
        return False
    with torch.no_grad():
        terms = fit.loss.covariance.terms(fit.rows)
    levels = separated_levels(fit.loss.family, fit.y, terms)
    return any(own.name in large & free and own.alike == own.levels for own in levels)


def endless(parameters: Sequence[Estimate]) -> list[str]:
    """What is said of parameters of a family that have gone to the end of their range, as the precision of
    proportions does that the linear predictor tells exactly; a scale, which has units, is left out."""
    return [
        f"{e.name} is {e.value:.2g}, at the end of its range, up to which the likelihood rises"
        for e in parameters
        if e.value > _ENDLESS and e.name != "sigma^2"
    ]
