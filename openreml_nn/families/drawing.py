"""Draws and distribution functions by NumPy and SciPy, of tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["below_and_at", "distribution", "drawn", "up_to"]


def drawn(sampler: Callable[..., Any], like: Tensor, *parameters: Tensor | int) -> Tensor:
    """Draws of a NumPy generator's method given its parameters, on the dtype and device of ``like``."""
    given = [p.numpy(force=True) if isinstance(p, Tensor) else p for p in parameters]
    return torch.as_tensor(sampler(*given)).to(like)


def distribution(name: str) -> Any:
    """A distribution of SciPy, whose import takes longer than that of all families."""
    from scipy import stats

    return getattr(stats, name)


def up_to(name: str, y: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
    """The distribution function of a continuous response, SciPy's of that name, twice."""
    given = [p.numpy(force=True) for p in parameters]
    found = torch.as_tensor(distribution(name).cdf(y.numpy(force=True), *given))
    found = found.to(parameters[0])
    return found, found


def below_and_at(name: str, y: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
    """The distribution function of a whole number, SciPy's of that name, below it and at it."""
    given = [p.numpy(force=True) for p in parameters]
    at = y.numpy(force=True)
    below, within = (torch.as_tensor(distribution(name).cdf(x, *given)) for x in (at - 1, at))
    return below.to(parameters[0]), within.to(parameters[0])
