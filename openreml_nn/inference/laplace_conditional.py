r"""Effective degrees of freedom of a fit of a family, for predictions within the levels of the data.

For a response of an exponential family with the natural parameter :math:`\theta`, the conditional
likelihood is too good by :math:`\sum_i \operatorname{cov}(\hat\theta_i, y_i)` on average over data. It is
estimated without bias of counts, by the identity of Chen and Stein, and of binary responses:

.. math::
    \mathrm{df} = \sum_i y_i \{\hat\theta_i(y) - \hat\theta_i(y - e_i)\}, \qquad
    \mathrm{df} = \sum_i \hat\mu_i (1 - \hat\mu_i) \{\hat\theta_i(y_i = 1) - \hat\theta_i(y_i = 0)\},

in which :math:`\hat\theta(\cdot)` are of fits of all parameters to responses of which one is another.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openreml_nn.estimation.marginal_steps import MarginalFit
from openreml_nn.families import Binomial, Poisson
from openreml_nn.inference.laplace_refit import LaplaceRefit
from openreml_nn.inference.refit import tracked
from openreml_nn.support.errors import InputError, NumericalError

__all__ = ["degrees_by_differences", "degrees_by_information", "refuse_differences"]

#: Where fits end, in standard errors: differences of fits are small.
_AIM = 1e-6


def refuse_differences(refit: LaplaceRefit) -> str:
    """Why degrees of freedom are not to be had by differences of fits; nothing if they are."""
    family = refit.loss.family
    if refit.weights is not None:
        return "has prior weights, with which a density is none of its family"
    if isinstance(family, Poisson):
        return ""
    if not isinstance(family, Binomial):
        return f"is of the family {refit.result.family!r}"
    if refit.y.dim() == 2 and bool((refit.y.sum(1) != 1).any()):
        return "has several trials in a row"
    return ""


def degrees_by_differences(refit: LaplaceRefit, progress: bool) -> float:
    """Of counts and binary responses, from a fit for each row that is not zero, or for each row.

    Raises:
        NumericalError: if the responses with one of them changed have no finite estimate.
    """
    y, family = refit.y, refit.loss.family
    with torch.no_grad():
        here = _natural(refit, refit.again(y, _AIM))
        is_binary = isinstance(family, Binomial)
        value = family.observed(y).to(here)
        rows = range(len(y)) if is_binary else value.nonzero()[:, 0].tolist()
        total = 0.0
        for row in tracked(rows, "conditional AIC", progress):
            moved = y.clone()
            if y.dim() == 2:
                moved[row] = y[row].flip(0)
            else:
                moved[row] = 1 - y[row] if is_binary else y[row] - 1
            try:
                there = _natural(refit, refit.again(moved, _AIM))
            except NumericalError as error:
                raise NumericalError(
                    f"the fit to the responses with another one in row {row + 1} was not found: {error}; use "
                    "correction='information'"
                ) from error
            change = float(here[row] - there[row])
            if is_binary:
                mean = float(here[row].sigmoid())
                total += mean * (1 - mean) * change * (1 if float(value[row]) == 1 else -1)
            else:
                total += float(value[row]) * change
    return total


def _natural(refit: LaplaceRefit, fit: MarginalFit) -> Tensor:
    """The natural parameter of each row where a fit ended, (n,)."""
    eta, family = fit.found(fit.x).predictor, refit.loss.family
    if not isinstance(family, Binomial):
        return eta
    return eta if family.link == "logit" else family.mean(eta).logit()


def degrees_by_information(refit: LaplaceRefit) -> float:
    """The effective number of coefficients and random effects at held parameters, and how many of these
    the family has.

    Raises:
        InputError: if the fit was approximate.
    """
    if not refit.result.plan.exact:
        raise InputError(
            f"`result` is of the solver {refit.result.plan.solver!r}, whose variances of predictors are "
            "averages over random probes: expected a fit by an exact solver"
        )
    used = refit.loss.effects_in_use(refit.y, refit.predictor, refit.X, refit.weights)
    own = sum(p.numel() for p in refit.loss.family.parameters() if p.requires_grad)
    return float(used) + own
