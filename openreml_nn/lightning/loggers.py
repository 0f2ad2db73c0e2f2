"""Lightning's loggers, whose tables and texts are written whole or not at all."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.core.saving import save_hparams_to_yaml
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only

from openreml_nn.support.files import replacing

__all__ = ["WholeCSVLogger", "WholeTensorBoardLogger"]


class WholeCSVLogger(CSVLogger):
    """Lightning's :class:`CSVLogger`, which a run that is killed leaves whole.

    ``metrics.csv`` is written anew and takes the place of the one before. So that a long run does
    not spend its time on that, this is done when the rows have become a tenth more, and at the end.
    Its options are those of Lightning.

    >>> logger = WholeCSVLogger("logs", version="csv")
    >>> Path(logger.log_dir).name
    'csv'
    """

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The writer of this run's files."""
        if self._experiment is None:
            self._experiment = _WholeFiles(self.log_dir)
        return self._experiment

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write all rows, when a fit has ended."""
        if self._experiment is not None:
            self.experiment.write()


class _WholeFiles(ExperimentWriter):
    """Keeps the rows of ``metrics.csv``; :attr:`metrics` are those that are not yet written."""

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        self._written: list[dict[str, Any]] = []

    def save(self) -> None:
        """Write the rows, if there are many new ones."""
        if 10 * len(self.metrics) > len(self._written):
            self.write()

    def write(self) -> None:
        """Write all rows, if there are new ones."""
        if not self.metrics:
            return
        rows = [*self._written, *self.metrics]
        columns = sorted(set().union(*rows))
        with (
            replacing(self.metrics_file_path) as temporary,
            temporary.open("w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
        self._written, self.metrics = rows, []

    def log_hparams(self, params: dict[str, Any]) -> None:
        """Write the module's options."""
        self.hparams.update(params)
        _write_options(Path(self.log_dir) / self.NAME_HPARAMS_FILE, self.hparams)


class WholeTensorBoardLogger(TensorBoardLogger):
    """Lightning's :class:`TensorBoardLogger`, whose ``hparams.yaml`` is written whole. Its events
    are appended one by one, and a reader takes those that are whole.

    >>> logger = WholeTensorBoardLogger("logs", version="tensorboard")
    >>> Path(logger.log_dir).name
    'tensorboard'
    """

    @rank_zero_only
    def save(self) -> None:
        """Write what is not yet written."""
        path = Path(self.log_dir) / self.NAME_HPARAMS_FILE
        if path.parent.is_dir() and not path.is_file():
            _write_options(path, self.hparams)
        super().save()


def _write_options(path: Path, options: Any) -> None:
    with replacing(path) as temporary:
        save_hparams_to_yaml(temporary, options)
