"""Optimizers and schedulers from configs or functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor
from torch.optim import LBFGS, SGD, Adagrad, Optimizer, SparseAdam
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from openreml_nn.estimation.aireml import AIREML
from openreml_nn.model import MixedModel
from openreml_nn.support.checks import check_instance
from openreml_nn.support.errors import InputError
from openreml_nn.support.instantiate import build

__all__ = [
    "Counted",
    "MakeOptimizer",
    "MakeScheduler",
    "is_aireml",
    "optimizers_of",
    "refuse_averaging",
    "refuse_gradient_options",
    "refuse_layouts",
    "scheduled",
]

MakeOptimizer = Mapping[str, Any] | Callable[[Iterable[Tensor]], Optimizer]
MakeScheduler = Mapping[str, Any] | Callable[[Optimizer], Any]


class Counted(Optimizer):
    """Steps that another takes, such as the whole fit of :func:`glmm`: a Trainer counts them, and
    writes checkpoints where it has counted some.

    Args:
        params: those that are moved, maybe none.
    """

    def __init__(self, params: Iterable[Any]) -> None:
        # LearningRateMonitor asks every optimizer for it: that of a full step.
        super().__init__([{"params": list(params)}], {"lr": 1.0})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Call the closure, which takes the step."""
        assert closure is not None
        return closure()


def is_aireml(make: MakeOptimizer | None) -> bool:
    """Whether a model without a network moves by AI-REML, as by default."""
    if isinstance(make, Mapping):
        return str(make.get("_target_")).endswith("AIREML")
    return make is None or make is AIREML


def optimizers_of(
    model: MixedModel, make: MakeOptimizer | None, has_network: bool
) -> tuple[Optimizer, AIREML | None]:
    """The optimizer of the network, or without one that of the covariance; and AI-REML for the
    covariance, None where it is another optimizer's, or fixed.

    Raises:
        InputError: if AI-REML is to train a network.
    """
    covariance = [p for p in model.covariance_parameters() if p.requires_grad]
    network = [p for p in model.network_parameters() if p.requires_grad]
    if not has_network and (model.family is not None or not covariance):
        return Counted([*network, *covariance]), None
    if model.family is not None:
        # The gradients of all are exact, and there are no average-information steps.
        made = _optimizer(make or torch.optim.Adam, [*network, *covariance])
        if isinstance(made, AIREML):
            raise InputError(
                "`optimizer` is AIREML, which is for Gaussian responses: expected another, such as "
                "torch.optim.Adam"
            )
        return made, None
    default = torch.optim.Adam if network else AIREML
    made = _optimizer(make or default, network or covariance)
    if not isinstance(made, AIREML):
        return made, AIREML(covariance) if network and covariance else None
    if network:
        raise InputError(
            "`optimizer` is AIREML, which is for the covariance, where it is the default: the "
            "network needs another, such as torch.optim.Adam"
        )
    # LearningRateMonitor asks every optimizer for it: that of a full step.
    made.param_groups[0].setdefault("lr", 1.0)
    return made, made


def scheduled(optimizer: Optimizer, make: MakeScheduler) -> dict[str, Any]:
    """An optimizer with its scheduler, as Lightning takes them.

    Raises:
        InputError: if the optimizer is AI-REML.
    """
    if isinstance(optimizer, AIREML | Counted):
        raise InputError("`scheduler` has no effect on AIREML, which has no learning rate")
    found: dict[str, Any] = {"scheduler": _made(make, "scheduler", LRScheduler, optimizer)}
    if isinstance(found["scheduler"], ReduceLROnPlateau):
        found["monitor"] = "train_loss"
    return {"optimizer": optimizer, "lr_scheduler": found}


def refuse_gradient_options(trainer: Trainer) -> None:
    """Refuse the Trainer's options of gradients where nothing is trained by them.

    Raises:
        InputError: if there is one.
    """
    for name, without in (("gradient_clip_val", 0), ("accumulate_grad_batches", 1)):
        value = getattr(trainer, name)
        if value not in (None, without):
            raise InputError(
                f"Trainer({name}={value}) has no effect: no network is trained by gradients"
            )

    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, StochasticWeightAveraging):
            raise InputError(
                "Trainer(callbacks=[StochasticWeightAveraging]) has no network's parameters to "
                "average: no network is trained by gradients"
            )


def refuse_layouts(optimizer: Optimizer, named: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse gradients in a layout that an optimizer of torch does not take.

    Args:
        optimizer: which is about to take a step.
        named: the parameters by name.

    Raises:
        InputError: if it has one.
    """
    # What Lightning hands over may be a wrapper.
    kind = type(getattr(optimizer, "optimizer", optimizer))
    wants_sparse = issubclass(kind, SparseAdam)
    takes_both = issubclass(kind, SGD | Adagrad | LBFGS) or kind.__module__[:11] != "torch.optim"
    if takes_both and not wants_sparse:
        return
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        grad = parameter.grad
        if grad is None or grad.is_sparse == wants_sparse:
            continue
        name = next((name for name, p in named if p is parameter), "a parameter")
        found, other = ("dense", "Adam") if wants_sparse else ("sparse", "SGD or Adagrad")
        raise InputError(
            f"`optimizer` is {kind.__name__}, but the gradient of {name!r} is {found}: expected "
            f"another, such as torch.optim.{other}"
        )


def refuse_averaging(trainer: Trainer) -> None:
    """Refuse Lightning's callbacks that average all of a module, BLUPs and their index included.

    Raises:
        InputError: if there is one.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging):
            raise InputError(
                f"Trainer(callbacks=[{type(callback).__name__}]) averages BLUPs and covariances of "
                "several networks, which are those of none: expected StochasticWeightAveraging, "
                "which averages the network's parameters alone"
            )


def _made(make: Any, what: str, wants: type, *args: Any) -> Any:
    if isinstance(make, Mapping):
        return build(dict(make), what, wants, *args)
    made = make(*args)
    check_instance(f"{what}(...)", made, wants, f"an {wants.__name__}")
    return made


def _optimizer(make: MakeOptimizer, params: list[Any]) -> Optimizer:
    """The optimizer of parameters, which may leave out some of them.

    Raises:
        TypeError, InputError: if it is none, or moves none of them.
    """
    made: Optimizer = _made(make, "optimizer", Optimizer, params)
    own = {id(p) for p in params}
    if not any(id(p) in own for group in made.param_groups for p in group["params"]):
        raise InputError(
            "`optimizer` makes one that moves none of the model's parameters: expected those that "
            "it is called with"
        )
    return made
