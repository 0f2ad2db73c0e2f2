"""A mean that random effects have taken up in the place of a network is said at the end of a fit."""

import warnings

import pytest
import torch
from lightning import LightningModule
from torch import nn
from torch.utils.data import DataLoader

from openreml_nn import MixedModel, RandomEffect
from openreml_nn.covariance import KnownMatrix
from openreml_nn.families import Poisson
from openreml_nn.lightning import MixedModule, UpdateBLUPs
from openreml_nn.model.level_means import warn_of_level_means
from tests.test_neural import quiet

Q = 40
MEAN = 5.0


def rows(q=Q, center=MEAN):
    generator = torch.Generator().manual_seed(0)
    g = torch.arange(10 * q) % q
    x = torch.randn(len(g), 2, generator=generator).double()
    b = torch.randn(q, generator=generator).double()
    error = torch.randn(len(g), generator=generator).double()
    return {"x": x, "y": center + x[:, 0] + (b - b.mean())[g] + error, "groups": {"g": g}}


def model(bias, q=Q, **options):
    """A network that yields a constant, as one does that has learned no more, or all there is to."""
    mean = nn.Linear(2, 1).double()
    nn.init.zeros_(mean.weight)
    nn.init.constant_(mean.bias, bias)
    return MixedModel(mean, {"g": RandomEffect(q)}, **options)


def trained(made, batch=None, training="full"):
    still = {"_target_": "torch.optim.SGD", "lr": 1e-9}
    module = MixedModule(made, still, training)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet(1).fit(module, DataLoader([batch or rows()], batch_size=None))
    return module, [str(w.message) for w in caught if w.category is RuntimeWarning]


def test_a_mean_that_the_network_has_not_learned_is_named_once():
    for training in ("full", "alternating"):
        module, said = trained(model(0), training=training)
        (message,) = said
        assert message.startswith(
            "random effect 'g', '(Intercept)': the BLUPs of the 40 levels have the mean"
        )
        assert "centre the response, start the network's last bias at its mean" in message
        variance = float(module.model.random["g"].prior().detach())
        assert variance == pytest.approx(MEAN**2 + 1, rel=0.1)  # the mean is in it


def test_a_mean_that_it_has_learned_is_not():
    for training in ("full", "alternating", "composite"):
        module, said = trained(model(MEAN), training=training)
        assert not said
        assert float(module.model.random["g"].prior().detach()) == pytest.approx(1, rel=0.3)


def test_few_levels_say_nothing():
    assert trained(model(0, q=12), rows(12))[1]
    assert not trained(model(0, q=9), rows(9))[1]


def test_modes_of_a_family_have_means_too():
    batch = rows(center=0)
    counts = {**batch, "y": torch.poisson(torch.exp(batch["y"].clamp(max=3) + 2))}
    assert trained(model(0, family=Poisson()), counts)[1]
    assert not trained(model(2, family=Poisson()), counts)[1]


def test_any_lightning_module_says_it():
    class Mine(LightningModule):
        def __init__(self, bias):
            super().__init__()
            self.mixed = model(bias)

        def training_step(self, batch, batch_idx):
            return self.mixed.loss(batch)

        def configure_optimizers(self):
            return torch.optim.SGD(self.mixed.network_parameters(), lr=1e-9)

    loader = DataLoader([rows()], batch_size=None)
    with pytest.warns(RuntimeWarning, match="standard errors from 0") as caught:
        quiet(2, callbacks=[UpdateBLUPs()]).fit(Mine(0), loader)
    assert len([w for w in caught if w.category is RuntimeWarning]) == 1
    quiet(2, callbacks=[UpdateBLUPs()]).fit(Mine(MEAN), loader)  # a warning is an error


def drawn(q, k, shift, seed, units=1.0, **options):
    """An effect whose BLUPs are draws of its prior, moved by a shift."""
    generator = torch.Generator().manual_seed(seed)
    effect = RandomEffect(q, effects=k, **options).double()
    root = torch.tensor([[1.0, 0.0], [0.5, 2.0]]).double()[:k, :k]
    effect.blup.copy_(units * (torch.randn(q, k, generator=generator).double() @ root.mT + shift))
    return effect


@pytest.mark.parametrize("units", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("q", [10, 100, 10_000])
def test_draws_of_the_prior_have_no_mean_and_moved_ones_have_in_any_units(q, units):
    for seed in range(20):
        warn_of_level_means({"g": drawn(q, 2, 0, seed, units)}, "ml")
    shift = torch.tensor([0.0, 20.0])
    with pytest.warns(
        RuntimeWarning, match="'g', '1'.*give the network the values of this effect, or"
    ) as caught:
        warn_of_level_means({"g": drawn(q, 2, shift, 0, units)}, "ml")
    assert len(caught) == 1
    with pytest.warns(RuntimeWarning, match="yield a constant among the features"):
        warn_of_level_means({"g": drawn(q, 1, 20, 0, units)}, "gls")


def test_a_mean_too_small_to_matter_is_none():
    warn_of_level_means({"g": drawn(100_000, 1, 0.1, 0)}, "ml")  # some 30 standard errors


def test_levels_that_hang_together_may_have_a_mean():
    q = 30
    near = torch.exp(-(torch.arange(q)[:, None] - torch.arange(q)).abs() / 50).double()
    warn_of_level_means({"g": drawn(q, 1, 20, 0, covariance=KnownMatrix(near))}, "ml")
