"""What a formula learns from a table, or from one that comes in chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import pandas as pd

from openreml_nn.support.errors import InputError
from openreml_nn.table.columns import check_constants, single
from openreml_nn.table.encoded import Encoded, RandomDesign
from openreml_nn.table.encoding import Encoding
from openreml_nn.table.factors import occurring
from openreml_nn.table.formula import RandomPart
from openreml_nn.table.groups import check_relations, grow_groups
from openreml_nn.table.learned import Group, Learned
from openreml_nn.table.levels import label, number_key
from openreml_nn.table.relation import Known
from openreml_nn.table.rows import TableRows
from openreml_nn.table.traits import check_traits, complete_rows

__all__ = ["Encoder", "group_key"]


class Encoder(Encoding):
    """What a formula makes of a table, learned from one table and applied to any.

    Args:
        formula: an lme4-style formula.
        categorical: numeric columns to be taken as factors.
        source: what messages call the table.
        residual: structure of the residuals, see :func:`parse_residual`; one variance by default.
        weights: column of weights: the residual variance of a row is divided by its weight.
        known_residual: whether the residual variance is known, so that a random effect may have
            as many levels as there are rows.
        relations: the known matrices between levels: ``ped`` that of a pedigree, all others by the
            name that ``vm`` gives them.

    Attributes:
        learned: what was learned from the table of the fit, a :class:`Learned`.
        orders: how the labels of each grouping column are sorted where the table came in chunks:
            as ``number``, as ``text``, or by the ranks of a categorical.

    Raises:
        InputError: if the formula does not parse.
    """

    def __init__(
        self,
        formula: str,
        categorical: Sequence[str] = (),
        source: str = "the table",
        residual: str | None = None,
        weights: str | None = None,
        known_residual: bool = False,
        relations: Mapping[str, Known] | None = None,
    ) -> None:
        super().__init__(formula, categorical, source, residual, weights, relations)
        self.known_residual = known_residual
        self.orders: dict[str, str | dict[str, int]] = {}

    def fit(self, table: pd.DataFrame) -> Encoded:
        """Learn from a table and encode it.

        Rows with a missing value in a column that the formula uses are left out, with a warning
        that counts them.

        Raises:
            InputError: if a column is missing or of the wrong kind, a value is infinite, a factor
                has one level, or no row is left.
        """
        self.learned = Learned()
        self._learn_relations()
        self._learn_others(table)
        kept, rows, dropped = complete_rows(
            table, self.columns(), self.categorical, self.source, self.formula.traits
        )
        check_traits(kept, self.formula.traits, self.source)
        data = self._rows(kept)
        self.learned.factors.update(occurring([data], self._effects))
        encoded = self._encoded(data, rows, dropped, len(kept) - 1, fitting=True)
        for design in encoded.random:
            self.check_size(design, len(kept))
        self._learn_means(data)
        return encoded

    def more(self, table: pd.DataFrame) -> Encoded:
        """Encode rows that come after a fit, and learn the new levels of their groups; rows with
        missing values are left out, with a warning.

        Raises:
            InputError: as :meth:`transform`, or if the response or the weights are missing.
        """
        kept, rows, dropped = complete_rows(
            table, self.columns(), self.categorical, self.source, self.formula.traits
        )
        data = self._rows(kept)
        grow_groups(self._parts(data), data, self.learned)
        return self._encoded(data, rows, dropped)

    def survey(self, chunks: Iterable[pd.DataFrame]) -> None:
        """Learn the levels of factors among the effects from a table that comes in chunks.

        Raises:
            InputError: as :meth:`fit` does.
        """
        if self.formula.traits:
            raise InputError(
                f"formula {self.formula.text!r}: cbind() is not for a table in chunks: expected one "
                "with a row for each response"
            )
        self.learned, self.orders = Learned(), {}
        self._learn_relations()
        rest = iter(chunks)
        for first in rest:
            self._learn_others(first)
            parts = map(self._part, chain([first], rest))
            tables = (self._rows(part) for part in parts if len(part))
            self.learned.factors.update(occurring(tables, self._effects))

    def encode(self, chunk: pd.DataFrame) -> Encoded:
        """Encode a chunk after a survey; the levels of its groups are those that it has.

        Rows with missing values are left out without a word.
        """
        self.learned.groups.clear()
        kept = self._part(chunk)
        data = self._rows(kept)
        for part in self.formula.random:
            for name in part.factors:
                self._learn_order(name, data)
        return self._encoded(data, np.arange(len(kept)), len(chunk) - len(kept), fitting=True)

    def _learn_order(self, name: str, data: TableRows) -> None:
        column = data.table[name]
        if isinstance(column.dtype, pd.CategoricalDtype):
            ranks = self.orders.setdefault(name, {})
            if isinstance(ranks, dict):
                for category in column.cat.categories:
                    ranks.setdefault(label(category), len(ranks))
        elif data.labels(name).key is number_key:
            self.orders.setdefault(name, "number")
        elif len(data):
            self.orders[name] = "text"

    def sort_key(self, name: str) -> Callable[[str], Any]:
        """What the labels of a grouping column are sorted by."""
        order = self.orders.get(name, "text")
        if isinstance(order, dict):
            return order.__getitem__
        return number_key if order == "number" else str

    def learn_group(self, part: RandomPart, labels: Sequence[tuple[str, ...]]) -> None:
        """Take the levels that a group has in all chunks, in order, as labels of its columns.

        Raises:
            InputError: if a group has one level.
        """
        if len(labels) < 2:
            raise self._one_level(part.group)
        columns: list[list[str]] = []
        total = np.zeros(len(labels), dtype=np.int64)
        for name, parts in zip(part.factors, zip(*labels, strict=True), strict=True):
            known = sorted(set(parts), key=self.sort_key(name))
            at = {item: i for i, item in enumerate(known)}
            total = total * len(known) + np.array([at[item] for item in parts])
            columns.append(known)
        self.learned.groups[group_key(part)] = Group(columns, total.tolist())

    def _part(self, chunk: pd.DataFrame) -> pd.DataFrame:
        """The complete rows of a chunk."""
        self._learn_others(chunk)
        columns = self.columns()
        for name in columns:
            single(chunk, name, self.source)
        return chunk[chunk[columns].notna().all(axis=1)]

    def _learn_relations(self) -> None:
        """The known matrices between levels, which a checkpoint needs as well."""
        check_relations(self.formula.random, self.relations)
        for name, known in self.relations.items():
            self.learned.relations[name] = [known.matrix, known.is_inverse]

    def _learn_others(self, table: pd.DataFrame) -> None:
        """The columns that '.' stands for: those that the formula does not name elsewhere."""
        check_constants(self.formula.text, table, self.source)
        if self.formula.fixed.is_open and not self.learned.others:
            named = {name for name in self.columns() if name != "."}
            names = [str(name) for name in table.columns]
            self.learned.others = [name for name in dict.fromkeys(names) if name not in named]

    def _learn_means(self, data: TableRows) -> None:
        for name in self.fixed.columns:
            if self.learned.kinds.get(name) == "number":
                self.learned.means[name] = float(data.numbers(name).mean())

    def _one_level(self, group: str) -> InputError:
        return InputError(
            f"{self.source}: grouping factor {group!r} has one level: a random effect needs two"
        )

    def check_size(self, design: RandomDesign, n: int) -> None:
        """Raise if a random effect has one level, or as many effects as there are rows."""
        if (design.structure.name, len(design.levels)) == ("idv", 1):
            return  # a spline has one level
        if len(design.levels) < 2:
            raise self._one_level(design.group)
        if design.relation is not None:
            return  # which tells levels from the residual
        size = len(design.levels) * len(design.effects)
        if size >= n and not self.known_residual:
            raise InputError(
                f"{self.source}: {design.group!r} has {len(design.levels)} levels x "
                f"{len(design.effects)} effects for {n} rows: they cannot be told from the residual"
            )


def group_key(part: RandomPart) -> str:
    """The group by its columns, in backticks where they need them."""
    return part.grouping.key
