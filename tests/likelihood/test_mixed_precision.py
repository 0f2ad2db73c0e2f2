"""Parameters of single precision with data of double precision: the same numbers as in double."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from openreml_nn import LaplaceLoss, MixedModel, RandomEffect, REMLLoss
from openreml_nn.covariance import (
    Adapter,
    AR1Matrix,
    BlockDiagonal,
    CompoundSymmetricMatrix,
    CovariancePropagation,
    DiagonalMatrix,
    DummyMatrix,
    ExponentialCorrelation,
    ExponentialMatrix,
    GaussianMatrix,
    Heteroscedastic,
    IdentityMatrix,
    KnownInverseMatrix,
    KnownMatrix,
    KroneckerProduct,
    LowerTriangularMatrix,
    MaternMatrix,
    Matrix,
    Operator,
    ScalarMatrix,
    SimpleMatrix,
    Sum,
    UnstructuredMatrix,
    VarianceFunction,
    VecchiaMatrix,
    within,
)
from openreml_nn.covariance.transform import TransformIdentity
from openreml_nn.estimation.marginal import fit_laplace
from openreml_nn.families import NegativeBinomial, Poisson
from openreml_nn.likelihood.solvers import SOLVERS
from openreml_nn.support.errors import NotPositiveDefiniteError
from tests.strategies import places

#: Levels, and rows.
Q, N = 12, 40


@pytest.fixture(autouse=True)
def _single_precision():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(before)


def near(q: int = Q) -> Tensor:
    """Distances of places, each with another very near to it."""
    own = places(q // 2).repeat(2, 1)
    own[q // 2 :] += 1e-4
    return torch.cdist(own, own, compute_mode="donot_use_mm_for_euclid_dist")


def randn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def codes() -> Tensor:
    return torch.randint(Q, (N,), generator=torch.Generator().manual_seed(3))


class OwnKernel(Matrix):
    """A user's matrix, which multiplies tensors of its own with functions of its parameters."""

    def __init__(self) -> None:
        spec = {"fixed": False, "default": torch.full((1,), 0.3), "trans": TransformIdentity()}
        super().__init__((Q, Q), {"length": spec})
        self.register_buffer("distance", near())
        self.register_buffer("turn", torch.linalg.qr(randn(Q, Q))[0])

    def forward(self, free_params=None):
        (length,) = self.build_params(free_params)
        found = self.turn @ torch.exp(-0.5 * (self.distance / length) ** 2)
        return found @ self.turn.mT


class OwnNetwork(Matrix):
    """A user's matrix with a network in it."""

    def __init__(self) -> None:
        spec = {"fixed": False, "default": torch.zeros(1), "trans": TransformIdentity()}
        super().__init__((Q, Q), {"scale": spec})
        self.network = nn.Linear(2, 3)
        self.x = randn(Q, 2)

    def forward(self, free_params=None):
        (scale,) = self.build_params(free_params)
        z = self.network(self.x.to(self.network.weight))
        return torch.exp(scale) * torch.eye(Q) + z @ z.mT


class OwnSum(Operator):
    """A user's operator."""

    def __init__(self, *operands: Matrix) -> None:
        super().__init__(*operands)
        self.register_buffer("weight", torch.eye(Q) * 0.7)

    def combine(self, a, b):
        return a + self.weight @ b


def adapter() -> Matrix:
    specs = {"log": {"fixed": False, "default": torch.zeros(1), "trans": TransformIdentity()}}
    return Adapter(GaussianMatrix(near()), specs, lambda x: torch.cat([x, x / 3]))


def fixed() -> Matrix:
    found = KnownMatrix(torch.exp(-near()) + torch.eye(Q))
    return found.fix("sigma^2", 0.3)


G: dict[str, Callable[[], Matrix]] = {
    "gaussian": lambda: GaussianMatrix(near()),
    "exponential": lambda: ExponentialMatrix(near()),
    "matern": lambda: MaternMatrix(near(), nu=2.5),
    "known": lambda: KnownMatrix(torch.exp(-near())),
    "known inverse": lambda: KnownInverseMatrix(torch.eye(Q).double() * 2 + 0.1),
    "fixed": fixed,
    "neighbours": lambda: VecchiaMatrix(places(Q), ExponentialCorrelation(), 4),
    "levels": lambda: ScalarMatrix(Q),
    "diagonal": lambda: DiagonalMatrix(Q),
    "ar1": lambda: AR1Matrix(Q),
    "effects": lambda: KroneckerProduct(IdentityMatrix(Q // 2), UnstructuredMatrix(2)),
    "product": lambda: KroneckerProduct(GaussianMatrix(near(6)), UnstructuredMatrix(2)),
    "blocks": lambda: BlockDiagonal(GaussianMatrix(near(6)), MaternMatrix(near(6))),
    "scaled": lambda: 2.5 * GaussianMatrix(near()),
    "sum": lambda: GaussianMatrix(near()) + ScalarMatrix(Q),
    "tensors": lambda: GaussianMatrix(near()) * (torch.eye(Q) + 1),
    "propagated": lambda: CovariancePropagation(z=randn(Q, 4), g=GaussianMatrix(near(4))),
    "loadings": lambda: CovariancePropagation(
        z=LowerTriangularMatrix(Q, 2), g=CompoundSymmetricMatrix(2)
    ),
    "hooks": lambda: hooked(GaussianMatrix(near())),
    "adapter": adapter,
    "function": lambda: SimpleMatrix(2, lambda x: torch.diag(x.exp().repeat(Q // 2))),
    "own": OwnKernel,
    "network": OwnNetwork,
    "own operator": lambda: OwnSum(GaussianMatrix(near()), DiagonalMatrix(Q)),
}


def hooked(matrix: Matrix) -> Matrix:
    matrix.register_forward_hook(lambda module, given, value: value * 1.5)
    return matrix


def both(module: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The module with other parameters than its own, and in double precision."""
    for i, p in enumerate(module.parameters()):
        with torch.no_grad():
            p += 0.1 * randn(*p.shape, seed=i)
    return module, copy.deepcopy(module).double()


def check(single: nn.Module, double: nn.Module, value: Callable[[nn.Module], Tensor]) -> None:
    """Values and gradients of both are the same, the latter in the dtype of the parameters."""
    found, expected = value(single), value(double)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    found.backward()
    expected.backward()
    pairs = dict(double.named_parameters())
    for name, p in single.named_parameters():
        other = pairs[name].grad
        if other is None:
            assert p.grad is None
            continue
        assert p.grad.dtype == p.dtype == torch.float32
        scale = max(float(other.abs().max()), 1e-2)
        torch.testing.assert_close(p.grad.double(), other, rtol=1e-6, atol=1e-6 * scale, msg=name)


def data() -> tuple[Tensor, Tensor]:
    X = torch.cat([torch.ones(N, 1), randn(N, 1, seed=4)], 1)
    return 3 * randn(N, seed=5).double(), X.double()


def tree(kind: str, design: str = "codes") -> Sum:
    """The covariance of rows that an effect of that kind and independent errors make."""
    g = G[kind]()
    z: Matrix | Tensor = DummyMatrix.from_codes(codes(), Q)
    if design == "network":
        network = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 2))
        x = randn(N, 1, seed=6)
        z = DummyMatrix.from_codes(codes() % (Q // 2), Q // 2, Learned(network, x))
    elif design == "parameter":
        z = nn.Parameter(randn(N, Q, seed=7) / 4)
    return Sum(g=CovariancePropagation(z=z, g=g), r=ScalarMatrix(N))


class Learned(nn.Module):
    """Covariates that a network yields in its own precision."""

    def __init__(self, network: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("x", x)

    def forward(self) -> Tensor:
        found = self.network(self.x)
        assert found.dtype == next(self.network.parameters()).dtype
        return found


def able(V: Matrix, known: set[str] = set(SOLVERS)) -> list[str]:  # noqa: B006
    """The solvers that take a covariance, exact ones and the approximate one."""
    terms = V.terms(None, torch.float64)
    return [name for name in sorted(known) if SOLVERS[name]().forecast(terms, 2, torch.float64)]


@pytest.mark.parametrize("kind", G)
def test_a_restricted_likelihood_is_that_of_double_precision(kind):
    single, double = both(tree(kind))
    y, X = data()
    names = able(double)
    assert {"dense", "blocked"} <= set(names)
    for name in names:
        single.zero_grad()
        double.zero_grad()
        check(single, double, lambda V, name=name: REMLLoss(V, solver=name)(y, X))


@pytest.mark.parametrize("kind", ["levels", "gaussian", "own", "effects"])
@pytest.mark.parametrize("design", ["network", "parameter"])
def test_so_it_is_with_a_trainable_design(design, kind):
    torch.manual_seed(1)
    single, double = both(tree(kind, design))
    y, X = data()
    if design == "parameter":
        check(single, double, lambda V: REMLLoss(V, solver="blocked")(y, X))
        return
    # A network rounds what it yields: the same as with that as known numbers in double precision.
    z = single.operands["g"].operands["z"]
    known = DummyMatrix.from_codes(z.codes, Q // 2, z.values().detach().double())
    fixed = Sum(
        g=CovariancePropagation(z=known, g=double.operands["g"].operands["g"]),
        r=double.operands["r"],
    )
    found, expected = REMLLoss(single)(y, X), REMLLoss(fixed)(y, X)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    found.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in single.parameters())


def test_structures_over_rows_are_those_of_double_precision():
    groups, at = torch.arange(N) // Q, torch.arange(N) % Q
    x = randn(N, seed=8).abs().double() + 0.5
    for V in (
        within(groups, MaternMatrix(near(), nu=2.5), at) + ScalarMatrix(N),
        Heteroscedastic(variance=VarianceFunction(x), matrix=within(groups, AR1Matrix(Q), at)),
        Sum(g=GaussianMatrix(near(N)), r=ScalarMatrix(N).fix("sigma^2", 0.1)),
    ):
        single, double = both(V)
        check(single, double, lambda V: REMLLoss(V)(*data()))


@pytest.mark.parametrize(
    ("kind", "solver"),
    [(kind, solver) for kind in ("gaussian", "own", "fixed") for solver in ("dense", "blocked")]
    + [("effects", "sparse"), ("known inverse", "sparse"), ("neighbours", "sparse")],
)
def test_a_family_has_the_likelihood_of_double_precision(kind, solver):
    V = CovariancePropagation(z=DummyMatrix.from_codes(codes(), Q), g=G[kind]())
    single, double = both(LaplaceLoss(V, NegativeBinomial(), solver=solver))
    y = torch.poisson(torch.full((N,), 3.0), generator=torch.Generator().manual_seed(1))
    eta = torch.full((N,), 0.9).double()
    check(single, double, lambda loss: loss(y, eta))


@pytest.mark.parametrize("kind", ["gaussian", "matern", "own", "levels"])
@pytest.mark.parametrize("head", ["ml", "gls"])
def test_a_mixed_model_has_the_loss_and_predictions_of_double_precision(head, kind):
    y, X = data()
    batch = {"x": X, "y": y, "groups": {"g": codes()}}
    mean = nn.Identity() if head == "gls" else nn.Linear(2, 1).double()
    model = MixedModel(mean, {"g": RandomEffect(Q, G[kind]())}, ScalarMatrix(1), head)
    single, double = both(model)
    mean.float()
    if head == "ml":
        double.mean.load_state_dict(single.mean.state_dict())
        batch["x"] = X.float()
    of_double = {**batch, "x": X.float().double()}
    found, expected = single.loss(batch), double.loss(of_double)
    # The network's output is rounded, as it is of single precision.
    torch.testing.assert_close(found, expected, rtol=1e-6 if head == "ml" else 1e-9, atol=0)
    for model, data_of in ((single, batch), (double, of_double)):
        model.update(data_of)
    for one, other in zip(single.predict(batch), double.predict(of_double), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-6, atol=1e-6)
    fresh = copy.deepcopy(model.float())
    fresh.load_state_dict(single.state_dict())
    torch.testing.assert_close(fresh.predict(batch), single.predict(batch), rtol=1e-6, atol=1e-6)


def test_a_place_among_near_ones_is_kriged_as_in_double_precision():
    own = places(Q // 2).repeat(2, 1)
    own[Q // 2 :] += 1e-3
    K = GaussianMatrix(torch.cdist(own, own, compute_mode="donot_use_mm_for_euclid_dist"))
    model = MixedModel(nn.Identity(), {"g": RandomEffect(Q, K, places=own)}, ScalarMatrix(1), "gls")
    y, X = data()
    single, double = both(model)
    new = {"x": X[:5], "groups": {"g": torch.full((5,), -1)}, "places": {"g": places(5)}}
    for one in (single, double):
        one.update({"x": X, "y": y, "groups": {"g": codes()}})
    for one, other in zip(single.predict(new), double.predict(new), strict=True):
        assert one.dtype == torch.float64
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("solver", ["blocked", "sparse", "krylov"])
def test_counts_of_double_precision_are_fitted_in_it_whatever_the_model_matrix(solver):
    codes = torch.arange(60) % 12
    y = torch.poisson(torch.linspace(0.5, 3, 12, dtype=torch.float64)[codes])
    found = []
    for dtype in (torch.float32, torch.float64):
        V = Sum(g=CovariancePropagation(z=DummyMatrix.from_codes(codes, 12), g=ScalarMatrix(12)))
        fit, _ = fit_laplace(
            LaplaceLoss(V, Poisson(), solver=solver), y, torch.ones(60, 1).to(dtype)
        )
        assert fit.converged and fit.fixed.estimate.dtype == torch.float64
        found.append(fit.log_likelihood)
    assert found[0] == pytest.approx(found[1], rel=1e-12)


def test_single_precision_throughout_stays_so():
    y, X = (x.float() for x in data())
    V = tree("exponential")
    for solver in ("dense", "blocked"):
        assert REMLLoss(V, solver=solver)(y, X).dtype == torch.float32
    assert V().dtype == torch.float32
    model = MixedModel(nn.Linear(2, 1), {"g": RandomEffect(Q, ScalarMatrix(Q))}, ScalarMatrix(1))
    batch = {"x": X, "y": y, "groups": {"g": codes()}}
    assert model.loss(batch).dtype == torch.float32
    model.update(batch)
    assert {x.dtype for x in model.predict(batch)} == {torch.float32}


def test_the_widest_parameter_counts_wherever_it_stands():
    y, X = (x.float() for x in data())
    terms = [tree("levels"), ScalarMatrix(N).double()]
    found = [REMLLoss(Sum(*order))(y, X) for order in (terms, terms[::-1])]
    assert [x.dtype for x in found] == [torch.float64] * 2
    torch.testing.assert_close(*found, rtol=1e-12, atol=0)


def test_distances_of_few_digits_are_named_where_they_are_no_covariance():
    x = torch.rand(30, 1, generator=torch.Generator().manual_seed(0))
    places = torch.cat([x, x + 1e-3])
    y, X = torch.arange(120.0).double().sin(), torch.ones(120, 1).double()
    codes = torch.arange(60).repeat(2)

    def loss(places):
        d = torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist")
        term = CovariancePropagation(DummyMatrix.from_codes(codes, 60), GaussianMatrix(d))
        return REMLLoss(Sum(term, ScalarMatrix(120)), solver="blocked")(y, X)

    with pytest.raises(NotPositiveDefiniteError, match=r"have fewer digits than torch\.float64"):
        loss(places)
    assert torch.isfinite(loss(places.double()))
