"""A value that autograd sees with the derivatives that were computed with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Attached"]


class Attached(torch.autograd.Function):
    """A value whose derivatives were computed with it."""

    @staticmethod
    def forward(
        ctx: Any,
        compute: Callable[[], tuple[Tensor, list[Tensor | None]]],
        *inputs: Tensor,
    ) -> Tensor:
        value, ctx.found = compute()
        ctx.save_for_backward(*inputs)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        found = [None if g is None else cotangent.to(g) * g for g in ctx.found]
        if torch.is_grad_enabled():
            found = [None if g is None else _Once.apply(g, *ctx.saved_tensors) for g in found]
        return None, *found


class _Once(torch.autograd.Function):
    """A derivative that has none itself."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *inputs: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        raise NotImplementedError(
            "LaplaceLoss is differentiable once: take differences of its gradients for second "
            "derivatives"
        )
