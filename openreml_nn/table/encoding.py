"""A formula with what it learned, applied to any table."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch

from openreml_nn.support.errors import InputError
from openreml_nn.support.warning import warn
from openreml_nn.table.algebra import Part
from openreml_nn.table.columns import single
from openreml_nn.table.encoded import Encoded, ResidualDesign
from openreml_nn.table.factors import check_known, known_rows
from openreml_nn.table.formula import MixedFormula, RandomPart, parse_formula
from openreml_nn.table.groups import ordered_effects, random_designs, skeletons
from openreml_nn.table.learned import Learned
from openreml_nn.table.levels import coded
from openreml_nn.table.matrix import Coding, codings, model_matrix
from openreml_nn.table.reading import TableFile, given_table
from openreml_nn.table.relation import Known
from openreml_nn.table.residual import residual_design, residual_positions
from openreml_nn.table.rows import TableRows, offset_of, weights_of
from openreml_nn.table.structure import parse_residual
from openreml_nn.table.syntax import Call, Name, bare, names_in
from openreml_nn.table.text import Dialect
from openreml_nn.table.traits import TRAIT, WITHIN_UNIT, complete_rows, response_of

__all__ = ["Encoding", "read_as"]


class Encoding:
    """A formula with what it learned, applied to tables; an :class:`Encoder` learns.

    Args, Attributes, Raises:
        formula, categorical, source, residual, weights, relations, learned: see :class:`Encoder`.
        dialect: how the file of the fit is written, and so those of other rows; None where there was
            none.
        categories: numbers of the categories of a family's response; None where it has numbers.
    """

    dialect: Dialect | None = None
    categories: Mapping[Any, int] | None = None

    def __init__(
        self,
        formula: str,
        categorical: Sequence[str] = (),
        source: str = "the table",
        residual: str | None = None,
        weights: str | None = None,
        relations: Mapping[str, Known] | None = None,
    ) -> None:
        self.formula: MixedFormula = parse_formula(formula)
        given = (categorical,) if isinstance(categorical, str) else categorical
        self.categorical = tuple(map(bare, given))
        self.source = source
        if residual is None and self.formula.traits:
            residual = WITHIN_UNIT
        self.residual = None if residual is None else parse_residual(residual)
        self.weights = None if weights is None else bare(weights)
        self.relations = dict(relations or {})
        self.learned = Learned()

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
        kept, rows, dropped = complete_rows(
            table, columns, self.categorical, self.source, self.formula.traits, held_out
        )
        data = self._rows(kept)
        if held_out:
            known = known_rows(data, self._effects(data))
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
        check_known(data, [self.fixed])
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

    def _columns(self, response: bool) -> list[str]:
        found = names_in(self.formula.response) if response else []
        found += self.fixed.columns
        for part in self.formula.random:
            found += [name for each in part.parts for name in each.columns]
            found += [*part.factors, *part.grouping.weights]
        if response and self.residual is not None:
            found += self.residual.columns
        if response and self.weights is not None:
            found.append(self.weights)
        return list(dict.fromkeys(found))

    def _has(self, table: pd.DataFrame, columns: Sequence[str]) -> bool:
        """Whether the table has the response in every row, as numbers."""
        if not all(c in table.columns for c in columns) or table[list(columns)].isna().any(
            axis=None
        ):
            return False
        try:
            self._response(self._rows(table))
        except InputError:
            return False
        return True

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
        check_known(data, [self.fixed, *(each for part in parts for each in part.parts)])
        y = self._response(data) if response else None
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
            weights_of(data, self.weights),
            offset_of(data, self.fixed.offsets),
            {d.group: count for d in random if d.coordinates is None and (count := d.unseen_rows)},
            trait=data.table[TRAIT].astype(str).to_numpy() if self.formula.traits else None,
        )

    def _response(self, data: TableRows) -> np.ndarray:
        """The response of each row."""
        return response_of(data, self.formula.response, self.formula.traits, self._rows)

    def _rows(self, table: pd.DataFrame) -> TableRows:
        text = self.formula.text
        return TableRows(table, self.source, self.learned, self.categorical, text)

    def _parts(self, data: TableRows) -> list[RandomPart]:
        """The random parts, with factors in place of numbers where a structure asks for them."""
        return [ordered_effects(part, data) for part in self.formula.random]

    def _warn(self, what: str) -> None:
        warn(f"{self.source}: {what}")

    def _effects(self, data: TableRows) -> list[Part]:
        """The operands of the fixed effects and of each random part."""
        return [self.fixed, *(each for part in self._parts(data) for each in part.parts)]


Learner = TypeVar("Learner", bound=Encoding)


def read_as(
    encoder: Learner, table: pd.DataFrame | str | os.PathLike[str] | TableFile
) -> tuple[Learner, pd.DataFrame]:
    """Other rows, which are read as those of the fit were where no more than a path is given, and the
    encoder with messages that name them.

    Raises:
        TypeError, InputError: as :func:`given_table`.
    """
    found = given_table(table, encoder.dialect)
    encoder = copy.copy(encoder)
    encoder.source = found.source
    return encoder, found.frame
