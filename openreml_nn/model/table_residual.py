"""The residuals that a formula says: strata, products of structures, variances, a nugget."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from openreml_nn.covariance import (
    BlockDiagonal,
    CovariancePropagation,
    DummyMatrix,
    IdentityMatrix,
    KroneckerProduct,
    Matrix,
    ScalarMatrix,
    VarianceFunction,
)
from openreml_nn.model.batch import Batch, part, row_values
from openreml_nn.model.named import hold_scale, named_matrix
from openreml_nn.model.residual import ResidualStructure
from openreml_nn.support.errors import InputError
from openreml_nn.table import ResidualDesign, Stratum
from openreml_nn.table.structure import VARYING

__all__ = ["TableResidual", "residual_of", "start_residual"]


def residual_of(design: ResidualDesign | None) -> Matrix | TableResidual:
    """The residual of a :class:`MixedModel` for what a formula says of it: the variance of each
    row, the covariance of the positions within a group, or what is more than these."""
    if design is None:
        return ScalarMatrix(1)
    if design.is_plain:
        return _matrix(design.strata[0])
    return TableResidual(design)


def start_residual(residual: Matrix | TableResidual, variance: float) -> None:
    """Set the parameters of a residual to a start at which each row has this variance."""
    if isinstance(residual, TableResidual):
        parts: list[nn.Module | None] = [*residual.matrices, residual.variance]
        if residual.units is not None:
            variance = variance / 2
            parts.append(residual.units)
    else:
        parts = [residual]
    for matrix in parts:
        if isinstance(matrix, Matrix):
            matrix.moment_start(torch.full((matrix.shape[0],), variance, dtype=torch.float64))


class TableResidual(nn.Module, ResidualStructure):
    """Residuals by strata, each a product of structures, or with variances by a covariate.

    ``batch["residual"]`` is what :attr:`ResidualDesign.places` says: stratum and cell of each row
    (n, 2), or the covariate (n,).

    Args:
        design: the structure; of its rows nothing is kept.
    """

    def __init__(self, design: ResidualDesign) -> None:
        super().__init__()
        self.variance = None
        if design.variance is not None:
            assert design.covariate is not None
            self.variance = VarianceFunction(design.covariate[:1], design.variance)
        self.matrices = nn.ModuleList([_matrix(stratum) for stratum in design.strata])
        self.units = ScalarMatrix(1) if design.nugget else None
        self._has_groups = [stratum.groups is not None for stratum in design.strata]
        self._names: list[str] = []
        for stratum in design.strata:
            self._names.append(_operand(stratum.name, dict.fromkeys(self._names)))

    def operands(self, batch: Batch, n: int) -> dict[str, Matrix]:
        weights = row_values(batch, "weights", n, positive=True)
        scale = None if weights is None else weights.rsqrt()
        found: dict[str, Matrix] = {"residual": self._correlated(part(batch, "residual"), n, scale)}
        if self.units is not None:
            found["units"] = _scaled(self.units.of_size(n), scale)
        return found

    def _correlated(self, places: Tensor, n: int, scale: Tensor | None) -> Matrix:
        if self.variance is not None:
            return _scaled(self.variance.of_covariate(places), scale)
        if len(self.matrices) == 1:
            size, matrix = self._of_groups(0, places[:, 1])
            z = DummyMatrix.from_codes(places[:, 1], size, scale)
            return CovariancePropagation(z=z, g=matrix)
        blocks: dict[str, Matrix] = {}
        rows = []
        for i, name in enumerate(self._names):
            rows.append((places[:, 0] == i).nonzero()[:, 0])
            codes = places[rows[-1], 1]
            size, matrix = self._of_groups(i, codes)
            blocks[name] = CovariancePropagation(z=DummyMatrix.from_codes(codes, size), g=matrix)
        order = torch.cat(rows)
        at = torch.empty_like(order)
        at[order] = torch.arange(n, device=at.device)
        z = DummyMatrix.from_codes(at, n, scale)
        return CovariancePropagation(z=z, g=BlockDiagonal(blocks))

    def _of_groups(self, i: int, codes: Tensor) -> tuple[int, Matrix]:
        """How many cells a stratum has, and their covariance."""
        matrix = self.matrices[i]
        assert isinstance(matrix, Matrix)
        size = matrix.shape[0]
        if not self._has_groups[i]:
            return size, matrix
        groups = int(codes.max()) // size + 1
        return size * groups, KroneckerProduct(groups=IdentityMatrix(groups), matrix=matrix)

    def variances(self, batch: Batch, n: int) -> Tensor:
        total = self._own_variances(batch.get("residual"), n)
        if self.units is not None:
            total = total + self.units().reshape(())
        weights = row_values(batch, "weights", n, positive=True)
        return total if weights is None else total / weights.to(total)

    def _own_variances(self, places: Tensor | None, n: int) -> Tensor:
        if self.variance is not None:
            if places is None:
                raise InputError(
                    "the table has not the covariate of the residuals' variance: expected its column"
                )
            return self.variance.of_covariate(places)().diagonal()
        diagonals = [matrix().diagonal() for matrix in self.matrices]
        mean = torch.stack([diagonal.mean() for diagonal in diagonals])
        if places is None:
            return mean.mean().expand(n)
        found = torch.where(places[:, 0] < 0, mean.mean(), mean[places[:, 0].clamp(min=0)])
        for i, diagonal in enumerate(diagonals):
            at = (places[:, 0] == i) & (places[:, 1] >= 0)
            found = torch.where(at, diagonal[places[:, 1].clamp(min=0) % len(diagonal)], found)
        return found


def _scaled(rows: Matrix, scale: Tensor | None) -> Matrix:
    """Rows times known standard deviations."""
    if scale is None:
        return rows
    codes = torch.arange(len(scale), device=scale.device)
    return CovariancePropagation(z=DummyMatrix.from_codes(codes, len(scale), scale), g=rows)


def _matrix(stratum: Stratum) -> Matrix:
    """The covariance of the positions within a group."""
    sides: dict[str, Matrix] = {}
    for positions in stratum.positions:
        sides[_operand(positions.name, sides)] = named_matrix(
            positions.structure, len(positions.labels), positions.places
        )
    scaled = [p.structure.name in VARYING for p in stratum.positions]
    if sum(scaled) > 1:
        raise InputError(
            "a product of residual structures has a variance for each position on one side only: "
            f"found {' and '.join(p.structure.name for p in stratum.positions)}"
        )
    for i, matrix in enumerate(sides.values()):
        if i != (scaled.index(True) if any(scaled) else 0):
            hold_scale(matrix)
    return KroneckerProduct(sides) if len(sides) > 1 else next(iter(sides.values()))


def _operand(label: str, taken: Mapping[str, Any]) -> str:
    """A name of an operand, without '/' and '.', that is not taken yet."""
    base = re.sub(r"[/.]", "_", label) or "position"
    found, i = base, 1
    while found in taken:
        found, i = f"{base}_{i}", i + 1
    return found
