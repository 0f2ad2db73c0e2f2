"""Covariance matrices and operators as modules."""

from openreml_nn.covariance import transform
from openreml_nn.covariance.dummy import DummyMatrix
from openreml_nn.covariance.identity import DiagonalMatrix, IdentityMatrix, ScalarMatrix
from openreml_nn.covariance.kronecker import KroneckerProduct
from openreml_nn.covariance.matrix import Matrix
from openreml_nn.covariance.operator import Operator
from openreml_nn.covariance.propagation import CovariancePropagation
from openreml_nn.covariance.sum import Sum
from openreml_nn.covariance.triangular import (
    LowerTriangularMatrix,
    UnconstrainedMatrix,
    UnstructuredMatrix,
)

__all__ = [
    "CovariancePropagation",
    "DiagonalMatrix",
    "DummyMatrix",
    "IdentityMatrix",
    "KroneckerProduct",
    "LowerTriangularMatrix",
    "Matrix",
    "Operator",
    "ScalarMatrix",
    "Sum",
    "UnconstrainedMatrix",
    "UnstructuredMatrix",
    "transform",
]
