"""A mixed model as a Lightning module."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from openreml_nn.estimation.basis import history_in_user_basis
from openreml_nn.families import FAMILIES, Family
from openreml_nn.families.named import as_asked
from openreml_nn.lightning.data import MixedModelDataModule, attached
from openreml_nn.lightning.estimates import Estimates, MarginalEstimates
from openreml_nn.lightning.evaluation import Evaluated
from openreml_nn.lightning.held import Held
from openreml_nn.lightning.marginal import Marginal
from openreml_nn.lightning.optimizers import (
    Counted,
    MakeOptimizer,
    MakeScheduler,
    is_aireml,
    optimizers_of,
    refuse_averaging,
    refuse_gradient_options,
    refuse_layouts,
    scheduled,
)
from openreml_nn.lightning.reading import of_networks, refuse_single_pass
from openreml_nn.lightning.rows import Responses, as_batch, blamed, row_count
from openreml_nn.lightning.sharing import check_same, total, warn_of_repeats
from openreml_nn.lightning.summed import Summed
from openreml_nn.lightning.table import Network, TableModel, is_plain
from openreml_nn.lightning.ways import Linear, Way, way_of
from openreml_nn.model import MixedModel
from openreml_nn.model.batch import Batch
from openreml_nn.model.constraints import Constraint
from openreml_nn.model.level_means import warn_of_level_means
from openreml_nn.result import Record, Result
from openreml_nn.support.checks import check_count, check_instance, check_maker
from openreml_nn.support.errors import InputError
from openreml_nn.support.instantiate import unwrapped

__all__ = ["MixedModule"]

#: AI-REML steps that bring the covariance to its optimum at the end of a fit.
_LAST_STEPS = 50


class MixedModule(Evaluated):
    r"""Trains a mixed model: any optimizer for the network, AI-REML for the covariance.

    ``trainer.fit(module, train_loader, val_loader)`` takes any loader of mini-batches: dicts with
    ``x``, ``y``, ``groups`` and perhaps ``values`` and ``weights``, or tuples (x, y, group). Each
    epoch reads it anew. What an epoch keeps of the rows are sums by level, and at its end come an
    AI-REML step of the covariance and the BLUPs, from all of its rows:

    =============== ==================================================================
    ``training``    a step of the network
    =============== ==================================================================
    ``alternating`` weighted least squares on :math:`y - Z\hat b` of a mini-batch
    ``composite``   the likelihood of a mini-batch of any rows, which cuts groups
    ``groups``      that of a mini-batch that cuts no group: they add up to that of all rows
    ``full``        the likelihood of all rows, which one batch holds
    ``parts``       the same, the network run on ``rows`` at a time
    =============== ==================================================================

    Within an epoch the sums are of the residuals of each batch at the parameters of that time.
    Before a validation, before a checkpoint and at the end a pass without gradients computes the
    sums at the present parameters. An AI-REML step from these (at the end: as many as reach the
    optimum) gives the covariance and the BLUPs that are validated or saved. Validations and
    checkpoints do not change the training that follows.

    Under a distributed strategy loss, gradients and estimates are those of one process that has
    all rows.

    Args:
        model: a :class:`MixedModel`, or an lme4-style formula; with that, training is on a
            :class:`MixedModelDataModule`, from whose table the model is built when fitting
            begins, and from its checkpoint when that is loaded.
        optimizer: of the network: a config such as ``{"_target_": "torch.optim.Adam", "lr":
            0.01}``, or a function from parameters to an optimizer; Adam by default. Without a
            network it is the covariance's, by default AI-REML, a step an epoch.
        training: see above, or a :class:`Way`; by default ``"alternating"`` for head ``"ml"``, ``"full"``
            for ``"gls"`` and for families, which alternating training does not support. A linear
            mean without a network (head ``"gls"``) is estimated without gradients: its rows may come
            in mini-batches of any size, and the result is that of all rows at once.
        network: with a formula: config of the network, or the network, that takes the columns of
            its fixed part, standardised, and yields features; see :class:`torch.nn.LazyLinear` for
            their number. The intercept's is one of them, 0 in all rows; ``y ~ 0 + …`` leaves it out.
            Without one the mean is linear.
        head: with a network: ``"ml"`` adds a linear layer that makes the mean of the features,
            ``"gls"`` takes them, and a constant, as X. A linear mean is of head ``"gls"``.
        residual: with a formula: structure of the residuals, as in :func:`lmm`; or a network, or its
            config, whose features of the fixed part's columns make the log-variance of each row; or
            a matrix, see :class:`MixedModel`.
        weights: with a formula: column of weights, as in :func:`lmm`.
        family: with a formula: of the response, as in :func:`glmm`. All parameters are then trained by
            the marginal likelihood of a batch, by default of all rows; without a network the fit is
            that of :func:`glmm`, in the first epoch, by as many steps at most as the Trainer's
            ``max_epochs`` or ``max_steps``, and the Trainer counts one.
        link, quadrature, zi: of the family, as in :func:`glmm`.
        categorical: with a formula: numeric columns to be taken as factors.
        constraints, starts: with a formula: of covariance parameters, as in :func:`lmm`.
        method, solver: with a formula: see :class:`MixedModel`.
        rows: rows of the mini-batches that a data module cuts the table into, and those of a part.
        scheduler: of the learning rate, stepped each epoch: a config, or a function from the
            optimizer.
        seed: of the order of a table's rows.

    Attributes:
        model: the :class:`MixedModel`.
        result: the :class:`Result`, after a fit.

    Raises:
        InputError: if an option is unknown or does not fit the others; when fitting, if a batch
            is invalid, whose number the message has.

    Example::

        module = MixedModule(MixedModel(network, {"user": RandomEffect(1000)}))
        Trainer(max_epochs=20).fit(module, DataLoader(TensorDataset(x, y, user), 256, shuffle=True))
        module.model.predict({"x": x, "groups": {"user": user}})
    """

    def __init__(
        self,
        model: MixedModel | str,
        optimizer: MakeOptimizer | None = None,
        training: str | Way | None = None,
        *,
        network: Network | None = None,
        head: str | None = None,
        residual: str | Network | None = None,
        weights: str | None = None,
        categorical: Sequence[str] = (),
        method: str | None = None,
        solver: str = "auto",
        family: str | Family | None = None,
        link: str | None = None,
        quadrature: int = 1,
        zi: str | None = None,
        constraints: Mapping[str, Constraint] | None = None,
        starts: Mapping[str, float] | None = None,
        rows: int = 1024,
        scheduler: MakeScheduler | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_instance("model", model, (MixedModel, str), "a MixedModel, or a formula")
        for name, make in (("optimizer", optimizer), ("scheduler", scheduler)):
            if make is not None:
                check_maker(name, make)
        check_instance("training", training, (str, Way, NoneType), "a word, or None")
        self.rows, self.seed = check_count("rows", rows, 1), check_count("seed", seed)
        family, link = as_asked(family, link)
        # Hydra hands over configs of its own, which no checkpoint is to hold.
        optimizer, scheduler = unwrapped(optimizer), unwrapped(scheduler)
        given = {
            "optimizer": optimizer,
            "training": training,
            "rows": rows,
            "scheduler": scheduler,
            "seed": seed,
        }
        of_table: dict[str, Any] = {
            "network": unwrapped(network), "head": head, "residual": unwrapped(residual),
            "weights": weights, "categorical": list(categorical), "method": method,
            "solver": solver, "family": family, "link": link, "quadrature": quadrature, "zi": zi,
            "constraints": unwrapped(constraints), "starts": unwrapped(starts),
        }  # fmt: skip
        self.table = None
        if isinstance(model, str):
            self.table = TableModel(model, **of_table)
            given |= {"model": model, **of_table}
            head, has_family = self.table.head, family is not None
        else:
            for name, value in of_table.items():
                if value not in (None, [], "auto", 1):
                    raise InputError(f"`{name}` is for a formula: the model has its own")
            head, has_family = model.head, model.family is not None
        # What a checkpoint can hold, so that it can be loaded with weights_only.
        self.save_hyperparameters({k: v for k, v in given.items() if is_plain(v)})
        self.way, self._is_default_way = (
            way_of(training, head, self.rows, has_family),
            training is None,
        )
        self.result: Result | None = None
        self._make_optimizer, self._make_scheduler = optimizer, scheduler
        self._random_numbers: dict[str, Tensor] = {}
        self._resumed_state: dict[str, Tensor] | None = None
        self._met: tuple[Batch, Tensor] | None = None
        self._estimates: Estimates | None = None
        if isinstance(model, MixedModel):
            self._adopt(model)

    @classmethod
    def of(cls, result: Result, **options: Any) -> MixedModule:
        """The module of a fit that was made elsewhere, by :func:`lmm` or :func:`glmm`: its
        checkpoint serves predictions.

        Args:
            result: the fit.
            **options: the fit's ``residual``, ``weights`` and ``categorical``, where it had them.

        Raises:
            InputError: if the result has no formula, and so cannot predict.
        """
        check_instance("result", result, Result)
        if result.formula is None or result.model is None:
            raise InputError("`result` has no formula: expected one of a fit by lmm()")
        model = copy.deepcopy(result.model)
        if result.family is not None:
            own = model.family.family if result.zi is not None else model.family
            options["family"] = own.name if own.name in FAMILIES else own
            options["link"], options["quadrature"] = result.link, result.quadrature
            options["zi"] = result.zi
        found = cls(result.formula, method=model.method, **options)
        assert found.table is not None
        found.table.adopt(result)
        found._adopt(model)
        found.result = result
        return found

    def _adopt(self, model: MixedModel) -> None:
        """Take the model in, once it fits the way of training."""
        own = set() if model.family is None else {id(p) for p in model.family.parameters()}
        trained = [p for p in model.network_parameters() if p.requires_grad and id(p) not in own]
        self.has_network = bool(trained)
        plain = model.head == "gls" and not self.has_network
        is_own = model.family is not None or is_aireml(self._make_optimizer)
        if self._is_default_way and plain and is_own:
            self.way = Linear(self.rows)
        self.way.check(model)
        self.model = model
        self.measure(model.family)
        if not self.has_network:
            if model.family is not None and not (
                self._make_optimizer is None and self._make_scheduler is None
            ):
                raise InputError(
                    "`optimizer` and `scheduler` have no effect on a family without a network, "
                    "which quasi-Newton steps fit: leave them out"
                )
            return
        # Every process computes the covariance, and the BLUPs, from all rows.
        networks = of_networks(model)
        # With a family the covariance's parameters are the optimizer's, like the network's.
        named = [
            *(model.named_parameters() if model.family is None else ()),
            *model.named_buffers(),
        ]
        names = [name for name, _ in named]
        self._ddp_params_and_buffers_to_ignore = [
            f"model.{name}" for name in names if not name.startswith(networks)
        ]

    @property
    def lr(self) -> float:
        """The learning rate in the config of the optimizer, which a tuner may set."""
        make = self._make_optimizer
        if make is not None and not isinstance(make, Mapping):
            raise AttributeError("the optimizer is a function, whose learning rate is its own")
        return float((make or {}).get("lr", 1e-3))

    @lr.setter
    def lr(self, value: float) -> None:
        make = self._make_optimizer or {"_target_": "torch.optim.Adam"}
        if not isinstance(make, Mapping):
            raise AttributeError("the optimizer is a function, whose learning rate is its own")
        self._make_optimizer = {**make, "lr": value}

    # ------------------------------------------------------------------ set-up

    def setup(self, stage: str) -> None:
        """Build the model of a formula from the data module's table."""
        self._is_configured = False
        if stage != "fit" and not hasattr(self, "model") and self.trainer.ckpt_path is None:
            raise InputError("the module has no estimates: fit it or load a checkpoint")
        if stage == "fit":
            refuse_averaging(self.trainer)
            data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
            if self.table is not None:
                data = attached(self)
                if hasattr(self, "model"):
                    self.table.attach(data)
                else:
                    self._adopt(self.table.built(data))
            if isinstance(data, MixedModelDataModule):
                data.divide(self.way.division if self.way.cuts_tables else None, self.seed)
            # Without a network AI-REML takes its steps when a batch has been met.
            moves = any(p.requires_grad for p in self.model.covariance_parameters())
            is_own = moves and not is_aireml(self._make_optimizer)
            if is_own and not self.has_network and self.way.needs_blups:
                raise InputError(
                    "`optimizer` has nothing to train: `training` is 'alternating', which trains "
                    "the network, and its parameters are fixed; leave `optimizer` out, for AI-REML, "
                    "or use training='full'"
                )
            self.automatic_optimization = self.has_network or is_own

    def configure_optimizers(self) -> Any:
        """The optimizer of the network, or without one that of the covariance."""
        made, self._aireml = optimizers_of(self.model, self._make_optimizer, self.has_network)
        self._is_configured = True
        return [made] if self._make_scheduler is None else scheduled(made, self._make_scheduler)

    def on_fit_start(self) -> None:
        """Begin anew, or where a resumed run was."""
        trainer = self.trainer
        self._estimates = None
        if not self._is_configured:
            raise InputError(
                "`configure_optimizers` was replaced, and says nothing of AI-REML: expected MixedModule("
                "optimizer=…), and LightningCLI(MixedModule, auto_configure_optimizers=False)"
            )
        if not self.automatic_optimization:
            refuse_gradient_options(trainer)
        if trainer.ckpt_path is None:
            self._random_numbers, self._resumed_state = {}, None
        if "cpu" in self._random_numbers:
            torch.set_rng_state(self._random_numbers["cpu"].cpu())
        if "cuda" in self._random_numbers and self.device.type == "cuda":
            torch.cuda.set_rng_state(self._random_numbers["cuda"].cpu(), self.device)

    def on_train_start(self) -> None:
        """Say how many rows a sampler repeats, and take up the state of a resumed run."""
        if not isinstance(self.way, Linear):
            refuse_single_pass(self.trainer.train_dataloader, "the training loader", "epoch")
        warn_of_repeats(self.trainer)
        self._met, self._checked = None, False
        self._covariance = list(self.model.covariance_parameters())
        self._responses = Responses(not self.way.needs_all_rows, self.model.responses > 1)
        self._estimates = self._begun()
        self._known.aireml = self._aireml
        if self._resumed_state is not None:
            self._known.load(self._resumed_state)
            self._resumed_state = None

    # ------------------------------------------------------------------ training

    def on_train_epoch_start(self) -> None:
        """Forget the rows of the epoch before."""
        self._known.begin_epoch()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """The loss of a batch by the way of training."""
        if self._known.rows is None:
            raise InputError(
                "the checkpoint was saved within an epoch, and does not hold the rows that it had "
                "met: resume from one of an epoch's end"
            )
        with blamed("training", batch_idx):
            batch = as_batch(batch, self.model)
            if self.way.needs_all_rows and not self._checked:
                check_same(batch)
                self._checked = True
            batch = self._responses.of(batch, batch_idx)
            count = total(row_count(batch["y"]), self.device)
            loss = self._loss(batch) if count else None
        if loss is not None:
            # Reduced here and not when it is shown: a progress bar, which only the first process
            # has, would wait for the others.
            mean = self.trainer.strategy.reduce(loss.detach(), reduce_op="mean")
            shown = {"prog_bar": True, "on_step": False, "on_epoch": True}
            self.log("train_loss", mean, batch_size=count, **shown)  # type: ignore[arg-type]
        if self.automatic_optimization:
            return loss
        self._keep(batch_idx)
        if self.trainer.is_last_batch:
            self._known.step(self.optimizers())
        return None

    def _loss(self, batch: Batch) -> Tensor | None:
        with torch.set_grad_enabled(self.automatic_optimization and torch.is_grad_enabled()):
            loss, output = self.way.loss(self.model, batch)
        self._met = batch, output.detach()
        return loss

    def on_after_backward(self) -> None:
        """Drop the covariance's gradients, which no optimizer asks for."""
        if self.has_network and self.model.family is None:
            for parameter in self._covariance:
                parameter.grad = None

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Refuse gradients that the optimizer does not take."""
        refuse_layouts(optimizer, self.named_parameters())

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Add the batch to the sums of the epoch."""
        self._keep(batch_idx)
        if self.automatic_optimization and not self.has_network and self.trainer.is_last_batch:
            self._known.step()

    def _keep(self, batch_idx: int) -> None:
        if self._met is None:
            return
        assert self._known.rows is not None
        with blamed("training", batch_idx):
            self._known.rows.add(*self._met)
        self._met = None

    def on_train_epoch_end(self) -> None:
        """Move the covariance by the sums of the epoch; in the last one end the fit, so that its
        checkpoint is that of the end."""
        self._responses.tell(self.trainer.is_global_zero, self.device)
        if self.has_network or not self.history:
            self._known.step()
        record = self.history[-1]
        shown = {"log_likelihood": record.log_likelihood, **record.parameters}
        self.log_dict(shown, sync_dist=True)
        if isinstance(self.way, Linear):
            loss = -record.log_likelihood / self._known.count
            self.log("train_loss", loss, prog_bar=True, sync_dist=True)
        trainer = self.trainer
        by_epochs = trainer.max_epochs not in (None, -1) and (
            trainer.current_epoch + 1 >= trainer.max_epochs
        )
        by_steps = trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps
        if by_epochs or by_steps or trainer.should_stop:
            self._known.finish(_LAST_STEPS, self._conclude)

    def on_train_end(self) -> None:
        """Bring the covariance to its optimum for the final mean, and store BLUPs and result."""
        self._known.finish(_LAST_STEPS, self._conclude)

    def on_fit_end(self) -> None:
        """The result of a run that had ended before it was resumed.

        Raises:
            InputError: if there was no batch to train with.
        """
        if self.trainer.num_training_batches == 0:
            raise InputError("the training loader yielded no rows: expected some")
        if self._estimates is None and self.trainer.ckpt_path is not None:
            self._estimates = self._begun()
            self._known.finish(0, self._conclude)

    def _begun(self) -> Estimates:
        given = self.trainer, self.model, self.way, self.has_network
        return (
            Estimates(*given)
            if self.model.family is None
            else MarginalEstimates(*given, self.table)
        )

    def _conclude(self, gathered: Summed | Held | Marginal) -> None:
        found = gathered.result(self._known.history, self.table)
        own = self.trainer.optimizers
        if own and not isinstance(own[0], Counted):
            found = replace(found, optimizer=type(own[0]).__name__)
        found = replace(found, model=copy.deepcopy(self.model))
        self.result = found if self.table is None else self.table.completed(found)
        if self.has_network and self.trainer.is_global_zero:
            warn_of_level_means(self.model.effects(), self.model.head)

    @property
    def _known(self) -> Estimates:
        assert self._estimates is not None
        return self._estimates

    @property
    def history(self) -> list[Record]:
        """A :class:`Record` for each step of the covariance in the last fit."""
        steps = [] if self._estimates is None else self._estimates.history
        bases = {} if self.table is None else self.table.bases
        if not bases:
            return steps
        return [replace(s, parameters=history_in_user_basis(s.parameters, bases)) for s in steps]

    def score_norm(self) -> float:
        """Distance of the covariance to its optimum in standard errors of the parameters."""
        return self._known.score_norm()

    # ------------------------------------------------------------------ evaluation

    def on_validation_start(self) -> None:
        """During a fit: validate what the rows say at the present parameters."""
        if self.trainer.state.fn == "fit":
            refuse_single_pass(self.trainer.val_dataloaders, "a validation loader", "validation")
        if self._is_within_fit() and not self.trainer.sanity_checking:
            self._known.show()

    def on_validation_end(self) -> None:
        """Go on as without the validation."""
        if self._is_within_fit():
            self._known.resume()

    def _is_within_fit(self) -> bool:
        fitting = self.trainer.state.fn == "fit"
        return fitting and self._estimates is not None and self._estimates.rows is not None

    # ------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what the rows say at the present parameters, and where training stands."""
        if not hasattr(self, "model"):
            return
        if self._estimates is not None and self._estimates.rows is not None:
            settled = self._estimates.settled()
            checkpoint["state_dict"] |= {f"model.{k}": v for k, v in settled.items()}
            checkpoint["training_state"] = self._estimates.training()
        checkpoint["random_numbers"] = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            checkpoint["random_numbers"]["cuda"] = torch.cuda.get_rng_state(self.device)
        if self.table is not None:
            checkpoint["table"] = self.table.to_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Build the model of a formula, if there is none."""
        self._random_numbers = checkpoint.get("random_numbers", {})
        self._resumed_state = checkpoint.get("training_state")
        if self.table is not None and not hasattr(self, "model"):
            self._adopt(self.table.from_dict(checkpoint["table"]))
