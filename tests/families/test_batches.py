"""Batches of a model with a family: offsets, weights and missing responses of each."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from openreml_nn import InputError, MixedModel, RandomEffect
from openreml_nn.families import (
    Beta,
    Binomial,
    Gamma,
    Gaussian,
    NegativeBinomial,
    NegativeBinomial1,
    Ordinal,
    Poisson,
    StudentT,
    Tweedie,
)
from openreml_nn.lightning import MixedModule
from openreml_nn.model import take
from tests.test_neural import quiet

N = 48


class Shifted(nn.Module):
    """A linear mean, with what is known of it as the last column."""

    def __init__(self, inner, known):
        super().__init__()
        self.inner, self.known = inner, known

    def forward(self, x):
        return self.inner(x[:, :2])[:, 0] + (x[:, 2] if self.known else 0)


def linear():
    torch.manual_seed(0)
    return nn.Linear(2, 1).double()


def counts(eta):
    return (eta / 2).exp().round()


#: Each family with responses that it can have, from numbers around zero.
FAMILIES = {
    "gaussian": (Gaussian, lambda e: e),
    "student_t": (StudentT, lambda e: e),
    "binary": (Binomial, lambda e: (e > 0).double()),
    "probit": (lambda: Binomial(link="probit"), lambda e: (e > 0).double()),
    "binomial": (Binomial, lambda e: torch.stack([counts(e), counts(-e) + 1], 1)),
    "poisson": (Poisson, counts),
    "negative_binomial": (NegativeBinomial, counts),
    "negative_binomial_1": (NegativeBinomial1, counts),
    "gamma": (Gamma, lambda e: e.exp()),
    "tweedie": (Tweedie, lambda e: e.exp() * (e > -0.5)),
    "beta": (Beta, torch.sigmoid),
    "ordinal": (lambda: Ordinal(3), lambda e: (e > -0.5).double() + (e > 0.5).double()),
}


def made(name, known=False):
    make, respond = FAMILIES[name]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, 3, generator=generator, dtype=torch.float64)
    g = torch.arange(N) % 6
    noise = torch.randn(N, generator=generator, dtype=torch.float64)
    y = respond(x[:, 0] + x[:, 2] / 2 + (g - 2.5) / 3 + noise)
    model = MixedModel(Shifted(linear(), known), {"g": RandomEffect(6)}, family=make().double())
    return model, {"x": x, "y": y, "groups": {"g": g}}


@pytest.mark.parametrize("name", FAMILIES)
def test_an_offset_is_a_known_part_of_the_predictor(name):
    """Loss, gradients, modes, predictions and densities, as of a network that adds it."""
    found = []
    for known in (False, True):
        model, data = made(name, known)
        if not known:
            data = {**data, "offset": data["x"][:, 2]}
        loss = model.loss(data)
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        model.update(data)
        effect = model.random["g"]
        values = [effect.blup, effect.variance, *model.predict(data), model.log_density(data)]
        found.append([loss.detach(), *gradients, *values])
    assert len(found[0]) >= 10
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_of_one_say_nothing_wherever_a_batch_is_taken(name):
    model, data = made(name)
    model.update(data)
    weighted = {**data, "weights": torch.ones(N).double()}
    for call in (model.loss, model.predict, model.log_density):
        torch.testing.assert_close(call(weighted), call(data), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.filterwarnings("ignore:.*rows have no response")
def test_a_missing_response_is_a_row_that_is_not_there(name):
    model, data = made(name)
    left = torch.arange(5, N)
    y = data["y"].clone()
    y[:5] = torch.nan
    value = model.loss({**data, "y": y})
    torch.testing.assert_close(value, model.loss(take(data, left)), rtol=1e-9, atol=1e-10)
    model.update({**data, "y": y})
    density = model.log_density({**data, "y": y})
    assert bool(density[:5].isnan().all())
    assert bool(torch.isfinite(density[5:]).all())


@pytest.mark.parametrize("training", ["full", "groups", "composite"])
def test_training_takes_offsets_and_weights(training):
    found = []
    for known in (False, True):
        model, data = made("poisson", known)
        if not known:
            data = {**data, "offset": data["x"][:, 2], "weights": torch.ones(N).double()}
        order = data["groups"]["g"].argsort(stable=True)
        parts = [order] if training == "full" else list(order.split(N // 2))
        module = MixedModule(model, {"_target_": "torch.optim.SGD", "lr": 0.01}, training)
        quiet(2).fit(module, DataLoader([take(data, at) for at in parts], batch_size=None))
        found.append(model.predict(data))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


def test_an_offset_at_fault_is_named():
    model, data = made("poisson")
    offset = torch.zeros(N).double()
    offset[7] = torch.inf
    with pytest.raises(InputError, match=r"`batch\['offset'\]` is inf in row 7: expected finite"):
        model.loss({**data, "offset": offset})
    with pytest.raises(InputError, match=rf"`batch\['offset'\]` is .*\({N},\)"):
        model.loss({**data, "offset": offset[1:]})
