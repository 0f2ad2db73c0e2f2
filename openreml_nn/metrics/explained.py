"""Shares of the variance that a model explains."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from openreml_nn.metrics.sums import one_precision
from openreml_nn.support.checks import check_tensor, found
from openreml_nn.support.errors import InputError

__all__ = ["ConditionalR2", "MarginalR2", "conditional_r2", "marginal_r2"]


def marginal_r2(population_mean: Tensor, random: Tensor, residual: Tensor) -> Tensor:
    r"""Share of the variance that the fixed effects explain,
    :math:`\sigma_f^2 / (\sigma_f^2 + \sigma_r^2 + \sigma_e^2)`.

    Args:
        population_mean: predictions without random effects, (n,); their variance over the
            rows is :math:`\sigma_f^2`.
        random: variance of the random effects of each row, :math:`z_i^\top G z_i`, (n,), or one
            number; its mean is :math:`\sigma_r^2`.
        residual: variance of the residual, as ``random``.

    Raises:
        TypeError: if one is no tensor of real numbers.
        InputError: if shapes do not fit, there are fewer than two rows, a number is not finite, a
            variance negative, or all of them zero.

    Reference:
        Nakagawa and Schielzeth, Methods in Ecology and Evolution 4 (2013) 133, eq. 26; Johnson,
        ibid. 5 (2014) 944, for random slopes.

    >>> marginal_r2(torch.tensor([0.0, 2.0]), torch.tensor(2.0), torch.tensor(6.0))
    tensor(0.2000)
    """
    moments, dtype = _moments(population_mean, random, residual)
    return _marginal(moments).to(dtype)


def conditional_r2(population_mean: Tensor, random: Tensor, residual: Tensor) -> Tensor:
    r"""Share of the variance that fixed and random effects explain,
    :math:`(\sigma_f^2 + \sigma_r^2) / (\sigma_f^2 + \sigma_r^2 + \sigma_e^2)`; see
    :func:`marginal_r2`.

    Args:
        population_mean, random, residual: as in :func:`marginal_r2`.

    Raises:
        TypeError, InputError: as in :func:`marginal_r2`.

    >>> conditional_r2(torch.tensor([0.0, 2.0]), torch.tensor(2.0), torch.tensor(6.0))
    tensor(0.4000)
    """
    moments, dtype = _moments(population_mean, random, residual)
    return _conditional(moments).to(dtype)


class _R2(Metric):
    """Rows, and the mean, the variance and the mean variances of the parts, of what was seen."""

    full_state_update = False
    higher_is_better = True
    moments: Tensor

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        # Rows, mean and squared deviations of the predictions, and two sums of variances. Those of
        # batches and of processes are merged and not added: a sum of squares would lose digits.
        self.add_state("moments", torch.zeros(5, dtype=torch.float64), dist_reduce_fx=_merged)

    def update(self, population_mean: Tensor, random: Tensor, residual: Tensor) -> None:
        """Take a batch in."""
        new, _ = _moments(population_mean, random, residual)
        self.moments = _merged(torch.stack([self.moments, new]))


class MarginalR2(_R2):
    """:func:`marginal_r2` over batches."""

    def compute(self) -> Tensor:
        """The share of what was seen."""
        return _marginal(self.moments)


class ConditionalR2(_R2):
    """:func:`conditional_r2` over batches."""

    def compute(self) -> Tensor:
        """The share of what was seen."""
        return _conditional(self.moments)


def _moments(
    population_mean: Tensor, random: Tensor, residual: Tensor
) -> tuple[Tensor, torch.dtype]:
    """Rows, mean and squared deviations of the predictions, and two sums of variances, in double
    precision, with the precision of the arguments."""
    check_tensor("population_mean", population_mean, ("n",))
    n = len(population_mean)
    if not n:
        raise InputError("`population_mean` is empty: expected a prediction for each row")
    for name, part in (("random", random), ("residual", residual)):
        check_tensor(name, part)
        if part.shape not in ((), (n,)) or bool((part < 0).any()):
            raise InputError(
                f"`{name}` is {found(part)}: expected variances, one number or one for each of "
                f"the {n} rows of `population_mean`, none negative"
            )
    mean = population_mean.double()
    dtype = one_precision(population_mean, random, residual)[0].dtype
    center = mean.mean()
    new = [center.new_tensor(n), center, ((mean - center) ** 2).sum()]
    new += [part.double().to(center.device).mean() * n for part in (random, residual)]
    return torch.stack(new), dtype


def _merged(moments: Tensor) -> Tensor:
    """Moments of all rows from those of parts, by Chan, Golub and LeVeque (1983), eq. 2.1."""
    n = moments[:, 0].sum()
    mean = (moments[:, 0] * moments[:, 1]).sum() / n.clamp(min=1)
    square = moments[:, 2].sum() + (moments[:, 0] * (moments[:, 1] - mean) ** 2).sum()
    return torch.stack([n, mean, square, moments[:, 3].sum(), moments[:, 4].sum()])


def _shares(moments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Variances of the fixed part and of the random one, and that of all."""
    n, _, square, random, residual = moments
    if n < 2:
        raise InputError(f"`population_mean` has {int(n)} rows in all: a variance needs 2 or more")
    fixed = square / (n - 1)
    total = fixed + (random + residual) / n
    if total <= 0:
        raise InputError(
            "`population_mean` is constant and `random` and `residual` are zero: "
            "there is no variance to explain"
        )
    return fixed, random / n, total


def _marginal(moments: Tensor) -> Tensor:
    fixed, _, total = _shares(moments)
    return fixed / total


def _conditional(moments: Tensor) -> Tensor:
    fixed, random, total = _shares(moments)
    return (fixed + random) / total
