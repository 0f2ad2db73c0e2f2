"""Random walks and conditional autoregressions against their definitions, in every solver."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix

from openreml_nn import InputError, REMLLoss
from openreml_nn.covariance import (
    CARMatrix,
    CovariancePropagation,
    DummyMatrix,
    ICARMatrix,
    KnownInverseMatrix,
    KnownMatrix,
    KroneckerProduct,
    Matrix,
    RandomWalkMatrix,
    ScalarMatrix,
    Sum,
    UnstructuredMatrix,
)
from openreml_nn.likelihood.solvers import SOLVERS
from tests.likelihood.test_sparse import assert_equal


def lattice(rows: int, columns: int, first: int = 0) -> torch.Tensor:
    """Pairs of neighbours of a lattice."""
    at = torch.arange(rows * columns).reshape(rows, columns) + first
    down = torch.stack([at[:-1].reshape(-1), at[1:].reshape(-1)], 1)
    across = torch.stack([at[:, :-1].reshape(-1), at[:, 1:].reshape(-1)], 1)
    return torch.cat([down, across])


def weights_of(pairs: torch.Tensor) -> np.ndarray:
    n = int(pairs.max()) + 1
    W = np.zeros((n, n))
    W[pairs[:, 0], pairs[:, 1]] = W[pairs[:, 1], pairs[:, 0]] = 1
    return W


def differences(n: int, order: int) -> np.ndarray:
    return np.diff(np.eye(n), order, axis=0)


TWO = torch.cat([lattice(2, 3), lattice(2, 4, 6)])


@pytest.mark.parametrize("order", [1, 2])
def test_a_walk_is_the_pseudo_inverse_of_its_differences(order):
    D = differences(9, order)
    V = RandomWalkMatrix(9, order).double().set_value("sigma^2", 0.4)().detach().numpy()
    np.testing.assert_allclose(V, np.exp(0.8) * np.linalg.pinv(D.T @ D), atol=1e-11)
    # Its differences are independent, of that variance.
    np.testing.assert_allclose(D @ V @ D.T, np.exp(0.8) * np.eye(9 - order), atol=1e-11)
    np.testing.assert_allclose(V @ np.ones(9), 0, atol=1e-11)
    if order == 2:
        np.testing.assert_allclose(V @ np.arange(9.0), 0, atol=1e-10)


@pytest.mark.parametrize("pairs", [lattice(3, 4), TWO], ids=["one part", "two parts"])
def test_conditional_autoregressions_are_what_they_say(pairs):
    W = weights_of(pairs)
    D = np.diag(W.sum(1))
    intrinsic = ICARMatrix(pairs).double()().detach().numpy()
    np.testing.assert_allclose(intrinsic, np.linalg.pinv(D - W), atol=1e-11)
    proper = CARMatrix(pairs).double().set_value("rho", 0.9, natural=True)().detach().numpy()
    np.testing.assert_allclose(proper, np.linalg.inv(D - 0.9 * W), atol=1e-11)


@pytest.mark.parametrize("made", [ICARMatrix, CARMatrix])
def test_a_graph_may_be_pairs_or_weights_of_any_kind(made):
    W = weights_of(TWO)
    expected = made(TWO).double()().detach()
    for adjacency in (
        torch.from_numpy(W),
        torch.from_numpy(W).to_sparse(),
        csr_matrix(W),
        TWO.flip(1).int(),
    ):
        torch.testing.assert_close(made(adjacency).double()().detach(), expected)


def test_weights_are_strengths_of_neighbours():
    W = torch.tensor([[0.0, 2.0, 0.5], [2.0, 0.0, 0.0], [0.5, 0.0, 0.0]], dtype=torch.float64)
    V = ICARMatrix(W).double()().detach()
    expected = torch.linalg.pinv(torch.diag(W.sum(1)) - W)
    torch.testing.assert_close(V, expected, rtol=0, atol=1e-12)


def test_derivatives_equal_differences():
    for K in (CARMatrix(TWO).double(), RandomWalkMatrix(6, 2).double()):
        theta = torch.full((K.num_free_params,), 0.4, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(K, theta)
        assert torch.autograd.gradgradcheck(K, theta)


# ---------------------------------------------------------------------- the likelihood

KINDS = {
    "walk": lambda: RandomWalkMatrix(11),
    "smooth walk": lambda: RandomWalkMatrix(12, 2),
    "intrinsic": lambda: ICARMatrix(lattice(3, 4)),
    "two parts": lambda: ICARMatrix(TWO),
    "proper": lambda: CARMatrix(TWO).set_value("rho", 2.0),
}


def model(K: Matrix, seed: int, k: int = 1) -> tuple[Sum, torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    q, n = K.shape[0], 30
    codes = torch.from_numpy(rng.integers(0, q, n))
    values = torch.from_numpy(rng.standard_normal((n, k))) if k > 1 else None
    if k > 1:
        K = KroneckerProduct(K.fix("sigma^2", 0.0), UnstructuredMatrix(k))
    z = DummyMatrix.from_codes(codes, q, values)
    block = DummyMatrix.from_codes(torch.from_numpy(rng.integers(0, 3, n)), 3)
    V = Sum(
        area=CovariancePropagation(z=z, g=K),
        block=CovariancePropagation(block, ScalarMatrix(3)),
        error=ScalarMatrix(n),
    ).double()
    X = torch.from_numpy(np.stack([np.ones(n), rng.standard_normal(n)], 1))
    return V, torch.from_numpy(rng.standard_normal(n)), X


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(list(KINDS)),
    st.sampled_from(["reml", "ml"]),
    st.sampled_from([-20.0, -1.0, 1.0]),
    st.sampled_from([1, 1, 2]),
    st.integers(0, 99),
)
def test_sparse_equals_dense(kind, method, scale, k, seed):
    K = KINDS[kind]().double().set_value("sigma^2", scale)
    assert_equal(*model(K, seed, k), method)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["reml", "ml"])
def test_every_solver_that_takes_them_has_one_likelihood_and_score(kind, method):
    K = KINDS[kind]().double().set_value("sigma^2", 0.3)
    V, y, X = model(K, 1)
    known = KnownMatrix(K().detach().clone()).double()  # what is computed of a dense K
    dense, *_ = model(known, 1)
    expected = REMLLoss(dense, method, "dense", reduction="sum")(y, X)
    found = {}
    for name, make in SOLVERS.items():
        if make().obstacle(V.terms()) is None and make().exact:
            loss = REMLLoss(V, method, name, reduction="sum")(y, X)
            assert float(loss) == pytest.approx(float(expected), abs=1e-9), name
            found[name] = torch.cat(torch.autograd.grad(loss, list(V.parameters())))
    assert {"dense", "blocked", "sparse"} <= set(found)
    for name, score in found.items():
        torch.testing.assert_close(score, found["dense"], rtol=0, atol=1e-8, msg=name)


def test_krylov_refuses_what_has_no_inverse():
    V, y, X = model(RandomWalkMatrix(11), 0)
    with pytest.raises(InputError, match="krylov"):
        REMLLoss(V, solver="krylov")(y, X)


@pytest.mark.parametrize(("kind", "columns"), [("walk", 1), ("smooth walk", 2), ("intrinsic", 1)])
def test_with_the_null_space_as_fixed_effects_the_start_is_diffuse(kind, columns):
    """The restricted likelihood is that of another generalised inverse, as of a walk from zero."""
    K = KINDS[kind]().double()
    q = K.shape[0]
    V, y, _ = model(K, 4)
    codes = V.operands["area"].operands["z"].codes.double()
    X = torch.stack([codes**i for i in range(columns)], 1)
    Q = K.inverse.to_dense().numpy()
    kept = np.arange(columns, q)
    corner = np.zeros((q, q))
    corner[np.ix_(kept, kept)] = np.linalg.inv(Q[np.ix_(kept, kept)])
    other, *_ = model(KnownMatrix(torch.from_numpy(corner)).double(), 4)
    one = REMLLoss(V, solver="sparse", reduction="sum")(y, X)
    two = REMLLoss(other, solver="dense", reduction="sum")(y, X)
    assert float(one) == pytest.approx(float(two), abs=1e-8)


@pytest.mark.parametrize("made", [ICARMatrix, CARMatrix])
def test_another_order_of_the_areas_changes_nothing(made):
    pairs = lattice(3, 4)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    V, y, X = model(made(pairs), 2)
    codes = V.operands["area"].operands["z"].codes
    z = DummyMatrix.from_codes(order[codes], 12)
    moved = Sum(
        area=CovariancePropagation(z, made(order[pairs])),
        block=V.operands["block"],
        error=ScalarMatrix(30),
    ).double()
    for method in ("reml", "ml"):
        one = REMLLoss(V, method, "sparse")(y, X)
        assert float(REMLLoss(moved, method, "sparse")(y, X)) == pytest.approx(
            float(one), abs=1e-11
        )


def test_a_start_has_the_variance_that_is_asked_for():
    for K in (RandomWalkMatrix(30).double(), CARMatrix(lattice(5, 6)).double()):
        assert K.moment_start(torch.full((30,), 2.0, dtype=torch.float64))
        assert float(K().detach().diagonal().mean()) == pytest.approx(2.0, rel=0.5)


# ---------------------------------------------------------------------- bad input


def graph(**changes: float) -> torch.Tensor:
    W = torch.from_numpy(weights_of(lattice(2, 2)))
    for place, value in changes.items():
        W[int(place[1]), int(place[2])] = value
    return W


@pytest.mark.parametrize("made", [ICARMatrix, CARMatrix])
@pytest.mark.parametrize(
    ("adjacency", "kind", "match"),
    [
        (graph(w01=2.0), InputError, r"not symmetric: its weights \(0, 1\) and \(1, 0\)|\(1, 0\)"),
        (graph(w01=0.0, w10=0.0, w02=0.0, w20=0.0), InputError, "1 of 4 nodes without a neighbour"),
        (graph(w22=1.0), InputError, "node 2 its own neighbour"),
        (graph(w01=-1.0, w10=-1.0), InputError, "negative"),
        (graph(w01=float("nan")), InputError, "not finite"),
        (torch.ones(2, 3), InputError, r"shape \(2, 3\)"),
        (torch.ones(3), InputError, r"shape \(3,\)"),
        (torch.tensor([[0, 1], [1, 0]]), InputError, r"the pair \(0, 1\) twice"),
        (torch.tensor([[0, 2]]), InputError, "first is node 1"),
        (torch.tensor([[-1, 2]]), InputError, "negative position"),
        (torch.tensor([0, 1]), InputError, r"\(m, 2\) pairs"),
        ([[0, 1]], TypeError, "`adjacency`"),
    ],
)
def test_wrong_graphs_are_named(made, adjacency, kind, match):
    with pytest.raises(kind, match=match):
        made(adjacency)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [((1,), "`n` is 1"), ((2, 2), "`n` is 2"), ((5, 3), "`order` is 3"), ((5, 0), "`order` is 0")],
)
def test_wrong_walks_are_named(arguments, match):
    with pytest.raises(InputError, match=match):
        RandomWalkMatrix(*arguments)


@pytest.mark.parametrize(
    ("null", "kind", "match"),
    [
        (torch.ones(3, 1), TypeError, "`null` is torch.float32"),
        (torch.ones(3, 1, dtype=torch.float64), InputError, "not orthonormal"),
        (torch.ones(2, 1, dtype=torch.float64), InputError, "shape"),
        (torch.eye(3, dtype=torch.float64)[:, :1], InputError, "product is not zero"),
    ],
)
def test_a_null_space_is_checked(null, kind, match):
    D = torch.from_numpy(differences(3, 1))
    with pytest.raises(kind, match=match):
        KnownInverseMatrix(D.mT @ D, null=null)
