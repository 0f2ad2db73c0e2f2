"""A table as tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from openreml_nn.support.errors import InputError
from openreml_nn.table.relation import Graph, Known, Places, Walk
from openreml_nn.table.structure import KERNELS, Structure

__all__ = ["Encoded", "Positions", "RandomDesign", "ResidualDesign", "Stratum"]


@dataclass(frozen=True)
class RandomDesign:
    """The design of one random-effects term.

    Attributes:
        name: name of its operand in the covariance tree, unique.
        group: grouping factor as written.
        effects: names of its k effects.
        levels: labels of its levels.
        codes: (n,) level of each row, -1 for a level that was not seen; (n, m) of rows of m levels each.
        values: (n, k) values of the effects; (n, m, k) of such rows.
        structure: the covariance among the effects of a level.
        places: whole numbers (k,) whose differences are the lags of the effects, from 0, where the
            structure asks for them.
        relation: how the levels are related; None for independent ones.
        coordinates: (n, d) places of the rows, for levels at places.
    """

    name: str
    group: str
    effects: tuple[str, ...]
    levels: tuple[str, ...]
    codes: Tensor
    values: Tensor
    structure: Structure = field(default_factory=lambda: Structure("us"))
    places: tuple[int, ...] | None = None
    relation: Known | Places | Graph | Walk | None = None
    coordinates: Tensor | None = None

    @property
    def is_placed(self) -> bool:
        """Whether there are rows at places that no level has."""
        return self.coordinates is not None and bool((self.codes < 0).any())

    @property
    def is_intercept(self) -> bool:
        """Whether the only effect is the intercept."""
        return self.effects == ("(Intercept)",)

    @property
    def unseen_rows(self) -> int:
        """How many rows have a level that was not seen."""
        unseen = self.codes < 0
        return int((unseen.any(1) if unseen.dim() == 2 else unseen).sum())


@dataclass(frozen=True)
class Positions:
    """The positions within a group of rows.

    Attributes:
        structure: the covariance among them.
        name: their columns.
        labels: of the T positions.
        places: (T, d) coordinates, or (T, 1) whole numbers from 0 whose differences are the lags,
            where the structure asks for them.
    """

    structure: Structure
    name: str
    labels: tuple[str, ...]
    places: Tensor | None = None


@dataclass(frozen=True)
class Stratum:
    """Rows whose residuals have parameters of their own.

    Attributes:
        name: label of the stratum; empty where there is one only.
        positions: sides of the product of structures, the last one's positions fastest.
    """

    name: str
    positions: tuple[Positions, ...]

    @property
    def size(self) -> int:
        """The number of positions within a group."""
        return prod(len(side.labels) for side in self.positions)


@dataclass(frozen=True)
class ResidualDesign:
    """The structure of the residuals.

    Attributes:
        strata: one or more; none where rows are independent and the variance depends on a covariate
            only.
        cells: (n,) cell of each row. In one stratum: its group, times the number of positions, plus
            its position. In several, which have one group each: the positions of those before its
            own, plus its position.
        text: as written, without the nugget.
        variance: how the variance depends on a covariate, ``power``, ``exp`` or
            ``const_power``.
        covariate: (n,) values of that; None where they are the fitted values.
        nugget: whether independent errors stand beside.
    """

    strata: tuple[Stratum, ...]
    cells: Tensor
    text: str = ""
    variance: str | None = None
    covariate: Tensor | None = None
    nugget: bool = False

    @property
    def positions(self) -> tuple[str, ...]:
        """Labels of what tables show: the positions of one structure that differ."""
        if len(self.strata) == 1 and len(self.strata[0].positions) == 1:
            (found,) = self.strata[0].positions
            if found.structure.name not in (*KERNELS, "car1", "arma"):
                return found.labels
        return ("",)

    @property
    def of_fitted(self) -> bool:
        """Whether the variance depends on the fitted values."""
        return self.variance is not None and self.covariate is None

    def to_dict(self) -> dict[str, Any]:
        """The shape of the structure without its rows, in numbers, strings and Python's containers."""
        strata = []
        for stratum in self.strata:
            sides = []
            for p in stratum.positions:
                places = None if p.places is None else p.places.tolist()
                options = dict(p.structure.options)
                sides.append([p.structure.name, options, p.name, list(p.labels), places])
            strata.append([stratum.name, sides])
        shape = {"text": self.text, "variance": self.variance, "nugget": self.nugget}
        shape["of_fitted"] = self.of_fitted
        return {"strata": strata, **shape}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any], rows: int) -> ResidualDesign:
        """A structure of that shape for some rows without content, of different cells."""
        strata = []
        for name, sides in found["strata"]:
            positions = tuple(
                Positions(
                    Structure(structure, options),
                    column,
                    tuple(labels),
                    None if places is None else torch.tensor(places),
                )
                for structure, options, column, labels, places in sides
            )
            strata.append(Stratum(name, positions))
        cells = torch.arange(rows)
        if len(strata) == 1:
            cells = cells * strata[0].size
        variance = found["variance"]
        has_covariate = variance is not None and not found["of_fitted"]
        covariate = torch.arange(1, rows + 1).double() if has_covariate else None
        return cls(tuple(strata), cells, found["text"], variance, covariate, found["nugget"])


@dataclass(frozen=True)
class Encoded:
    """A table as tensors.

    Attributes:
        y: response (n,), or None where the table has none.
        X: model matrix of the fixed effects (n, p).
        names: names of its columns.
        random: designs of the random effects.
        rows: positions of the kept rows in the table, a row for each of its responses.
        dropped_rows: rows left out because of missing values.
        residual: structure of the residuals; None for one variance.
        weights: (n,) weights of the rows; None for equal ones.
        offset: (n,) known part of the mean; None without one.
        unseen: rows of a level that was not seen, by grouping factor.
        zi: (n, k) model matrix of the zero part; None without one.
        trait: (n,) name of the response of each row; None where there is one.
    """

    y: Tensor | None
    X: Tensor
    names: tuple[str, ...]
    random: tuple[RandomDesign, ...]
    rows: np.ndarray
    dropped_rows: int
    residual: ResidualDesign | None = None
    weights: Tensor | None = None
    offset: Tensor | None = None
    unseen: Mapping[str, int] = field(default_factory=dict)
    zi: Tensor | None = None
    trait: np.ndarray | None = None

    def kept(self, table: pd.DataFrame) -> pd.DataFrame:
        """The kept rows of the table that was encoded, with the column ``trait`` where there are
        several responses."""
        found = table.iloc[self.rows]
        return found if self.trait is None else found.assign(trait=self.trait)

    def batch(self) -> dict[str, Any]:
        """The table as a batch of :class:`MixedModel`: ``x`` the model matrix, for each random
        effect its codes in ``groups`` and, but for intercepts, its values in ``values``, of rows of
        several levels those of intercepts too, which may be weights; and what
        there is of ``y``, ``weights``, ``offset``, ``zi``, the cells of the rows in ``residual``, the
        ``covariate`` of their variance; in ``places`` where the rows are, if some are at places that
        no level has.
        """
        found: dict[str, Any] = {
            "x": self.X,
            "groups": {d.name: d.codes for d in self.random},
            "values": {
                d.name: d.values for d in self.random if not d.is_intercept or d.codes.dim() == 2
            },
        }
        if placed := {d.name: d.coordinates for d in self.random if d.is_placed}:
            found["places"] = placed
        residual = self.residual
        parts = {"y": self.y, "weights": self.weights, "offset": self.offset}
        if residual is not None:
            # One stratum of one position is a variance for all rows, which has no cells.
            sizes = [stratum.size for stratum in residual.strata]
            parts["residual"] = residual.cells if residual.nugget or sum(sizes) > 1 else None
            parts["covariate"] = residual.covariate
        parts["zi"] = self.zi
        return found | {name: part for name, part in parts.items() if part is not None}

    @property
    def adjusted(self) -> Tensor:
        """The response less the offset (n,)."""
        if self.y is None:
            raise InputError("the table has no response")
        return self.y if self.offset is None else self.y - self.offset
