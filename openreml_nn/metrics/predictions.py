"""Metrics of predictions with variances: density, coverage and width of intervals."""

from __future__ import annotations

from math import log, pi
from typing import Any

import torch
from torch import Tensor

from openreml_nn.metrics.sums import Mean, one_precision
from openreml_nn.support.checks import check_number, check_tensor
from openreml_nn.support.errors import InputError

__all__ = [
    "GaussianNegativeLogDensity",
    "IntervalCoverage",
    "IntervalWidth",
    "gaussian_negative_log_density",
    "interval_coverage",
    "interval_width",
]


def gaussian_negative_log_density(mean: Tensor, variance: Tensor, target: Tensor) -> Tensor:
    r"""Mean of :math:`\tfrac12[\log 2\pi v_i + (y_i - m_i)^2 / v_i]`.

    Args:
        mean, variance, target: (n,).

    Raises:
        TypeError: if one is no tensor of real numbers.
        InputError: if shapes differ, a number is not finite or a variance not positive.

    >>> gaussian_negative_log_density(torch.zeros(2), torch.ones(2), torch.tensor([0.0, 1.0]))
    tensor(1.1689)
    """
    return _sum_of_densities(mean, variance, target) / len(mean)


def interval_coverage(
    mean: Tensor, variance: Tensor, target: Tensor, level: float = 0.95
) -> Tensor:
    r"""Share of the targets with :math:`|y_i - m_i| \le z\sqrt{v_i}`, within the central Gaussian
    intervals of a level.

    Args:
        mean, variance, target: (n,).
        level: of the intervals.

    Raises:
        TypeError: if an argument is of another kind.
        InputError: as in :func:`gaussian_negative_log_density`, and if the level is not between 0
            and 1.

    >>> interval_coverage(torch.zeros(2), torch.ones(2), torch.tensor([0.0, 3.0]))
    tensor(0.5000)
    """
    return _sum_of_covered(mean, variance, target, level) / len(mean)


def interval_width(variance: Tensor, level: float = 0.95) -> Tensor:
    r"""Mean width :math:`2z\sqrt{v_i}` of the central Gaussian intervals of a level: their
    sharpness.

    Args:
        variance: (n,).
        level: of the intervals.

    Raises:
        TypeError: if an argument is of another kind.
        InputError: as in :func:`interval_coverage`.

    >>> interval_width(torch.ones(2))
    tensor(3.9199)
    """
    return _sum_of_widths(variance, level) / len(variance)


class GaussianNegativeLogDensity(Mean):
    """:func:`gaussian_negative_log_density` over batches."""

    higher_is_better = False

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)

    def update(self, mean: Tensor, variance: Tensor, target: Tensor) -> None:
        """Take a batch in."""
        self.add(_sum_of_densities(mean, variance, target), len(mean))


class IntervalCoverage(Mean):
    """:func:`interval_coverage` over batches.

    Args:
        level: of the intervals.
        **options: of ``torchmetrics.Metric``.
    """

    higher_is_better = None

    def __init__(self, level: float = 0.95, **options: Any) -> None:
        super().__init__(**options)
        _quantile(level)
        self.level = level

    def update(self, mean: Tensor, variance: Tensor, target: Tensor) -> None:
        """Take a batch in."""
        self.add(_sum_of_covered(mean, variance, target, self.level), len(mean))


class IntervalWidth(Mean):
    """:func:`interval_width` over batches, ``update(variance=…)``.

    A collection that hands ``mean, variance, target`` to each of its metrics by position serves it too.

    Args:
        level: of the intervals.
        **options: of ``torchmetrics.Metric``.
    """

    higher_is_better = False

    def __init__(self, level: float = 0.95, **options: Any) -> None:
        super().__init__(**options)
        _quantile(level)
        self.level = level

    def update(
        self,
        mean: Tensor | None = None,
        variance: Tensor | None = None,
        target: Tensor | None = None,
    ) -> None:
        """Take a batch in, of which the width takes the variance alone."""
        if variance is None:
            raise InputError("`variance` is None: expected update(variance=…), (n,)")
        self.add(_sum_of_widths(variance, self.level), len(variance))


def _sum_of_densities(mean: Tensor, variance: Tensor, target: Tensor) -> Tensor:
    mean, variance, target = _predictions(mean=mean, variance=variance, target=target)
    terms = log(2 * pi) + variance.log() + (target - mean) ** 2 / variance
    return terms.sum() / 2


def _sum_of_covered(mean: Tensor, variance: Tensor, target: Tensor, level: float) -> Tensor:
    mean, variance, target = _predictions(mean=mean, variance=variance, target=target)
    inside = (target - mean).abs() <= _quantile(level) * variance.sqrt()
    return inside.to(mean.dtype).sum()


def _sum_of_widths(variance: Tensor, level: float) -> Tensor:
    (variance,) = _predictions(variance=variance)
    return 2 * _quantile(level) * variance.sqrt().sum()


def _predictions(**tensors: Tensor) -> list[Tensor]:
    """Vectors of one length, variances among them, in one precision."""
    first, rows = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        check_tensor(name, tensor, ("n",))
        if not len(tensor):
            raise InputError(f"`{name}` is empty: expected a number for each row")
        if len(tensor) != len(rows):
            raise InputError(
                f"`{name}` has {len(tensor)} rows but `{first}` {len(rows)}: expected as many"
            )
    variance = tensors["variance"]
    if not bool((variance > 0).all()):
        raise InputError(f"`variance` has the entry {float(variance.min()):.6g}: expected above 0")
    return one_precision(*tensors.values())


def _quantile(level: float) -> float:
    """The Gaussian quantile z of a central interval."""
    level = check_number("level", level, above=0, below=1)
    return float(torch.special.ndtri(torch.tensor((1 + level) / 2, dtype=torch.float64)))
