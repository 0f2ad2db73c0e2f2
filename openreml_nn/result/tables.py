"""A result as data frames."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import nan

import numpy as np
import pandas as pd
from torch import Tensor

from openreml_nn.result.result import Component, Result
from openreml_nn.support.checks import check_instance

__all__ = ["blup_table", "fixed_table", "table_of_blups", "variance_table"]


def fixed_table(result: Result) -> pd.DataFrame:
    """The fixed effects (BLUEs) of a fit.

    Returns:
        A data frame with the columns name, estimate, std_error and statistic (t, or z with a family).

    Raises:
        TypeError: if ``result`` is no result.
    """
    check_instance("result", result, Result)
    fixed = result.fixed
    return pd.DataFrame(
        {
            "name": list(fixed.names),
            "estimate": fixed.estimate.numpy(force=True),
            "std_error": fixed.std_error.numpy(force=True),
            "statistic": fixed.statistic.numpy(force=True),
        }
    )


def variance_table(result: Result) -> pd.DataFrame:
    """The variances and covariances of each term of a fit.

    Returns:
        A data frame with a row for each variance, then for each covariance of a term, and the columns
        group, effect1, effect2 (empty for a variance), covariance, std_error, and std_dev (of a
        variance) or correlation (of a covariance).

    Raises:
        TypeError: if ``result`` is no result.
    """
    check_instance("result", result, Result)
    rows: list[tuple[str, str, str, float, float, float, float]] = []
    for c in result.components:
        variance = c.covariance.diagonal() if c.covariance.dim() == 2 else c.covariance
        error = c.std_error.diagonal() if c.covariance.dim() == 2 else c.std_error
        values = zip(c.effects, variance.tolist(), error.tolist(), c.std_dev.tolist(), strict=True)
        rows += [(c.group, effect, "", v, e, s, nan) for effect, v, e, s in values]
        rows += _covariances(c)
    columns = ["group", "effect1", "effect2", "covariance", "std_error", "std_dev", "correlation"]
    return pd.DataFrame(rows, columns=columns)


def _covariances(c: Component) -> list[tuple[str, str, str, float, float, float, float]]:
    if c.covariance.dim() != 2:
        return []
    matrix, error, correlation = (x.tolist() for x in (c.covariance, c.std_error, c.correlation))
    return [
        (c.group, c.effects[j], c.effects[i], matrix[i][j], error[i][j], nan, correlation[i][j])
        for i in range(len(c.effects))
        for j in range(i)
    ]


def blup_table(result: Result) -> pd.DataFrame:
    """The predicted random effects (BLUPs) of a fit; with a family their modes.

    Returns:
        A data frame with the columns group, level, effect, blup, and std_error, the root of the
        prediction-error variance.

    Raises:
        TypeError: if ``result`` is no result.
    """
    check_instance("result", result, Result)
    named = {c.name: c for c in result.components}
    rows = []
    for effects in result.random:
        c, k = named[effects.name], effects.values.shape[1]
        names = c.effects if len(c.effects) == k else tuple(map(str, range(k)))
        rows.append((c.group, c.levels, names, effects.values, effects.variances))
    return table_of_blups(rows)


_Blups = tuple[str, Sequence[object], Sequence[str], Tensor, Tensor]


def table_of_blups(effects: Iterable[_Blups]) -> pd.DataFrame:
    """The table of :func:`blup_table` from what it is made of.

    Args:
        effects: of each random effect its group, the names of its q levels and of its k effects,
            BLUPs (q, k) and their prediction-error variances (q, k, k).
    """
    parts = [pd.DataFrame(columns=["group", "level", "effect", "blup", "std_error"])]
    for group, levels, names, values, variances in effects:
        q, k = values.shape
        spread = variances.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
        columns = {
            "group": group,
            "level": np.repeat(np.asarray(levels, dtype=object), k),
            "effect": np.tile(np.asarray(names, dtype=object), q),
            # Adding zero takes the sign off a zero.
            "blup": values.flatten().numpy(force=True) + 0.0,
            "std_error": spread.flatten().numpy(force=True),
        }
        parts.append(pd.DataFrame(columns))
    return pd.concat(parts[1:], ignore_index=True) if parts[1:] else parts[0]
