"""Responses that are not Gaussian in Lightning and in the program equal those fitted by glmm."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from lightning import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from openreml_nn import InputError, MixedModel, RandomEffect, glmm, metrics
from openreml_nn.families import Binomial, NegativeBinomial, Poisson
from openreml_nn.lightning import (
    MixedModelDataModule,
    MixedModule,
    StopWhenConverged,
    UpdateBLUPs,
    WholeGroups,
)
from tests.forked import program

FORMULA = "y ~ x + (1 | g)"
QUIET = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False,
         "enable_progress_bar": False, "enable_model_summary": False}  # fmt: skip


def table(n=240, q=12):
    rng = np.random.default_rng(5)
    g, x = rng.integers(0, q, n), rng.normal(size=n)
    eta = 0.3 + 0.8 * x + rng.normal(size=q)[g]
    yes, counts = (
        rng.random(n) < 1 / (1 + np.exp(-eta)),
        rng.poisson(np.exp(eta / 2) * rng.gamma(1.5, 1 / 1.5, n)),
    )
    return pd.DataFrame(
        {"x": x, "g": [f"g{i}" for i in g], "yes": yes.astype(int), "count": counts,
         "word": np.where(yes, "yes", "no"), "no": 3 - yes, "grade": np.clip(counts, 0, 3)}
    )  # fmt: skip


TABLE = table()


def trained(model, data, epochs=100, **options):
    trainer = Trainer(max_epochs=epochs, **QUIET, **options)
    if isinstance(data, MixedModelDataModule):
        trainer.fit(model, data)
    else:
        trainer.fit(model, *data)
    return trainer


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.LazyLinear(4), nn.Tanh())


def tensors():
    codes = torch.tensor(TABLE["g"].astype("category").cat.codes.to_numpy(), dtype=torch.long)
    x = torch.tensor(TABLE[["x"]].to_numpy())
    return {"x": x, "y": torch.tensor(TABLE["yes"].to_numpy()).double(), "groups": {"g": codes}}


def model(family=None, **options):
    torch.manual_seed(0)
    mean = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    return MixedModel(mean, {"g": RandomEffect(12)}, family=family or Binomial(), **options)


CASES = {
    "probit by quadrature": ("yes ~ x + (1 | g)",
                             {"family": "binomial", "link": "probit", "quadrature": 5}),
    "categories by REML": ("word ~ x + (1 | g)", {"family": "binomial", "method": "reml"}),
    "trials": ("cbind(yes, no) ~ x + (1 | g)", {"family": "binomial"}),
    "counts": ("count ~ x + offset(x) + (1 | g)", {"family": "poisson"}),
    "overdispersed": ("count ~ x + (1 | g)", {"family": "negative_binomial"}),
    "grades": ("grade ~ x + (1 | g)", {"family": "ordinal"}),
    "a family object": ("count ~ x + (1 | g)", {"family": NegativeBinomial()}),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:the table. levels that the fit did not see")
@pytest.mark.parametrize("case", CASES)
def test_without_a_network_the_module_is_glmm(case, tmp_path):
    formula, options = CASES[case]
    expected = glmm(formula, TABLE, **options)
    found = MixedModule(formula, **options)
    data = MixedModelDataModule(TABLE, formula, family=options["family"])
    trainer = trained(found, data)
    result = found.result
    assert trainer.current_epoch == 1
    assert result.converged
    assert result.method == expected.method
    assert result.log_likelihood == pytest.approx(expected.log_likelihood, rel=1e-10)
    torch.testing.assert_close(result.fixed.estimate, expected.fixed.estimate)
    torch.testing.assert_close(result.fixed.std_error, expected.fixed.std_error)
    assert result.fixed.names == expected.fixed.names
    own = [{e.name: e.value for e in each.family_parameters} for each in (result, expected)]
    assert own[0] == pytest.approx(own[1], rel=1e-9)
    assert result.optimizer == expected.optimizer == "BFGS"
    # Predictions on the scale of the response: of the module, its result and its checkpoint.
    new = TABLE[["x", "g"]].head(5).assign(g=["g1", "g2", "new", "g3", "g4"])
    wanted = expected.predict(new)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    given = {} if isinstance(options["family"], str) else {"family": options["family"]}
    loaded = MixedModule.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True, **given)
    for each in (found, result, loaded, MixedModule.of(expected)):
        pd.testing.assert_frame_equal(each.predict(new), wanted)


@pytest.mark.parametrize("case", ["probit by quadrature", "overdispersed"])
def test_the_program_is_glmm(case, tmp_path):
    formula, options = CASES[case]
    TABLE.to_csv(tmp_path / "t.csv", index=False)
    keys = [f"model.{key}={value}" for key, value in options.items()]
    quick = ["logger=none", "plots=false", "trainer.enable_progress_bar=false", "hydra.run.dir=r"]
    done = program(*quick, f"model.formula={formula}", "data.path=t.csv", *keys, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    record = json.loads((tmp_path / "r" / "result.json").read_text())
    expected = glmm(formula, TABLE, **options)
    assert record["model"] == {
        "formula": formula, "method": "ml", "family": options["family"],
        "link": options.get("link", "log"), "quadrature": options.get("quadrature", 1),
    }  # fmt: skip
    assert record["fit"]["log_likelihood"] == pytest.approx(expected.log_likelihood, rel=1e-10)
    assert [f["estimate"] for f in record["fixed"]] == pytest.approx(
        expected.fixed.estimate.tolist(), rel=1e-6
    )
    own = {e.name: pytest.approx(e.value, rel=1e-6) for e in expected.family_parameters}
    assert record["family_parameters"] == own
    assert record["residual"]["variance"] is None


@pytest.mark.parametrize("training", [None, "parts", "groups", "composite"])
def test_a_network_is_trained_in_every_way(training, tmp_path):
    formula = "yes ~ x + (1 | g)"
    found = MixedModule(
        formula, {"_target_": "torch.optim.Adam", "lr": 0.05}, training,
        family="binomial", network=network(), rows=80,
    )  # fmt: skip
    data = MixedModelDataModule(TABLE, formula, family="binomial", validation=0.25)
    trainer = trained(found, data, 8)
    variance = float(found.result.components[0].covariance)
    assert variance == pytest.approx(float(found.model.random["g"].prior().detach()), rel=1e-8)
    values = trainer.callback_metrics
    assert float(values["val_log_loss"]) < 0.69  # that of one probability for all
    assert float(values["val_deviance"]) == pytest.approx(2 * float(values["val_log_loss"]))
    # At the end the covariance is at its optimum for the final mean.
    loss = found.model.loss(data.encoded.batch())
    assert -float(loss) * len(data.table) == pytest.approx(found.result.log_likelihood, rel=1e-9)
    slope = torch.autograd.grad(loss, list(found.model.covariance_parameters()))
    assert float(torch.cat(slope).abs().max()) < 1e-5
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = MixedModule.load_from_checkpoint(
        tmp_path / "model.ckpt", weights_only=True, network=network()
    )
    pd.testing.assert_frame_equal(loaded.predict(TABLE), found.result.predict(TABLE))


def test_learned_slopes_are_trained():
    """At the end no step of the covariance raises the likelihood of all rows."""
    torch.manual_seed(0)
    features = nn.Sequential(nn.Linear(1, 2), nn.Dropout(0.5)).double()
    effect = RandomEffect(12, effects=2, features=features)
    own = MixedModel(nn.Linear(1, 1).double(), {"g": effect}, family=Binomial())
    rows, before = tensors(), features[0].weight.detach().clone()
    loader = DataLoader([rows], batch_size=None)
    found = MixedModule(own, {"_target_": "torch.optim.SGD", "lr": 0.5}, training="full")
    trained(found, [loader], epochs=1)
    assert not torch.equal(features[0].weight, before)
    own.eval()
    loss = own.loss(rows)
    assert -float(loss.detach()) * len(TABLE) == pytest.approx(
        found.result.log_likelihood, abs=1e-8
    )
    slopes = torch.autograd.grad(loss, list(own.covariance_parameters()))
    assert max(float(slope.norm()) for slope in slopes) < 1e-5


def test_batches_of_whole_groups_take_steps_on_the_likelihood_of_all_rows():
    batch = tensors()
    whole = model().loss(batch)
    parts, n = 0.0, len(batch["y"])
    for some in batch["groups"]["g"].remainder(3).unique():
        rows = batch["groups"]["g"].remainder(3) == some
        part = {
            "x": batch["x"][rows],
            "y": batch["y"][rows],
            "groups": {"g": batch["groups"]["g"][rows]},
        }
        found = MixedModule(model(), training="groups")
        parts = parts + found.way.loss(found.model, part)[0] * int(rows.sum()) / n
    torch.testing.assert_close(parts, whole)


def test_metrics_of_a_validation_are_those_of_its_predictions():
    batch = tensors()
    rows = [{"x": batch["x"][i], "y": batch["y"][i], "groups": {"g": batch["groups"]["g"][i]}}
            for i in range(240)]  # fmt: skip
    sampler = WholeGroups({"g": batch["groups"]["g"]}, 60)
    train, val = DataLoader(rows, batch_sampler=sampler), DataLoader(rows, batch_size=50)
    found = MixedModule(model(), training="groups")
    trainer = trained(found, (train, val), 2)
    (values,) = trainer.validate(found, val, verbose=False)
    mean, y = found.model.predict(batch).mean, batch["y"]
    assert values == pytest.approx(
        {
            "val_mse": float(metrics.brier_score(mean, y)),
            "val_negative_log_density": float(metrics.log_loss(mean, y)),
            "val_log_loss": float(metrics.log_loss(mean, y)),
            "val_auc": float(metrics.auc(mean, y)),
            "val_brier": float(metrics.brier_score(mean, y)),
            "val_calibration_error": float(metrics.calibration_error(mean, y)),
            "val_deviance": float(metrics.mean_deviance(mean, y, Binomial())),
        },
        rel=1e-6,
    )
    assert set(trainer.test(found, val, verbose=False)[0]) == {
        k.replace("val", "test") for k in values
    }


def test_another_family_takes_the_place_of_the_residual():
    g = torch.Generator().manual_seed(0)
    batch = {"x": torch.randn(30, 2, generator=g), "groups": {"g": torch.arange(30) % 5}}
    batch["y"] = torch.randint(4, (30,), generator=g).float()
    models = [
        MixedModel(nn.Linear(2, 1), {"g": RandomEffect(5)}, family=family)
        for family in (Poisson(), NegativeBinomial())
    ]
    models[0].mean = models[1].mean
    models[0].loss(batch)
    with pytest.raises(AttributeError, match=r"assign `model\.residual`"):
        models[0].family = NegativeBinomial()
    models[0].residual = NegativeBinomial()
    torch.testing.assert_close(models[0].loss(batch), models[1].loss(batch))
    assert models[0].family is models[0].residual


def test_a_validation_before_the_fit_leaves_it_as_it_is():
    rows, found = DataLoader([tensors()], batch_size=None), []
    for before in (False, True):
        module, trainer = MixedModule(model()), Trainer(max_epochs=2, **QUIET)
        if before:
            trainer.validate(module, rows, verbose=False)
        trainer.fit(module, rows, rows)
        found.append({k: float(v) for k, v in trainer.callback_metrics.items()})
    assert found[0] == found[1]
    assert np.isfinite(found[0]["val_calibration_error"])


def test_predictive_density_of_counts_is_an_expectation_over_the_predictor():
    batch = tensors() | {"y": torch.tensor(TABLE["count"].to_numpy()).double()}
    found = model(NegativeBinomial())
    found.update(batch)
    counts = torch.arange(400).double()
    row = {"x": batch["x"][:1], "groups": {"g": batch["groups"]["g"][:1]}}
    many = {
        "x": row["x"].expand(400, 1),
        "y": counts,
        "groups": {"g": row["groups"]["g"].expand(400)},
    }
    density = found.log_density(many).exp()
    assert float(density.sum()) == pytest.approx(1, rel=1e-6)
    wanted = found.predict(row)
    assert float(density @ counts) == pytest.approx(float(wanted.mean), rel=1e-6)
    variance = float(density @ counts**2) - float(wanted.mean) ** 2
    assert variance == pytest.approx(float(wanted.variance), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"link": "probit"}, "`link` is 'probit' without a `family`"),
        ({"quadrature": 3}, "`quadrature` is 3 without a `family`"),
        ({"family": "binomial", "link": "log"}, "`link` is 'log': expected 'logit'"),
        ({"family": "binomial", "residual": "ar1(x | g)"}, "`residual` is 'ar1"),
        ({"family": "binomial", "quadrature": 3, "method": "reml"}, "`method` is 'reml'"),
        ({"family": "poisson"}, "the data module's `family` is 'binomial'"),
        ({"family": "binomial", "optimizer": torch.optim.Adam}, "`optimizer` and `scheduler`"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        trained(
            MixedModule("yes ~ x + (1 | g)", **options),
            MixedModelDataModule(TABLE, "yes ~ x + (1 | g)", family="binomial"),
        )


def test_ways_and_batches_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="alternating training does not train"):
        MixedModule(model(), training="alternating")
    with pytest.raises(InputError, match="`family` is for a formula"):
        MixedModule(model(), family="binomial")
    batch = tensors()
    halves = [{"x": batch["x"][i::2], "y": batch["y"][i::2], "groups": {"g": batch["groups"]["g"][i::2]}}
              for i in (0, 1)]  # fmt: skip
    loader = DataLoader(halves, batch_size=None)
    with pytest.raises(InputError, match="the loader yields several batches"):
        trained(MixedModule(model()), (loader,), 1)
    with pytest.raises(InputError, match="is in more than one mini-batch"):
        trained(MixedModule(model(), training="groups"), (loader,), 1)
    with pytest.raises(InputError, match=r"training batch 0: .* in row \d+: expected"):
        trained(
            MixedModule(model()), (DataLoader([{**batch, "y": batch["y"] + 2}], batch_size=None),)
        )
    loader = DataLoader([batch], batch_size=None)
    target = {"_target_": "openreml_nn.estimation.AIREML"}
    with pytest.raises(InputError, match="AIREML, which is for Gaussian"):
        trained(MixedModule(model(), target), (loader,), 1)
    with pytest.raises(InputError, match="has no effect on a fit with a family"):
        trained(
            MixedModule("yes ~ x + (1 | g)", family="binomial"),
            MixedModelDataModule(TABLE, "yes ~ x + (1 | g)", family="binomial"),
            callbacks=[StopWhenConverged(0.1)],
        )


def test_a_callback_keeps_modes_up_to_date_in_a_module_of_ones_own():
    class Mine(LightningModule):
        def __init__(self, own):
            super().__init__()
            self.mixed, self.own = model(), own

        def training_step(self, batch, batch_idx):
            return self.mixed.loss(batch)

        def configure_optimizers(self):
            parameters = self.mixed.network_parameters() if self.own else self.mixed.parameters()
            return torch.optim.Adam(parameters, 0.01)

    batch = tensors()
    loader = DataLoader([batch], batch_size=None)
    mine = Mine(False)
    trained(mine, (loader,), 2, callbacks=[UpdateBLUPs()])
    found = mine.mixed.random["g"].blup.clone()
    mine.mixed.update(batch)
    torch.testing.assert_close(found, mine.mixed.random["g"].blup)
    assert float(found.abs().max()) > 0.1
    with pytest.raises(InputError, match="no optimizer has the covariance's parameters"):
        trained(Mine(True), (loader,), 1, callbacks=[UpdateBLUPs()])
