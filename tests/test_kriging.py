"""Places, times and animals that were not in the fit: the conditional mean and variance."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from openreml_nn import InputError, MixedModel, RandomEffect, lmm
from openreml_nn.covariance import (
    ExponentialMatrix,
    GaussianMatrix,
    KnownMatrix,
    KroneckerProduct,
    MaternCorrelation,
    MaternMatrix,
    SphericalMatrix,
    UnstructuredMatrix,
    VecchiaMatrix,
)
from openreml_nn.families import Poisson
from openreml_nn.lightning import MixedModule
from openreml_nn.result.joint import JointErrors

KERNELS = {
    "exponential": ExponentialMatrix,
    "gaussian": GaussianMatrix,
    "matern": MaternMatrix,
    "spherical": SphericalMatrix,
}


def table(n=70, seed=0):
    rng = np.random.default_rng(seed)
    t = pd.DataFrame({"east": rng.integers(0, 6, n) / 2, "north": rng.integers(0, 5, n) / 2})
    t["x"] = rng.standard_normal(n)
    t["g"] = [f"g{i}" for i in rng.integers(0, 6, n)]
    field = np.sin(t["east"]) + np.cos(t["north"])
    t["y"] = 1 + t["x"] * (1 + 0.3 * field) + field + 0.3 * rng.standard_normal(n)
    t["y"] += t["g"].map(dict.fromkeys(t["g"].unique(), 0.0)) + 0.4 * (t["g"] == "g2")
    return t


def elsewhere():
    """Places that were not in the fit, one that was, and a group that was not."""
    new = table(9, seed=4)
    new.loc[:6, "east"] += 0.13
    new.loc[:3, "north"] += 0.21
    new.loc[5, "g"] = "new"
    return new.drop(columns="y")


def distance(a, b):
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def dense(model, data, new, values=None, new_values=None):
    """Mean and variance of new observations with the kernel of all places written out.

    Places are coordinates of each row; other effects are of independent levels.
    """
    n, m = len(data["y"]), len(new["x"])
    V, c, prior = torch.zeros(n, n).double(), torch.zeros(n, m).double(), torch.zeros(m).double()
    for name, effect in model.effects().items():
        one, k = torch.ones(n, 1).double(), torch.ones(m, 1).double()
        z, z0 = data.get("values", {}).get(name, one), new.get("values", {}).get(name, k)
        z, z0 = z @ effect.basis, z0 @ effect.basis
        if effect.places is None:
            sigma = effect.prior_in_basis()
            a, b = data["groups"][name], new["groups"][name]
            same, cross = a[:, None] == a, a[:, None] == b
        else:
            kernel = effect.g if effect.effects == 1 else effect.g.operands["levels"]
            sigma = torch.eye(1).double()
            if effect.effects > 1:
                sigma = effect.g.operands["effects"]()
            at, to = data["extra"], new["extra"]
            same, cross = kernel.between(distance(at, at)), kernel.between(distance(at, to))
            prior = prior + kernel().diagonal().mean() * ((z0 @ sigma) * z0).sum(1)
        if effect.places is None:
            prior = prior + ((z0 @ sigma) * z0).sum(1)
        V, c = V + same * (z @ sigma @ z.mT), c + cross * (z @ sigma @ z0.mT)
    s2 = model.residual().reshape(())
    V = V + s2 * torch.eye(n).double()
    y = data["y"] - data.get("offset", 0)
    Vi = torch.linalg.inv(V)
    if model.head == "ml":
        e = y - model(data)
        return model(new) + c.mT @ Vi @ e, prior - (c * (Vi @ c)).sum(0) + s2
    X, X0 = model(data), model(new)
    M = torch.linalg.inv(X.mT @ Vi @ X)
    b = M @ X.mT @ Vi @ y
    u = X0 - c.mT @ Vi @ X
    mean = X0 @ b + c.mT @ Vi @ (y - X @ b)
    return mean, prior - (c * (Vi @ c)).sum(0) + ((u @ M) * u).sum(1) + s2


def batches(result):
    encoder = result.encoder
    t, new = table(), elsewhere()
    places = ["east", "north"]
    found = []
    for rows in (t, new):
        batch = encoder.transform(rows).batch()
        found.append({**batch, "extra": torch.tensor(rows[places].to_numpy())})
    return found


@pytest.mark.filterwarnings("ignore:the fit did not converge")
@pytest.mark.filterwarnings("ignore:the data cannot tell apart")
@pytest.mark.filterwarnings("ignore:.*levels that the fit did not see")
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(
    "effects", ["(1 | {})", "(1 | {}) + (1 | g)", "(x | {}) + (1 | g)"]
)  # fmt: skip
def test_a_place_that_was_not_in_the_fit_is_kriged(name, effects):
    formula = "y ~ x + " + effects.format(f"{name}(east, north)")
    result = lmm(formula, table(), max_iterations=5)
    found = result.predict(elsewhere())
    with torch.no_grad():
        mean, variance = dense(result.model, *batches(result))
    np.testing.assert_allclose(found["mean"], mean, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(found["variance"], variance, rtol=1e-8, atol=1e-8)


def test_unseen_places_are_not_said_to_be_predicted_as_zero(recwarn):
    result = lmm("y ~ x + (1 | exponential(east, north))", table())
    result.predict(elsewhere())
    assert not [w for w in recwarn if "did not see" in str(w.message)]


def model_of(head="gls", k=1, levels=30, family=None, random=None):
    torch.manual_seed(0)
    at = torch.rand(levels, 2).double()
    g = MaternMatrix(distance(at, at)).double()
    if k > 1:
        g = KroneckerProduct(levels=g, effects=UnstructuredMatrix(k).double())
        g.operands["levels"].fix("sigma^2", 0.0)
    mean = nn.Linear(2, 2 if head == "gls" else 1).double()
    effects = {"plot": RandomEffect(levels, g, effects=k, places=at), **(random or {})}
    model = MixedModel(mean, effects, head=head, family=family)
    n = 80
    codes = torch.randint(0, levels, (n,))
    data = {"x": torch.randn(n, 2).double(), "y": torch.randn(n).double(), "extra": at[codes]}
    data["groups"] = {"plot": codes, "g": torch.randint(0, 5, (n,))}
    data["values"] = {"plot": torch.randn(n, k).double()} if k > 1 else {}
    new_at = torch.rand(7, 2).double()
    new_at[6] = at[3]
    new = {"x": torch.randn(7, 2).double(), "extra": new_at, "places": {"plot": new_at}}
    new["groups"] = {"plot": torch.full((7,), -1), "g": torch.tensor([0, 1, 2, 3, -1, -1, 0])}
    new["values"] = {"plot": torch.randn(7, k).double()} if k > 1 else {}
    return model, data, new


@pytest.mark.parametrize("head", ["ml", "gls"])
@pytest.mark.parametrize("k", [1, 2])
def test_a_model_of_tensors_kriges(head, k):
    model, data, new = model_of(head, k, random={"g": RandomEffect(5)})
    model.update(data)
    found = model.predict(new)
    with torch.no_grad():
        mean, variance = dense(model, data, new)
    torch.testing.assert_close(found.mean, mean, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found.variance, variance, rtol=1e-8, atol=1e-8)
    # A place of the fit is that level.
    known = {**new, "groups": {**new["groups"], "plot": torch.tensor([-1] * 6 + [3])}}
    for one, other in zip(found, model.predict(known), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)
    # By parts, and from a checkpoint.
    model.joint.most_numbers = 40
    torch.testing.assert_close(model.predict(new).variance, variance, rtol=1e-8, atol=1e-8)
    again = model_of(head, k, random={"g": RandomEffect(5)})[0]
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again.predict(new).mean, mean, rtol=1e-8, atol=1e-8)


def test_without_places_rows_or_data_a_new_level_has_its_prior():
    model, data, new = model_of("ml")
    before = model.predict(new)
    prior = model.random["plot"].prior().reshape(()) + model.residual().reshape(())
    torch.testing.assert_close(before.variance, prior.expand(7))
    model.update(data)
    plain = {key: value for key, value in new.items() if key != "places"}
    torch.testing.assert_close(model.predict(plain).variance, prior.expand(7))
    assert bool((model.predict(new).variance < prior).all())


def test_a_family_is_kriged_on_its_own_scale():
    model, data, new = model_of("ml", family=Poisson())
    data["y"] = data["y"].exp().round()
    model.update(data)
    found = model.predict(new)
    plot = model.random["plot"]
    K, c = plot.g(), plot.g.between(distance(new["extra"], plot.places))
    eta = model(new) + c @ torch.linalg.solve(K, plot.blup[:, 0])
    joint = model.joint.covariance
    a = torch.linalg.solve(K, c.mT).mT
    v = plot.prior().reshape(()) - (a * c).sum(1) + ((a @ joint) * a).sum(1)
    torch.testing.assert_close(found.mean, (eta + v / 2).exp().detach(), rtol=1e-7, atol=0)


@pytest.mark.parametrize("k", [1, 2])
def test_where_the_joint_covariance_is_not_at_hand_the_variance_is_a_bound(k):
    """No less than it is, and no more than the prior's; at a place of the fit it is that level's."""
    model, data, new = model_of("ml", k)
    model.joint = JointErrors(most_columns=5, most_entries=10)
    model.update(data)
    with pytest.warns(RuntimeWarning, match="as independent"):
        found = model.predict(new)
    plain = {key: value for key, value in new.items() if key != "places"}
    with pytest.warns(RuntimeWarning, match="as independent"):
        prior = model.predict(plain).variance
    with torch.no_grad():
        mean, variance = dense(model, data, new)
    torch.testing.assert_close(found.mean, mean, rtol=1e-8, atol=1e-8)
    assert bool((found.variance >= variance - 1e-10).all())
    assert bool((found.variance <= prior + 1e-10).all())
    assert bool((found.variance < prior - 1e-3).any())
    torch.testing.assert_close(found.variance[6], variance[6], rtol=1e-8, atol=0)


@pytest.mark.parametrize("head", ["ml", "gls"])
def test_places_too_many_for_a_checkpoint_are_kriged_exactly_and_the_checkpoint_is_small(head):
    model, data, new = model_of(head, random={"g": RandomEffect(5)})
    model.joint = JointErrors(most_columns=5, most_numbers=60)
    model.update(data)
    found = model.predict(new)
    with torch.no_grad():
        mean, variance = dense(model, data, new)
    torch.testing.assert_close(found.mean, mean, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found.variance, variance, rtol=1e-8, atol=1e-8)
    held = [key for key, value in model.state_dict().items() if value.numel() > 30**2]
    assert not [key for key in held if "joint" in key]
    again = model_of(head, random={"g": RandomEffect(5)})[0]
    again.load_state_dict(model.state_dict())
    for one, other in zip(again.predict(new), found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def test_places_too_many_for_a_checkpoint_move_with_the_model():
    """What was computed for predictions goes where the model goes, as the parts of fewer places do."""
    whole, data, new = model_of("ml", random={"g": RandomEffect(5)})
    large = model_of("ml", random={"g": RandomEffect(5)})[0]
    large.joint = JointErrors(most_columns=5, most_numbers=60)
    for model in (whole, large):
        model.update(data)
        model.predict(new)
        model.joint.float()
    assert large.joint.parts().covariance.dtype == whole.joint.covariance.dtype == torch.float32
    found = [model.predict(new).variance for model in (whole, large)]
    assert found[0].dtype == found[1].dtype
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def vecchia_of(neighbours, levels=30):
    """A model of places by their nearest neighbours, and the same by all of them."""
    dense_model, data, new = model_of("ml", levels=levels)
    at = dense_model.random["plot"].places
    g = VecchiaMatrix(at, MaternCorrelation(1.5), neighbours).double()
    model = MixedModel(copy.deepcopy(dense_model.mean), {"plot": RandomEffect(levels, g)})
    return model, dense_model, data, new


def test_of_all_neighbours_a_place_is_that_of_the_kernel():
    model, expected, data, new = vecchia_of(30)
    model.update(data)
    expected.update(data)
    assert torch.equal(model.random["plot"].places, expected.random["plot"].places)
    for one, other in zip(model.predict(new), expected.predict(new), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-8)


def test_of_few_neighbours_a_place_is_near_that_of_the_kernel():
    model, expected, data, new = vecchia_of(8)
    model.update(data)
    expected.update(data)
    own, wanted = model.predict(new), expected.predict(new)
    torch.testing.assert_close(own.mean, wanted.mean, rtol=0, atol=0.05)
    torch.testing.assert_close(own.variance, wanted.variance, rtol=0.05, atol=0)
    # The regression on the nearest, as it is defined, times the joint covariance of the BLUPs.
    plot = model.random["plot"]
    levels, weights, left = plot.g.regressed(new["extra"])
    a = torch.zeros(7, 30).double().scatter(1, levels, weights)
    mean = model(new) + a @ plot.blup[:, 0]
    torch.testing.assert_close(own.mean, mean, rtol=1e-9, atol=1e-9)
    variance = left * plot.prior().reshape(()) + ((a @ model.joint.covariance) * a).sum(1)
    torch.testing.assert_close(
        own.variance, variance + model.residual().reshape(()), rtol=1e-9, atol=0
    )


@pytest.mark.parametrize("neighbours", [8, 30])
def test_places_too_many_for_a_joint_covariance_have_that_of_their_factor(neighbours):
    model, _, data, new = vecchia_of(neighbours)
    model.update(data)
    expected = model.predict(new)
    model.joint = JointErrors(most_columns=5)
    model.update(data)
    found = model.predict(new)
    assert model.joint.factored() is not None
    torch.testing.assert_close(found.variance, expected.variance, rtol=1e-8, atol=0)


def test_a_smooth_kernel_of_near_places_is_kriged_too():
    at = torch.linspace(0, 1, 40).double()[:, None]
    model = MixedModel(
        nn.Linear(1, 1).double(),
        {"t": RandomEffect(40, GaussianMatrix(distance(at, at)).double(), places=at)},
    )
    y = (3 * at[:, 0]).sin()
    data = {"x": at, "y": y, "groups": {"t": torch.arange(40)}, "extra": at}
    with torch.no_grad():
        model.residual.get_parameter("sigma^2").fill_(-4.0)
    model.update(data)
    new_at = torch.tensor([[0.013], [0.5], [0.987], [1.1]]).double()
    new = {
        "x": new_at,
        "extra": new_at,
        "places": {"t": new_at},
        "groups": {"t": torch.full((4,), -1)},
    }
    found = model.predict(new)
    with torch.no_grad():
        mean, variance = dense(model, data, new)
    torch.testing.assert_close(found.mean, mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.variance, variance, rtol=1e-6, atol=1e-8)


def test_a_checkpoint_of_a_table_kriges(tmp_path):
    result = lmm("y ~ x + (1 | matern(east, north))", table())
    module = MixedModule.of(result)
    pd.testing.assert_frame_equal(module.predict(elsewhere()), result.predict(elsewhere()))


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"plot": torch.rand(7, 3).double()}, r"`batch\['places'\]\['plot'\]` is .*\(7, 2\)"),
        ({"plot": torch.full((7, 2), torch.nan)}, r"`batch\['places'\]\['plot'\]` is nan in row 0"),
        ({"g": torch.rand(7, 2)}, r"`batch\['places'\]\['g'\]`.*expected none, as levels"),
    ],
)
def test_places_at_fault_are_named(places, message):
    model, data, new = model_of("ml", random={"g": RandomEffect(5)})
    model.update(data)
    with pytest.raises(InputError, match=message):
        model.predict({**new, "places": places})


def test_places_of_levels_need_a_kernel():
    at = torch.rand(4, 2).double()
    with pytest.raises(
        InputError, match="`places` has coordinates but `covariance` is ScalarMatrix"
    ):
        RandomEffect(4, places=at)
    with pytest.raises(
        InputError, match="`places` has coordinates but `covariance` is KnownMatrix"
    ):
        RandomEffect(4, KnownMatrix(torch.eye(4).double()), places=at)
    with pytest.raises(InputError, match=r"`places` is .*\(4, d\)"):
        RandomEffect(4, ExponentialMatrix(distance(at, at)), places=at[1:])


PEDIGREE = pd.DataFrame(
    {
        "animal": [f"a{i}" for i in range(12)],
        "sire": [None] * 4 + ["a0", "a0", "a1", "a1", "a4", "a4", "a6", "a6"],
        "dam": [None] * 4 + ["a2", "a3", "a2", "a3", "a6", "a7", "a5", "a8"],
    }
)


def test_animals_without_records_are_predicted_from_their_relatives():
    """The last four have none: their values and variances are those of Henderson's equations with
    all animals."""
    rng = np.random.default_rng(0)
    t = pd.DataFrame({"animal": [f"a{i % 8}" for i in range(40)], "x": rng.standard_normal(40)})
    t["y"] = t["x"] + rng.standard_normal(8)[np.arange(40) % 8] + 0.5 * rng.standard_normal(40)
    result = lmm("y ~ x + (1 | ped(animal))", t, pedigree=PEDIGREE)
    new = pd.DataFrame({"animal": PEDIGREE["animal"], "x": 0.0})
    found = result.predict(new)
    model, source = result.model, result.source
    with torch.no_grad():
        G = model.random["animal"].g()
        Z = source.covariance.operands["animal"].operands["z"]().double()
        V, X, y = source.covariance(), source.X, source.y
        c = G @ Z.mT
        Vi = torch.linalg.inv(V)
        M = torch.linalg.inv(X.mT @ Vi @ X)
        beta = M @ X.mT @ Vi @ y
        X0 = torch.tensor([[1.0, 0.0]] * 12).double()
        u = X0 - c @ Vi @ X
        mean = X0 @ beta + c @ Vi @ (y - X @ beta)
        variance = G.diagonal() - (c * (c @ Vi)).sum(1) + ((u @ M) * u).sum(1)
        variance = variance + model.residual().reshape(())
    np.testing.assert_allclose(found["mean"], mean, rtol=1e-8)
    np.testing.assert_allclose(found["variance"], variance, rtol=1e-8)
    assert (found["mean"][8:] != found["population_mean"][8:]).all()


def test_a_spline_is_predicted_between_and_beyond_its_data():
    """The same as the dense formula with the spline's columns at the new points."""
    rng = np.random.default_rng(1)
    t = pd.DataFrame({"x": np.sort(rng.uniform(0, 6, 60))})
    t["y"] = np.sin(t["x"]) + 0.2 * rng.standard_normal(60)
    result = lmm("y ~ x + (1 | spline(x))", t)
    new = pd.DataFrame({"x": [0.7, 3.3, 5.9, 6.5]})
    encoded = result.encoder.transform(new)
    Z = result.encoder.transform(t).random[0].values
    (design,) = encoded.random
    with torch.no_grad():
        V, X, y = result.source.covariance(), result.source.X, result.source.y
        g = result.model.random[design.name].prior()
        Vi = torch.linalg.inv(V)
        M = torch.linalg.inv(X.mT @ Vi @ X)
        beta = M @ X.mT @ Vi @ y
        c = design.values @ g @ Z.mT
        mean = encoded.X @ beta + c @ Vi @ (y - X @ beta)
    np.testing.assert_allclose(result.predict(new)["mean"], mean, rtol=1e-8)
