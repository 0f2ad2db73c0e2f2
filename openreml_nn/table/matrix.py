"""The model matrix of a sum of terms, with the columns and the names that R gives them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from openreml_nn.support.names import distinct
from openreml_nn.table.algebra import Part, Term
from openreml_nn.table.bases import contrast_matrix
from openreml_nn.table.expressions import Basis
from openreml_nn.table.levels import Factor
from openreml_nn.table.rows import TableRows
from openreml_nn.table.syntax import Name, Node

__all__ = ["MOST_COLUMNS", "Coding", "codings", "model_matrix"]

#: A matrix of more columns is refused before it is made.
MOST_COLUMNS = 100_000


def model_matrix(
    part: Part, rows: TableRows, most: int | None = None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """The model matrix (n, p) and the names of its columns.

    A factor in a term is coded by contrasts where the term without it is in the formula, else by
    an indicator of each level; without an intercept the first factor has all indicators. A name
    that two columns would have, as level ``b`` of ``f`` beside a column ``fb``, gets a number the
    second time, as R's make.unique has it: ``fb.1``.

    Args:
        part: the terms.
        rows: of the table.
        most: more columns than this are refused; by default :data:`MOST_COLUMNS`.

    Raises:
        InputError: if a variable is invalid or the columns are too many.
    """
    full = _with_all_levels(part, rows)
    blocks = [
        [_block(v, rows, (term, v) in full) for v in term] for term in part.terms
    ]  # (matrix of the levels or None, columns, names) of each variable of each term
    sizes = [int(np.prod([len(names) for _, names in block], dtype=np.float64)) for block in blocks]
    p, limit = sum(sizes), MOST_COLUMNS if most is None else most
    if p > limit:
        what = f"{len(rows)} rows for {p} fixed effects: more rows are needed"
        what = what if most is not None else f"{p} columns, more than {limit}"
        raise rows.fault(what + _by_levels(part, rows, limit))
    X = np.empty((len(rows), p))
    names: list[str] = []
    for block, size in zip(blocks, sizes, strict=True):
        at = len(names)
        X[:, at : at + size], own = _crossed(block, len(rows))
        names += own
    return X, distinct(names)


@dataclass(frozen=True)
class Coding:
    """How a variable of a term is coded.

    Attributes:
        variable: the variable, as written.
        columns: how many columns it has.
        levels: (levels, columns) the row of each level of a factor; None for numbers.
        is_full: whether there is an indicator of each level.
    """

    variable: str
    columns: int
    levels: np.ndarray | None = None
    is_full: bool = False


def codings(part: Part, rows: TableRows) -> list[list[Coding]]:
    """How the variables of each term are coded in the columns of :func:`model_matrix`.

    The columns of a term are the products of those of its variables, those of the first fastest.
    """
    full = _with_all_levels(part, rows)
    found = []
    for term in part.terms:
        own = []
        for variable in term:
            is_full = (term, variable) in full
            (matrix, codes), names = _block(variable, rows, is_full)
            levels = None if codes is None else matrix
            own.append(Coding(str(variable), len(names), levels, is_full))
        found.append(own)
    return found


def _by_levels(part: Part, rows: TableRows, most: int) -> str:
    """What is said beside of a factor that has nearly as many levels as there may be columns."""
    for variable in (each for term in part.terms for each in term):
        value = rows.variable(variable)
        if isinstance(value, Factor) and 2 * len(value.levels) > most:
            count = len(value.levels)
            return (
                f"; {str(variable)!r} alone, a factor here, has {count} levels in {len(rows)} rows"
            )
    return ""


_Block = tuple[tuple[np.ndarray, np.ndarray | None], list[str]]


def _with_all_levels(part: Part, rows: TableRows) -> set[tuple[Term, Node]]:
    """The factors in terms that are coded by an indicator of each level."""
    known = {frozenset(map(str, term)) for term in part.terms}
    found, first = set(), not part.has_intercept
    for term in part.terms:
        for variable in term:
            if isinstance(rows.variable(variable), Factor):
                rest = frozenset(map(str, term)) - {str(variable)}
                if first or (rest and rest not in known):
                    found.add((term, variable))
                first = False
    return found


def _block(variable: Node, rows: TableRows, full: bool) -> _Block:
    """A variable's columns: values, or a matrix with the row of each level and the levels."""
    value = rows.variable(variable)
    name = variable.name if isinstance(variable, Name) else str(variable)
    if isinstance(value, Basis):
        return (value.values, None), [name + suffix for suffix in value.names]
    if not isinstance(value, Factor):
        return (value[:, None], None), [name]
    if full:
        matrix, suffixes = np.eye(len(value.levels)), value.levels
    else:
        try:
            matrix, suffixes = contrast_matrix(value.levels, value.contrasts)
        except ValueError as error:
            raise rows.fault(f"{name!r}: {error}") from None
    return (matrix, value.codes), [name + suffix for suffix in suffixes]


def _crossed(block: list[_Block], n: int) -> tuple[np.ndarray, list[str]]:
    """Products of the columns of a term's variables, those of the first variable fastest."""
    if not block:
        return np.ones((n, 1)), ["(Intercept)"]
    (matrix, codes), names = block[0]
    values = matrix if codes is None else matrix[codes]
    for (other, at), more in block[1:]:
        right = other if at is None else other[at]
        size = right.shape[1] * values.shape[1]  # rows may be none, which say no size
        values = (right[:, :, None] * values[:, None, :]).reshape(n, size)
        names = [f"{a}:{b}" for b in more for a in names]
    return values, list(names)
