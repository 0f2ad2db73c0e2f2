"""Whether responses of a family scatter as it has them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from openreml_nn.families import Family
from openreml_nn.inference.laplace_refit import LaplaceRefit
from openreml_nn.inference.likelihood_ratio import parameters_of
from openreml_nn.result import Result
from openreml_nn.support.checks import check_count
from openreml_nn.support.errors import InputError

__all__ = ["Dispersion", "ZeroCount", "dispersion", "quantile_residuals", "zero_count"]


class Dispersion(NamedTuple):
    r"""How much responses scatter about their fitted values beside what their family has.

    Attributes:
        statistic: Pearson's :math:`\chi^2`.
        df: rows, each counting by its prior weight, less estimated parameters.
        ratio: the statistic over its degrees of freedom, near 1 where the family fits; above it is
            overdispersion.
        p: probability of a larger statistic.
    """

    statistic: float
    df: float
    ratio: float
    p: float


class ZeroCount(NamedTuple):
    """Zeros of the responses.

    Attributes:
        observed: how many there are, each counting by its prior weight.
        expected: how many the fit expects, in the same count.
        ratio: the first over the second; above 1 there are more than the family has.
    """

    observed: float
    expected: float
    ratio: float


def dispersion(result: Result) -> Dispersion:
    r"""Pearson's :math:`\chi^2 = \sum_i (y_i - \hat\mu_i)^2 / V(\hat\mu_i)` of the conditional fit over
    its degrees of freedom, rows less coefficients, covariance parameters and the family's own. A row of
    prior weight 2 counts as two.

    Binary responses have a ratio near 1 whatever they are, and say nothing. The p value is
    approximate, as modes count as known.

    Raises:
        InputError: if the fit has no family, or one without mean and variance.
        TypeError: if it is no result.

    Reference:
        McCullagh and Nelder, Generalized Linear Models (1989), section 4.5; Bolker et al., Trends in
        Ecology & Evolution 24 (2009) 127.

    Of a model that lacks the product of two columns:

    >>> from openreml_nn import glmm
    >>> from openreml_nn.datasets import visits
    >>> result = glmm("visits ~ age + (1 | doctor)", visits(1000, 50), family="poisson")
    >>> f"{dispersion(result).ratio:.2f}"
    '1.23'
    """
    from scipy import stats

    refit = LaplaceRefit(result)
    family, eta = _at_mode(refit)
    of_rows = family.of_rows(family.inputs_of(refit.y))
    if type(of_rows).variance is Family.variance or type(of_rows).mean is Family.mean:
        raise InputError(
            f"`result` is of the family {type(family).__name__}, which has no mean() and variance(): "
            "expected one that has"
        )
    y = family.observed(refit.y).to(eta)
    trials = refit.y.sum(1) if _has_trials(refit) else torch.ones_like(eta)
    count = _count_of(refit, eta)
    with torch.no_grad():
        terms = (y - of_rows.mean(eta)) ** 2 * trials * count / of_rows.variance(eta)
    statistic, df = float(terms.sum()), float(count.sum()) - parameters_of(result)
    return Dispersion(statistic, df, statistic / df, float(stats.chi2.sf(statistic, df)))


def zero_count(result: Result) -> ZeroCount:
    r"""Zeros that there are, and :math:`\sum_i P(Y_i = 0 \mid \hat\eta_i)`, that the fit expects.
    A row of prior weight 2 counts as two.

    Raises:
        InputError: if the fit has no family, or one that has no zeros.
        TypeError: if it is no result.

    Reference:
        Lambert, Technometrics 34 (1992) 1.
    """
    refit = LaplaceRefit(result)
    family, eta = _at_mode(refit)
    none = refit.y.new_zeros(len(eta))
    if _has_trials(refit):
        none = torch.stack([none, refit.y.sum(1)], 1)
    else:
        none = family.with_inputs(none, family.inputs_of(refit.y))
    below, at = _cumulative(family, none, eta)
    if family.name == "ordinal" or bool((at <= below).all()):
        raise InputError(
            f"`result` is of the family {family.name!r}, in which no response is exactly 0: expected "
            "counts, or amounts with zeros"
        )
    count = _count_of(refit, eta)
    observed = float(count[family.observed(refit.y) == 0].sum())
    expected = float(((at - below) * count).sum())
    return ZeroCount(observed, expected, observed / expected)


def quantile_residuals(result: Result, seed: int = 0) -> Tensor:
    r"""Randomised quantile residuals :math:`\Phi^{-1}(u_i)`, (n,), u uniform between
    :math:`P(Y_i < y_i)` and :math:`P(Y_i \le y_i)` at the modes: standard normal where the model holds,
    whatever the family; of a continuous response they are not random.

    Args:
        result: a fit with a family.
        seed: of the random numbers.

    Raises:
        InputError: if the fit has no family, or one without a distribution function.
        TypeError: if an argument is of another kind.

    Reference:
        Dunn and Smyth, Journal of Computational and Graphical Statistics 5 (1996) 236.
    """
    seed = check_count("seed", seed)
    refit = LaplaceRefit(result)
    family, eta = _at_mode(refit)
    low, high = (part.double() for part in _cumulative(family, refit.y, eta))
    u = torch.from_numpy(np.random.default_rng(seed).random(len(eta))).to(low)
    at = low + (high - low) * u
    ends = torch.finfo(at.dtype)
    return torch.special.ndtri(at.clamp(ends.tiny, 1 - ends.eps / 2))


def _at_mode(refit: LaplaceRefit) -> tuple[Family, Tensor]:
    """The family, and the linear predictor of each row at the modes."""
    known = refit.offset + refit.X @ refit.result.fixed.estimate
    X = refit.X if refit.loss.method == "reml" else None
    if X is not None:
        known = refit.offset  # the coefficients are found again with the modes
    found = refit.loss.evaluate(refit.y, known, X, weights=refit.weights)
    return refit.loss.family, found.predictor


def _count_of(refit: LaplaceRefit, eta: Tensor) -> Tensor:
    """How often each row counts (n,)."""
    return torch.ones_like(eta) if refit.weights is None else refit.weights.to(eta)


def _has_trials(refit: LaplaceRefit) -> bool:
    """Whether responses are successes and failures."""
    return refit.y.dim() == 2 and refit.loss.family.inputs_of(refit.y) is None


def _cumulative(family: Family, y: Tensor, eta: Tensor) -> tuple[Tensor, Tensor]:
    if type(family).cumulative is Family.cumulative:
        raise InputError(
            f"`result` is of the family {type(family).__name__}, which has no cumulative(): expected "
            "one that has a distribution function"
        )
    with torch.no_grad():
        return family.cumulative(y, eta)
