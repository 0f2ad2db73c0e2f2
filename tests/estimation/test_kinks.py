"""Fits whose optimum lies at an observed distance, where a linear correlation has a kink."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from openreml_nn import REMLLoss, fit_reml, lmm
from openreml_nn.covariance import (
    LinearCorrelation,
    LinearMatrix,
    Matrix,
    ScalarMatrix,
    SphericalMatrix,
    Sum,
    VecchiaMatrix,
)

PLACES = torch.arange(40, dtype=torch.float64)[:, None]
DISTANCE = torch.cdist(PLACES, PLACES)
ONES = torch.ones(40, 1, dtype=torch.float64)


def drawn(seed: int = 3) -> torch.Tensor:
    root = np.linalg.cholesky((1 - DISTANCE / 6.5).clamp(min=0).numpy() + 0.3 * np.eye(40))
    return torch.from_numpy(root @ np.random.default_rng(seed).standard_normal(40))


def fitted(matrix: Matrix, **options):
    return fit_reml(Sum(place=matrix, error=ScalarMatrix(40)).double(), drawn(), ONES, **options)


def test_the_maximum_at_a_kink_is_found_and_said():
    V = Sum(place=LinearMatrix(DISTANCE), error=ScalarMatrix(40)).double()
    found = fit_reml(V, drawn(), ONES)
    assert found.converged
    assert found.kinks == ("place/lengthscale",)
    assert "place/lengthscale lies at an observed distance, where the likelihood has a kink" in (
        found.summary()
    )
    _, length, error = found.parameters
    assert length.value == pytest.approx(6.0, abs=1e-10)
    assert np.isnan(length.std_error)
    assert error.std_error > 0
    # Both sides fall, with a slope; the other parameters are at an ordinary maximum.
    loss = REMLLoss(V, solver="dense", reduction="sum")

    def beside(name: str, shift: float) -> float:
        values = dict(V.named_parameters())
        with torch.no_grad():
            values[name].add_(shift)
            there = -float(loss(drawn(), ONES))
            values[name].sub_(shift)
        return there

    top = beside("place.lengthscale", 0.0)
    assert top == pytest.approx(found.log_likelihood, abs=1e-9)
    for shift in (-1e-5, 1e-5):
        assert (beside("place.lengthscale", shift) - top) / 1e-5 < -0.01
        assert abs(beside("place.sigma^2", shift) - top) / 1e-5 < 1e-3
        assert abs(beside("error.sigma^2", shift) - top) / 1e-5 < 1e-3


@pytest.mark.parametrize("unit", [1e-3, 1e3])
def test_the_unit_of_the_distances_is_that_of_the_range(unit):
    found = fitted(LinearMatrix(unit * DISTANCE))
    assert found.converged
    assert found.kinks == ("place/lengthscale",)
    assert found.parameters[1].value == pytest.approx(6 * unit, rel=1e-10)


def test_all_neighbours_have_the_kinks_of_the_dense_kernel():
    dense, near = LinearMatrix(DISTANCE), VecchiaMatrix(PLACES, LinearCorrelation(), 39)
    for one, other in zip(dense.kinks().values(), near.kinks().values(), strict=True):
        torch.testing.assert_close(one, other)
    for matrix in (dense, near):
        matrix.double().set_value("lengthscale", 5.5, natural=True)
    one, other = fitted(dense, start="current"), fitted(near, start="current")
    assert other.converged
    assert other.kinks == one.kinks
    assert other.log_likelihood == pytest.approx(one.log_likelihood, abs=1e-8)


def test_a_smooth_correlation_has_no_kink():
    assert SphericalMatrix(DISTANCE).kinks() == {}
    found = fitted(SphericalMatrix(DISTANCE))
    assert found.converged
    assert found.kinks == ()


def test_a_start_at_a_kink_that_is_no_maximum_leaves_it():
    matrix = LinearMatrix(DISTANCE).double().set_value("lengthscale", 3.0, natural=True)
    found = fitted(matrix, start="current")
    assert found.converged
    assert found.parameters[1].value != 3.0


def test_a_range_by_formula_says_so_too():
    table = pd.DataFrame({"y": drawn().numpy(), "at": PLACES[:, 0].numpy(), "g": 1})
    found = lmm("y ~ 1", table, residual="linear(at | g) + units")
    assert found.converged
    assert len(found.kinks) == 1
    assert found.log_likelihood == pytest.approx(fitted(LinearMatrix(DISTANCE)).log_likelihood)


@pytest.mark.parametrize("seed", [2, 3])
def test_the_best_of_the_optima_of_a_spherical_correlation_alone_is_found(seed):
    rng = np.random.default_rng(seed)
    east, north = rng.uniform(0, 10, (2, 40))
    apart = np.hypot(east[:, None] - east, north[:, None] - north)
    r = (apart / 3).clip(max=1)
    y = np.linalg.cholesky(1 - 1.5 * r + 0.5 * r**3) @ rng.standard_normal(40)
    table = pd.DataFrame({"y": y, "east": east, "north": north})
    found = lmm("y ~ 1", table, residual="spherical(east, north)")
    assert found.converged
    lengths = (0.5, 1.5, 3.0, 6.0, 12.0)
    others = [
        lmm(
            "y ~ 1",
            table,
            residual="spherical(east, north)",
            starts={"residual/lengthscale": length},
        ).log_likelihood
        for length in lengths
    ]
    assert found.log_likelihood > max(others) - 1e-6
