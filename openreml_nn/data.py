"""From a table and a formula to tensors, a covariance tree, and back to names."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import formulaic
import numpy as np
import pandas as pd
import torch
from torch import Tensor

from openreml_nn.covariance import (
    AR1Matrix,
    CompoundSymmetricMatrix,
    CovariancePropagation,
    DiagonalMatrix,
    DummyMatrix,
    IdentityMatrix,
    KroneckerProduct,
    Matrix,
    ScalarMatrix,
    Sum,
    UnstructuredMatrix,
    weighted,
)
from openreml_nn.covariance.structures import in_cells
from openreml_nn.errors import InputError
from openreml_nn.estimation.result import Label
from openreml_nn.formula import (
    MixedFormula,
    RandomPart,
    check_formula,
    columns_of,
    parse_formula,
    parse_residual,
)

__all__ = ["Encoded", "Encoder", "RandomDesign", "ResidualDesign", "read_table"]

_FUNCTIONS: dict[str, Any] = {
    "sqrt": np.sqrt, "abs": np.abs, "log1p": np.log1p, "sin": np.sin, "cos": np.cos, "tan": np.tan,
    "factor": formulaic.transforms.TRANSFORMS["C"],
}  # fmt: skip


def read_table(path: str | os.PathLike[str]) -> pd.DataFrame:
    """Read a CSV file (also compressed) or a Parquet file by its suffix.

    Raises:
        InputError: if the file is missing, of another kind, empty or broken.
    """
    file = Path(path)
    if not file.is_file():
        what = "is a directory" if file.is_dir() else "does not exist"
        raise InputError(f"file {str(path)!r} {what}: expected a CSV or Parquet file")
    suffixes = [suffix.lower() for suffix in file.suffixes]
    read: Callable[[Path], pd.DataFrame]
    if suffixes[-1:] == [".parquet"]:
        read = pd.read_parquet
    elif ".csv" in suffixes[-2:] or suffixes[-1:] in ([".tsv"], [".txt"]):
        separator = "," if ".csv" in suffixes else r"\s+"
        separator = "\t" if ".tsv" in suffixes else separator

        def read(file: Path) -> pd.DataFrame:
            with warnings.catch_warnings():
                # A row with more fields than the header would lose the last.
                warnings.simplefilter("error", pd.errors.ParserWarning)
                index = False if separator == "," else None
                return pd.read_csv(file, sep=separator, index_col=index)
    else:
        raise InputError(f"file {str(path)!r}: expected a name ending in .csv, .csv.gz or .parquet")
    try:
        table = read(file)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"file {str(path)!r} cannot be read: {reason}") from None
    if not len(table) or not len(table.columns):
        raise InputError(f"file {str(path)!r} has no rows")
    table.columns = [str(column) for column in table.columns]
    return table


@dataclass(frozen=True)
class RandomDesign:
    """The design of one random-effects term.

    Attributes:
        name: name of its operand in the covariance tree, unique.
        group: grouping factor as written.
        effects: names of its k effects.
        levels: labels of its levels.
        codes: (n,) level of each row; -1 for a level that was not seen.
        values: (n, k) values of the effects.
    """

    name: str
    group: str
    effects: tuple[str, ...]
    levels: tuple[str, ...]
    codes: Tensor
    values: Tensor

    @property
    def is_intercept(self) -> bool:
        """Whether the only effect is the intercept."""
        return self.effects == ("(Intercept)",)


@dataclass(frozen=True)
class ResidualDesign:
    """The structure of the residuals.

    Attributes:
        kind: ``ar1``, ``cs``, ``us`` or ``diag``.
        codes: (n,) cell of each row: its group, times the number of positions, plus its position.
        groups: number of groups.
        positions: labels of the positions.
    """

    kind: str
    codes: Tensor
    groups: int
    positions: tuple[str, ...]

    def covariance(self) -> Matrix:
        """The covariance of the rows."""
        size = len(self.positions)
        matrix: Matrix = {
            "ar1": AR1Matrix,
            "cs": CompoundSymmetricMatrix,
            "us": UnstructuredMatrix,
            "diag": DiagonalMatrix,
        }[self.kind](size)
        return in_cells(self.codes, self.groups, matrix)


@dataclass(frozen=True)
class Encoded:
    """A table as tensors.

    Attributes:
        y: response (n,), or None where the table has none.
        X: model matrix of the fixed effects (n, p).
        names: names of its columns.
        random: designs of the random effects.
        rows: positions of the kept rows in the table.
        dropped_rows: rows left out because of missing values.
        residual: structure of the residuals; None for one variance.
        weights: (n,) weights of the rows; None for equal ones.
    """

    y: Tensor | None
    X: Tensor
    names: tuple[str, ...]
    random: tuple[RandomDesign, ...]
    rows: np.ndarray
    dropped_rows: int
    residual: ResidualDesign | None = None
    weights: Tensor | None = None

    def covariance(self) -> Matrix:
        r"""The covariance tree :math:`\sum_t Z_t (I \otimes \Sigma_t) Z_t^\top + R`."""
        parts: dict[str, Matrix] = {}
        for design in self.random:
            q = len(design.levels)
            k = len(design.effects)
            values = None if design.is_intercept else design.values
            parts[design.name] = CovariancePropagation(
                z=DummyMatrix.from_codes(design.codes, design.levels, values),
                g=ScalarMatrix(q)
                if k == 1
                else KroneckerProduct(levels=IdentityMatrix(q), effects=UnstructuredMatrix(k)),
            )
        if self.residual is not None:
            parts["residual"] = self.residual.covariance()
        elif self.weights is not None:
            parts["residual"] = weighted(self.weights)
        else:
            parts["residual"] = ScalarMatrix(len(self.X))
        return Sum(parts).to(self.X.dtype)

    def batch(self) -> dict[str, Any]:
        """The table as a batch of :class:`MixedModel`: ``x`` the model matrix, ``y``, and for
        each random effect its codes in ``groups`` and its values in ``values``."""
        found = {
            "x": self.X,
            "groups": {d.name: d.codes for d in self.random},
            "values": {d.name: d.values for d in self.random},
        }
        return found if self.y is None else {"y": self.y, **found}

    @property
    def labels(self) -> dict[str, Label]:
        """Names for the tables of :func:`fit_reml`, by operand."""
        found = {d.name: Label(d.group, d.effects, d.levels) for d in self.random}
        if self.residual is not None:
            found["residual"] = Label("Residual", self.residual.positions, ())
        return found


class Encoder:
    """What a formula makes of a table, learned from one table and applied to any.

    Args:
        formula: an lme4-style formula.
        categorical: numeric columns to be taken as factors.
        source: what messages call the table.
        residual: structure of the residuals, see :func:`parse_residual`; one variance by default.
        weights: column of weights: the residual variance of a row is divided by its weight.

    Attributes:
        state: what was learned, as plain numbers and strings: levels of
            factors and groups, and the state of transforms such as ``scale``.

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
    ) -> None:
        self.formula: MixedFormula = parse_formula(formula)
        self.categorical = tuple(categorical)
        self.source = source
        self.residual = None if residual is None else parse_residual(residual)
        self.weights = weights
        if residual is not None and weights is not None:
            raise InputError("`weights` are for residuals of one variance: leave out `residual`")
        self.state: dict[str, Any] = {}

    # ------------------------------------------------------------------ learning and applying

    def fit(self, table: pd.DataFrame, categories: dict[str, list[str]] | None = None) -> Encoded:
        """Learn from a table and encode it.

        With ``categories``, the levels of the factors among the fixed effects, the
        table is one part of several, and need not have levels and rows enough for a fit.

        Rows with a missing value in a column that the formula uses are left
        out, with a warning that counts them.

        Raises:
            InputError: if a column is missing or of the wrong kind, a value is
                infinite, a factor has one level, or no row is left.
        """
        whole = categories is None
        self.state = {"categories": {}, "transforms": {}, "groups": {}, "effects": {}}
        kept, rows, dropped = self._complete(table, self._columns(response=True))
        self.state["categories"] = self.levels_of(kept) if categories is None else categories
        kept = self._with_categories(kept)
        y = self._response(kept)
        X, names = self._matrix(self.formula.fixed, kept, "fixed")
        random = self._random(kept)
        n = len(y)
        if whole:
            self._check_levels(random)
            for design in random:
                self._check_size(design, n)
        if whole and n <= X.shape[1]:
            raise InputError(
                f"{self.source}: {n} rows for {X.shape[1]} fixed effects: more rows are needed"
            )
        return Encoded(
            torch.from_numpy(y),
            torch.from_numpy(X),
            names,
            random,
            rows,
            dropped,
            self._residual(kept),
            self._weights(kept),
        )

    def transform(self, table: pd.DataFrame) -> Encoded:
        """Encode another table; groups' unknown levels get the code -1.

        The response is encoded where the table has it.
        """
        columns = self._columns(response=False)
        response = columns_of(self.formula.response, self.formula.text)
        has_response = all(column in table.columns for column in response)
        kept, rows, dropped = self._complete(table, columns)
        kept = self._with_categories(kept)
        X, names = self._matrix(self.formula.fixed, kept, "fixed")
        y = torch.from_numpy(self._response(kept)) if has_response else None
        return Encoded(y, torch.from_numpy(X), names, self._random(kept), rows, dropped)

    def fixed_matrix(self, table: pd.DataFrame) -> np.ndarray:
        """The model matrix of the fixed effects for a table that has their columns."""
        return self._matrix(self.formula.fixed, self._with_categories(table), "fixed")[0]

    def cells(self, table: pd.DataFrame) -> pd.DataFrame:
        """The combinations of levels of the learned factors that occur in a table."""
        found = {}
        for name, categories in self.state["categories"].items():
            labels = np.asarray([*categories, None], dtype=object)
            found[name] = labels[_coded(table[name], categories)[0]]
        return pd.DataFrame(found).drop_duplicates(ignore_index=True)

    def skeleton(self, rows: int, columns: int) -> Encoded:
        """Data of the learned shapes without content, to build a module before it is loaded."""
        designs = []
        for name, key, part in self._operands():
            known = self.state["groups"][part.group]
            effects = tuple(self.state["effects"][key])
            levels = _cell_labels(np.asarray(known["cells"]), known["columns"])
            codes = torch.arange(rows) % len(levels)
            values = torch.ones(rows, len(effects), dtype=torch.float64)
            designs.append(RandomDesign(name, part.group, effects, levels, codes, values))
        X = torch.zeros(rows, columns, dtype=torch.float64)
        names = tuple(map(str, range(columns)))
        return Encoded(
            None, X, names, tuple(designs), np.arange(rows), 0, *self._residual_skeleton(rows)
        )

    def _residual_skeleton(self, rows: int) -> tuple[ResidualDesign | None, Tensor | None]:
        if self.weights is not None:
            return None, torch.ones(rows, dtype=torch.float64)
        if self.residual is None:
            return None, None
        positions = tuple(self.state["residual"])
        codes = torch.arange(rows) * len(positions)
        return ResidualDesign(self.residual.kind, codes, rows, positions), None

    # ------------------------------------------------------------------ columns

    def _columns(self, response: bool) -> list[str]:
        text = self.formula.text
        found = columns_of(self.formula.response, text) if response else []
        found += columns_of(self.formula.fixed, text)
        for part in self.formula.random:
            found += [*columns_of(part.effects, text), *part.factors]
        if response and self.residual is not None:
            found += self.residual.columns
        if response and self.weights is not None:
            found.append(self.weights)
        return list(dict.fromkeys(found))

    def _complete(
        self, table: pd.DataFrame, columns: Sequence[str]
    ) -> tuple[pd.DataFrame, np.ndarray, int]:
        """Rows without missing values, and where they stood."""
        for column in (*columns, *self.categorical):
            if column not in table.columns:
                near = ", ".join(map(str, table.columns[:20]))
                raise InputError(f"{self.source} has no column {column!r}: its columns are {near}")
        present = table.notna()[list(columns)].all(axis=1).to_numpy()
        rows = np.flatnonzero(present)
        dropped = len(table) - len(rows)
        if not len(rows):
            emptiest = table[list(columns)].isna().sum().idxmax()
            raise InputError(
                f"{self.source}: every row has a missing value, most in column {emptiest!r}"
            )
        if dropped:
            warnings.warn(
                f"{self.source}: {dropped} of {len(table)} rows left out, which miss a value",
                RuntimeWarning,
                stacklevel=4,
            )
        return table.iloc[rows], rows, dropped

    def _is_factor(self, column: pd.Series) -> bool:
        return (
            column.name in self.categorical
            or isinstance(column.dtype, pd.CategoricalDtype)
            or not pd.api.types.is_numeric_dtype(column)
            or pd.api.types.is_bool_dtype(column)
        )

    def _fixed_columns(self) -> list[str]:
        """Columns used outside of groups and the response."""
        text = self.formula.text
        found = columns_of(self.formula.fixed, text)
        for part in self.formula.random:
            found += columns_of(part.effects, text)
        return list(dict.fromkeys(found))

    def columns(self) -> list[str]:
        """Columns that a fit needs."""
        return self._columns(response=True)

    def fixed_factors(self, table: pd.DataFrame) -> list[str]:
        """Factors among the columns used outside of groups and the response."""
        return [name for name in self._fixed_columns() if self._is_factor(table[name])]

    def levels_of(self, table: pd.DataFrame) -> dict[str, list[str]]:
        """Levels of those factors.

        Raises:
            InputError: if a factor has one level.
        """
        found = {}
        for name in self._fixed_columns():
            if name in table.columns and self._is_factor(table[name]):
                _, found[name] = _coded(table[name].dropna())
                if len(found[name]) < 2:
                    raise InputError(
                        f"{self.source}: column {name!r} has one level, {found[name][0]!r}: "
                        "a factor needs two"
                    )
        return found

    def learn_levels(
        self,
        designs: Sequence[RandomDesign],
        levels: Sequence[Sequence[tuple[str, ...]]],
        categories: dict[str, list[str]],
        numeric: Mapping[str, bool],
    ) -> None:
        """Take the levels of all parts of a table.

        Args:
            designs: the random effects.
            levels: for each its levels, as tuples of the labels of their factors, numbers by
                size and all else by spelling.
            categories: levels of the factors among the fixed effects.
            numeric: which columns hold numbers.
        """
        self.state["categories"] = categories
        for design, labels in zip(designs, levels, strict=True):
            columns: list[list[str]] = []
            total = np.zeros(len(labels), dtype=np.int64)
            for name, parts in zip(design.group.split(":"), zip(*labels, strict=True), strict=True):
                known = sorted(set(parts), key=float if numeric.get(name) else None)
                at = {label: i for i, label in enumerate(known)}
                total = total * len(known) + np.array([at[label] for label in parts])
                columns.append(known)
            self.state["groups"][design.group] = {"columns": columns, "cells": total.tolist()}
        self._check_levels(designs)

    def _check_levels(self, designs: Sequence[RandomDesign]) -> None:
        for design in designs:
            if len(design.levels) < 2:
                raise InputError(
                    f"{self.source}: grouping factor {design.group!r} has one level: "
                    "a random effect needs two"
                )

    def _with_categories(self, table: pd.DataFrame) -> pd.DataFrame:
        """The table with factors as categoricals of the known levels."""
        table = table.copy(deep=False)
        for name, categories in self.state["categories"].items():
            codes, _ = _coded(table[name], categories)
            if (codes < 0).any():
                unknown = _label(table[name].iloc[int(np.argmax(codes < 0))])
                raise InputError(
                    f"{self.source}: column {name!r} has the level {unknown!r}, "
                    f"which the model does not know: expected one of {categories[:10]}"
                )
            table[name] = pd.Categorical.from_codes(codes, categories)
        return table

    # ------------------------------------------------------------------ values

    def _response(self, table: pd.DataFrame) -> np.ndarray:
        name = self.formula.response
        for column in columns_of(name, self.formula.text):
            series = table[column]
            if not pd.api.types.is_numeric_dtype(series):
                numbers = pd.to_numeric(series.astype(str), errors="coerce")
                bad = np.flatnonzero(numbers.isna().to_numpy())
                shown = (
                    f"{series.iloc[bad[0]]!r} in row {_row_name(table, bad[0])}"
                    if len(bad)
                    else "text"
                )
                raise InputError(
                    f"{self.source}: the response {column!r} is not numeric: found {shown}, "
                    "expected numbers"
                )
        y, _ = self._matrix(f"0 + {name}", table, "response")
        if y.shape[1] != 1:
            raise InputError(f"formula {self.formula.text!r}: the response must be one column")
        return y[:, 0].copy()

    def _matrix(
        self, part: str, table: pd.DataFrame, key: str
    ) -> tuple[np.ndarray, tuple[str, ...]]:
        """Evaluate a part without bars; column names as in R."""
        check_formula(part, self.formula.text)
        spec = formulaic.ModelSpec.from_spec(
            part, transform_state=self.state["transforms"].get(key, {}), na_action="ignore"
        )
        try:
            with np.errstate(all="ignore"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                matrix = spec.get_model_matrix(table, context=_FUNCTIONS)
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"{self.source}: {part!r} cannot be evaluated: {reason}") from None
        self.state["transforms"].setdefault(key, _plain(matrix.model_spec.transform_state))
        names = tuple(_r_name(column) for column in matrix.columns)
        try:
            values = np.array(matrix.to_numpy(dtype=np.float64), order="C")
        except (TypeError, ValueError):
            raise InputError(f"{self.source}: {part!r} does not yield numbers") from None
        bad = np.argwhere(~np.isfinite(values))
        if len(bad):
            row, column = bad[0]
            raise InputError(
                f"{self.source}: {names[column]!r} is {values[row, column]} "
                f"in row {_row_name(table, row)}: expected a finite number"
            )
        return values.reshape(len(table), -1), names

    # ------------------------------------------------------------------ groups

    def _operands(self) -> list[tuple[str, str, RandomPart]]:
        """Each random part with a unique operand name, without '/' and '.', and a key."""
        found = []
        used = {"residual": 1}
        for part in self.formula.random:
            base = re.sub(r"[/.]", "_", part.group)
            name = f"{base}_{used[base]}" if base in used else base
            used[base] = used.get(base, 0) + 1
            found.append((name, f"{part.effects} | {part.group}", part))
        return found

    def _random(self, table: pd.DataFrame) -> tuple[RandomDesign, ...]:
        designs: list[RandomDesign] = []
        grouped: dict[str, tuple[Tensor, tuple[str, ...]]] = {}
        for name, key, part in self._operands():
            if part.group not in grouped:
                grouped[part.group] = self._codes(part, table)
            codes, levels = grouped[part.group]
            values, effects = self._matrix(part.effects, table, key)
            if not effects:
                raise InputError(f"formula {self.formula.text!r}: ({key}) has no effect")
            self.state["effects"][key] = list(effects)
            z = torch.from_numpy(values)
            designs.append(RandomDesign(name, part.group, effects, levels, codes, z))
        return tuple(designs)

    def _codes(self, part: RandomPart, table: pd.DataFrame) -> tuple[Tensor, tuple[str, ...]]:
        """Level of each row; only combinations that occur are levels."""
        known = self.state["groups"].get(part.group)
        given = known["columns"] if known else [None] * len(part.factors)
        coded = [_coded(table[f], c) for f, c in zip(part.factors, given, strict=True)]
        columns = [categories for _, categories in coded]
        cell = np.zeros(len(table), dtype=np.int64)
        seen = np.ones(len(table), dtype=bool)
        for code, categories in coded:
            seen &= code >= 0
            cell = cell * len(categories) + code
        if known is not None:
            cells = np.asarray(known["cells"], dtype=np.int64)
        elif len(columns) == 1:
            cells = np.arange(len(columns[0]))
        else:
            cells = np.unique(cell)
        self.state["groups"][part.group] = {"columns": columns, "cells": cells.tolist()}
        levels = _cell_labels(cells, columns)
        if len(columns) == 1:
            return torch.from_numpy(cell), levels
        at = np.searchsorted(cells, cell).clip(max=len(cells) - 1)
        codes = np.where(seen & (cells[at] == cell), at, -1)
        return torch.from_numpy(codes), levels

    # ------------------------------------------------------------------ residuals

    def _residual(self, table: pd.DataFrame) -> ResidualDesign | None:
        """Cell of each row, learned and applied to one table only: prediction needs none."""
        part = self.residual
        if part is None:
            return None
        group = np.zeros(len(table), dtype=np.int64)
        for factor in part.group:
            code, categories = _coded(table[factor])
            group = group * len(categories) + code
        if part.kind == "diag":
            stratum, positions = group, categories
            if len(part.group) > 1:
                cells, stratum = np.unique(group, return_inverse=True)
                columns = [_coded(table[factor])[1] for factor in part.group]
                positions = list(_cell_labels(cells, columns))
            group, position = np.arange(len(table)), stratum
        else:
            group = pd.factorize(group)[0]
            if part.position is None:
                position = pd.Series(group).groupby(group).cumcount().to_numpy()
                positions = [str(i + 1) for i in range(int(position.max()) + 1)]
            else:
                position, positions = _coded(table[part.position])
        if len(positions) < 2:
            raise InputError(
                f"{self.source}: the residuals' {part.position or ':'.join(part.group)!r} has one "
                "level in each group: a structure needs two"
            )
        size = len(positions)
        cell = group * size + position
        twice = pd.Series(cell).duplicated().to_numpy()
        if twice.any():
            row = int(np.argmax(twice))
            raise InputError(
                f"{self.source}: row {_row_name(table, row)} has the position "
                f"{positions[position[row]]!r} of {part.position!r} that its group has already: "
                "residuals within a group need a position each"
            )
        self.state["residual"] = list(positions)
        codes = torch.from_numpy(cell)
        return ResidualDesign(part.kind, codes, int(group.max()) + 1, tuple(positions))

    def _weights(self, table: pd.DataFrame) -> Tensor | None:
        if self.weights is None:
            return None
        column = table[self.weights]
        numbers = pd.to_numeric(column, errors="coerce").to_numpy(np.float64, copy=True)
        bad = np.flatnonzero(~(np.isfinite(numbers) & (numbers > 0)))
        if len(bad):
            raise InputError(
                f"{self.source}: the weight {self.weights!r} is {column.iloc[bad[0]]!r} in row "
                f"{_row_name(table, bad[0])}: expected a positive number"
            )
        return torch.from_numpy(numbers)

    def _check_size(self, design: RandomDesign, n: int) -> None:
        size = len(design.levels) * len(design.effects)
        if size >= n:
            raise InputError(
                f"{self.source}: {design.group!r} has {len(design.levels)} levels x "
                f"{len(design.effects)} effects for {n} rows: they cannot be told from the residual"
            )


def _coded(column: pd.Series, categories: list[str] | None = None) -> tuple[np.ndarray, list[str]]:
    """Code of each row among the categories, -1 for another, and the categories.

    By default they are the labels that occur: in a categorical's order,
    numbers by size, all else by spelling.
    """
    values, uniques = pd.factorize(column)
    labels = [_label(value) for value in uniques]
    if categories is None:
        if isinstance(column.dtype, pd.CategoricalDtype):
            order = np.argsort(column.cat.categories.get_indexer(uniques))
        elif pd.api.types.is_numeric_dtype(column):
            order = np.argsort(np.asarray(uniques))
        else:
            order = np.array(sorted(range(len(labels)), key=labels.__getitem__), dtype=np.int64)
        categories = list(dict.fromkeys(labels[i] for i in order))
    position = {label: i for i, label in enumerate(categories)}
    place = np.array([position.get(label, -1) for label in labels], dtype=np.int64)
    return place[values], categories


def _row_name(table: pd.DataFrame, position: int) -> str:
    """The row as a user counts them, from 1, or its name where rows have names."""
    label = table.index[position]
    return str(label + 1) if isinstance(label, int | np.integer) else repr(label)


def _label(value: Any) -> str:
    if isinstance(value, float | np.floating) and float(value).is_integer():
        return str(int(value))
    return str(value)


def _cell_labels(cells: np.ndarray, columns: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Labels of combinations of levels, joined by ':' unless that makes two alike."""
    if len(columns) == 1:
        return tuple(columns[0][i] for i in cells.tolist())
    parts, rest = [], cells
    for categories in reversed(columns):
        parts.append(np.asarray(categories, dtype=object)[rest % len(categories)])
        rest = rest // len(categories)
    combos = list(zip(*reversed(parts), strict=True))
    labels = [":".join(combo) for combo in combos]
    if len(set(labels)) < len(labels):
        labels = [repr(combo) for combo in combos]
    return tuple(labels)


def _r_name(column: str) -> str:
    """A column's name as R spells it: ``(Intercept)``, ``SexMale``, ``age:SexMale``."""
    if column == "Intercept":
        return "(Intercept)"
    return re.sub(r"\[(?:T\.)?([^\]]*)\]", r"\1", column)


def _plain(value: Any) -> Any:
    """Numbers and containers of Python's own, which a checkpoint loads with weights_only."""
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    return value
