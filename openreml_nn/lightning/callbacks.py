"""Lightning callbacks."""

from __future__ import annotations

import os
from math import isnan
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from openreml_nn.estimation.aireml import AIREML
from openreml_nn.lightning.held import HeldOrSummed
from openreml_nn.lightning.marginal import Marginal
from openreml_nn.lightning.module import MixedModule
from openreml_nn.lightning.optimizers import refuse_averaging
from openreml_nn.lightning.reading import mark, read, refuse_single_pass
from openreml_nn.model import MixedModel
from openreml_nn.model.level_means import warn_of_level_means
from openreml_nn.support.checks import check_count, check_instance, check_number, check_text
from openreml_nn.support.errors import InputError
from openreml_nn.table import write_table

__all__ = ["ExportBLUPs", "ProgressBar", "StopWhenConverged", "TraceVariances", "UpdateBLUPs"]


class TraceVariances(Callback):
    """Write the path of the likelihood and the covariance parameters when a fit has ended.

    Args:
        path: a CSV file: a row for each step of the covariance.

    Raises:
        TypeError: if ``path`` is no path.
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

    Raises:
        TypeError: if ``path`` is no path.
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


class UpdateBLUPs(Callback):
    """Keep a :class:`MixedModel` within any LightningModule up to date.

    The module has the model as an attribute and its loss in ``training_step``; its batches are
    those of :class:`MixedModule`. Once an epoch, before its validation, before a checkpoint and at
    the end of the fit a pass over the training rows without gradients moves the covariance by an
    AI-REML step, unless one of the module's optimizers has its parameters, and stores the BLUPs.

    Args:
        model: name of the attribute; by default the module has one MixedModel.

    Raises:
        InputError: when fitting begins, if there is no such model, or more than one without a
            name.

    Example::

        class Mine(LightningModule):
            def __init__(self):
                super().__init__()
                self.mixed = MixedModel(network, {"user": RandomEffect(1000)})

            def training_step(self, batch, batch_idx):
                return self.mixed.loss(batch)

            def configure_optimizers(self):
                return torch.optim.Adam(self.mixed.network_parameters(), lr=0.01)

        Trainer(callbacks=[UpdateBLUPs()]).fit(Mine(), loader)
    """

    def __init__(self, model: str | None = None) -> None:
        if model is not None:
            check_text("model", model)
        self.name = model
        self._model: MixedModel | None = None
        self._at: Tensor | None = None
        self._aireml: AIREML | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the model."""
        refuse_averaging(trainer)
        refuse_single_pass(trainer.train_dataloader, "the training loader", "epoch")
        found = {
            name: part for name, part in pl_module.named_modules() if isinstance(part, MixedModel)
        }
        if self.name is not None:
            found = {name: part for name, part in found.items() if name == self.name}
        if len(found) != 1:
            what = "a MixedModel" if self.name is None else f"a MixedModel {self.name!r}"
            raise InputError(
                f"{type(pl_module).__name__} has {len(found)} of {what}: expected one; with "
                "several `model` names it"
            )
        (self._model,) = found.values()
        free = [p for p in self._model.covariance_parameters() if p.requires_grad]
        taken = {id(p) for o in trainer.optimizers for g in o.param_groups for p in g["params"]}
        untrained = bool(free) and not any(id(p) in taken for p in free)
        if untrained and self._model.family is not None:
            raise InputError(
                "no optimizer has the covariance's parameters, which with a family take no AI-REML "
                "steps: hand it all of model.parameters()"
            )
        self._aireml = AIREML(free) if untrained else None
        self._at = None

    def _update(self, trainer: Trainer) -> None:
        model = self._model
        if model is None or (self._at is not None and torch.equal(self._at, mark(model))):
            return
        store = HeldOrSummed(model) if model.family is None else Marginal(model)
        with torch.inference_mode(False), torch.enable_grad():
            gathered = read(trainer, model, store, lambda model, batch: model(batch))
            if self._aireml is not None:
                self._aireml.step(lambda: gathered.objective)
            gathered.update()
        self._at = mark(model)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before a validation within the fit."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._update(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """At the end of an epoch, before its checkpoint."""
        self._update(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """At the end of the fit."""
        self._update(trainer)
        if self._model is not None and trainer.is_global_zero:
            warn_of_level_means(self._model.effects(), self._model.head)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Before a checkpoint within an epoch."""
        if self._model is not None:
            self._update(trainer)
            checkpoint["state_dict"] = trainer.strategy.lightning_module_state_dict()


class StopWhenConverged(Callback):
    """Stop when the parameters are close to the optimum, whatever the optimizer.

    Closeness is the score norm, the distance to the optimum in standard
    errors of the parameters. It does not depend on units or learning rates.
    AI-REML knows it and stops by its own tolerance.

    Args:
        tolerance: score norm that counts as converged, 1e-4 by default.
        every_n_epochs: how often it is looked at, each epoch by default. A look costs about as
            much as an AI-REML step.

    Raises:
        TypeError, InputError: if one of them is no number, or not positive; in training, if it
            is given for AI-REML, or a network is trained.
    """

    def __init__(self, tolerance: float | None = None, every_n_epochs: int | None = None) -> None:
        if tolerance is not None:
            check_number("tolerance", tolerance, above=0)
        if every_n_epochs is not None:
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

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse for AI-REML what it does not ask for."""
        given = {"tolerance": self.tolerance, "every_n_epochs": self.every_n_epochs}
        said = f"StopWhenConverged({', '.join(f'{k}={v}' for k, v in given.items() if v)})"
        if any(v is not None for v in given.values()):
            assert isinstance(pl_module, MixedModule)
            if pl_module.model.family is not None:
                raise InputError(f"{said} has no effect on a fit with a family: leave them out")
            if isinstance(trainer.optimizers[0], AIREML):
                raise InputError(
                    f"{said} has no effect on AI-REML: expected AIREML(tolerance=…), "
                    "optimizer.tolerance in the program"
                )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop if there is no step to take."""
        assert isinstance(pl_module, MixedModule)
        done = pl_module.history[-1].step == 0  # no step was needed, or none was found
        if isnan(pl_module.history[-1].step) and not (
            (trainer.current_epoch + 1) % (self.every_n_epochs or 1)
        ):
            done = pl_module.score_norm() < (self.tolerance or 1e-4)
        trainer.should_stop = trainer.should_stop or done
