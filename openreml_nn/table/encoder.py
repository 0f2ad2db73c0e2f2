"""What a formula makes of a table: learned from one table, applied to any."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from openreml_nn.support.errors import InputError
from openreml_nn.table.algebra import Part
from openreml_nn.table.columns import numbers, single
from openreml_nn.table.encoded import Encoded, RandomDesign, ResidualDesign
from openreml_nn.table.expressions import as_numbers
from openreml_nn.table.formula import MixedFormula, RandomPart, parse_formula
from openreml_nn.table.groups import (
    check_relations,
    ordered_effects,
    random_designs,
    skeletons,
)
from openreml_nn.table.learned import Group, Learned
from openreml_nn.table.levels import Factor, coded, label, number_key
from openreml_nn.table.matrix import Coding, codings, model_matrix
from openreml_nn.table.relation import Known
from openreml_nn.table.residual import residual_design, residual_positions
from openreml_nn.table.rows import TableRows
from openreml_nn.table.structure import parse_residual
from openreml_nn.table.syntax import Call, Name, Node, names_in

__all__ = ["Encoder", "group_key"]


class Encoder:
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
        self.formula: MixedFormula = parse_formula(formula)
        self.categorical = (categorical,) if isinstance(categorical, str) else tuple(categorical)
        self.source = source
        self.residual = None if residual is None else parse_residual(residual)
        self.weights = weights
        self.known_residual = known_residual
        self.relations = dict(relations or {})
        self.learned = Learned()
        self.orders: dict[str, str | dict[str, int]] = {}

    # ------------------------------------------------------------------ learning

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
        kept, rows, dropped = self._complete(table, self.columns())
        data = self._rows(kept)
        self._learn_factors([data])
        encoded = self._encoded(data, rows, dropped, len(kept) - 1, fitting=True)
        for design in encoded.random:
            self.check_size(design, len(kept))
        self._learn_means(data)
        return encoded

    def survey(self, chunks: Iterable[pd.DataFrame]) -> None:
        """Learn the levels of factors among the effects from a table that comes in chunks.

        Raises:
            InputError: as :meth:`fit` does.
        """
        self.learned, self.orders = Learned(), {}
        self._learn_relations()
        rest = iter(chunks)
        for first in rest:
            self._learn_others(first)
            parts = map(self._part, chain([first], rest))
            self._learn_factors(self._rows(part) for part in parts if len(part))

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
        if self.formula.fixed.is_open and not self.learned.others:
            named = {name for name in self.columns() if name != "."}
            names = [str(name) for name in table.columns]
            self.learned.others = [name for name in dict.fromkeys(names) if name not in named]

    def _learn_factors(self, tables: Iterable[TableRows]) -> None:
        """The levels that occur of the categorical variables among the effects."""
        variables: dict[str, Node] = {}
        met: dict[str, tuple[Factor, set[str]]] = {}
        first = True
        for data in tables:
            if first:
                parts = (self.fixed, *(part.effects for part in self._parts(data)))
                variables = {str(v): v for part in parts for term in part.terms for v in term}
            for key, node in (variables if first else {k: variables[k] for k in met}).items():
                value = data.variable(node)
                if not isinstance(value, Factor):
                    continue
                used = np.bincount(value.codes[value.codes >= 0], minlength=len(value.levels))
                factor, seen = met.get(key, (value, set()))
                levels = list(dict.fromkeys([*factor.levels, *value.levels]))
                seen |= {level for level, n in zip(value.levels, used, strict=True) if n}
                met[key] = (Factor(value.codes, levels, value.key), seen)
                if (value.codes < 0).any():
                    self._refuse(data, node, value)
                if isinstance(node, Name):
                    data.check_labels(node)
            first = False
            if not met:
                break
        for key, (factor, seen) in met.items():
            order = factor.levels if factor.key is None else sorted(factor.levels, key=factor.key)
            levels = [level for level in order if level in seen]
            node = variables[key]
            if isinstance(node, Call) and node.function == "relevel" and order[0] not in seen:
                raise InputError(f"{self.source}: {key!r}: {order[0]!r} is no level of it")
            if len(levels) < 2:
                what = f"column {node.name!r}" if isinstance(node, Name) else repr(key)
                shown = f"one level, {levels[0]!r}" if levels else "no level"
                raise InputError(f"{self.source}: {what} has {shown}: a factor needs two")
            self.learned.factors[key] = levels

    def _learn_means(self, data: TableRows) -> None:
        for name in self.fixed.columns:
            if self.learned.kinds.get(name) == "number":
                self.learned.means[name] = float(data.numbers(name).mean())

    # ------------------------------------------------------------------ applying

    def transform(self, table: pd.DataFrame, held_out: bool = False) -> Encoded:
        """Encode another table; groups' unknown levels get the code -1, and are counted.

        The response is encoded where the table has it in all rows. So are weights where it has
        their column, and positions of the residuals where their variances differ and it has theirs.

        Args:
            table: with the columns of the effects and groups.
            held_out: whether its rows are to be compared with their responses: rows that miss it,
                or are of a level of the fixed effects that the fit has not, are then left out.

        Raises:
            InputError: if a column is missing, or a level of the fixed effects unknown.
        """
        response = names_in(self.formula.response)
        columns = self._columns(response=held_out)
        if not held_out and self.weights is not None and self.weights in table:
            columns.append(self.weights)
        kept, rows, dropped = self._complete(table, columns)
        data = self._rows(kept)
        if held_out:
            known = self._known(data)
            if not known.all():
                self._warn(f"{int((~known).sum())} held-out rows of unknown levels left out")
                kept, rows, dropped = kept[known], rows[known], dropped + int((~known).sum())
                data = self._rows(kept)
        encoded = self._encoded(data, rows, dropped, response=held_out or self._has(kept, response))
        if encoded.unseen and not held_out:
            each = ", ".join(f"{group} in {n}" for group, n in encoded.unseen.items())
            self._warn(
                f"levels that the fit did not see: of {each} of {len(kept)} rows; their random "
                "effects are predicted as 0"
            )
        return encoded

    def fixed_matrix(self, table: pd.DataFrame) -> np.ndarray:
        """The model matrix of the fixed effects for a table that has their columns."""
        data = self._rows(table)
        self._check_known(data, [self.fixed])
        return model_matrix(self.fixed, data)[0]

    def fixed_codings(self, table: pd.DataFrame) -> list[list[Coding]]:
        """How the variables of each term of the fixed effects are coded, see :func:`codings`."""
        return codings(self.fixed, self._rows(table))

    @property
    def fixed(self) -> Part:
        """The fixed effects, with columns in place of '.'."""
        return self.formula.fixed.of(self.learned.others)

    @property
    def fixed_levels(self) -> dict[str, list[str]]:
        """The levels of the columns that are factors in the fixed effects, also as ``C(x)``."""
        found = {}
        for node in self.fixed.variables:
            levels = self.learned.factors.get(str(node))
            made = isinstance(node, Call) and node.function in (
                "C", "factor", "as.factor", "relevel",
            )  # fmt: skip
            names = names_in(node)
            if levels is not None and len(names) == 1 and (made or isinstance(node, Name)):
                found[names[0]] = levels
        return found

    def cells(self, table: pd.DataFrame) -> pd.DataFrame:
        """The combinations of levels of the factors of the fixed effects that occur in a table."""
        found = {
            name: coded(single(table, name, self.source), levels).labels()
            for name, levels in self.fixed_levels.items()
        }
        return pd.DataFrame(found).drop_duplicates(ignore_index=True)

    def columns(self) -> list[str]:
        """The columns that a fit needs."""
        return self._columns(response=True)

    def skeleton(self, rows: int, columns: int) -> Encoded:
        """Data of the learned shapes without content, to build a module before it is loaded."""
        random = skeletons(self.formula.random, rows, self.learned)
        residual = None
        if self.residual is not None:
            residual = ResidualDesign.from_dict(self.learned.residual, rows)
        weights = None if self.weights is None else torch.ones(rows, dtype=torch.float64)
        X = torch.zeros(rows, columns, dtype=torch.float64)
        names = tuple(map(str, range(columns)))
        return Encoded(None, X, names, random, np.arange(rows), 0, residual, weights)

    # ------------------------------------------------------------------ rows

    def _rows(self, table: pd.DataFrame) -> TableRows:
        text = self.formula.text
        return TableRows(table, self.source, self.learned, self.categorical, text)

    def _columns(self, response: bool) -> list[str]:
        found = names_in(self.formula.response) if response else []
        found += self.fixed.columns
        for part in self.formula.random:
            found += [*part.effects.columns, *part.factors]
        if response and self.residual is not None:
            found += self.residual.columns
        if response and self.weights is not None:
            found.append(self.weights)
        return list(dict.fromkeys(found))

    def _complete(
        self, table: pd.DataFrame, columns: Sequence[str]
    ) -> tuple[pd.DataFrame, np.ndarray, int]:
        """Rows without missing values, and where they stood."""
        if not isinstance(table, pd.DataFrame):
            raise TypeError(f"{self.source} is a {type(table).__name__}: expected a data frame")
        for name in (*columns, *(c for c in self.categorical if c not in columns)):
            single(table, name, self.source)
        present = table[list(columns)].notna().all(axis=1).to_numpy()
        rows = np.flatnonzero(present)
        dropped = len(table) - len(rows)
        if not len(rows) and len(table):
            emptiest = table[list(columns)].isna().sum().idxmax()
            raise InputError(
                f"{self.source}: every row has a missing value, most in column {emptiest!r}"
            )
        if dropped:
            self._warn(f"{dropped} of {len(table)} rows left out, which miss a value")
        return (table.iloc[rows] if dropped else table), rows, dropped

    def _warn(self, what: str) -> None:
        warnings.warn(f"{self.source}: {what}", RuntimeWarning, stacklevel=4)

    def _has(self, table: pd.DataFrame, columns: Sequence[str]) -> bool:
        """Whether the table has the response in every row, as numbers."""
        if not all(c in table.columns for c in columns) or table[list(columns)].isna().any(
            axis=None
        ):
            return False
        try:
            self._rows(table).response(self.formula.response)
        except InputError:
            return False
        return True

    def _known(self, data: TableRows) -> np.ndarray:
        """Rows whose levels of the factors among the effects are known."""
        known = np.ones(len(data), dtype=bool)
        for part in (self.fixed, *(part.effects for part in self._parts(data))):
            for node in part.variables:
                value = data.variable(node)
                if isinstance(value, Factor):
                    known &= value.codes >= 0
        return known

    def _check_known(self, data: TableRows, parts: Iterable[Part]) -> None:
        for part in parts:
            for node in part.variables:
                value = data.variable(node)
                if isinstance(value, Factor) and (value.codes < 0).any():
                    self._refuse(data, node, value)

    def _refuse(self, data: TableRows, node: Node, value: Factor) -> None:
        """Raise for a row of an unknown level."""
        at = int(np.argmax(value.codes < 0))
        names = names_in(node)
        shown = data.labels(names[0]).labels()[at]
        what = f"column {names[0]!r}" if isinstance(node, Name) else f"{str(node)!r}"
        raise InputError(
            f"{self.source}: {what} has the level {shown!r} in row {data.row(at)}, which the model "
            f"does not know: expected one of {value.levels[:10]}"
        )

    # ------------------------------------------------------------------ values

    def _encoded(
        self,
        data: TableRows,
        rows: np.ndarray,
        dropped: int,
        most: int | None = None,
        response: bool = True,
        fitting: bool = False,
    ) -> Encoded:
        parts = self._parts(data)
        self._check_known(data, [self.fixed, *(part.effects for part in parts)])
        y = data.response(self.formula.response) if response else None
        X, names = model_matrix(self.fixed, data, most)
        self.learned.names = list(names)
        random = random_designs(parts, data, self.learned, self.relations)
        residual = None
        if fitting and self.residual is not None:
            residual = residual_design(self.residual, data)
            self.learned.residual = residual.to_dict()
        elif self.residual is not None:
            residual = residual_positions(self.residual, data, self.learned.residual)
        return Encoded(
            None if y is None else torch.from_numpy(np.array(y)),
            torch.from_numpy(X),
            names,
            random,
            rows,
            dropped,
            residual,
            self._weights(data),
            self._offset(data),
            {d.group: count for d in random if (count := int((d.codes < 0).sum()))},
        )

    def _offset(self, data: TableRows) -> Tensor | None:
        if not self.fixed.offsets:
            return None
        with np.errstate(all="ignore"):
            total = np.zeros(len(data)) + sum(as_numbers(o, data) for o in self.fixed.offsets)
        bad = np.flatnonzero(~np.isfinite(total))
        if len(bad):
            raise data.fault(f"the offset is {total[bad[0]]:g} in row {data.row(int(bad[0]))}")
        return torch.from_numpy(total)

    def _weights(self, data: TableRows) -> Tensor | None:
        if self.weights is None or self.weights not in data.table.columns:
            return None
        what = f"{self.source}: the weight {self.weights!r}"
        found = numbers(single(data.table, self.weights, self.source), what, data.table)
        bad = np.flatnonzero(~(np.isfinite(found) & (found > 0)))
        if len(bad):
            raise InputError(
                f"{what} is {found[bad[0]]:g} in row {data.row(int(bad[0]))}: expected a positive "
                "number"
            )
        return torch.from_numpy(found)

    # ------------------------------------------------------------------ groups

    def _parts(self, data: TableRows) -> list[RandomPart]:
        """The random parts, with factors in place of numbers where a structure asks for them."""
        return [ordered_effects(part, data) for part in self.formula.random]

    def _one_level(self, group: str) -> InputError:
        return InputError(
            f"{self.source}: grouping factor {group!r} has one level: a random effect needs two"
        )

    def check_size(self, design: RandomDesign, n: int) -> None:
        """Raise if a random effect has one level, or as many effects as there are rows."""
        if design.relation is not None or (design.structure.name, len(design.levels)) == ("idv", 1):
            return  # relations tell levels from the residual; a spline has one level
        if len(design.levels) < 2:
            raise self._one_level(design.group)
        size = len(design.levels) * len(design.effects)
        if size >= n and not self.known_residual:
            raise InputError(
                f"{self.source}: {design.group!r} has {len(design.levels)} levels x "
                f"{len(design.effects)} effects for {n} rows: they cannot be told from the residual"
            )


def group_key(part: RandomPart) -> str:
    """The group by its columns, in backticks where they need them."""
    return part.grouping.key
