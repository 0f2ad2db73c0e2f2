"""A short last step as one of the differences of which standard errors come."""

import copy

import numpy as np
import pytest
import torch

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
    fit.before = None
    return fit, fit.curvature()


def test_a_last_step_in_other_signs_is_none_of_the_differences(optimum):
    """Where signs are made canonical the standard deviation moves by twice its size, not by the step."""
    fit, expected = copy.copy(optimum[0]), optimum[1]
    value = float(fit.x[1])
    fit.x = fit.x * torch.tensor([1.0, -1.0], dtype=torch.float64)
    fit.value, fit.slope = fit.evaluate(fit.x)
    # A step that leaves the slope by the standard deviation as it is.
    step = 2e-3 * torch.linalg.inv(expected)[0] / torch.linalg.inv(expected)[0, 0].sqrt()
    step[1] *= -1
    fit.before = fit.x - step, fit.evaluate(fit.x - step)[1]
    fit.settle()
    assert float(fit.x[1]) == abs(value)
    torch.testing.assert_close(fit.curvature(), expected, rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize(("length", "error"), [(None, 1e-4), (1.5e-3, 2.5e-4), (4e-3, 1e-4)])
def test_standard_errors_are_those_of_central_differences(optimum, length, error):
    """A step that is taken for a difference leaves an error in proportion to its length."""
    fit, curvature = copy.copy(optimum[0]), optimum[1]
    scale = curvature.diagonal().rsqrt()
    if length is not None:
        there = fit.x - length * scale * torch.tensor([0.0, 1.0], dtype=torch.float64)
        fit.before = there, fit.evaluate(there)[1]
    H = torch.stack(
        [
            (fit.evaluate(fit.x + move)[1] - fit.evaluate(fit.x - move)[1]) / (2 * move.sum())
            for move in torch.diag(1e-3 * scale)
        ]
    )
    errors = [torch.linalg.inv((h + h.mT) / 2).diagonal().sqrt() for h in (fit.curvature(), H)]
    torch.testing.assert_close(*errors, rtol=error, atol=0)
