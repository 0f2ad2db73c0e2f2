"""Every config file makes what it names, not only composes."""

from pathlib import Path

import lightning
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.loggers import Logger
from omegaconf import open_dict

from openreml_nn import datasets
from openreml_nn.program.fit import prepared
from openreml_nn.program.main import config_folder
from openreml_nn.program.options import Options, quoted

CONFIGS = Path(__file__).parents[1] / "configs"
OPTIONS = [f"{file.parent.name}={file.stem}" for file in sorted(CONFIGS.glob("*/*.yaml"))]
#: What stands in front of a group's file where a file needs more than itself.
WITH = {
    "model=neural": ["experiment=neural"],
    "callbacks=neural": ["experiment=neural"],
    "data=common": None,  # the others' base
    "data=table": ["data.path=t.csv", "data.formula=Reaction ~ Days + (1 | Subject)"],
}
NEEDS = {"logger=mlflow": "mlflow", "sweep=optuna": "hydra_plugins.hydra_optuna_sweeper"}


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """What the program makes of overrides before it reads the table."""
    monkeypatch.chdir(tmp_path)
    datasets.sleepstudy().to_csv("t.csv", index=False)

    def made(*overrides):
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            config = compose("config", list(map(quoted, overrides)), return_hydra_config=True)
            with open_dict(config):
                config.hydra.runtime.output_dir = str(tmp_path / "run")
                config.hydra.mode = RunMode.RUN
                config.hydra.job.config_name = "config"
            HydraConfig.instance().set_config(config)
            with open_dict(config):
                del config["hydra"]
            return prepared(Options(config))

    yield made
    HydraConfig.instance().cfg = None


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_makes_its_objects(prepare, option):
    if option in NEEDS:
        pytest.importorskip(NEEDS[option])
    more = WITH.get(option, [])
    if more is None:
        return
    # What a fit without a trainer has no use for is made as well.
    fit = prepare(*more, option, "+trainer.num_sanity_val_steps=0")
    assert isinstance(fit.trainer, lightning.Trainer)
    assert all(isinstance(logger, Logger) for logger in fit.trainer.loggers)
    assert bool(fit.trainer.loggers) == (option != "logger=none")
    fit.read()
    assert fit.data.encoded.y is not None
    batch = fit.data.encoded.batch()
    model = fit.module.table.built(fit.data)
    assert torch.isfinite(model.loss(batch))


def test_a_file_in_chunks_is_prepared(prepare):
    assert prepare("data.chunk_rows=50").options["chunk_rows"] == 50


@pytest.mark.parametrize("name", ["predict", "report"])
def test_the_other_commands_compose(name):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        assert (
            set(compose(name))
            == {"predict": {"checkpoint", "data"}, "report": {"path", "output"}}[name]
        )


def test_the_installed_package_finds_the_configs():
    assert (config_folder() / "config.yaml").is_file()
