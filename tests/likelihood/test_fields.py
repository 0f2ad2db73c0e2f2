"""Fields of plots, several and with plots missing, by sparse precisions against dense algebra."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openreml_nn import MixedModel, REMLLoss
from openreml_nn.covariance import (
    AR1Matrix,
    BlockDiagonal,
    CovariancePropagation,
    DiagonalMatrix,
    DummyMatrix,
    ExponentialMatrix,
    IdentityMatrix,
    KroneckerProduct,
    MaternCorrelation,
    Matrix,
    ScalarMatrix,
    Sum,
    UnstructuredMatrix,
    VecchiaMatrix,
    ar1_field,
)
from openreml_nn.estimation.starts import reaches
from openreml_nn.likelihood import Sparse, restricted_log_likelihood
from openreml_nn.model.structures import linear_model
from openreml_nn.table import Encoder
from openreml_nn.terms.covariance import DiagonalCovariance
from tests.strategies import distances

Model = tuple[Sum, torch.Tensor, torch.Tensor]


def trials(
    sizes: list[tuple[int, int]],
    missing: float = 0.0,
    seed: int = 0,
    weights: bool = False,
    nugget: bool = False,
    genotypes: bool = True,
) -> Model:
    """Plots of some trials in any order of rows, each trial with a field of its own."""
    rng = np.random.default_rng(seed)
    blocks: dict[str, Matrix] = {}
    for i, (rows, columns) in enumerate(sizes):
        q = rows * columns
        kept = torch.from_numpy(rng.permutation(q)[: max(2, round(q * (1 - missing)))])
        field = AR1Matrix(q) if 1 in (rows, columns) else ar1_field(rows, columns)
        blocks[f"site{i}"] = CovariancePropagation(z=DummyMatrix.from_codes(kept, q), g=field)
    joined = BlockDiagonal(blocks)
    n = joined.shape[0]
    scale = torch.from_numpy(rng.uniform(0.5, 2, n)) if weights else None
    z = DummyMatrix.from_codes(torch.from_numpy(rng.permutation(n)), n, scale)
    parts: dict[str, Matrix] = {"field": CovariancePropagation(z=z, g=joined)}
    if genotypes:
        codes = torch.from_numpy(rng.integers(0, 5, n))
        parts["gen"] = CovariancePropagation(DummyMatrix.from_codes(codes, 5), ScalarMatrix(5))
    if nugget:
        parts["units"] = ScalarMatrix(n)
    V = Sum(parts).double()
    with torch.no_grad():
        for parameter in V.parameters():
            parameter.copy_(torch.from_numpy(0.7 * rng.standard_normal(1)))
    X = np.column_stack([np.ones(n), rng.standard_normal(n)])
    return V, torch.from_numpy(rng.standard_normal(n)), torch.from_numpy(X)


def assert_equal(model: Model, method: str = "reml", tolerance: float = 1e-9) -> None:
    """The sparse solver equals the dense one in all that an evaluation gives."""
    V, y, X = model
    found = []
    for solver in ("sparse", "dense"):
        objective = REMLLoss(V, method, solver).objective(y, X)
        at, matrices = objective.evaluate(), objective.matrices(None)
        # A chain's score is by the entries that its inverse depends on: it is compared by parameters.
        value = sum((s * m).sum() for s, m in zip(at.scores(), matrices, strict=True))
        gradient = torch.autograd.grad(value, list(V.parameters()), retain_graph=True)
        generator = torch.Generator().manual_seed(0)
        along = []
        for matrix in matrices:
            d = torch.randn(2, *matrix.shape, generator=generator, dtype=matrix.dtype)
            along.append(d + d.mT if d.dim() == 3 and d.shape[1] == d.shape[2] else d)
        effects = [x for each in at.random for x in (each.values, each.variances)]
        found.append(
            [
                at.log_likelihood, at.fixed.estimate, at.fixed.covariance, torch.cat(gradient),
                at.information(along), *at.data_scores(), *effects,
            ]
        )  # fmt: skip
    for one, other in zip(*found, strict=True):
        size = max(1.0, float(other.abs().max())) if other.numel() else 1.0
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * size)


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.sampled_from([(3, 4), (1, 6), (5, 3)]), min_size=1, max_size=3),
    st.sampled_from([0.0, 0.3]),
    st.integers(0, 1000),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["reml", "ml"]),
)
def test_fields_of_trials_equal_dense(sizes, missing, seed, weights, nugget, genotypes, method):
    assert_equal(trials(sizes, missing, seed, weights, nugget, genotypes), method)


def test_a_field_does_not_depend_on_the_order_of_its_plots_nor_on_the_unit():
    V, y, X = trials([(4, 5), (3, 4)], 0.2)
    expected = REMLLoss(V, solver="sparse").evaluate(y, X)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(1))
    z = DummyMatrix.from_codes(order, len(y))
    moved = Sum({name: CovariancePropagation(z, each) for name, each in V.operands.items()})
    found = REMLLoss(moved, solver="sparse").evaluate(y[order], X[order])
    assert float(found.log_likelihood) == pytest.approx(float(expected.log_likelihood), abs=1e-10)
    with torch.no_grad():
        for name, parameter in V.named_parameters():
            if name.endswith("sigma^2"):
                parameter += np.log(1e-6)  # x of e^2x
    scaled = REMLLoss(V, solver="sparse").evaluate(1e-6 * y, X)
    lost = (len(y) - X.shape[1]) * np.log(1e-6)
    assert float(scaled.log_likelihood + lost) == pytest.approx(
        float(expected.log_likelihood), abs=1e-8
    )


def test_large_fields_are_planned_to_be_sparse():
    V, *_ = trials([(20, 30)] * 3, 0.1)
    assert REMLLoss(V).plan.solver == "sparse"


def test_blocks_of_any_kind_have_the_likelihood_of_their_matrix():
    n = 9
    blocks = BlockDiagonal(near=ExponentialMatrix(distances(n)), far=DiagonalMatrix(4)).double()
    y, X = torch.linspace(-1, 1, n + 4).double() ** 2, torch.ones(n + 4, 1).double()
    (term,) = blocks.terms()
    torch.testing.assert_close(term.dense(), blocks())
    whole = REMLLoss(blocks).evaluate(y, X)
    by_hand = REMLLoss(Sum(blocks, torch.zeros(n + 4, n + 4).double())).evaluate(y, X)
    assert float(whole.log_likelihood) == pytest.approx(float(by_hand.log_likelihood), abs=1e-10)
    plain = BlockDiagonal(ScalarMatrix(3), DiagonalMatrix(2)).double()
    (term,) = plain.terms()
    assert isinstance(term.covariance, DiagonalCovariance)
    torch.testing.assert_close(term.dense(), plain())


@pytest.mark.parametrize("nugget", ["", " + units"])
@pytest.mark.parametrize("weights", [None, "w"])
def test_fields_by_formula_are_sparse_and_equal_dense(nugget, weights):
    rng = np.random.default_rng(0)
    grid = np.array([(s, i, j) for s in "ab" for i in range(4) for j in range(5)], dtype=object)
    table = pd.DataFrame(grid[rng.permutation(40)[:33]], columns=["site", "row", "col"])
    table = table.assign(y=rng.standard_normal(33), w=rng.uniform(0.5, 2, 33))
    encoded = Encoder(
        "y ~ site", weights=weights, residual=f"diag(site):ar1(row):ar1(col){nugget}"
    ).fit(table)
    found = []
    for solver in ("dense", "sparse"):
        model: MixedModel = linear_model(encoded, solver=solver)
        found.append(float(model.objective(encoded.batch()).evaluate().log_likelihood))
    assert found[1] == pytest.approx(found[0], abs=1e-9)
    assert Sparse().obstacle(model.covariance(encoded.batch()).terms()) is None


# ---------------------------------------------------------------------- series and copies


def with_factor(n: int, seed: int, nugget: bool, **parts: Matrix) -> Model:
    """Some covariances beside a factor, at random parameters."""
    rng = np.random.default_rng(seed)
    codes = torch.from_numpy(rng.integers(0, 5, n))
    every: dict[str, Matrix] = dict(parts)
    every["g"] = CovariancePropagation(DummyMatrix.from_codes(codes, 5), ScalarMatrix(5))
    if nugget:
        every["units"] = ScalarMatrix(n)
    V = Sum(every).double()
    with torch.no_grad():
        for parameter in V.parameters():
            parameter.copy_(torch.from_numpy(0.5 * rng.standard_normal(1)))
    return V, torch.from_numpy(rng.standard_normal(n)), torch.ones(n, 1, dtype=torch.float64)


@pytest.mark.parametrize("nugget", [False, True])
@pytest.mark.parametrize("method", ["reml", "ml"])
def test_series_with_gaps_equal_dense(nugget, method):
    rng = np.random.default_rng(1)
    times = np.concatenate([np.sort(rng.permutation(400)[:15]) for _ in range(3)])
    series = torch.arange(3).repeat_interleave(15)
    A = AR1Matrix(400).at(series, torch.from_numpy(times))
    assert_equal(with_factor(45, 1, nugget, series=A), method)


@pytest.mark.parametrize("nugget", [False, True])
def test_long_series_of_which_times_are_missing_equal_dense(nugget):
    cells = torch.randperm(500, generator=torch.Generator().manual_seed(0))[:60]
    z = DummyMatrix.from_codes(cells, 500)
    G = KroneckerProduct(IdentityMatrix(2), AR1Matrix(250))
    assert_equal(with_factor(60, 2, nugget, series=CovariancePropagation(z, G)))


def test_a_series_has_its_derivatives_and_those_at_no_correlation():
    A = AR1Matrix(9).at(torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 1, 5, 3, 4])).double()
    whole = AR1Matrix(9).double()()
    for rho in (0.0, 0.4, -0.7):
        A.set_value("rho", rho, natural=True)
        (term,) = A.terms()
        torch.testing.assert_close(term.dense(), A())
        free = torch.stack([p.detach() for p in A.parameters()]).reshape(-1).requires_grad_()
        assert torch.autograd.gradcheck(A, free)
        assert torch.autograd.gradgradcheck(A, free)
    A.set_value("rho", 0.0, natural=True)
    torch.testing.assert_close(A(), whole[:5, :5])


@pytest.mark.parametrize("kind", ["within groups", "several effects", "effects first"])
def test_neighbours_within_groups_and_of_several_effects_equal_dense(kind):
    rng = np.random.default_rng(3)
    near = VecchiaMatrix(torch.from_numpy(rng.uniform(0, 1, (20, 2))), MaternCorrelation(1.5), 4)
    effects = torch.from_numpy(rng.standard_normal((50, 2)))
    G, q, values = {
        "within groups": (KroneckerProduct(IdentityMatrix(3), near), 60, None),
        "several effects": (KroneckerProduct(near, UnstructuredMatrix(2)), 20, effects),
        "effects first": (KroneckerProduct(UnstructuredMatrix(2), near), 40, None),
    }[kind]
    z = DummyMatrix.from_codes(torch.from_numpy(rng.integers(0, q, 50)), q, values)
    assert_equal(with_factor(50, 3, True, near=CovariancePropagation(z, G)))


@pytest.mark.parametrize("nugget", [False, True])
def test_a_series_of_twenty_thousand_times_takes_no_matrix(nugget):
    n = 20_000
    parts = {"series": AR1Matrix(n)} | ({"units": ScalarMatrix(n)} if nugget else {})
    V, y = Sum(parts).double(), torch.linspace(-1, 1, n, dtype=torch.float64).sin()
    loss = REMLLoss(V, "ml")
    assert loss.plan.solver == "sparse"
    value = loss(y, torch.ones(n, 1, dtype=torch.float64))
    value.backward()
    assert all(torch.isfinite(p.grad).all() for p in V.parameters() if p.grad is not None)
    if not nugget:  # innovations, at the start: no correlation and a variance of one
        e = y - y.mean()
        assert float(value) * n == pytest.approx(float(n * np.log(2 * np.pi) + e @ e) / 2)


def test_series_by_formula_are_seen_at_the_times_of_their_rows():
    rng = np.random.default_rng(0)
    time = np.concatenate([np.sort(rng.permutation(90_000)[:20]) for _ in range(2)])
    table = pd.DataFrame({"time": time, "g": np.repeat(list("ab"), 20)})
    table = table.assign(y=rng.standard_normal(40), w=rng.uniform(0.5, 2, 40)).sample(frac=1)
    encoded = Encoder("y ~ 1", residual="ar1(time | g)", weights="w").fit(table)
    model = linear_model(encoded)
    model.residual.set_value("rho", 0.9999, natural=True)
    found = float(model.objective(encoded.batch()).evaluate().log_likelihood)
    lags = np.abs(np.subtract.outer(*[table["time"].to_numpy()] * 2))
    together = np.equal.outer(*[table["g"].to_numpy()] * 2)
    scale = 1 / np.sqrt(table["w"].to_numpy())
    V = torch.from_numpy(0.9999**lags * together * np.outer(scale, scale))
    y, X = torch.tensor(table["y"].to_numpy()), torch.ones(40, 1, dtype=torch.float64)
    assert found == pytest.approx(float(restricted_log_likelihood(y, X, V)), abs=1e-8)


def test_fields_of_many_trials_start_from_a_few_reaches():
    found = reaches(trials([(2, 3)] * 6)[0])
    assert len(found) == 5  # three for all, and rows or columns far
    far = {matrix for matrix, reach in found[3] if reach > 0.5}
    assert len(far) == 6
    assert far.isdisjoint(matrix for matrix, reach in found[4] if reach > 0.5)
