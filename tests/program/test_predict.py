"""Predictions from a checkpoint, which may be a stranger's."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from openreml_nn import datasets, lmm
from openreml_nn.lightning import MixedModule
from openreml_nn.program.rundir import RunDirectory
from tests.forked import program
from tests.test_instantiate import PROCESS

QUICK = [
    "logger=none",
    "plots=false",
    "trainer.enable_progress_bar=false",
    "trainer.max_epochs=1",
    "model.width=4",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a network's run and a table."""
    place = tmp_path_factory.mktemp("predict")
    done = program("experiment=neural_longitudinal", *QUICK, "hydra.run.dir=r", cwd=place)
    assert done.returncode == 0, done.stderr
    datasets.growth(children=3).to_csv(place / "new.csv", index=False)
    return place


@pytest.mark.parametrize("where", ["network", "residual", "optimizer", "scheduler"])
@pytest.mark.parametrize("depth", [0, 1])
def test_a_class_in_a_checkpoint_is_checked_before_it_is_called(folder, where, depth):
    kept = torch.load(folder / "r" / "model.ckpt", weights_only=True)
    target = folder / "PWNED"
    node = {**PROCESS, "args": [str(target)]}
    if depth:
        node = {"_target_": "torch.nn.Sequential", "_args_": [node]}
    kept["hyper_parameters"][where] = node
    torch.save(kept, folder / "evil.ckpt")
    done = program("predict", "checkpoint=evil.ckpt", "data.path=new.csv", cwd=folder)
    assert not target.exists()
    if where in ("network", "residual"):
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert "SubprocessHandler" in done.stderr
    else:  # no prediction makes one
        assert done.returncode == 0, done.stderr


def test_the_program_predicts_as_the_result_and_the_module_do(tmp_path):
    formula, table = "Reaction ~ Days + (Days | Subject)", datasets.sleepstudy()
    quick = ["logger=none", "plots=false", "trainer.enable_progress_bar=false", "hydra.run.dir=r"]
    assert program(*quick, cwd=tmp_path).returncode == 0
    new = pd.DataFrame({"Days": [0.0, 5.0, 7.0], "Subject": ["308", "309", "308"]}, index=[4, 7, 9])
    new.to_csv(tmp_path / "new.csv", index=False)
    found = []
    for more in ([], ["checkpoint=r/model.ckpt"]):
        options = ["checkpoint=r/model.ckpt", "data.path=new.csv", "hydra.run.dir=p", *more]
        done = program("predict", *options, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        found.append(pd.read_csv(tmp_path / "p" / "predictions.csv", index_col="row"))
    expected = lmm(formula, table).predict(new)
    module = MixedModule.load_from_checkpoint(tmp_path / "r" / "model.ckpt", weights_only=True)
    for other in (*found, module.predict(new)):
        assert list(other) == ["mean", "variance", "population_mean", "low", "high"]
        np.testing.assert_allclose(other, expected, rtol=1e-5)
    assert (tmp_path / "r" / "result.json").exists()


def test_predictions_into_the_folder_of_the_fit_leave_the_fit_and_go_with_it(
    folder, tmp_path, monkeypatch
):
    before = json.loads((folder / "r" / "result.json").read_text())
    options = ["checkpoint=r/model.ckpt", "data.path=new.csv", "hydra.run.dir=r"]
    overrides = (folder / "r" / ".hydra" / "overrides.yaml").read_text()
    done = program("predict", *options, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "r" / "result.json").read_text()) == before
    assert (folder / "r" / ".hydra" / "overrides.yaml").read_text() == overrides
    assert len(pd.read_csv(folder / "r" / "predictions.csv")) == 24
    # Nothing that the program has written outlives the next run.
    run = shutil.copytree(folder / "r", tmp_path / "r")
    assert (run / "residuals.csv").exists()
    config = OmegaConf.create({"overrides": {"task": []}})
    monkeypatch.setattr(HydraConfig, "get", lambda: config)
    with RunDirectory(run) as directory:
        directory.begin(config)
    assert {path.name for path in run.iterdir()} == {"config.yaml", ".hydra"}


def test_a_broken_checkpoint_is_one_line(folder):
    (folder / "broken.ckpt").write_bytes((folder / "r" / "model.ckpt").read_bytes()[:1000])
    torch.save({"a": 1}, folder / "other.ckpt")
    torch.save([1], folder / "list.ckpt")
    (folder / "text.ckpt").write_text("y,x\n1,2\n")
    for name in ("broken", "other", "list", "text"):
        done = program("predict", f"checkpoint={name}.ckpt", "data.path=new.csv", cwd=folder)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert "weights_only" not in done.stderr  # torch advises to run whatever it holds
        assert f"checkpoint '{name}.ckpt' cannot be loaded: " in done.stderr
