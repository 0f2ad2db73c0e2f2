"""Tests of fixed effects in small samples."""

from __future__ import annotations

from collections.abc import Sequence
from math import nan

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from openreml_nn.estimation import Result
from openreml_nn.inference.contrasts import Asymptotic, FTest, Inference
from openreml_nn.inference.kenward_roger import KenwardRoger
from openreml_nn.inference.refit import check_fit, check_level, family_of
from openreml_nn.inference.satterthwaite import Satterthwaite
from openreml_nn.support.checks import check_choice, check_names, check_tensor
from openreml_nn.support.errors import InputError

__all__ = ["FTest", "coefficients", "estimates", "inference_of", "wald_test"]

METHODS = {
    "satterthwaite": Satterthwaite.of,
    "kenward-roger": KenwardRoger.of,
    "asymptotic": lambda result: Asymptotic(result.fixed.covariance),
}


def inference_of(result: Result, ddf: str | None) -> Inference:
    """The chosen way of testing; Satterthwaite's by default, the limits for a family."""
    family = family_of(result)
    if ddf is None:
        ddf = "satterthwaite" if family is None else "asymptotic"
    check_choice("ddf", ddf, METHODS)
    if family is not None and ddf != "asymptotic":
        raise InputError(
            f"`ddf` is {ddf!r} and the response of the family {family!r}: its tests are asymptotic, "
            "expected ddf='asymptotic'"
        )
    if ddf == "kenward-roger" and result.method != "reml":
        raise InputError(
            f"`ddf` is 'kenward-roger' and the fit by {result.method!r}: Kenward and Roger's "
            "correction is for fits with method='reml'"
        )
    return METHODS[ddf](result)


def estimates(
    result: Result, L: Tensor, names: Sequence[str], how: Inference, level: float
) -> pd.DataFrame:
    """Estimates of contrasts L (k, p) of the kept columns, with tests and intervals.

    A row of NaN, which is of no estimable contrast, has only NaN.
    """
    from scipy import stats

    L = L.to(how.covariance)
    value = (L @ result.fixed.estimate).numpy(force=True)
    error = (L @ how.covariance @ L.mT).diagonal().sqrt().numpy(force=True)
    df = np.array([nan if bool(row.isnan().any()) else how.df(row) for row in L], dtype=float)
    half = stats.t.ppf((1 + level) / 2, df) * error
    with np.errstate(invalid="ignore", divide="ignore"):
        statistic = value / error
    return pd.DataFrame(
        {
            "name": list(names),
            "estimate": value,
            "std_error": error,
            "df": df,
            "statistic": statistic,
            "p": 2 * stats.t.sf(abs(statistic), df),
            "low": value - half,
            "high": value + half,
        }
    )


def coefficients(result: Result, ddf: str | None = None, level: float = 0.95) -> pd.DataFrame:
    """Fixed effects with t tests and confidence intervals; z tests where the response is not Gaussian.

    Args:
        result: a fit.
        ddf: degrees of freedom: ``"satterthwaite"``, ``"kenward-roger"`` or ``"asymptotic"``, which
            are infinite; the first by default, and the last where the response is not Gaussian.
        level: of the intervals.

    Returns:
        A data frame with the columns name, estimate, std_error, df, statistic, p, low, high.

    Raises:
        InputError: if an option is unknown or the correction does not fit the model.
        TypeError: if an argument is of another kind.

    >>> from openreml_nn import lmm
    >>> from openreml_nn.datasets import sleepstudy
    >>> found = coefficients(lmm("Reaction ~ Days + (Days | Subject)", sleepstudy()))
    >>> found[["name", "df"]].round(2)
              name    df
    0  (Intercept)  17.0
    1         Days  17.0
    """
    check_fit(result)
    level = check_level(level)
    L = torch.eye(len(result.fixed.names), dtype=torch.float64)
    return estimates(result, L, result.fixed.names, inference_of(result, ddf), level)


def wald_test(result: Result, contrasts: Tensor | Sequence[str], ddf: str | None = None) -> FTest:
    r"""F test of the hypothesis :math:`L\beta = 0`.

    Args:
        result: a fit.
        contrasts: L (q, p) of full row rank, or names of coefficients that are zero together.
        ddf: as in :func:`coefficients`.

    Raises:
        InputError: if a name is unknown or L has another shape or rank.
        TypeError: if an argument is of another kind.

    >>> from openreml_nn import lmm
    >>> from openreml_nn.datasets import oats
    >>> result = lmm("yield ~ nitro + Variety + (1 | Block/Variety)", oats())
    >>> test = wald_test(result, ["VarietyMarvellous", "VarietyVictory"])
    >>> f"F({test.num_df}, {test.den_df:.1f}) = {test.statistic:.3f}, p = {test.p:.3f}"
    'F(2, 10.0) = 1.485, p = 0.272'
    """
    check_fit(result)
    names = list(result.fixed.names)
    if isinstance(contrasts, Tensor):
        check_tensor("contrasts", contrasts, ("q", len(names)))
        L = contrasts.to(result.fixed.covariance)
    else:
        wanted = check_names("contrasts", contrasts)
        for name in wanted or [""]:
            check_choice("contrasts", name, names)
        L = torch.eye(len(names), dtype=torch.float64)[[names.index(c) for c in wanted]]
        L = L.to(result.fixed.covariance)
    if not len(L) or int(torch.linalg.matrix_rank(L)) < len(L):
        raise InputError(
            f"`contrasts` has {len(L)} rows, of rank {int(torch.linalg.matrix_rank(L))}: expected "
            f"(q, {len(names)}) of full row rank"
        )
    return inference_of(result, ddf).f_test(L, result.fixed.estimate)
