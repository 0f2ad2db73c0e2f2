"""Residuals of which the structure is more than one matrix: strata, covariates, a nugget."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from openreml_nn.covariance import (
    BlockDiagonal,
    CovariancePropagation,
    DiagonalMatrix,
    DummyMatrix,
    Heteroscedastic,
    IdentityMatrix,
    KroneckerProduct,
    Matrix,
    ScalarMatrix,
    VarianceFunction,
)
from openreml_nn.covariance.owner import Owner
from openreml_nn.covariance.params import operand_name
from openreml_nn.covariance.transform import TransformExp, TransformExpPow2
from openreml_nn.model.batch import Batch, row_values
from openreml_nn.model.residual import (
    ResidualStructure,
    cells_of,
    divided,
    of_cells,
    structure_of,
    with_weights,
)
from openreml_nn.support.errors import InputError

__all__ = ["ByCovariate", "ByStratum", "WithUnits", "start_residual"]


class ByStratum(nn.Module, ResidualStructure):
    """Rows of a stratum are correlated by their positions, with parameters of its own.

    ``batch["residual"]`` holds the cell of each row: the number of positions of the strata before
    its own, plus its position; -1 in prediction for a stratum that is not known, which has the mean
    variance.

    Args:
        matrices: the covariance of the positions of each stratum, by its name.
    """

    def __init__(self, matrices: Mapping[str, Matrix]) -> None:
        super().__init__()
        self.names: list[str] = []
        for name in matrices:
            self.names.append(operand_name(name, self.names))
        self.matrices = nn.ModuleList(matrices.values())
        self.takes = frozenset({"residual"})
        self.is_independent = all(
            isinstance(matrix, ScalarMatrix | DiagonalMatrix) for matrix in matrices.values()
        )

    def operands(self, batch: Batch, n: int) -> dict[str, Matrix]:
        cells = cells_of(batch, n)
        ends = torch.tensor([_size(m) for m in self.matrices], device=cells.device).cumsum(0)
        if n and not 0 <= int(cells.min()) <= int(cells.max()) < int(ends[-1]):
            raise InputError(
                f"`batch['residual']` reaches from {int(cells.min())} to {int(cells.max())}: "
                f"expected cells from 0 to {int(ends[-1]) - 1}"
            )
        own = torch.bucketize(cells, ends, right=True)
        blocks: dict[str, Matrix] = {}
        rows, start = [], 0
        for i, (name, matrix) in enumerate(zip(self.names, self.matrices, strict=True)):
            assert isinstance(matrix, Matrix)
            inside = (own == i).nonzero()[:, 0]
            if len(inside):
                z = DummyMatrix.from_codes(cells[inside] - start, _size(matrix))
                blocks[name] = CovariancePropagation(z=z, g=matrix)
                rows.append(inside)
            start = int(ends[i])
        order = torch.cat(rows)
        at = torch.empty_like(order)
        at[order] = torch.arange(n, device=order.device)
        weights = row_values(batch, "weights", n, positive=True)
        scale = None if weights is None else weights.rsqrt()
        z = DummyMatrix.from_codes(at, n, scale)
        return {"residual": CovariancePropagation(z=z, g=BlockDiagonal(blocks))}

    def variances(self, batch: Batch, n: int) -> Tensor:
        known = torch.cat([m.variances() for m in self.matrices if isinstance(m, Matrix)])
        return divided(of_cells(known, batch, n), batch, n)


class ByCovariate(nn.Module, ResidualStructure):
    """Rows whose variance is a function of a covariate, (n,), which ``batch["covariate"]`` holds; see
    :class:`VarianceFunction`.

    Args:
        kind: of the function.
        correlated: the structure of which the function scales rows and columns, see
            :class:`Heteroscedastic`, and that has the scale; independent rows by default.
        of_fitted: whether the covariate is the fitted value of the row.
    """

    def __init__(
        self, kind: str, correlated: nn.Module | None = None, of_fitted: bool = False
    ) -> None:
        super().__init__()
        self.function = VarianceFunction(torch.ones(1, dtype=torch.float64), kind)
        if correlated is not None:
            self.function.fix("sigma^2", 0.0)
            _step_in_logarithms(correlated)
        self.correlated = correlated
        self.of_fitted = of_fitted
        # Further rows would move the fitted values, and so the variances, of those before.
        own = frozenset() if correlated is None else structure_of(correlated).takes
        self.takes = own | {"covariate"}
        self.is_independent = not of_fitted and (
            correlated is None or structure_of(correlated).is_independent
        )

    def _at(self, batch: Batch, n: int) -> VarianceFunction:
        covariate = row_values(batch, "covariate", n)
        if covariate is None:
            raise InputError(
                "the residual variance depends on a covariate, which is missing: expected its "
                "column, batch['covariate']"
            )
        return self.function.at(covariate)

    def operands(self, batch: Batch, n: int) -> dict[str, Matrix]:
        variance = self._at(batch, n)
        if self.correlated is None:
            return {"residual": with_weights(variance, batch, n)}
        (matrix,) = structure_of(self.correlated).operands(batch, n).values()
        return {"residual": Heteroscedastic(variance=variance, matrix=matrix)}

    def variances(self, batch: Batch, n: int) -> Tensor:
        if not n:  # a matrix has rows
            return self.function.variances()[:0]
        found = self._at(batch, n).variances()
        if self.correlated is None:
            return divided(found, batch, n)
        return found * structure_of(self.correlated).variances(batch, n)


class WithUnits(nn.Module, ResidualStructure):
    """Correlated residuals beside independent ones of one variance, the nugget.

    Args:
        correlated: a (T, T) matrix, or another structure, see :func:`structure_of`.
    """

    def __init__(self, correlated: nn.Module) -> None:
        super().__init__()
        self.correlated = correlated
        self.units = ScalarMatrix(1)
        cells = isinstance(correlated, Matrix)
        self.takes = frozenset({"residual"}) if cells else structure_of(correlated).takes

    def operands(self, batch: Batch, n: int) -> dict[str, Matrix]:
        units = structure_of(self.units).operands(batch, n)["residual"]
        if not isinstance(self.correlated, Matrix):
            return {**structure_of(self.correlated).operands(batch, n), "units": units}
        # Unlike without a nugget, several rows may stand at one place.
        cells, weights = cells_of(batch, n), row_values(batch, "weights", n, positive=True)
        groups = int(cells.max()) // _size(self.correlated) + 1
        scale = None if weights is None else weights.rsqrt()
        z = DummyMatrix.from_codes(cells, groups * _size(self.correlated), scale)
        one = IdentityMatrix(groups).to(self.correlated.no_params())
        g = KroneckerProduct(groups=one, matrix=self.correlated)
        return {"residual": CovariancePropagation(z=z, g=g), "units": units}

    def variances(self, batch: Batch, n: int) -> Tensor:
        structures = (structure_of(self.correlated), structure_of(self.units))
        found = [structure.variances(batch, n) for structure in structures]
        return found[0] + found[1]


def start_residual(residual: nn.Module, variance: float) -> None:
    """Set the parameters of a residual to a start at which each row has this variance."""
    parts: list[nn.Module] = [residual]
    if isinstance(residual, WithUnits):
        for part_of in (residual.correlated, residual.units):
            start_residual(part_of, variance / 2)
        return
    if isinstance(residual, ByCovariate) and residual.correlated is not None:
        start_residual(residual.correlated, variance)
        return
    if isinstance(residual, ByStratum):
        parts = list(residual.matrices)
    elif isinstance(residual, ByCovariate):
        parts = [residual.function]
    for matrix in parts:
        if isinstance(matrix, Matrix):
            matrix.moment_start(torch.full((matrix.shape[0],), variance, dtype=torch.float64))


def _step_in_logarithms(structure: nn.Module) -> None:
    """Let a fit step in the logarithms of variances, which move in proportion to the exponent of a
    function of x, whatever the unit of x."""
    for leaf in structure.modules():
        if isinstance(leaf, Owner):
            for name, trans in list(leaf.own_trans.items()):
                if isinstance(trans, TransformExp | TransformExpPow2):
                    leaf.retransform(name, type(trans)(degree=0))


def _size(matrix: nn.Module) -> int:
    """The number of rows of a matrix."""
    assert isinstance(matrix, Matrix)
    return matrix.shape[0]
