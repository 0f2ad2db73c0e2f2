"""Fits of every structure end at an optimum, in few steps."""

import math
import warnings

import numpy as np
import pytest
import torch

from openreml_nn import InputError, REMLLoss, fit_reml
from openreml_nn.covariance import (
    CompoundSymmetricMatrix,
    CovariancePropagation,
    DummyMatrix,
    IdentityMatrix,
    KroneckerProduct,
    ScalarMatrix,
    Sum,
    ar1_field,
    weighted,
)
from openreml_nn.covariance.exchangeable import within_bounds
from openreml_nn.estimation.curvature import Curvature
from openreml_nn.estimation.fit import moment_start
from tests.estimation.battery import battery

CASES = {case.name: case for case in battery(0)}
#: Their optimum is at infinity, or where V stops being positive definite, and no coordinate's end.
EDGE = ("Hadamard", "user kernel")


@pytest.mark.filterwarnings("ignore:the data cannot tell apart")
@pytest.mark.parametrize("name", [name for name in CASES if name not in EDGE])
def test_a_fit_takes_at_most_25_steps_to_an_optimum(name):
    case = CASES[name]
    V = case.covariance()
    result = fit_reml(V, case.y, case.X)
    assert result.converged
    assert result.iterations <= 25
    # No better point by L-BFGS from there, on the gradient that autograd gives.
    W = case.covariance()
    stored = {p.name: p.untransformed for p in result.parameters}
    with torch.no_grad():
        for entry in W.parameter_entries().entries:
            entry.tensor.fill_(max(-30.0, min(30.0, stored[entry.name])))
    loss = REMLLoss(W, solver="dense", reduction="sum")
    before = -loss(case.y, case.X).item()
    assert before <= result.log_likelihood + 1e-6
    optimizer = torch.optim.LBFGS(W.parameters(), line_search_fn="strong_wolfe", max_iter=10)

    def closure():
        optimizer.zero_grad()
        value = loss(case.y, case.X)
        value.backward()
        return value

    optimizer.step(closure)
    assert -loss(case.y, case.X).item() <= result.log_likelihood + 1e-5


def field(seed, rows=9, columns=8):
    rng = np.random.default_rng(seed)
    rho = rng.uniform(0.3, 0.95, 2)

    def ar(n, r):
        return r ** abs(np.subtract.outer(np.arange(n), np.arange(n)))

    n = rows * columns
    root = np.linalg.cholesky(np.kron(ar(rows, rho[0]), ar(columns, rho[1])))
    y = 2 * root @ rng.standard_normal(n) + rng.standard_normal(n)
    return torch.tensor(y), torch.ones(n, 1).double()


def field_model(rows=9, columns=8):
    return Sum(field=ar1_field(rows, columns), units=ScalarMatrix(rows * columns)).double()


@pytest.mark.parametrize("seed", range(3))
def test_a_field_has_one_optimum_in_every_unit_the_best_of_random_starts(seed):
    y, X = field(seed)
    found = []
    for unit in (1.0, (1e-3, 100.0, 1e4)[seed]):
        result = fit_reml(field_model(), unit * y, X)
        assert result.converged
        assert len(result.starts) == 4
        found.append(result.log_likelihood + (len(y) - 1) * math.log(unit))
    assert max(found) - min(found) < 1e-6
    rng = np.random.default_rng(seed)
    for _ in range(4):
        V = field_model()
        moment_start(REMLLoss(V), y, X)
        with torch.no_grad():
            for name, p in V.named_parameters():
                rho = name.endswith("rho")
                p.fill_(2 * math.atanh(rng.uniform(-0.3, 0.97))) if rho else p.add_(rng.normal())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            other = fit_reml(V, y, X, start="current")
        assert other.log_likelihood <= found[0] + 1e-6


def test_a_field_that_reaches_along_one_side_only_is_found():
    # Even starts end at -259.718; random ones and an uneven start find this optimum.
    case = {case.name: case for case in battery(8)}["field, large nugget"]
    result = fit_reml(case.covariance(), case.y, case.X)
    assert result.log_likelihood == pytest.approx(-258.983162, abs=1e-6)


def test_a_second_optimum_is_said():
    # Correlation along a short and a long range explain these data about as well.
    case = {case.name: case for case in battery(1)}["exponential, short"]
    result = fit_reml(case.covariance(), case.y, case.X)
    others = [start for start in result.starts if start.converged and not start.same]
    assert others
    assert all(start.log_likelihood < result.log_likelihood for start in others)
    assert "more than one optimum" in result.summary()
    assert result.iterations == len(result.history)


def test_plain_grouping_factors_have_one_start():
    case = CASES["crossed"]
    assert fit_reml(case.covariance(), case.y, case.X).starts == ()


def test_what_ends_at_a_boundary_is_exactly_there():
    y = torch.tensor([1.0, 2.0, 3.0] * 4).double()
    labels = [i // 3 for i in range(12)]
    g = CovariancePropagation(z=DummyMatrix(labels), g=ScalarMatrix(4))
    result = fit_reml(
        Sum(group=g, residual=ScalarMatrix(12)).double(), y, torch.ones(12, 1).double()
    )
    assert result.boundary == ("group/g/sigma^2",)
    assert result.parameters[0].value == 0.0
    # Two occasions of each subject that are equal but for noise: their correlation is 1.
    torch.manual_seed(3)
    b = torch.randn(40, dtype=torch.float32).double().repeat_interleave(6)
    y = 2 * b + 0.3 * torch.randn(240, dtype=torch.float32).double()
    z = DummyMatrix.from_codes(torch.arange(240) // 3, 80)
    g = KroneckerProduct(IdentityMatrix(40), CompoundSymmetricMatrix(2))
    V = Sum(g=CovariancePropagation(z=z, g=g), residual=ScalarMatrix(240)).double()
    result = fit_reml(V, y, torch.ones(240, 1).double())
    assert result.converged
    assert result.boundary == ("g/g/op_1/rho",)
    rho = next(p for p in result.parameters if p.name.endswith("rho"))
    assert rho.value == 1.0
    assert math.isnan(rho.std_error)
    # The model of one intercept a subject, with that variance, is the same.
    subject = DummyMatrix.from_codes(torch.arange(240) // 6, 40)
    W = Sum(g=CovariancePropagation(z=subject, g=ScalarMatrix(40)), residual=ScalarMatrix(240))
    same = fit_reml(W.double(), y, torch.ones(240, 1).double())
    assert result.log_likelihood == pytest.approx(same.log_likelihood, abs=1e-9)


def test_a_heywood_case_is_at_the_boundary_and_not_indistinct():
    case = CASES["effects FA1"]
    result = fit_reml(case.covariance(), case.y, case.X)
    zero = [p.name for p in result.parameters if p.value == 0.0]
    assert zero
    assert result.boundary == tuple(zero)
    assert not set(result.indistinct) & set(zero)
    assert "at the boundary" in result.summary()


def test_the_step_and_the_result_judge_by_one_criterion():
    case = CASES["residual AR1"]
    for most in (1, 2, 3, 30):
        V = case.covariance()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = fit_reml(V, case.y, case.X, max_iterations=most)
        assert result.converged == (result.iterations < most)
        objective = REMLLoss(V).objective(case.y, case.X)
        with torch.no_grad():
            assert Curvature([objective]).is_optimum or not result.converged


def test_known_error_variances_are_the_residual():
    rng = np.random.default_rng(0)
    m = 60
    known = rng.uniform(0.2, 2, m)
    y = 3 + rng.standard_normal(m) + np.sqrt(known) * rng.standard_normal(m)

    def reml(v):
        w = 1 / (v + known)
        b = (w * y).sum() / w.sum()
        rss = (w * (y - b) ** 2).sum()
        return -0.5 * ((m - 1) * np.log(2 * np.pi) - np.log(w).sum() + np.log(w.sum()) + rss)

    grid = np.linspace(0.5, 1.5, 2001)
    best = grid[np.argmax([reml(v) for v in grid])]
    labels = [f"g{i}" for i in range(m)]
    for gen in (ScalarMatrix(m), CovariancePropagation(DummyMatrix(labels), ScalarMatrix(m))):
        residual = weighted(torch.tensor(1 / known))
        residual.fix("g/sigma^2", 0.0)
        V = Sum(gen=gen, residual=residual).double()
        result = fit_reml(V, torch.tensor(y), torch.ones(m, 1).double())
        assert result.converged
        assert [c.group for c in result.components] == ["gen", "Residual"]
        variance = float(result.components[0].covariance)
        assert variance == pytest.approx(best, abs=1e-3)
        assert result.log_likelihood == pytest.approx(reml(variance), abs=1e-8)
        w = 1 / (variance + known)
        b = (w * y).sum() / w.sum()
        assert result.random[0].name == "gen"
        blup = variance * w * (y - b)
        order = np.argsort(labels) if isinstance(gen, CovariancePropagation) else np.arange(m)
        np.testing.assert_allclose(result.random[0].values[:, 0].numpy(), blup[order], atol=1e-8)


def test_two_free_variances_of_each_row_are_still_refused():
    V = Sum(
        gen=CovariancePropagation(DummyMatrix(list(range(20))), ScalarMatrix(20)),
        residual=ScalarMatrix(20),
    ).double()
    with pytest.raises(InputError, match="cannot be told"):
        fit_reml(V, torch.randn(20).double(), torch.ones(20, 1).double())


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("max_iterations", 0, "`max_iterations` is 0"),
        ("max_iterations", -1, "`max_iterations` is -1"),
        ("max_iterations", True, "`max_iterations` is True"),
        ("max_iterations", 2.5, "`max_iterations` is 2.5"),
        ("start", "zero", "`start` is 'zero'"),
        ("names", "nonsense", "`names` is 'nonsense'"),
        ("names", [1, 2], "`names` holds 1"),
        ("names", ("a",), "`names` has 1 entries but `X` has 2 columns"),
        ("names", ("a", "b", "c"), "`names` has 3 entries but `X` has 2 columns"),
    ],
)
def test_careless_options_are_refused_by_name(option, value, message):
    case = CASES["intercept"]
    # A kind that is wrong altogether is a TypeError, by the function that all counts are checked by.
    error = TypeError if value is True or value == 2.5 else InputError
    with pytest.raises(error, match=message):
        fit_reml(case.covariance(), case.y, case.X, **{option: value})


@pytest.mark.parametrize("low", [-1.0, -1 / 3])
def test_the_angle_of_a_correlation(low):
    trans = within_bounds(low, 1.0)
    x = torch.tensor([-40.0, -3.0, 0.0, 0.7, 40.0, math.inf, -math.inf]).double()
    u = trans.coordinate(x)
    torch.testing.assert_close(trans.at_coordinate(u), trans(x))
    torch.testing.assert_close(trans.from_coordinate(u)[1:4], x[1:4])
    assert float(u[5]) == trans.bounds[1]
    assert float(trans.at_coordinate(u[5:6])) == 1.0
    for value in (1.7, 2.9, -1.8, 7.0):
        folded = trans.fold(value)
        assert abs(folded) <= math.pi / 2
        one, two = torch.tensor([value, folded]).double().split(1)
        torch.testing.assert_close(trans.at_coordinate(one), trans.at_coordinate(two))


@pytest.mark.filterwarnings("ignore:the data cannot tell apart")
@pytest.mark.parametrize("name", ["intercept", "slopes", "residual AR1", "field and nugget"])
def test_fits_in_single_precision_converge(name):
    case = CASES[name]
    exact = fit_reml(case.covariance(), case.y, case.X)
    single = fit_reml(case.covariance().float(), case.y.float(), case.X.float())
    assert single.converged
    assert single.log_likelihood == pytest.approx(exact.log_likelihood, abs=2e-2)
