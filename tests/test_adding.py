"""Rows and levels that come after a fit: the same as all rows at the same parameters."""

import copy

import pytest
import torch
from torch import nn

from openreml_nn import InputError, MixedModel, RandomEffect
from openreml_nn.covariance import AR1Matrix, ExponentialMatrix, UnstructuredMatrix
from openreml_nn.families import Binomial, Poisson
from openreml_nn.lightning import MixedModule
from openreml_nn.model import take
from openreml_nn.result.joint import JointErrors
from tests.test_joint import Features, LogVariance
from tests.test_neural import quiet

FIRST, REST = torch.arange(70), torch.arange(70, 100)


def rows(n=100, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    a = torch.randint(0, 9, (n,), generator=generator)
    a[FIRST] = a[FIRST] % 7  # levels 7 and 8 of a come with the rest
    a[85], a[86] = 7, 8
    b = torch.randint(0, 5, (n,), generator=generator)
    x = normal(n, 2)
    y = x[:, 0] + normal(9)[a] + normal(5)[b] + normal(n) / 2
    return {
        "x": x,
        "y": y,
        "groups": {"a": a, "b": b, "c": a * 5 + b},
        "weights": 0.5 + torch.rand(n, generator=generator, dtype=torch.float64),
        "offset": x[:, 1] / 3,
    }


def kernel(levels):
    place = torch.arange(levels, dtype=torch.float64)
    return ExponentialMatrix((place[:, None] - place).abs() / 2).double()


def linear():
    torch.manual_seed(1)
    return nn.Linear(2, 1).double()


class Two(nn.Module):
    def forward(self, x):
        return torch.stack([torch.ones_like(x[:, 0]), x[:, 1].tanh()], 1)


def slopes(levels):
    return RandomEffect(levels, UnstructuredMatrix(2).double(), effects=2)


#: The model for so many levels of `a`, and the groups that it has; slopes are of `a` too.
MODELS = {
    "one": (lambda q: MixedModel(linear(), {"a": RandomEffect(q)}), ["a"]),
    "gls": (lambda q: MixedModel(Features(), {"a": RandomEffect(q)}, head="gls"), ["a"]),
    "aliased": (
        lambda q: MixedModel(Features(True), {"a": RandomEffect(q)}, head="gls"),
        ["a"],
    ),
    "crossed": (
        lambda q: MixedModel(
            Features(), {"a": RandomEffect(q), "b": RandomEffect(5)}, head="gls"
        ),
        ["a", "b"],
    ),
    "slopes": (
        lambda q: MixedModel(linear(), {"slopes": slopes(q), "b": RandomEffect(5)}),
        ["slopes", "b"],
    ),
    "nested": (
        lambda q: MixedModel(Features(), {"a": RandomEffect(q), "c": RandomEffect(45)}, head="gls"),
        ["a", "c"],
    ),
    "features": (
        lambda q: MixedModel(linear(), {"a": RandomEffect(q, effects=2, features=Two())}),
        ["a"],
    ),
    "residual network": (
        lambda q: MixedModel(linear(), {"a": RandomEffect(q)}, LogVariance()),
        ["a"],
    ),
    "kernel": (
        lambda q: MixedModel(linear(), {"a": RandomEffect(q), "b": RandomEffect(5, kernel(5))}),
        ["a", "b"],
    ),
}  # fmt: skip


def made(name, q):
    """The model, and its rows."""
    make, groups = MODELS[name]
    model, data = make(q), rows()
    data["groups"]["slopes"] = data["groups"]["a"]
    if "slopes" in groups:
        data["values"] = {"slopes": torch.stack([torch.ones(100).double(), data["x"][:, 1]], 1)}
    data["groups"] = {group: data["groups"][group] for group in groups}
    with torch.no_grad():
        for i, parameter in enumerate(model.covariance_parameters()):
            parameter.fill_(0.4 * (i % 3) - 0.3)
    return model, data


def known(model):
    effects = model.effects().values()
    return [t for e in effects for t in (e.blup, e.variance)] + [model.beta, model.beta_covariance]


def same(one, other, data):
    predicted = (*one.predict(data), *known(one)), (*other.predict(data), *known(other))
    for own, expected in zip(*predicted, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.filterwarnings("ignore:the fixed-effect model matrix is rank deficient")
@pytest.mark.parametrize("name", MODELS)
def test_added_rows_and_levels_are_as_if_they_had_always_been_there(name):
    model, data = made(name, 7)
    expected, _ = made(name, 9)
    expected.update(data)
    before = {key: p.clone() for key, p in model.named_parameters()}
    model.update(take(data, FIRST))
    found = model.add(take(data, REST))
    same(model, expected, data)
    likelihood = found.log_likelihood[model.method]
    value = -float(expected.loss(data).detach()) * 100
    assert likelihood == pytest.approx(value, rel=1e-10)
    for key, p in model.named_parameters():
        assert torch.equal(p, before[key])


@pytest.mark.parametrize("name", ["crossed", "slopes"])
def test_rows_are_added_after_a_checkpoint_and_in_parts(name):
    model, data = made(name, 7)
    expected, _ = made(name, 9)
    expected.update(data)
    model.update(take(data, FIRST))
    other, _ = made(name, 7)
    other.load_state_dict(model.state_dict())
    other.add(take(data, torch.arange(70, 87)))
    again, _ = made(name, 7)  # two levels fewer than the checkpoint has
    again.load_state_dict(copy.deepcopy(other).state_dict())
    again.add(take(data, torch.arange(87, 100)))
    same(again, expected, data)
    assert again.effects()[MODELS[name][1][0]].levels == 9
    again.loss(data).backward()  # and it can be trained on


def test_rows_that_are_added_in_inference_mode_leave_the_model_as_it_was():
    found, data = made("crossed", 9)
    with torch.inference_mode():
        found.update(take(data, FIRST))
        found.add(take(data, REST))
    expected = found.predict(data).variance
    found.loss(data).backward()
    found.update(data)
    torch.testing.assert_close(found.predict(data).variance, expected)
    assert not any(b.is_inference() for b in found.buffers())


@pytest.mark.parametrize("name", ["one", "crossed"])
def test_rows_of_no_known_level_tell_of_the_others(name):
    """Before and after: each is of a level of its own, which is not kept."""
    model, data = made(name, 9)
    data["groups"]["a"][torch.tensor([3, 8, 75, 80])] = -1
    expected = copy.deepcopy(model)
    expected.update(data)
    model.update(take(data, FIRST))
    model.add(take(data, torch.arange(70, 82)))
    model.add(take(data, torch.arange(82, 100)))
    same(model, expected, data)


@pytest.mark.filterwarnings("ignore:.*rows have no response")
def test_rows_without_a_response_add_nothing():
    model, data = made("crossed", 7)
    model.update(take(data, FIRST))
    before = [t.clone() for t in known(model)]
    data["groups"]["a"][70] = 3
    rest = take(data, REST)
    y = rest["y"].clone()
    y[1:] = torch.nan
    model.add({**rest, "y": y})
    expected = made("crossed", 7)[0]
    expected.update(take(data, torch.arange(71)))
    same(model, expected, take(data, FIRST))
    assert not torch.allclose(before[0], known(model)[0])


def test_new_levels_have_names_where_levels_have():
    data = rows()
    names = [f"user {i}" for i in range(7)]
    model = MixedModel(linear(), {"a": RandomEffect(names)})
    model.update(take(data, FIRST))
    with pytest.raises(InputError, match="`levels` has 0 names for 'a': expected 2, of its new"):
        model.add(take(data, REST))
    with pytest.raises(InputError, match="`levels` has 'user 3' for 'a', which is known"):
        model.add(take(data, REST), {"a": ["user 3", "anna"]})
    with pytest.raises(InputError, match=r"`levels` has 'b': expected names of \['a'\]"):
        model.add(take(data, REST), {"b": ["anna"]})
    model.add(take(data, REST), {"a": ["anna", "bert"]})
    assert model.blups()["level"].tolist() == [*names, "anna", "bert"]


def test_a_model_that_was_trained_from_a_loader_takes_up_rows():
    torch.manual_seed(0)
    data = rows()
    data["groups"] = {"a": data["groups"]["a"]}
    first = take(data, FIRST)
    module = MixedModule(MixedModel(linear(), {"a": RandomEffect(7)}))
    quiet(2).fit(module, torch.utils.data.DataLoader([first], batch_size=None))
    expected = MixedModel(linear(), {"a": RandomEffect(9)})
    kept = module.model.state_dict()
    for key in ("mean.weight", "mean.bias", "random.a.g.sigma^2", "residual.sigma^2"):
        expected.state_dict()[key].copy_(kept[key])
    expected.update(data)
    module.model.add(take(data, REST))
    same(module.model, expected, data)
    module.result.model.add(take(data, REST))
    same(module.result.model, expected, data)


def broken(name="crossed", change=None, update=True):
    model, data = made(name, 7)
    if update:
        model.update(take(data, FIRST))
    rest = take(data, REST)
    if change is not None:
        change(rest)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    return model, rest, before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["groups"]["a"].add_(50), "group 'a' has the code 5.: expected .*gap, from 7"),
        (lambda r: r["groups"].update(a=r["groups"]["a"] - 3), "group 'a' has the code -3"),
        (lambda r: r["groups"].pop("b"), "the batch has no group 'b'"),
        (lambda r: r["x"].fill_(torch.nan), "holds NaN or infinity|not finite|is nan"),
        (lambda r: r["y"].fill_(torch.inf), r"`batch\['y'\]` is inf in row 0"),
        (lambda r: r.update(y=r["y"][1:]), "29"),
        (lambda r: r.update(weights=-r["weights"]), "weights.*expected above 0"),
    ],
)
def test_rows_at_fault_change_nothing(change, message):
    model, rest, before = broken(change=change)
    with pytest.raises(InputError, match=message):
        model.add(rest)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0, equal_nan=True, msg=key)
    assert model.effects()["a"].levels == 7


def test_models_whose_rows_do_not_add_up():
    model, rest, _ = broken(update=False)
    with pytest.raises(InputError, match="no rows to which others could be added"):
        model.add(rest)
    data = rows()
    ar1 = MixedModel(linear(), {"b": RandomEffect(5)}, AR1Matrix(100).double())
    with pytest.raises(InputError, match="`residual` is correlated between rows"):
        ar1.add(data)
    counts = MixedModel(linear(), {"b": RandomEffect(5)}, family=Poisson())
    counts.update(data := of_family("poisson", rows()))
    counts.load_state_dict(counts.state_dict())
    with pytest.raises(InputError, match="a checkpoint does not hold those of a family"):
        counts.add(data)
    data = rows()
    model, rest, _ = broken("kernel")
    rest["groups"]["b"][0] = -1
    with pytest.raises(InputError, match="group 'b' has new levels, but its levels are correlated"):
        model.add(rest)
    model, data = made("crossed", 7)
    model.joint = JointErrors(most_columns=4, most_entries=10)
    model.update(take(data, FIRST))
    with pytest.raises(InputError, match="more than 4 effects and coefficients"):
        model.add(take(data, REST))


def test_features_of_which_the_rows_say_nothing():
    class Dummy(nn.Module):
        def forward(self, x):
            return torch.stack([torch.ones_like(x[:, 0]), x[:, 0]], 1)

    data = rows()
    data["x"][FIRST, 0] = 2.0
    model = MixedModel(Dummy(), {"b": RandomEffect(5)}, head="gls")
    with pytest.warns(RuntimeWarning, match="rank deficient"):
        model.update(take(data, FIRST))
    with pytest.raises(InputError, match="row 0 has a combination of features"):
        model.add(take(data, REST))


def of_family(name, data):
    """The rows with responses that a family can have."""
    y = data["y"]
    data["y"] = {"poisson": y.abs().round(), "binomial": (y > 0).double()}[name]
    return data


FAMILIES = {
    "poisson": lambda q: MixedModel(
        linear(), {"a": RandomEffect(q), "b": RandomEffect(5)}, family=Poisson().double()
    ),
    "binomial": lambda q: MixedModel(
        Two(), {"slopes": slopes(q)}, head="gls", family=Binomial().double(), quadrature=3
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_of_a_family_are_added_as_if_they_had_been_there(name):
    data = of_family(name, rows())
    small, large = FAMILIES[name](7), FAMILIES[name](9)
    groups = {key: data["groups"]["a" if key == "slopes" else key] for key in small.effects()}
    data = {**data, "groups": groups}
    data["groups"][next(iter(groups))][3] = -1
    if name == "binomial":
        data["values"] = {"slopes": torch.stack([torch.ones(100).double(), data["x"][:, 0]], 1)}
    small.update(take(data, FIRST))
    before = small.seen
    found = small.add(take(data, REST))
    large.update(data)
    for effect, other in zip(small.effects().values(), large.effects().values(), strict=True):
        torch.testing.assert_close(effect.blup, other.blup, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(effect.variance, other.variance, rtol=1e-7, atol=1e-9)
    for one, other in zip(small.predict(data), large.predict(data), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)
    value = -float(large.loss(data).detach()) * 100
    assert found.log_likelihood["ml"] == pytest.approx(value, rel=1e-9)
    assert len(before.y) == 70
    assert len(small.seen.y) == 100


def test_rows_of_a_family_at_fault_change_nothing():
    data = of_family("poisson", rows())
    model = FAMILIES["poisson"](7)
    data["groups"].pop("c")
    model.update(take(data, FIRST))
    state, seen = copy.deepcopy(model.state_dict()), model.seen
    rest = take(data, REST)
    rest["y"][2] = -1
    with pytest.raises(InputError, match="`y` is -1 in row 2: expected"):
        model.add(rest)
    rest["y"] = torch.stack([data["y"][REST], data["y"][REST]], 1)
    with pytest.raises(InputError, match=r"`y` has shape .*: expected"):
        model.add(rest)
    assert model.seen is seen
    assert model.effects()["a"].levels == 7
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=0, atol=0, equal_nan=True)


def test_a_variance_of_zero_is_an_ordinary_point():
    model, data = made("crossed", 9)
    with torch.no_grad():
        model.random["b"].g.get_parameter("sigma^2").fill_(-torch.inf)
    expected = copy.deepcopy(model)
    expected.update(data)
    model.update(take(data, FIRST))
    model.add(take(data, REST))
    same(model, expected, data)
    assert float(model.random["b"].blup.abs().max()) == 0.0


def test_a_level_that_was_not_seen_has_the_variance_of_its_features():
    """With learned features z(x) of random slopes its prior is N(0, z' G z)."""
    model, data = made("features", 9)
    model.update(data)
    new = {"x": data["x"][:4], "groups": {"a": torch.full((4,), -1)}}
    found = model.predict(new)
    z, G = Two()(new["x"]), model.random["a"].prior()
    variance = ((z @ G) * z).sum(1) + model.residual().reshape(())
    torch.testing.assert_close(found.variance, variance, rtol=1e-10, atol=0)
    torch.testing.assert_close(found.mean, model(new), rtol=1e-10, atol=0)
