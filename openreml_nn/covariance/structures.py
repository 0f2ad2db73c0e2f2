"""Structures of breeders and biostatisticians, as compositions with short constructors."""

from __future__ import annotations

from collections.abc import Mapping
from math import cos, pi

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from openreml_nn.covariance.autoregressive import AR1Matrix
from openreml_nn.covariance.dummy import DummyMatrix, Labels
from openreml_nn.covariance.exchangeable import EquicorrelationMatrix
from openreml_nn.covariance.identity import DiagonalMatrix, IdentityMatrix, ScalarMatrix
from openreml_nn.covariance.kronecker import KroneckerProduct
from openreml_nn.covariance.matrix import Matrix
from openreml_nn.covariance.params import free_specs
from openreml_nn.covariance.product import Gram
from openreml_nn.covariance.propagation import CovariancePropagation
from openreml_nn.covariance.sum import Sum
from openreml_nn.covariance.transform import TransformExp
from openreml_nn.covariance.triangular import LowerTriangularMatrix
from openreml_nn.support.checks import check_count, found
from openreml_nn.support.errors import InputError

__all__ = [
    "ar1_field",
    "factor_analytic",
    "heterogeneous",
    "heterogeneous_ar1",
    "heterogeneous_compound_symmetry",
    "kron",
    "stratified",
    "weighted",
    "within",
]


def kron(*operands: Matrix | torch.Tensor) -> KroneckerProduct:
    r"""Kronecker product :math:`A_0 \otimes A_1 \otimes \cdots`.

    Args:
        operands: matrices, or tensors that are known.

    Raises:
        TypeError, InputError: as :class:`KroneckerProduct`.

    >>> kron(EquicorrelationMatrix(2), torch.eye(3)).shape
    (6, 6)
    """
    return KroneckerProduct(*operands)


def heterogeneous(correlation: Matrix) -> CovariancePropagation:
    r"""A correlation matrix with a standard deviation for each row,
    :math:`V_{ij} = \sigma_i \sigma_j R_{ij}`.

    Parameters: ``sd/sigma_i`` (:math:`e^x`), and those of R below ``correlation/``.

    Args:
        correlation: R, (n, n), with ones on its diagonal.

    Raises:
        TypeError, InputError: if it is no Matrix, or not square.

    >>> V = heterogeneous(EquicorrelationMatrix(2))
    >>> V.param_names
    ['sd/sigma_0', 'sd/sigma_1', 'correlation/rho']
    >>> V(torch.tensor([0.0, 0.6931472, 1.0986123]))
    tensor([[1.0000, 1.0000],
            [1.0000, 4.0000]])
    """
    n = _square(correlation, "correlation").shape[0]
    sd = DiagonalMatrix(
        n, free_specs([f"sigma_{i}" for i in range(n)], trans=TransformExp(degree=1))
    )
    return CovariancePropagation(sd=sd, correlation=correlation)


def heterogeneous_compound_symmetry(n: int) -> CovariancePropagation:
    r"""Heterogeneous compound symmetry, :math:`V_{ij} = \sigma_i \sigma_j \rho` for i ≠ j.

    Parameters: ``sd/sigma_i``, ``correlation/rho``.

    Raises:
        TypeError, InputError: if ``n`` is no whole number, or less than 1.

    >>> heterogeneous_compound_symmetry(3).num_params
    4
    """
    return heterogeneous(EquicorrelationMatrix(check_count("n", n, 1)))


def heterogeneous_ar1(n: int) -> CovariancePropagation:
    r"""Heterogeneous AR(1), :math:`V_{ij} = \sigma_i \sigma_j \rho^{|i-j|}`.

    Parameters: ``sd/sigma_i``, ``correlation/rho``.

    Raises:
        TypeError, InputError: if ``n`` is no whole number, or less than 1.

    >>> heterogeneous_ar1(3).free_param_names
    ['sd/sigma_0', 'sd/sigma_1', 'sd/sigma_2', 'correlation/rho']
    """
    correlation = AR1Matrix(n)
    correlation.fix("sigma^2", 0.0)
    return heterogeneous(correlation)


def factor_analytic(n: int, k: int) -> Sum:
    r"""Factor-analytic covariance FA(k), :math:`V = \Lambda\Lambda^\top + \Psi`.

    :math:`\Lambda` (n, k) is lower triangular, which makes it unique up to
    signs, and :math:`\Psi` diagonal. Parameters: ``loadings/x/L_i_j``
    (identity), ``specific/sigma^2_i`` (:math:`e^{2x}`).

    Args:
        n: size.
        k: how many factors.

    Raises:
        InputError: if k is not between 1 and n.

    Reference:
        Smith, Cullis and Thompson, Biometrics 57 (2001) 1138, eq. 6.

    >>> factor_analytic(3, 1).param_names[:4]
    ['loadings/x/L_0_0', 'loadings/x/L_1_0', 'loadings/x/L_2_0', 'specific/sigma^2_0']
    """
    n, k = check_count("n", n, 1), check_count("k", k, 1)
    if k > n:
        raise InputError(f"`k` is {k}: expected 1 to {n} factors")
    x = LowerTriangularMatrix(n, k)
    with torch.no_grad():
        for name in x.param_names:
            i, j = map(int, name.split("_")[1:])
            # Columns that differ: with equal loadings the factors could not part.
            x.set_start(name, torch.tensor(cos(pi * (i + 0.5) * j / n)))
    return Sum(loadings=Gram(x=x, gram_type="xxt"), specific=DiagonalMatrix(n))


def ar1_field(rows: int, columns: int) -> KroneckerProduct:
    r"""Separable field covariance :math:`\sigma^2\, R(\rho_r) \otimes R(\rho_c)`.

    For plots in the order of rows, and of columns within a row. Parameters:
    ``row/sigma^2``, ``row/rho``, ``column/rho``.

    Args:
        rows: how many rows of plots.
        columns: how many plots in a row.

    Raises:
        TypeError, InputError: if one of them is no whole number, or less than 1.

    Reference:
        Gilmour, Cullis and Verbyla, Journal of Agricultural, Biological and
        Environmental Statistics 2 (1997) 269, section 3.

    >>> ar1_field(2, 3).free_param_names
    ['row/sigma^2', 'row/rho', 'column/rho']
    """
    rows, columns = check_count("rows", rows, 1), check_count("columns", columns, 1)
    column = AR1Matrix(columns)
    column.fix("sigma^2", 0.0)
    return KroneckerProduct(row=AR1Matrix(rows), column=column)


def within(
    groups: Labels, matrix: Matrix, positions: Labels | None = None
) -> CovariancePropagation:
    r"""Rows of one group are correlated, rows of different groups independent.

    :math:`V_{ij} = M_{p(i)\,p(j)}` where i and j are of one group, else 0: the
    residuals of repeated measures. Groups may be ragged: a group that misses a
    position has the rows and columns of the others.

    Args:
        groups: label of the group of each row, (n,).
        matrix: M, (T, T).
        positions: position of each row in M, (n,): labels, the sorted distinct
            ones of which are the T positions; by default the order of the rows
            within their group.

    Raises:
        InputError: if there are more positions than M has rows, or a group has
            a position twice.

    Reference:
        Pinheiro and Bates, Mixed-Effects Models in S and S-PLUS (2000), section 5.3.

    >>> within(["a", "b", "a"], AR1Matrix(2))(torch.tensor([0.0, 0.0]))
    tensor([[1., 0., 0.],
            [0., 1., 0.],
            [0., 0., 1.]])
    """
    group, names = pd.factorize(_labels(groups, "groups"), sort=True)
    if positions is None:
        position = pd.Series(group).groupby(group).cumcount().to_numpy()
    else:
        position, _ = pd.factorize(_labels(positions, "positions"), sort=True)
    if len(position) != len(group):
        raise InputError(f"`positions` has {len(position)} rows but `groups` {len(group)}")
    size = _square(matrix, "matrix").shape[0]
    if position.max() >= size:
        raise InputError(
            f"`matrix` is {size} x {size} but there are {position.max() + 1} positions"
        )
    cell = group * size + position
    if len(np.unique(cell)) < len(cell):
        twice = pd.Series(cell).duplicated().argmax()
        raise InputError(
            f"row {twice + 1}: its group {names[group[twice]]!r} already has its position"
        )
    return in_cells(torch.from_numpy(cell), len(names), matrix)


def in_cells(codes: Tensor, groups: int, matrix: Matrix) -> CovariancePropagation:
    """:func:`within` by the cell of each row: its group, times the size of M, plus its position."""
    return CovariancePropagation(
        z=DummyMatrix.from_codes(codes, groups * matrix.shape[0]),
        g=KroneckerProduct(groups=IdentityMatrix(groups).to(matrix.no_params()), matrix=matrix),
    )


def stratified(strata: Labels) -> CovariancePropagation:
    r"""Independent rows with a variance for each stratum, :math:`V_{ii} = \sigma^2_{s(i)}`.

    Parameters: ``g/matrix/sigma^2_s``, the strata in sorted order.

    Args:
        strata: label of the stratum of each row, (n,).

    Raises:
        TypeError, InputError: if they are no labels.

    >>> stratified(["f", "m", "f"]).param_names
    ['g/matrix/sigma^2_0', 'g/matrix/sigma^2_1']
    """
    labels = _labels(strata, "strata")
    return within(np.arange(len(labels)), DiagonalMatrix(len(pd.unique(labels))), labels)


def weighted(weights: Tensor) -> CovariancePropagation:
    r"""Independent rows of variance :math:`\sigma^2 / w_i`, as ``weights`` in lme4.

    Parameter: ``g/sigma^2``.

    Args:
        weights: w, (n,), positive.

    Raises:
        InputError: if a weight is not positive and finite.

    >>> weighted(torch.tensor([1.0, 4.0]))(torch.tensor([0.0]))
    tensor([[1.0000, 0.0000],
            [0.0000, 0.2500]])
    """
    if not isinstance(weights, Tensor) or not weights.is_floating_point():
        got = weights.dtype if isinstance(weights, Tensor) else found(weights)
        raise TypeError(f"`weights` is {got}: expected a floating-point tensor")
    if weights.dim() != 1 or not len(weights):
        raise InputError(f"`weights` has shape {tuple(weights.shape)}: expected (n,)")
    n = len(weights)
    good = torch.isfinite(weights) & (weights > 0)
    if not bool(good.all()):
        row = int((~good).nonzero()[0])
        raise InputError(f"`weights` is {float(weights[row]):.6g} in row {row}: expected above 0")
    z = DummyMatrix.from_codes(torch.arange(n, device=weights.device), n, weights.rsqrt())
    return CovariancePropagation(z=z, g=ScalarMatrix(n))


def _square(matrix: object, name: str) -> Matrix:
    if not isinstance(matrix, Matrix):
        raise TypeError(f"`{name}` is {found(matrix)}: expected a Matrix")
    if matrix.shape[0] != matrix.shape[1]:
        raise InputError(f"`{name}` is {matrix.shape}: expected a square matrix")
    return matrix


def _labels(labels: Labels, name: str) -> np.ndarray:
    if isinstance(labels, str | bytes | Mapping | set) or not hasattr(labels, "__len__"):
        raise TypeError(f"`{name}` is {found(labels)}: expected a sequence of labels")
    if getattr(labels, "ndim", 1) != 1 or not len(labels):
        raise InputError(f"`{name}` is {found(labels)}: expected (n,) labels")
    column = pd.Series(labels.cpu().numpy() if isinstance(labels, Tensor) else labels)
    if column.isna().any():
        raise InputError(f"`{name}` misses a label in row {int(column.isna().argmax()) + 1}")
    return column.to_numpy()
