"""Structures of breeders and biostatisticians, as compositions with short constructors."""

from __future__ import annotations

from math import cos, pi

import torch

from openreml_nn.covariance.autoregressive import AR1Matrix
from openreml_nn.covariance.exchangeable import EquicorrelationMatrix
from openreml_nn.covariance.identity import DiagonalMatrix
from openreml_nn.covariance.kronecker import KroneckerProduct
from openreml_nn.covariance.matrix import Matrix
from openreml_nn.covariance.params import free_specs
from openreml_nn.covariance.product import Gram
from openreml_nn.covariance.propagation import CovariancePropagation
from openreml_nn.covariance.sum import Sum
from openreml_nn.covariance.transform import TransformExp
from openreml_nn.covariance.triangular import LowerTriangularMatrix

__all__ = [
    "ar1_field",
    "factor_analytic",
    "heterogeneous",
    "heterogeneous_ar1",
    "heterogeneous_compound_symmetry",
    "kron",
]


def kron(*operands: Matrix | torch.Tensor) -> KroneckerProduct:
    r"""Kronecker product :math:`A_0 \otimes A_1 \otimes \cdots`.

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

    >>> V = heterogeneous(EquicorrelationMatrix(2))
    >>> V.param_names
    ['sd/sigma_0', 'sd/sigma_1', 'correlation/rho']
    >>> V(torch.tensor([0.0, 0.6931472, 1.0986123]))
    tensor([[1.0000, 1.0000],
            [1.0000, 4.0000]])
    """
    n = correlation.shape[0]
    sd = DiagonalMatrix(n, free_specs([f"sigma_{i}" for i in range(n)], trans=TransformExp()))
    return CovariancePropagation(sd=sd, correlation=correlation)


def heterogeneous_compound_symmetry(n: int) -> CovariancePropagation:
    r"""Heterogeneous compound symmetry, :math:`V_{ij} = \sigma_i \sigma_j \rho` for i ≠ j.

    Parameters: ``sd/sigma_i``, ``correlation/rho``.

    >>> heterogeneous_compound_symmetry(3).num_params
    4
    """
    return heterogeneous(EquicorrelationMatrix(n))


def heterogeneous_ar1(n: int) -> CovariancePropagation:
    r"""Heterogeneous AR(1), :math:`V_{ij} = \sigma_i \sigma_j \rho^{|i-j|}`.

    Parameters: ``sd/sigma_i``, ``correlation/rho``.

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

    Raises:
        ValueError: if k is not between 1 and n.

    Reference:
        Smith, Cullis and Thompson, Biometrics 57 (2001) 1138, eq. 6.

    >>> factor_analytic(3, 1).param_names[:4]
    ['loadings/x/L_0_0', 'loadings/x/L_1_0', 'loadings/x/L_2_0', 'specific/sigma^2_0']
    """
    if not 1 <= k <= n:
        raise ValueError(f"`k` is {k}: expected 1 to {n} factors")
    x = LowerTriangularMatrix(n, k)
    with torch.no_grad():
        for name in x.param_names:
            i, j = map(int, name.split("_")[1:])
            # Columns that differ: with equal loadings the factors could not part.
            x._set(name, torch.tensor(cos(pi * (i + 0.5) * j / n)))
    return Sum(loadings=Gram(x=x, gram_type="xxt"), specific=DiagonalMatrix(n))


def ar1_field(rows: int, columns: int) -> KroneckerProduct:
    r"""Separable field covariance :math:`\sigma^2\, R(\rho_r) \otimes R(\rho_c)`.

    For plots in the order of rows, and of columns within a row. Parameters:
    ``row/sigma^2``, ``row/rho``, ``column/rho``.

    Reference:
        Gilmour, Cullis and Verbyla, Journal of Agricultural, Biological and
        Environmental Statistics 2 (1997) 269, section 3.

    >>> ar1_field(2, 3).free_param_names
    ['row/sigma^2', 'row/rho', 'column/rho']
    """
    column = AR1Matrix(columns)
    column.fix("sigma^2", 0.0)
    return KroneckerProduct(row=AR1Matrix(rows), column=column)
