"""Several responses of a row, ``cbind(y1, y2) ~ …``: a row of the stacked table for each of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from openreml_nn.support.errors import InputError
from openreml_nn.support.warning import warn
from openreml_nn.table.algebra import Part
from openreml_nn.table.columns import single
from openreml_nn.table.rows import TableRows, complete
from openreml_nn.table.syntax import Call, Name, Node, Number, Operation, is_call, names_in, walk

__all__ = [
    "TRAIT",
    "WITHIN_UNIT",
    "Traits",
    "by_trait",
    "check_traits",
    "complete_rows",
    "effects_by_trait",
    "response_of",
    "traits_of",
]

#: The columns of a stacked table that tell the response, and the row, of each value.
TRAIT, UNIT = "trait", "unit"
#: The covariance of the residuals of a row's responses where nothing else is said.
WITHIN_UNIT = f"us({TRAIT} | {UNIT})"

#: The responses by their names.
Traits = tuple[tuple[str, Node], ...]


def traits_of(response: Node, text: str) -> Traits:
    """The responses in ``cbind(y1, b = log(y2))`` by their names; none for another left side.

    Raises:
        InputError: if there are fewer than two, one has no column, or a name stands twice.
    """
    if not isinstance(response, Call) or not is_call(response, "cbind"):
        return ()
    found = tuple(
        ((node.name if isinstance(node, Name) else str(node)) if key is None else key, node)
        for key, node in response.arguments
    )
    names = [name for name, _ in found]
    if len(found) < 2 or len(set(names)) < len(names):
        raise InputError(
            f"formula {text!r}: cbind() holds {', '.join(map(repr, names)) or 'nothing'}: expected "
            "two or more different responses"
        )
    for name, node in found:
        columns = names_in(node)
        if not columns or {TRAIT, UNIT} & set(columns):
            wrong = "has no column" if not columns else f"uses {columns[0]!r}, which cbind() makes"
            raise InputError(f"formula {text!r}: the response {name!r} {wrong}")
    return found


def by_trait(part: Part) -> Part:
    """The fixed effects, each with a coefficient for every trait, as R's ``lm`` reads them.

    ``x`` is ``0 + trait + trait:x`` then. A part that names ``trait`` is taken as it is written.
    """
    return part if TRAIT in names_in(part.node) else replace(part, by=Name(TRAIT))


def effects_by_trait(part: Part) -> Part:
    """The effects of a level: each for every trait, or, where ``trait`` is named, as they are
    written, but with an intercept only where it is written too: ``us(trait | g)`` is a covariance
    among the traits."""
    if TRAIT not in names_in(part.node):
        return replace(part, by=Name(TRAIT))
    if any(isinstance(node, Number) for node in walk(part.node)):
        return part
    return replace(part, node=Operation("+", (Number(0.0), part.node)))


def complete_rows(
    table: pd.DataFrame,
    columns: Sequence[str],
    categorical: Sequence[str],
    source: str,
    traits: Traits = (),
    response: bool = True,
) -> tuple[pd.DataFrame, np.ndarray, int]:
    """The rows that miss no value; of several responses a row for each, with the columns ``trait``
    and ``unit``.

    Args:
        table: the table.
        columns: that may miss no value, responses among them.
        categorical, source: see :class:`Encoder`.
        traits: the responses, where there are several.
        response: whether one of these that is missing has no row.

    Returns:
        The rows, where each stood in the table, and how many rows of the table are left out.

    Raises:
        InputError: if a column is missing, or has the name of one that is made.
    """
    if not traits:
        return complete(table, columns, categorical, source)
    for name in (TRAIT, UNIT):
        if name in table.columns:
            raise InputError(f"{source} has a column {name!r}, which cbind() makes: rename yours")
    size, count = len(table), len(traits)
    present = np.ones((size, count), dtype=bool)
    own = {column for _, node in traits for column in names_in(node)}
    if response:
        missing = {column: single(table, column, source).isna().to_numpy() for column in own}
        for j, (_, node) in enumerate(traits):
            for column in names_in(node):
                present[:, j] &= ~missing[column]
        without = size - int(present.any(axis=1).sum())
        if size and without == size:
            raise InputError(f"{source}: every row misses every response")
        if without:
            what = f"{source}: {without} of {size} rows left out, which have no response"
            warn(what)
    at, trait = present.nonzero()
    names = pd.Categorical.from_codes(trait, [name for name, _ in traits])
    stacked = table.iloc[at].assign(**{TRAIT: names, UNIT: at})
    others = [column for column in columns if column not in own]
    kept, rows, _ = complete(stacked, others, categorical, source)
    return kept, at[rows], size - len(np.unique(at[rows]))


def check_traits(stacked: pd.DataFrame, traits: Traits, source: str) -> None:
    """Raise if no row of a stacked table has one of the responses."""
    for name, _ in traits:
        if not (stacked[TRAIT] == name).any():
            raise InputError(
                f"{source}: no complete row has the response {name!r}: expected values of each response"
            )


def response_of(
    data: TableRows, response: Node, traits: Traits, rows: Callable[[pd.DataFrame], TableRows]
) -> np.ndarray:
    """The response of each row, (n,).

    Args:
        data: the rows, stacked where there are several responses.
        response: the left side of the formula.
        traits: the responses, where there are several.
        rows: makes rows of some of a table.
    """
    if not traits:
        return data.response(response)
    found = np.empty(len(data))
    for name, node in traits:
        own = (data.table[TRAIT] == name).to_numpy()
        found[own] = rows(data.table[own]).response(node)
    return found
