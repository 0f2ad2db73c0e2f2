"""What a formula may call.

Every function here is R's of the same name, but for ``legendre``, which R has not. Those whose value in one row depends on all rows
(``scale``, ``poly``, splines, ``cut`` into a number of intervals) keep what they learned from the
table of the fit in a state of plain numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from openreml_nn.table import bases
from openreml_nn.table.expressions import (
    Basis,
    Called,
    as_factor,
    evaluate,
    factor_of,
    truth_of,
)
from openreml_nn.table.levels import Factor, spelled
from openreml_nn.table.syntax import Call, Node, Text

__all__ = ["FUNCTIONS", "STATEFUL"]


def _elementwise(function: Callable[[Any], Any]) -> Callable[..., Any]:
    def call(called: Called, x: Node) -> Any:
        return function(called.numbers(x))

    return call


def _log(called: Called, x: Node, base: Node | None = None) -> Any:
    value = np.log(called.numbers(x))
    return value if base is None else value / np.log(called.constant(base))


def _round(called: Called, x: Node, digits: Node | None = None) -> Any:
    places = 0 if digits is None else called.whole(digits, "digits", -300, 300)
    return np.round(called.numbers(x), places)


def _identity(called: Called, x: Node) -> Any:
    value = evaluate(x, called.rows)
    return value if isinstance(value, Basis | Factor | np.ndarray) else called.numbers(x)


def _list(called: Called, *items: Node) -> list[Any]:
    found: list[Any] = []
    for item in items:
        value = called.constant(item)
        found += value if isinstance(value, list) else [value]
    return found


def _as_numeric(called: Called, x: Node) -> Any:
    return called.numbers(x)


def _extreme(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def call(called: Called, x: Node, *more: Node) -> Any:
        found = called.numbers(x)
        for other in more:
            found = function(found, called.numbers(other))
        return found

    return call


def _ifelse(called: Called, test: Node, yes: Node, no: Node) -> Any:
    chosen = np.broadcast_to(truth_of(test, called.rows), len(called.rows))
    sides = [evaluate(side, called.rows) for side in (yes, no)]
    if not any(isinstance(side, Factor | str) for side in sides):
        return np.where(chosen, called.numbers(yes), called.numbers(no))
    texts: list[Any] = []
    for side, node in zip(sides, (yes, no), strict=True):
        constant = not isinstance(side, Factor | np.ndarray)
        texts.append(spelled(side) if constant else factor_of(side, node, called.rows).labels())
    values = np.where(chosen, *texts)
    levels = sorted(set(values.tolist()))
    at = {level: i for i, level in enumerate(levels)}
    return Factor(np.array([at[value] for value in values.tolist()]), levels, str)


# ---------------------------------------------------------------------- factors


def _factor(called: Called, x: Node, levels: Node | None = None) -> Factor:
    own = as_factor(x, called.rows)
    if levels is None:
        return own
    given = called.constant(levels)
    order = [spelled(item, own.levels) for item in (given if isinstance(given, list) else [given])]
    if len(set(order)) < len(order):
        raise called.fault("`levels` has one twice")
    return Factor(own.among(order), order)


def _contrasted(called: Called, x: Node, contr: Node | None = None) -> Factor:
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


def _dummy(called: Called, x: Node, levels: Node) -> Any:
    """Indicators of some levels, as lme4's function of this name has them."""
    own, given = as_factor(x, called.rows), called.constant(levels)
    chosen = [spelled(item, own.levels) for item in (given if isinstance(given, list) else [given])]
    state = called.state
    if not state or "seen" in state:  # until the levels of all rows were seen, see `occurring`
        state["levels"] = chosen
        state["seen"] = list(dict.fromkeys([*state.get("seen", ()), *own.levels]))
    values = (own.labels()[:, None] == np.array(chosen, dtype=object)).astype(np.float64)
    return values[:, 0] if len(chosen) == 1 else Basis(values, tuple(chosen))


def _relevel(called: Called, x: Node, ref: Node) -> Factor:
    own = as_factor(x, called.rows)
    first = spelled(called.constant(ref), own.levels)
    levels = [first, *(level for level in own.levels if level != first)]
    key = own.key
    if key is None:
        return Factor(own.among(levels), levels)
    inner = key
    return Factor(own.among(levels), levels, lambda level: (level != first, inner(level)))


def _cut(
    called: Called,
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
            state["breaks"] = _told(called, bases.even_breaks, values, number)
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
    digits = called.count(dig_lab, "dig.lab", 22) or 3
    names = called.constant(labels) or bases.intervals(edges, digits, closed_right, lowest)
    if len(names) != len(edges) - 1:
        raise called.fault(f"{len(names)} `labels` for {len(edges) - 1} intervals")
    return Factor(codes, [spelled(name) for name in names])


# ---------------------------------------------------------------------- bases


def _scale(
    called: Called, x: Node, center: Node | None = None, scale: Node | None = None
) -> np.ndarray:
    values, state = called.numbers(x), called.state
    if not state:
        given = called.constant(center, True), called.constant(scale, True)
        state["center"] = float(np.mean(values)) if given[0] is True else float(given[0])
        if given[1] is True:
            rest = values - state["center"]
            state["scale"] = float(np.sqrt(rest @ rest / max(len(values) - 1, 1)))
        else:
            state["scale"] = 1.0 if given[1] is False else float(given[1])
    if state["scale"] == 0:
        raise called.fault("the scale is zero: all values are equal, or it is given so")
    return (values - state["center"]) / state["scale"]


def _center(called: Called, x: Node) -> np.ndarray:
    values, state = called.numbers(x), called.state
    if not state:
        state["center"] = float(np.mean(values))
    return values - state["center"]


def _poly(called: Called, x: Node, degree: Node | None = None, raw: Node | None = None) -> Basis:
    k = called.count(degree, "degree", 50) or 1
    names = tuple(str(j) for j in range(1, k + 1))
    if called.constant(raw, False):
        return Basis(called.numbers(x)[:, None] ** np.arange(1, k + 1), names)
    return Basis(_told(called, bases.polynomial, called.numbers(x), called.state, k), names)


def _legendre(
    called: Called,
    x: Node,
    degree: Node | None = None,
    low: Node | None = None,
    high: Node | None = None,
    intercept: Node | None = None,
) -> Basis:
    k = called.count(degree, "degree", 50) or 1
    ends = []
    for name, node in (("low", low), ("high", high)):
        end = called.constant(node)
        is_number = isinstance(end, int | float) and not isinstance(end, bool)
        if end is not None and not (is_number and np.isfinite(end)):
            raise called.fault(f"`{name}` is {end!r}: expected a number")
        ends.append(None if end is None else float(end))
    first = 0 if called.constant(intercept, False) else 1
    values = _told(called, bases.legendre, called.numbers(x), called.state, k, *ends)
    return Basis(values[:, first:], tuple(str(j) for j in range(first, k + 1)))


def _splines(
    function: Callable[..., np.ndarray], default_degree: int | None
) -> Callable[..., Basis]:
    def call(
        called: Called,
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


def _told(called: Called, function: Callable[..., Any], *args: Any, **kw: Any) -> Any:
    try:
        return function(*args, **kw)
    except ValueError as error:
        raise called.fault(str(error)) from None


def _offset(called: Called, x: Node) -> Any:
    raise called.fault("offset() is a term of the fixed effects")


def _contrasts(called: Called, *options: Node) -> Any:
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
    "C": _contrasted, "dummy": _dummy, "factor": _factor, "as.factor": _factor, "relevel": _relevel, "cut": _cut,
    "scale": _scale, "center": _center, "poly": _poly,
    "legendre": _legendre,
    "bs": _splines(bases.b_spline, 3), "ns": _splines(bases.natural_spline, None),
    **dict.fromkeys(bases.CONTRASTS, _contrasts),
}  # fmt: skip

#: Those that need all rows at once; ``cut`` does where it is given a number of intervals.
STATEFUL: Sequence[str] = ("scale", "center", "poly", "legendre", "bs", "ns")
