"""A table as tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
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
from openreml_nn.result.result import Label
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
        each random effect its codes in ``groups`` and its values in ``values``.

        Raises:
            InputError: if there is an offset, which a batch has no place for.
        """
        if self.offset is not None:
            raise InputError("offset() is for lmm(): subtract it from the response here")
        found = {
            "x": self.X,
            "groups": {d.name: d.codes for d in self.random},
            "values": {d.name: d.values for d in self.random},
        }
        return found if self.y is None else {"y": self.y, **found}

    @property
    def adjusted(self) -> Tensor:
        """The response less the offset (n,)."""
        if self.y is None:
            raise InputError("the table has no response")
        return self.y if self.offset is None else self.y - self.offset

    @property
    def labels(self) -> dict[str, Label]:
        """Names for the tables of :func:`fit_reml`, by operand."""
        found = {d.name: Label(d.group, d.effects, d.levels) for d in self.random}
        if self.residual is not None:
            found["residual"] = Label("Residual", self.residual.positions, ())
        return found
