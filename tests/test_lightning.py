"""The model in Lightning: training, checkpoints, prediction."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
from lightning.pytorch.loggers import CSVLogger
from omegaconf import OmegaConf
from torch.utils.data import DataLoader

from openreml_nn import InputError, MixedModel, RandomEffect, datasets, lmm
from openreml_nn.lightning import (
    MixedModelDataModule,
    MixedModule,
    StopWhenConverged,
    TraceVariances,
    UpdateBLUPs,
    WholeCSVLogger,
    WholeTensorBoardLogger,
)
from tests.test_neural import quiet

pytestmark = pytest.mark.filterwarnings("ignore:.*levels that the fit did not see")

FORMULA = "Reaction ~ Days + (Days | Subject)"
ADAM = {"_target_": "torch.optim.Adam", "lr": 0.1}
LBFGS = {
    "_target_": "torch.optim.LBFGS",
    "line_search_fn": "strong_wolfe",
    "tolerance_grad": 1e-12,
    "tolerance_change": 1e-14,
}


def trainer(tmp_path, epochs=1000, **options):
    return Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=options.pop("logger", False),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[StopWhenConverged(**options)],
    )


def fitted(tmp_path, optimizer=None, table=None, formula=FORMULA, **options):
    data = MixedModelDataModule(datasets.sleepstudy() if table is None else table, formula)
    model = MixedModule(formula, optimizer=optimizer)
    run = trainer(tmp_path, **options)
    run.fit(model, data)
    return model, data, run


@pytest.mark.parametrize("optimizer", [None, ADAM, LBFGS], ids=["aireml", "adam", "lbfgs"])
def test_every_optimizer_reaches_the_fit(tmp_path, optimizer):
    expected = lmm(FORMULA, datasets.sleepstudy())
    model, _, run = fitted(tmp_path, optimizer)
    assert model.result.converged
    assert run.current_epoch < 1000
    assert model.result.log_likelihood == pytest.approx(expected.log_likelihood, rel=1e-9)
    torch.testing.assert_close(
        model.result.fixed.estimate, expected.fixed.estimate, rtol=1e-6, atol=0
    )
    for one, other in zip(model.result.components, expected.components, strict=True):
        torch.testing.assert_close(one.covariance, other.covariance, rtol=1e-3, atol=1e-3)


def test_a_factory_of_optimizers(tmp_path):
    model, _, _ = fitted(tmp_path, lambda p: torch.optim.RMSprop(p, lr=0.02), epochs=5)
    assert len(model.history) == 5
    assert not model.result.converged


def test_the_loss_is_the_restricted_likelihood(tmp_path):
    model, data, _ = fitted(tmp_path)
    loss = model.model.loss(data.encoded.batch())
    assert -180 * loss.item() == pytest.approx(model.result.log_likelihood, rel=1e-12)


def test_metrics_are_logged(tmp_path):
    fitted(tmp_path, logger=CSVLogger(tmp_path, name="logs", version="csv"))
    logged = pd.read_csv(tmp_path / "logs" / "csv" / "metrics.csv")
    assert {"train_loss", "log_likelihood", "residual/sigma^2"} <= set(logged.columns)
    assert logged["log_likelihood"].max() == pytest.approx(-871.81414, rel=1e-6)


class Unprintable:
    def __str__(self):
        raise OSError(28, "No space left on device")


def test_metrics_are_written_whole(tmp_path):
    """Whenever it is looked at a table reads, also when columns come late or a write fails."""
    logger = WholeCSVLogger(tmp_path, name="logs", version="csv")
    path = tmp_path / "logs" / "csv" / "metrics.csv"
    counts = []
    for step in range(100):
        late = {"late": 1.0} if step > 50 else {}
        logger.log_metrics({"loss": 1.0 / (step + 1), **late}, step)
        logger.save()
        found = pd.read_csv(path)
        assert found["step"].tolist() == list(range(len(found)))
        counts.append(len(found))
    assert counts[:5] == [1, 2, 3, 4, 5]
    assert all(10 * count > 9 * step for step, count in enumerate(counts))
    assert len(set(counts)) < 50
    logger.log_metrics({"loss": Unprintable()}, 100)
    before = path.read_bytes()
    with pytest.raises(OSError, match="No space left"):
        logger.finalize("failed")
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["metrics.csv"]
    logger = WholeCSVLogger(tmp_path, name="logs", version="new")
    for step in range(57):
        logger.log_metrics({"loss": 1.0}, step)
        logger.save()
    logger.finalize("success")
    assert len(pd.read_csv(path.parents[1] / "new" / "metrics.csv")) == 57


def test_options_are_logged_whole(tmp_path):
    loggers = [
        WholeCSVLogger(tmp_path, name="logs", version="csv"),
        WholeTensorBoardLogger(tmp_path, name="logs", version="tensorboard"),
    ]
    fitted(tmp_path, logger=loggers)
    for logger in loggers:
        options = OmegaConf.load(f"{logger.log_dir}/hparams.yaml")
        assert options["model"] == FORMULA
    table = pd.read_csv(tmp_path / "logs" / "csv" / "metrics.csv")
    assert table["log_likelihood"].max() == pytest.approx(-871.81414, rel=1e-6)
    left = {p.name for p in (tmp_path / "logs").rglob("*") if p.is_file()}
    assert {name.partition("events.")[1] or name for name in left} == {
        "metrics.csv",
        "hparams.yaml",
        "events.",
    }


def test_a_checkpoint_predicts_without_the_training_data(tmp_path):
    table = datasets.sleepstudy()
    model, _, run = fitted(tmp_path)
    run.save_checkpoint(tmp_path / "model.ckpt")
    loaded = MixedModule.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    found = loaded.predict(table)
    np.testing.assert_allclose(found["mean"], model.result.fitted.numpy(), rtol=1e-10)
    beta = model.result.fixed.estimate.numpy()
    np.testing.assert_allclose(
        found["population_mean"], beta[0] + beta[1] * table["Days"], rtol=1e-10
    )
    new = pd.DataFrame({"Days": [3, 4], "Subject": ["308", "unheard of"]}, index=[7, 9])
    found = loaded.predict(new)
    assert found.index.tolist() == [7, 9]
    assert found.loc[9, "mean"] == found.loc[9, "population_mean"]
    assert found.loc[7, "mean"] != found.loc[7, "population_mean"]
    with pytest.raises(InputError, match="no column 'Days'"):
        loaded.predict(new.drop(columns="Days"))


def test_options_that_hydra_hands_over_travel_with_the_checkpoint(tmp_path):
    options = {
        "model": "Reaction ~ Days + (1 | Subject)",
        "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.01},
        "network": {
            "_target_": "torch.nn.Sequential",
            "_args_": [{"_target_": "torch.nn.LazyLinear", "out_features": 2}],
        },
        "starts": {"residual/sigma^2": 500.0},
        "categorical": [],
    }
    table = datasets.sleepstudy()
    module = MixedModule(**OmegaConf.create(options))
    run = quiet(1)
    run.fit(module, MixedModelDataModule(table))
    run.save_checkpoint(tmp_path / "saved.ckpt")
    loaded = MixedModule.load_from_checkpoint(tmp_path / "saved.ckpt", weights_only=True)
    assert {name: loaded.hparams[name] for name in options} == options
    found, expected = loaded.predict(table), module.predict(table)
    pd.testing.assert_frame_equal(found, expected, check_exact=True)


def test_transforms_of_the_training_data_travel_with_the_checkpoint(tmp_path):
    table = datasets.oats()
    formula = "yield ~ poly(nitro, 2) * Variety + (1 | Block/Variety)"
    model, _, run = fitted(tmp_path, table=table, formula=formula)
    run.save_checkpoint(tmp_path / "model.ckpt")
    loaded = MixedModule.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    part = table.iloc[5:9]
    np.testing.assert_allclose(
        loaded.predict(part)["mean"], model.result.fitted.numpy()[5:9], rtol=1e-9
    )


def test_trainer_predict(tmp_path):
    model, data, run = fitted(tmp_path)
    (found,) = run.predict(model, data)
    torch.testing.assert_close(found.mean, model.result.fitted)


def test_resuming_a_checkpoint_ends_where_an_uninterrupted_run_does(tmp_path):
    whole, _, _ = fitted(tmp_path, ADAM, epochs=40, tolerance=1e-12)
    _, data, half = fitted(tmp_path, ADAM, epochs=15, tolerance=1e-12)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed = MixedModule(FORMULA, optimizer=ADAM)
    trainer(tmp_path, epochs=40, tolerance=1e-12).fit(
        resumed, data, ckpt_path=tmp_path / "half.ckpt", weights_only=True
    )
    assert resumed.result.log_likelihood == pytest.approx(whole.result.log_likelihood, rel=1e-12)


def test_rank_deficient_columns_have_no_coefficient(tmp_path):
    # The dropped column stands before one that is kept.
    table = datasets.sleepstudy().assign(Twice=lambda t: 2 * t["Days"], Odd=lambda t: t["Days"] % 2)
    with pytest.warns(RuntimeWarning, match="dropped Twice"):
        model, _, _ = fitted(
            tmp_path, table=table, formula="Reaction ~ Days + Twice + Odd + (1 | Subject)"
        )
    assert model.result.fixed.names == ("(Intercept)", "Days", "Odd")
    np.testing.assert_allclose(model.predict(table)["mean"], model.result.fitted.numpy())


def test_tables_from_files_and_frames_agree(tmp_path):
    path = tmp_path / "table.parquet"
    datasets.sleepstudy().to_parquet(path)
    one, _, _ = fitted(tmp_path, table=str(path))
    other, _, _ = fitted(tmp_path)
    assert one.result.log_likelihood == other.result.log_likelihood


SAID = {
    "residual": {"residual": "ar1(visit | child)"},
    "weights": {"weights": "w"},
    "categorical": {"categorical": ["visit"]},
}


def visits():
    table = datasets.growth(30)
    table["w"] = 1 + np.arange(len(table)) % 3
    table["visit"] = table.groupby("child").cumcount()
    return table


@pytest.mark.parametrize("said", SAID)
def test_what_a_formula_takes_is_said_once(tmp_path, said):
    table, options = visits(), SAID[said]
    formula = (
        "height ~ age + visit + (1 | child)"
        if said == "categorical"
        else "height ~ age + (1 | child)"
    )
    expected = lmm(formula, table, **options)
    module, data = MixedModule(formula, **options), MixedModelDataModule(table)
    trainer(tmp_path).fit(module, data)
    assert module.result.log_likelihood == pytest.approx(expected.log_likelihood, rel=1e-9)
    np.testing.assert_allclose(module.predict(table), expected.predict(table), rtol=1e-5)
    # Said to both it must be the same; a data module that was read for something else is read anew.
    for more in (options, {}):
        again, data = MixedModule(formula, **options), MixedModelDataModule(table, formula, **more)
        data.setup()
        trainer(tmp_path).fit(again, data)
        assert again.result.log_likelihood == module.result.log_likelihood
    with pytest.raises(InputError, match=rf"the data module's `{said}` is .* but the model's"):
        trainer(tmp_path).fit(MixedModule(formula), MixedModelDataModule(table, **options))


def test_a_data_module_without_a_formula_needs_a_module_of_one(tmp_path):
    data = MixedModelDataModule(datasets.sleepstudy())
    with pytest.raises(
        InputError, match="`formula` is None: expected a formula, or a Trainer that"
    ):
        data.setup()


def test_other_rows_are_encoded_by_what_the_model_has_learned(tmp_path):
    """The levels of a table to predict are those of the fit, whatever the table has."""
    table = datasets.sleepstudy()
    model, _, run = fitted(tmp_path)
    run.save_checkpoint(tmp_path / "m.ckpt")
    loaded = MixedModule.load_from_checkpoint(tmp_path / "m.ckpt", weights_only=True)
    new = table.iloc[60:100]
    for module in (model, loaded):
        data = MixedModelDataModule(new)
        for _ in range(2):
            (found,) = trainer(tmp_path).predict(module, data)
            np.testing.assert_allclose(found.mean, model.predict(new)["mean"])
        held = MixedModelDataModule(new, validation=0.5, split="unseen")
        (metrics,) = trainer(tmp_path).validate(module, held, verbose=False)
        own = held.table.index
        out = model.predict(new.drop(own))["mean"] - new.drop(own)["Reaction"]
        assert metrics["val_mse"] == pytest.approx((out**2).mean(), rel=1e-6)


def test_a_loaded_module_is_fitted_to_the_same_table_alone(tmp_path):
    table = datasets.sleepstudy()
    model, _, run = fitted(tmp_path)
    run.save_checkpoint(tmp_path / "m.ckpt")
    loaded = MixedModule.load_from_checkpoint(tmp_path / "m.ckpt", weights_only=True)
    with pytest.raises(InputError, match="has the model of another table: fit a new MixedModule"):
        trainer(tmp_path).fit(loaded, MixedModelDataModule(table.iloc[10:]))
    trainer(tmp_path).fit(loaded, MixedModelDataModule(table.copy()))
    assert loaded.result.log_likelihood == pytest.approx(model.result.log_likelihood, rel=1e-9)
    pd.testing.assert_frame_equal(loaded.result.predict(table), loaded.predict(table))


def test_a_formula_spaced_otherwise_is_the_same(tmp_path):
    table, spaced = datasets.sleepstudy(), "Reaction~Days+(1|Subject)"
    module, same = MixedModule("Reaction ~ Days + (1 | Subject)"), lmm(spaced, table)
    trainer(tmp_path).fit(module, MixedModelDataModule(table, spaced))
    assert module.result.log_likelihood == pytest.approx(same.log_likelihood, abs=1e-8)


@pytest.mark.parametrize("shift", [0, 1e3, 1e5, 1e6])
def test_slopes_on_far_off_covariates_are_those_of_lmm(tmp_path, shift):
    """Likelihood, predictions, components and the path; those of a checkpoint too."""
    table = datasets.sleepstudy().assign(Days=lambda t: t["Days"] + shift)
    expected = lmm(FORMULA, table)
    model, _, run = fitted(tmp_path, table=table)
    found = model.result
    assert found.converged
    assert found.log_likelihood == pytest.approx(-871.8141359979, abs=1e-7)
    assert found.log_likelihood == pytest.approx(expected.log_likelihood, abs=1e-8)
    for one, other in zip(found.components, expected.components, strict=True):
        torch.testing.assert_close(one.covariance, other.covariance, rtol=1e-5, atol=1e-5)
    for one, other in zip(found.parameters, expected.parameters, strict=True):
        assert one.name == other.name
        assert one.value == pytest.approx(other.value, rel=1e-5)
        assert one.std_error == pytest.approx(other.std_error, rel=1e-4)
    assert model.history[-1].parameters == pytest.approx(
        {p.name: p.value for p in found.parameters}, rel=1e-5
    )
    assert model.history[-1].parameters == found.history[-1].parameters
    covariances = [r.source.covariance() for r in (found, expected)]
    torch.testing.assert_close(*covariances, rtol=1e-6, atol=1e-2 if shift > 1e5 else 1e-4)
    tables = [model.predict(table), found.predict(table), expected.predict(table)]
    run.save_checkpoint(tmp_path / "model.ckpt")
    for given in ({}, {"model": FORMULA}, {"model": copy.deepcopy(model.model)}):
        again = MixedModule.load_from_checkpoint(
            tmp_path / "model.ckpt", weights_only=True, **given
        )
        assert torch.equal(again.model.random["Subject"].basis, model.model.random["Subject"].basis)
        if again.table is not None:
            tables.append(again.predict(table))
            assert again.table.bases.keys() == model.table.bases.keys()
    for other in tables[:-1]:
        np.testing.assert_allclose(tables[-1], other, rtol=1e-6)
    trace = TraceVariances(tmp_path / "trace.csv")
    trace.on_fit_end(run, model)
    last = pd.read_csv(tmp_path / "trace.csv").iloc[-1]
    assert last["Subject/g/effects/L_1_1"] == pytest.approx(found.parameters[2].value, rel=1e-5)


@pytest.mark.filterwarnings("ignore:.*which the network has not learned")
@pytest.mark.parametrize("training", ["alternating", "full"])
def test_a_network_with_slopes_on_far_off_covariates(training):
    """Another origin of the slopes' covariate is the same model, trained alike."""
    found = []
    for shift in (1e3, 1e6):
        table = datasets.growth(60).assign(years=lambda t, c=shift: t["years"] + c)
        formula = "height ~ age + dose + (years | child)"
        torch.manual_seed(1)
        layers = {"_target_": "torch.nn.LazyLinear", "out_features": 8}
        adam = {"_target_": "torch.optim.Adam", "lr": 0.01}
        module = MixedModule(formula, adam, training, network=layers)
        options = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
        run = Trainer(max_epochs=20, accelerator="cpu", enable_progress_bar=False, **options)
        run.fit(module, MixedModelDataModule(table, formula))
        found.append((module.result, module.predict(table)))
    (one, near), (other, far) = found
    assert other.log_likelihood == pytest.approx(one.log_likelihood, rel=1e-6)
    np.testing.assert_allclose(far["mean"], near["mean"], rtol=1e-4)
    slope = [r.components[0].covariance[1, 1].item() for r in (one, other)]
    assert slope[1] == pytest.approx(slope[0], rel=1e-4)


def rows_and_model(n=24):
    torch.manual_seed(0)
    x, codes = torch.randn(n, 2), torch.arange(n) % 4
    batch = {"x": x, "y": torch.randn(n), "groups": {"g": codes}}
    return batch, MixedModel(torch.nn.Linear(2, 1), {"g": RandomEffect(4)})


CALLS = {
    "loss": lambda model, batch: model.loss(batch),
    "loss of an output": lambda model, batch: model.loss_of(batch["x"][:, 0], batch),
    "objective": lambda model, batch: model.objective(batch),
    "gradient in parts": lambda model, batch: model.backward_in_parts(batch, 5),
    "covariance": lambda model, batch: model.covariance(batch),
    "update": lambda model, batch: model.update(batch),
    "update of an output": lambda model, batch: model.update(batch, batch["x"][:, 0]),
    "predict": lambda model, batch: model.predict(batch),
    "loader": lambda model, batch: bare(2).fit(MixedModule(model), loader(batch)),
    "validation": lambda model, batch: bare(2).validate(MixedModule(model), loader(batch)),
    "prediction": lambda model, batch: bare(2).predict(MixedModule(model), loader(batch)),
    "own module": lambda model, batch: bare(2, [UpdateBLUPs()]).fit(Own(model), loader(batch)),
}


class Own(LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, batch_idx):
        return self.model.loss(batch)

    def configure_optimizers(self):
        return torch.optim.Adam(self.model.network_parameters(), lr=0.01)


def loader(batch):
    return DataLoader([batch], batch_size=None)


def bare(epochs, callbacks=(), **options):
    return Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks), **options,
    )  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_a_key_that_nothing_reads_is_refused_wherever_a_batch_enters(call):
    batch, model = rows_and_model()
    with pytest.raises(InputError, match=r"`batch` has 'index', 'weight': expected no other keys"):
        CALLS[call](model, {**batch, "weight": batch["y"].exp(), "index": torch.arange(24)})
    if call not in ("gradient in parts", "validation", "prediction"):
        with pytest.raises(InputError, match=r"batch\['values'\] has 'h': the effects are"):
            CALLS[call](model, {**batch, "values": {"h": torch.ones(24, 1)}})
    # One key is for what is the user's own.
    CALLS[call](model, {**batch, "extra": {"index": torch.arange(24), "name": ["a"] * 24}})


@pytest.mark.parametrize("averaging", [EMAWeightAveraging, WeightAveraging])
def test_averages_of_whole_modules_are_refused(averaging):
    batch, model = rows_and_model()
    with pytest.raises(
        InputError, match=rf"Trainer\(callbacks=\[{averaging.__name__}\]\) averages"
    ):
        bare(2, [averaging()]).fit(MixedModule(model), loader(batch))
    with pytest.raises(InputError, match="expected StochasticWeightAveraging"):
        bare(2, [UpdateBLUPs(), averaging()]).fit(Own(model), loader(batch))


def test_what_a_batch_carries_along_reaches_the_users_hooks():
    batch, model = rows_and_model()
    batch["extra"] = {"index": torch.arange(24), "name": ["a"] * 24}
    seen = []

    class See(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            seen.append(batch["extra"]["index"])

    for training in ("alternating", "full", "composite"):
        bare(1, [See()]).fit(MixedModule(model, training=training), loader(batch))
    assert [len(index) for index in seen] == [24] * 3


def test_mistakes_are_named(tmp_path):
    data = MixedModelDataModule(datasets.sleepstudy(), FORMULA)
    other = MixedModule("Reaction ~ Days + (1 | Subject)")
    with pytest.raises(ValueError, match="the data module's formula"):
        trainer(tmp_path).fit(other, data)
    with pytest.raises(InputError, match="was given a loader: expected a MixedModelDataModule"):
        trainer(tmp_path).fit(other, [{}])
    with pytest.raises(ValueError, match="has no estimates"):
        MixedModule(FORMULA).predict(datasets.sleepstudy())
    with pytest.raises(InputError, match="method"):
        MixedModule(FORMULA, method="map")
    with pytest.raises(InputError, match="not a class that may stand there"):
        fitted(tmp_path, {"_target_": "os.system"})
    with pytest.raises(InputError, match="optimizer"):
        fitted(tmp_path, {"_target_": "torch.optim.Adam", "speed": 3})
    with pytest.raises(ValueError, match="tolerance"):
        StopWhenConverged(tolerance=0)


@pytest.mark.parametrize("name", ["x", "x.1"])
def test_a_fit_made_elsewhere_is_served_by_a_checkpoint(tmp_path, name):
    formula = f"y ~ `{name}` + (`{name}` | `plot.id`)"
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"plot.id": np.arange(60) % 6, name: rng.standard_normal(60)})
    table["y"] = rng.standard_normal(60) + (1 + table[name]) * table["plot.id"] / 2
    result = lmm(formula, table, categorical=["plot.id"])
    model = MixedModule.of(result, categorical=["plot.id"])
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "m.ckpt")
    loaded = MixedModule.load_from_checkpoint(tmp_path / "m.ckpt", weights_only=True)
    pd.testing.assert_frame_equal(loaded.predict(table), result.predict(table))


@pytest.mark.parametrize(
    "options",
    [{"gradient_clip_val": 0.5}, {"gradient_clip_val": 1.0}, {"accumulate_grad_batches": 2}],
)
def test_options_of_gradients_are_refused_without_any(tmp_path, options):
    (name, value), *_ = options.items()
    data = MixedModelDataModule(datasets.sleepstudy(), FORMULA)
    run = Trainer(
        max_epochs=1, logger=False, default_root_dir=tmp_path, accelerator="cpu", **options
    )
    with pytest.raises(InputError, match=rf"Trainer\({name}={value}\) has no effect"):
        run.fit(MixedModule(FORMULA), data)
