"""Rows that the processes of a ``torch.distributed`` group share.

Every process holds all rows; it runs the network on every so-manieth of them, and what the
networks yield is gathered, so that each process has the likelihood of all rows: the same loss,
gradients and estimates as one process.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, distributed

__all__ = ["average_gradients", "gather", "share"]


def _rank() -> tuple[int, int]:
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def share() -> slice:
    """The rows of this process."""
    rank, size = _rank()
    return slice(rank, None, size)


def gather(own: Tensor, rows: int) -> Tensor:
    """All processes' outputs in the order of the rows, ``own`` those of :func:`share`.

    The gradient that comes back is that of all rows' loss by this process's outputs, times the
    number of processes, for :func:`average_gradients`.
    """
    return own if _rank()[1] == 1 else _Gather.apply(own, rows)


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Average gradients over the processes."""
    size = _rank()[1]
    if size == 1:
        return
    for parameter in parameters:
        if parameter.grad is not None:
            distributed.all_reduce(parameter.grad)
            parameter.grad /= size


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, rows: int) -> Tensor:
        rank, size = _rank()
        ctx.own = slice(rank, None, size)
        ctx.size = size
        padded = own.new_zeros(-(-rows // size), *own.shape[1:])
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in range(size)]
        distributed.all_gather(parts, padded)
        return torch.stack(parts, 1).flatten(0, 1)[:rows]

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:
        return cotangent[ctx.own] * ctx.size, None
