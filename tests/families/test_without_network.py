"""A family without a network in Lightning: glmm's fit, with what a Trainer does around it."""

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from openreml_nn import InputError, MixedModel, RandomEffect
from openreml_nn.families import Binomial, NegativeBinomial
from openreml_nn.lightning import MixedModule
from openreml_nn.model.generalised import fit_family

N, Q = 120, 8


def rows():
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(0, Q, (N,), generator=generator)
    x = torch.stack([torch.ones(N), torch.randn(N, generator=generator)], 1).double()
    eta = (
        x @ torch.tensor([0.3, 0.6]).double() + torch.randn(Q, generator=generator).double()[codes]
    )
    return {
        "x": x,
        "y": torch.bernoulli(eta.sigmoid(), generator=generator),
        "groups": {"g": codes},
    }


def model(family=None):
    return MixedModel(
        nn.Identity(), {"g": RandomEffect(Q)}, head="gls", family=family or Binomial()
    )


def trainer(tmp_path, epochs=30, **options):
    return Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, default_root_dir=tmp_path,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip


def halves():
    batch = rows()
    return [
        {"x": batch["x"][at], "y": batch["y"][at], "groups": {"g": batch["groups"]["g"][at]}}
        for at in (slice(0, 50), slice(50, N))
    ]


@pytest.mark.parametrize(
    ("family", "batches"),
    [(Binomial, "one"), (Binomial, "several"), (NegativeBinomial, "several")],
)
def test_a_trainer_around_it_writes_checkpoints_that_predict(family, batches, tmp_path):
    batch = rows()
    wanted = fit_family(model(family()), batch)
    loader = DataLoader(halves() if batches == "several" else [batch], batch_size=None)
    best = ModelCheckpoint(tmp_path, "best", monitor="val_negative_log_density", save_last=True)
    module, own = MixedModule(model(family())), trainer(tmp_path, callbacks=[best])
    own.fit(module, loader, loader)
    assert own.global_step == 1
    assert module.result.log_likelihood == pytest.approx(wanted.log_likelihood, rel=1e-9)
    assert module.result.optimizer == "BFGS"
    assert float(own.callback_metrics["train_loss"]) == pytest.approx(
        -wanted.log_likelihood / N, rel=1e-5
    )
    found = module.model.predict(batch)
    torch.testing.assert_close(found, wanted.model.predict(batch), rtol=1e-7, atol=1e-9)
    for path in (best.best_model_path, best.last_model_path):
        loaded = MixedModule.load_from_checkpoint(path, model=model(family()), weights_only=True)
        for one, other in zip(loaded.model.predict(batch), found, strict=True):
            assert torch.equal(one, other)
    (values,) = own.validate(module, loader, verbose=False)
    assert values["val_negative_log_density"] == pytest.approx(
        float(own.callback_metrics["val_negative_log_density"])
    )
    assert set(own.test(module, loader, verbose=False)[0]) == {
        key.replace("val", "test") for key in values
    }
    predicted = torch.cat([part.mean for part in own.predict(module, loader)])
    assert torch.equal(predicted, found.mean)
    again = trainer(tmp_path, callbacks=[ModelCheckpoint(tmp_path / "again")])
    again.fit(module, loader, ckpt_path=best.last_model_path, weights_only=True)
    torch.testing.assert_close(module.model.predict(batch).mean, found.mean, rtol=1e-4, atol=0)


@pytest.mark.filterwarnings("ignore:the fit did not converge")
@pytest.mark.parametrize("limit", [{"epochs": 2}, {"epochs": None, "max_steps": 2}])
def test_the_trainer_limits_the_steps_of_the_fit(limit, tmp_path):
    module = MixedModule(model())
    loader = DataLoader([rows()], batch_size=None)
    with pytest.warns(RuntimeWarning, match="did not converge in 2 iterations"):
        trainer(tmp_path, **limit).fit(module, loader)
    assert module.result.iterations == 2
    assert not module.result.converged
    with pytest.raises(InputError, match="gradient_clip_val"):
        trainer(tmp_path, gradient_clip_val=1.0).fit(MixedModule(model()), loader)


def test_a_covariance_that_is_held_has_checkpoints_too(tmp_path):
    """Nothing is stepped then but the coefficients and BLUPs."""
    for family in (None, Binomial()):
        own = MixedModel(nn.Identity(), {"g": RandomEffect(Q)}, head="gls", family=family)
        own.requires_grad_(False)
        batch, best = {**rows(), "y": rows()["y"].double()}, ModelCheckpoint(tmp_path, "held")
        loader = DataLoader([batch], batch_size=None)
        module = MixedModule(own)
        trainer(tmp_path, 20, callbacks=[best]).fit(module, loader)
        own.requires_grad_(False)
        loaded = MixedModule.load_from_checkpoint(
            best.best_model_path, model=own, weights_only=True
        )
        assert torch.equal(loaded.model.predict(batch).mean, module.model.predict(batch).mean)
        assert float(module.model.random["g"].blup.abs().max()) > 0.01
