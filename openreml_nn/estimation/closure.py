"""What the closure of an optimizer evaluates: its likelihoods, each with its weight in the value."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from openreml_nn.likelihood.loss import Heard, Objective

__all__ = ["depends_on", "refuse_unexplained", "watched", "weights_in"]

_BESIDE = (
    "the value that the closure returned depends on parameters of AIREML beside the "
    "likelihood: a penalty takes an optimizer of torch, such as LBFGS"
)


def depends_on(objective: Objective, owned: Sequence[Tensor]) -> bool:
    """Whether any of the parameters belongs to the likelihood's covariance."""
    mine = {id(p) for p in owned}
    return any(id(p) in mine for p in objective.covariance.parameters())


def weights_in(value: Any, heard: Sequence[Heard], owned: Sequence[Tensor]) -> list[float]:
    """The factor with which each loss is in the value, or was in a backward of the closure."""
    weights = [h.pulled or 0.0 for h in heard]
    if not (isinstance(value, Tensor) and value.requires_grad):
        return weights
    # What a backward has been through needs no second one, for which its graph may be gone.
    inside = [i for i in _losses_in(value, heard, owned) if heard[i].pulled is None]
    if not inside:
        return weights
    if value.numel() != 1:
        raise RuntimeError(f"the closure returned shape {tuple(value.shape)}: expected a scalar")
    found = torch.autograd.grad(value, [heard[i].value for i in inside], retain_graph=True)
    for i, part in zip(inside, found, strict=True):
        weights[i] = float(part)
    return weights


def _losses_in(value: Tensor, heard: Sequence[Heard], owned: Sequence[Tensor]) -> list[int]:
    """Positions of the losses that the value was computed from.

    Raises:
        RuntimeError: if autograd reaches a parameter from the value by a way that avoids them.
    """
    mine = {id(p) for p in owned}
    losses = {h.value.grad_fn: i for i, h in enumerate(heard)}
    found: list[int] = []
    seen: set[Any] = set()
    stack = [value.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in losses:
            found.append(losses[node])
            continue
        if id(getattr(node, "variable", None)) in mine:
            raise RuntimeError(_BESIDE)
        stack += [further for further, _ in node.next_functions]
    return found


@contextmanager
def watched(owned: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Gradients of parameters as backward passes find them, before anything is done to them."""
    gradients = [torch.zeros_like(p) for p in owned]

    def watch(i: int) -> Callable[[Tensor], None]:
        def see(gradient: Tensor) -> None:
            gradients[i] = gradients[i] + gradient.detach()

        return see

    handles = [p.register_hook(watch(i)) for i, p in enumerate(owned)]
    try:
        yield gradients
    finally:
        for handle in handles:
            handle.remove()


def refuse_unexplained(
    heard: Sequence[Heard],
    weights: Sequence[float],
    owned: Sequence[Tensor],
    gradients: Sequence[Tensor],
) -> None:
    """Raise if the gradients of a backward are not those of the losses in it.

    Where the closure returns a value without a graph, this is what tells of a penalty.
    """
    expected = [torch.zeros_like(p) for p in owned]
    noise = 0.0
    for h, weight in zip(heard, weights, strict=True):
        if not weight:
            continue
        parts = h.objective.gradient(owned)
        noise += abs(weight * h.scale) * h.objective.problem.n
        expected = [e + weight * h.scale * part for e, part in zip(expected, parts, strict=True)]
    for found, wanted in zip(gradients, expected, strict=True):
        eps = torch.finfo(found.dtype).eps
        room = eps**0.5 * (found.abs() + wanted.abs()) + 1e3 * eps * noise
        if bool(((found - wanted).abs() > room).any()):
            raise RuntimeError(_BESIDE)
