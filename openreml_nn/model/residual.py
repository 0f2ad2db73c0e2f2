"""The residuals of the rows of a batch: their covariance, and the variance of a new one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from openreml_nn.covariance import (
    AR1Matrix,
    CovariancePropagation,
    DiagonalMatrix,
    DummyMatrix,
    IdentityMatrix,
    KroneckerProduct,
    Matrix,
    ScalarMatrix,
)
from openreml_nn.covariance.spaced import SpacedMatrix
from openreml_nn.covariance.structures import in_cells
from openreml_nn.covariance.sum import summands
from openreml_nn.model.batch import Batch, part, row_values
from openreml_nn.support.checks import check_instance, check_tensor
from openreml_nn.support.checks import found as described
from openreml_nn.support.errors import InputError
from openreml_nn.terms.covariance import RepeatedCovariance
from openreml_nn.terms.design import IdentityDesign
from openreml_nn.terms.series import LONG
from openreml_nn.terms.term import Term

__all__ = [
    "ResidualStructure",
    "cells_of",
    "divided",
    "of_cells",
    "structure_of",
    "with_weights",
]


class ResidualStructure:
    """What a model's residual makes of a batch; a module of one's own supplies both methods.

    Attributes:
        is_independent: whether rows are independent, so that others can be added to them; False by
            default.
        takes: which of ``"residual"`` and ``"covariate"`` it reads of a batch; both by default.
        of_fitted: whether variances depend on the fitted values, which are ``batch["covariate"]``
            then; False by default.
    """

    is_independent: bool = False
    takes: frozenset[str] = frozenset({"residual", "covariate"})
    of_fitted: bool = False

    def operands(self, batch: Batch, n: int) -> dict[str, Matrix]:
        """The covariance R of the residuals of n rows as a sum of (n, n) matrices, each by the
        name of its operand in the model's tree."""
        raise NotImplementedError

    def terms(self, batch: Batch, n: int, dtype: torch.dtype) -> list[Term]:
        """The terms of these operands in a sum, computed in a precision."""
        found = self.operands(batch, n).items()
        return [
            term for name, each in found for term in summands(name, each, each.terms(None, dtype))
        ]

    def variances(self, batch: Batch, n: int) -> Tensor:
        """Variance of the residual of a new observation of each row, (n,)."""
        raise NotImplementedError


def structure_of(residual: nn.Module) -> ResidualStructure:
    """How the residual of a model is understood, by its kind.

    A :class:`Matrix` of one entry is the variance of each row, a larger one the covariance of the
    positions within a group; any other module yields log-variances from ``x``.

    Raises:
        TypeError: if it is no module.
        InputError: if a matrix is not square.
    """
    check_instance("residual", residual, nn.Module, "a Matrix or a network, or None")
    if isinstance(residual, ResidualStructure):
        return residual
    if not isinstance(residual, Matrix):
        return _ByNetwork(residual)
    if residual.shape[0] != residual.shape[1]:
        raise InputError(f"`residual` is {residual.shape}: expected a square matrix")
    return _OneVariance(residual) if residual.shape == (1, 1) else _WithinGroups(residual)


class _OneVariance(ResidualStructure):
    r"""Independent rows of variance :math:`\sigma^2 / w_i`."""

    is_independent = True
    takes = frozenset()

    def __init__(self, matrix: Matrix) -> None:
        self.matrix = matrix

    def operands(self, batch: Batch, n: int) -> dict[str, Matrix]:
        one = self.matrix
        # A subclass, or one whose parameter is computed, is taken as it is.
        rows = (
            one.of_size(n)
            if type(one) is ScalarMatrix
            else KroneckerProduct(rows=IdentityMatrix(n).to(one.no_params()), residual=one)
        )
        return {"residual": with_weights(rows, batch, n)}

    def terms(self, batch: Batch, n: int, dtype: torch.dtype) -> list[Term]:
        if type(self.matrix) is not ScalarMatrix or batch.get("weights") is not None:
            return super().terms(batch, n, dtype)
        # Without a matrix of that size: the batch may be small, and one of many.
        (one,) = self.matrix.terms(None, dtype)
        of_rows = Term(IdentityDesign(n), RepeatedCovariance(one.covariance.matrix, n))
        return summands("residual", self.matrix, [of_rows])

    def variances(self, batch: Batch, n: int) -> Tensor:
        return divided(self.matrix().reshape(1).expand(n), batch, n)


class _WithinGroups(ResidualStructure):
    """Rows of a group are correlated by their positions, rows of different groups independent.

    ``batch["residual"]`` holds the cell of each row: its group, times the number of positions, plus
    its position; -1 in prediction for a position that is not known, which has the mean variance.
    """

    takes = frozenset({"residual"})

    def __init__(self, matrix: Matrix) -> None:
        self.matrix = matrix
        self.is_independent = isinstance(matrix, ScalarMatrix | DiagonalMatrix)

    def operands(self, batch: Batch, n: int) -> dict[str, Matrix]:
        size = self.matrix.shape[0]
        cells = cells_of(batch, n)
        if n and int(cells.min()) < 0:
            raise InputError(
                f"`batch['residual']` is {int(cells.min())} in row {int(cells.argmin())}: expected "
                f"the row's cell, its group times {size} plus its position"
            )
        used, count = torch.unique(cells, return_counts=True)
        if len(used) < n:
            raise InputError(
                f"`batch['residual']` has the cell {int(used[count.argmax()])} in "
                f"{int(count.max())} rows: expected another one for each row, because rows of a "
                "group have a position each"
            )
        matrix, groups = self.matrix, int(cells.max()) // size + 1
        if n and size > LONG and _is_process(matrix):
            # What lies between the times of the rows may be far more than they are.
            assert isinstance(matrix, AR1Matrix | SpacedMatrix)
            order = cells.argsort()
            matrix = matrix.at(cells[order] // size, cells[order] % size)
            cells, groups, size = order.argsort(), 1, n
        rows = in_cells(cells, groups, matrix)
        weights = row_values(batch, "weights", n, positive=True)
        if weights is None:
            return {"residual": rows}
        z = DummyMatrix.from_codes(cells, groups * size, weights.rsqrt())
        return {"residual": CovariancePropagation(z=z, g=rows.operands["g"])}

    def variances(self, batch: Batch, n: int) -> Tensor:
        return divided(of_cells(self.matrix.variances(), batch, n), batch, n)


class _ByNetwork(ResidualStructure):
    r"""Independent rows of variance :math:`e^{f(x_i)} / w_i`."""

    is_independent = True
    takes = frozenset()

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def operands(self, batch: Batch, n: int) -> dict[str, Matrix]:
        scale = (self._log_variance(batch, n) / 2).exp()
        weights = row_values(batch, "weights", n, positive=True)
        if weights is not None:
            scale = scale * weights.rsqrt()
        unit = ScalarMatrix(n).to(scale)
        unit.fix("sigma^2", 0.0)
        codes = torch.arange(n, device=scale.device)
        z = DummyMatrix.from_codes(codes, n, scale)
        return {"residual": CovariancePropagation(z=z, g=unit)}

    def variances(self, batch: Batch, n: int) -> Tensor:
        return divided(self._log_variance(batch, n).exp(), batch, n)

    def _log_variance(self, batch: Batch, n: int) -> Tensor:
        found = self.network(part(batch, "x"))
        if not isinstance(found, Tensor) or found.shape not in ((n,), (n, 1)):
            raise InputError(
                f"`residual` yields {described(found)} for {n} rows: expected the log-variance of "
                "each, (n,) or (n, 1)"
            )
        return found.reshape(n)


def _is_process(matrix: Matrix) -> bool:
    """Whether it is a process that is known at any of its times, each time depending on the one before."""
    if isinstance(matrix, SpacedMatrix):
        return matrix.is_chain()
    return type(matrix) is AR1Matrix


def with_weights(rows: Matrix, batch: Batch, n: int) -> Matrix:
    r"""The covariance :math:`W^{-1/2} R W^{-1/2}` of n rows with the batch's weights, R without any."""
    weights = row_values(batch, "weights", n, positive=True)
    if weights is None:
        return rows
    codes = torch.arange(n, device=weights.device)
    z = DummyMatrix.from_codes(codes, n, weights.rsqrt())
    return CovariancePropagation(z=z, g=rows)


def cells_of(batch: Batch, n: int) -> Tensor:
    """The cells of n rows, as integers of 64 bits, by which torch indexes.

    Raises:
        TypeError, InputError: if they are not there, or not n integers.
    """
    cells = part(batch, "residual")
    check_tensor("batch['residual']", cells, (n,), "integer")
    return cells.long()


def of_cells(known: Tensor, batch: Batch, n: int) -> Tensor:
    """The variance of each row's position, (n,), the mean for one that is not known.

    Args:
        known: variances of the positions (T,); a cell is a number of whole groups of T, plus its
            position.
        batch: the rows, with their cells in ``batch["residual"]``, -1 for one that is not known;
            without cells no position is known.
        n: how many rows.
    """
    if batch.get("residual") is None:
        return known.mean().expand(n)
    cells = cells_of(batch, n)
    return torch.where(cells < 0, known.mean(), known[cells.clamp(min=0) % len(known)])


def divided(variances: Tensor, batch: Batch, n: int) -> Tensor:
    """Variances of n rows (n,), each divided by the row's weight where the batch has weights."""
    weights = row_values(batch, "weights", n, positive=True)
    return variances if weights is None else variances / weights.to(variances)
