"""A neural mixed model as a Lightning module."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from lightning import LightningModule
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor
from torch.utils.data import DataLoader

from openreml_nn.estimation.aireml import Step, average_information_step
from openreml_nn.estimation.result import Estimate, REMLResult
from openreml_nn.instantiate import build
from openreml_nn.model import MixedModel, Prediction, take

__all__ = ["NeuralMixedModule"]

MakeOptimizer = Mapping[str, Any] | Callable[[Iterable[Tensor]], torch.optim.Optimizer]


class NeuralMixedModule(LightningModule):
    r"""Trains a :class:`MixedModel`: any optimizer for the network, AI-REML for the covariance.

    By Henderson's equations the maximum over the mean of the likelihood is that of

    .. math:: -\tfrac12\Bigl[\lVert y - f(x) - Zb \rVert^2_{R^{-1}} + b^\top G^{-1} b\Bigr]

    over the mean and b together. So ``"alternating"`` training takes the two in
    turn: an epoch of ordinary mini-batches of least squares on
    :math:`y - Z\hat b`, then the exact BLUPs and an AI-REML step from all rows. An epoch costs little
    more than that of a network without groups. ``"full"`` training takes one step an epoch
    on the likelihood itself, from all rows, and ``"parts"`` the same step with the network
    run on ``rows`` at a time.

    Args:
        model: the model; with ``"alternating"`` its head is ``"ml"``.
        data: all training rows as a batch of the model.
        optimizer: a config such as ``{"_target_": "torch.optim.Adam", "lr": 0.01}``, or a
            function from parameters to an optimizer.
        training: ``"alternating"``, ``"full"`` or ``"parts"``.
        rows: rows of a mini-batch, or of a part.

    Attributes:
        steps: what each AI-REML step saw and did.

    Raises:
        ValueError: if ``training`` is unknown or does not fit the head.

    Reference:
        Henderson, Biometrics 31 (1975) 423, eq. 2; Robinson, Statistical Science 6 (1991) 15.
    """

    def __init__(
        self,
        model: MixedModel,
        data: Mapping[str, Any],
        optimizer: MakeOptimizer,
        training: str = "alternating",
        rows: int = 1024,
    ) -> None:
        super().__init__()
        if training not in ("alternating", "full", "parts"):
            raise ValueError(
                f"`training` is {training!r}: expected 'alternating', 'full' or 'parts'"
            )
        if training == "alternating" and model.head != "ml":
            raise ValueError("alternating training is for head 'ml': use training='parts'")
        self.model = model
        self.training_way = training
        self.rows = rows
        self.steps: list[Step] = []
        self._make_optimizer = optimizer
        self._rows_of_data = data
        self._offset: Tensor | None = None
        self.automatic_optimization = False

    def train_dataloader(self) -> DataLoader[Any]:
        """The numbers of all rows: an epoch is one batch."""
        return DataLoader([torch.arange(len(self._rows_of_data["y"]))], batch_size=None)  # type: ignore[arg-type]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        parameters = list(self.model.network_parameters())
        if isinstance(self._make_optimizer, Mapping):
            return build(dict(self._make_optimizer), "optimizer", parameters)
        return self._make_optimizer(parameters)

    def on_fit_start(self) -> None:
        """Move the data to the module's device."""
        self._rows_of_data = move_data_to_device(dict(self._rows_of_data), self.device)

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        """An epoch of the network: one step, or one for each mini-batch in a new order."""
        if self.training_way == "full":
            loss = self._step(partial(self.model.loss, self._rows_of_data))
        elif self.training_way == "parts":
            optimizer = self._optimizer()
            optimizer.zero_grad()
            loss = self.model.backward_in_parts(self._rows_of_data, self.rows)
            optimizer.step()
        else:
            order = batch[torch.randperm(len(batch), device=batch.device)]
            losses = [self._step(partial(self._squares, at)) for at in order.split(self.rows)]
            loss = torch.stack(losses).mean()
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch))

    def _optimizer(self) -> Any:
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        return optimizer

    def _step(self, function: Callable[[], Tensor]) -> Tensor:
        optimizer = self._optimizer()
        optimizer.zero_grad()
        loss = function()
        self.manual_backward(loss)
        optimizer.step()
        return loss.detach()

    def _squares(self, at: Tensor) -> Tensor:
        """Least squares of some rows, less their random effects."""
        data = self._rows_of_data
        target = data["y"][at] if self._offset is None else data["y"][at] - self._offset[at]
        output = self.model({"x": take(data["x"], at)})
        return torch.nn.functional.mse_loss(output, target.to(output.dtype))

    def on_train_epoch_end(self) -> None:
        """An AI-REML step of the covariance, and the BLUPs that go with it."""
        objective = self.model.objective(self._rows_of_data)
        step = average_information_step([objective], list(self.model.covariance_parameters()))
        self.steps.append(step)
        self.log("log_likelihood", step.log_likelihood)
        if self.training_way == "alternating":
            self.model.update(self._rows_of_data)
            with torch.no_grad():
                self._offset = self.model.random_part(self._rows_of_data)
                # At the optimum intercepts' BLUPs have no mean: it is the network's to learn, which
                # takes it up far faster from here than from under a penalty.
                for effect in self.model.intercepts():
                    self._offset -= effect.blup.mean()
        schedulers = self.lr_schedulers()
        for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
            if scheduler is not None:
                scheduler.step()

    def on_train_end(self) -> None:
        """Bring the covariance to its optimum for the final mean, and store the BLUPs."""
        objective = self.model.objective(self._rows_of_data)
        for _ in range(50):
            step = average_information_step([objective], list(self.model.covariance_parameters()))
            self.steps.append(step)
            if step.converged or step.length == 0:
                break
        self.model.update(self._rows_of_data)

    def variances(self) -> tuple[Estimate, ...]:
        """Covariance parameters at the present mean, with standard errors."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss, y, X = self.model._data(self.model(self._rows_of_data), self._rows_of_data)
            objective = loss.objective(y.detach(), X.detach())
        return REMLResult.of(objective, loss.plan, y.detach(), X.detach()).parameters

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> Prediction:
        """Predictions of a batch."""
        return self.model.predict(batch)
