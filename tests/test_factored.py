"""Predictive variances and added rows by a sparse factor, against those by the dense parts."""

import copy
import pickle

import pytest
import torch

from openreml_nn.model import take
from openreml_nn.result.joint import JointErrors
from openreml_nn.terms.design import IndexedDesign
from tests.test_joint import EFFECTS, henderson, made, rows

PLAIN = [name for name in EFFECTS if not name.startswith("kernel")]


def large(model):
    """The model, of which no parts of a joint covariance are held."""
    model.joint = JointErrors(most_columns=-1)
    return model


@pytest.mark.parametrize("head", ["ml", "gls"])
@pytest.mark.parametrize("effects", PLAIN)
def test_variances_are_those_of_the_whole_coefficient_matrix(effects, head):
    model = large(made(effects, head))
    data, new = rows(model), rows(model, 30, seed=2)
    new["groups"]["a" if "a" in new["groups"] else "b"][:5] = -1
    model.update(data)
    found = model.predict(new).variance
    assert not bool(model.joint.is_exact) and model.joint.factored() is not None
    torch.testing.assert_close(found, henderson(model, data, new), rtol=1e-9, atol=1e-12)


def test_rows_whose_levels_do_not_meet_in_the_factor_are_solved_for():
    model = large(made("crossed"))
    data = rows(model)
    # Two islands: a level of one never meets one of the other, as new rows ask for.
    data["groups"]["a"] = torch.where(data["groups"]["b"] < 2, data["groups"]["a"] % 4, 4)
    model.update(data)
    new = rows(model, 30, seed=2)
    torch.testing.assert_close(
        model.predict(new).variance, henderson(model, data, new), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("effects", ["crossed", "slopes"])
def test_added_rows_say_the_same_by_the_factor(effects):
    dense, sparse = made(effects), large(made(effects))
    data = rows(dense)
    first, rest = (take(data, at) for at in (slice(0, 50), slice(50, 80)))
    found = []
    for model in (dense, sparse):
        model.update(first)
        found.append(model.add(rest))
    for name in ("ml", "reml"):
        assert found[1].log_likelihood[name] == pytest.approx(found[0].log_likelihood[name], 1e-10)
    for name in ("values", "variances"):
        pairs = zip(getattr(found[0], name), getattr(found[1], name), strict=True)
        for one, other in pairs:
            torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found[1].coefficients, found[0].coefficients, rtol=1e-9, atol=0)
    torch.testing.assert_close(found[1].covariance, found[0].covariance, rtol=1e-9, atol=1e-12)
    dense.update(data)
    torch.testing.assert_close(sparse.predict(data).variance, dense.predict(data).variance)


def test_the_factor_comes_again_from_a_checkpoint_a_copy_and_a_pickle():
    model = large(made("slopes"))
    data = rows(model)
    model.update(data)
    loaded = large(made("slopes"))
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.add_(0.3)
    loaded.load_state_dict(model.state_dict())
    expected = model.predict(data).variance
    for other in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other.predict(data).variance, expected, rtol=1e-12, atol=0)


def test_a_factor_of_too_many_entries_is_not_made():
    model = made("crossed")
    model.joint = JointErrors(most_columns=-1, most_entries=10)
    data = rows(model)
    model.update(data)
    with pytest.warns(RuntimeWarning, match="as independent"):
        model.predict(data)


@pytest.mark.parametrize("head", ["ml", "gls"])
@pytest.mark.parametrize("effects", ["crossed", "slopes"])
def test_variances_by_the_factor_are_differentiable(effects, head):
    """By the values of the effects, and by features; of levels that do not meet, too."""
    models = made(effects, head), large(made(effects, head))
    data = rows(models[0])
    data["groups"]["a"] = torch.where(data["groups"]["b"] < 2, data["groups"]["a"] % 4, 4)
    new, found = rows(models[0], 20, seed=2), []
    for model in models:
        model.update(data)
        X = new["x"] @ torch.ones(2, len(model.beta)).double() if head == "gls" else new["x"][:, :0]
        leaves, designs = [X.requires_grad_()], []
        for name, effect in model.effects().items():
            z = torch.linspace(0.5, 2, 20 * effect.effects).double().reshape(20, -1)
            leaves.append(z.requires_grad_())
            designs.append(IndexedDesign(new["groups"][name], z, effect.levels))
        assert model.joint.has_variances()
        variance = model.joint.variance(designs, X)
        weights = torch.arange(1.0, 21).double()
        found.append([variance, *torch.autograd.grad((weights * variance).sum(), leaves)])
    assert not bool(models[1].joint.is_exact)
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-10)
