"""Rows that have a level by each of several columns, such as an animal and its dam."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import numpy as np

from openreml_nn.support.errors import InputError
from openreml_nn.table.formula import RandomPart
from openreml_nn.table.grouping import Grouping
from openreml_nn.table.levels import Factor, number_key
from openreml_nn.table.matrix import model_matrix
from openreml_nn.table.rows import TableRows

__all__ = ["levels_of_all", "member_codes", "member_values"]


def levels_of_all(factors: Sequence[Factor]) -> list[str]:
    """The levels of any of some columns: in the order that all have, or else numbers by size, and
    anything else by spelling."""
    first = factors[0].levels
    if all(factor.levels == first for factor in factors):
        return list(first)
    key: Callable[[str], Any] = str
    if all(factor.key is number_key for factor in factors):
        key = number_key
    return sorted({level for factor in factors for level in factor.levels}, key=key)


def member_codes(factors: Sequence[Factor], levels: Sequence[str]) -> np.ndarray:
    """Level of each row by each column, (n, m), -1 for one that is not among them."""
    return np.stack([factor.among(levels) for factor in factors], 1)


def member_values(part: RandomPart, data: TableRows) -> tuple[np.ndarray, tuple[str, ...]]:
    """Values (n, m, k) of the effects by each column, and the names of the effects.

    Effects of all columns are multiplied by the weights; those of a column's own stand beside those
    of the others, where it has zeros, and have its name.
    """
    parts = [model_matrix(each, data) for each in part.parts]
    if not isinstance(part.effects, tuple):
        ((z, names),) = parts
        return z[:, None, :] * _weights(part.grouping, data)[:, :, None], names
    sizes = [z.shape[1] for z, _ in parts]
    values = np.zeros((len(data), len(parts), sum(sizes)))
    start = 0
    for j, (z, _) in enumerate(parts):
        values[:, j, start : start + sizes[j]] = z
        start += sizes[j]
    own = zip(part.factors, (names for _, names in parts), strict=True)
    return values, tuple(chain.from_iterable(_named(column, names) for column, names in own))


def _named(column: str, names: Sequence[str]) -> list[str]:
    return [column if name == "(Intercept)" else f"{column}:{name}" for name in names]


def _weights(grouping: Grouping, data: TableRows) -> np.ndarray:
    """What each level of a row counts, (n, m)."""
    if not grouping.weights:
        return np.ones((len(data), len(grouping.columns)))
    found = np.stack([data.numbers(name) for name in grouping.weights], 1)
    bad = np.argwhere(~np.isfinite(found))
    if len(bad):
        row, j = bad[0]
        raise InputError(
            f"{data.source}: the weight {grouping.weights[j]!r} is {found[row, j]:g} in row "
            f"{data.row(int(row))}: expected a finite number"
        )
    return found
