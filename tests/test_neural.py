"""Training a neural mixed model in Lightning."""

import pytest
import torch
from lightning import Trainer
from torch import nn

from openreml_nn import MixedModel, RandomEffect
from openreml_nn.lightning import NeuralMixedModule


def data(n=600, levels=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, generator=generator)
    codes = torch.randint(0, levels, (n,), generator=generator)
    b = 1.5 * torch.randn(levels, generator=generator)
    y = x[:, 0].sin() + 2 * x[:, 1] + 3 + b[codes] + 0.5 * torch.randn(n, generator=generator)
    return {"x": x, "y": y, "groups": {"g": codes}}


def module(head="ml", training="alternating", mean=None, **options):
    torch.manual_seed(0)
    mean = mean or nn.Sequential(
        nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1 if head == "ml" else 4)
    )
    model = MixedModel(mean, {"g": RandomEffect(20)}, head=head)
    optimizer = {"_target_": "torch.optim.Adam", "lr": 0.02}
    return NeuralMixedModule(model, data(), optimizer, training, **options)


def train(found, epochs, **options):
    torch.manual_seed(0)
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(found)
    return trainer


def variances(found):
    return [estimate.value for estimate in found.variances()]


@pytest.mark.parametrize(
    ("training", "head"),
    [("alternating", "ml"), ("full", "ml"), ("parts", "ml"), ("full", "gls"), ("parts", "gls")],
)
def test_every_way_of_training_finds_mean_and_variances(training, head):
    found = module(head, training, rows=64)
    train(found, 30 if training == "alternating" else 250)
    sigma2_b, sigma2_e = variances(found)
    assert sigma2_b == pytest.approx(1.5**2, rel=0.6)
    assert sigma2_e == pytest.approx(0.25, rel=0.25)
    new = data(seed=1)
    known = {"x": new["x"], "groups": new["groups"]}
    prediction = found.model.predict(known)
    mean = new["x"][:, 0].sin() + 2 * new["x"][:, 1] + 3
    off = (prediction.population_mean - mean).mean()
    assert float((prediction.population_mean - mean - off).std()) < 0.35
    assert found.steps[-1].converged


def test_alternating_training_ends_at_the_likelihoods_maximum():
    """With a linear mean the maximum is known: generalised least squares."""
    found = module(mean=nn.Linear(2, 1), rows=600)
    train(found, 400)
    rows = found._rows_of_data
    loss, e, _ = found.model._data(found.model(rows), rows)
    X = torch.cat([rows["x"], torch.ones(600, 1)], 1).double()
    from openreml_nn import fit_reml

    best = fit_reml(loss.covariance, rows["y"].double(), X, method="ml", start="current")
    value = -float(loss(e, e.new_zeros(600, 0))) * 600
    assert best.log_likelihood - value < 0.5
    weights = torch.cat([found.model.mean.weight[0], found.model.mean.bias]).detach()
    gap = (weights.double() - best.fixed.estimate).abs() / best.fixed.std_error
    assert float(gap.max()) < 0.5


def test_parts_and_full_take_the_same_steps():
    one, other = module(training="full"), module(training="parts", rows=37)
    for found in (one, other):
        found.model.double()
        found._rows_of_data["x"] = found._rows_of_data["x"].double()
        train(found, 5)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_a_checkpoint_predicts_without_the_data(tmp_path):
    found = module()
    trainer = train(found, 3)
    trainer.save_checkpoint(tmp_path / "m.ckpt")
    state = torch.load(tmp_path / "m.ckpt", weights_only=True)["state_dict"]
    other = module()
    other.load_state_dict(state)
    new = {"x": torch.randn(5, 2), "groups": {"g": torch.tensor([0, 3, 19, -1, -1])}}
    for a, b in zip(found.model.predict(new), other.model.predict(new), strict=True):
        torch.testing.assert_close(a, b)
    variance = found.model.predict(new).variance
    assert float(variance[3:].min()) > float(variance[:3].max())
    (predicted,) = trainer.predict(found, torch.utils.data.DataLoader([new], batch_size=None))
    torch.testing.assert_close(predicted.mean, found.model.predict(new).mean)


def test_a_scheduler_steps_each_epoch():
    found = module()
    optimizer = torch.optim.SGD(found.model.network_parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    found.configure_optimizers = lambda: {"optimizer": optimizer, "lr_scheduler": scheduler}
    train(found, 3)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 8)


def test_options_that_do_not_fit():
    with pytest.raises(ValueError, match="`training` is 'magic'"):
        module(training="magic")
    with pytest.raises(ValueError, match="alternating training is for head 'ml'"):
        module("gls")
