"""Columns of coordinates: levels at places, and the columns of splines."""

from __future__ import annotations

import numpy as np
import pandas as pd

from openreml_nn.support.errors import InputError
from openreml_nn.table.bases import penalised_spline
from openreml_nn.table.columns import numbers, single
from openreml_nn.table.grouping import Grouping
from openreml_nn.table.levels import Factor, coded
from openreml_nn.table.rows import TableRows
from openreml_nn.table.syntax import Name

#: A spline of more coefficients than these is refused before it is made.
_MOST_COEFFICIENTS = 2000

__all__ = ["numeric_levels", "spline_columns"]


def numeric_levels(name: str, data: TableRows) -> Factor:
    """A column of coordinates as a factor, its levels in the spelling of float64."""
    column = single(data.table, name, data.source)
    values = numbers(column, f"{data.source}: column {name!r}", data.table)
    _check_finite(name, values, data)
    return coded(pd.Series(values + 0.0, name=name), None, data.source)


def _check_finite(name: str, values: np.ndarray, data: TableRows) -> None:
    """Refuse coordinates that are infinite."""
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise InputError(
            f"{data.source}: the coordinate {name!r} is {values[bad[0]]:g} in row "
            f"{data.row(int(bad[0]))}: expected a finite number"
        )


def spline_columns(grouping: Grouping, data: TableRows) -> tuple[np.ndarray, tuple[str, ...]]:
    """The columns of a spline without its straight line, or of a product of two columns."""
    assert grouping.relation is not None
    segments = int(grouping.relation.options["segments"])
    size = (segments + 1) ** sum(grouping.bent)
    if size > _MOST_COEFFICIENTS:
        raise data.fault(
            f"{grouping.key} of {segments} segments has {size} coefficients: expected at most "
            f"{_MOST_COEFFICIENTS}, by fewer segments"
        )
    found = np.ones((len(data), 1))
    for name, bent in zip(grouping.columns, grouping.bent, strict=True):
        column = single(data.table, name, data.source)
        x = numbers(column, f"{data.source}: column {name!r}", data.table)
        _check_finite(name, x, data)
        state = data.state(f"spline({Name(name)})")
        if not state:
            if not len(np.unique(x)) > 2:
                raise InputError(
                    f"{data.source}: column {name!r} has {len(np.unique(x))} values: a spline "
                    "needs three"
                )
            state.update(low=float(x.min()), high=float(x.max()))
        low, high = state["low"], state["high"]
        if bent:
            part = penalised_spline(x, low, high, segments)
        else:
            part = ((x - (low + high) / 2) / ((high - low) / 2))[:, None]
        size = found.shape[1] * part.shape[1]  # rows may be none, which say no size
        found = (found[:, :, None] * part[:, None, :]).reshape(len(data), size)
    return found, tuple(f"{grouping.key}{j}" for j in range(1, found.shape[1] + 1))
