"""Programs that predict without the package, by torch.export and by ONNX."""

from functools import cache

import pytest
import torch
from torch import nn

from openreml_nn import InputError, MixedModel, RandomEffect
from openreml_nn.covariance import ExponentialMatrix, UnstructuredMatrix
from openreml_nn.families import Binomial, NegativeBinomial, Ordinal, Poisson, ZeroInflated
from openreml_nn.model import exported


def network(outputs=1):
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, outputs))


def crossed_slopes():
    basis = torch.tensor([[1.0, 0.3], [0.0, 2.0]])
    random = {"a": RandomEffect(7, effects=2, basis=basis), "b.c": RandomEffect(5)}
    return MixedModel(network(), random)


def features_and_coefficients():
    random = {
        "a": RandomEffect(7),
        "b.c": RandomEffect(5, UnstructuredMatrix(2), 2, features=nn.Linear(3, 2)),
    }
    return MixedModel(network(3), random, head="gls")


def single_precision():
    return MixedModel(network().float(), {"a": RandomEffect(7), "b.c": RandomEffect(5)})


def linear():
    return MixedModel(nn.Identity(), {"a": RandomEffect(7)}, head="gls")


def residual_network():
    return MixedModel(network(), {"a": RandomEffect(7)}, residual=nn.Linear(3, 1))


def kernel():
    places = torch.rand(7, 2)
    return MixedModel(
        network(), {"a": RandomEffect(7, ExponentialMatrix(torch.cdist(places, places)))}
    )


def binomial():
    return MixedModel(network(), {"a": RandomEffect(7), "b.c": RandomEffect(5)}, family=Binomial())


def grades():
    return MixedModel(network(), {"a": RandomEffect(7)}, family=Ordinal(2))


def counts():
    random = {"a": RandomEffect(7, effects=2)}
    return MixedModel(nn.Identity(), random, head="gls", family=NegativeBinomial())


MODELS = [
    crossed_slopes, features_and_coefficients, single_precision, linear, residual_network,
    kernel, binomial, grades, counts,
]  # fmt: skip


def batch_of(model, n, seed=0, unknown=True):
    """Rows of a model, with unknown levels, an offset and weights where it takes them."""
    g = torch.Generator().manual_seed(seed)
    dtype = next(model.mean.parameters(), torch.zeros(1)).dtype
    low = -1 if unknown else 0
    found = {
        "x": torch.randn(n, 3, generator=g, dtype=dtype),
        "y": torch.randint(0, 2, (n,), generator=g).to(dtype),
        "groups": {
            name: torch.randint(low, effect.levels, (n,), generator=g)
            for name, effect in model.effects().items()
        },
        "values": {
            name: torch.randn(n, effect.effects, generator=g)
            for name, effect in model.effects().items()
            if effect.effects > 1 and effect.features is None
        },
        "offset": torch.randn(n, generator=g, dtype=dtype),
    }
    if model.family is None:
        found["weights"] = torch.rand(n, generator=g, dtype=dtype) + 0.5
    return found


def inputs(batch):
    further = {
        key: batch[key] for key in ("values", "offset", "weights") if batch.get(key) is not None
    }
    return (batch["x"], batch["groups"]), further


def assert_predicts(program, model, n, seed):
    batch = batch_of(model, n, seed)
    args, further = inputs(batch)
    for found, own in zip(program(*args, **further), model.predict(batch), strict=True):
        torch.testing.assert_close(found, own, rtol=1e-10, atol=1e-12)


@cache
def trained(make):
    """A model after an update, and its program."""
    torch.manual_seed(1)
    model = make()
    model.update(batch_of(model, 60, 1, unknown=False))
    return model, exported(model, batch_of(model, 4))


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_the_program_predicts_as_the_model(make):
    model, program = trained(make)
    for n in (1, 2, 5, 33):
        assert_predicts(program.module(), model, n, n)


def test_before_an_update_every_level_has_its_prior():
    model = crossed_slopes()
    assert_predicts(exported(model, batch_of(model, 4)).module(), model, 9, 3)


def test_where_a_joint_covariance_would_be_too_large():
    model = crossed_slopes()
    model.joint.most_columns = 3
    model.update(batch_of(model, 60, 1))
    with pytest.warns(RuntimeWarning, match="a program holds.*independent"):
        exported(model, batch_of(model, 4))  # where predict() has them by a sparse factor
    model.joint.most_entries = 0
    model.update(batch_of(model, 60, 1))
    with pytest.warns(RuntimeWarning, match="independent"):
        program = exported(model, batch_of(model, 4)).module()
    with pytest.warns(RuntimeWarning, match="independent"):
        assert_predicts(program, model, 9, 3)


def test_levels_of_unequal_numbers_of_cells():
    model = MixedModel(network(), {"a": RandomEffect(7), "b": RandomEffect(5)})
    batch = batch_of(model, 60, 1, unknown=False)
    batch["groups"]["a"] = torch.arange(60).clamp(max=6)  # six levels of one row
    model.update(batch)
    assert_predicts(exported(model, batch_of(model, 4)).module(), model, 40, 2)


def test_a_program_is_saved_and_does_not_follow_the_model(tmp_path):
    model = crossed_slopes()
    model.update(batch_of(model, 60, 1))
    batch = batch_of(model, 4)
    program, before = exported(model, batch), model.predict(batch)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)
    model.update(batch_of(model, 60, 2))
    torch.export.save(program, tmp_path / "model.pt2")
    args, further = inputs(batch)
    found = torch.export.load(tmp_path / "model.pt2").module()(*args, **further)
    for one, other in zip(found, before, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    assert float((model.predict(batch).mean - before.mean).abs().max()) > 0.1


def test_refusals():
    model = kernel()
    with pytest.raises(InputError, match="`batch` has 1 rows: expected an example of two"):
        exported(model, batch_of(model, 1))
    with pytest.raises(TypeError, match="`model`"):
        exported(network(), batch_of(model, 3))
    with pytest.raises(InputError, match="no 'groups'"):
        exported(model, {"x": torch.zeros(3, 3)})
    with pytest.raises(InputError, match="call update"):
        exported(linear(), batch_of(model, 3))
    for key, given in (("zi", torch.zeros(3, 1)), ("places", {"a": torch.zeros(3, 2)})):
        with pytest.raises(InputError, match=f"`batch\\['{key}'\\]` is given"):
            exported(model, {**batch_of(model, 3), key: given})
    zeros = ZeroInflated(Poisson(), nn.Linear(1, 1))
    counted = MixedModel(network(), {"a": RandomEffect(7)}, family=zeros)
    with pytest.raises(InputError, match="`model` has a zero part"):
        exported(counted, batch_of(model, 3))
    several = MixedModel(network(2), {"a": RandomEffect(7, responses=2)})
    with pytest.raises(InputError, match="`model` has 2 responses: expected one"):
        exported(several, batch_of(model, 3))


@pytest.mark.parametrize(
    "make",
    [crossed_slopes, features_and_coefficients, single_precision, binomial],
    ids=lambda make: make.__name__,
)
def test_onnx_predicts_as_the_model(make, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, program = trained(make)
    torch.onnx.export(program, f=str(tmp_path / "model.onnx"), verbose=False)
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"))
    # The network's own numbers are in single precision there, and near 0.001 some of them.
    tolerance = (1e-5, 1e-6) if make is single_precision else (1e-9, 1e-12)
    for n in (1, 2, 17):
        batch = batch_of(model, n, n)
        leaves = torch.utils._pytree.tree_leaves(inputs(batch))
        names = [given.name for given in session.get_inputs()]
        found = session.run(None, {k: v.numpy() for k, v in zip(names, leaves, strict=True)})
        for one, own in zip(found, model.predict(batch), strict=True):
            torch.testing.assert_close(
                torch.as_tensor(one), own, rtol=tolerance[0], atol=tolerance[1]
            )
