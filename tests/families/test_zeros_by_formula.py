"""A zero part by formula: one fit by glmm, the module and the program, whose checkpoints predict."""

import json

import pandas as pd
import pytest
import torch
from lightning import Trainer
from torch import nn

from openreml_nn import InputError, glmm
from openreml_nn.families import Poisson, ZeroInflated
from openreml_nn.lightning import MixedModelDataModule, MixedModule
from tests.families.test_glmm import data
from tests.forked import program

FORMULA, ZI = "count ~ mined + (1 | site)", "~ cover"
OPTIONS = {"family": "poisson", "zi": ZI}


def rows():
    return data("salamanders").astype({"mined": str})


def trained(module, table, epochs=60, folder=None):
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module, MixedModelDataModule(table))
    return trainer


@pytest.fixture(scope="module")
def expected():
    return glmm(FORMULA, rows(), **OPTIONS)


def test_a_module_has_the_fit_of_glmm_and_its_checkpoint_predicts(expected, tmp_path):
    table = rows()
    module = MixedModule(FORMULA, **OPTIONS)
    trainer = trained(module, table, folder=tmp_path)
    found = module.result
    assert found.log_likelihood == pytest.approx(expected.log_likelihood, abs=1e-7)
    assert found.zi == expected.zi == ZI
    own, wanted = (
        {e.name: e.value for e in result.family_parameters} for result in (found, expected)
    )
    assert own == pytest.approx(wanted, abs=1e-4)
    new = table.iloc[::40]
    predicted = module.predict(new)
    pd.testing.assert_frame_equal(predicted, expected.predict(new), rtol=1e-3)
    trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    loaded = MixedModule.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    pd.testing.assert_frame_equal(loaded.predict(new), predicted)
    pd.testing.assert_frame_equal(MixedModule.of(expected).predict(new), expected.predict(new))


def test_the_zero_part_stands_beside_a_network(tmp_path):
    table = rows()
    torch.manual_seed(0)
    network = {"_target_": "torch.nn.LazyLinear", "out_features": 3}
    module = MixedModule(
        FORMULA,
        {"_target_": "torch.optim.Adam", "lr": 0.05},
        network=network,
        **OPTIONS,
    )
    trainer = trained(module, table, 15, tmp_path)
    before = module.predict(table.iloc[:1].assign(cover=[-3.0]))["mean"].item()
    after = module.predict(table.iloc[:1].assign(cover=[3.0]))["mean"].item()
    assert abs(before - after) > 1e-3
    trainer.save_checkpoint(tmp_path / "n.ckpt", weights_only=True)
    loaded = MixedModule.load_from_checkpoint(tmp_path / "n.ckpt", weights_only=True)
    pd.testing.assert_frame_equal(loaded.predict(table), module.predict(table))


def test_the_program_has_the_fit_of_glmm(expected, tmp_path):
    table = rows()
    table.to_csv(tmp_path / "t.csv", index=False)
    done = program(
        "data.path=t.csv", f"model.formula={FORMULA}", "model.family=poisson", f"model.zi={ZI}",
        "trainer.enable_progress_bar=false", "hydra.run.dir=run", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "run/result.json").read_text())
    assert record["fit"]["log_likelihood"] == pytest.approx(expected.log_likelihood, abs=1e-9)
    assert record["model"]["zi"] == ZI
    assert record["model"]["family"] == "zero-inflated poisson"
    assert set(record["family_parameters"]) == {"zi (Intercept)", "zi cover"}
    table.iloc[:9].to_csv(tmp_path / "new.csv", index=False)
    done = program(
        "predict", "checkpoint=run/model.ckpt", "data.path=new.csv", "hydra.run.dir=out",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = pd.read_csv(tmp_path / "out/predictions.csv", index_col=0)
    wanted = expected.predict(table.iloc[:9])
    assert found["mean"].tolist() == pytest.approx(wanted["mean"].tolist(), rel=1e-9)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["model.zi=~ cover"], "`zi` is '~ cover' without a `family`"),
        (["model.zi=~ cover", "model.family=gamma"], "without zeros to inflate"),
        (["model.zi=cover", "model.family=poisson"], "expected '~' and fixed effects"),
        (["model.zi=~ cover", "data.chunk_rows=100"], "model.zi=~ cover; leave it out"),
    ],
)
def test_a_zero_part_without_effect_is_refused_by_name(options, said, tmp_path):
    rows().to_csv(tmp_path / "t.csv", index=False)
    done = program("data.path=t.csv", f"model.formula={FORMULA}", *options, cwd=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert said in line


def test_a_module_refuses_a_zero_part_without_effect():
    with pytest.raises(InputError, match="`zi` is '~ 1' without a `family`: expected None"):
        MixedModule(FORMULA, zi="~ 1")
    with pytest.raises(InputError, match="without zeros to inflate"):
        MixedModule(FORMULA, family="gamma", zi="~ 1")
    inflated = ZeroInflated(Poisson(), nn.Linear(1, 1))
    for build in (
        lambda: MixedModule(FORMULA, family=inflated),
        lambda: glmm(FORMULA, rows(), family=inflated),
    ):
        with pytest.raises(InputError, match="`family` is zero-inflated: expected that of the"):
            build()
