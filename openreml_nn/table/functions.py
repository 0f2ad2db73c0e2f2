"""What a formula may call, and the value of an expression for the rows of a table.

Every function here is R's of the same name. Those whose value in one row depends on all rows
(``scale``, ``poly``, splines, ``cut`` into a number of intervals) keep what they learned from the
table of the fit in a state of plain numbers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from openreml_nn.support.errors import InputError
from openreml_nn.table import bases
from openreml_nn.table.levels import Factor, label, number_key
from openreml_nn.table.syntax import Call, Name, Node, Number, Operation, Text

__all__ = ["FUNCTIONS", "STATEFUL", "Basis", "Rows", "as_factor", "as_numbers", "evaluate"]


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

    def __len__(self) -> int: ...

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
    if isinstance(node, Name):
        return rows.labels(node.name)
    return factor_of(evaluate(node, rows), node, rows)


def factor_of(value: Any, node: Node, rows: Rows) -> Factor:
    """Labels of numbers and booleans; a factor stays itself."""
    if isinstance(value, Factor):
        return value
    if not isinstance(value, np.ndarray):
        raise rows.fault(f"{str(node)!r} is no variable: expected one value a row")
    values, inverse = np.unique(value, return_inverse=True)
    return Factor(inverse, [label(v) for v in values], number_key)


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
        return ~_truth(operands[0], rows)
    if operator in _LOGICAL:
        return _LOGICAL[operator](*(_truth(operand, rows) for operand in operands))
    if operator in _COMPARISONS:
        return _compared(node, rows)
    if operator == "%in%":
        own = as_factor(operands[0], rows)
        sought = evaluate(operands[1], rows)
        among = {label(item) for item in (sought if isinstance(sought, list) else [sought])}
        return np.append([level in among for level in own.levels], False)[own.codes]
    if operator not in _ARITHMETIC:
        raise rows.fault(f"operator {operator!r} has no place in {str(node)!r}")
    values = [as_numbers(operand, rows) for operand in operands]
    if len(values) == 1:
        return -values[0] if operator == "-" else values[0]
    return _ARITHMETIC[operator](*(np.asarray(value, dtype=np.float64) for value in values))


def _truth(node: Node, rows: Rows) -> Any:
    return np.asarray(as_numbers(node, rows)) != 0


def _compared(node: Operation, rows: Rows) -> Any:
    values = [evaluate(operand, rows) for operand in node.operands]
    if not any(isinstance(value, Factor | str) for value in values):
        return _COMPARISONS[node.operator](*(as_numbers(o, rows) for o in node.operands))
    if node.operator not in ("==", "!="):
        raise rows.fault(f"{str(node)!r}: labels have no order, expected '==' or '!='")
    sides = []
    for operand, value in zip(node.operands, values, strict=True):
        constant = isinstance(value, str | float)
        sides.append(label(value) if constant else factor_of(value, operand, rows).labels())
    return np.asarray(_COMPARISONS[node.operator](*sides), dtype=bool)


# ---------------------------------------------------------------------- functions


def _called(node: Call, rows: Rows) -> Any:
    function = FUNCTIONS[node.function]
    positional = [argument for key, argument in node.arguments if key is None]
    named = {key.replace(".", "_"): argument for key, argument in node.arguments if key}
    own = inspect.signature(function)
    try:
        bound = own.bind(_Called(node, rows), *positional, **named)
    except TypeError as error:
        raise rows.fault(f"{str(node)!r}: {error}") from None
    return function(*bound.args, **bound.kwargs)


@dataclass(frozen=True)
class _Called:
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
        value = self.constant(argument)
        if value is None:
            return None
        if isinstance(value, str | list) or value != int(value) or not 1 <= value <= most:
            raise self.fault(f"`{name}` is {argument}: expected a whole number from 1 to {most}")
        return int(value)

    def fault(self, what: str) -> InputError:
        return self.rows.fault(f"{str(self.node)!r}: {what}")

    @property
    def state(self) -> dict[str, Any]:
        return self.rows.state(str(self.node))


def _elementwise(function: Callable[[Any], Any]) -> Callable[..., Any]:
    def call(called: _Called, x: Node) -> Any:
        return function(called.numbers(x))

    return call


def _log(called: _Called, x: Node, base: Node | None = None) -> Any:
    value = np.log(called.numbers(x))
    return value if base is None else value / np.log(called.constant(base))


def _round(called: _Called, x: Node, digits: Node | None = None) -> Any:
    return np.round(called.numbers(x), int(called.constant(digits, 0)))


def _identity(called: _Called, x: Node) -> Any:
    value = evaluate(x, called.rows)
    return value if isinstance(value, Basis | Factor | np.ndarray) else called.numbers(x)


def _list(called: _Called, *items: Node) -> list[Any]:
    found: list[Any] = []
    for item in items:
        value = called.constant(item)
        found += value if isinstance(value, list) else [value]
    return found


def _as_numeric(called: _Called, x: Node) -> Any:
    return called.numbers(x)


def _extreme(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def call(called: _Called, x: Node, *more: Node) -> Any:
        found = called.numbers(x)
        for other in more:
            found = function(found, called.numbers(other))
        return found

    return call


def _ifelse(called: _Called, test: Node, yes: Node, no: Node) -> Any:
    chosen = np.broadcast_to(_truth(test, called.rows), len(called.rows))
    sides = [evaluate(side, called.rows) for side in (yes, no)]
    if not any(isinstance(side, Factor | str) for side in sides):
        return np.where(chosen, called.numbers(yes), called.numbers(no))
    texts: list[Any] = []
    for side, node in zip(sides, (yes, no), strict=True):
        constant = not isinstance(side, Factor | np.ndarray)
        texts.append(label(side) if constant else factor_of(side, node, called.rows).labels())
    values = np.where(chosen, *texts)
    levels = sorted(set(values.tolist()))
    at = {level: i for i, level in enumerate(levels)}
    return Factor(np.array([at[value] for value in values.tolist()]), levels, str)


# ---------------------------------------------------------------------- factors


def _factor(called: _Called, x: Node, levels: Node | None = None) -> Factor:
    own = as_factor(x, called.rows)
    if levels is None:
        return own
    given = called.constant(levels)
    order = [label(item) for item in (given if isinstance(given, list) else [given])]
    if len(set(order)) < len(order):
        raise called.fault("`levels` has one twice")
    return Factor(own.among(order), order)


def _contrasted(called: _Called, x: Node, contr: Node | None = None) -> Factor:
    own = as_factor(x, called.rows)
    if contr is None:
        return own
    if isinstance(contr, Text):
        contr = Call(contr.value, ())
    if not isinstance(contr, Call) or contr.function not in bases.CONTRASTS:
        names = ", ".join(bases.CONTRASTS)
        raise called.fault(f"contrasts {str(contr)!r}: expected one of {names}")
    options = {key or "base": called.constant(value) for key, value in contr.arguments}
    if set(options) - ({"base"} if contr.function == "contr.treatment" else set()):
        raise called.fault(f"{str(contr)!r}: only contr.treatment takes an option, `base`")
    return Factor(own.codes, own.levels, own.key, (contr.function, options))


def _relevel(called: _Called, x: Node, ref: Node) -> Factor:
    own, first = as_factor(x, called.rows), label(called.constant(ref))
    levels = [first, *(level for level in own.levels if level != first)]
    key = own.key
    if key is None:
        return Factor(own.among(levels), levels)
    inner = key
    return Factor(own.among(levels), levels, lambda level: (level != first, inner(level)))


def _cut(
    called: _Called,
    x: Node,
    breaks: Node,
    labels: Node | None = None,
    include_lowest: Node | None = None,
    right: Node | None = None,
    dig_lab: Node | None = None,
) -> Factor:
    values, given = called.numbers(x), called.constant(breaks)
    if not isinstance(given, list):
        number = called.count(breaks, "breaks", 1000)
        assert number is not None
        state = called.state
        if not state:
            state["breaks"] = bases.even_breaks(values, number)
        given = state["breaks"]
    edges = np.sort(np.asarray(given, dtype=np.float64))
    if len(edges) < 2 or len(np.unique(edges)) < len(edges):
        raise called.fault("`breaks` must be two or more distinct numbers")
    closed_right = bool(called.constant(right, True))
    lowest = bool(called.constant(include_lowest, False))
    codes = np.searchsorted(edges, values, "left" if closed_right else "right") - 1
    if lowest:
        codes = np.where(values == edges[0 if closed_right else -1], 0, codes)
        codes = np.where(not closed_right and values == edges[-1], len(edges) - 2, codes)
    codes = np.where((codes < 0) | (codes > len(edges) - 2), -1, codes)
    digits = int(called.constant(dig_lab, 3))
    names = called.constant(labels) or bases.intervals(edges, digits, closed_right, lowest)
    if len(names) != len(edges) - 1:
        raise called.fault(f"{len(names)} `labels` for {len(edges) - 1} intervals")
    return Factor(codes, [label(name) for name in names])


# ---------------------------------------------------------------------- bases


def _scale(
    called: _Called, x: Node, center: Node | None = None, scale: Node | None = None
) -> np.ndarray:
    values, state = called.numbers(x), called.state
    if not state:
        given = called.constant(center, True), called.constant(scale, True)
        state["center"] = float(np.mean(values)) if given[0] is True else float(given[0])
        if given[1] is True:
            rest = values - state["center"]
            state["scale"] = float(np.sqrt(rest @ rest / max(len(values) - 1, 1)))
        else:
            state["scale"] = float(given[1]) or 1.0
    if state["scale"] == 0:
        raise called.fault("all values are equal: they have no scale")
    return (values - state["center"]) / state["scale"]


def _center(called: _Called, x: Node) -> np.ndarray:
    values, state = called.numbers(x), called.state
    if not state:
        state["center"] = float(np.mean(values))
    return values - state["center"]


def _poly(called: _Called, x: Node, degree: Node | None = None, raw: Node | None = None) -> Basis:
    k = called.count(degree, "degree", 50) or 1
    names = tuple(str(j) for j in range(1, k + 1))
    if called.constant(raw, False):
        return Basis(called.numbers(x)[:, None] ** np.arange(1, k + 1), names)
    return Basis(_told(called, bases.polynomial, called.numbers(x), called.state, k), names)


def _splines(
    function: Callable[..., np.ndarray], default_degree: int | None
) -> Callable[..., Basis]:
    def call(
        called: _Called,
        x: Node,
        df: Node | None = None,
        knots: Node | None = None,
        degree: Node | None = None,
        intercept: Node | None = None,
        Boundary_knots: Node | None = None,
    ) -> Basis:
        if default_degree is None and degree is not None:
            raise called.fault("natural splines are cubic: they take no `degree`")
        given = called.constant(knots)
        options = {
            "df": called.count(df, "df", 500),
            "knots": given if given is None or isinstance(given, list) else [given],
            "degree": called.count(degree, "degree", 20) or default_degree or 3,
            "intercept": bool(called.constant(intercept, False)),
            "boundary": called.constant(Boundary_knots),
        }
        values = _told(called, function, called.numbers(x), called.state, **options)
        return Basis(values, tuple(str(j) for j in range(1, values.shape[1] + 1)))

    return call


def _told(called: _Called, function: Callable[..., np.ndarray], *args: Any, **kw: Any) -> Any:
    try:
        return function(*args, **kw)
    except ValueError as error:
        raise called.fault(str(error)) from None


def _offset(called: _Called, x: Node) -> Any:
    raise called.fault("offset() is a term of the fixed effects")


def _contrasts(called: _Called, *options: Node) -> Any:
    raise called.fault("contrasts are the second argument of C()")


#: The functions that a formula may call, by name.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "I": _identity, "c": _list, "offset": _offset,
    "log": _log, "log2": _elementwise(np.log2), "log10": _elementwise(np.log10),
    "log1p": _elementwise(np.log1p), "exp": _elementwise(np.exp), "expm1": _elementwise(np.expm1),
    "sqrt": _elementwise(np.sqrt), "abs": _elementwise(np.abs), "sin": _elementwise(np.sin),
    "cos": _elementwise(np.cos), "tan": _elementwise(np.tan), "tanh": _elementwise(np.tanh),
    "floor": _elementwise(np.floor), "ceiling": _elementwise(np.ceil), "sign": _elementwise(np.sign),
    "round": _round, "pmax": _extreme(np.maximum), "pmin": _extreme(np.minimum),
    "ifelse": _ifelse, "as.numeric": _as_numeric,
    "C": _contrasted, "factor": _factor, "as.factor": _factor, "relevel": _relevel, "cut": _cut,
    "scale": _scale, "center": _center, "poly": _poly,
    "bs": _splines(bases.b_spline, 3), "ns": _splines(bases.natural_spline, None),
    **dict.fromkeys(bases.CONTRASTS, _contrasts),
}  # fmt: skip

#: Those that need all rows at once; ``cut`` does where it is given a number of intervals.
STATEFUL: Sequence[str] = ("scale", "center", "poly", "bs", "ns")
