"""A neural mixed model as a Lightning module."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from types import NoneType
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.data import DataLoader

from openreml_nn.estimation.aireml import AIREML
from openreml_nn.estimation.fit import iterate
from openreml_nn.estimation.outcome import outcome
from openreml_nn.lightning.batches import connected_rows, in_order, whole
from openreml_nn.lightning.sharing import average_gradients, gather, share
from openreml_nn.likelihood.loss import Objective
from openreml_nn.metrics import gaussian_negative_log_density, interval_coverage
from openreml_nn.model import HEADS, MixedModel, Prediction, take
from openreml_nn.result.result import Estimate, Record
from openreml_nn.support.checks import (
    check_choice,
    check_count,
    check_instance,
    check_maker,
    check_mapping,
    check_number,
)
from openreml_nn.support.errors import InputError
from openreml_nn.support.instantiate import build

__all__ = ["NeuralMixedModule"]

MakeOptimizer = Mapping[str, Any] | Callable[[Iterable[Tensor]], Optimizer]
MakeScheduler = Mapping[str, Any] | Callable[[Optimizer], Any]

TRAINING = ("alternating", "full", "parts", "groups", "composite")


class NeuralMixedModule(LightningModule):
    r"""Trains a :class:`MixedModel`: any optimizer for the network, AI-REML for the covariance.

    The training data are one batch of all rows; an epoch is one pass over them, with an
    AI-REML step of the covariance, from all rows, at its end. What the network does in between:

    =============== ==================================================================
    ``training``    an epoch of the network
    =============== ==================================================================
    ``full``        one step on the likelihood of all rows
    ``parts``       the same step, the network run on ``rows`` at a time, twice
    ``groups``      a step for each mini-batch of about ``rows`` rows that cuts no group:
                    their likelihoods add up to that of all rows
    ``composite``   a step for each mini-batch of ``rows`` random rows: a composite
                    likelihood, which cuts groups
    ``alternating`` a step of least squares on :math:`y - Z\hat b` for each mini-batch of
                    ``rows`` random rows, then the exact BLUPs
    =============== ==================================================================

    Alternating training has the same optimum as the likelihood, by Henderson's equations:
    its maximum over the mean is that of

    .. math:: -\tfrac12\Bigl[\lVert y - f(x) - Zb \rVert^2_{R^{-1}} + b^\top G^{-1} b\Bigr]

    over the mean and b together. An epoch costs little more than that of a network without groups.

    Under a distributed strategy each process runs the network on its share of the rows,
    and loss, gradients and estimates are those of one process.

    Args:
        model: the model; its head is ``"ml"`` in training by mini-batches. None in a subclass
            that builds it from the data.
        data: all training rows as a batch of the model, where no data module gives them.
        optimizer: of the network: a config such as ``{"_target_": "torch.optim.Adam", "lr":
            0.01}``, or a function from parameters to an optimizer; Adam by default.
        training: see above.
        rows: rows of a mini-batch, or of a part.
        scheduler: of the learning rate, stepped each epoch: a config, or a function from the
            optimizer.
        covariance_optimizer: AI-REML by default, which also brings the covariance to its
            optimum when training ends.
        clip: largest norm of the network's gradient.
        seed: of the order of the rows.

    Attributes:
        history: a :class:`Record` for each step of the covariance.

    Raises:
        ValueError: if an option is unknown or does not fit the head.

    Reference:
        Henderson, Biometrics 31 (1975) 423, eq. 2; Robinson, Statistical Science 6 (1991) 15.
    """

    model: MixedModel

    def __init__(
        self,
        model: MixedModel | None,
        data: Mapping[str, Any] | None = None,
        optimizer: MakeOptimizer | None = None,
        training: str = "alternating",
        rows: int = 1024,
        scheduler: MakeScheduler | None = None,
        covariance_optimizer: MakeOptimizer | None = None,
        clip: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_instance("model", model, (MixedModel, NoneType), "a MixedModel")
        if data is not None:
            check_mapping("data", data)
            for key in ("x", "y", "groups"):
                if key not in data:
                    raise InputError(f"`data` has no {key!r}: expected 'x', 'y' and 'groups'")
        check_choice("training", training, TRAINING)
        rows = check_count("rows", rows, 1)
        makers = {"optimizer": optimizer, "scheduler": scheduler}
        makers["covariance_optimizer"] = covariance_optimizer
        for name, make in makers.items():
            if make is not None:
                check_maker(name, make)
        if clip is not None:
            check_number("clip", clip, above=0)
        seed = check_count("seed", seed)
        self.training_way = training
        self.rows = rows
        self.clip = clip
        self.seed = seed
        self.history: list[Record] = []
        self._make_optimizer = optimizer
        self._make_scheduler = scheduler
        self._make_covariance_optimizer = covariance_optimizer
        self._given = data
        self._rows_of_data: Mapping[str, Any] | None = None
        self._sets: Tensor | None = None
        self._random_numbers: dict[str, Tensor] = {}
        self.automatic_optimization = False
        if model is not None:
            self._adopt(model)

    def _check_head(self, head: str) -> None:
        check_choice("head", head, HEADS)
        if self.training_way not in ("full", "parts") and head != "ml":
            raise ValueError(
                f"{self.training_way} training is for head 'ml': head 'gls' takes its coefficients "
                "from all rows, by training='full' or 'parts'"
            )

    def _adopt(self, model: MixedModel) -> None:
        """Take the model in, once it fits the way of training."""
        self._check_head(model.head)
        self.model = model
        # Every process computes the covariance's gradients, and the BLUPs, from all rows.
        own = {id(p) for p in model.covariance_parameters()}
        ignored = [name for name, p in self.named_parameters() if id(p) in own]
        computed = ("model.random.", "model.beta", "model.joint.")
        ignored += [name for name, _ in self.named_buffers() if name.startswith(computed)]
        self._ddp_params_and_buffers_to_ignore = ignored

    # ------------------------------------------------------------------ set-up

    def train_dataloader(self) -> DataLoader[Any]:
        """The rows that the module was made with, as one batch."""
        if self._given is None:
            raise ValueError("there are no training rows: pass `data`, or a data module to fit()")
        return DataLoader([self._given], batch_size=None)  # type: ignore[arg-type]

    def configure_optimizers(self) -> Any:
        covariance = list(self.model.covariance_parameters())
        found: list[dict[str, Any]] = []
        if parameters := list(self.model.network_parameters()):
            make: Any = self._make_optimizer or torch.optim.Adam
            optimizer = _made(make, "optimizer", Optimizer, parameters)
            found.append({"optimizer": optimizer})
            if self._make_scheduler is not None:
                found[0]["lr_scheduler"] = _made(
                    self._make_scheduler, "scheduler", LRScheduler, optimizer
                )
        if covariance:
            make = self._make_covariance_optimizer or AIREML
            found.append({"optimizer": _made(make, "covariance_optimizer", Optimizer, covariance)})
        return found

    def on_fit_start(self) -> None:
        """Forget the rows and the random numbers of an earlier fit, unless it is resumed."""
        self._rows_of_data = self._sets = None
        if self.trainer.ckpt_path is None:
            self._random_numbers = {}

    # ------------------------------------------------------------------ training

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """An epoch of the network, then a step of the covariance."""
        if batch_idx:
            raise ValueError(
                "the training data have several batches: expected one of all rows, which "
                "`training` and `rows` divide"
            )
        if self._rows_of_data is None:
            # Kept, because a prepared likelihood knows its tensors by identity.
            self._rows_of_data = batch
        data = self._rows_of_data
        with self._own_random_numbers():
            loss = self._epoch(data)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(data["y"]))
        self._move_covariance(data)
        if self.training_way == "alternating" or self.trainer.enable_validation:
            self._update(data)
        self._move_schedulers(loss)

    def _epoch(self, data: Mapping[str, Any]) -> Tensor:
        if not any(True for _ in self.model.network_parameters()):
            return self._objective(data).evaluate().log_likelihood / -len(data["y"])
        if self.training_way in ("full", "parts"):
            return self._step(partial(self._all_rows, data))
        losses = [self._step(partial(self._some_rows, data, at)) for at in self._batches()]
        return torch.stack(losses).mean()

    @contextmanager
    def _own_random_numbers(self) -> Iterator[None]:
        """A stream of random numbers that nothing else draws from, so that a resumed run goes on
        where it was."""
        on_gpu = self.device.type == "cuda"
        with torch.random.fork_rng([self.device] if on_gpu else []):
            if "cpu" in self._random_numbers:
                torch.set_rng_state(self._random_numbers["cpu"].cpu())
            if on_gpu and "cuda" in self._random_numbers:
                torch.cuda.set_rng_state(self._random_numbers["cuda"].cpu(), self.device)
            yield
            self._random_numbers = {"cpu": torch.get_rng_state()}
            if on_gpu:
                self._random_numbers["cuda"] = torch.cuda.get_rng_state(self.device)

    def _step(self, gradient: Callable[[], Tensor]) -> Tensor:
        """A step of the network's optimizer on what accumulates a gradient and returns its loss."""
        optimizer: Any = self.optimizers()
        optimizer = optimizer[0] if isinstance(optimizer, list) else optimizer
        found: list[Tensor] = []

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = gradient().detach()
            average_gradients(self.model.network_parameters())
            if self.clip is not None:
                self.clip_gradients(optimizer, self.clip, "norm")
            found.append(loss)
            return loss

        optimizer.step(closure=closure)
        return found[0]

    def _all_rows(self, data: Mapping[str, Any]) -> Tensor:
        if self.training_way == "parts":
            return self.model.backward_in_parts(data, self.rows, share(), gather, self._backward)
        loss = self.model.loss_of(self._output(data["x"], len(data["y"])), data)
        self._backward(loss)
        return loss

    def _some_rows(self, data: Mapping[str, Any], at: Tensor) -> Tensor:
        output = self._output(take(data["x"], at), len(at))
        if self.training_way == "alternating":
            target = data["y"][at] - self._offset[at]
            loss = torch.nn.functional.mse_loss(output, target.to(output.dtype))
        else:
            part = take(data, at)
            for name, codes in part["groups"].items():
                if bool((codes == codes[0]).all()):
                    raise ValueError(
                        f"a mini-batch of {len(at)} rows has one level of {name!r}, whose variance "
                        f"cannot be told from the mean: raise `rows`, which is {self.rows}"
                    )
            loss = self.model.loss_of(output, part)
        self._backward(loss)
        return loss

    def _batches(self) -> list[Tensor]:
        """The rows of this epoch's mini-batches."""
        assert self._rows_of_data is not None
        # From the epoch, so that a resumed run takes the order of an uninterrupted one.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.current_epoch)
        groups = self._rows_of_data["groups"]
        if self.training_way == "groups":
            if self._sets is None:
                self._sets = self._connected(groups)
            return whole(self._sets, self.rows, generator)
        if self.training_way == "alternating":
            self._offset = self._random_part()
        y = self._rows_of_data["y"]
        return in_order(len(y), self.rows, generator, y.device)

    def _connected(self, groups: Mapping[str, Tensor]) -> Tensor:
        effects = self.model.effects()
        if correlated := [name for name, effect in effects.items() if not effect.is_per_level]:
            raise ValueError(
                f"the levels of {correlated[0]!r} are correlated, so that no mini-batch is "
                "independent of the others: use training='parts', 'alternating' or 'composite'"
            )
        sets = connected_rows({name: groups[name] for name in effects})
        if int(sets.max()) == 0:
            raise ValueError(
                "all rows hang together through their groups, which training='groups' cannot "
                "divide: use 'parts', 'alternating' or 'composite'"
            )
        return sets

    def _random_part(self) -> Tensor:
        assert self._rows_of_data is not None
        with torch.no_grad():
            offset = self.model.random_part(self._rows_of_data)
            # At the optimum intercepts' BLUPs have no mean: it is the network's to learn, which
            # takes it up far faster from here than from under a penalty.
            for effect in self.model.intercepts():
                offset -= effect.blup.mean()
        return offset

    def _output(self, x: Any, n: int) -> Tensor:
        """What the network yields for n rows, each process running its share."""
        return gather(self.model({"x": take(x, share())}), n)

    def _outputs(self, data: Mapping[str, Any]) -> Tensor:
        """The same for all rows, ``rows`` at a time, without recording or dropout."""
        return gather(self.model.outputs(take(data["x"], share()), self.rows), len(data["y"]))

    def _objective(self, data: Mapping[str, Any]) -> Objective:
        return self.model.objective(data, self._outputs(data))

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Without the wrapper's own averaging, which does not know of rows that are shared."""
        wrapper = self.trainer.model
        with getattr(wrapper, "no_sync", nullcontext)():
            yield

    def _backward(self, loss: Tensor) -> None:
        with self._alone():
            self.manual_backward(loss)

    def _move_covariance(self, data: Mapping[str, Any]) -> None:
        if not any(True for _ in self.model.covariance_parameters()):
            return
        optimizer = self.trainer.optimizers[-1]
        output = self._outputs(data)

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = loss(y, X)
            if not isinstance(optimizer, AIREML):
                value.backward()
            return value

        # Precision is the network's: the covariance is estimated in that of the data.
        with torch.autocast(self.device.type, enabled=False):
            loss, y, X = self.model.data(output, data)
            found = -float(optimizer.step(closure)) * len(y)  # type: ignore[arg-type]
        if isinstance(optimizer, AIREML) and optimizer.last is not None:
            found = optimizer.last.log_likelihood
            self.history.append(Record.of(loss.covariance, *optimizer.last[:3]))
        else:
            self.history.append(Record.of(loss.covariance, found))
        self.log_dict({"log_likelihood": found, **self.history[-1].parameters})

    def _update(self, data: Mapping[str, Any]) -> None:
        output = self._outputs(data)
        with torch.autocast(self.device.type, enabled=False):
            self.model.update(data, output)

    def _move_schedulers(self, loss: Tensor) -> None:
        schedulers: Any = self.lr_schedulers() or []
        for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
            if isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step(loss)
            else:
                scheduler.step()

    def on_train_end(self) -> None:
        """Bring the covariance to its optimum for the final mean, and store the BLUPs."""
        data = self._rows_of_data
        if data is None:
            return
        if any(isinstance(optimizer, AIREML) for optimizer in self.trainer.optimizers):
            self.history += iterate(self._objective(data), 50)
        self._update(data)

    # ------------------------------------------------------------------ evaluation

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Mean squared error, negative log density and coverage of 95% intervals."""
        if self.trainer.sanity_checking:
            self.model(batch)  # there are no coefficients and BLUPs yet
            return
        found = self.model.predict(batch)
        y = batch["y"].to(found.mean)
        values = {
            "val_mse": ((found.mean - y) ** 2).mean(),
            "val_negative_log_density": gaussian_negative_log_density(
                found.mean, found.variance, y
            ),
            "val_coverage": interval_coverage(found.mean, found.variance, y),
        }
        self.log_dict(values, batch_size=len(y), sync_dist=True)

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> Prediction:
        """Predictions of a batch."""
        return self.model.predict(batch)

    def variances(self) -> tuple[Estimate, ...]:
        """Covariance parameters at the present mean, with standard errors, after training."""
        data = self._rows_of_data
        if data is None:
            raise ValueError("there are no training rows yet: variances() is for after a fit")
        loss, y, X = self.model.data(self._outputs(data), data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return outcome(loss.objective(y, X), loss.plan, y, X).parameters

    # ------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the state of the random numbers, such as dropout's, for a run that is resumed."""
        checkpoint["random_numbers"] = self._random_numbers

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take them up."""
        self._random_numbers = checkpoint["random_numbers"]


def _made(make: Any, what: str, wants: type, *args: Any) -> Any:
    return build(make, what, wants, *args) if isinstance(make, Mapping) else make(*args)
