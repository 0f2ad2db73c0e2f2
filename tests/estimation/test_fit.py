"""AI-REML, fit_reml and what they return."""

import warnings
from itertools import pairwise
from math import isnan, log

import numpy as np
import pandas as pd
import pytest
import torch

from openreml_nn import AIREML, InputError, NumericalError, REMLLoss, fit_reml, lmm
from openreml_nn.covariance import (
    CovariancePropagation,
    DummyMatrix,
    IdentityMatrix,
    KnownInverseMatrix,
    KroneckerProduct,
    Pedigree,
    ScalarMatrix,
    Sum,
    UnconstrainedMatrix,
    UnstructuredMatrix,
    ar1_field,
)
from openreml_nn.datasets import penicillin, sleepstudy
from openreml_nn.estimation.starts import climb
from openreml_nn.likelihood import NotPositiveDefiniteError, Sparse
from openreml_nn.result.result import Record, Result
from openreml_nn.support.solving import invert_named, solve_named
from openreml_nn.support.spectrum import decomposed, eigenvalues
from tests.benchmarks.tables import parents

FORMULA = "Reaction ~ Days + (Days | Subject)"


def balanced(seed=0, groups=10, each=4):
    generator = torch.Generator().manual_seed(seed)
    labels = [i // each for i in range(groups * each)]
    b = 2 * torch.randn(groups, generator=generator)
    y = 5 + b[torch.tensor(labels)] + torch.randn(groups * each, generator=generator)
    n = len(y)
    V = Sum(
        group=CovariancePropagation(z=DummyMatrix(labels), g=ScalarMatrix(groups)),
        residual=ScalarMatrix(n),
    ).double()
    return V, y, torch.ones(n, 1)


def test_balanced_one_way_layout_has_the_closed_form():
    V, y, X = balanced()
    result = fit_reml(V, y, X)
    rows = y.reshape(10, 4)
    within = rows.var(1).mean().item()
    between = rows.mean(1).var().item() - within / 4
    assert result.converged
    assert not result.singular
    # The fit stops within 1e-6 standard errors of the optimum.
    assert result.residual_variance == pytest.approx(within, rel=1e-7)
    assert float(result.components[0].covariance) == pytest.approx(between, rel=1e-7)
    assert float(result.fixed.estimate[0]) == pytest.approx(y.mean().item(), rel=1e-10)
    # Var(MSW) = 2 sigma^4 / 30; the average information equals it in this layout.
    assert float(result.components[1].std_error) == pytest.approx(
        within * (2 / 30) ** 0.5, rel=1e-6
    )
    # The covariance is left at the estimates.
    natural = V.build_params(out_format="dict")
    assert natural["residual/sigma^2"].item() == result.residual_variance


@pytest.mark.parametrize("k", range(-4, 5))
def test_estimates_are_equivariant_to_the_unit_of_the_response(k):
    table = sleepstudy()
    base = lmm(FORMULA, table)
    table["Reaction"] *= 10.0**k
    scaled = lmm(FORMULA, table)
    assert scaled.converged
    for one, other in zip(base.components, scaled.components, strict=True):
        torch.testing.assert_close(
            other.covariance, one.covariance * 10.0 ** (2 * k), rtol=1e-5, atol=0
        )
        torch.testing.assert_close(
            other.std_error, one.std_error * 10.0 ** (2 * k), rtol=1e-4, atol=0
        )
    torch.testing.assert_close(
        scaled.fixed.estimate, base.fixed.estimate * 10.0**k, rtol=1e-8, atol=0
    )
    assert scaled.log_likelihood == pytest.approx(base.log_likelihood - 178 * k * log(10), rel=1e-9)


@pytest.mark.parametrize("k", [-4, 4])
def test_estimates_are_equivariant_to_the_unit_of_a_covariate(k):
    table = sleepstudy()
    base = lmm(FORMULA, table)
    table["Days"] *= 10.0**k
    scaled = lmm(FORMULA, table)
    assert scaled.converged
    unit = torch.tensor([1.0, 10.0**-k])
    torch.testing.assert_close(
        scaled.components[0].covariance,
        base.components[0].covariance * unit[:, None] * unit,
        rtol=1e-5,
        atol=0,
    )
    torch.testing.assert_close(scaled.fixed.estimate, base.fixed.estimate * unit, rtol=1e-8, atol=0)


def test_the_order_of_rows_does_not_matter():
    table = penicillin()
    formula = "diameter ~ 1 + (1 | plate) + (1 | sample)"
    one = lmm(formula, table)
    other = lmm(formula, table.sample(frac=1, random_state=3))
    assert other.log_likelihood == pytest.approx(one.log_likelihood, rel=1e-12)
    assert other.residual_variance == pytest.approx(one.residual_variance, rel=1e-6)


def test_a_variance_that_ends_at_zero_is_singular_not_a_failure():
    y = torch.tensor([1.0, 2.0, 3.0] * 4)
    labels = [i // 3 for i in range(12)]
    V = Sum(
        group=CovariancePropagation(z=DummyMatrix(labels), g=ScalarMatrix(4)),
        residual=ScalarMatrix(12),
    )
    result = fit_reml(V, y, torch.ones(12, 1))
    assert result.converged
    assert result.singular == ("group",)
    assert float(result.components[0].covariance) == 0.0
    assert isnan(result.parameters[0].std_error)
    assert result.residual_variance == pytest.approx(8 / 11, rel=1e-8)
    assert "singular fit" in result.summary()


def test_the_step_leaves_zero_when_the_likelihood_rises_from_there():
    V, y, X = balanced()
    expected = fit_reml(V, y, X).log_likelihood
    with torch.no_grad():
        V._entry("group/g/sigma^2").tensor.fill_(-float("inf"))
    result = fit_reml(V, y, X, start="current")
    assert result.converged
    assert result.log_likelihood == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("start", [-12.0, 12.0])
def test_bad_starting_values_are_overcome(start):
    V, y, X = balanced()
    expected = fit_reml(V, y, X).log_likelihood
    with torch.no_grad():
        for p in V.parameters():
            p.fill_(start)
    result = fit_reml(V, y, X, start="current")
    assert result.converged
    assert result.log_likelihood == pytest.approx(expected, rel=1e-9)


def test_the_likelihood_never_falls_along_the_history():
    result = lmm(FORMULA, sleepstudy())
    values = [record.log_likelihood for record in result.history]
    assert all(b >= a - 1e-9 * abs(a) for a, b in pairwise(values))
    assert result.iterations == len(values)
    assert set(result.history[0].parameters) == {p.name for p in result.parameters}


def test_too_few_iterations_are_not_convergence():
    V, y, X = balanced()
    with pytest.warns(RuntimeWarning, match="did not converge in 1 iterations"):
        result = fit_reml(V, 1000 * y, X, start="current", max_iterations=1)
    assert not result.converged
    assert result.score_norm > 1e-3


def test_what_a_fit_has_not_reached_is_said_without_contradiction():
    rng, said = np.random.default_rng(0), []
    table = pd.DataFrame({"g": np.repeat(np.arange(20), 5), "x": rng.normal(size=100)})
    table["y"] = table.x + rng.normal(size=20)[table.g] + rng.normal(size=100)
    for most in range(1, 9):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = lmm("y ~ x + (1 | g)", table, max_iterations=most)
        if result.converged:
            break
        (text,) = (str(w.message) for w in caught)
        said.append(result.score_norm < 1e-3)
        assert ("expected below 0.001" in text) != said[-1]
        assert ("its steps had not ended, at a score norm of" in text) == said[-1]
        assert result.score_norm > 1e-6
    assert set(said) == {False, True}


def test_fixed_parameters_stay():
    V, y, X = balanced()
    V.fix("residual/sigma^2", 0.0)
    result = fit_reml(V, y, X)
    by = {p.name: p for p in result.parameters}
    assert by["residual/sigma^2"].value == 1.0
    assert isnan(by["residual/sigma^2"].std_error)
    assert result.num_params == 1


def test_all_parameters_fixed_gives_blues_and_blups():
    V, y, X = balanced()
    V.fix("residual/sigma^2", 0.0)
    V.fix("group/g/sigma^2", 0.7)
    result = fit_reml(V, y, X)
    assert result.converged
    G, Z = torch.exp(torch.tensor(1.4)), V.operands["group"].operands["z"](torch.zeros(0))
    P = torch.linalg.inv(V())
    P = P - P @ X @ torch.linalg.inv(X.T @ P @ X) @ X.T @ P
    torch.testing.assert_close(result.random[0].values[:, 0], G * Z.T @ P @ y)
    spread = G * torch.eye(10) - G * Z.T @ P @ Z * G
    torch.testing.assert_close(result.random[0].variances[:, 0, 0], spread.diagonal())


def test_standard_errors_are_those_of_the_average_information():
    result = lmm(FORMULA, sleepstudy())
    for p in result.parameters:
        assert p.std_error > 0
    by = {p.name: p for p in result.parameters}
    residual = by["residual/sigma^2"]
    # The delta method between the scales: d exp(2x) = 2 exp(2x) dx.
    assert residual.std_error == pytest.approx(
        2 * residual.value * residual.untransformed_std_error, rel=1e-10
    )
    assert residual.value == pytest.approx(654.940, rel=1e-4)


def test_optimizer_in_a_plain_loop():
    V, y, X = balanced()
    expected = fit_reml(V, y, X).log_likelihood
    with torch.no_grad():
        for p in V.parameters():
            p.zero_()
    loss = REMLLoss(V, reduction="sum")
    optimizer = AIREML(loss.parameters())
    for _ in range(50):
        value = optimizer.step(lambda: loss(y, X))
        if optimizer.last.converged:
            break
    assert optimizer.last.converged
    assert -value.item() == pytest.approx(expected, rel=1e-10)


def test_optimizer_on_several_likelihoods_with_tied_parameters():
    V, y, X = balanced(1)
    W, u, _ = balanced(2)
    tied = Sum(group=W.operands["group"], residual=W.operands["residual"])
    tied.operands["group"].operands["g"]._parameters["sigma^2"] = (
        V.operands["group"].operands["g"]._parameters["sigma^2"]
    )
    first, second = REMLLoss(V, reduction="sum"), REMLLoss(tied, reduction="sum")
    parameters = list({id(p): p for p in [*V.parameters(), *tied.parameters()]}.values())
    assert len(parameters) == 3
    optimizer = AIREML(parameters)
    for _ in range(50):
        optimizer.step(lambda: first(y, X) + second(u, X))
        if optimizer.last.converged:
            break
    assert optimizer.last.converged
    total = first(y, X) + second(u, X)
    gradient = torch.autograd.grad(total, parameters)
    torch.testing.assert_close(torch.cat(gradient), torch.zeros(3), rtol=0, atol=1e-5)


def test_optimizer_errors():
    V, y, X = balanced()
    loss = REMLLoss(V)
    with pytest.raises(TypeError, match="`closure` is None"):
        AIREML(loss.parameters()).step()
    with pytest.raises(RuntimeError, match="evaluated no REMLLoss"):
        AIREML(loss.parameters()).step(lambda: None)
    with pytest.raises(RuntimeError, match="none of AIREML's parameters"):
        AIREML([torch.nn.Parameter(torch.zeros(1))]).step(lambda: loss(y, X))
    with pytest.raises(ValueError, match="tolerance"):
        AIREML(loss.parameters(), tolerance=0)


def test_data_that_cannot_be_fitted_are_refused():
    V, y, X = balanced()
    with pytest.raises(InputError, match="fit `y` exactly"):
        fit_reml(V, 3 * X[:, 0], X)
    with pytest.raises(ValueError, match="start"):
        fit_reml(V, y, X, start="zero")
    with pytest.raises(TypeError, match="`y` is ndarray: expected a floating-point tensor"):
        fit_reml(V, y.numpy(), X)
    W = UnconstrainedMatrix(40).double()
    with torch.no_grad():
        W._parameters["sigma^2_1_0"].fill_(50.0)
    with pytest.raises(NotPositiveDefiniteError):
        fit_reml(W, y, X, start="current")


def test_a_start_without_digits_is_named_so():
    V, y, X = balanced()
    with torch.no_grad():
        for name, p in V.named_parameters():
            p.fill_(-18.0 if "residual" in name else 20.0)
    with pytest.raises(NumericalError, match="lost its digits") as raised:
        fit_reml(V, y, X, start="current", solver="dense")
    assert not isinstance(raised.value, NotPositiveDefiniteError)


@pytest.mark.parametrize("method", ["reml", "ml"])
def test_float32_stays_float32(method):
    V, y, X = balanced()
    exact = fit_reml(V, y, X, method=method)
    single = fit_reml(V, y.float(), X.float(), method=method)
    assert single.fixed.estimate.dtype == torch.float32
    assert single.residual_variance == pytest.approx(exact.residual_variance, rel=1e-2)


def test_cuda_equals_cpu(device):
    V, y, X = balanced()
    expected = fit_reml(V, y, X)
    found = fit_reml(V, y.to(device), X.to(device))
    assert found.log_likelihood == pytest.approx(expected.log_likelihood, rel=1e-10)
    assert found.fixed.estimate.device.type == device


def test_criteria_follow_the_convention_of_lme4():
    result = lmm(FORMULA, sleepstudy())
    assert result.deviance == -2 * result.log_likelihood
    assert result.aic == pytest.approx(1755.628, abs=1e-3)
    assert result.bic == pytest.approx(1774.786, abs=1e-3)
    torch.testing.assert_close(
        result.fitted + result.residuals, torch.tensor(sleepstudy()["Reaction"].to_numpy())
    )


def test_unused_record_fields_are_nan():
    from openreml_nn.result.result import Record

    record = Record.of(ScalarMatrix(2), -1.0)
    assert isnan(record.score_norm)
    assert isnan(record.step)
    assert record.parameters == {"sigma^2": 1.0}


def confounded(kind, n=120):
    group = [i % 12 for i in range(n)]

    def part(labels):
        return CovariancePropagation(z=DummyMatrix(labels), g=ScalarMatrix(len(set(labels))))

    return {
        "identical factors": {"a": part(group), "b": part([g + 100 for g in group])},
        "one level": {"a": part([0] * n)},
    }[kind]


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("identical factors", ("a/g/sigma^2", "b/g/sigma^2")),
        ("one level", ("a/g/sigma^2",)),
    ],
)
def test_components_that_the_data_cannot_tell_apart_are_named(kind, names):
    n = 120
    group = torch.arange(n) % 12
    y = 2 * torch.randn(12)[group] + torch.randn(n)
    V = Sum({**confounded(kind), "residual": ScalarMatrix(n)})
    with pytest.warns(RuntimeWarning, match="the data cannot tell apart"):
        result = fit_reml(V, y, torch.ones(n, 1))
    assert result.indistinct == names
    assert "cannot tell apart" in result.summary()
    assert torch.isfinite(torch.tensor(result.log_likelihood))


def test_a_level_for_each_row_is_an_error():
    n = 30
    z = DummyMatrix(list(range(n)))
    V = Sum(plot=CovariancePropagation(z=z, g=ScalarMatrix(n)), residual=ScalarMatrix(n))
    with pytest.raises(InputError, match="'plot' has 30 levels for 30 rows, one row each"):
        fit_reml(V, torch.randn(n), torch.ones(n, 1))


def test_a_million_rows_of_one_level_are_a_singular_fit():
    n = 1_000_000
    z = DummyMatrix.from_codes(torch.zeros(n, dtype=torch.long), 1)
    V = Sum(one=CovariancePropagation(z=z, g=ScalarMatrix(1)), residual=ScalarMatrix(n))
    y = torch.randn(n)
    result = fit_reml(V, y, torch.ones(n, 1))
    assert result.converged
    assert result.singular == ("one",)
    assert result.residual_variance == pytest.approx(float(y.var()), rel=1e-6)


def test_well_determined_components_are_not_named():
    assert lmm(FORMULA, sleepstudy()).indistinct == ()


def test_a_response_without_residuals_is_told():
    # lme4 4.1: "Model failed to converge"; the likelihood has no maximum.
    generator = torch.Generator().manual_seed(2)
    b, x = (torch.randn(n, generator=generator, dtype=torch.float64) for n in (6, 24))
    codes = torch.arange(24) % 6
    V = Sum(
        g=CovariancePropagation(DummyMatrix.from_codes(codes, 6), ScalarMatrix(6)),
        residual=ScalarMatrix(24),
    )
    X = torch.stack([torch.ones_like(x), x], 1)
    with pytest.warns(RuntimeWarning, match="the likelihood rises without end: the residual var"):
        result = fit_reml(V, 2 * x + b[codes], X)
    assert not result.converged
    assert abs(float(result.fixed.estimate[1]) - 2) < 1e-6


@pytest.mark.parametrize("function", [decomposed, eigenvalues])
@pytest.mark.parametrize("n", [1, 2, 3, 30])
def test_a_matrix_without_eigenvalues_is_named_whatever_its_size(function, n):
    K = torch.arange(1.0, n + 1).flip(0).diag()
    found = function(K, "K")
    values = found[0] if isinstance(found, tuple) else found
    torch.testing.assert_close(values, torch.arange(1.0, n + 1))
    K[0, -1] = K[-1, 0] = torch.nan
    with pytest.raises(NumericalError, match="K has no eigenvalues: it holds numbers that are not"):
        function(K, "K")


def test_a_matrix_without_inverse_is_named():
    K = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    eye = torch.eye(2)
    for found in (
        solve_named(K, eye, "K"),
        invert_named(K, "K"),
        invert_named(K, "K", pseudo=True),
    ):
        torch.testing.assert_close(found @ K, eye)
    singular = torch.ones(2, 2)
    torch.testing.assert_close(invert_named(singular, "K", pseudo=True), singular / 4)
    for solve in (lambda K: solve_named(K, eye, "K"), lambda K: invert_named(K, "K")):
        with pytest.raises(NumericalError, match=r"^K has no inverse: it is singular$"):
            solve(singular)
    for solve in (
        lambda K: solve_named(K, eye, "K"),
        lambda K: invert_named(K, "K"),
        lambda K: invert_named(K, "K", pseudo=True),
    ):
        with pytest.raises(
            NumericalError, match=r"^K has no inverse: it holds numbers that are not"
        ):
            solve(singular * torch.nan)


@pytest.mark.parametrize("solver", ["dense", "blocked", "sparse", "krylov"])
def test_a_covariance_that_is_not_a_number_is_named_by_every_solver(solver):
    Z = DummyMatrix([0, 0, 1, 1, 2, 2] * 2, covariates=torch.arange(24.0).reshape(12, 2))
    G = KroneckerProduct(IdentityMatrix(3), UnstructuredMatrix(2))
    V = Sum(g=CovariancePropagation(z=Z, g=G), residual=ScalarMatrix(12)).double()
    with torch.no_grad():
        next(V.parameters()).fill_(torch.nan)
    y = torch.arange(12.0).double()
    with pytest.raises(NumericalError, match="not positive"):
        REMLLoss(V, solver=solver).evaluate(y, torch.ones(12, 1).double())


def test_a_field_that_is_not_a_number_is_named():
    V = Sum(field=ar1_field(4, 3), residual=ScalarMatrix(12)).double()
    with torch.no_grad():
        next(V.parameters()).fill_(torch.nan)
    y = torch.arange(12.0).double()
    with pytest.raises(NumericalError, match="the rows of the grid has no eigenvalues"):
        REMLLoss(V, solver="grid").evaluate(y, torch.ones(12, 1).double())


def dear_and_cheap(n: int) -> list[Result]:
    """Fits of one animal in ten of a pedigree, whose factor is dense in the order from the oldest to the
    youngest, and sparse in the usual one."""
    rng = np.random.default_rng(0)
    names, sires, dams = parents(n, 3)
    pedigree = Pedigree.of(names, sires, dams)
    root = np.linalg.cholesky(pedigree.inverse.to_dense().numpy())
    recorded, a = names[::10], np.linalg.solve(root.T, rng.normal(size=n))[::10]
    m = len(recorded)
    y = torch.from_numpy(2 * a + rng.standard_normal(m))

    def fitted(solver: Sparse) -> Result:
        z, g = pedigree.design(recorded), KnownInverseMatrix(pedigree.inverse)
        V = Sum(animal=CovariancePropagation(z, g), residual=ScalarMatrix(m)).double()
        return fit_reml(V, y, torch.ones(m, 1, dtype=torch.float64), solver=solver)

    return [fitted(Sparse(ordering=lambda A: np.arange(n))), fitted(Sparse())]


def test_a_dear_pedigree_starts_near_its_optimum_and_ends_at_it():
    dear, cheap = dear_and_cheap(700)
    below = [fit.log_likelihood - fit.history[0].log_likelihood for fit in (dear, cheap)]
    assert below[0] < below[1] / 3
    assert dear.iterations < cheap.iterations
    assert dear.log_likelihood == pytest.approx(cheap.log_likelihood, abs=1e-8)


def test_a_variance_that_approximate_steps_have_lost_starts_elsewhere():
    # With few records they end at no residual variance, from where exact steps took twice as many.
    dear, cheap = dear_and_cheap(750)
    assert dear.iterations <= cheap.iterations
    assert all(value > 0.01 for value in dear.history[0].parameters.values())
    assert dear.log_likelihood == pytest.approx(cheap.log_likelihood, abs=1e-8)


def test_steps_end_as_near_to_the_optimum_as_they_are_told():
    def history(near: float) -> list[Record]:
        V, y, X = balanced()
        y, X = y.double(), X.double()
        return climb(REMLLoss(V, reduction="sum").objective(y, X), 50, near=near)

    far, close = history(1e-2), history(1e-6)
    assert len(far) < len(close)
    assert far[-1].score_norm < 1e-2
    assert close[-1].score_norm < 1e-6
