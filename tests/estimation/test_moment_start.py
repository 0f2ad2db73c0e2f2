"""Starting values follow the units of the data, whatever the structure."""

from functools import cache
from math import log

import pytest
import torch
from hypothesis import settings

from openreml_nn import fit_reml
from openreml_nn.covariance import (
    Adapter,
    AR1Matrix,
    BlockDiagonal,
    CovariancePropagation,
    DiagonalMatrix,
    EqualEntryMatrix,
    EquicorrelationMatrix,
    Gram,
    HadamardProduct,
    IdentityMatrix,
    Inverse,
    KroneckerProduct,
    LowerTriangularMatrix,
    Matrix,
    Product,
    ScalarMatrix,
    SimpleMatrix,
    Sum,
    Transpose,
    UnstructuredMatrix,
    ar1_field,
    factor_analytic,
    heterogeneous_ar1,
    heterogeneous_compound_symmetry,
)
from openreml_nn.covariance.params import free_specs
from openreml_nn.covariance.transform import TransformExpPow2, TransformIdentity
from tests.estimation.battery import battery

LAG = (torch.arange(6.0)[:, None] - torch.arange(6.0)).abs().double()
THETA = {"a": {"fixed": False, "default": torch.zeros(1), "trans": TransformIdentity()}}


class UserMatrix(Matrix):
    """A matrix with a forward only, whose second parameter is no scale."""

    def __init__(self):
        specs = free_specs(["shape"]) | free_specs(["size"], trans=TransformExpPow2())
        super().__init__((6, 6), specs)

    def forward(self, free_params=None):
        shape, size = self.build_params(free_params).split(1)
        return size * torch.exp(-LAG.to(size) * torch.exp(shape))


MAKERS = {
    "field": lambda: ar1_field(2, 3),
    "scale left": lambda: KroneckerProduct(AR1Matrix(2), EquicorrelationMatrix(3)),
    "scale right": lambda: KroneckerProduct(EquicorrelationMatrix(2), AR1Matrix(3)),
    "both scales": lambda: KroneckerProduct(AR1Matrix(2), UnstructuredMatrix(3)),
    "Hadamard left": lambda: HadamardProduct(AR1Matrix(6), EquicorrelationMatrix(6)),
    "Hadamard right": lambda: HadamardProduct(EquicorrelationMatrix(6), AR1Matrix(6)),
    "Hadamard tensor": lambda: HadamardProduct(EqualEntryMatrix(6), 3 * torch.eye(6)),
    "product": lambda: Product(
        LowerTriangularMatrix(6, 6), torch.eye(6), Transpose(LowerTriangularMatrix(6, 6))
    ),
    "blocks": lambda: BlockDiagonal(AR1Matrix(2), UnstructuredMatrix(4)),
    "Gram": lambda: Gram(LowerTriangularMatrix(6, 2), gram_type="xxt"),
    "Gram of a covariance": lambda: Gram(UnstructuredMatrix(6)),
    "factors": lambda: factor_analytic(6, 2),
    "heterogeneous AR1": lambda: heterogeneous_ar1(6),
    "heterogeneous CS": lambda: heterogeneous_compound_symmetry(6),
    "inverse": lambda: Inverse(AR1Matrix(6)),
    "function": lambda: SimpleMatrix(
        3,
        lambda t: torch.exp(t[0] - LAG * torch.exp(t[1])) + torch.exp(t[2]) * torch.eye(6).double(),
    ),
    "linear function": lambda: SimpleMatrix(1, lambda t: t * torch.eye(6)),
    "adapter": lambda: Adapter(DiagonalMatrix(6), THETA, lambda t: t.expand(6)),
    "user": UserMatrix,
    "loadings in Z": lambda: CovariancePropagation(
        z=KroneckerProduct(IdentityMatrix(3), LowerTriangularMatrix(2, 1)), g=IdentityMatrix(3)
    ),
    "nested": lambda: Sum(
        KroneckerProduct(EquicorrelationMatrix(2), heterogeneous_ar1(3)),
        HadamardProduct(torch.ones(6, 6), factor_analytic(6, 1)),
    ),
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_start_is_proportional_to_the_variance(name):
    V = MAKERS[name]().double()
    assert V.moment_start(torch.ones(6).double()) is True
    one = V().detach()
    for variance in (1e-8, 1e8):
        assert V.moment_start(torch.full((6,), variance).double()) is True
        assert float((V().detach() / variance - one).norm() / one.norm()) < 1e-8
    # The diagonal is the variance, or that of each of two or three summands.
    assert 0.99 < float(one.diagonal().mean()) < 3.01


def test_a_matrix_without_a_scale_says_so_and_stays():
    V = EquicorrelationMatrix(4).double()
    assert V.moment_start(torch.full((4,), 9.0).double()) is False
    assert V().diagonal().tolist() == [1.0] * 4
    fixed = AR1Matrix(4).double()
    fixed.fix("sigma^2", 0.5)
    before = fixed().detach().diagonal()
    assert fixed.moment_start(torch.full((4,), 9.0).double()) is False
    torch.testing.assert_close(fixed().detach().diagonal(), before)


def test_parameters_without_a_gradient_stay():
    V = Sum(AR1Matrix(4), factor_analytic(4, 1)).double()
    V.requires_grad_(False)
    before = [p.clone() for p in V.parameters()]
    V.moment_start(torch.full((4,), 9.0).double())
    assert all(map(torch.equal, before, V.parameters()))


CASES = {case.name: case for case in battery(3)}
EDGE = ("Hadamard", "effects Toeplitz", "user kernel")  # their optimum is at infinity or at an edge


@cache
def fitted(name):
    case = CASES[name]
    return fit_reml(case.covariance(), case.y, case.X)


def test_a_start_that_stays_behind_is_left():
    """Its likelihood rises along a ridge to infinity, never so far as that of the others."""
    result = fitted("field, large nugget")
    behind = result.starts[0]
    assert behind.iterations == 30 and not behind.converged
    assert behind.log_likelihood < result.log_likelihood - 0.3
    assert behind.parameters["field/row/sigma^2"] > 100
    assert all(start.converged for start in result.starts[1:])


#: Each structure in both units under the thorough profile, else in one of them in turn.
UNITS = [
    (name, unit)
    for i, name in enumerate(CASES)
    for j, unit in enumerate((1e-4, 1e4))
    if name not in EDGE and (settings.default.max_examples > 60 or i % 2 == j)
]


@pytest.mark.filterwarnings("ignore:the data cannot tell apart")
@pytest.mark.parametrize(("name", "unit"), UNITS)
def test_a_fit_does_not_depend_on_the_unit_of_y(name, unit):
    case, base = CASES[name], fitted(name)
    assert base.converged
    free = len(case.y) - case.X.shape[1]
    other = fit_reml(case.covariance(), unit * case.y, case.X)
    assert other.converged
    assert [p.name for p in other.parameters] == [p.name for p in base.parameters]
    shifted = other.log_likelihood + free * log(unit)
    assert shifted == pytest.approx(base.log_likelihood, rel=1e-8)
    if base.indistinct:
        return
    V, W = case.covariance(), case.covariance()
    for matrix, result in ((V, base), (W, other)):
        stored = {p.name: p.untransformed for p in result.parameters}
        with torch.no_grad():
            for entry in matrix.parameter_entries().entries:
                entry.tensor.fill_(stored[entry.name])
    with torch.no_grad():
        one, two = V(), W() / unit**2
    assert float((one - two).norm() / one.norm()) < 1e-5


def test_a_fit_does_not_depend_on_the_unit_of_a_dense_design():
    torch.manual_seed(0)
    Z = torch.randn(60, 3).double()
    X = torch.ones(60, 1).double()
    y = Z @ torch.tensor([1.0, 2.0, 0.5]).double() + torch.randn(60).double()
    found = []
    for unit in (1.0, 1e4, 1e-3):
        scale = torch.tensor([unit, 1.0, 1.0]).double()
        V = Sum(g=CovariancePropagation(z=Z * scale, g=DiagonalMatrix(3)), e=ScalarMatrix(60))
        result = fit_reml(V.double(), y, X)
        assert result.converged
        found.append((result.log_likelihood, result.components[0].covariance * scale**2))
    for value, variance in found[1:]:
        assert value == pytest.approx(found[0][0], rel=1e-10)
        torch.testing.assert_close(variance, found[0][1], rtol=1e-5, atol=1e-12)
