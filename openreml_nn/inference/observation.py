"""The variance of an observation beside that of the linear predictor, for families."""

from __future__ import annotations

import copy
from math import pi

import torch
from torch import Tensor

from openreml_nn.estimation.marginal import fit_laplace
from openreml_nn.families import Family
from openreml_nn.inference.laplace_refit import LaplaceRefit
from openreml_nn.inference.row_variance import row_variances
from openreml_nn.support.checks import check_choice
from openreml_nn.support.errors import InputError

__all__ = ["OBSERVATION", "observation_variance"]

#: What the variance of an observation on the link scale may be.
OBSERVATION = ("latent", "lognormal", "trigamma", "delta")
#: Variances of the latent responses of which a binary or ordered one is the sign or the interval.
_LATENT = {"logit": pi**2 / 3, "probit": 1.0, "cloglog": pi**2 / 6}


def observation_variance(refit: LaplaceRefit, kind: str | None, random: Tensor) -> Tensor:
    r"""The variance that an observation adds on the link scale, a scalar.

    With :math:`v = \mathrm{var}(y \mid \mu)` and :math:`\mu` of the null model, the fit of an
    intercept with the same random effects, :math:`\mu = g^{-1}(\hat\beta_0 + \overline{o})`, for a log
    link :math:`\exp(\hat\beta_0 + \overline{o} + \tfrac12\sigma^2_r)`, o the offset:

    ==========  =====================================================
    latent      :math:`\pi^2/3` (logit), 1 (probit), :math:`\pi^2/6` (cloglog), of binary and
                ordered responses
    lognormal   :math:`\log(1 + v/\mu^2)`, with a log link
    trigamma    :math:`\psi_1(\mu^2/v)`, with a log link
    delta       :math:`v\,g'(\mu)^2`
    ==========  =====================================================

    Of a zero-inflated response it is that of the others, which are not zeros of their own; its null model
    has the zero part of the fit.

    Args:
        refit: the fit.
        kind: one of these; the first that the family has by default.
        random: the variance of the random effects of a row, on average; that of the null model
            counts where one is fitted.

    Raises:
        InputError: if ``kind`` is unknown, or the family has none such.
    """
    family = refit.loss.family.base
    is_latent = family.name in ("binomial", "ordinal")
    if type(family).variance is Family.variance or type(family).mean is Family.mean:
        raise InputError(
            f"`result` is of the family {type(family).__name__}, which has no mean() and variance(): "
            "expected one that has, as its variance is a part of the whole"
        )
    if kind is None:
        kind = "latent" if is_latent else "lognormal" if family.link == "log" else "delta"
    check_choice("observation", kind, OBSERVATION)
    known = (["latent"] if is_latent else []) + (
        ["lognormal", "trigamma"] if family.link == "log" else []
    )
    known += [] if family.name == "ordinal" else ["delta"]
    if kind not in known:
        raise InputError(
            f"`observation` is {kind!r} and the family {family.name!r} with the link "
            f"{family.link!r}: expected one of {known}"
        )
    if kind == "latent":
        return refit.X.new_tensor(_LATENT[family.link])
    if family.link == "identity":
        return family.variance(refit.X.new_zeros(1))[0].detach()
    eta = _null_predictor(refit, random)
    with torch.enable_grad():
        at = eta.detach().requires_grad_()
        mean = family.mean(at)
        (slope,) = torch.autograd.grad(mean.sum(), at)
    mean, variance = mean.detach()[0], family.variance(eta)[0].detach()
    if kind == "delta":
        return variance / slope[0] ** 2
    ratio = variance / mean**2
    return ratio.log1p() if kind == "lognormal" else torch.polygamma(1, 1 / ratio)


def _null_predictor(refit: LaplaceRefit, random: Tensor) -> Tensor:
    """The linear predictor of a typical row under an intercept alone, (1,)."""
    loss, X = copy.deepcopy(refit.loss), refit.X
    if X.shape[1] == 1 and bool((X[0] == X).all()):
        eta, variance = X[0] * refit.result.fixed.estimate, random
    else:
        one = X.new_ones(len(X), 1)
        null = fit_laplace(loss, refit.y, one, refit.offset, weights=refit.weights)[0]
        eta = null.fixed.estimate
        with torch.no_grad():
            variance = torch.stack(row_variances(loss.covariance.terms())).sum()
    eta = eta + refit.offset.mean()
    return eta + variance / 2 if loss.family.link == "log" else eta
