"""All rows as one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from openreml_nn.estimation.outcome import outcome
from openreml_nn.lightning.sharing import are_same
from openreml_nn.lightning.summed import Summed
from openreml_nn.lightning.sums import LevelSums
from openreml_nn.lightning.table import TableModel
from openreml_nn.likelihood.loss import Objective, REMLLoss
from openreml_nn.likelihood.plan import Plan
from openreml_nn.model import MixedModel
from openreml_nn.model.several import coded_rows
from openreml_nn.result.result import Record, Result
from openreml_nn.support.errors import InputError

__all__ = ["Held", "HeldOrSummed"]


class Held:
    """The batch of an epoch, which holds all rows, with what the network has yielded for it.

    Args:
        model: the model.
    """

    def __init__(self, model: MixedModel) -> None:
        self._model = model
        self._batch: Mapping[str, Any] | None = None
        self._output: Tensor | None = None

    def add(self, batch: Mapping[str, Any], output: Tensor) -> None:
        """Take the batch.

        Raises:
            InputError: if there was one before.
        """
        if self._batch is not None:
            raise InputError(
                "the loader yields several batches: this way of training takes all rows in one, "
                "as of DataLoader([batch], batch_size=None); mini-batches are for "
                "training='alternating', for 'groups' or 'composite' with head 'ml', or for a "
                "linear mean, without `training`"
            )
        self._batch, self._output = batch, output.detach()

    def gathered(self) -> Held:
        """Itself: all processes hold all rows.

        Raises:
            InputError: if there was no batch.
        """
        if self._batch is None:
            raise InputError("the training loader yielded no rows: expected some")
        return self

    @cached_property
    def data(self) -> tuple[REMLLoss, Tensor, Tensor]:
        """The likelihood with its y and X."""
        assert self._batch is not None and self._output is not None
        with torch.no_grad(), torch.autocast(self._output.device.type, enabled=False):
            return self._model.data(self._output, self._batch)

    @cached_property
    def objective(self) -> Objective:
        """The likelihood in the covariance parameters."""
        loss, y, X = self.data
        with torch.autocast(y.device.type, enabled=False):
            return loss.objective(y, X)

    @property
    def plan(self) -> Plan:
        """How it is computed."""
        assert self.objective is not None
        return self.data[0].plan

    @property
    def count(self) -> int:
        """How many rows there are."""
        return self.objective.problem.n

    def update(self) -> None:
        """Store coefficients, BLUPs and what their variances need in the model."""
        assert self._batch is not None and self._output is not None
        with torch.autocast(self._output.device.type, enabled=False):
            self._model.update(self._batch, self._output)

    def result(self, history: Sequence[Record], table: TableModel | None) -> Result:
        """The result at the present parameters."""
        _, y, X = self.data
        names, labels = (None, {}) if table is None else (table.names(X.shape[1]), table.labels)
        return outcome(self.objective, self.plan, y, X, history, names, labels)


class HeldOrSummed:
    """Rows for a mean without parameters to train: a batch that holds all of them as it is, and of
    several the sums by level, from which the likelihood follows as exactly.

    Args:
        model: the model.
    """

    def __init__(self, model: MixedModel) -> None:
        self._model = model
        self._first: tuple[Mapping[str, Any], Tensor] | None = None
        self._sums: LevelSums | None = None

    def add(self, batch: Mapping[str, Any], output: Tensor) -> None:
        """Take a batch.

        Raises:
            InputError: if it is not the only one, and the model needs all rows at once.
        """
        if self._first is None and self._sums is None:
            # They may be summed up with the next batch only, whose fault theirs is not.
            coded_rows(self._model.effects(), batch, len(output))
            self._first = batch, output
            return
        self._to_sums().add(batch, output)

    def _to_sums(self) -> LevelSums:
        if self._sums is None:
            self._sums = LevelSums(self._model)
            if self._first is not None:
                self._sums.add(*self._first)
                self._first = None
        return self._sums

    def gathered(self) -> Held | Summed:
        """All rows. Processes that each have the same single batch hold all rows in it; else each
        has rows of its own.

        Raises:
            InputError: if there was no batch.
        """
        if not are_same(None if self._first is None else self._first[0]):
            return self._to_sums().gathered()
        assert self._first is not None
        held = Held(self._model)
        held.add(*self._first)
        return held
