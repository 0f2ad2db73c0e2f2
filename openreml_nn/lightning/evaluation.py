"""How a mixed model predicts rows that it was not trained on."""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch
from lightning import LightningModule
from torch import Tensor, nn

from openreml_nn.families import Binomial, Family
from openreml_nn.lightning.formula import FormulaOptions
from openreml_nn.lightning.rows import as_batch, blamed
from openreml_nn.lightning.table import TableModel
from openreml_nn.metrics import (
    AUC,
    CalibrationError,
    brier_score,
    gaussian_negative_log_density,
    interval_coverage,
    log_loss,
    mean_deviance,
)
from openreml_nn.model import MixedModel, Prediction
from openreml_nn.model.batch import Batch
from openreml_nn.result.prediction import predict_table
from openreml_nn.support.errors import InputError
from openreml_nn.table import Encoder

__all__ = ["Evaluated"]


class Evaluated(LightningModule):
    """A module that validates, tests and predicts by its ``model``.

    Attributes:
        model: the model.
        table: what a formula makes of a table; None for a module of a model.
    """

    model: MixedModel
    table: TableModel | None

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Mean squared error, negative log density and coverage of 95% intervals; with a family
        also deviance, and of binary rows log loss, area under the curve, Brier score and calibration
        error."""
        self._evaluate(batch, batch_idx, "validation", "val")

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the metrics of a batch of test rows, ``test_`` for ``val_``."""
        self._evaluate(batch, batch_idx, "test", "test")

    def _evaluate(self, batch: Any, batch_idx: int, stage: str, prefix: str) -> None:
        with blamed(stage, batch_idx):
            batch = as_batch(batch, self.model)
            if self.trainer.sanity_checking:
                self.model(batch)  # there are no coefficients and BLUPs yet
                return
            found = self.model.predict(batch)
            if self.model.family is not None:
                self._evaluate_family(self.model.family, batch, found, prefix)
                return
            y = batch["y"].to(found.mean)
            if y.shape != found.mean.shape:
                raise InputError(f"`y` has shape {tuple(y.shape)}: expected ({len(found.mean)},)")
        # A row without a response, or of which the fit cannot tell, has a prediction at most.
        there = torch.isfinite(y) & torch.isfinite(found.mean)
        if not bool(there.any()):
            return
        own = found.variance if found.mean.dim() == 1 else found.variance.diagonal(dim1=1, dim2=2)
        mean, variance, y = found.mean[there], own[there], y[there]
        values = {
            f"{prefix}_mse": ((mean - y) ** 2).mean(),
            f"{prefix}_negative_log_density": gaussian_negative_log_density(mean, variance, y),
            f"{prefix}_coverage": interval_coverage(mean, variance, y),
        }
        self.log_dict(values, batch_size=len(y), sync_dist=True)

    def measure(self, family: Family | None) -> None:
        """Prepare the metrics that are no means over rows."""
        self.curves = nn.ModuleDict()
        if isinstance(family, Binomial):
            for prefix in ("val", "test"):
                self.curves[f"{prefix}_auc"] = AUC()
                self.curves[f"{prefix}_calibration_error"] = CalibrationError()

    def _evaluate_family(
        self, family: Family, batch: Batch, found: Prediction, prefix: str
    ) -> None:
        """Metrics on the scale of the response: those of its mean, its predictive density, and, of
        binary rows, those of probabilities."""
        given = batch["y"].to(found.mean)
        if batch.get("weights") is not None:
            given, _ = family.with_weights(given, batch["weights"])
        y = given if given.dim() == 1 else given[:, 0] / given.sum(1)
        if y.shape != found.mean.shape:
            raise InputError(f"`y` has shape {tuple(given.shape)}: expected ({len(found.mean)},)")
        there = torch.isfinite(y) & torch.isfinite(found.mean)
        if not bool(there.any()):
            return
        mean, target = found.mean[there], given[there]
        # A row without a response may have any, as it is not looked at.
        known = there if given.dim() == 1 else there[:, None]
        density = self.model.log_density({**batch, "y": torch.where(known, given, target[0])})
        values = {
            "mse": ((mean - y[there]) ** 2).mean(),
            "negative_log_density": -density[there].mean(),
        }
        if family.has_deviance:
            values["deviance"] = mean_deviance(mean, target, family)
        if isinstance(family, Binomial) and target.dim() == 1:
            values["log_loss"] = log_loss(mean, target)
            values["brier"] = brier_score(mean, target)
            for name in ("auc", "calibration_error"):
                metric: Any = self.curves[f"{prefix}_{name}"]
                metric.update(mean, target)
                self.log(f"{prefix}_{name}", metric, on_step=False, on_epoch=True)
        named = {f"{prefix}_{name}": value for name, value in values.items()}
        self.log_dict(named, batch_size=len(mean), sync_dist=True)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Prediction:
        """Predictions of a batch."""
        with blamed("prediction", batch_idx):
            return self.model.predict(as_batch(batch, self.model, False))

    def predict(self, table: pd.DataFrame, level: float = 0.95) -> pd.DataFrame:
        """Predictions for the rows of a table, as :meth:`Result.predict` makes them, at the
        present parameters.

        Raises:
            InputError: if a column is missing, a level of a fixed factor is unknown, or the
                module, which must be of a formula, was neither fitted nor loaded.
        """
        if self.table is None:
            raise InputError("the module has no formula: predict batches by module.model.predict")
        if not hasattr(self, "model"):
            raise InputError("the module has no estimates: fit it or load a checkpoint")
        return predict_table(self.table.encoder, self.model, table, level)

    @property
    def encoder(self) -> Encoder:
        """What the formula makes of a table."""
        if self.table is None:
            raise AttributeError("a module of a model has no encoder")
        return self.table.encoder

    @property
    def formula_options(self) -> FormulaOptions | None:
        """The formula with how a table is read for it, which its data module asks for; None for a
        module of a model."""
        return None if self.table is None else self.table.options

    @property
    def places(self) -> Tensor | None:
        """Where the training rows of a table are (n, k), of levels at places; None without such."""
        return None if self.table is None else self.table.places
