"""The numbers that a plot of residuals shows."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch

from openreml_nn.families import Family
from openreml_nn.inference import quantile_residuals
from openreml_nn.result.result import Result
from openreml_nn.support.checks import check_instance

__all__ = ["QUANTILES", "has_quantiles", "normal_quantiles", "residual_table", "residual_values"]

#: Rows, or quantiles of them, beyond this many are left out, evenly.
QUANTILES = 2_000


def residual_table(result: Result) -> pd.DataFrame:
    """Fitted values and residuals, with the columns ``row`` (from 1, among the rows of the fit),
    ``fitted`` and ``residual``; of more than 2,000 rows 2,000, evenly.

    The residuals are those of :func:`openreml_nn.report.residuals`.

    Raises:
        TypeError: if ``result`` is no result.
    """
    check_instance("result", result, Result)
    n = len(result.fitted)
    at = np.linspace(0, n - 1, min(n, QUANTILES)).round().astype(int)
    fitted = result.fitted.numpy(force=True)[at]
    return pd.DataFrame({"row": at + 1, "fitted": fitted, "residual": residual_values(result)[at]})


def residual_values(result: Result) -> np.ndarray:
    """Conditional residuals (n,), or quantile residuals where a family has them."""
    values = quantile_residuals(result) if has_quantiles(result) else result.residuals
    return values.numpy(force=True)


def normal_quantiles(ranks: np.ndarray, n: int) -> np.ndarray:
    """Standard normal quantiles of values by their ranks from 0 among n, at Blom's plotting positions.

    Reference:
        Blom, Statistical Estimates and Transformed Beta-Variables (1958).
    """
    at = torch.as_tensor((ranks + 1 - 0.375) / (n + 0.25))
    return torch.special.ndtri(at).numpy()


def has_quantiles(result: Result) -> bool:
    """Whether quantile residuals are to be had: of a family with a distribution function, whose rows
    are there."""
    family = None if result.model is None else result.model.family
    if result.source is None or not isinstance(family, Family):
        return False
    return type(family).cumulative is not Family.cumulative
