"""The structure of the residuals of a table: groups of rows, and the position of each in its own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from openreml_nn.support.errors import InputError
from openreml_nn.table.columns import kind_of, numbers, single
from openreml_nn.table.encoded import ResidualDesign
from openreml_nn.table.formula import ResidualPart
from openreml_nn.table.levels import joined
from openreml_nn.table.rows import TableRows

__all__ = ["residual_design", "residual_positions"]

#: Whole times may span so many units; a correlation matrix has a row for each.
_LONGEST = 5000


def residual_design(part: ResidualPart, data: TableRows) -> ResidualDesign:
    """Cell of each row, learned from and applied to one table only: prediction needs none.

    Raises:
        InputError: if a group has a position twice, there is one position only, or the times of
            ``ar1`` are no whole numbers.
    """
    factors = [data.labels(name) for name in part.group]
    group = np.zeros(len(data), dtype=np.int64)
    for factor in factors:
        group = group * len(factor.levels) + factor.codes
    if part.kind == "diag":
        cells, position = np.unique(group, return_inverse=True)
        positions = list(joined(cells, [factor.levels for factor in factors]))
        group = np.arange(len(data))
    else:
        group = pd.factorize(group)[0]
        if part.position is None:
            position = pd.Series(group).groupby(group).cumcount().to_numpy()
            positions = [str(i + 1) for i in range(int(position.max()) + 1)]
        elif part.kind == "ar1":
            position, positions = _times(part.position, data)
        else:
            times = data.labels(part.position)
            position, positions = times.codes, times.levels
    if len(positions) < 2:
        raise InputError(
            f"{data.source}: the residuals' {part.position or ':'.join(part.group)!r} has one "
            "level in each group: a structure needs two"
        )
    cell = group * len(positions) + position
    twice = pd.Series(cell).duplicated().to_numpy()
    if twice.any():
        row = int(np.argmax(twice))
        raise InputError(
            f"{data.source}: row {data.row(row)} has the position {positions[position[row]]!r} of "
            f"{part.position!r} that its group has already: residuals within a group need a "
            "position each"
        )
    codes = torch.from_numpy(cell)
    return ResidualDesign(part.kind, codes, int(group.max()) + 1, tuple(positions))


def residual_positions(
    part: ResidualPart, data: TableRows, positions: Sequence[str]
) -> ResidualDesign | None:
    """Position of each row of another table among those of the fit, -1 for one that it had not.

    None where the variance is that of every position, or the table has not the columns.
    """
    names = part.group if part.kind == "diag" else [part.position]
    if part.kind not in ("us", "diag") or any(n is None or n not in data.table for n in names):
        return None
    factors = [data.labels(name) for name in names if name is not None]
    labels = [":".join(row) for row in zip(*(f.labels() for f in factors), strict=True)]
    at = {label: i for i, label in enumerate(positions)}
    codes = torch.tensor([at.get(label, -1) for label in labels], dtype=torch.long)
    return ResidualDesign(part.kind, codes, 1, tuple(positions))


def _times(name: str, data: TableRows) -> tuple[np.ndarray, list[str]]:
    """Whole times counted from the first, in the largest unit that all lags are multiples of.

    Lags are differences of times, not of ranks. In a smaller unit the sign of a correlation whose
    lags are all even could not be told.
    """
    column = single(data.table, name, data.source)
    what = f"{data.source}: ar1({name} | …): column {name!r}"
    if kind_of(column, data.source) == "dates":
        raise InputError(
            f"{what} holds dates or durations: expected whole numbers, such as days since a start"
        )
    times = numbers(column, what, data.table)
    bad = np.flatnonzero(times != np.round(times))
    if len(bad):
        raise InputError(
            f"{what} is {times[bad[0]]:g} in row {data.row(int(bad[0]))}: expected whole numbers, "
            "the differences of which are the lags"
        )
    whole = times.astype(np.int64)
    first, last = int(whole.min()), int(whole.max())
    unit = int(np.gcd.reduce(np.diff(np.unique(whole)), initial=0)) or 1
    if (last - first) // unit >= _LONGEST:
        raise InputError(
            f"{what} spans {(last - first) // unit} lags: expected at most {_LONGEST}, of longer "
            "units"
        )
    return (whole - first) // unit, [str(t) for t in range(first, last + 1, unit)]
