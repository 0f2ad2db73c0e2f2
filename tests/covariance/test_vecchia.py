"""Gaussian processes through nearest neighbours against the dense kernels that they stand for."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openreml_nn import InputError, NumericalError, REMLLoss, fit_reml
from openreml_nn.covariance import (
    Correlation,
    CovariancePropagation,
    DummyMatrix,
    ExponentialCorrelation,
    ExponentialMatrix,
    GaussianCorrelation,
    GaussianMatrix,
    MaternCorrelation,
    MaternMatrix,
    Matrix,
    RationalQuadraticCorrelation,
    RationalQuadraticMatrix,
    ScalarMatrix,
    SphericalCorrelation,
    SphericalMatrix,
    Sum,
    VecchiaMatrix,
)
from openreml_nn.covariance.neighbours import first_to_last, nearest_before
from openreml_nn.estimation.derivatives import jacobian
from openreml_nn.estimation.fit import moment_start
from openreml_nn.estimation.starts import climb_from_several

CORRELATIONS = [
    ExponentialCorrelation(),
    GaussianCorrelation(),
    MaternCorrelation(0.5),
    MaternCorrelation(1.5),
    MaternCorrelation(2.5),
    SphericalCorrelation(),
    RationalQuadraticCorrelation(),
]


def drawn(n: int, seed: int = 0, s: int = 2) -> torch.Tensor:
    return 4 * torch.rand(n, s, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense_kernel(places: torch.Tensor, correlation: Correlation) -> Matrix:
    distance = torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist")
    match correlation:
        case ExponentialCorrelation():
            return ExponentialMatrix(distance)
        case GaussianCorrelation():
            return GaussianMatrix(distance)
        case MaternCorrelation():
            return MaternMatrix(distance, correlation.nu)
        case RationalQuadraticCorrelation():
            return RationalQuadraticMatrix(distance)
    return SphericalMatrix(distance)


def at(K: Matrix, variance: float = 0.3, length: float = -0.6) -> Matrix:
    return K.double().set_value("sigma^2", variance).set_value("lengthscale", length)


@pytest.mark.parametrize("correlation", CORRELATIONS, ids=str)
def test_derivatives_of_correlations_are_those_by_the_logarithm_of_the_length(correlation):
    log_length = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    apart = torch.tensor([0.0, 0.1, 0.7, 1.2, 3.0], dtype=torch.float64)
    r = apart / log_length.exp()
    for d, value, slope, bend in zip(
        range(5),
        correlation.value(r),
        correlation.slope(r.detach()),
        correlation.bend(r.detach()),
        strict=True,
    ):
        (first,) = torch.autograd.grad(value, log_length, create_graph=True, retain_graph=True)
        (second,) = torch.autograd.grad(first, log_length, retain_graph=True)
        assert float(first.detach()) == pytest.approx(float(slope), abs=1e-14), d
        assert float(second) == pytest.approx(float(bend), abs=1e-14), d


# ---------------------------------------------------------------------- order and neighbours


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 60), st.integers(1, 3), st.integers(1, 70), st.integers(0, 99))
def test_each_place_is_the_farthest_left_and_its_neighbours_the_nearest_before(n, s, m, seed):
    places = drawn(n, seed, s).numpy()
    apart = np.linalg.norm(places[:, None] - places, axis=-1)
    order = first_to_last(places)
    assert sorted(order) == list(range(n))
    for k in range(1, n):
        left = apart[np.ix_(order[k:], order[:k])].min(1)
        assert left[0] == pytest.approx(left.max(), rel=1e-12)
    m = min(m, n - 1)
    near = nearest_before(places, order, m)
    for k, i in enumerate(order):
        kept = near[i][near[i] >= 0]
        expected = np.sort(apart[i, order[:k]])[:m]
        assert set(kept) <= set(order[:k])
        np.testing.assert_array_equal(apart[i, kept], expected)


@pytest.mark.parametrize("grid", [False, True])
def test_the_order_of_the_rows_changes_nothing(grid):
    places = drawn(40)
    if grid:  # many distances are the same
        places = torch.cartesian_prod(torch.arange(6.0), torch.arange(6.0)).double()
    shuffled = torch.randperm(len(places), generator=torch.Generator().manual_seed(1))
    one = at(VecchiaMatrix(places, MaternCorrelation(1.5), 4))()
    other = at(VecchiaMatrix(places[shuffled], MaternCorrelation(1.5), 4))()
    torch.testing.assert_close(other, one[shuffled][:, shuffled], rtol=0, atol=1e-14)


def test_the_unit_of_the_places_is_that_of_the_length():
    places = drawn(30)
    one = at(VecchiaMatrix(places, MaternCorrelation(2.5), 5))()
    other = VecchiaMatrix(1000 * places, MaternCorrelation(2.5), 5)
    moved = at(other, length=-0.6 + float(np.log(1000)))()
    torch.testing.assert_close(moved, one, rtol=0, atol=1e-10)


# ---------------------------------------------------------------------- the matrix


@pytest.mark.parametrize("correlation", CORRELATIONS, ids=str)
@pytest.mark.parametrize("n", [1, 2, 12])
def test_all_neighbours_make_it_the_dense_kernel(correlation, n):
    places = drawn(n)
    K, dense = at(VecchiaMatrix(places, correlation, n)), at(dense_kernel(places, correlation))
    torch.testing.assert_close(K(), dense(), rtol=0, atol=1e-12)
    for found, expected in zip(K.grad()[0], dense.grad()[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("correlation", CORRELATIONS, ids=str)
def test_derivatives_equal_differences(correlation):
    K = VecchiaMatrix(drawn(9), correlation, 3).double()
    theta = torch.tensor([0.2, 0.5], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(K, theta)
    assert torch.autograd.gradgradcheck(K, theta)


def test_a_third_derivative_is_refused():
    K = at(VecchiaMatrix(drawn(5), ExponentialCorrelation(), 2))
    value = K().sum()
    for _ in range(2):
        (value,) = torch.autograd.grad(value, K.lengthscale, create_graph=True)
    with pytest.raises(NotImplementedError, match="third derivative"):
        torch.autograd.grad(value, K.lengthscale)


def test_neighbours_are_the_regressions_of_the_kernel():
    """Each place given those before it has the mean and the variance of the dense kernel's."""
    places, m = drawn(20), 4
    K = at(VecchiaMatrix(places, MaternCorrelation(1.5), m), 0.0)
    dense = at(dense_kernel(places, MaternCorrelation(1.5)), 0.0)().detach().numpy()
    V = K().detach().numpy()
    near = nearest_before(places.numpy(), K.order, m)

    def left(C: np.ndarray, i: int, known: np.ndarray) -> float:
        return C[i, i] - C[known, i] @ np.linalg.solve(C[np.ix_(known, known)], C[known, i])

    for k, i in enumerate(K.order):
        expected = left(dense, i, near[i][near[i] >= 0])
        assert left(V, i, K.order[:k]) == pytest.approx(expected, abs=1e-12)


# ---------------------------------------------------------------------- the likelihood


def model(K: Matrix, n: int, seed: int) -> tuple[Sum, torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    q = K.shape[0]
    codes = torch.from_numpy(np.concatenate([rng.permutation(q), rng.integers(0, q, n - q)]))
    V = Sum(
        place=CovariancePropagation(DummyMatrix.from_codes(codes, q), K), error=ScalarMatrix(n)
    ).double()
    X = torch.from_numpy(np.stack([np.ones(n), rng.standard_normal(n)], 1))
    return V, torch.from_numpy(rng.standard_normal(n)), X


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(CORRELATIONS),
    st.integers(2, 25),
    st.integers(0, 99),
    st.sampled_from(["reml", "ml"]),
    st.sampled_from(["sparse", "dense", "blocked"]),
)
def test_likelihood_with_all_neighbours_equals_that_of_the_dense_kernel(
    correlation, q, seed, method, solver
):
    places = drawn(q, seed)
    found = []
    for K, by in (
        (VecchiaMatrix(places, correlation, max(q - 1, 1)), solver),
        (dense_kernel(places, correlation), "dense"),
    ):
        V, y, X = model(at(K, length=-1.0), q + 8, seed)
        objective = REMLLoss(V, method, by).objective(y, X)
        evaluation = objective.evaluate()
        parameters = list(V.parameters())
        loss = REMLLoss(V, method, by, reduction="sum")(y, X)
        score = torch.cat(torch.autograd.grad(loss, parameters))
        u = torch.cat([p.detach() for p in parameters])
        own = jacobian(lambda x, V=V, o=objective: tuple(o.matrices(x)), u)
        found.append((evaluation, score, evaluation.information(own)))
    (one, score, information), (other, expected, known) = found
    close = {"rtol": 0, "atol": 1e-9}
    torch.testing.assert_close(one.log_likelihood, other.log_likelihood, rtol=1e-11, atol=1e-9)
    torch.testing.assert_close(score, expected, rtol=1e-9, atol=1e-8)
    torch.testing.assert_close(information, known, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(one.fixed.estimate, other.fixed.estimate, **close)
    torch.testing.assert_close(one.random[0].values, other.random[0].values, **close)
    torch.testing.assert_close(one.random[0].variances, other.random[0].variances, **close)


def test_a_fit_with_all_neighbours_is_that_of_the_dense_kernel():
    places = drawn(30, 3)
    rng = np.random.default_rng(5)
    truth = at(dense_kernel(places, ExponentialCorrelation()), 0.5, 0.3)().detach()
    u = torch.linalg.cholesky(truth) @ torch.from_numpy(rng.standard_normal(30))
    codes = torch.arange(60) % 30
    y = u[codes] + 0.5 * torch.from_numpy(rng.standard_normal(60))
    X = torch.ones(60, 1, dtype=torch.float64)
    found = []
    for K, solver in (
        (VecchiaMatrix(places, ExponentialCorrelation(), 29), "sparse"),
        (dense_kernel(places, ExponentialCorrelation()), "dense"),
    ):
        z = DummyMatrix.from_codes(codes, 30)
        V = Sum(place=CovariancePropagation(z, K), error=ScalarMatrix(60)).double()
        found.append(fit_reml(V, y, X, solver=solver))
    one, other = found
    assert one.converged
    assert other.converged
    assert one.log_likelihood == pytest.approx(other.log_likelihood, abs=1e-7)
    for a, b in zip(one.parameters, other.parameters, strict=True):
        assert a.value == pytest.approx(b.value, rel=1e-4)


def test_float32_parameters_give_float32():
    V, y, X = model(at(VecchiaMatrix(drawn(12), MaternCorrelation(1.5), 4)), 20, 0)
    exact = REMLLoss(V, solver="dense", reduction="sum")(y, X)
    for solver in ("dense", "sparse"):
        found = REMLLoss(deepcopy(V).float(), solver=solver, reduction="sum")(y.float(), X.float())
        assert found.dtype == torch.float32
        assert float(found) == pytest.approx(float(exact), rel=1e-5)


def test_a_copy_has_regressions_of_its_own():
    K = at(VecchiaMatrix(drawn(8), MaternCorrelation(1.5), 3))
    before = K().detach()
    other = deepcopy(K)
    other.set_value("lengthscale", 1.0)
    assert not torch.equal(other(), before)
    assert torch.equal(K(), before)
    with torch.inference_mode():
        assert torch.equal(K(), before)
    K().sum().backward()
    K().sum().backward()
    assert torch.isfinite(K.lengthscale.grad)


# ---------------------------------------------------------------------- other places


def test_regressions_of_new_places_are_kriging_weights():
    places, new = drawn(15), drawn(4, 9)
    K = at(VecchiaMatrix(places, MaternCorrelation(1.5), 15), 0.0)
    length = torch.tensor([-0.6], dtype=torch.float64)
    found = K.regressions_of(new)
    numbers = found.at(length)
    d, b = numbers[:4], numbers[4:].reshape(4, 15)
    dense = at(dense_kernel(torch.cat([places, new]), MaternCorrelation(1.5)), 0.0)().detach()
    weights = torch.linalg.solve(dense[:15, :15], dense[:15, 15:]).mT
    expected = dense[15:, 15:].diagonal() - (weights * dense[15:, :15]).sum(1)
    torch.testing.assert_close(d, expected, rtol=0, atol=1e-11)
    by_place = torch.zeros(4, 15, dtype=torch.float64).scatter(1, found.neighbours, b)
    torch.testing.assert_close(by_place, weights, rtol=0, atol=1e-11)


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "kind", "match"),
    [
        ({"places": torch.zeros(3, 2)}, InputError, "same place in rows 0 and 1"),
        ({"places": torch.tensor([[0.0], [1.0], [0.0]])}, InputError, "same place in rows 0 and 2"),
        ({"places": torch.tensor([[0.0], [float("nan")]])}, InputError, "not finite in row 1"),
        ({"places": torch.zeros(3)}, InputError, r"shape \(3,\)"),
        ({"places": torch.zeros(2, 1, dtype=torch.int64)}, TypeError, "floating-point"),
        ({"places": torch.zeros(2, 1, device="meta")}, InputError, "meta device"),
        ({"correlation": "matern"}, TypeError, "`correlation`"),
        ({"neighbours": 0}, InputError, "`neighbours` is 0"),
    ],
)
def test_wrong_arguments_are_named(change, kind, match):
    good = {"places": drawn(3), "correlation": MaternCorrelation(1.5), "neighbours": 2}
    with pytest.raises(kind, match=match):
        VecchiaMatrix(**(good | change))


def test_new_places_have_as_many_coordinates():
    with pytest.raises(InputError, match=r"expected \(k, 2\)"):
        VecchiaMatrix(drawn(3), MaternCorrelation(1.5)).regressions_of(drawn(2, 0, 3))


@pytest.mark.parametrize("solver", ["dense", "sparse", "blocked"])
def test_places_that_correlate_entirely_are_an_error_that_names_one(solver):
    V, y, X = model(at(VecchiaMatrix(drawn(20), GaussianCorrelation(), 19), length=5.0), 30, 0)
    with pytest.raises(NumericalError, match="has no variance of its own"):
        REMLLoss(V, solver=solver)(y, X)


def dense_row(n: int, seed: int = 1) -> torch.Tensor:
    """Places so dense that a Gaussian kernel of a third of their typical distance is singular."""
    noise = torch.randn(n, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linspace(0, 10, n, dtype=torch.float64)[:, None] + 0.001 * noise


@pytest.mark.parametrize("reach", [0.3, 0.7, 0.9])
@pytest.mark.parametrize("unit", [1.0, 1e-3])
def test_a_start_leaves_each_place_variance_of_its_own(reach, unit):
    K = VecchiaMatrix(unit * dense_row(100), GaussianCorrelation(), 10).double()
    long = (unit * reach * 10 / 3,)
    assert K.regressions.at(torch.tensor(long, dtype=torch.float64).log())[:100].isnan().any()
    assert K.start_reach(reach)
    assert K.regressions.at(K.lengthscale.detach())[:100].isfinite().all()
    assert float(K.lengthscale.detach().exp()) > unit * 0.2


def test_a_held_length_is_no_start():
    K = VecchiaMatrix(dense_row(100), GaussianCorrelation(), 10).double().fix("lengthscale", 9.0)
    assert not K.start_reach(0.3)
    assert K.lengthscale.tolist() == [9.0]


def fit_of_places(matrix: Matrix, places: torch.Tensor, length: float, start: str = "moments"):
    """A fit to effects of places whose Gaussian kernel has a length, and errors."""
    distance = torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist")
    V = (-((distance / length) ** 2) / 2).exp() + 0.01 * torch.eye(len(places)).double()
    draws = torch.randn(len(V), generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    y, X = torch.linalg.cholesky(V) @ draws, torch.ones(len(V), 1, dtype=torch.float64)
    V = Sum(place=matrix, error=ScalarMatrix(len(V))).double()
    return fit_reml(V, y, X, start=start)


def test_dense_places_are_fitted_from_any_start():
    places = dense_row(80)
    found = fit_of_places(VecchiaMatrix(places, GaussianCorrelation(), 8), places, 0.4)
    short = at(VecchiaMatrix(places, GaussianCorrelation(), 8), 0.0, -2.0)
    other = fit_of_places(short, places, 0.4, "current")
    assert found.converged
    assert other.converged
    for one, two in zip(found.parameters, other.parameters, strict=True):
        assert one.value == pytest.approx(two.value, rel=1e-4)


@pytest.mark.filterwarnings("ignore:the data cannot tell apart")
def test_a_fit_whose_optimum_leaves_places_no_variance_says_so():
    places = dense_row(80)
    near = at(VecchiaMatrix(places, GaussianCorrelation(), 12), 0.0, -1.0)
    with pytest.warns(RuntimeWarning, match=r"steps lead where .* no variance of its own"):
        found = fit_of_places(near, places, 3.0, "current")
    assert not found.converged


@pytest.mark.parametrize("correlation", CORRELATIONS, ids=str)
def test_regressions_of_many_places_equal_those_of_a_few_at_a_time(correlation):
    K = VecchiaMatrix(drawn(600), correlation, neighbours=6)
    log_length = torch.tensor([-0.6], dtype=torch.float64)
    # Many are computed by compiled code, also where distances are not known beforehand.
    for many in (K.regressions, replace(K.regressions, pairs=None)):
        for order in range(3):
            few = many.computed(log_length, order)[order]
            assert torch.allclose(many.at(log_length, order), few, rtol=1e-7, atol=1e-9)


def test_places_without_variance_of_their_own_are_not_numbers_among_many_either():
    places = drawn(600)
    places[1] = places[0] + 1e-9
    K = VecchiaMatrix(places, GaussianCorrelation(), neighbours=4)
    found = K.regressions.at(torch.zeros(1, dtype=torch.float64))
    few = K.regressions.computed(torch.zeros(1, dtype=torch.float64), 0)[0]
    assert 0 < int(found[:600].isnan().sum()) < 600
    assert torch.equal(found[:600].isnan(), few[:600].isnan())


def test_a_coarser_process_is_that_of_fewer_neighbours():
    places = torch.rand(40, 2)
    fine, coarse = (VecchiaMatrix(places, MaternCorrelation(1.5), m) for m in (12, 5))
    value = torch.tensor([0.2, -1.0])
    assert fine.coarsen()
    torch.testing.assert_close(fine(value), coarse(value), rtol=0, atol=0)
    assert not coarse.coarsen()


def test_a_fit_by_way_of_a_coarser_process_ends_at_the_same_optimum():
    places, codes = torch.rand(50, 2), torch.arange(150) % 50
    kernel = VecchiaMatrix(places, MaternCorrelation(1.5), 12)
    z = DummyMatrix.from_codes(codes, 50)
    V = Sum(place=CovariancePropagation(z, kernel), residual=ScalarMatrix(150))
    effects = torch.sin(4 * places.sum(1)) + torch.cos(5 * places[:, 0])
    y, X = effects[codes] + 0.3 * torch.randn(150), torch.ones(150, 1)
    loss = REMLLoss(V, solver="sparse", reduction="sum")
    rough = deepcopy(V)
    assert sum(m.coarsen() for m in rough.modules() if isinstance(m, Matrix)) == 1
    coarse = REMLLoss(rough, solver="sparse").objective(y, X)
    found = []
    for way in (None, coarse):
        history, others = climb_from_several(
            loss.objective(y, X), 100, lambda: moment_start(loss, y, X), way
        )
        found.append((history[-1].log_likelihood, len(history), others))
    assert found[1][0] == pytest.approx(found[0][0], abs=1e-8)
    assert found[1][1] < found[0][1]
    assert all(start.same for start in found[1][2])
