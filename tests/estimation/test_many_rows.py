"""Standard errors of families with many rows."""

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
