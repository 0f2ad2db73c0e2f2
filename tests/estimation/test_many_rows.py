"""Fits of many rows begin at those of a part of them, or at approximate ones, and end where others do."""

import numpy as np
import pandas as pd
import pytest
import torch

from openreml_nn import fit_reml, glmm
from openreml_nn.covariance import CovariancePropagation, DummyMatrix, ScalarMatrix, Sum
from openreml_nn.estimation.marginal_start import set_start
from openreml_nn.estimation.marginal_steps import MarginalFit
from openreml_nn.families import Poisson
from openreml_nn.likelihood import LaplaceLoss

N, LEVELS = 20_001, 40


@pytest.fixture(scope="module")
def optimum():
    rng = np.random.default_rng(0)
    codes = rng.integers(0, LEVELS, N)
    eta = 0.2 + 0.5 * rng.standard_normal(LEVELS)[codes]
    y = torch.from_numpy(rng.poisson(np.exp(eta)).astype(float))
    z = DummyMatrix.from_codes(torch.from_numpy(codes), LEVELS)
    tree = Sum(g=CovariancePropagation(z=z, g=ScalarMatrix(LEVELS))).double()
    X = torch.ones(N, 1, dtype=torch.float64)
    fit = MarginalFit(LaplaceLoss(tree, Poisson()), y, X, torch.zeros_like(y), ["one"])
    set_start(fit)
    while fit.climb(20) and float(fit.slope[1].abs()) > 1e-5:
        fit.aim /= 100
    return fit, fit.curvature()


def test_standard_errors_are_those_of_central_differences(optimum):
    fit, curvature = optimum
    scale = curvature.diagonal().rsqrt()
    H = torch.stack(
        [
            (fit.evaluate(fit.x + move)[1] - fit.evaluate(fit.x - move)[1]) / (2 * move.sum())
            for move in torch.diag(1e-3 * scale)
        ]
    )
    errors = [torch.linalg.inv((h + h.mT) / 2).diagonal().sqrt() for h in (curvature, H)]
    torch.testing.assert_close(*errors, rtol=1e-4, atol=0)


@pytest.mark.parametrize("separated", [False, True])
def test_counts_of_many_rows_have_the_fit_of_their_sums(separated):
    """The part of the levels at which the fit begins has an optimum, or nothing but zeros."""
    rng = np.random.default_rng(0)
    n, q = 60_000, 3_000
    g = np.arange(n) % q
    mean = np.exp(0.3 + 0.5 * rng.standard_normal(q)[g])
    mean[(g % 6 == 0) & separated] = 0
    table = pd.DataFrame({"g": g, "y": rng.poisson(mean)})
    sums = table.groupby("g", as_index=False)["y"].sum().assign(o=np.log(n / q))
    found = glmm("y ~ 1 + (1 | g)", table, family="poisson")
    expected = glmm("y ~ 1 + offset(o) + (1 | g)", sums, family="poisson")
    assert found.converged
    torch.testing.assert_close(found.fixed.estimate, expected.fixed.estimate, rtol=0, atol=1e-5)
    variances = [r.components[0].covariance for r in (found, expected)]
    torch.testing.assert_close(*variances, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        found.random[0].values, expected.random[0].values, rtol=1e-4, atol=1e-5
    )


def test_approximate_steps_come_first_and_the_optimum_is_the_exact_one():
    rng = np.random.default_rng(0)
    n, sizes = 6_000, {"a": 600, "b": 400}
    parts, y = {}, rng.standard_normal(n)
    for name, q in sizes.items():
        codes = rng.integers(0, q, n)
        z = DummyMatrix.from_codes(torch.from_numpy(codes), q)
        parts[name] = CovariancePropagation(z=z, g=ScalarMatrix(q))
        y += rng.standard_normal(q)[codes]
    X = torch.ones(n, 1, dtype=torch.float64)
    found = []
    for start in ("moments", "current"):
        V = Sum(**parts, residual=ScalarMatrix(n)).double()
        with torch.no_grad():
            for parameter in V.parameters():
                parameter.zero_()
        found.append(fit_reml(V, torch.from_numpy(y), X, start=start))
    one, other = found
    assert one.plan.exact
    assert one.iterations < other.iterations
    assert one.log_likelihood == pytest.approx(other.log_likelihood, abs=1e-8)
    values = [[p.value for p in result.parameters] for result in found]
    assert values[0] == pytest.approx(values[1], rel=1e-5)
