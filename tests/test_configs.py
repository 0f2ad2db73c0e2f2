"""Every config file composes."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

CONFIGS = Path(__file__).parents[1] / "configs"
OPTIONS = [f"{file.parent.name}={file.stem}" for file in sorted(CONFIGS.glob("*/*.yaml"))]


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_composes(option):
    if option == "sweep=optuna":
        pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("config", [option])
    assert {"data", "model", "optimizer", "trainer", "logger", "callbacks"} <= set(config)


def test_the_installed_package_finds_the_configs():
    from openreml_nn.program.main import config_folder

    assert (config_folder() / "config.yaml").is_file()
