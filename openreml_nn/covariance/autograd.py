"""The one custom autograd function: closed-form gradients wired into backprop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["ClosedForm"]


class _Function(Protocol):
    """A function of free parameters that come leaf by leaf, with its derivatives."""

    def value(self, parts: Sequence[Tensor], like: Tensor) -> Tensor: ...

    def pull_back(self, cotangent: Tensor, parts: Sequence[Tensor]) -> list[Tensor]: ...

    def push_forward(
        self, tangents: Sequence[Tensor | None], parts: Sequence[Tensor]
    ) -> Tensor: ...


class ClosedForm(torch.autograd.Function):
    r"""Build :math:`V(\theta)` without recording; pull cotangents back in closed form.

    Forward evaluates the tree with no graph. Backward maps the cotangent
    :math:`\bar V` to :math:`\bar\theta_i = \langle \bar V, \partial V/\partial\theta_i\rangle`
    by :meth:`Tree.pull_back`; forward mode maps a tangent by
    :meth:`Tree.push_forward`. Both are ordinary tensor expressions of what
    they are given, so that double backward and ``torch.func`` transforms
    differentiate through them. The free parameters come leaf by leaf.
    """

    generate_vmap_rule = True

    @classmethod
    def of(cls, tree: _Function, parts: Sequence[Tensor]) -> Tensor:
        """The value of a tree at free parameters, leaf by leaf."""
        if torch._C._are_functorch_transforms_active():
            return cls.apply(tree, *parts)
        # The same without torch's look at the signature, which takes longer than a small matrix.
        return super(torch.autograd.Function, cls).apply(tree, *parts)  # type: ignore[misc]

    @staticmethod
    def forward(tree: _Function, *parts: Tensor) -> Tensor:
        # Forward mode refuses a view, such as a transpose, as the output of a custom function.
        return tree.value(parts, parts[0][:0]).contiguous()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        tree, *parts = inputs
        ctx.tree = tree
        ctx.save_for_backward(*parts)
        ctx.save_for_forward(*parts)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.tree.pull_back(cotangent, ctx.saved_tensors)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Tensor:
        return ctx.tree.push_forward(tangents, ctx.saved_tensors)
