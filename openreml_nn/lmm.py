"""A linear mixed model from a formula and a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from openreml_nn.data import Encoder
from openreml_nn.estimation import Result, fit_reml

__all__ = ["lmm"]


def lmm(
    formula: str,
    table: pd.DataFrame,
    *,
    categorical: Sequence[str] = (),
    residual: str | None = None,
    weights: str | None = None,
    **options: Any,
) -> Result:
    r"""Fit a linear mixed model to a table by AI-REML.

    Args:
        formula: an lme4-style formula.
        table: a data frame; rows with missing values are left out with a warning.
        categorical: numeric columns to be taken as factors.
        residual: correlation of the rows of a group, ``"ar1(time | subject)"``,
            ``"cs(subject)"`` or ``"us(time | subject)"``, or a variance for each
            stratum, ``"diag(sex)"``; independent rows of one variance by default.
        weights: column of weights: the residual variance of a row is divided by its weight.
        **options: passed to :func:`fit_reml`, such as ``method="ml"``.

    Raises:
        InputError: if the formula or the table is at fault.

    >>> from openreml_nn.datasets import sleepstudy
    >>> result = lmm("Reaction ~ Days + (Days | Subject)", sleepstudy())
    >>> f"{result.log_likelihood:.4f}"
    '-871.8141'
    """
    encoder = Encoder(formula, categorical, residual=residual, weights=weights)
    encoded = encoder.fit(table)
    assert encoded.y is not None
    result = fit_reml(
        encoded.covariance(),
        encoded.y,
        encoded.X,
        names=encoded.names,
        labels=encoded.labels,
        **options,
    )
    assert result.source is not None
    means = {
        str(name): float(column.mean())
        for name, column in table.iloc[encoded.rows].items()
        if pd.api.types.is_numeric_dtype(column)
    }
    cells = encoder.cells(table.iloc[encoded.rows])
    source = replace(result.source, encoder=encoder, means=means, cells=cells)
    return replace(result, source=source)
