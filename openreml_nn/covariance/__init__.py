"""Covariance matrices and operators as modules."""

from openreml_nn.covariance import transform
from openreml_nn.covariance.autoregressive import (
    AntedependenceMatrix,
    AR1Matrix,
    StationaryMatrix,
    ToeplitzMatrix,
)
from openreml_nn.covariance.block import Augment, BlockDiagonal, Stack
from openreml_nn.covariance.compat import simple_param_specs
from openreml_nn.covariance.decaying import LinearMatrix, RationalQuadraticMatrix
from openreml_nn.covariance.dummy import DummyMatrix
from openreml_nn.covariance.exchangeable import (
    CompoundSymmetricMatrix,
    EqualEntryMatrix,
    EquicorrelationMatrix,
)
from openreml_nn.covariance.identity import DiagonalMatrix, IdentityMatrix, ScalarMatrix
from openreml_nn.covariance.kernel import (
    ExponentialMatrix,
    GaussianMatrix,
    KnownMatrix,
    MaternMatrix,
    SphericalMatrix,
)
from openreml_nn.covariance.kronecker import KroneckerProduct
from openreml_nn.covariance.matrix import Matrix
from openreml_nn.covariance.operator import Operator
from openreml_nn.covariance.pedigree import (
    KnownInverseMatrix,
    Pedigree,
)
from openreml_nn.covariance.product import Gram, HadamardProduct, Inverse, Product, Transpose
from openreml_nn.covariance.propagation import CovariancePropagation
from openreml_nn.covariance.simple import Adapter, SimpleMatrix
from openreml_nn.covariance.structures import (
    ar1_field,
    factor_analytic,
    heterogeneous,
    heterogeneous_ar1,
    heterogeneous_compound_symmetry,
    kron,
    stratified,
    weighted,
    within,
)
from openreml_nn.covariance.sum import Sum
from openreml_nn.covariance.temporal import ARMAMatrix, ContinuousAR1Matrix
from openreml_nn.covariance.triangular import (
    LowerTriangularMatrix,
    UnconstrainedMatrix,
    UnstructuredMatrix,
)
from openreml_nn.covariance.variance import VarianceFunction

__all__ = [
    "AR1Matrix",
    "ARMAMatrix",
    "Adapter",
    "AntedependenceMatrix",
    "Augment",
    "BlockDiagonal",
    "CompoundSymmetricMatrix",
    "ContinuousAR1Matrix",
    "CovariancePropagation",
    "DiagonalMatrix",
    "DummyMatrix",
    "EqualEntryMatrix",
    "EquicorrelationMatrix",
    "ExponentialMatrix",
    "GaussianMatrix",
    "Gram",
    "HadamardProduct",
    "IdentityMatrix",
    "Inverse",
    "KnownInverseMatrix",
    "KnownMatrix",
    "KroneckerProduct",
    "LinearMatrix",
    "LowerTriangularMatrix",
    "MaternMatrix",
    "Matrix",
    "Operator",
    "Pedigree",
    "Product",
    "RationalQuadraticMatrix",
    "ScalarMatrix",
    "SimpleMatrix",
    "SphericalMatrix",
    "Stack",
    "StationaryMatrix",
    "Sum",
    "ToeplitzMatrix",
    "Transpose",
    "UnconstrainedMatrix",
    "UnstructuredMatrix",
    "VarianceFunction",
    "ar1_field",
    "factor_analytic",
    "heterogeneous",
    "heterogeneous_ar1",
    "heterogeneous_compound_symmetry",
    "kron",
    "simple_param_specs",
    "stratified",
    "transform",
    "weighted",
    "within",
]
