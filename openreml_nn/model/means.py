"""The network of a mean: what it yields, and the gradient of a loss, also some rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from openreml_nn.model.batch import check_inputs, split
from openreml_nn.support.checks import check_instance
from openreml_nn.support.checks import found as described
from openreml_nn.support.errors import InputError

__all__ = ["evaluating", "gradient_in_parts", "mean_of"]


def mean_of(network: nn.Module, x: Any, head: str, responses: int = 1) -> Tensor:
    """What the network yields: the mean (n,), or (n, t) of several responses, or features (n, p)
    with head ``"gls"``.

    Raises:
        TypeError: if ``x`` is nothing for a network, or the network yields no tensor.
        InputError: if the network fails for ``x``, or yields another shape.
    """
    check_inputs(x)
    try:
        found = network(x)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"`mean` fails for batch['x'], {described(x)}: {reason}; expected what the network "
            "takes, in its shape, dtype and device"
        ) from error
    check_instance("mean(x)", found, Tensor)
    if head == "gls":
        if found.dim() != 2:
            raise InputError(
                f"`mean` yields {tuple(found.shape)}: expected features (n, p) with head 'gls'"
            )
        return found
    if responses > 1:
        if found.dim() != 2 or found.shape[1] != responses:
            raise InputError(
                f"`mean` yields {tuple(found.shape)}: expected (n, {responses}), a mean for each "
                "response, with head 'ml'"
            )
        return found
    if found.dim() == 2 and found.shape[1] == 1:
        found = found[:, 0]
    if found.dim() != 1:
        raise InputError(
            f"`mean` yields {tuple(found.shape)}: expected (n,) or (n, 1) with head 'ml'; "
            "with head 'gls' it may yield features (n, p)"
        )
    return found


def gradient_in_parts(
    network: Callable[[Any], Tensor],
    x: Any,
    rows: int,
    loss: Callable[[Tensor], Tensor],
    devices: Iterable[torch.device],
) -> Tensor:
    """Accumulate the gradient of a loss of all rows, of which the network sees a few at a time.

    Args:
        network: yields the output of some rows of ``x``.
        x: the network's inputs.
        rows: how many it sees at a time.
        loss: of all outputs.
        devices: those with random numbers of their own, beside the CPU.

    Returns:
        The loss.
    """
    parts = split(x, rows)
    # Random numbers as before, so that both passes draw the same dropout.
    with torch.no_grad(), torch.random.fork_rng(devices):
        outputs = torch.cat([network(x) for x in parts])
    outputs.requires_grad_()
    value = loss(outputs)
    value.backward()
    assert outputs.grad is not None
    for x, cotangent in zip(parts, outputs.grad.split(rows), strict=True):
        network(x).backward(cotangent)
    return value.detach()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Without dropout and the like, for a while."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)
