"""Tables of tests: of the terms of a fit, and of fits against each other."""

from __future__ import annotations

import pandas as pd

from openreml_nn.estimation import Result
from openreml_nn.inference.degrees import inference_of
from openreml_nn.inference.hypotheses import TYPES, term_contrasts
from openreml_nn.inference.laplace_refit import LaplaceRefit
from openreml_nn.inference.likelihood_ratio import (
    check_same_data,
    likelihood_ratio_test,
    parameters_of,
)
from openreml_nn.inference.refit import Refit, family_of, source_of
from openreml_nn.support.checks import check_count, check_flag
from openreml_nn.support.errors import InputError

__all__ = ["anova"]


def anova(
    *results: Result,
    type: int | None = None,
    ddf: str | None = None,
    refit: bool | None = None,
) -> pd.DataFrame:
    r"""F tests of the terms of one fit, or likelihood-ratio tests of several fits.

    With one fit each term of the fixed effects is tested: with ``type=1`` after the terms before it,
    with ``type=2`` after all terms but those that contain it, and with ``type=3``, the default, by its
    effects averaged with equal weights over the levels of the factors with which other terms cross it,
    as lmerTest's ``anova`` has it. One term contains another if it is that one crossed with factors.
    Tests and degrees of freedom are those of :func:`wald_test`; Satterthwaite's for several contrasts
    depend a little on how factors are coded.

    With several fits each is tested against the one with fewer parameters before it.

    Args:
        *results: one fit by :func:`lmm`, or fits of the same data.
        type: 1, 2 or 3, with one fit.
        ddf: degrees of freedom with one fit, as in :func:`coefficients`; ``"satterthwaite"`` by default,
            and ``"asymptotic"`` where the response is not Gaussian.
        refit: whether several fits by REML are first made again by maximum likelihood, as lme4's anova
            does and as is necessary when fixed effects are compared; True by default. With False the
            restricted likelihoods are compared, as in lmerTest's ranova.

    Returns:
        A data frame. With one fit its columns are name, num_df, den_df, statistic (F) and p; with
        several they are npar, aic, bic, log_likelihood, deviance, and, for the comparison with the
        smaller model, statistic, df, p and p_naive; see :class:`LikelihoodRatio`.

    Raises:
        InputError: if there is no fit or no formula, an option is unknown or not of the tests that
            are made, means that type 3 compares are not estimable, or as in
            :func:`likelihood_ratio_test`.
        TypeError: if an argument is of another kind.

    Reference:
        Searle, Linear Models for Unbalanced Data (1987), chapters 4 and 12; Kuznetsova, Brockhoff
        and Christensen, Journal of Statistical Software 82(13) (2017), section 2.

    >>> from openreml_nn import lmm
    >>> from openreml_nn.datasets import oats
    >>> result = lmm("yield ~ nitro * Variety + (1 | Block/Variety)", oats())
    >>> anova(result, type=3).round(3)
                name  num_df  den_df  statistic      p
    0          nitro       1  51.000    115.771  0.000
    1        Variety       2  21.575      1.942  0.168
    2  nitro:Variety       2  51.000      0.499  0.610
    """
    for i, result in enumerate(results):
        source_of(result, f"results[{i}]")
    if not results:
        raise InputError("`results` is empty: expected a fit, or several fits to compare")
    if len(results) == 1:
        if refit is not None:
            raise InputError("`refit` is for several fits: one fit is tested term by term")
        kind = 3 if type is None else check_count("type", type, 1)
        return _of_terms(results[0], kind, ddf)
    for name, value in (("type", type), ("ddf", ddf)):
        if value is not None:
            raise InputError(f"`{name}` is for one fit: several are compared by their likelihoods")
    if refit is not None:
        check_flag("refit", refit)
    return _of_fits(results, refit is not False)


def _of_terms(result: Result, kind: int, ddf: str | None) -> pd.DataFrame:
    if kind not in TYPES:
        raise InputError(f"`type` is {kind}: expected 1, 2 or 3")
    how = inference_of(result, ddf)
    rows = []
    for name, L in term_contrasts(result, kind).items():
        test = how.f_test(L.to(how.covariance), result.fixed.estimate)
        rows.append((name, test.num_df, test.den_df, test.statistic, test.p))
    return pd.DataFrame(rows, columns=["name", "num_df", "den_df", "statistic", "p"])


def _of_fits(results: tuple[Result, ...], refit: bool) -> pd.DataFrame:
    for i, result in enumerate(results):
        check_same_data(("results[0]", f"results[{i}]"), (results[0], result))
    fits = [_by_ml(r) if refit and r.method == "reml" else r for r in results]
    fits.sort(key=parameters_of)
    rows: list[dict[str, float]] = []
    for i, fit in enumerate(fits):
        row: dict[str, float] = {"npar": parameters_of(fit), "aic": fit.aic, "bic": fit.bic}
        row |= {"log_likelihood": fit.log_likelihood, "deviance": fit.deviance}
        if i:
            test = likelihood_ratio_test(fits[i - 1], fit)
            row |= {"statistic": test.statistic, "df": test.df, "p": test.p}
            row["p_naive"] = test.p_naive
        rows.append(row)
    return pd.DataFrame(rows)


def _by_ml(result: Result) -> Result:
    """The fit again, by maximum likelihood."""
    if family_of(result) is None:
        return Refit(result).fit("ml")
    again = LaplaceRefit(result, "ml")
    return again.result_of(again.fit())
