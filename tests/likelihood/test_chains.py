"""Markov structures, of which the inverse is tridiagonal, by sparse precisions against dense algebra."""

import numpy as np
import pandas as pd
import pytest
import torch

from openreml_nn import REMLLoss, lmm
from openreml_nn.covariance import (
    AntedependenceMatrix,
    AR1Matrix,
    BlockDiagonal,
    ContinuousAR1Matrix,
    ExponentialMatrix,
    GaussianMatrix,
    IdentityMatrix,
    KroneckerProduct,
    MaternMatrix,
    Sum,
    UnstructuredMatrix,
    heterogeneous,
    heterogeneous_ar1,
)
from openreml_nn.inference import bootstrap, r2, variance_shares
from openreml_nn.inference.row_variance import row_variances
from openreml_nn.likelihood import Sparse
from openreml_nn.model.structures import linear_model
from openreml_nn.support.errors import InputError
from openreml_nn.table import Encoder
from openreml_nn.terms.precision import PrecisionCovariance
from tests.likelihood.test_fields import assert_equal
from tests.likelihood.test_products import held, made


def times(n: int, ordered: bool = False) -> torch.Tensor:
    """Irregular times."""
    at = np.cumsum(0.05 + np.random.default_rng(n).gamma(0.5, 0.5, n))
    return torch.from_numpy(at if ordered else np.random.default_rng(0).permutation(at))


CHAINS = {
    "car1": lambda: ContinuousAR1Matrix(times(203)),
    "exponential": lambda: ExponentialMatrix(times(203)),
    "matern": lambda: MaternMatrix(times(203), nu=0.5),
    "hetar1": lambda: heterogeneous_ar1(203),
    "scaled car1": lambda: heterogeneous(held(ContinuousAR1Matrix(times(203)))),
    "ante": lambda: AntedependenceMatrix(203),
    "groups of car1": lambda: KroneckerProduct(IdentityMatrix(2), ContinuousAR1Matrix(times(203))),
    "groups of ante": lambda: KroneckerProduct(IdentityMatrix(2), AntedependenceMatrix(203)),
    "car1 by effects": lambda: KroneckerProduct(
        ContinuousAR1Matrix(times(110, ordered=True)), UnstructuredMatrix(2)
    ),
    "car1 by ar1": lambda: KroneckerProduct(
        ContinuousAR1Matrix(times(9, ordered=True)), held(AR1Matrix(8))
    ),
    "strata": lambda: BlockDiagonal(
        ContinuousAR1Matrix(times(203)),
        ContinuousAR1Matrix(times(10, ordered=True)),
        AntedependenceMatrix(4),
        heterogeneous_ar1(5),
    ),
    "short strata": lambda: BlockDiagonal(
        ExponentialMatrix(times(10, ordered=True)), AntedependenceMatrix(4), heterogeneous_ar1(5)
    ),
    "series of their own times": lambda: ContinuousAR1Matrix(times(99)).at(
        torch.tensor([0, 1, 2]).repeat(33), torch.arange(99)
    ),
}
CASES = [
    *((name, "residual") for name in CHAINS),
    *((name, "effects") for name in ("car1", "ante", "groups of car1", "strata", "short strata")),
    *((name, "scaled") for name in ("car1", "hetar1", "strata")),
]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_markov_structures_are_sparse_and_equal_dense(name, kind):
    model = made(CHAINS[name](), kind)
    tree, *_ = model
    g = tree.terms()[0].covariance
    assert isinstance(g, PrecisionCovariance) or g.is_chained
    torch.testing.assert_close(tree.terms()[0].dense(), tree.operands["structure"]())
    assert Sparse().obstacle(tree.terms()) is None
    assert_equal(model)


@pytest.mark.parametrize("name", CHAINS)
def test_variances_are_the_diagonal(name):
    matrix = CHAINS[name]().double()
    torch.testing.assert_close(matrix.variances(), matrix().diagonal())


@pytest.mark.parametrize("name", CHAINS)
def test_tables_show_the_variances_of_places(name):
    tree, *_ = made(CHAINS[name](), "residual")
    matrix = tree.operands["structure"].operands["g"]
    (term,) = tree.terms()
    shown = term.shown()
    shown = shown.diagonal() if shown.dim() == 2 else shown
    torch.testing.assert_close(shown.mean(), matrix().diagonal().mean())
    if name in ("hetar1", "scaled car1", "ante", "groups of ante"):
        torch.testing.assert_close(shown, matrix().diagonal()[: len(shown)])
    if "strata" not in name:  # which are shown by their mean, and not each cell has a row
        (found,) = row_variances([term])
        torch.testing.assert_close(found, tree().diagonal().mean())


@pytest.mark.parametrize("kind", [ContinuousAR1Matrix, ExponentialMatrix, GaussianMatrix])
def test_places_on_a_line_have_the_matrix_of_their_distances(kind):
    at = times(12)
    line, apart = kind(at).double(), kind((at[:, None] - at).abs()).double()
    free = torch.tensor([0.3, 0.4]).double()
    torch.testing.assert_close(line(free), apart(free), rtol=0, atol=0)
    for one, other in zip(line.grad(free), apart.grad(free), strict=True):
        assert one == other if isinstance(one, list) else bool((one == other).all())
    for matrix in (line, apart):
        matrix.moment_start(torch.full((12,), 2.0).double())
    torch.testing.assert_close(line(), apart(), rtol=0, atol=0)


@pytest.mark.parametrize("n", [20, 205])
def test_times_far_from_zero_keep_their_digits_in_float32(n):
    y, X, found = torch.linspace(-1, 1, n) ** 2, torch.ones(n, 1), []
    for origin in (0.0, 1.7e9):  # as seconds since 1970
        V = Sum(ExponentialMatrix(100 * times(n) + origin)).double()
        V.operands["op_0"].moment_start(torch.ones(n).double())
        expected = REMLLoss(V)(y.double(), X.double())
        found.append(REMLLoss(V.float())(y.float(), X.float()))
        torch.testing.assert_close(found[-1], expected.float(), rtol=1e-4, atol=0)
    torch.testing.assert_close(*found, rtol=1e-4, atol=0)


def test_processes_at_times_of_series_have_their_derivatives():
    whole = ContinuousAR1Matrix(times(9)), ExponentialMatrix(times(9))
    series, at = torch.tensor([0, 0, 1, 0, 1]), torch.tensor([0, 4, 5, 8, 4])
    for matrix in whole:
        own = matrix.double().at(series, at)
        expected = matrix()[at][:, at] * (series[:, None] == series)
        torch.testing.assert_close(own(), expected)
        torch.testing.assert_close(own.terms()[0].dense(), own())
        free = torch.stack([p.detach() for p in own.parameters()]).reshape(-1).requires_grad_()
        assert torch.autograd.gradcheck(own, free)


@pytest.mark.parametrize("rho", [0.0, 1e-6, 1 - 1e-9])
def test_a_correlation_near_either_end_is_an_ordinary_one(rho):
    V = Sum(ContinuousAR1Matrix(torch.arange(205).double())).double()
    with torch.no_grad():
        V.operands["op_0"].get_parameter("rho").copy_(torch.tensor(rho).double().logit())
    y, X = torch.linspace(-1, 1, 205).double() ** 2, torch.ones(205, 1).double()
    found = [REMLLoss(V, solver=solver)(y, X) for solver in ("sparse", "dense")]
    torch.testing.assert_close(*found, rtol=1e-6 if rho > 0.5 else 1e-12, atol=0)


@pytest.mark.parametrize("kind", [ContinuousAR1Matrix, ExponentialMatrix])
def test_places_on_a_line_are_distinct_and_finite(kind):
    for bad, why in (
        ([0.0, 1.0, 0.0], "same place in rows 0 and 2"),
        ([0.0, np.nan], "not finite"),
        ([], "empty"),
    ):
        with pytest.raises(InputError, match=why):
            kind(torch.tensor(bad).double())
    with pytest.raises(InputError, match="places on a line"):
        kind(torch.ones(2, 2).double() - torch.eye(2).double()).at(torch.zeros(1), torch.zeros(1))


def table(n: int, groups: int) -> pd.DataFrame:
    rng = np.random.default_rng(1)
    found = pd.DataFrame({"g": np.repeat(np.arange(groups), n // groups)})
    found["t"] = np.cumsum(rng.gamma(1.0, 1.0, n)).round(6)
    found["y"] = np.cumsum(rng.standard_normal(n)) / 10 + rng.standard_normal(n) + found["g"]
    return found.sample(frac=1, random_state=0)


@pytest.mark.parametrize(
    "residual", ["car1(t | g)", "exponential(t | g)", "car1(t | g) + units", "diag(g):car1(t)"]
)
def test_residuals_by_formula_are_sparse_and_equal_dense(residual):
    encoded = Encoder("y ~ 1", residual=residual).fit(table(420, 2))
    found = []
    for solver in ("sparse", "dense"):
        model = linear_model(encoded, solver=solver)
        found.append(float(model.objective(encoded.batch()).evaluate().log_likelihood))
    assert found[0] == pytest.approx(found[1], abs=1e-8)


def test_the_start_of_a_long_line_does_not_depend_on_its_length():
    at, found = times(4000, ordered=True), []
    for n in (1000, 4000):
        matrix = ExponentialMatrix(at[:n]).double()
        matrix.moment_start(torch.ones(n).double())
        found.append(matrix.get_parameter("lengthscale").exp().item())
    assert found[0] == pytest.approx(found[1], rel=0.3)


def test_effects_at_times_are_sparse_and_predicted_between_them():
    rows = table(30, 1)
    rows["y"] = np.sin(rows["t"] / 4) + rows["y"] / 10
    new = pd.DataFrame({"t": [-1.0, rows["t"].mean(), rows["t"].iloc[3], rows["t"].max() + 2]})
    one = lmm("y ~ 1 + (1 | exponential(t))", rows, solver="sparse")
    other = lmm("y ~ 1 + (1 | exponential(t, zero))", rows.assign(zero=0.0), solver="dense")
    assert one.log_likelihood == pytest.approx(other.log_likelihood, abs=1e-6)
    found, expected = one.predict(new), other.predict(new.assign(zero=0.0))
    np.testing.assert_allclose(found["mean"], expected["mean"], rtol=0, atol=2e-4)
    np.testing.assert_allclose(found["variance"], expected["variance"], rtol=2e-4)


def test_shares_of_variances_beside_a_residual_of_many_places():
    rng = np.random.default_rng(0)
    rows = pd.DataFrame({"g": np.repeat([0, 1, 2, 3], 15), "k": np.tile(np.arange(15) ** 2 + 1, 4)})
    rows["y"] = 2.0 * rows.g + rng.standard_normal(60)
    later = rows.assign(k=rows.k + 10 * rows.g)
    fit, long = (lmm("y ~ 1 + (1 | g)", t, residual="ar1(k | g)") for t in (rows, later))
    assert [len(one.components[1].effects) for one in (fit, long)] == [197, 227]
    for one in (fit, long):
        assert one.components[1].std_dev == pytest.approx(one.residual_variance**0.5)
        assert variance_shares(one)["variance"][1] == pytest.approx(one.residual_variance)
    assert long.log_likelihood == pytest.approx(fit.log_likelihood, abs=1e-6)
    assert r2(long).conditional == pytest.approx(r2(fit).conditional, rel=1e-5)


@pytest.mark.parametrize(
    ("residual", "step"), [("car1(k | g)", 0), ("car1(k | g)", 99), ("ar1(k | g)", 99)]
)
def test_responses_are_drawn_and_fitted_anew_beside_a_chain(residual, step):
    rng = np.random.default_rng(0)
    rows = pd.DataFrame({"g": np.repeat([0, 1, 2, 3], 9), "k": np.tile(np.arange(9) ** 2, 4)})
    rows["y"] = 2.0 * rows.g + rng.standard_normal(36)
    rows["k"] += step * rows.g  # with gaps over 300 places: more than are formed
    fit = lmm("y ~ 1 + (1 | g)", rows, residual=residual)
    long = lmm("y ~ 1 + (1 | g)", rows, residual=residual.replace("car1", "exponential"))
    found, expected = (bootstrap(one, 2, seed=1) for one in (fit, long))
    name = "sd_(Intercept)|g"
    assert found.samples[name].std() > 0
    if residual.startswith("car1"):
        np.testing.assert_allclose(found.samples[name], expected.samples[name], rtol=1e-3)
