"""Likelihood-ratio tests between nested models."""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

import pandas as pd
import torch
from scipy import stats

from openreml_nn.estimation import Result
from openreml_nn.inference.refit import Refit, source_of
from openreml_nn.support.checks import check_flag
from openreml_nn.support.errors import InputError

__all__ = ["LikelihoodRatio", "anova", "likelihood_ratio_test"]


@dataclass(frozen=True)
class LikelihoodRatio:
    r"""A likelihood-ratio test.

    Attributes:
        statistic: twice the difference of the log-likelihoods.
        df: parameters by which the models differ.
        p: probability of a larger statistic under the smaller model. Where variances are
            tested, it is under the mixture below.
        p_naive: the same under :math:`\chi^2` with ``df``, too large for variances; as lme4's
            anova prints it, and of fits by REML (``refit=False``) lmerTest's ranova.
        mixture: weights of :math:`\chi^2` distributions by their degrees of freedom.
    """

    statistic: float
    df: int
    p: float
    p_naive: float
    mixture: dict[int, float]


def likelihood_ratio_test(small: Result, large: Result) -> LikelihoodRatio:
    r"""Test of a model against a larger one that contains it.

    A variance that is zero under the smaller model lies on the boundary, so that the statistic has
    not a :math:`\chi^2` distribution but a mixture: with one such variance and c other
    parameters, covariances among them, :math:`\tfrac12\chi^2_c + \tfrac12\chi^2_{c+1}`. For
    several variances the weights are binomial, which is exact where their estimates are independent.

    Args:
        small, large: fits of the same response by the same method.

    Raises:
        ValueError: if the models are not of the same data, weights and method, the larger one has no
            more parameters, or they were fitted by REML with different fixed effects.

    Reference:
        Self and Liang, Journal of the American Statistical Association 82 (1987) 605; Stram and
        Lee, Biometrics 50 (1994) 1171.

    >>> from openreml_nn import lmm
    >>> from openreml_nn.datasets import sleepstudy
    >>> one, two = (lmm(f"Reaction ~ Days + ({r} | Subject)", sleepstudy()) for r in ("1", "Days"))
    >>> test = likelihood_ratio_test(one, two)
    >>> f"{test.statistic:.2f}", test.df, test.mixture
    ('42.84', 2, {1: 0.5, 2: 0.5})
    """
    for name, fit in (("small", small), ("large", large)):
        source_of(fit, name)
    _check_same_data(small, large)
    if small.method != large.method:
        raise InputError(
            f"the fits are by {small.method!r} and {large.method!r}: fit both by one method"
        )
    same_x = set(small.fixed.names) == set(large.fixed.names)
    if small.method == "reml" and not same_x:
        raise InputError(
            "restricted likelihoods of different fixed effects do not compare: fit both with "
            "method='ml'"
        )
    if not set(small.fixed.names) <= set(large.fixed.names):
        raise InputError("the models are not nested: the smaller one has other fixed effects")
    df = _size(large) - _size(small)
    if df < 1:
        raise InputError(
            f"the models have {_size(small)} and {_size(large)} parameters: the second must have "
            "more"
        )
    statistic = max(0.0, 2 * (large.log_likelihood - small.log_likelihood))
    boundary = min(_variances(large) - _variances(small), df)
    boundary = max(boundary, 0)
    mixture = {df - boundary + j: comb(boundary, j) / 2**boundary for j in range(boundary + 1)}
    p = sum(w * _tail(statistic, k) for k, w in mixture.items())
    return LikelihoodRatio(statistic, df, p, float(stats.chi2.sf(statistic, df)), mixture)


def anova(*results: Result, refit: bool = True) -> pd.DataFrame:
    """Likelihood-ratio tests of models, each against the one with fewer parameters before it.

    Args:
        *results: fits of the same data.
        refit: whether fits by REML are first made again by maximum likelihood, as lme4's anova
            does and as they have to be when fixed effects are compared. Without it the test is of
            the restricted likelihoods, as lmerTest's ranova has it.

    Returns:
        npar, aic, bic, log_likelihood, deviance, and, beside the smaller model, statistic, df, p
        and p_naive; see :class:`LikelihoodRatio`.

    Raises:
        ValueError: as :func:`likelihood_ratio_test`.
        TypeError: if an argument is no fit.
    """
    check_flag("refit", refit)
    if len(results) < 2:
        raise InputError(f"`results` are {len(results)}: expected two fits or more, anova(a, b)")
    for i, result in enumerate(results):
        source_of(result, f"results[{i}]")
        _check_same_data(results[0], result)
    fits = [Refit(r).fit("ml") if refit and r.method == "reml" else r for r in results]
    fits.sort(key=_size)
    rows: list[dict[str, float]] = []
    for i, fit in enumerate(fits):
        row: dict[str, float] = {"npar": _size(fit), "aic": fit.aic, "bic": fit.bic}
        row |= {"log_likelihood": fit.log_likelihood, "deviance": fit.deviance}
        if i:
            test = likelihood_ratio_test(fits[i - 1], fit)
            row |= {"statistic": test.statistic, "df": test.df, "p": test.p}
            row["p_naive"] = test.p_naive
        rows.append(row)
    return pd.DataFrame(rows)


def _size(result: Result) -> int:
    return len(result.fixed.names) + result.num_params


def _variances(result: Result) -> int:
    """Variances of random effects."""
    return sum(len(c.effects) for c in result.components if c.group != "Residual")


def _tail(statistic: float, df: int) -> float:
    return float(stats.chi2.sf(statistic, df)) if df else float(statistic <= 0)


def _check_same_data(small: Result, large: Result) -> None:
    y, z = source_of(small).y, source_of(large).y
    if y.shape != z.shape or not torch.equal(y, z.to(y)):
        raise InputError(
            f"the fits are of different data, {small.rows} and {large.rows} rows: fit both to "
            "the same rows (missing values may have removed some)"
        )
    weights = [getattr(fit.encoder, "weights", None) for fit in (small, large)]
    if weights[0] != weights[1]:
        raise InputError(
            f"the fits have weights {weights[0]!r} and {weights[1]!r}: fit both with the same"
        )
