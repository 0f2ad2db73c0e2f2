"""What the processes of a ``torch.distributed`` group have between them.

Where every process holds all rows, it runs the network on every so-manieth of them, and what the
networks yield is gathered, so that each process has the likelihood of all rows: the same loss,
gradients and estimates as one process. Where each has rows of its own, their likelihood is that of
the rows of all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning import Trainer
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, distributed
from torch.utils._pytree import tree_flatten
from torch.utils.data.distributed import DistributedSampler

from openreml_nn.support.errors import InputError
from openreml_nn.support.warning import warn

__all__ = [
    "all_batches",
    "are_same",
    "check_same",
    "checksum",
    "gather",
    "gather_parts",
    "processes",
    "share",
    "total",
    "warn_of_repeats",
]


def _rank() -> tuple[int, int]:
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def processes() -> int:
    """How many there are."""
    return _rank()[1]


def share() -> slice:
    """The rows of this process, of those that all hold."""
    rank, size = _rank()
    return slice(rank, None, size)


def total(count: int, device: torch.device) -> int:
    """The sum of a count over the processes."""
    if processes() == 1:
        return count
    found = torch.tensor(count, device=device)
    distributed.all_reduce(found)
    return int(found)


def gather(own: Tensor, rows: int) -> Tensor:
    """All processes' outputs in the order of the rows, ``own`` those of :func:`share`.

    The gradient that comes back is that of all rows' loss by this process's outputs, times the
    number of processes, for gradients that are averaged over them.
    """
    rank, size = _rank()
    if size == 1:
        return own
    counts = [len(range(i, rows, size)) for i in range(size)]
    parts = _Gather.apply(own, rank, counts)
    order = torch.cat([torch.arange(i, rows, size) for i in range(size)]).argsort()
    return parts[order.to(own.device)]


def gather_parts(own: Tensor) -> Tensor:
    """All processes' outputs of rows of their own, one process after the other; gradients as in
    :func:`gather`."""
    rank, size = _rank()
    if size == 1:
        return own
    counts: list[Any] = [None] * size
    distributed.all_gather_object(counts, len(own))
    return _Gather.apply(own, rank, counts)


def all_batches(batch: Mapping[str, Any], device: torch.device) -> list[Mapping[str, Any]]:
    """The batches that the processes have, in their order."""
    size = processes()
    if size == 1:
        return [batch]
    found: list[Any] = [None] * size
    distributed.all_gather_object(found, move_data_to_device(batch, "cpu"))
    return [move_data_to_device(part, device) for part in found]


def check_same(batch: Mapping[str, Any]) -> None:
    """Refuse rows that differ between processes that must hold the same ones.

    Raises:
        InputError: on all of them, if content or order differs.
    """
    if processes() == 1:
        return
    own = (len(batch["y"]), {str(key): checksum(value) for key, value in batch.items()})
    found: list[Any] = [None] * processes()
    distributed.all_gather_object(found, own)
    sizes = [size for size, _ in found]
    if len(set(sizes)) > 1:
        raise InputError(
            f"the processes hold {', '.join(map(str, sizes))} rows: this way of training needs the "
            "same rows in the same order on each"
        )
    for key in own[1]:
        if len({sums.get(key) for _, sums in found}) > 1:
            raise InputError(
                f"the processes hold other rows, or the same in another order (`{key}` differs): "
                "this way of training needs the same rows in the same order on each; was the "
                "table shuffled or split without a seed?"
            )


def are_same(batch: Mapping[str, Any] | None) -> bool:
    """Whether all processes have the same batch; None stands for something else than one."""
    if processes() == 1:
        return batch is not None
    own = None if batch is None else {str(key): checksum(x) for key, x in batch.items()}
    found: list[Any] = [None] * processes()
    distributed.all_gather_object(found, own)
    return own is not None and all(other == own for other in found)


def warn_of_repeats(trainer: Trainer) -> None:
    """Say how many rows a sampler repeats so that all processes have as many."""
    loader: Any = trainer.train_dataloader
    sampler = getattr(loader, "sampler", None)
    if not isinstance(sampler, DistributedSampler) or loader.batch_size is None:
        return
    n, size = len(sampler.dataset), sampler.total_size  # type: ignore[arg-type]
    if size > n and trainer.is_global_zero:
        warn(
            f"the sampler repeats {size - n} of {n} training rows, so that all processes have as "
            "many: these count twice"
        )


def checksum(value: Any) -> str:
    """A number that tells tensors in containers from others."""
    found = hashlib.blake2b(digest_size=16)
    leaves, spec = tree_flatten(value)
    found.update(str(spec).encode())
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            flat = leaf.detach().cpu().contiguous().reshape(-1)
            found.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
            found.update(flat.view(torch.uint8).numpy().tobytes())
        else:
            found.update(repr(leaf).encode())
    return found.hexdigest()


class _Gather(torch.autograd.Function):
    """Rows of all processes, one process after the other."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, rank: int, counts: Sequence[int]) -> Tensor:
        size, most = len(counts), max(counts)
        start = sum(counts[:rank])
        ctx.own, ctx.size = slice(start, start + counts[rank]), size
        padded = own.new_zeros(most, *own.shape[1:])
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in range(size)]
        distributed.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None, None]:
        return cotangent[ctx.own] * ctx.size, None, None
