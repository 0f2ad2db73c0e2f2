"""A table as tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from openreml_nn.support.errors import InputError

__all__ = ["Encoded", "RandomDesign", "ResidualDesign"]


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
        positions: labels of the positions; with ``ar1`` all whole times from the first to the last.
    """

    kind: str
    codes: Tensor
    groups: int
    positions: tuple[str, ...]


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
        offset: (n,) known part of the mean; None without one.
        unseen: rows of a level that was not seen, by grouping factor.
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

    def batch(self) -> dict[str, Any]:
        """The table as a batch of :class:`MixedModel`: ``x`` the model matrix, for each random
        effect its codes in ``groups`` and, but for intercepts, its values in ``values``; and what
        there is of ``y``, ``weights``, ``offset``, and the cells of the rows in ``residual``.
        """
        found = {
            "x": self.X,
            "groups": {d.name: d.codes for d in self.random},
            "values": {d.name: d.values for d in self.random if not d.is_intercept},
        }
        cells = None if self.residual is None else self.residual.codes
        parts = {"y": self.y, "weights": self.weights, "offset": self.offset, "residual": cells}
        return found | {name: part for name, part in parts.items() if part is not None}

    @property
    def adjusted(self) -> Tensor:
        """The response less the offset (n,)."""
        if self.y is None:
            raise InputError("the table has no response")
        return self.y if self.offset is None else self.y - self.offset
