r"""Metrics of predictive distributions, as functions and as torchmetrics modules.

They take the mean and the variance of each row, such as :meth:`MixedModel.predict` yields, and
the target.
"""

from __future__ import annotations

from math import log, pi

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = [
    "GaussianNegativeLogDensity",
    "IntervalCoverage",
    "IntervalWidth",
    "blup_reliability",
    "gaussian_negative_log_density",
    "interval_coverage",
    "interval_width",
]


def gaussian_negative_log_density(mean: Tensor, variance: Tensor, target: Tensor) -> Tensor:
    r"""Mean of :math:`\tfrac12[\log 2\pi v_i + (y_i - m_i)^2 / v_i]`.

    Args:
        mean, variance, target: (n,).

    Raises:
        ValueError: if shapes differ or a variance is not positive.

    >>> gaussian_negative_log_density(torch.zeros(2), torch.ones(2), torch.tensor([0.0, 1.0]))
    tensor(1.1689)
    """
    total, count = _density_sums(mean, variance, target)
    return total / count


def interval_coverage(
    mean: Tensor, variance: Tensor, target: Tensor, level: float = 0.95
) -> Tensor:
    """Share of the targets within the central Gaussian intervals of a level.

    >>> interval_coverage(torch.zeros(2), torch.ones(2), torch.tensor([0.0, 3.0]))
    tensor(0.5000)
    """
    _check(mean, variance, target)
    inside = (target - mean).abs() <= _quantile(level) * variance.sqrt()
    return inside.to(mean.dtype).mean()


def interval_width(variance: Tensor, level: float = 0.95) -> Tensor:
    """Mean width of the central Gaussian intervals of a level: their sharpness.

    >>> interval_width(torch.ones(2))
    tensor(3.9199)
    """
    _check(variance, variance, variance)
    return 2 * _quantile(level) * variance.sqrt().mean()


def blup_reliability(variance: Tensor, prior: Tensor | float) -> Tensor:
    r"""Reliability of BLUPs, :math:`1 - \mathrm{PEV} / \sigma_b^2`, for each level.

    Args:
        variance: prediction-error variances (q,).
        prior: the variance component.

    Raises:
        ValueError: if the variance component is not positive.

    Reference:
        Mrode, Linear Models for the Prediction of Animal Breeding Values (2014), eq. 3.14.

    >>> blup_reliability(torch.tensor([0.5, 1.0]), 2.0)
    tensor([0.7500, 0.5000])
    """
    if not float(prior) > 0:
        raise ValueError(f"`prior` is {float(prior):.6g}: reliability needs a positive variance")
    return 1 - variance / prior


class _Mean(Metric):
    """The mean over all rows of what a subclass adds up; right under any reduction."""

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        zero = torch.zeros((), dtype=torch.float64)
        self.add_state("total", zero.clone(), dist_reduce_fx="sum")
        self.add_state("count", zero.clone(), dist_reduce_fx="sum")

    def compute(self) -> Tensor:
        """The mean of what was seen."""
        return self.total / self.count


class GaussianNegativeLogDensity(_Mean):
    """:func:`gaussian_negative_log_density` over batches."""

    higher_is_better = False

    def update(self, mean: Tensor, variance: Tensor, target: Tensor) -> None:
        """Take a batch in."""
        total, count = _density_sums(mean, variance, target)
        self.total += total.double()
        self.count += count


class IntervalCoverage(_Mean):
    """:func:`interval_coverage` over batches.

    Args:
        level: of the intervals.
    """

    higher_is_better = None

    def __init__(self, level: float = 0.95, **options: object) -> None:
        super().__init__(**options)
        _quantile(level)
        self.level = level

    def update(self, mean: Tensor, variance: Tensor, target: Tensor) -> None:
        """Take a batch in."""
        self.total += interval_coverage(mean, variance, target, self.level).double() * len(mean)
        self.count += len(mean)


class IntervalWidth(_Mean):
    """:func:`interval_width` over batches; ``mean`` and ``target`` are not looked at.

    Args:
        level: of the intervals.
    """

    higher_is_better = False

    def __init__(self, level: float = 0.95, **options: object) -> None:
        super().__init__(**options)
        _quantile(level)
        self.level = level

    def update(self, mean: Tensor, variance: Tensor, target: Tensor) -> None:
        """Take a batch in."""
        self.total += interval_width(variance, self.level).double() * len(variance)
        self.count += len(variance)


def _check(mean: Tensor, variance: Tensor, target: Tensor) -> None:
    if not mean.shape == variance.shape == target.shape or mean.dim() != 1 or not len(mean):
        shapes = [tuple(t.shape) for t in (mean, variance, target)]
        raise ValueError(f"`mean`, `variance`, `target` have shapes {shapes}: expected (n,) each")
    if not bool((variance > 0).all()):
        raise ValueError(f"`variance` has the entry {float(variance.min()):.6g}: expected above 0")


def _density_sums(mean: Tensor, variance: Tensor, target: Tensor) -> tuple[Tensor, int]:
    _check(mean, variance, target)
    terms = log(2 * pi) + variance.log() + (target - mean) ** 2 / variance
    return terms.sum() / 2, len(mean)


def _quantile(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"`level` is {level}: expected a number between 0 and 1")
    return float(torch.special.ndtri(torch.tensor((1 + level) / 2, dtype=torch.float64)))
