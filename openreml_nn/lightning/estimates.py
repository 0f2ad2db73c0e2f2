"""The covariance and the BLUPs during a fit, beside the network that is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning import Trainer
from torch import Tensor

from openreml_nn.estimation.aireml import AIREML, Curvature
from openreml_nn.estimation.starts import climb
from openreml_nn.lightning.marginal import Marginal
from openreml_nn.lightning.reading import Store, mark, read, state
from openreml_nn.lightning.table import TableModel
from openreml_nn.lightning.ways import Linear, Way
from openreml_nn.model import MixedModel
from openreml_nn.result import Record, Result

__all__ = ["Estimates", "MarginalEstimates"]

#: How the names of the memory of a way of training begin, beside those of the model's state.
_WAY = "way/"


class Estimates:
    """What a fit knows of the rows, and where the covariance stands.

    Within training the covariance moves by what each epoch has kept of its batches. What is
    validated and saved is another state: after a pass over the rows at the present parameters of
    the network, an AI-REML step and the BLUPs. Training goes on from where it was.

    Args:
        trainer: of the fit.
        model: whose covariance and BLUPs they are.
        way: of training.
        has_network: whether a network is trained. Without one there is nothing to read anew.

    Attributes:
        aireml: moves the covariance; None where its parameters are another optimizer's, or fixed.
        history: a :class:`Record` for each step of the covariance.
        rows: what is kept of this epoch's batches; None before the first epoch.
    """

    def __init__(self, trainer: Trainer, model: MixedModel, way: Way, has_network: bool) -> None:
        self._trainer, self._model, self._way = trainer, model, way
        self._has_network = has_network
        self.aireml: AIREML | None = None
        self.history: list[Record] = []
        self.rows: Store | None = None
        # Each with the mark of the network's parameters that it belongs to.
        self._gathered: tuple[Tensor, Any] | None = None
        self._settled: tuple[Tensor, dict[str, Tensor]] | None = None
        self._training: dict[str, Tensor] | None = None

    # ------------------------------------------------------------------ training

    def begin_epoch(self) -> None:
        """Forget the rows of the epoch before."""
        self.resume()  # if the fit was thought to be over
        model = self._model
        if self._way.needs_blups and model.head == "gls" and not bool(model.joint.is_known):
            self._present(mark(model)).update()  # the features have no coefficients yet
        self._way.begin_epoch(self._model)
        self.rows = self._way.rows(self._model)

    def step(self, optimizer: Any = None) -> None:
        """Move the covariance by the rows of the epoch, and the BLUPs where training needs them.

        Args:
            optimizer: takes the step in the place of :attr:`aireml`, which it wraps.
        """
        assert self.rows is not None
        gathered: Any = self.rows.gathered()
        objective = gathered.objective
        if self.aireml is not None:
            (optimizer or self.aireml).step(lambda: objective)
            assert self.aireml.last is not None
            self.history.append(Record.of(objective.covariance, *self.aireml.last[:3]))
        else:
            value = float(objective.evaluate().log_likelihood)
            if optimizer is not None:
                optimizer.step(lambda: value)
            self.history.append(Record.of(objective.covariance, value))
        if self._way.needs_blups:
            gathered.update()
        # With a network they are of its parameters as each batch met them.
        self._gathered = None if self._has_network else (mark(self._model), gathered)

    @property
    def count(self) -> int:
        """How many rows there were, without a network, at the last step."""
        assert self._gathered is not None
        return int(self._gathered[1].count)

    def score_norm(self) -> float:
        """Distance of the covariance to its optimum in standard errors of the parameters."""
        if self._gathered is None:
            return float("inf")
        with torch.no_grad():
            curvature = Curvature([self._gathered[1].objective])
        return float("inf") if curvature.stuck else curvature.norm

    # ------------------------------------------------------------------ the present parameters

    def _present(self, at: Tensor) -> Any:
        """What is kept of all rows at the present parameters of the network."""
        if self._gathered is None or not torch.equal(self._gathered[0], at):
            empty = self._way.rows(self._model)
            found = read(self._trainer, self._model, empty, self._way.output)
            self._gathered = at, found
        return self._gathered[1]

    def settled(self) -> dict[str, Tensor]:
        """The state of covariance and BLUPs that is validated and saved."""
        at = mark(self._model)
        if self._settled is not None and torch.equal(self._settled[0], at):
            return self._settled[1]
        before = state(self._model)
        try:
            # What follows must not be tensors of inference mode, in which validation may run.
            with torch.inference_mode(False), torch.enable_grad():
                gathered = self._present(at)
                if self.aireml is not None and self._has_network:
                    self.aireml.step(lambda: gathered.objective)
                gathered.update()
                self._settled = at, state(self._model)
        finally:
            self.load(before)
        return self._settled[1]

    def training(self) -> dict[str, Tensor]:
        """The state that training goes on from, the memory of its way included."""
        own = state(self._model) if self._training is None else self._training
        return {**own, **{_WAY + key: value for key, value in self._way.memory().items()}}

    def show(self) -> None:
        """Give the model the state that is validated, until :meth:`resume`."""
        settled = self.settled()
        self._training = state(self._model) if self._training is None else self._training
        self.load(settled)

    def resume(self) -> None:
        """Give the model the state of training again."""
        if self._training is not None:
            self.load(self._training)
            self._training = None

    def load(self, given: Mapping[str, Tensor]) -> None:
        """Take up a state."""
        own = {key: value for key, value in given.items() if not key.startswith(_WAY)}
        with torch.inference_mode(False):
            self._model.load_state_dict(own, strict=False)
        where = self._model.beta.device  # a checkpoint's tensors are on the CPU
        memory = {key.removeprefix(_WAY): given[key].to(where) for key in given if key not in own}
        self._way.remember(memory)

    def finish(self, most: int, conclude: Callable[[Any], None]) -> None:
        """Bring the covariance to its optimum for the present mean, with its BLUPs; once.

        Args:
            most: steps.
            conclude: what is then done with what is kept of the rows.
        """
        at = mark(self._model)
        if self._training is not None:
            if self._settled is not None and torch.equal(self._settled[0], at):
                return
            self.resume()
        self._training = state(self._model)
        gathered = self._present(at)
        self.optimise(gathered, most)
        gathered.update()
        self._settled = mark(self._model), state(self._model)
        conclude(gathered)

    def optimise(self, gathered: Any, most: int) -> None:
        """Bring what is not the network's to its optimum, by so many steps at most."""
        if self.aireml is not None and (self._has_network or isinstance(self._way, Linear)):
            self.history += climb(gathered.objective, most)


class MarginalEstimates(Estimates):
    """Where a model with a family stands.

    With a network all parameters are the optimizer's, and at the end what is not the network's is
    brought to its optimum. Without one the first epoch fits the model, as :func:`glmm` does.

    Args:
        trainer, model, way, has_network: see :class:`Estimates`.
        table: of a model of a formula.
    """

    def __init__(
        self,
        trainer: Trainer,
        model: MixedModel,
        way: Way,
        has_network: bool,
        table: TableModel | None,
    ) -> None:
        super().__init__(trainer, model, way, has_network)
        self._table = table

    def step(self, optimizer: Any = None) -> None:
        """Say where the likelihood stands; without a network fit the model."""
        assert self.rows is not None
        gathered: Any = self.rows.gathered()
        if self._has_network:
            self.history.append(gathered.record())
            self._gathered = None
            return
        assert optimizer is not None
        self.history += optimizer.step(lambda: self._fitted(gathered)).history
        self._gathered = mark(self._model), gathered
        self._trainer.should_stop = True

    def score_norm(self) -> float:
        """Distance to the optimum in standard errors, where the model was fitted."""
        fitted = None if self._gathered is None else getattr(self._gathered[1], "fitted", None)
        return float("inf") if fitted is None else fitted.score_norm

    def optimise(self, gathered: Any, most: int) -> None:
        if gathered.fitted is None:
            self.history += self._fitted(gathered).history

    def _fitted(self, gathered: Marginal) -> Result:
        limits = (self._trainer.max_epochs, self._trainer.max_steps)
        own = [] if self._has_network else [m for m in limits if m is not None and m > 0]
        return gathered.fit(self._table, min(own, default=200))
