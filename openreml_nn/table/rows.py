"""The complete rows of a table, and what is read of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from openreml_nn.support.errors import InputError
from openreml_nn.support.warning import warn
from openreml_nn.table.columns import (
    are_dates,
    are_fractions,
    are_numbers,
    is_plain_value,
    is_value,
    kind_of,
    numbers,
    row_name,
    single,
)
from openreml_nn.table.expressions import Basis, as_numbers, evaluate
from openreml_nn.table.functions import FUNCTIONS
from openreml_nn.table.learned import Learned
from openreml_nn.table.levels import LOGICAL, Factor, coded
from openreml_nn.table.syntax import Name, Node

__all__ = ["TableRows", "complete", "offset_of", "weights_of"]

#: Numbers beyond these have squares that float64 cannot hold.
_LARGEST, _SMALLEST = 1e150, 1e-150


@dataclass(frozen=True)
class Slips:
    """Labels of a column of text, each with its row.

    Attributes:
        value: the first that is written as no number and no date.
        plain: the first that is written as no number without commas and no date.
    """

    value: tuple[str, str] | None = None
    plain: tuple[str, str] | None = None

    def then(self, later: Slips) -> Slips:
        """With those of later rows."""
        return Slips(self.value or later.value, self.plain or later.plain)


class TableRows:
    """The complete rows of a table; columns are converted once.

    Args:
        table: its rows.
        source: what messages call the table.
        learned: what was learned so far; kinds of columns and states of calls are added to it.
        categorical: numeric columns that are factors.
        formula: what messages show of the formula.
    """

    def __init__(
        self,
        table: pd.DataFrame,
        source: str,
        learned: Learned,
        categorical: Sequence[str],
        formula: str,
    ) -> None:
        self.table, self.source = table, source
        self._learned, self._categorical, self._formula = learned, categorical, formula
        self._columns: dict[str, np.ndarray | Factor] = {}
        self._labels: dict[str, Factor] = {}
        self._variables: dict[str, np.ndarray | Basis | Factor] = {}

    def __len__(self) -> int:
        return len(self.table)

    @property
    def functions(self) -> Mapping[str, Callable[..., Any]]:
        """What a formula may call."""
        return FUNCTIONS

    def fault(self, what: str) -> InputError:
        """An error of an expression."""
        return InputError(f"formula {self._formula!r}: {what}")

    def row(self, position: int) -> str:
        """The row as a user counts them."""
        return row_name(self.table, position)

    def kind(self, name: str) -> str:
        """What the column holds: as learned, else as it is now."""
        if name not in self._learned.kinds:
            kind = kind_of(single(self.table, name, self.source), self.source)
            if name in self._categorical and kind != "bool":
                kind = "factor"
            self._learned.kinds[name] = kind
        return self._learned.kinds[name]

    def column(self, name: str) -> np.ndarray | Factor:
        """The column: float64, booleans, or a factor."""
        if name not in self._columns:
            self._columns[name] = self._read(name)
        return self._columns[name]

    def _read(self, name: str) -> np.ndarray | Factor:
        kind = self.kind(name)
        if kind == "number":
            return self.numbers(name)
        if kind == "dates":
            raise self._of_dates(name)
        if kind == "bool":
            codes = coded(self.table[name], ["False", "True"], self.source).codes
            if (codes < 0).any():
                at = int(np.argmax(codes < 0))
                raise InputError(
                    f"{self.source}: column {name!r} is {self.table[name].iloc[at]!r} in row "
                    f"{self.row(at)}: expected true or false"
                )
            return codes == 1
        return self.labels(name)

    def labels(self, name: str) -> Factor:
        """The column as a factor, whatever it holds."""
        if name not in self._labels:
            self._labels[name] = coded(single(self.table, name, self.source), None, self.source)
        return self._labels[name]

    def numbers(self, name: str) -> np.ndarray:
        """The column as float64."""
        column = single(self.table, name, self.source)
        return numbers(column, f"{self.source}: column {name!r}", self.table)

    def state(self, call: str) -> dict[str, Any]:
        """What a call learned."""
        return self._learned.transforms.setdefault(call, {})

    def variable(self, node: Node) -> np.ndarray | Basis | Factor:
        """A variable of a term: numbers (n,), columns (n, k) or a factor of the known levels."""
        key = str(node)
        if key not in self._variables:
            with np.errstate(all="ignore"):
                value = evaluate(node, self)
            if isinstance(value, np.ndarray) and value.dtype == bool:
                value = Factor(value.astype(np.int64), list(LOGICAL), str)
            if not isinstance(value, np.ndarray | Basis | Factor):
                raise self.fault(f"{key!r} is no variable: expected one value a row")
            if not isinstance(value, Factor):
                self._check(value, key)
            self._variables[key] = value
        value = self._variables[key]
        levels = self._learned.factors.get(key)
        if isinstance(value, Factor) and levels is not None and value.levels is not levels:
            value = Factor(value.among(levels), levels, value.key, value.contrasts)
            self._variables[key] = value
        return value

    def is_told(self, name: str) -> bool:
        """Whether a column is a factor as it is stored, or as it was said."""
        return name in self._categorical or isinstance(self.table[name].dtype, pd.CategoricalDtype)

    def slips(self, factor: Factor) -> Slips:
        """The first labels of a column that are written as no number and no date."""
        return Slips(self._first(factor, is_value), self._first(factor, is_plain_value))

    def _first(self, factor: Factor, suits: Callable[[str], bool]) -> tuple[str, str] | None:
        """The first label that does not suit, and its row."""
        odd = np.array([not suits(label) for label in factor.levels] + [False])[factor.codes]
        if not odd.any():
            return None
        at = int(np.argmax(odd))
        return factor.levels[factor.codes[at]], self.row(at)

    def check_labels(self, name: str, levels: list[str], slips: Slips) -> None:
        """Refuse a column of text that is one of numbers, but for slips, or of dates.

        Args:
            name: of the column.
            levels: of all rows.
            slips: the first of all rows.
        """
        if are_dates(levels):
            raise self._of_dates(name, next(filter(is_value, levels)))
        if are_fractions(levels):
            plain = [repr(label) for label in levels if is_plain_value(label)][:1]
            first = [] if slips.plain is None else ["{!r} in row {}".format(*slips.plain)]
            raise InputError(
                f"{self.source}: column {name!r} is text of numbers, such as "
                f"{' beside '.join(first + plain)}: expected numbers, a file that is read with "
                "`decimal=','` where they have decimal commas, or its name in `categorical`"
            )
        if slips.value is not None and are_numbers(levels):
            shown, row = slips.value
            raise InputError(
                f"{self.source}: column {name!r} is not numeric: found {shown!r} in row "
                f"{row} among numbers; say what a missing value looks like when the file is "
                f"read, `missing=[{shown!r}]`, or name the column in `categorical`"
            )

    def _of_dates(self, name: str, shown: str | None = None) -> InputError:
        such = "" if shown is None else f", such as {shown!r}"
        return InputError(
            f"{self.source}: column {name!r} holds dates, times or durations{such}: expected "
            "numbers, such as days since a start, or its name in `categorical`"
        )

    def _check(self, value: np.ndarray | Basis, key: str) -> None:
        """Refuse numbers that are not finite, or whose squares are not."""
        values = value.values if isinstance(value, Basis) else value
        size = np.abs(values)
        if size.size and not size.max() <= _LARGEST:
            bad = np.argwhere(~(size <= _LARGEST))[0]
            shown = values[tuple(bad)]
            wanted = (
                "a number of at most 1e150, which float64 can square: use other units"
                if np.isfinite(shown)
                else "a finite number"
            )
            raise InputError(
                f"{self.source}: {key!r} is {shown:g} in row {self.row(int(bad[0]))}: "
                f"expected {wanted}"
            )

    def response(self, node: Node) -> np.ndarray:
        """The left side of a formula, as numbers (n,)."""
        key = str(node)
        if isinstance(node, Name):
            column = single(self.table, node.name, self.source)
            what = f"{self.source}: the response {node.name!r}"
            value: Any = numbers(column, what, self.table)
        else:
            with np.errstate(all="ignore"):
                value = evaluate(node, self)
        if isinstance(value, np.ndarray) and value.dtype == bool:
            value = value.astype(np.float64)
        if isinstance(value, Basis) and value.values.shape[1] == 1:
            value = value.values[:, 0]
        if not isinstance(value, np.ndarray):
            raise self.fault(f"the response {key!r} must be one column of numbers")
        self._check(value, key)
        if len(value) and 0 < np.abs(value).max() < _SMALLEST:
            raise InputError(
                f"{self.source}: {key!r} is at most {np.abs(value).max():g}, which float64 cannot "
                "square: use other units"
            )
        return value


def complete(
    table: pd.DataFrame, columns: Sequence[str], categorical: Sequence[str], source: str
) -> tuple[pd.DataFrame, np.ndarray, int]:
    """Rows without missing values, where they stood, and how many are left out."""
    if not isinstance(table, pd.DataFrame):
        raise TypeError(f"{source} is a {type(table).__name__}: expected a data frame")
    for name in (*columns, *(c for c in categorical if c not in columns)):
        single(table, name, source)
    present = table[list(columns)].notna().all(axis=1).to_numpy()
    rows = np.flatnonzero(present)
    dropped = len(table) - len(rows)
    if not len(rows) and len(table):
        emptiest = table[list(columns)].isna().sum().idxmax()
        raise InputError(f"{source}: every row has a missing value, most in column {emptiest!r}")
    if dropped:
        first = int(present.argmin())
        column = next(name for name in columns if pd.isna(single(table, name, source).iloc[first]))
        warn(
            f"{source}: {dropped} of {len(table)} rows left out, which miss a value: the first "
            f"{column!r} in row {row_name(table, first)}"
        )
    return (table.iloc[rows] if dropped else table), rows, dropped


def offset_of(data: TableRows, expressions: Sequence[Node]) -> Tensor | None:
    """The sum of the offsets of a formula, (n,); None where it has none."""
    if not expressions:
        return None
    with np.errstate(all="ignore"):
        total = np.zeros(len(data)) + sum(as_numbers(o, data) for o in expressions)
    bad = np.flatnonzero(~np.isfinite(total))
    if len(bad):
        raise data.fault(f"the offset is {total[bad[0]]:g} in row {data.row(int(bad[0]))}")
    return torch.from_numpy(total)


def weights_of(data: TableRows, name: str | None) -> Tensor | None:
    """The column of weights, (n,); None where there is no such column."""
    if name is None or name not in data.table.columns:
        return None
    what = f"{data.source}: the weight {name!r}"
    found = numbers(single(data.table, name, data.source), what, data.table)
    bad = np.flatnonzero(~(np.isfinite(found) & (found > 0)))
    if len(bad):
        raise InputError(
            f"{what} is {found[bad[0]]:g} in row {data.row(int(bad[0]))}: expected a positive "
            "number"
        )
    return torch.from_numpy(found)
