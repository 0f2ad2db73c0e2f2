"""A pass over the training rows without gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from openreml_nn.lightning.held import Held, HeldOrSummed
from openreml_nn.lightning.marginal import Marginal
from openreml_nn.lightning.rows import as_batch, blamed
from openreml_nn.lightning.sums import LevelSums
from openreml_nn.model import MixedModel
from openreml_nn.model.batch import Batch, responding
from openreml_nn.support.errors import InputError

__all__ = ["Store", "mark", "of_networks", "read", "refuse_single_pass", "state"]

#: What is kept of an epoch's batches.
Store = LevelSums | Held | HeldOrSummed | Marginal


def read(
    trainer: Trainer,
    model: MixedModel,
    store: Store,
    output: Callable[[MixedModel, Batch], Tensor],
) -> Any:
    """What is kept of the training rows at the present parameters.

    The loader is read from its start, as many batches as an epoch has, with the random numbers
    that it would have next: neither they nor an iterator that is at work move on.

    Args:
        trainer: whose training loader is read.
        model: the model, in evaluation mode for the pass.
        store: an empty one, for what is kept.
        output: what the network yields for a batch.
    """
    loader: Any = trainer.train_dataloader
    if isinstance(loader, DataLoader) and loader.persistent_workers:
        loader = copy.copy(loader)
        loader._iterator = None
    most = trainer.num_training_batches
    limit = None if most == float("inf") else int(most)
    plugin = trainer.precision_plugin
    with isolate_rng(), torch.no_grad(), _evaluating(model):
        for i, batch in enumerate(islice(loader, limit)):
            batch = plugin.convert_input(batch)
            batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
            # After a fit the model is on the CPU again, wherever the trainer was.
            batch = trainer.strategy.batch_to_device(batch, model.beta.device, dataloader_idx=0)
            with blamed("training", i):
                batch, rows = responding(as_batch(batch, model), model.responses > 1)
                if rows is not None and not len(rows):
                    continue  # none of them has a response
                with plugin.forward_context():
                    found = output(model, batch)
                store.add(batch, found)
    return store.gathered()


def refuse_single_pass(loaders: Any, name: str, reader: str) -> None:
    """Refuse a loader that is exhausted when it was read once.

    Args:
        loaders: a loader, or a collection of some.
        name: of the loader, for the error.
        reader: what reads it again.

    Raises:
        InputError: if one is a generator, or another iterator.
    """
    for loader in tree_leaves(loaders):
        if isinstance(loader, Iterator):
            raise InputError(
                f"{name} is a {type(loader).__name__}, which is exhausted when it was read once: "
                f"expected one that each {reader} can read anew, such as a DataLoader or a list of batches"
            )


def of_networks(model: MixedModel) -> tuple[str, ...]:
    """How the names of the networks' parameters and buffers begin."""
    found = [f"random.{name}.features." for name, _ in model.random.named_children()]
    own = {id(p) for p in model.covariance_parameters()}
    residual = list(model.residual.parameters())
    is_network = bool(residual) and model.family is None and not any(id(p) in own for p in residual)
    return (*found, "mean.", *(["residual."] if is_network else []))


def state(model: MixedModel) -> dict[str, Tensor]:
    """A copy of what is not the networks': the covariance and what was computed with it."""
    networks = of_networks(model)
    return {
        key: value.detach().clone()
        for key, value in model.state_dict().items()
        if not key.startswith(networks)
    }


def mark(model: MixedModel) -> Tensor:
    """Numbers that change when a parameter or buffer of the networks changes; with a family, any
    parameter, as all are the optimizer's. They are sums of bits, the same on every device."""
    networks = of_networks(model)
    parameters = dict(model.named_parameters())
    named: Mapping[str, Tensor] = {**parameters, **dict(model.named_buffers())}
    trained = set(parameters) if model.family is not None else set()
    found = {k: v for k, v in named.items() if k in trained or k.startswith(networks)}
    sums = []
    for value in found.values():
        bits = value.detach().double().reshape(-1).view(torch.int64)
        place = torch.arange(1, 2 * len(bits), 2, device=bits.device)
        sums += [bits.sum(), (bits * place).sum()]
    return torch.stack(sums).cpu() if sums else torch.zeros(0, dtype=torch.int64)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Without dropout and the like, for a while; each part is then as it was."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
