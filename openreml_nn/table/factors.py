"""The factors among the effects: the levels that occur, and rows of levels that are not known."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from openreml_nn.support.errors import InputError
from openreml_nn.table.algebra import Part
from openreml_nn.table.levels import Factor
from openreml_nn.table.rows import Slips, TableRows
from openreml_nn.table.syntax import Call, Name, Node, is_call, names_in, walk

__all__ = ["check_known", "known_rows", "occurring"]


def occurring(
    tables: Iterable[TableRows], effects: Callable[[TableRows], Iterable[Part]]
) -> dict[str, list[str]]:
    """The levels that occur of the categorical variables among the effects, by expression.

    Args:
        tables: the rows, in chunks.
        effects: the operands with the variables, of the rows of the first chunk.

    Raises:
        InputError: if a factor has one level, a chunk a level that the first does not allow, or
            ``relevel`` or ``dummy`` names a level that does not occur.
    """
    found: dict[str, list[str]] = {}
    variables: dict[str, Node] = {}
    met: dict[str, tuple[Factor, set[str]]] = {}
    slips: dict[str, Slips] = {}
    first, source, chosen = True, "", set[str]()
    for data in tables:
        if first:
            variables = {str(v): v for p in effects(data) for term in p.terms for v in term}
            source = data.source
            chosen = {k for k, v in variables.items() if any(is_call(n, "dummy") for n in walk(v))}
        for key, node in variables.items():
            if not (first or key in met or key in chosen):
                continue
            value = data.variable(node)
            if not isinstance(value, Factor):
                continue
            used = np.bincount(value.codes[value.codes >= 0], minlength=len(value.levels))
            factor, seen = met.get(key, (value, set()))
            levels = list(dict.fromkeys([*factor.levels, *value.levels]))
            seen |= {level for level, n in zip(value.levels, used, strict=True) if n}
            met[key] = (Factor(value.codes, levels, factor.key), seen)
            if (value.codes < 0).any():
                _refuse(data, node, value)
            if isinstance(node, Name) and not data.is_told(node.name):
                slips[key] = slips.get(key, Slips()).then(data.slips(value))
        first = False
        if not met and not chosen:
            break
    for node in (n for key in chosen for n in walk(variables[key]) if is_call(n, "dummy")):
        _check_chosen(data, str(node))
    for key, (factor, seen) in met.items():
        order = factor.levels if factor.key is None else sorted(factor.levels, key=factor.key)
        levels = [level for level in order if level in seen]
        node = variables[key]
        if key in slips and isinstance(node, Name):
            data.check_labels(node.name, levels, slips[key])
        if isinstance(node, Call) and node.function == "relevel" and order[0] not in seen:
            raise InputError(f"{source}: {key!r}: {order[0]!r} is no level of it")
        if len(levels) < 2:
            what = f"column {node.name!r}" if isinstance(node, Name) else repr(key)
            shown = f"one level, {levels[0]!r}" if levels else "no level"
            raise InputError(f"{source}: {what} has {shown}: a factor needs two")
        found[key] = levels
    return found


def _check_chosen(data: TableRows, call: str) -> None:
    """Refuse a level that ``dummy`` names and no row has."""
    state = data.state(call)
    seen = state.pop("seen", None)
    lacking = [] if seen is None else [level for level in state["levels"] if level not in seen]
    if lacking:
        raise data.fault(f"{call!r}: {lacking[0]!r} is no level: expected one of {seen[:10]}")


def known_rows(data: TableRows, parts: Iterable[Part]) -> np.ndarray:
    """Rows whose levels of the factors among the effects are known."""
    known = np.ones(len(data), dtype=bool)
    for part in parts:
        for node in part.variables:
            value = data.variable(node)
            if isinstance(value, Factor):
                known &= value.codes >= 0
    return known


def check_known(data: TableRows, parts: Iterable[Part]) -> None:
    """Raise for a row of a level that is not known."""
    for part in parts:
        for node in part.variables:
            value = data.variable(node)
            if isinstance(value, Factor) and (value.codes < 0).any():
                _refuse(data, node, value)


def _refuse(data: TableRows, node: Node, value: Factor) -> None:
    """Raise for a row of an unknown level."""
    at = int(np.argmax(value.codes < 0))
    names = names_in(node)
    shown = data.labels(names[0]).labels()[at]
    what = f"column {names[0]!r}" if isinstance(node, Name) else f"{str(node)!r}"
    raise InputError(
        f"{data.source}: {what} has the level {shown!r} in row {data.row(at)}, which the model "
        f"does not know: expected one of {value.levels[:10]}"
    )
