"""What a result says beside its estimates: standard errors, boundaries, shares of levels."""

import warnings
from math import isnan

import numpy as np
import pandas as pd
import pytest
import torch

from openreml_nn import REMLLoss, fit_reml, lmm
from openreml_nn.covariance import (
    CovariancePropagation,
    DummyMatrix,
    IdentityMatrix,
    KnownMatrix,
    KroneckerProduct,
    ScalarMatrix,
    Sum,
    UnstructuredMatrix,
    ar1_field,
)
from openreml_nn.datasets import oats, sleepstudy
from openreml_nn.estimation.outcome import outcome
from openreml_nn.result.result import Label
from tests.strategies import kinship

UNBALANCED = oats().drop(index=[0, 4, 8, 19, 32, 49, 50])


def dense(result):
    """V with its derivatives by the variances, P and P y, written out."""
    source = result.source
    terms = [term.detach() for term in source.covariance.terms()]
    variances = [float(c.covariance) for c in result.components]
    slopes = [term.dense() / v for term, v in zip(terms, variances, strict=True)]
    V = sum(v * S for v, S in zip(variances, slopes, strict=True))
    inverse = torch.linalg.inv(V)
    half = inverse @ source.X
    P = inverse - half @ torch.linalg.solve(source.X.mT @ half, half.mT)
    return slopes, P, P @ source.y


def test_standard_errors_of_variances_are_those_of_the_average_information():
    r""":math:`\tfrac12 y^\top P V_i P V_j P y`, neither the observed nor the expected one."""
    result = lmm("yield ~ nitro * Variety + (1 | Block/Variety)", UNBALANCED)
    slopes, P, p_y = dense(result)
    working = torch.stack([S @ p_y for S in slopes], 1)
    average = working.mT @ P @ working / 2
    error = torch.linalg.inv(average).diagonal().sqrt()
    expected = torch.stack([torch.trace(P @ S @ P @ T) / 2 for S in slopes for T in slopes])
    observed = 2 * average - expected.reshape(3, 3)
    for other in (observed, expected.reshape(3, 3)):
        # Else this could not tell them apart.
        assert float((torch.linalg.inv(other).diagonal().sqrt() / error - 1).abs().max()) > 0.003
    for i, c in enumerate(result.components):
        assert float(c.std_error) == pytest.approx(float(error[i]), rel=1e-6)
        parameter = result.parameters[i]
        assert parameter.std_error == pytest.approx(float(error[i]), rel=1e-6)
        # Of a variance s = exp(2x): sd(x) = sd(s) / 2s.
        stored = float(error[i]) / (2 * parameter.value)
        assert parameter.untransformed_std_error == pytest.approx(stored, rel=1e-6)


@pytest.mark.parametrize(("ratio", "singular"), [(1e-3, ()), (0.0, ("g",))])
def test_a_small_variance_is_not_a_singular_one(ratio, singular):
    """Balanced groups whose REML estimate is ``ratio`` residual deviations in closed form."""
    q, m = 20, 1000
    b, e = torch.randn(q), torch.randn(q, m)
    e -= e.mean(1, keepdim=True)
    b = (b - b.mean()) / b.std()
    within = e.square().sum() / (q * (m - 1))
    y = e + b[:, None] * (within * (1 / m + ratio**2 if ratio else 0.9 / m)).sqrt()
    table = pd.DataFrame({"y": y.reshape(-1).numpy(), "g": np.arange(q * m) // m})
    result = lmm("y ~ 1 + (1 | g)", table)
    assert result.singular == singular
    if not singular:
        found = float(result.components[0].std_dev) / result.residual_variance**0.5
        assert found == pytest.approx(ratio, rel=1e-3)


@pytest.mark.parametrize("ratio", [0.5, 2.0])
def test_the_singular_threshold_is_lme4s(ratio):
    """A ten-thousandth of the residual deviation, for a fit whose variance is held there."""
    g = [i // 4 for i in range(40)]
    V = Sum(
        g=CovariancePropagation(z=DummyMatrix(g), g=ScalarMatrix(10)), residual=ScalarMatrix(40)
    ).double()
    V.fix("g/g/sigma^2", float(np.log(ratio * 1e-4 * 3)))
    V.fix("residual/sigma^2", float(np.log(3)))
    result = fit_reml(V, torch.randn(40), torch.ones(40, 1), start="current")
    assert result.singular == (("g",) if ratio < 1 else ())


def test_the_residual_variance_is_the_mean_over_strata():
    result = lmm("Reaction ~ Days + (1 | Subject)", sleepstudy(), residual="diag(Days)")
    (residual,) = [c for c in result.components if c.group == "Residual"]
    strata = residual.std_dev**2
    assert len(strata) == 10
    assert float(strata.max()) > 2 * float(strata.min())
    assert result.residual_variance == pytest.approx(float(strata.mean()))


def test_the_residual_parts_what_is_fitted_from_the_response():
    result = lmm("Reaction ~ Days + (Days | Subject)", sleepstudy())
    source = result.source
    b = result.random[0].values
    z = torch.stack([torch.ones(180), source.X[:, 1]], 1)
    subject = torch.arange(180) // 10
    expected = source.X @ result.fixed.estimate + (z * b[subject]).sum(1)
    torch.testing.assert_close(result.fitted, expected)
    torch.testing.assert_close(result.residuals, source.y - expected)


def test_the_variance_shown_of_a_kernel_is_its_factor():
    """Whatever the diagonal of K: the component is the variance component."""
    n = 30
    K = kinship(n) * torch.linspace(1, 3, n).sqrt() * torch.linspace(1, 3, n).sqrt()[:, None]
    V = Sum(kernel=KnownMatrix(K), residual=ScalarMatrix(n)).double()
    result = fit_reml(V, torch.randn(n), torch.ones(n, 1))
    factor = result.parameters[0].value
    assert float(result.components[0].covariance) == pytest.approx(factor)


def test_the_variance_shown_of_related_levels_is_their_mean():
    g = [i % 4 for i in range(40)]
    V = Sum(
        g=CovariancePropagation(z=DummyMatrix(g), g=UnstructuredMatrix(4)),
        residual=ScalarMatrix(40),
    ).double()
    for name in V.param_names:
        V.fix(name, float(torch.randn(())) / 2)
    labels = {"g": Label("g", ("(Intercept)",), tuple("abcd"))}
    result = fit_reml(V, torch.randn(40), torch.ones(40, 1), start="current", labels=labels)
    expected = V.operands["g"].operands["g"]().diagonal()
    assert float(expected.std()) > 0.1
    assert result.components[0].covariance.tolist() == [[pytest.approx(float(expected.mean()))]]


@pytest.mark.parametrize(("gap", "converged"), [(1e-2, False), (1e-5, True)])
def test_converged_is_a_thousandth_of_a_standard_error(gap, converged):
    y, X = torch.randn(30), torch.ones(30, 1)
    V = ScalarMatrix(30).double()
    best = fit_reml(V, y, X).parameters[0]
    with torch.no_grad():
        V.get_parameter("sigma^2").add_(gap * best.untransformed_std_error)
    loss = REMLLoss(V)
    result = outcome(loss.objective(y, X), loss.plan, y, X)
    assert result.converged is converged
    if not converged:
        assert result.score_norm == pytest.approx(gap, rel=0.1)


@pytest.mark.parametrize("seed", range(8))
def test_the_likelihood_never_falls_from_a_bad_start(seed):
    generator = torch.Generator().manual_seed(seed)
    n = 60
    a, b = torch.randint(0, 6, (2, n), generator=generator)
    time = torch.randn(n, generator=generator)
    z = DummyMatrix(a.tolist(), covariates=torch.stack([torch.ones(n), time], 1))
    V = Sum(
        a=CovariancePropagation(z=z, g=KroneckerProduct(IdentityMatrix(6), UnstructuredMatrix(2))),
        b=CovariancePropagation(z=DummyMatrix(b.tolist()), g=ScalarMatrix(6)),
        residual=ScalarMatrix(n),
    ).double()
    y = torch.randn(n, generator=generator) + torch.randn(6, generator=generator)[a]
    X = torch.stack([torch.ones(n), time], 1)
    with torch.no_grad():
        for parameter in V.parameters():
            parameter.copy_(2 * torch.randn(1, generator=generator))
    start = -float(REMLLoss(V, reduction="sum")(y, X).detach())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        history = fit_reml(V, y, X, start="current", max_iterations=12).history
    path = np.array([start, *(record.log_likelihood for record in history)])
    assert (np.diff(path) >= -1e-9 * abs(path[:-1])).all()
    assert path[-1] > start


def test_standard_errors_of_a_correlation_are_those_of_the_average_information():
    """Where V is not linear in its parameters the observed information bends, this does not."""
    table = sleepstudy()
    result = lmm("Reaction ~ Days", table, residual="ar1(Days | Subject)")
    variance, rho = result.parameters
    lags = (torch.arange(10.0)[:, None] - torch.arange(10.0)).abs()
    powers = rho.value**lags
    slopes = [
        torch.block_diag(*[block] * 18)
        for block in (powers, variance.value * lags * rho.value ** (lags - 1).clamp(min=0))
    ]
    y, X = result.source.y, result.source.X
    inverse = torch.linalg.inv(variance.value * slopes[0])
    half = inverse @ X
    P = inverse - half @ torch.linalg.solve(X.mT @ half, half.mT)
    working = torch.stack([S @ P @ y for S in slopes], 1)
    error = torch.linalg.inv(working.mT @ P @ working / 2).diagonal().sqrt()
    assert variance.std_error == pytest.approx(float(error[0]), rel=1e-5)
    assert rho.std_error == pytest.approx(float(error[1]), rel=1e-5)


@pytest.mark.filterwarnings("ignore:the data cannot tell apart")
@pytest.mark.parametrize("rho", [0.0, 0.5])
def test_a_parameter_that_the_data_say_nothing_of_is_named_and_has_no_standard_error(rho):
    # A field of one column: the likelihood is the same at any correlation of its columns.
    torch.manual_seed(1)
    y = torch.randn(20, dtype=torch.float64)
    V = Sum(field=ar1_field(20, 1)).double()
    V.set_value("field/column/rho", rho, natural=True)
    result = fit_reml(V, y, torch.ones(20, 1).double(), start="current")
    (silent,) = [p for p in result.parameters if p.name == "field/column/rho"]
    assert result.indistinct == ("field/column/rho",)
    assert np.isnan(silent.std_error)
    others = [p for p in result.parameters if p is not silent and not p.fixed]
    assert all(p.std_error > 0 for p in others)


def test_a_result_is_shown_in_a_line():
    result = lmm("yield ~ nitro + (1 | Block/Variety)", oats())
    assert (
        repr(result)
        == str(result)
        == (
            "Result(formula='yield ~ nitro + (1 | Block/Variety)', method='reml', "
            f"log_likelihood={result.log_likelihood!r}, rows=72, "
            "groups={'Block': 6, 'Block:Variety': 18}, converged=True)"
        )
    )
    without = fit_reml(ScalarMatrix(9).double(), torch.arange(9.0), torch.ones(9, 1))
    assert repr(without).startswith("Result(formula=None, method='reml', log_likelihood=-")
    assert repr(without).endswith(", rows=9, groups={}, converged=True)")


@pytest.mark.filterwarnings("ignore:the data cannot tell apart")
def test_what_the_data_cannot_tell_apart_has_no_standard_error_and_what_they_do_tell_has_its_own():
    """A term twice: the sum of both variances is determined, and so is the residual's."""
    table = sleepstudy().assign(again=lambda t: "s" + t["Subject"])
    twice = lmm("Reaction ~ Days + (1 | Subject) + (1 | again)", table)
    once = lmm("Reaction ~ Days + (1 | Subject)", table)
    errors = {p.name: p.std_error for p in twice.parameters}
    assert isnan(errors["Subject/g/sigma^2"]) and isnan(errors["again/g/sigma^2"])
    assert errors["residual/sigma^2"] == pytest.approx(once.parameters[-1].std_error, rel=1e-6)
    assert [c.std_error.isnan().item() for c in twice.components] == [True, True, False]


@pytest.mark.filterwarnings("ignore:the data cannot tell apart")
def test_a_function_of_what_cannot_be_told_apart_has_its_error_where_it_is_determined():
    """An intercept and a constant polynomial beside it: the variance of the slope is determined."""
    random = "us({}legendre(Days, 1, intercept = TRUE) | Subject)"
    both = lmm(f"Reaction ~ Days + {random.format('')}", sleepstudy())
    one = lmm(f"Reaction ~ Days + {random.format('0 + ')}", sleepstudy())
    error = both.components[0].std_error
    assert error[:2].isnan().all()
    assert float(error[2, 2]) == pytest.approx(float(one.components[0].std_error[1, 1]), rel=1e-4)
    assert all(isnan(p.std_error) for p in both.parameters if "Subject" in p.name)


def test_errors_of_slopes_far_from_zero_are_there_beside_a_term_that_vanishes():
    table = sleepstudy().assign(year=lambda t: t["Days"] + 1000, none=lambda t: t.index % 6)
    alone = lmm("Reaction ~ year + (year | Subject)", table)
    beside = lmm("Reaction ~ year + (year | Subject) + (1 | none)", table)
    assert beside.boundary == ("none/g/sigma^2",)
    expected = [p.std_error for p in alone.parameters]
    found = [p.std_error for p in beside.parameters if p.name != "none/g/sigma^2"]
    assert found == pytest.approx(expected, rel=1e-4)
