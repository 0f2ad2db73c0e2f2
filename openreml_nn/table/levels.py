"""The one coding of levels: a value's label, the order of labels, and which level a row has.

A label is the value as it is written, so that the same ids are the same levels whatever their
dtype: 7, 7.0 and "7" are, "007" is another. Whole numbers are exact to 64 bits.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from openreml_nn.support.errors import InputError
from openreml_nn.support.warning import warn

__all__ = ["LOGICAL", "Factor", "coded", "joined", "label", "number_key", "places", "spelled"]

#: False and true as levels of effects, as R has them; ids of groups are written as the data are.
LOGICAL = ("FALSE", "TRUE")

#: Whole numbers beyond it are not exact in float64.
_EXACT = 2.0**53
_MIDNIGHT = re.compile(r"(\d{4}-\d\d-\d\d)[ T]00:00(:00(\.0+)?)?")
_BOOLEAN = {"true": "1", "false": "0"}


@dataclass(frozen=True)
class Factor:
    """A categorical variable of a table.

    Attributes:
        codes: (n,) the level of each row; -1 where it is none of them.
        levels: labels.
        key: what levels are sorted by when those of two tables come together; None where
            the order is given.
        contrasts: name and options of the contrasts, the treatment contrasts by default.
    """

    codes: np.ndarray
    levels: list[str]
    key: Callable[[str], Any] | None = None
    contrasts: tuple[str, dict[str, Any]] = ("contr.treatment", {})

    def labels(self) -> np.ndarray:
        """(n,) label of each row, None where it has none."""
        known = np.array([*self.levels, None], dtype=object)
        return known[self.codes]

    def among(self, levels: Sequence[str]) -> np.ndarray:
        """(n,) codes among other levels."""
        place = places(self.levels, levels)
        return np.append(place, -1)[self.codes]


def coded(column: pd.Series, levels: Sequence[str] | None = None, source: str = "") -> Factor:
    """The column as a factor.

    By default its levels are the labels that occur: in a categorical's order, numbers by size,
    all else by spelling.

    Args:
        column: of anything that has a spelling.
        levels: the levels that are known; other values get the code -1.
        source: what messages call the table.

    Raises:
        InputError: if a value is a list or a record.
    """
    try:
        values, uniques = pd.factorize(column)
    except TypeError:
        raise InputError(
            f"{source}: column {column.name!r} holds lists or records: expected numbers or labels"
        ) from None
    _warn_of_rounded(column, uniques, source)
    if pd.api.types.is_float_dtype(column.dtype):
        uniques = np.asarray(uniques)  # which keeps the digits of single precision
    key: Callable[[str], Any] | None = None
    is_numeric = pd.api.types.is_numeric_dtype(column.dtype) and not (
        pd.api.types.is_bool_dtype(column.dtype)
    )
    if levels is None and is_numeric:
        order = np.argsort(np.asarray(uniques))
        uniques = uniques[order]
        place = np.empty(len(order) + 1, dtype=np.int64)
        place[order], place[-1] = np.arange(len(order)), -1
        values = place[values]
    raw = _labels(uniques)
    own = list(dict.fromkeys(raw))
    if levels is None and is_numeric and len(own) == len(raw):
        return Factor(values, own, number_key)
    if levels is None:
        if isinstance(column.dtype, pd.CategoricalDtype):
            key = _ranked([label(category) for category in column.cat.categories])
        else:
            key = number_key if _are_numbers(column, uniques) else str
        own.sort(key=key)
        levels = own
    place = np.append(places(raw, levels), -1)
    return Factor(place[values], list(levels), key)


def _labels(uniques: Any) -> list[str]:
    """Values as they are written; of whole numbers, which may be many, all at once."""
    known = np.asarray(uniques)
    if known.dtype.kind in "iu":
        return list(map(str, known.tolist()))
    return [label(value) for value in uniques]


def label(value: Any) -> str:
    """A value as it is written."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool | np.bool_):
        return str(bool(value))
    if isinstance(value, int | np.integer):
        return str(int(value))
    if isinstance(value, float | np.floating):
        return str(int(value)) if float(value).is_integer() else str(value)
    if isinstance(value, np.datetime64):
        value = pd.Timestamp(value)
    if isinstance(value, datetime.datetime):
        text = str(value)
        found = _MIDNIGHT.fullmatch(text)
        return found[1] if found else text
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    text = str(value)
    # Decimals: 7.00 is 7, as the same number of another dtype is.
    if type(value).__name__ == "Decimal":
        return text.rstrip("0").rstrip(".") if "." in text and "E" not in text else text
    return text


def spelled(value: Any, levels: Sequence[str] = ()) -> str:
    """A constant of a formula, or a value of an expression, as levels are written.

    True and false are ``TRUE`` and ``FALSE`` there, as in R, and so are their other spellings among
    such levels: ``flag == "True"`` would be false in every row.
    """
    text = LOGICAL[int(value)] if isinstance(value, bool | np.bool_) else label(value)
    if levels and set(levels) <= set(LOGICAL) and (at := int(places([text], LOGICAL)[0])) >= 0:
        return LOGICAL[at]
    return text


def number_key(text: str) -> Any:
    """Numbers by size, exact for whole ones; what is no number comes last, by spelling."""
    try:
        return (0, int(text), "")
    except ValueError:
        pass
    try:
        return (0, float(text), "")
    except ValueError:
        return (1, 0, text)


def places(labels: Sequence[str], levels: Sequence[str]) -> np.ndarray:
    """Position of each label among the levels, -1 for none.

    A label that is not found is looked for in another spelling: blanks around it, midnight after
    a date, true and false as 1 and 0, a number of fewer digits as float32 stores it. It is that
    level if no other has the same spelling.
    """
    position = {level: i for i, level in enumerate(levels)}
    found = [position.get(item, -1) for item in labels]
    if -1 in found:
        boolean = _is_boolean(levels) and _is_boolean(labels)
        loose: dict[str, int] = {}
        for i, level in enumerate(levels):
            key = _loosely(level, boolean)
            loose[key] = -1 if key in loose else i
        found = [
            loose.get(_loosely(item, boolean), -1) if at < 0 else at
            for item, at in zip(labels, found, strict=True)
        ]
    return np.array(found, dtype=np.int64)


def _ranked(order: Sequence[str]) -> Callable[[str], int]:
    """The place of a label in an order; those that are not in it come last."""
    place = {item: i for i, item in enumerate(order)}
    return lambda item: place.get(item, len(place))


def _is_boolean(labels: Sequence[str]) -> bool:
    return all(item.strip().lower() in ("0", "1", *_BOOLEAN) for item in labels)


def _loosely(text: str, boolean: bool) -> str:
    text = text.strip()
    if boolean:
        return _BOOLEAN.get(text.lower(), text)
    if found := _MIDNIGHT.fullmatch(text):
        return found[1]
    if re.fullmatch(r"[+-]?\d*\.\d+(e[+-]?\d+)?", text, re.IGNORECASE):
        value = np.float32(text)
        return str(int(value)) if np.isfinite(value) and value == int(value) else str(value)
    return text


def _are_numbers(column: pd.Series, uniques: Any) -> bool:
    if column.dtype == object:
        return all(not isinstance(value, str) and _is_number(label(value)) for value in uniques)
    return bool(pd.api.types.is_numeric_dtype(column.dtype))


def _is_number(text: str) -> bool:
    return number_key(text)[0] == 0


def _warn_of_rounded(column: pd.Series, uniques: Any, source: str) -> None:
    if pd.api.types.is_float_dtype(column.dtype) and len(uniques):
        largest = np.abs(np.asarray(uniques, dtype=np.float64)).max()
        if largest > _EXACT and float(largest).is_integer():
            warn(
                f"{source}: ids in column {column.name!r} are stored as float64, which cannot tell "
                "whole numbers beyond 2^53 apart: read them as text or as 64-bit integers"
            )


def joined(cells: np.ndarray, columns: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Labels of combinations of levels, joined by ':' unless that makes two alike.

    Args:
        cells: each combination as one number, the last column's level fastest.
        columns: levels of each column.
    """
    if len(columns) == 1:
        return tuple(map(columns[0].__getitem__, cells.tolist()))
    combos = split(cells, columns)
    labels = [":".join(combo) for combo in combos]
    if len(set(labels)) < len(labels):
        labels = [repr(combo) for combo in combos]
    return tuple(labels)


def split(cells: np.ndarray, columns: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """The labels of each combination, one for each column."""
    parts, rest = [], cells
    for levels in reversed(columns):
        parts.append(np.asarray(levels, dtype=object)[rest % len(levels)])
        rest = rest // len(levels)
    return list(zip(*reversed(parts), strict=True))
