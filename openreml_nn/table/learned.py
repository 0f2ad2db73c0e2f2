"""What a formula learned from a table: all that another table, or a checkpoint, needs of the first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from openreml_nn.table.levels import joined, split

__all__ = ["Group", "Learned"]


@dataclass
class Group:
    """The levels of a grouping factor.

    Attributes:
        columns: labels of each column that it combines.
        cells: the combinations that are levels, in order: each the codes of its columns as one
            number, the last column's fastest. They ascend but for levels that came later.
    """

    columns: list[list[str]]
    cells: list[int]

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels of the levels, those of a combination joined by ':'."""
        return joined(np.asarray(self.cells, dtype=np.int64), self.columns)

    @property
    def parts(self) -> list[tuple[str, ...]]:
        """The labels of the levels, one for each column."""
        return split(np.asarray(self.cells, dtype=np.int64), self.columns)

    def grown(self, rows: Iterable[tuple[str, ...]]) -> Group:
        """With the levels of more rows, each the labels of its columns; new ones follow in the order
        in which they come."""
        levels = list(dict.fromkeys([*self.parts, *rows]))
        columns = [
            list(dict.fromkeys([*known, *part]))
            for known, part in zip(self.columns, zip(*levels, strict=True), strict=True)
        ]
        at = [{label: i for i, label in enumerate(column)} for column in columns]
        cells = []
        for level in levels:
            cell = 0
            for label, places in zip(level, at, strict=True):
                cell = cell * len(places) + places[label]
            cells.append(cell)
        return Group(columns, cells)


@dataclass
class Learned:
    """What was learned, in numbers, strings, tensors and containers of Python's own.

    Attributes:
        kinds: what each column of an expression holds, see :func:`kind_of`.
        factors: levels of each categorical variable among the effects, by its expression.
        transforms: what each call learned, by its expression, such as a mean.
        groups: levels of each grouping factor.
        effects: names of the effects of each random part, by its operand.
        names: names of the fixed effects.
        means: means of the numeric columns of the fixed effects.
        others: the columns that ``.`` stands for.
        places: places of the effects of each random part, where its structure asks for them.
        relations: known matrices between levels by the names that the formula has for them, each
            with whether it is the inverse.
        residual: the shape of the residuals' structure, see :meth:`ResidualDesign.to_dict`.
        zeros: what the zero part of a response learned, by the same names; empty without one.
    """

    kinds: dict[str, str] = field(default_factory=dict)
    factors: dict[str, list[str]] = field(default_factory=dict)
    transforms: dict[str, dict[str, Any]] = field(default_factory=dict)
    groups: dict[str, Group] = field(default_factory=dict)
    effects: dict[str, list[str]] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    means: dict[str, float] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)
    places: dict[str, list[int]] = field(default_factory=dict)
    relations: dict[str, list[Any]] = field(default_factory=dict)
    residual: dict[str, Any] = field(default_factory=dict)
    zeros: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """What was learned as dictionaries and lists, which a checkpoint loads with ``weights_only``."""
        return asdict(self)

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Learned:
        """What :meth:`to_dict` made."""
        groups = {name: Group(**group) for name, group in found["groups"].items()}
        return cls(**{**found, "groups": groups})
