"""The console program ``openreml-nn``: a Hydra app that fits a table, predicts for one, or gathers
runs into a report."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import hydra

from openreml_nn.program.collector import resting
from openreml_nn.program.fit import fit_table
from openreml_nn.program.options import flags_first, quoted
from openreml_nn.program.predict import predict_table
from openreml_nn.program.report import write_page
from openreml_nn.program.reporting import configured, reported, stoppable
from openreml_nn.program.sweep import Subcommand, on_its_own

__all__ = ["config_folder", "main"]

#: What each subcommand does, and its config.
_TASKS: dict[str, Subcommand] = {"predict": predict_table, "report": write_page}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program and exit with 0 (done), 2 (invalid input), 1 (an error in the package), or
    128 and the number of the signal that stopped it.

    Args:
        arguments: as on the command line, those of the process by default.
    """
    # In a process of the program's own the collector rests.
    imported = resting() if arguments is None else lambda: None
    given = list(sys.argv[1:] if arguments is None else arguments)
    name, task = "config", _TASKS.get(given[0] if given else "", fit_table)
    if task is not fit_table:
        name = given.pop(0)
    # Hydra then raises what it would print and swallow.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    configured()
    with stoppable(), reported():
        sys.argv = [sys.argv[0], *flags_first([*map(quoted, given)])]
        run = hydra.main(version_base="1.3", config_path=str(config_folder()), config_name=name)
        run(on_its_own(task, imported))()


def config_folder() -> Path:
    """The folder of configs: inside the package when installed, else beside it."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"
