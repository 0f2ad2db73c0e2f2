"""The structure of the residuals of a table: groups of rows, and the position of each in its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from openreml_nn.support.errors import InputError
from openreml_nn.table.columns import kind_of, numbers, single
from openreml_nn.table.encoded import Positions, ResidualDesign, Stratum
from openreml_nn.table.lags import LONGEST, check_lags, whole_lags
from openreml_nn.table.levels import joined
from openreml_nn.table.rows import TableRows
from openreml_nn.table.structure import (
    FITTED,
    KERNELS,
    VARYING,
    ResidualFactor,
    ResidualPart,
    Structure,
)

__all__ = ["residual_design", "residual_positions"]

#: Structures whose lags are differences of whole times.
_LAGGED = ("ar1", "hetar1", "toep", "hettoep", "arma")


def residual_design(part: ResidualPart, data: TableRows) -> ResidualDesign:
    """Cell of each row, learned from and applied to one table only: prediction needs none.

    Raises:
        InputError: if a group has a position twice, there is one position only, the times of lags
            are no whole numbers, or each row is a stratum.
    """
    found = _correlated(part, data)
    if part.variance is None:
        return found
    kind, name = part.variance
    if not part.of_fitted:
        return replace(found, variance=kind, covariate=_covariate(kind, name, data))
    if FITTED in data.table:
        raise InputError(
            f"{data.source} has a column {FITTED!r}, which in residual {part.text!r} stands for the "
            "fitted values: rename yours"
        )
    return replace(found, variance=kind)


def _correlated(part: ResidualPart, data: TableRows) -> ResidualDesign:
    """The cells of the rows, without variances that depend on a covariate."""
    n, text = len(data), part.text
    if not part.factors and not part.strata:
        return ResidualDesign((), torch.arange(n), text)
    if not part.factors:  # variances by stratum, rows independent
        codes, labels = _cells(part.strata, data)
        if len(labels) == n:  # the likelihood would rise for ever
            raise InputError(
                f"{data.source}: residual {text!r}: {':'.join(part.strata)!r} has {n} levels in {n} "
                "rows: no variance can be estimated of one row each"
            )
        found = torch.from_numpy(np.arange(n) * len(labels) + codes)
        positions = Positions(Structure("diag"), ":".join(part.strata), labels)
        return ResidualDesign((Stratum("", (positions,)),), found, text)
    if not part.strata:
        group = _cells(part.group, data)[0] if part.group else np.zeros(n, dtype=np.int64)
        cells, stratum = _stratum(part, data, "", np.arange(n), group)
        return ResidualDesign((stratum,), torch.from_numpy(cells), text, nugget=part.nugget)
    codes, labels = _cells(part.strata, data)
    every, total, strata = np.zeros(n, dtype=np.int64), 0, []
    for i, label in enumerate(labels):
        rows = np.flatnonzero(codes == i)
        cells, stratum = _stratum(part, data, label, rows, np.zeros(n, dtype=np.int64))
        every[rows] = total + cells
        total += stratum.size
        strata.append(stratum)
    return ResidualDesign(tuple(strata), torch.from_numpy(every), text, nugget=part.nugget)


def residual_positions(
    part: ResidualPart, data: TableRows, learned: Mapping[str, Any]
) -> ResidualDesign | None:
    """What the residual variances of another table's rows depend on, by the shape of the fit's.

    Cells are those of the fit, -1 for a position or stratum that it had not. None where the
    variance is that of every position, or the table has not the columns.
    """
    found = ResidualDesign.from_dict(learned, 1)
    cells, covariate = _known_cells(part, data, found), None
    if part.variance is not None and not part.of_fitted:
        kind, name = part.variance
        if name not in data.table:
            return None
        covariate = _covariate(kind, name, data, fitting=False)
    if cells is None and covariate is None:
        return None
    if cells is None:
        cells = torch.full((len(data),), -1)
    return replace(found, cells=cells, covariate=covariate)


def _known_cells(part: ResidualPart, data: TableRows, found: ResidualDesign) -> Tensor | None:
    """Cells of the fit; None where the variance is that of every position."""
    if not found.strata:
        return None
    if len(found.strata) > 1:
        starts = np.cumsum([0, *(stratum.size for stratum in found.strata)]).tolist()
        at = {stratum.name: start for stratum, start in zip(found.strata, starts, strict=False)}
        names = part.strata
    else:
        (stratum,) = found.strata
        side = stratum.positions[0]
        if len(stratum.positions) > 1 or side.structure.name not in VARYING:
            return None
        at = {label: i for i, label in enumerate(side.labels)}
        names = part.factors[0].positions if part.factors else part.strata
    if not names or any(name not in data.table for name in names):
        return None
    factors = [data.labels(name) for name in names]
    labels = [":".join(map(str, row)) for row in zip(*(f.labels() for f in factors), strict=True)]
    return torch.tensor([at.get(label, -1) for label in labels], dtype=torch.long)


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
    part: ResidualPart, data: TableRows, name: str, rows: np.ndarray, group: np.ndarray
) -> tuple[np.ndarray, Stratum]:
    """The cells of some rows, and the positions of each side of the product."""
    block = pd.factorize(group[rows])[0].astype(np.int64)
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
        label, columns = ":".join(reversed(shown)), ":".join(s.name for s in sides)
        where = f"{data.source}: row {data.row(int(rows[row]))}"
        (structure, *others) = [factor.structure.name for factor in part.factors]
        if part.strata and not others and structure not in (*_LAGGED, *KERNELS, "car1"):
            raise InputError(
                f"{where} is the second with {label!r} of {columns!r} in its stratum of "
                f"{':'.join(part.strata)!r}: in {part.text!r} {structure}() is over the levels of "
                f"{columns!r}, each once in a stratum, and not over the rows of a level, which "
                f"{structure}({columns}) alone is"
            )
        raise InputError(
            f"{where} has the position {label!r} of {columns!r}, which its group already has: residuals "
            "within a group need a position each"
        )
    return cell, Stratum(name, tuple(sides))


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
    longest = 1_000_000 if structure.name == "ar1" else LONGEST  # which no matrix holds
    lags = whole_lags(times[rows], what, lambda i: f"row {data.row(int(rows[i]))}", longest)
    if structure.name in ("toep", "hettoep"):
        check_lags(lags, what)
    first, size = times[rows].min(), int(lags.max()) + 1
    later = np.argmax(lags > 0)
    unit = int((times[rows][later] - first) // lags[later]) if size > 1 else 1
    if structure.name not in VARYING:  # which has a variance for each, and so those that occur
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


def _covariate(kind: str, name: str, data: TableRows, fitting: bool = True) -> Tensor:
    """Values on which the variance depends."""
    what = f"{data.source}: {kind}({name}) of the residuals: column {name!r}"
    values = numbers(single(data.table, name, data.source), what, data.table)
    good = np.isfinite(values) & ((values != 0) | (kind == "exp"))
    if not good.all():
        row = int(np.argmin(good))
        wanted = "a finite number" if kind == "exp" else "a number other than zero"
        raise InputError(f"{what} is {values[row]:g} in row {data.row(row)}: expected {wanted}")
    if fitting and (np.abs(values) == np.abs(values[0])).all():
        raise InputError(f"{what} has one value: a variance that depends on it needs two")
    return torch.from_numpy(values)
