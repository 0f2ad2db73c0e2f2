"""Kernels of many places by their nearest neighbours, in a formula and beyond it."""

import numpy as np
import pandas as pd
import pytest
import torch

from openreml_nn import InputError, lmm
from openreml_nn.covariance import VecchiaMatrix
from openreml_nn.lightning import MixedModule
from openreml_nn.table.structure import parse_residual
from tests.test_kriging import elsewhere, table


@pytest.mark.parametrize("kernel", ["matern(east, north{}, nu = 2.5)", "gaussian(east, north{})"])
def test_all_neighbours_give_the_fit_and_the_predictions_of_the_dense_kernel(kernel):
    data, new = table(), elsewhere()
    one = lmm(f"y ~ x + (1 | {kernel.format('')})", data)
    other = lmm(f"y ~ x + (1 | {kernel.format(', neighbours = 99')})", data)
    assert one.converged
    assert other.converged
    assert other.log_likelihood == pytest.approx(one.log_likelihood, abs=1e-7)
    columns = ["mean", "variance", "population_mean"]
    np.testing.assert_allclose(other.predict(new)[columns], one.predict(new)[columns], rtol=1e-4)


def test_slopes_of_places_have_neighbours_too():
    data, new = table(), elsewhere()
    kernel = "gaussian(east, north{})"
    one = lmm(f"y ~ x + (1 + x | {kernel.format('')})", data)
    other = lmm(f"y ~ x + (1 + x | {kernel.format(', neighbours = 50')})", data)
    assert other.log_likelihood == pytest.approx(one.log_likelihood, abs=1e-6)
    np.testing.assert_allclose(other.predict(new)["mean"], one.predict(new)["mean"], rtol=1e-3)


def test_a_new_place_depends_on_its_nearest_alone():
    data, new = table(), elsewhere()
    result = lmm("y ~ x + (1 | matern(east, north, neighbours = 3))", data)
    module = MixedModule.of(result)
    pd.testing.assert_frame_equal(module.predict(new), result.predict(new))
    (effect,) = module.model.effects().values()
    kernel = effect.g
    assert isinstance(kernel, VecchiaMatrix)
    assert kernel.neighbours == 3
    near, weights, left = kernel.regressed(effect.places[:2] + 0.05)
    assert near.shape == weights.shape == (2, 3)
    assert ((left > 0) & (left < 1)).all()
    near, weights, left = kernel.regressed(effect.places)
    known = torch.zeros(len(near), len(near)).double().scatter(1, near, weights)
    np.testing.assert_allclose(known, np.eye(len(known)), atol=1e-10)
    np.testing.assert_allclose(left, 0, atol=1e-10)


def test_fewer_neighbours_are_another_model_and_the_summary_says_so():
    result = lmm("y ~ x + (1 | matern(east, north, neighbours = 2))", table())
    dense = lmm("y ~ x + (1 | matern(east, north))", table())
    assert abs(result.log_likelihood - dense.log_likelihood) > 1e-3
    assert "neighbours = 2" in result.summary()


def test_neighbours_at_fault_are_named():
    for value in ("0", "1.5", "a", "TRUE"):
        with pytest.raises(InputError, match=f"`neighbours` is {value}: expected a whole number"):
            lmm(f"y ~ x + (1 | matern(east, north, neighbours = {value}))", table())
    with pytest.raises(InputError, match="`neighbours` is for random effects of places"):
        parse_residual("exponential(east, north | g, neighbours = 4)")


@pytest.mark.parametrize("group", ["exponential(east, north)", "matern(east, neighbours = 3)"])
def test_one_place_is_one_level(group):
    with pytest.raises(InputError, match="has one level: a random effect needs two"):
        lmm(f"y ~ x + (1 | {group})", table().assign(east=1.0, north=2.0))


def test_many_places_are_fitted_and_predicted():
    """Nothing that has a number for each pair of places is held."""
    n, rng = 2500, np.random.default_rng(0)
    data = pd.DataFrame({"east": rng.uniform(0, 9, n), "north": rng.uniform(0, 9, n)})
    field = np.sin(data["east"]) + np.cos(data["north"])
    data["y"] = 1 + field + 0.5 * rng.standard_normal(n)
    result = lmm("y ~ 1 + (1 | exponential(east, north, neighbours = 4))", data)
    assert result.plan.solver == "sparse"
    assert result.residual_variance == pytest.approx(0.25, rel=0.1)
    new = data.head(40) + 0.01
    found = result.predict(new)  # without a warning: a sparse factor has the joint covariance
    truth = 1 + np.sin(new["east"]) + np.cos(new["north"])
    assert np.corrcoef(found["mean"], truth)[0, 1] > 0.9
