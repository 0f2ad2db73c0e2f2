"""Covariance matrices and operators as modules."""

from openreml_nn.covariance import transform
from openreml_nn.covariance.antedependence import AntedependenceMatrix
from openreml_nn.covariance.autoregressive import (
    AR1Matrix,
    StationaryMatrix,
    ToeplitzMatrix,
)
from openreml_nn.covariance.block import Augment, BlockDiagonal, Stack
from openreml_nn.covariance.compat import simple_param_specs
from openreml_nn.covariance.correlation import (
    Correlation,
    ExponentialCorrelation,
    GaussianCorrelation,
    MaternCorrelation,
    SphericalCorrelation,
)
from openreml_nn.covariance.decaying import (
    LinearCorrelation,
    LinearMatrix,
    RationalQuadraticCorrelation,
    RationalQuadraticMatrix,
)
from openreml_nn.covariance.dummy import DummyMatrix
from openreml_nn.covariance.exchangeable import (
    CompoundSymmetricMatrix,
    EqualEntryMatrix,
    EquicorrelationMatrix,
)
from openreml_nn.covariance.genomic import (
    epistatic_relationship,
    genomic_relationship,
    marker_codes,
    marker_effects,
)
from openreml_nn.covariance.graph import CARMatrix, ICARMatrix, RandomWalkMatrix
from openreml_nn.covariance.heteroscedastic import Heteroscedastic
from openreml_nn.covariance.identity import DiagonalMatrix, IdentityMatrix, ScalarMatrix
from openreml_nn.covariance.kernel import (
    ExponentialMatrix,
    GaussianMatrix,
    KnownMatrix,
    MaternMatrix,
    SphericalMatrix,
)
from openreml_nn.covariance.known_inverse import KnownInverseMatrix
from openreml_nn.covariance.kronecker import KroneckerProduct
from openreml_nn.covariance.matrix import Matrix
from openreml_nn.covariance.membership import MembershipMatrix
from openreml_nn.covariance.operator import Operator
from openreml_nn.covariance.pedigree import Pedigree
from openreml_nn.covariance.product import Gram, HadamardProduct, Inverse, Product, Transpose
from openreml_nn.covariance.propagation import CovariancePropagation
from openreml_nn.covariance.relationship import Relationship
from openreml_nn.covariance.simple import Adapter, SimpleMatrix
from openreml_nn.covariance.single_step import single_step_relationship
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
from openreml_nn.covariance.vecchia import VecchiaMatrix

__all__ = [
    "AR1Matrix",
    "ARMAMatrix",
    "Adapter",
    "AntedependenceMatrix",
    "Augment",
    "BlockDiagonal",
    "CARMatrix",
    "CompoundSymmetricMatrix",
    "ContinuousAR1Matrix",
    "Correlation",
    "CovariancePropagation",
    "DiagonalMatrix",
    "DummyMatrix",
    "EqualEntryMatrix",
    "EquicorrelationMatrix",
    "ExponentialCorrelation",
    "ExponentialMatrix",
    "GaussianCorrelation",
    "GaussianMatrix",
    "Gram",
    "HadamardProduct",
    "Heteroscedastic",
    "ICARMatrix",
    "IdentityMatrix",
    "Inverse",
    "KnownInverseMatrix",
    "KnownMatrix",
    "KroneckerProduct",
    "LinearCorrelation",
    "LinearMatrix",
    "LowerTriangularMatrix",
    "MaternCorrelation",
    "MaternMatrix",
    "Matrix",
    "MembershipMatrix",
    "Operator",
    "Pedigree",
    "Product",
    "RandomWalkMatrix",
    "RationalQuadraticCorrelation",
    "RationalQuadraticMatrix",
    "Relationship",
    "ScalarMatrix",
    "SimpleMatrix",
    "SphericalCorrelation",
    "SphericalMatrix",
    "Stack",
    "StationaryMatrix",
    "Sum",
    "ToeplitzMatrix",
    "Transpose",
    "UnconstrainedMatrix",
    "UnstructuredMatrix",
    "VarianceFunction",
    "VecchiaMatrix",
    "ar1_field",
    "epistatic_relationship",
    "factor_analytic",
    "genomic_relationship",
    "heterogeneous",
    "heterogeneous_ar1",
    "heterogeneous_compound_symmetry",
    "kron",
    "marker_codes",
    "marker_effects",
    "simple_param_specs",
    "single_step_relationship",
    "stratified",
    "transform",
    "weighted",
    "within",
]
