"""The columns of a data frame as numbers, whatever they are stored as."""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from decimal import Decimal
from numbers import Real
from typing import Any

import numpy as np
import pandas as pd

from openreml_nn.support.errors import InputError
from openreml_nn.table.syntax import Number, parse, walk

__all__ = [
    "are_dates",
    "are_fractions",
    "are_numbers",
    "as_of_table",
    "check_constants",
    "is_plain_value",
    "is_value",
    "kind_of",
    "no_column",
    "numbers",
    "row_name",
    "single",
]

#: What people write where a number is missing.
MARKS = frozenset(
    ("", ".", "-", "--", "?", "*", "na", "n/a", "#n/a", "n.a.", "k.a.", "missing")
) | frozenset(("null", "none", "nan", "<na>"))
#: What may stand between fields, and so in the name of the one column of a file that was read by
#: another mark.
_SEPARATORS = ";\t|, "
#: A date, or a date and a time, by ISO 8601.
_DATE = re.compile(
    r"\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])"
    r"([ T]\d\d:\d\d(:\d\d(\.\d+)?)?(Z|[+-]\d\d(:?\d\d)?)?)?"
)
_DAY, _MONTH = r"(0?[1-9]|[12]\d|3[01])", r"(0?[1-9]|1[0-2])"
#: A date as it is written by day, month and year, in either order.
_WRITTEN_DATE = re.compile(
    rf"({_DAY}(?P<mark>[./-]){_MONTH}|{_MONTH}(?P<other>[./-]){_DAY})"
    rf"((?P=mark)|(?P=other))(\d{{4}}|\d{{2}})|\d{{4}}(?P<last>[./]){_MONTH}(?P=last){_DAY}"
)
#: A number with commas: a decimal one, or those of thousands.
_COMMA = re.compile(
    r"[+-]?(\d+|\d{1,3}(\.\d{3})+),\d+([eE][+-]?\d+)?|[+-]?\d{1,3}(,\d{3})+(\.\d+)?"
)
#: Text columns of at least so many distinct numbers are taken for numbers with a slip in them.
_MANY = 10


def check_constants(formula: str, columns: Sequence[str], source: str) -> None:
    """Raise if a table has a column with the name of a constant that a formula has.

    Raises:
        InputError: if it has, since the column may be meant.
    """
    for node in walk(parse(formula, formula)):
        if isinstance(node, Number) and node.name in columns:
            raise InputError(
                f"{source} has a column {node.name!r}, which formula {formula!r} has as the number "
                f"{node.value:.6g}: expected `{node.name}` in backticks for the column, or another "
                "name for it"
            )


def no_column(source: str, name: str, columns: Sequence[Any]) -> InputError:
    """An error that says which columns there are, and by which separator there would be more."""
    near = ", ".join(map(str, columns[:20]))
    what = f"{source} has no column {name!r}: its columns are {near}"
    mark = next((m for m in _SEPARATORS if len(columns) == 1 and m in str(columns[0])), None)
    other = next((c for c in columns if not isinstance(c, str)), None)
    if mark is not None:
        what = (
            f"{source} has no column {name!r} but one column {columns[0]!r}: read it with "
            f"`separator` {mark!r} (data.separator)"
        )
    elif other is not None:
        what += f"; the name {other!r} is a {type(other).__name__}: expected text"
    return InputError(what)


def single(table: pd.DataFrame, name: str, source: str) -> pd.Series:
    """The column of this name.

    Raises:
        InputError: if there is none, or there are several.
    """
    if name not in table.columns:
        raise no_column(source, name, table.columns)
    found = table[name]
    if isinstance(found, pd.DataFrame):
        raise InputError(
            f"{source} has {found.shape[1]} columns {name!r}: expected one of each name"
        )
    return found


def row_name(table: pd.DataFrame, position: int) -> str:
    """The row as a user counts them, from 1, or its name where rows have names."""
    label = table.index[position]
    return str(label + 1) if isinstance(label, int | np.integer) else repr(label)


@contextmanager
def as_of_table(
    table: pd.DataFrame, rows: np.ndarray, names: Mapping[str, str | None], source: str
) -> Iterator[None]:
    """Have errors about tensors name the rows and columns of the table that they were made of.

    Args:
        table: its rows are counted from 1, or named by its index.
        rows: (n,) position in the table of each row of the tensors.
        names: column, or expression, that each tensor is of.
        source: the table in messages.

    Raises:
        InputError: as within, in these words.
    """

    def named(found: re.Match[str]) -> str:
        return f"row {row_name(table, rows[int(found[1])])}"

    try:
        yield
    except InputError as error:
        text = re.sub(r"\brow (\d+)", named, str(error))
        for tensor, column in names.items():
            text = text if column is None else text.replace(f"`{tensor}`", repr(column))
        told = f"{source}: "
        raise InputError(text if text.startswith(told) else told + text) from None


def kind_of(column: pd.Series, source: str) -> str:
    """What a column holds: ``number``, ``bool``, ``factor`` (labels) or ``dates``.

    Text in which every value is a date by ISO 8601 holds dates, as text is all that a CSV file has:
    the same table is read alike from CSV and from Parquet.

    Raises:
        InputError: if it holds lists, records or complex numbers.
    """
    dtype = column.dtype
    if isinstance(dtype, pd.CategoricalDtype):
        return "factor"
    if pd.api.types.is_bool_dtype(dtype):
        return "bool"
    if pd.api.types.is_complex_dtype(dtype):
        raise InputError(f"{source}: column {column.name!r} holds complex numbers")
    if pd.api.types.is_numeric_dtype(dtype):
        return "number"
    if pd.api.types.is_datetime64_any_dtype(dtype) or pd.api.types.is_timedelta64_dtype(dtype):
        return "dates"
    if isinstance(dtype, pd.ArrowDtype):
        return _kind_of_arrow(column, dtype, source)
    if not pd.api.types.is_object_dtype(dtype):
        return _kind_of_text(column)
    inferred = pd.api.types.infer_dtype(column, skipna=True)
    if inferred == "string":
        return _kind_of_text(column)
    if inferred in ("bytes", "mixed-integer", "empty"):
        # Only a pass over the values tells lists from a column of text and missing values.
        return "factor" if inferred != "empty" else "number"
    if inferred == "boolean":
        return "bool"
    values = [v for v in column.array if not _is_missing(v)]
    nested = next(
        (v for v in values if isinstance(v, list | tuple | dict | set | np.ndarray)), None
    )
    if nested is not None:
        raise InputError(
            f"{source}: column {column.name!r} holds a {type(nested).__name__} in each row: "
            "expected numbers or labels"
        )
    if all(isinstance(v, Real | Decimal | np.bool_) for v in values):
        return "number"
    dates = datetime.date | datetime.timedelta | np.datetime64 | np.timedelta64
    return "dates" if all(isinstance(v, dates) for v in values) else "factor"


def _kind_of_text(column: pd.Series) -> str:
    present = column.dropna()
    if not len(present) or not _DATE.fullmatch(str(present.iloc[0])):
        return "factor"  # most columns of text are told by their first value
    return "dates" if all(_DATE.fullmatch(str(v)) for v in present.unique()) else "factor"


def _kind_of_arrow(column: pd.Series, dtype: pd.ArrowDtype, source: str) -> str:
    import pyarrow as pa

    kind = dtype.pyarrow_dtype
    if pa.types.is_nested(kind):
        raise InputError(
            f"{source}: column {column.name!r} is of type {kind}: expected numbers or labels"
        )
    if pa.types.is_decimal(kind):
        return "number"
    if pa.types.is_temporal(kind):
        return "dates"
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    return _kind_of_text(column) if is_text else "factor"


def numbers(column: pd.Series, what: str, table: pd.DataFrame) -> np.ndarray:
    """The column as float64, NaN where a value is missing; text that spells numbers is read.

    Args:
        column: of numbers, or of text.
        what: the column in messages, such as "file 't.csv': column 'x'".
        table: whose rows they are, for messages.

    Raises:
        InputError: if a value is no number; it is named with its row.
    """
    if pd.api.types.is_complex_dtype(column.dtype):
        raise InputError(f"{what} holds complex numbers")
    if pd.api.types.is_numeric_dtype(column.dtype):
        return np.array(column.to_numpy(dtype=np.float64, na_value=np.nan))
    if isinstance(column.dtype, pd.CategoricalDtype):
        levels = pd.Series(column.cat.categories, name=column.name)
        at = column.cat.codes.to_numpy()
        known = np.array([_number(v) for v in levels] or [None], dtype=object)
        values = known[at]
        values[at < 0] = np.nan
    else:
        values = np.array([_number(v) for v in column.array], dtype=object)
    bad = np.flatnonzero([v is None for v in values])
    if len(bad):
        shown = column.iloc[bad[0]]
        raise InputError(
            f"{what} is not numeric: found {_shown(shown)} in row {row_name(table, bad[0])}, "
            "expected numbers"
        )
    return values.astype(np.float64)


def _shown(value: Any) -> str:
    """A value as a message shows it: text in quotes, all else as it is written."""
    return repr(value) if isinstance(value, str) else str(value)


def _number(value: Any) -> float | None:
    """The number that a value is or spells, NaN for a missing one, None for no number."""
    if _is_missing(value):
        return float("nan")
    if isinstance(value, Real | Decimal | np.bool_):
        return float(value)
    if isinstance(value, str):
        try:
            return float(value) if "_" not in value else None
        except ValueError:
            return None
    return None


def _is_missing(value: Any) -> bool:
    found = pd.isna(value)
    return bool(found) if isinstance(found, bool | np.bool_) else False


def are_dates(levels: Sequence[str]) -> bool:
    """Whether the labels are dates but for slips, by ISO 8601 or written as ``31.01.2026``."""
    return _but_for_slips(levels, _is_date)


def are_fractions(levels: Sequence[str]) -> bool:
    """Whether the labels are numbers, and more of them have decimals or commas than are a factor's."""
    count = sum(bool(_COMMA.fullmatch(label.strip())) or "." in label for label in levels)
    return count >= _MANY and all(map(_is_number, levels))


def are_numbers(levels: Sequence[str]) -> bool:
    """Whether the labels are numbers, which may have commas, but for at least one slip."""
    return not all(map(_is_number, levels)) and _but_for_slips(levels, _is_number)


def is_plain_value(label: str) -> bool:
    """Whether a label is written as a number without commas, or a date."""
    return _number(label) is not None or _is_date(label)


def is_value(label: str) -> bool:
    """Whether a label is written as a number, which may have commas, or a date."""
    return _is_number(label) or _is_date(label)


def _is_number(label: str) -> bool:
    return _number(label) is not None or _COMMA.fullmatch(label.strip()) is not None


def _is_date(label: str) -> bool:
    return any(date.fullmatch(label.strip()) for date in (_DATE, _WRITTEN_DATE))


def _but_for_slips(levels: Sequence[str], suits: Callable[[str], bool]) -> bool:
    """Whether some labels suit, and the others are marks of what is missing, or few among many."""
    other = [label for label in levels if not suits(label)]
    count = len(levels) - len(other)
    marks = all(label.strip().lower() in MARKS for label in other)
    few = count >= _MANY and len(other) * _MANY <= count
    return count > 0 and (marks or few)
