"""Derivatives of a few small tensors by a few parameters.

By reverse mode alone: ``torch.func.jacfwd`` would do, but what it imports on
first use takes longer than many a fit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["expand", "hessian_of_value", "jacobian", "second_derivative"]

Function = Callable[[Tensor], tuple[Tensor, ...]]


def jacobian(function: Function, u: Tensor) -> list[Tensor]:
    r""":math:`\partial f_t / \partial u` of each output, (m, \*shape)."""
    with torch.enable_grad():
        weights, slope, _ = _pulled(function, u)
        return _by_weights(list(slope), weights)


def second_derivative(function: Function, u: Tensor, j: int) -> list[Tensor]:
    r""":math:`\partial^2 f_t / \partial u_j^2` of each output, in its shape."""
    with torch.enable_grad():
        weights, slope, x = _pulled(function, u)
        (bend,) = torch.autograd.grad(slope[j], x, create_graph=True, materialize_grads=True)
        return [part[0] for part in _by_weights([bend[j]], weights)]


def expand(
    function: Function, weights: Sequence[Tensor], u: Tensor
) -> tuple[Tensor, Tensor, list[Tensor]]:
    r"""Gradient (m,) and Hessian (m, m) of :math:`\sum_t \langle w_t, f_t(u)\rangle`, and the
    :func:`jacobian`, from one record of the function."""
    with torch.enable_grad():
        leaves, slope, x = _pulled(function, u, weights)
        rows = [
            torch.autograd.grad(part, [x, *leaves], retain_graph=True, materialize_grads=True)
            if part.requires_grad
            else [torch.zeros_like(t) for t in (x, *leaves)]
            for part in slope
        ]
        if not rows:
            return slope.detach(), u.new_zeros(0, 0), [w.new_zeros(0, *w.shape) for w in weights]
        bend, *parts = [torch.stack(part).detach() for part in zip(*rows, strict=True)]
        return slope.detach(), bend, parts


def hessian_of_value(
    function: Callable[[Tensor], Tensor], u: Tensor, others: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor]:
    """Gradient (m,) and Hessian (m, m) of a scalar, by u and then by other leaves it depends on."""
    with torch.enable_grad():
        x = u.detach().requires_grad_()
        leaves = [x, *others]
        slopes = torch.autograd.grad(
            function(x), leaves, create_graph=True, allow_unused=True, materialize_grads=True
        )
        slope = torch.cat([part.reshape(-1).to(u) for part in slopes])
        rows = []
        for part in slope:
            found: Sequence[Tensor] = [torch.zeros_like(leaf) for leaf in leaves]
            if part.requires_grad:
                found = torch.autograd.grad(
                    part, leaves, retain_graph=True, allow_unused=True, materialize_grads=True
                )
            rows.append(torch.cat([f.reshape(-1).to(u) for f in found]).detach())
        return slope.detach(), torch.stack(rows) if rows else u.new_zeros(0, 0)


def _pulled(
    function: Function, u: Tensor, at: Sequence[Tensor] | None = None
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Weights, the gradient of the outputs' sum under them, linear in them, and its argument."""
    x = u.detach().requires_grad_()
    outputs = function(x)
    values = [torch.zeros_like(out) for out in outputs] if at is None else at
    weights = [value.detach().requires_grad_() for value in values]
    (slope,) = torch.autograd.grad(
        _contracted(outputs, weights), x, create_graph=True, materialize_grads=True
    )
    return weights, slope, x


def _contracted(outputs: tuple[Tensor, ...], weights: list[Tensor]) -> Tensor:
    return torch.stack([(out * w).sum() for out, w in zip(outputs, weights, strict=True)]).sum()


def _by_weights(parts: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    """Derivatives of parts that are linear in the weights, stacked for each weight."""
    rows = [
        torch.autograd.grad(
            part, weights, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        if part.requires_grad
        else [torch.zeros_like(w) for w in weights]
        for part in parts
    ]
    return [
        torch.stack([row[t] for row in rows]).detach()
        if rows
        else w.detach().new_zeros(0, *w.shape)
        for t, w in enumerate(weights)
    ]
