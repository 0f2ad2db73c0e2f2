"""Variances of predictions against Henderson's mixed-model equations."""

import pytest
import torch
from torch import nn

from openreml_nn import MixedModel, RandomEffect
from openreml_nn.covariance import ExponentialMatrix, UnstructuredMatrix
from openreml_nn.result.joint import JointErrors


class Features(nn.Module):
    """A constant, the columns of x and, if asked for, their sum: a column too many."""

    def __init__(self, aliased=False):
        super().__init__()
        self.aliased = aliased

    def forward(self, x):
        more = [x.sum(1, keepdim=True)] if self.aliased else []
        return torch.cat([torch.ones_like(x[:, :1]), x, *more], 1)


class LogVariance(nn.Module):
    def forward(self, x):
        return 0.5 * x[:, 0] - 0.3


def kernel(levels):
    place = torch.arange(levels, dtype=torch.float64)
    return ExponentialMatrix((place[:, None] - place).abs() / 2).double()


EFFECTS = {
    "one": lambda: {"a": RandomEffect(9)},
    "crossed": lambda: {"a": RandomEffect(9), "b": RandomEffect(5)},
    "confounded": lambda: {"a": RandomEffect(9), "c": RandomEffect(9)},
    "slopes": lambda: {
        "b": RandomEffect(5),
        "a": RandomEffect(9, UnstructuredMatrix(2).double(), effects=2),
    },
    "kernel": lambda: {"a": RandomEffect(9, kernel(9)), "b": RandomEffect(5)},
    "kernel alone": lambda: {"a": RandomEffect(9, kernel(9))},
    "features": lambda: {
        "a": RandomEffect(9, effects=2, features=nn.Linear(2, 2).double()),
        "b": RandomEffect(5),
    },
    "members": lambda: {"m": RandomEffect(9), "b": RandomEffect(5)},
    "members' own effects": lambda: {
        "m": RandomEffect(9, UnstructuredMatrix(2).double(), effects=2),
        "b": RandomEffect(5),
    },
    "kernel of members": lambda: {"m": RandomEffect(9, kernel(9)), "b": RandomEffect(5)},
}


def made(effects="crossed", head="gls", residual=None, aliased=False):
    torch.manual_seed(0)
    mean = Features(aliased) if head == "gls" else nn.Linear(2, 1).double()
    model = MixedModel(mean, EFFECTS[effects](), residual, head)
    with torch.no_grad():
        for i, parameter in enumerate(model.covariance_parameters()):
            parameter.fill_(0.4 * (i % 3) - 0.3)
    return model


def rows(model, n=80, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    a = torch.randint(0, 9, (n,), generator=generator)
    b = torch.randint(0, 5, (n,), generator=generator)
    names = model.effects()
    members = torch.stack([a, torch.randint(0, 9, (n,), generator=generator)], 1)
    groups = {name: {"a": a, "b": b, "c": a.clone(), "m": members}[name] for name in names}
    values = {
        name: torch.stack([torch.ones_like(x[:, 0]), x[:, 1]], 1)
        for name, effect in names.items()
        if effect.effects == 2 and effect.features is None
    }
    if "m" in values:
        values["m"] = torch.diag_embed(values["m"])  # the second level has the slope
    y = torch.randn(n, generator=generator, dtype=torch.float64)
    return {"x": x, "y": y, "groups": groups, "values": values}


@torch.no_grad()
def henderson(model, data, new):
    """Variances of new observations from the inverse of the whole coefficient matrix."""

    def parts(batch):
        n, designs = len(batch["x"]), []
        for name, effect in model.effects().items():
            codes = batch["groups"][name]
            z = torch.ones(*codes.shape, 1, dtype=torch.float64)
            if name in batch["values"]:
                z = batch["values"][name]
            if effect.features is not None:
                z = effect.features(batch["x"])
            one_hot = nn.functional.one_hot(codes.clamp(min=0), effect.levels)
            one_hot = one_hot * (codes >= 0)[..., None]
            if one_hot.dim() == 2:
                one_hot, z = one_hot[:, None], z[:, None]
            designs.append((one_hot[..., None] * z[:, :, None]).sum(1).flatten(1))
        X = model(batch) if model.head == "gls" else torch.zeros(n, 0, dtype=torch.float64)
        if isinstance(model.residual, LogVariance):
            variance = model.residual(batch["x"]).exp()
        else:
            variance = model.residual().reshape(1).expand(n)
        return torch.cat(designs, 1), X, variance

    Z, X, variance = parts(data)
    kept = [j for j in range(X.shape[1]) if j < 3]  # the fourth is the sum of two
    G = torch.block_diag(*(effect.g() for effect in model.effects().values()))
    W = torch.cat([Z, X[:, kept]], 1)
    A = W.mT @ (W / variance[:, None])
    q = len(G)
    A[:q, :q] += torch.linalg.inv(G)
    Z, X, own = parts(new)
    w = torch.cat([Z, X[:, kept]], 1)
    found = torch.einsum("ni,ij,nj->n", w, torch.linalg.inv(A), w) + own
    for name, effect in model.effects().items():
        if name == "m":
            continue  # whose levels are known
        z = new["values"].get(name, torch.ones(len(w), 1, dtype=torch.float64))
        if effect.features is not None:
            z = effect.features(new["x"])
        prior = torch.einsum("nk,kl,nl->n", z, effect.prior(), z)
        found = found + torch.where(new["groups"][name] < 0, prior, 0)
    return found


@pytest.mark.parametrize("head", ["ml", "gls"])
@pytest.mark.parametrize("effects", EFFECTS)
def test_predictive_variances_count_every_covariance(effects, head):
    model = made(effects, head)
    data = rows(model)
    model.update(data)
    new = rows(model, seed=2)  # pairs of levels among them that have no row in the data
    found = model.predict(new).variance
    torch.testing.assert_close(found, henderson(model, data, new), rtol=1e-9, atol=0)


@pytest.mark.parametrize("head", ["ml", "gls"])
def test_levels_that_are_not_known_add_their_prior(head):
    model = made("slopes", head)
    data = rows(model)
    model.update(data)
    new = rows(model, seed=2)
    new["groups"]["a"][:30] = -1
    new["groups"]["b"][20:40] = -1
    torch.testing.assert_close(model.predict(new).variance, henderson(model, data, new))


def test_a_residual_network_weighs_the_rows():
    model = made(residual=LogVariance())
    data = rows(model)
    model.update(data)
    new = rows(model, seed=2)
    torch.testing.assert_close(model.predict(new).variance, henderson(model, data, new))


def test_a_feature_too_many_changes_nothing():
    model = made(aliased=True)
    data, new = rows(model), rows(model, seed=2)
    with pytest.warns(RuntimeWarning, match="rank deficient"):
        model.update(data)
    torch.testing.assert_close(model.predict(new).variance, henderson(model, data, new))


def test_units_of_features_and_of_y_do_not_matter():
    model, data = made(), rows(made())
    model.update(data)
    expected = model.predict(data).variance
    other = made()
    other.mean = nn.Sequential(other.mean, Scaled())
    other.update(data)
    torch.testing.assert_close(other.predict(data).variance, expected, rtol=1e-9, atol=0)


class Scaled(nn.Module):
    def forward(self, features):
        return features * torch.tensor([1e-6, 1.0, 1e6], dtype=torch.float64)


def test_many_levels_are_taken_sparsely_and_rows_in_parts():
    model = made("slopes")
    data = rows(model)
    model.update(data)
    expected = model.predict(data).variance
    model.joint = JointErrors(most_numbers=50)
    model.update(data)
    torch.testing.assert_close(model.predict(data).variance, expected, rtol=1e-10, atol=0)


def test_too_many_effects_for_a_joint_covariance_are_said_to_be_taken_as_independent():
    model = made("crossed", "ml")
    model.joint = JointErrors(most_columns=7)
    data = rows(model)
    model.update(data)  # 5 columns beside the first factor's
    torch.testing.assert_close(model.predict(data).variance, henderson(model, data, data))
    model = made("crossed", "gls")
    model.joint = JointErrors(most_columns=7, most_entries=10)
    model.update(data)  # 5 and 3 coefficients
    with pytest.warns(RuntimeWarning, match="as independent: there are too many"):
        found = model.predict(data).variance
    parts = [e.variance[data["groups"][name], 0, 0] for name, e in model.effects().items()]
    X = model(data)
    own = torch.einsum("np,pq,nq->n", X, model.beta_covariance, X)
    torch.testing.assert_close(found, sum(parts) + own + model.residual().reshape(()))


def test_joint_covariances_travel_with_the_state():
    model = made("slopes")
    data = rows(model)
    model.update(data)
    loaded = made("slopes")
    loaded.load_state_dict(model.state_dict())
    torch.testing.assert_close(loaded.predict(data).variance, model.predict(data).variance)


def test_before_there_were_data_the_variance_is_the_priors():
    model = made("slopes", "ml")
    known = rows(model)
    unknown = {**known, "groups": {name: torch.full((80,), -1) for name in known["groups"]}}
    found = model.predict(known)
    torch.testing.assert_close(found.variance, model.predict(unknown).variance)
    torch.testing.assert_close(found.mean, found.population_mean)


def test_float32_models_stay_so():
    model = made("crossed", "gls").float()
    data = {k: v.float() if k in ("x", "y") else v for k, v in rows(model).items()}
    model.update(data)
    found = model.predict(data).variance
    assert found.dtype == torch.float32
    model = made("crossed", "gls")
    data = rows(model)
    torch.testing.assert_close(found.double(), henderson(model, data, data), rtol=1e-4, atol=1e-5)
