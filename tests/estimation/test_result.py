"""What a result says beside its estimates: standard errors, boundaries, shares of levels."""

import numpy as np
import pandas as pd
import pytest
import torch

from openreml_nn import fit_reml, lmm
from openreml_nn.covariance import (
    CovariancePropagation,
    DummyMatrix,
    KnownMatrix,
    ScalarMatrix,
    Sum,
)
from openreml_nn.datasets import oats, sleepstudy
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
