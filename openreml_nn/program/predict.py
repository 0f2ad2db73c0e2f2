"""``openreml-nn predict``: predictions for a table, from the checkpoint of a run."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from openreml_nn.program.options import Options
from openreml_nn.program.reporting import one_line, reported, shown
from openreml_nn.program.rundir import RunDirectory
from openreml_nn.program.tables import table_file
from openreml_nn.support.errors import InputError

if TYPE_CHECKING:
    from openreml_nn.lightning import MixedModule

__all__ = ["predict_table"]


def predict_table(config: DictConfig, imported: Callable[[], None]) -> None:
    """Predict for a table from a checkpoint and write ``predictions.csv``.

    Args:
        config: the options.
        imported: what is called when all is imported.
    """
    path = Path(HydraConfig.get().runtime.output_dir)
    with reported(), RunDirectory(path):
        from openreml_nn.table import write_table

        options = Options(config)
        table, checkpoint = table_file(options), str(options["checkpoint"])
        options.check_all_read()
        module = _loaded(checkpoint)
        imported()
        module.encoder.source = f"file {str(table)!r}"
        found = module.predict(table.read())
        write_table(found, path / "predictions.csv", index_label="row")
        print(f"{len(found)} predictions written to {shown(path / 'predictions.csv')}")


def _loaded(checkpoint: str) -> MixedModule:
    from openreml_nn.lightning import MixedModule

    if not Path(checkpoint).is_file():
        raise InputError(f"checkpoint {checkpoint!r} does not exist: expected the file of a run")
    try:
        return MixedModule.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch goes on with advice to load what may run code.
        reason = one_line(re.split(r"\n|(?<=failed)\. ", str(error))[0]) or type(error).__name__
        raise InputError(f"checkpoint {checkpoint!r} cannot be loaded: {reason}") from error
