"""The linear mixed model as a Lightning module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from lightning import LightningModule
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from openreml_nn.covariance import Matrix
from openreml_nn.estimation import Result, moment_start
from openreml_nn.estimation.aireml import AIREML, Curvature
from openreml_nn.estimation.outcome import outcome
from openreml_nn.lightning.data import attached
from openreml_nn.likelihood import REMLLoss
from openreml_nn.likelihood.fixed import estimable
from openreml_nn.likelihood.loss import Objective
from openreml_nn.likelihood.plan import check_solver
from openreml_nn.likelihood.solvers.dense import check_method
from openreml_nn.model.structures import labels_of, linear_model
from openreml_nn.result.result import Record
from openreml_nn.support.checks import check_instance, check_maker, check_names, check_text
from openreml_nn.support.errors import InputError
from openreml_nn.support.instantiate import build
from openreml_nn.table import Encoded, Encoder, Learned

__all__ = ["MixedModelModule"]


class MixedModelModule(LightningModule):
    r"""A linear mixed model trained by its restricted likelihood.

    The covariance tree is built from the data module when fitting begins,
    with a start that follows the units of the data. BLUEs and BLUPs are
    stored in buffers and travel with the checkpoint, together with what the
    formula learned from the table, so that a loaded module predicts for new
    tables without the training data.

    Args:
        formula: an lme4-style formula.
        categorical: numeric columns to be taken as factors.
        method: ``"reml"`` or ``"ml"``.
        solver: see :class:`REMLLoss`.
        residual, weights: structure of the residuals and column of weights, as in :func:`lmm`.
        optimizer: a config such as ``{"_target_": "torch.optim.Adam", "lr": 0.1}``,
            or a function from parameters to an optimizer; AI-REML by default.

    Attributes:
        covariance: the covariance tree, once there are data.
        result: the :class:`Result`, after training.
        history: a :class:`Record` for each step of this run.

    Raises:
        InputError: if the formula does not parse, an option is unknown or the optimizer
            cannot be made.

    Example::

        data = MixedModelDataModule(sleepstudy(), "Reaction ~ Days + (Days | Subject)")
        model = MixedModelModule("Reaction ~ Days + (Days | Subject)")
        trainer = Trainer(max_epochs=100, callbacks=[StopWhenConverged()])
        trainer.fit(model, data)
        print(model.result.summary())
    """

    covariance: Matrix | None
    beta: Tensor
    aliases: Tensor

    def __init__(
        self,
        formula: str,
        categorical: Sequence[str] = (),
        method: str = "reml",
        solver: str = "auto",
        optimizer: Mapping[str, Any] | Callable[[Any], torch.optim.Optimizer] | None = None,
        residual: str | None = None,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        check_text("formula", formula)
        check_names("categorical", categorical)
        check_method(method)
        check_solver(solver)
        if optimizer is not None:
            check_maker("optimizer", optimizer)
        for name, value in (("residual", residual), ("weights", weights)):
            if value is not None:
                check_text(name, value)
        plain = dict(optimizer) if isinstance(optimizer, Mapping) else None
        self.save_hyperparameters(
            {
                "formula": formula,
                "categorical": list(categorical),
                "method": method,
                "solver": solver,
                "optimizer": plain,
                "residual": residual,
                "weights": weights,
            }
        )
        self._make_optimizer = optimizer
        self.encoder = Encoder(formula, categorical, residual=residual, weights=weights)
        self.method = method
        self.solver = solver
        self.covariance = None
        self.loss: REMLLoss | None = None
        self.history: list[Record] = []
        self.result: Result | None = None
        self._encoded: Encoded | None = None
        self._data: tuple[Tensor, Tensor] | None = None

    # ------------------------------------------------------------------ building

    def setup(self, stage: str) -> None:
        """Build the covariance from the data module's table."""
        if stage != "fit":
            return
        data = attached(self, self.encoder)
        self.encoder = data.encoder
        encoded: Encoded = data.encoded
        if encoded.offset is not None:
            raise InputError("offset() is for lmm(): subtract it from the response here")
        fresh = self.covariance is None
        self._build(encoded)
        if fresh:
            assert self.loss is not None and encoded.y is not None
            moment_start(self.loss, encoded.y, encoded.X)

    def _build(self, encoded: Encoded) -> None:
        kept = None if self.covariance is None else self.covariance.state_dict()
        self._encoded = encoded
        self.covariance = linear_model(encoded).covariance(encoded.batch())
        if kept is not None:
            self.covariance.load_state_dict(kept)
        self.loss = REMLLoss(self.covariance, self.method, self.solver)
        self.loss.names = encoded.names
        like = encoded.X
        self.register_buffer("beta", like.new_zeros(like.shape[1]))
        self.register_buffer("aliases", like.new_zeros(like.shape[1], like.shape[1]))
        for design in encoded.random:
            q, k = len(design.levels), len(design.effects)
            self.register_buffer(_buffer("blup", design.name), like.new_zeros(q, k))
            self.register_buffer(_buffer("variance", design.name), like.new_zeros(q, k, k))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        assert self.covariance is not None
        parameters = list(self.covariance.parameters())
        if self._make_optimizer is None:
            return AIREML(parameters)
        if isinstance(self._make_optimizer, Mapping):
            return build(dict(self._make_optimizer), "optimizer", parameters)
        return self._make_optimizer(parameters)

    # ------------------------------------------------------------------ training

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The negative (restricted) log-likelihood, divided by the number of rows."""
        assert self.loss is not None
        self._data = (batch["y"], batch["x"])
        loss = self.loss(batch["y"], batch["x"])
        size = len(batch["y"])
        self.log("train_loss", loss, True, on_step=False, on_epoch=True, batch_size=size)
        return loss

    def on_train_epoch_end(self) -> None:
        """Record and log the variance components."""
        assert self.covariance is not None
        value = float(self._objective().evaluate().log_likelihood)
        optimizer = self.trainer.optimizers[0]
        step = optimizer.last[1:3] if isinstance(optimizer, AIREML) and optimizer.last else ()
        record = Record.of(self.covariance, value, *step)
        self.history.append(record)
        self.log_dict({"log_likelihood": value, **record.parameters})

    def on_train_end(self) -> None:
        """Compute the result and store BLUEs and BLUPs."""
        self._store()

    def score_norm(self) -> float:
        """Distance to the optimum in standard errors of the parameters."""
        with torch.no_grad():
            curvature = Curvature([self._objective()])
        return float("inf") if curvature.stuck else curvature.norm

    def _objective(self) -> Objective:
        assert self.loss is not None and self._data is not None
        return self.loss.objective(*self._data)

    def _store(self) -> None:
        assert self._encoded is not None and self.loss is not None and self._data is not None
        self._keep(
            outcome(
                self._objective(),
                self.loss.plan,
                *self._data,
                self.history,
                self._encoded.names,
                labels_of(self._encoded),
            )
        )

    def adopt(self, encoder: Encoder, skeleton: Encoded, result: Result) -> None:
        """Take the estimates of a fit that was made elsewhere, such as chunk by chunk.

        Args:
            encoder: what the formula learned.
            skeleton: designs of the sizes of the fit.
            result: the fit.
        """
        self.encoder = encoder
        self._build(skeleton)
        assert self.covariance is not None
        stored = {estimate.name: estimate.untransformed for estimate in result.parameters}
        with torch.no_grad():
            for entry in self.covariance.parameter_entries().free:
                entry.tensor.fill_(stored[entry.name])
        self._keep(result)

    def _keep(self, result: Result) -> None:
        """Store a result with its BLUEs and BLUPs."""
        self.result = result
        self.beta.zero_()
        fixed = result.fixed
        self.beta[list(fixed.columns)] = fixed.estimate
        self.aliases.zero_()
        self.aliases[:, : fixed.aliases.shape[1]] = fixed.aliases
        # The terms stand in the order of the designs, whose names may hold what a path may not.
        assert self._encoded is not None
        for name, effects in zip(
            (design.name for design in self._encoded.random), self.result.random, strict=True
        ):
            getattr(self, _buffer("blup", name)).copy_(effects.values)
            getattr(self, _buffer("variance", name)).copy_(effects.variances)

    # ------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the formula learned, and BLUPs at the present parameters."""
        if self.covariance is None:
            return
        if self._data is not None:
            self._store()
        checkpoint["state_dict"] = self.state_dict()
        checkpoint["mixed_model"] = {
            "encoder": self.encoder.learned.to_dict(),
            "rows": self.covariance.shape[0],
            "columns": len(self.beta),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Build a module of the checkpoint's shapes, if there is none."""
        kept = checkpoint["mixed_model"]
        if self.covariance is None:
            self.encoder.learned = Learned.from_dict(kept["encoder"])
            self._build(self.encoder.skeleton(kept["rows"], kept["columns"]))

    # ------------------------------------------------------------------ prediction

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        r"""Predictions for encoded rows.

        Returns:
            ``mean`` :math:`x^\top\hat\beta + \sum_t z_t^\top \hat b_t`, with no
            contribution from levels that were not seen, and
            ``population_mean`` :math:`x^\top\hat\beta`; NaN where the data do not say what that
            is, as in a cell of an interaction that they lack.
        """
        x = batch["x"]
        population = torch.where(estimable(x, self.aliases), x @ self.beta, torch.nan)
        mean = population.clone()
        for name, codes in batch["groups"].items():
            blup = getattr(self, _buffer("blup", name))[codes.clamp(min=0)]
            mean += torch.where(codes >= 0, (batch["values"].get(name, 1) * blup).sum(1), 0)
        return {"mean": mean, "population_mean": population}

    def predict(self, table: pd.DataFrame) -> pd.DataFrame:
        """Predictions for a table, with its index; rows with missing values are left out.

        Raises:
            InputError: if a column is missing or a level of a fixed factor is unknown.
            ValueError: if the module was neither fitted nor loaded.
        """
        check_instance("table", table, pd.DataFrame, "a data frame")
        if self.covariance is None:
            raise ValueError("the module has no estimates: fit it or load a checkpoint")
        encoded = self.encoder.transform(table)
        batch = move_data_to_device(encoded.batch(), self.device)
        with torch.no_grad():
            found = self.predict_step(batch, 0)
        columns = {key: value.cpu().numpy() for key, value in found.items()}
        return pd.DataFrame(columns, index=table.index[encoded.rows])


def _buffer(what: str, name: str) -> str:
    """Name of a buffer of a random effect: torch takes no dots, which R's names often have."""
    return f"{what}_{name.replace('%', '%25').replace('.', '%2E')}"
