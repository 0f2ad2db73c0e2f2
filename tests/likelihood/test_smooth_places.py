"""Places so near each other, under a smooth kernel, that their neighbours all but determine them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from openreml_nn import REMLLoss, fit_reml
from openreml_nn.covariance import (
    CovariancePropagation,
    DummyMatrix,
    GaussianCorrelation,
    ScalarMatrix,
    Sum,
    VecchiaMatrix,
)
from openreml_nn.estimation.derivatives import jacobian


def smooth(q: int = 200) -> tuple[Sum, torch.Tensor, torch.Tensor]:
    """Four rows of each place, in a square whose side is two lengths."""
    rng = np.random.default_rng(2)
    places = torch.from_numpy(rng.uniform(0, 2, (q, 2)))
    K = VecchiaMatrix(places, GaussianCorrelation(), neighbours=12)
    codes = torch.arange(4 * q) % q
    z = DummyMatrix.from_codes(codes, q)
    V = Sum(place=CovariancePropagation(z, K), residual=ScalarMatrix(4 * q)).double()
    effects = torch.sin(2 * places[:, 0]) + torch.cos(places.sum(1))
    y = effects[codes] + torch.from_numpy(rng.standard_normal(4 * q))
    return V, y, torch.ones(4 * q, 1, dtype=torch.float64)


def test_the_likelihood_and_its_scores_keep_the_digits_that_the_precision_loses():
    V, y, X = smooth()
    (K,) = (part for part in V.modules() if isinstance(part, VecchiaMatrix))
    left = K.regressions.at(torch.zeros(1, dtype=torch.float64))[:200]
    assert 0 < float(left.min()) < 1e-10
    dense, sparse = (REMLLoss(V, solver=solver).objective(y, X) for solver in ("dense", "sparse"))
    one, other = dense.evaluate(), sparse.evaluate()
    assert float(other.log_likelihood) == pytest.approx(float(one.log_likelihood), abs=1e-6)
    scores = []
    for objective, at in ((dense, one), (sparse, other)):
        slopes = jacobian(lambda u, o=objective: o.matrices(u), torch.zeros(3).double())
        pairs = zip(at.scores(), slopes, strict=True)
        scores.append(sum((s * slope).flatten(1).sum(1) for s, slope in pairs))
    torch.testing.assert_close(*scores, rtol=1e-5, atol=1e-5)
    assert 0 < other.noise < 1e-4


def test_a_fit_ends_where_rounding_lets_nothing_more_be_seen():
    V, y, X = smooth()
    found = fit_reml(V, y, X, solver="sparse")
    assert found.converged
    assert found.iterations < 15
    assert 0 < found.log_likelihood_error < 1e-4
    assert "rounding leaves about" in found.summary()
    sparse = [p.value for p in found.parameters]
    dense = fit_reml(V, y, X, solver="dense")
    assert found.log_likelihood == pytest.approx(dense.log_likelihood, abs=1e-4)
    assert sparse == pytest.approx([p.value for p in dense.parameters], rel=2e-3)
