"""Several starts of marginal likelihoods whose correlation ends at a length."""

import numpy as np
import pandas as pd
import pytest
import torch

from openreml_nn import LaplaceLoss, glmm
from openreml_nn.covariance import CovariancePropagation, DummyMatrix, SphericalMatrix
from openreml_nn.estimation.marginal_start import set_start
from openreml_nn.estimation.marginal_steps import MarginalFit
from openreml_nn.families import Poisson


def counts(places, rows, reach, seed):
    rng = np.random.default_rng(seed)
    u, v = rng.uniform(0, 10, (2, places)).round(2)
    r = np.minimum(np.hypot(u[:, None] - u, v[:, None] - v) / reach, 1)
    K = 0.8 * (1 - 1.5 * r + 0.5 * r**3) + 1e-9 * np.eye(places)
    b = np.linalg.cholesky(K) @ rng.normal(size=places)
    at = np.repeat(np.arange(places), rows)
    return pd.DataFrame({"u": u[at], "v": v[at], "y": rng.poisson(np.exp(0.5 + b[at]))})


def test_a_spherical_correlation_starts_from_several_lengths_and_ends_at_the_best():
    result = glmm("y ~ 1 + (1 | spherical(u, v))", counts(30, 3, 4, 1), family="poisson")
    assert result.converged
    # From the scale of the data alone it ended at -147.5945.
    assert result.log_likelihood == pytest.approx(-147.5857, abs=1e-4)
    assert len(result.starts) == 3
    assert all(start.log_likelihood < result.log_likelihood for start in result.starts)


def test_no_step_is_taken_to_where_the_slope_is_no_number():
    table = counts(12, 2, 5, 3)
    at = torch.arange(12).repeat_interleave(2)
    places = torch.tensor(table[["u", "v"]].to_numpy()[::2].copy())
    V = CovariancePropagation(
        DummyMatrix.from_codes(at, 12), SphericalMatrix(torch.cdist(places, places))
    )
    y, X = torch.tensor(table["y"].to_numpy(float)), torch.ones(24, 1, dtype=torch.float64)
    fit = MarginalFit(LaplaceLoss(V, Poisson()), y, X, y.new_zeros(24), ["mean"])
    set_start(fit)
    fit.x[-1] = -150.0  # a length far below all distances, of which the likelihood says nothing
    fit.value, fit.slope = fit.evaluate(fit.x)
    fit.hessian = torch.eye(3, dtype=torch.float64)
    fit.hessian[0, 0], fit.hessian[2, 2] = fit.slope[0] ** 2, 1e-10
    fit.hessian[0, 2] = fit.hessian[2, 0] = -fit.slope[0] * 9e-6
    fit.climb(1)
    assert torch.isfinite(fit.slope).all()
    assert torch.isfinite(fit.hessian).all()
