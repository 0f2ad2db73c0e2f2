"""The value of an expression for the rows of a table."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from openreml_nn.support.errors import InputError
from openreml_nn.table.levels import Factor, number_key, spelled
from openreml_nn.table.syntax import Call, Name, Node, Number, Operation, Text

__all__ = [
    "Basis",
    "Called",
    "Rows",
    "as_factor",
    "as_numbers",
    "evaluate",
    "factor_of",
    "truth_of",
]


@dataclass(frozen=True)
class Basis:
    """Several columns that one variable stands for.

    Attributes:
        values: (n, k).
        names: what each adds to the variable's name.
    """

    values: np.ndarray
    names: tuple[str, ...]


class Rows(Protocol):
    """The rows of a table for which expressions are evaluated."""

    @property
    def functions(self) -> Mapping[str, Callable[..., Any]]:
        """What a formula may call, by name: functions of a :class:`Called` and of nodes."""

    def __len__(self) -> int: ...

    def kind(self, name: str) -> str:
        """What the column holds, as :func:`~openreml_nn.table.columns.kind_of` says it."""

    def column(self, name: str) -> np.ndarray | Factor:
        """The column: float64, booleans, or a factor."""

    def labels(self, name: str) -> Factor:
        """The column as a factor, whatever it holds."""

    def numbers(self, name: str) -> np.ndarray:
        """The column as float64.

        Raises:
            InputError: if a value is no number.
        """

    def state(self, call: str) -> dict[str, Any]:
        """What a call learned, to be filled in by the first evaluation."""

    def fault(self, what: str) -> InputError:
        """An error of an expression."""


def evaluate(node: Node, rows: Rows) -> Any:
    """The value of an expression: numbers (n,), booleans (n,), a factor, a basis, or a constant.

    Raises:
        InputError: if an operand is of the wrong kind, or a value is no number.
    """
    if isinstance(node, Name):
        return rows.column(node.name)
    if isinstance(node, Number | Text):
        return node.value
    if isinstance(node, Call):
        return _called(node, rows)
    return _operated(node, rows)


def as_numbers(node: Node, rows: Rows) -> Any:
    """The value of an expression as numbers, or a number.

    Raises:
        InputError: if it has none.
    """
    value = rows.column(node.name) if isinstance(node, Name) else evaluate(node, rows)
    if isinstance(value, Factor):
        if isinstance(node, Name):
            return rows.numbers(node.name)
        raise rows.fault(f"{str(node)!r} has labels: expected numbers")
    if isinstance(value, Basis):
        if value.values.shape[1] == 1:
            return value.values[:, 0]
        raise rows.fault(f"{str(node)!r} has {value.values.shape[1]} columns: expected one")
    if isinstance(value, str | list):
        raise rows.fault(f"{str(node)!r} is no number")
    return value.astype(np.float64) if isinstance(value, np.ndarray) else float(value)


def as_factor(node: Node, rows: Rows) -> Factor:
    """The value of an expression as a factor, numbers by their spelling."""
    if isinstance(node, Name) and rows.kind(node.name) != "bool":
        return rows.labels(node.name)
    return factor_of(evaluate(node, rows), node, rows)


def factor_of(value: Any, node: Node, rows: Rows) -> Factor:
    """Labels of numbers and booleans; a factor stays itself."""
    if isinstance(value, Factor):
        return value
    if not isinstance(value, np.ndarray):
        raise rows.fault(f"{str(node)!r} is no variable: expected one value a row")
    values, inverse = np.unique(value, return_inverse=True)
    return Factor(inverse, [spelled(v) for v in values], number_key)


# ---------------------------------------------------------------------- operators

_ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "+": np.add, "-": np.subtract, "*": np.multiply, "/": np.divide, "^": np.power,
    "%%": np.mod, "%/%": np.floor_divide,
}  # fmt: skip
_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "==": np.equal, "!=": np.not_equal, "<": np.less, "<=": np.less_equal, ">": np.greater,
    ">=": np.greater_equal,
}  # fmt: skip
_LOGICAL: dict[str, Callable[[Any, Any], Any]] = {
    "&": np.logical_and, "&&": np.logical_and, "|": np.logical_or, "||": np.logical_or,
}  # fmt: skip


def _operated(node: Operation, rows: Rows) -> Any:
    operator, operands = node.operator, node.operands
    if operator == "(":
        return evaluate(operands[0], rows)
    if operator == "!":
        return ~truth_of(operands[0], rows)
    if operator in _LOGICAL:
        return _LOGICAL[operator](*(truth_of(operand, rows) for operand in operands))
    if operator in _COMPARISONS:
        return _compared(node, rows)
    if operator == "%in%":
        own = as_factor(operands[0], rows)
        sought = evaluate(operands[1], rows)
        among = {
            spelled(item, own.levels) for item in (sought if isinstance(sought, list) else [sought])
        }
        return np.append([level in among for level in own.levels], False)[own.codes]
    if operator not in _ARITHMETIC:
        raise rows.fault(f"operator {operator!r} has no place in {str(node)!r}")
    values = [as_numbers(operand, rows) for operand in operands]
    if len(values) == 1:
        return -values[0] if operator == "-" else values[0]
    return _ARITHMETIC[operator](*(np.asarray(value, dtype=np.float64) for value in values))


def truth_of(node: Node, rows: Rows) -> Any:
    """Whether an expression is other than zero, row by row."""
    return np.asarray(as_numbers(node, rows)) != 0


def _compared(node: Operation, rows: Rows) -> Any:
    values = [evaluate(operand, rows) for operand in node.operands]
    if not any(isinstance(value, Factor | str) for value in values):
        return _COMPARISONS[node.operator](*(as_numbers(o, rows) for o in node.operands))
    if node.operator not in ("==", "!="):
        raise rows.fault(f"{str(node)!r}: labels have no order, expected '==' or '!='")
    factors = [
        None if isinstance(value, str | float) else factor_of(value, operand, rows)
        for operand, value in zip(node.operands, values, strict=True)
    ]
    levels = [level for factor in factors if factor is not None for level in factor.levels]
    sides = [
        spelled(value, levels) if factor is None else factor.labels()
        for factor, value in zip(factors, values, strict=True)
    ]
    return np.asarray(_COMPARISONS[node.operator](*sides), dtype=bool)


# ---------------------------------------------------------------------- functions


def _called(node: Call, rows: Rows) -> Any:
    function = rows.functions[node.function]
    positional = [argument for key, argument in node.arguments if key is None]
    named = {key.replace(".", "_"): argument for key, argument in node.arguments if key}
    own = inspect.signature(function)
    try:
        bound = own.bind(Called(node, rows), *positional, **named)
    except TypeError as error:
        raise rows.fault(f"{str(node)!r}: {error}") from None
    return function(*bound.args, **bound.kwargs)


@dataclass(frozen=True)
class Called:
    """A call, to the function that it calls: its arguments come as nodes."""

    node: Call
    rows: Rows

    def numbers(self, argument: Node) -> np.ndarray:
        """(n,) values."""
        value = as_numbers(argument, self.rows)
        return value if isinstance(value, np.ndarray) else np.full(len(self.rows), value)

    def constant(self, argument: Node | None, default: Any = None) -> Any:
        """A number, text, or list of them, that is the same for all rows."""
        if argument is None:
            return default
        value = evaluate(argument, self.rows)
        if isinstance(value, np.ndarray | np.generic) and value.ndim == 0:
            value = float(value)
        if isinstance(value, np.ndarray | Factor | Basis):
            raise self.fault(f"{str(argument)!r} has a value a row: expected a constant")
        return value

    def count(self, argument: Node | None, name: str, most: int) -> int | None:
        """A whole number, 1 or more."""
        if argument is None:
            return None
        return self.whole(argument, name, 1, most)

    def whole(self, argument: Node, name: str, least: int, most: int) -> int:
        """A whole number between two."""
        value = self.constant(argument)
        inside = not isinstance(value, str | list) and least <= value <= most
        if not inside or value != int(value):
            raise self.fault(
                f"`{name}` is {argument}: expected a whole number from {least} to {most}"
            )
        return int(value)

    def fault(self, what: str) -> InputError:
        """An error of this call."""
        return self.rows.fault(f"{str(self.node)!r}: {what}")

    @property
    def state(self) -> dict[str, Any]:
        """What the call learned."""
        return self.rows.state(str(self.node))
