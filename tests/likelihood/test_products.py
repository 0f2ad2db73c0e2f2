"""Precisions made of others equal the matrices that they are made for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from openreml_nn import LaplaceLoss, REMLLoss
from openreml_nn.covariance import (
    AR1Matrix,
    BlockDiagonal,
    CARMatrix,
    CovariancePropagation,
    DiagonalMatrix,
    DummyMatrix,
    EquicorrelationMatrix,
    ExponentialCorrelation,
    ExponentialMatrix,
    Heteroscedastic,
    IdentityMatrix,
    KroneckerProduct,
    Matrix,
    ScalarMatrix,
    Sum,
    UnstructuredMatrix,
    VarianceFunction,
    VecchiaMatrix,
    ar1_field,
)
from openreml_nn.families import Poisson
from openreml_nn.likelihood import Sparse
from openreml_nn.terms.blocks import BlockCovariance
from openreml_nn.terms.precision import PrecisionCovariance
from openreml_nn.terms.products import (
    DensePrecision,
    DirectSumPrecision,
    KroneckerPrecision,
)
from openreml_nn.terms.scaled import ScaledPrecision
from openreml_nn.terms.series import (
    DecayPrecision,
    RepeatedPrecision,
    SeriesPrecision,
    StepPrecision,
)
from tests.likelihood.test_fields import Model, assert_equal
from tests.strategies import distances, path, places

SERIES = SeriesPrecision(np.array([0, 1, 2, 0, 1]))
SIGMA = torch.tensor([2.0, 0.5, 0.5, 1.0]).double()
RHO, V = torch.tensor([0.6]).double(), torch.tensor([1.5]).double()
PRECISIONS = {
    "dense": (DensePrecision(2), SIGMA),
    "series by effects": (
        KroneckerPrecision(SERIES, DensePrecision(2), 1),
        torch.cat([RHO, SIGMA]),
    ),
    "effects by series": (
        KroneckerPrecision(DensePrecision(2), SERIES, 4),
        torch.cat([SIGMA, RHO]),
    ),
    "parts": (
        DirectSumPrecision([SERIES, DensePrecision(2)], [1, 4]),
        torch.cat([V, RHO, V / 2, SIGMA]),
    ),
    "scaled": (ScaledPrecision(SERIES), torch.cat([torch.arange(-1, 4).double() - 0.5, RHO])),
    "series": (SERIES, -RHO),
    "times": (DecayPrecision(np.array([3.0, 1.0, 2.5, 2.0, 0.1]), np.array([0, 1, 0, 0, 1])), RHO),
    "steps": (StepPrecision(4), torch.tensor([0.5, -0.4, 0.0]).double()),
    "copies": (RepeatedPrecision(StepPrecision(2), 2), RHO),
}


@pytest.mark.parametrize("name", PRECISIONS)
def test_a_precision_is_the_inverse_of_its_covariance_with_its_derivatives(name):
    Q, x = PRECISIONS[name]
    generator = torch.Generator().manual_seed(0)
    numbers, u = x.numpy(), torch.randn(Q.size, 3, generator=generator).double()
    dx = torch.randn(len(x), generator=generator).double()
    if "dense" in name or "effects" in name or name == "parts":  # a tangent of Σ is symmetric
        at = {"effects by series": 0, "dense": 0}.get(name, len(x) - 4)
        dx[at + 1] = dx[at + 2]
    inverse = torch.linalg.inv(Q.covariance(x))
    close = torch.testing.assert_close
    close(torch.from_numpy(Q.matrix(Q.entries(numbers)).toarray()), inverse)
    assert (np.diff(Q.column * Q.size + Q.row) > 0).all()  # column by column
    close(torch.from_numpy(Q.solve(numbers, u.numpy())), Q.covariance(x) @ u)
    K, along = torch.func.jvp(Q.covariance, (x,), (dx,))
    close(Q.covariance_along(x, dx), along)
    moved = -inverse @ along @ inverse
    close(torch.from_numpy(Q.along(numbers, dx.numpy(), u.numpy())), moved @ u)
    log_det, slope = Q.log_det(numbers)
    assert log_det == pytest.approx(-float(torch.logdet(K)), abs=1e-12)
    assert slope @ dx.numpy() == pytest.approx(float(torch.trace(K @ moved)), abs=1e-12)
    c = torch.randn(len(Q.row), generator=generator).double()
    pulled = Q.pull(numbers, c.numpy()) @ dx.numpy()
    assert pulled == pytest.approx(float(c @ moved[Q.row, Q.column]), abs=1e-12)
    close(torch.from_numpy(Q.variances(numbers)), K.diagonal())
    at, by = numbers, u.numpy()
    close(torch.from_numpy(Q.times(at, by)), inverse @ u)
    close(torch.from_numpy(Q.inner(at, by, 1)), u.mT @ inverse @ u)
    square = Q.pull_square(at, by) @ dx.numpy()
    assert square == pytest.approx(float(torch.trace(u.mT @ moved @ u)) / 2, abs=1e-12)


def held(matrix: Matrix) -> Matrix:
    matrix.fix("sigma^2", 0.0)
    return matrix


STRUCTURES = {
    "copies of a field": lambda: KroneckerProduct(IdentityMatrix(2), ar1_field(13, 20)),
    "copies with their scale": lambda: KroneckerProduct(
        ScalarMatrix(2), held(AR1Matrix(20)), held(AR1Matrix(13))
    ),
    "copies of effects by a series": lambda: KroneckerProduct(
        IdentityMatrix(2), KroneckerProduct(UnstructuredMatrix(2), held(AR1Matrix(210)))
    ),
    "effects by a field": lambda: KroneckerProduct(UnstructuredMatrix(2), ar1_field(13, 20)),
    "a field by effects": lambda: KroneckerProduct(ar1_field(13, 20), DiagonalMatrix(2)),
    "effects between sides": lambda: KroneckerProduct(
        AR1Matrix(20), UnstructuredMatrix(2), held(AR1Matrix(13))
    ),
    "a short series by effects": lambda: KroneckerProduct(AR1Matrix(100), UnstructuredMatrix(3)),
    "series of strata": lambda: BlockDiagonal(AR1Matrix(210), AR1Matrix(40), ar1_field(4, 5)),
    "effects of strata": lambda: BlockDiagonal(
        KroneckerProduct(UnstructuredMatrix(2), held(AR1Matrix(130))), AR1Matrix(10)
    ),
    "areas by two series": lambda: KroneckerProduct(CARMatrix(path(15)), ar1_field(4, 5)),
}


def made(matrix: Matrix, kind: str) -> Model:
    """A structure as the covariance of residuals, of which some cells have no row, perhaps with
    variances by a covariate, or of effects."""
    rng, q = np.random.default_rng(0), matrix.shape[0]
    n = q - 5
    cells = rng.integers(0, q, n) if kind == "effects" else rng.permutation(q)[:n]
    z = DummyMatrix.from_codes(torch.from_numpy(cells), q)
    parts: dict[str, Matrix] = {"structure": CovariancePropagation(z=z, g=matrix)}
    if kind == "effects":
        parts["units"] = ScalarMatrix(n)
    if kind == "scaled":
        function = VarianceFunction(torch.from_numpy(rng.uniform(0.5, 2, n)))
        parts = {"structure": Heteroscedastic(variance=held(function), matrix=parts["structure"])}
    tree = Sum(parts).double()
    with torch.no_grad():
        for parameter in tree.parameters():
            parameter.copy_(torch.from_numpy(0.5 * rng.standard_normal(1)))
    X = np.column_stack([np.ones(n), rng.standard_normal(n)])
    return tree, torch.from_numpy(rng.standard_normal(n)), torch.from_numpy(X)


#: Which are seen as effects too, and which beside variances by a covariate.
EFFECTS = ("copies of a field", "effects by a field", "series of strata", "areas by two series")
SCALED = ("effects between sides", "series of strata", "effects of strata")
CASES = [
    *((name, "residual") for name in STRUCTURES),
    *((name, "effects") for name in EFFECTS),
    *((name, "scaled") for name in SCALED),
]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_products_with_autoregressions_are_sparse_and_equal_dense(name, kind):
    model = made(STRUCTURES[name](), kind)
    tree, *_ = model
    (term, *_) = tree.terms()
    g = term.covariance
    assert isinstance(g, PrecisionCovariance) or g.is_chained
    torch.testing.assert_close(term.dense(), tree.operands["structure"]())
    assert Sparse().obstacle(tree.terms()) is None
    assert_equal(model)


def by_groups() -> tuple[Matrix, torch.Tensor]:
    """Effects of groups of three, each group with variances of its own, and codes of 40 rows."""
    rng = np.random.default_rng(0)
    function = VarianceFunction(torch.from_numpy(rng.uniform(0.5, 2, 12)))
    groups = KroneckerProduct(IdentityMatrix(4), EquicorrelationMatrix(3))
    G = Heteroscedastic(variance=function, matrix=groups).double()
    return G, torch.from_numpy(rng.integers(0, 12, 40))


@pytest.mark.parametrize("method", ["reml", "ml"])
def test_groups_of_effects_with_a_covariance_each_equal_dense(method):
    G, codes = by_groups()
    (term,) = G.terms()
    assert isinstance(term.covariance, BlockCovariance)
    tree = Sum(CovariancePropagation(DummyMatrix.from_codes(codes, 12), G), ScalarMatrix(40))
    X = torch.stack([torch.ones(40), torch.linspace(-1, 1, 40)], 1).double()
    assert_equal((tree.double(), torch.linspace(-2, 1, 40).double() ** 2, X), method)


def test_groups_of_effects_with_a_covariance_each_have_their_gradient_with_a_family():
    G, codes = by_groups()
    tree = Sum(CovariancePropagation(DummyMatrix.from_codes(codes, 12), G)).double()
    y, eta = (codes % 4).double(), torch.zeros(40).double()
    found = []
    for solver in ("sparse", "blocked"):
        value = LaplaceLoss(tree, Poisson(), solver=solver)(y, eta)
        found.append(torch.stack([value[None], *torch.autograd.grad(value, tree.parameters())]))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_a_precision_of_one_place_is_an_ordinary_one():
    series = PrecisionCovariance(
        torch.tensor([2.0, 0.3]).double(), SeriesPrecision(np.zeros(1, dtype=int))
    )
    (near,) = VecchiaMatrix(places(1), ExponentialCorrelation(), 3).double().terms()
    x = torch.tensor([[1.0, -2.0]]).double()
    for g in (series, near.covariance):
        with torch.no_grad():
            torch.testing.assert_close(g.multiply(x), g.whole(1) @ x)


def test_the_plan_takes_them_and_knows_what_blocks_of_residuals_cost():
    for copies, rows, solver in ((2, 25, "sparse"), (12, 4, "blocked")):
        field = KroneckerProduct(IdentityMatrix(copies), ar1_field(rows, 40))
        tree, *_ = made(field, "residual")
        assert REMLLoss(tree).plan.solver == solver
    blocks = KroneckerProduct(IdentityMatrix(2), ExponentialMatrix(distances(400)))
    tree, *_ = made(blocks, "residual")
    plan = REMLLoss(tree, solver="blocked").plan
    assert plan.cost.operations > 2 * 400.0**3
