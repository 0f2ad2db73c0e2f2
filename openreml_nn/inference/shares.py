"""Shares of variance: R² and intraclass correlations."""

from __future__ import annotations

from math import nan
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

from openreml_nn.estimation import Result
from openreml_nn.estimation.curvature import Curvature
from openreml_nn.estimation.derivatives import jacobian
from openreml_nn.estimation.spread import Spread
from openreml_nn.inference.laplace_refit import LaplaceRefit
from openreml_nn.inference.observation import observation_variance
from openreml_nn.inference.refit import Refit, family_of
from openreml_nn.inference.row_variance import effect_variances, row_variances
from openreml_nn.result import Component
from openreml_nn.result.parts import RESIDUAL_GROUP
from openreml_nn.support.errors import InputError

__all__ = ["R2", "effect_share", "r2", "variance_shares"]


class R2(NamedTuple):
    """Shares of the variance that a fit explains.

    Attributes:
        marginal: the share of the fixed effects.
        conditional: the share of fixed and random effects together.
    """

    marginal: float
    conditional: float


def r2(result: Result, observation: str | None = None) -> R2:
    r"""Marginal and conditional :math:`R^2` of a fit, random slopes included.

    Correlated residuals, such as a field beside independent errors, are residual variance. Of a
    response that is not Gaussian the shares are of the link scale, where an observation adds a
    variance of its own; an effect of each row counts with it. With :math:`v = \mathrm{var}(y \mid \mu)` at
    the mean :math:`\mu` of the null model, the fit of an intercept with the same random effects, it is
    ``"latent"``: :math:`\pi^2/3` (logit), 1 (probit) or :math:`\pi^2/6` (cloglog); ``"lognormal"``:
    :math:`\log(1 + v/\mu^2)`; ``"trigamma"``: :math:`\psi_1(\mu^2/v)`; ``"delta"``:
    :math:`v\,g'(\mu)^2`. Of a zero-inflated response the shares are those of the other responses, of
    which the linear predictor is.

    Args:
        result: a fit.
        observation: of a family: ``"latent"``, ``"lognormal"``, ``"trigamma"`` or ``"delta"``; by default
            the first for a binary or ordered response, the second with a log link, the last else.

    Raises:
        InputError: if the rows were streamed, or the response has no such variance.

    Reference:
        Nakagawa and Schielzeth, Methods in Ecology and Evolution 4 (2013) 133, eqs. 26 and 30;
        Johnson, ibid. 5 (2014) 944, eq. 10; Nakagawa, Johnson and Schielzeth, Journal of the Royal
        Society Interface 14 (2017) 20170213, table 1.

    >>> from openreml_nn import lmm
    >>> from openreml_nn.datasets import sleepstudy
    >>> found = r2(lmm("Reaction ~ Days + (Days | Subject)", sleepstudy()))
    >>> f"{found.marginal:.4f} {found.conditional:.4f}"
    '0.2787 0.7992'
    """
    from openreml_nn.metrics import conditional_r2, marginal_r2

    if family_of(result) is not None:
        return _r2_of_family(result, observation)
    _no_family(observation)
    refit = Refit(result)
    mean = refit.X @ result.fixed.estimate
    with torch.no_grad():
        variances = row_variances(refit.objective().terms())
    zero = mean.new_zeros(())
    is_residual = [_is_residual(result, component) for component in result.components]
    residual = sum((v for v, of in zip(variances, is_residual, strict=True) if of), zero)
    total = sum((v for v, of in zip(variances, is_residual, strict=True) if not of), zero)
    return R2(
        float(marginal_r2(mean, total, residual)), float(conditional_r2(mean, total, residual))
    )


def variance_shares(result: Result, observation: str | None = None) -> pd.DataFrame:
    r"""Share of each term in the variance of a row, :math:`v_t / \sum_s v_s`.

    :math:`v_t` is the mean over the rows of :math:`z_i^\top G_t z_i`: for a random intercept its
    variance, so that the share is the intraclass correlation; for an additive genetic effect the
    share is the heritability. Standard errors are by the delta method; that of a variance of zero
    is NaN, as are those of shares that the data cannot tell apart. Of a response that is not Gaussian
    the residual is the variance that an observation adds on the link scale, which counts as known.

    Args:
        result: a fit.
        observation: of a family, as in :func:`r2`.

    Returns:
        A data frame with the columns group, variance, share, std_error; the residual is last.

    Raises:
        InputError: if the rows were streamed, or the response has no such variance.

    Reference:
        Lynch and Walsh, Genetics and Analysis of Quantitative Traits (1998), appendix 1.

    >>> from openreml_nn import lmm
    >>> from openreml_nn.datasets import penicillin
    >>> result = lmm("diameter ~ 1 + (1 | plate) + (1 | sample)", penicillin())
    >>> variance_shares(result).round(3)
          group  variance  share  std_error
    0     plate     0.717  0.151      0.085
    1    sample     3.731  0.785      0.113
    2  Residual     0.302  0.064      0.033
    """
    if family_of(result) is not None:
        return _shares_of_family(result, observation)
    _no_family(observation)
    objective = Refit(result).objective()
    curvature = Curvature([objective])
    at, u = curvature.at, curvature.u

    def variances(x: Tensor) -> tuple[Tensor]:
        return (torch.stack(row_variances(objective.terms(at.natural(0, x)))),)

    with torch.no_grad():
        (value,) = variances(u)
    slope = jacobian(variances, u)[0].mT if len(u) else value.new_zeros(len(value), 0)
    groups = [c.group for c in result.components]
    # Shares have no standard error by this where a design is estimated too.
    known = torch.nan if objective.moves else 1
    spread = Spread(curvature.information, bool(curvature.indistinct))
    return _table(groups, value, slope * known, spread)


def effect_share(result: Result, at: int, effect: int) -> tuple[float, float]:
    r"""The variance of one effect of a level over that of a row, with its standard error.

    Args:
        result: a fit of a Gaussian response.
        at: which of its components.
        effect: which of the effects there.
    """
    objective = Refit(result).objective()
    curvature = Curvature([objective])
    where, u = curvature.at, curvature.u

    def variances(x: Tensor) -> tuple[Tensor]:
        terms = objective.terms(where.natural(0, x))
        own = effect_variances(terms[at])[effect]
        return (torch.stack([own, *row_variances(terms)]),)

    with torch.no_grad():
        (value,) = variances(u)
    own, total = value[0], value[1:].sum()
    if not len(u) or not own > 0:
        return float(own / total), nan
    slope = jacobian(variances, u)[0].mT
    by = (slope[:1] - own / total * slope[1:].sum(0)) / total
    error = Spread(curvature.information, bool(curvature.indistinct)).errors(by.mT)
    return float(own / total), nan if objective.moves else float(error)


def _table(groups: list[str], value: Tensor, slope: Tensor, spread: Spread) -> pd.DataFrame:
    """Shares of variances (t,) with standard errors, by the slopes (t, m) of the variances in
    coordinates."""
    total = value.sum()
    eye = torch.eye(len(value), dtype=value.dtype, device=value.device)
    by = (eye - value[:, None] / total) / total
    error = torch.where(value > 0, spread.errors((by @ slope).mT), torch.nan)
    columns = {"variance": value, "share": value / total, "std_error": error}
    table = {name: column.numpy(force=True) for name, column in columns.items()}
    return pd.DataFrame({"group": groups, **table})


def _is_residual(result: Result, component: Component) -> bool:
    """Whether a term is of the residual, as a field is beside which stand independent errors."""
    is_field = result.model is not None and component.name == "residual"
    return component.is_residual or is_field


def _no_family(observation: str | None) -> None:
    if observation is not None:
        raise InputError(
            f"`observation` is {observation!r} and the response Gaussian, whose residual has a "
            "variance: leave it out"
        )


def _r2_of_family(result: Result, observation: str | None) -> R2:
    from openreml_nn.metrics import conditional_r2, marginal_r2

    refit = LaplaceRefit(result)
    with torch.no_grad():
        terms = refit.loss.covariance.terms()
        mean = refit.offset + refit.X @ result.fixed.estimate
        variances = row_variances(terms)
    own = observation_variance(refit, observation, sum(variances, mean.new_zeros(())))
    of_rows = [term.design.shape[1] == len(mean) for term in terms]
    residual = own + sum(v for v, of in zip(variances, of_rows, strict=True) if of)
    total = sum((v for v, of in zip(variances, of_rows, strict=True) if not of), 0 * own)
    return R2(
        float(marginal_r2(mean, total, residual)), float(conditional_r2(mean, total, residual))
    )


def _shares_of_family(result: Result, observation: str | None) -> pd.DataFrame:
    refit = LaplaceRefit(result)
    fit = refit.fit()
    own = slice(fit.p, fit.p + fit.m)
    u, covariance = fit.x[own], refit.loss.covariance

    def variances(x: Tensor) -> tuple[Tensor]:
        with covariance.given(fit.at.natural(0, x)):
            return (torch.stack(row_variances(covariance.terms())),)

    with torch.no_grad():
        (value,) = variances(u)
    slope = jacobian(variances, u)[0].mT if len(u) else value.new_zeros(len(value), 0)
    slope = torch.cat([slope, slope.new_zeros(1, slope.shape[1])])
    J = slope.new_zeros(len(slope), len(fit.hessian))
    J[:, own] = slope
    beside = observation_variance(refit, observation, value.sum())
    groups = [*(c.group for c in result.components), RESIDUAL_GROUP]
    return _table(groups, torch.cat([value, beside[None]]), J, Spread(fit.hessian, True))
