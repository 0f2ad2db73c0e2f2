"""The structure of the residuals of a table: groups of rows, and the position of each in its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from openreml_nn.support.errors import InputError
from openreml_nn.table.columns import kind_of, numbers, single
from openreml_nn.table.encoded import Positions, ResidualDesign, Stratum
from openreml_nn.table.lags import check_lags, whole_lags
from openreml_nn.table.levels import joined
from openreml_nn.table.rows import TableRows
from openreml_nn.table.structure import KERNELS, VARYING, ResidualFactor, ResidualPart, Structure

__all__ = ["residual_design", "residual_places"]

#: Structures whose lags are differences of whole times.
_LAGGED = ("ar1", "hetar1", "toep", "hettoep", "arma")
#: Those of them that have a variance for each position, and so only positions that occur.
_VARYING = ("hetar1", "hettoep")


def residual_design(part: ResidualPart, data: TableRows) -> ResidualDesign:
    """Cell of each row, learned from and applied to one table only: prediction needs none.

    Raises:
        InputError: if a group has a position twice, there is one position only, or the times of
            lags are no whole numbers.
    """
    n = len(data)
    if part.variance is not None:
        kind, name = part.variance
        if part.factors or part.strata:
            raise InputError(
                f"{data.source}: residual {part.text!r}: {kind}() beside another structure is not "
                f"supported: expected {kind}({name}) alone"
            )
        return ResidualDesign((), kind, _covariate(kind, name, data), text=part.text)
    if not part.factors:  # variances by stratum, rows independent
        codes, labels = _cells(part.strata, data)
        if len(labels) < 2:
            raise _one_level(part, data)
        cell = torch.from_numpy(np.arange(n) * len(labels) + codes)
        positions = Positions(Structure("diag"), ":".join(part.strata), labels)
        return ResidualDesign(
            (Stratum("", torch.arange(n), cell, n, (positions,)),), text=part.text
        )
    group = _cells(part.group, data)[0] if part.group else None
    if not part.strata:
        whole = _stratum(part, data, "", np.arange(n), group)
        return ResidualDesign((whole,), nugget=part.nugget, text=part.text)
    codes, labels = _cells(part.strata, data)
    strata = [
        _stratum(part, data, label, np.flatnonzero(codes == i), group)
        for i, label in enumerate(labels)
    ]
    return ResidualDesign(tuple(strata), nugget=part.nugget, text=part.text)


def residual_places(
    part: ResidualPart, learned: Mapping[str, Any], data: TableRows
) -> Tensor | None:
    """Where the rows of another table are among the residuals of the fit, as far as their variance
    depends on it; see :attr:`ResidualDesign.places`.

    Args:
        part: as parsed.
        learned: what :meth:`ResidualDesign.to_dict` made of the fit.
        data: the other table; where it has not a column, what depends on it is -1, not known.

    Returns:
        None where the covariate of a variance is not there.
    """
    n = len(data)
    if part.variance is not None:
        kind, name = part.variance
        what = f"{data.source}: {kind}({name}) of the residuals: column {name!r}"
        if name not in data.table:
            return None
        return torch.from_numpy(numbers(single(data.table, name, data.source), what, data.table))
    strata = learned["strata"]
    if not part.factors:
        return torch.from_numpy(_known(part.strata, strata[0][2][0][3], data))
    stratum = np.zeros(n, dtype=np.int64)
    if part.strata:
        stratum = _known(part.strata, [name for name, _, _ in strata], data)
    cell = np.full(n, -1, dtype=np.int64)
    for i, (_, _, sides) in enumerate(strata):
        own, stride = np.zeros(n, dtype=np.int64), 1
        for factor, (structure, _, _, labels, _) in reversed(
            list(zip(part.factors, sides, strict=True))
        ):
            if structure in VARYING:
                lagged = structure in _LAGGED
                own = stride * _known(factor.positions, labels, data, lagged)
            stride *= len(labels)
        cell = np.where(stratum == i, np.where(own < 0, -1, own), cell)
    if len(strata) == len(part.factors) == 1 and part.group and not part.nugget:
        return torch.from_numpy(cell)
    return torch.from_numpy(np.stack([stratum, cell], 1))


def _known(
    columns: Sequence[str], labels: Sequence[str], data: TableRows, are_times: bool = False
) -> np.ndarray:
    """Which of some labels each row has, -1 for none of them."""
    if not columns or any(name not in data.table for name in columns):
        return np.full(len(data), -1, dtype=np.int64)
    if are_times:
        what = f"{data.source}: column {columns[0]!r}"
        times = numbers(single(data.table, columns[0], data.source), what, data.table)
        rows = [f"{time:.15g}" for time in times]
    else:
        found = zip(*(data.labels(name).labels() for name in columns), strict=True)
        rows = [":".join(map(str, row)) for row in found]
    at = {label: i for i, label in enumerate(labels)}
    return np.array([at.get(row, -1) for row in rows], dtype=np.int64)


def _one_level(part: ResidualPart, data: TableRows) -> InputError:
    names = [name for factor in part.factors for name in factor.positions] or part.group
    return InputError(
        f"{data.source}: the residuals' {':'.join(names or part.strata)!r} has one level in each "
        "group: a structure needs two"
    )


def _cells(columns: Sequence[str], data: TableRows) -> tuple[np.ndarray, tuple[str, ...]]:
    """Which combination of levels each row has, and the labels of those that occur."""
    factors = [data.labels(name) for name in columns]
    cell = np.zeros(len(data), dtype=np.int64)
    for factor in factors:
        cell = cell * len(factor.levels) + factor.codes
    cells, codes = np.unique(cell, return_inverse=True)
    return codes, joined(cells, [factor.levels for factor in factors])


def _stratum(
    part: ResidualPart, data: TableRows, name: str, rows: np.ndarray, group: np.ndarray | None
) -> Stratum:
    """The cells of some rows, and the positions of each side of the product."""
    block = np.zeros(len(rows), dtype=np.int64)
    if group is not None:
        block = pd.factorize(group[rows])[0]
    cell, sides = block, []
    for factor in part.factors:
        at, positions = _positions(factor, data, rows, block)
        cell = cell * len(positions.labels) + at
        sides.append(positions)
    if all(len(side.labels) < 2 for side in sides):
        raise _one_level(part, data)
    twice = pd.Series(cell).duplicated().to_numpy()
    if twice.any() and not part.nugget:  # which tells rows at one place apart
        row, shown, rest = int(np.argmax(twice)), [], int(cell[np.argmax(twice)])
        for side in reversed(sides):
            rest, i = divmod(rest, len(side.labels))
            shown.append(side.labels[i])
        raise InputError(
            f"{data.source}: row {data.row(int(rows[row]))} has the position "
            f"{':'.join(reversed(shown))!r} of {':'.join(s.name for s in sides)!r} that its group "
            "has already: residuals within a group need a position each"
        )
    groups = None if group is None else int(block.max()) + 1
    index = torch.from_numpy(np.ascontiguousarray(rows))
    return Stratum(name, index, torch.from_numpy(cell), groups, tuple(sides))


def _positions(
    factor: ResidualFactor, data: TableRows, rows: np.ndarray, block: np.ndarray
) -> tuple[np.ndarray, Positions]:
    """Position of each of some rows, and the positions that there are."""
    structure, name = factor.structure, ":".join(factor.positions)
    if not factor.positions:
        at = pd.Series(block).groupby(block).cumcount().to_numpy()
        if structure.name in (*KERNELS, "car1"):
            raise InputError(f"{data.source}: {structure.name}() of residuals needs coordinates")
        size = int(at.max(initial=0)) + 1
        places = torch.arange(size)[:, None]
        return at, Positions(structure, name, tuple(str(i + 1) for i in range(size)), places)
    if structure.name in (*KERNELS, "car1"):
        values = np.stack([_times(structure, c, data)[rows] for c in factor.positions], 1)
        distinct, at = np.unique(values, axis=0, return_inverse=True)
        labels = tuple(":".join(f"{x:.15g}" for x in place) for place in distinct.tolist())
        return at.reshape(-1), Positions(structure, name, labels, torch.from_numpy(distinct))
    if structure.name not in _LAGGED:
        codes, labels = _cells(factor.positions, data)
        known, at = np.unique(codes[rows], return_inverse=True)
        return at, Positions(structure, name, tuple(labels[i] for i in known))
    if len(factor.positions) > 1:
        raise InputError(
            f"{data.source}: {structure.name}({name} | …): expected one column of times"
        )
    return _lagged(structure, name, data, rows)


def _lagged(
    structure: Structure, name: str, data: TableRows, rows: np.ndarray
) -> tuple[np.ndarray, Positions]:
    times = _times(structure, name, data)
    what = f"{data.source}: {structure.name}({name} | …): column {name!r}"
    lags = whole_lags(times[rows], what, lambda i: f"row {data.row(int(rows[i]))}")
    if structure.name in ("toep", "hettoep"):
        check_lags(lags, what)
    first, size = times[rows].min(), int(lags.max()) + 1
    later = np.argmax(lags > 0)
    unit = int((times[rows][later] - first) // lags[later]) if size > 1 else 1
    if structure.name not in _VARYING:
        labels = tuple(str(int(first) + unit * i) for i in range(size))
        return lags, Positions(structure, name, labels, torch.arange(size)[:, None])
    distinct, at = np.unique(lags, return_inverse=True)
    labels = tuple(str(int(first) + unit * i) for i in distinct.tolist())
    return at, Positions(structure, name, labels, torch.from_numpy(distinct)[:, None])


def _times(structure: Structure, name: str, data: TableRows) -> np.ndarray:
    """A column of times or coordinates."""
    column = single(data.table, name, data.source)
    what = f"{data.source}: {structure.name}({name} | …): column {name!r}"
    if kind_of(column, data.source) == "dates":
        raise InputError(
            f"{what} holds dates or durations: expected numbers, such as days since a start"
        )
    times = numbers(column, what, data.table)
    bad = np.flatnonzero(~np.isfinite(times))
    if len(bad):
        raise InputError(f"{what} is {times[bad[0]]:g} in row {data.row(int(bad[0]))}")
    return times + 0.0


def _covariate(kind: str, name: str, data: TableRows) -> Tensor:
    """Values on which the variance depends."""
    what = f"{data.source}: {kind}({name}) of the residuals: column {name!r}"
    values = numbers(single(data.table, name, data.source), what, data.table)
    good = np.isfinite(values) & ((values != 0) | (kind != "power"))
    if not good.all():
        row = int(np.argmin(good))
        wanted = "a number other than zero" if kind == "power" else "a finite number"
        raise InputError(f"{what} is {values[row]:g} in row {data.row(row)}: expected {wanted}")
    if (np.abs(values) == np.abs(values[0])).all():
        raise InputError(f"{what} has one value: a variance that depends on it needs two")
    return torch.from_numpy(values)
