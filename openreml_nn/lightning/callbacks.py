"""Lightning callbacks."""

from __future__ import annotations

import os
from math import isnan
from pathlib import Path
from typing import Any

import pandas as pd
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.utilities import rank_zero_only

from openreml_nn.lightning.module import MixedModule
from openreml_nn.support.checks import check_count, check_instance, check_number
from openreml_nn.support.errors import InputError
from openreml_nn.table import write_table

__all__ = ["ExportBLUPs", "ProgressBar", "StopWhenConverged", "TraceVariances"]


class TraceVariances(Callback):
    """Write the path of the likelihood and the covariance parameters when a fit has ended.

    Args:
        path: a CSV file: a row for each step of the covariance.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        check_instance("path", path, (str, os.PathLike), "a path")
        self.path = Path(path)

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, MixedModule)
        rows = [
            {"log_likelihood": r.log_likelihood, "score_norm": r.score_norm, **r.parameters}
            for r in pl_module.history
        ]
        write_table(pd.DataFrame(rows), self.path, index_label="step")


class ExportBLUPs(Callback):
    """Write the BLUPs when a fit has ended.

    Args:
        path: a CSV file: group, level, effect, blup and std_error.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        check_instance("path", path, (str, os.PathLike), "a path")
        self.path = Path(path)

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, MixedModule)
        write_table(pl_module.model.blups(), self.path)


class ProgressBar(RichProgressBar):
    """Lightning's progress bar on standard error, which leaves standard output to the results."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"console_kwargs": {"stderr": True}, **options})

    def get_metrics(self, *args: Any) -> dict[str, Any]:
        shown = super().get_metrics(*args)
        shown.pop("v_num", None)
        return shown


class StopWhenConverged(Callback):
    """Stop when the parameters are close to the optimum, whatever the optimizer.

    Closeness is the score norm, the distance to the optimum in standard
    errors of the parameters. It does not depend on units or learning rates.
    AI-REML knows it and stops by its own tolerance.

    Args:
        tolerance: score norm that counts as converged.
        every_n_epochs: how often it is looked at. A look costs about as much
            as an AI-REML step.

    Raises:
        TypeError, ValueError: if one of them is no number, or not positive.
    """

    def __init__(self, tolerance: float = 1e-4, every_n_epochs: int = 1) -> None:
        check_number("tolerance", tolerance, above=0)
        check_count("every_n_epochs", every_n_epochs, 1)
        self.tolerance = tolerance
        self.every_n_epochs = every_n_epochs

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a network, of whose distance to an optimum the covariance says nothing."""
        assert isinstance(pl_module, MixedModule)
        if pl_module.has_network:
            raise InputError(
                "StopWhenConverged looks at the covariance, and this module trains a network: use "
                "EarlyStopping(monitor='val_negative_log_density')"
            )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop if there is no step to take."""
        assert isinstance(pl_module, MixedModule)
        done = pl_module.history[-1].step == 0  # no step was needed, or none was found
        if isnan(pl_module.history[-1].step) and not (
            (trainer.current_epoch + 1) % self.every_n_epochs
        ):
            done = pl_module.score_norm() < self.tolerance
        trainer.should_stop = trainer.should_stop or done
