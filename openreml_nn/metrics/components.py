"""Metrics of variance components: reliability, intraclass correlation, heritability."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from openreml_nn.metrics.sums import Mean, check_covariance, one_precision
from openreml_nn.support.checks import check_count, check_number, check_tensor
from openreml_nn.support.errors import InputError

__all__ = [
    "BLUPReliability",
    "IntraclassCorrelation",
    "NarrowSenseHeritability",
    "blup_reliability",
    "intraclass_correlation",
    "narrow_sense_heritability",
]


def blup_reliability(variance: Tensor, prior: Tensor | float) -> Tensor:
    r"""Reliability of BLUPs, :math:`1 - \mathrm{PEV} / \sigma_b^2`, for each level.

    Args:
        variance: prediction-error variances (q,).
        prior: the variance component.

    Raises:
        TypeError: if one is no tensor or number.
        InputError: if the variance component is not positive, or a prediction-error variance not
            between 0 and that.

    Reference:
        Mrode, Linear Models for the Prediction of Animal Breeding Values (2014), eq. 3.14.

    >>> blup_reliability(torch.tensor([0.5, 1.0]), 2.0)
    tensor([0.7500, 0.5000])
    """
    check_tensor("variance", variance, ("q",))
    if isinstance(prior, Tensor):
        check_tensor("prior", prior, ())
        prior = float(prior)
    prior = check_number("prior", prior, above=0)
    (variance,) = one_precision(variance)
    rounding = torch.finfo(variance.dtype).eps ** 0.5
    if bool(((variance < 0) | (variance > prior * (1 + rounding))).any()):
        worst = variance.min() if bool((variance < 0).any()) else variance.max()
        raise InputError(
            f"`variance` has the entry {float(worst):.6g}: expected prediction-error variances, "
            f"from 0 to the variance component {prior:.6g}"
        )
    return 1 - variance / prior


def intraclass_correlation(components: Tensor) -> Tensor:
    r"""Share of each variance component in their sum, :math:`\sigma_t^2 / \sum_s \sigma_s^2`.

    For a grouping factor it is the correlation of two rows that share its level only.

    Args:
        components: variances (k,), that of the residual among them.

    Raises:
        TypeError: if they are no tensor of real numbers.
        InputError: if one is negative or not finite, or all are zero.

    Reference:
        Shrout and Fleiss, Psychological Bulletin 86 (1979) 420.

    >>> intraclass_correlation(torch.tensor([1.0, 3.0]))
    tensor([0.2500, 0.7500])
    """
    components = _components(components, "k")
    return components / components.sum()


def narrow_sense_heritability(
    components: Tensor, covariance: Tensor, additive: int = 0
) -> tuple[Tensor, Tensor]:
    r"""Narrow-sense heritability :math:`h^2 = \sigma_a^2 / \sum_t \sigma_t^2` and its standard
    error by the delta method.

    :func:`openreml_nn.inference.heritability` has it of a fit, beside other definitions.

    Args:
        components: variances (k,), that of the residual among them.
        covariance: of their estimates, (k, k).
        additive: which is the additive genetic one.

    Raises:
        TypeError: if an argument is of another kind.
        InputError: if shapes do not fit, a variance is negative, the covariance is not symmetric
            or there is no such component.

    Reference:
        Lynch and Walsh, Genetics and Analysis of Quantitative Traits (1998), appendix 1.

    >>> narrow_sense_heritability(torch.tensor([1.0, 3.0]), torch.diag(torch.tensor([0.16, 0.16])))
    (tensor(0.2500), tensor(0.0791))
    """
    components = _components(components, "k")
    k = len(components)
    _check_additive(additive, k)
    covariance = _covariance(covariance, k).to(components)
    share = components[additive] / components.sum()
    slope = -share.repeat(k)
    slope[additive] += 1
    slope = slope / components.sum()
    return share, (slope @ covariance @ slope).clamp(min=0).sqrt()


class BLUPReliability(Mean):
    """Mean of :func:`blup_reliability` over levels."""

    higher_is_better = True

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)

    def update(self, error_variance: Tensor, prior: Tensor | float) -> None:
        """Take the prediction-error variances of some levels in."""
        self.add(blup_reliability(error_variance, prior).sum(), len(error_variance))


class IntraclassCorrelation(Mean):
    """:func:`intraclass_correlation` of the mean of the components that it sees.

    Args:
        components: how many there are.
        **options: of ``torchmetrics.Metric``.

    Raises:
        TypeError, InputError: if a number is no whole number, or out of its range.
    """

    higher_is_better = None

    def __init__(self, components: int, **options: Any) -> None:
        super().__init__((check_count("components", components, 1),), **options)

    def update(self, components: Tensor) -> None:
        """Take variances (k,) in."""
        self.add(_components(components, len(self.total)), 1)

    def compute(self) -> Tensor:
        """The shares of the mean components."""
        return intraclass_correlation(super().compute())


class NarrowSenseHeritability(Mean):
    """:func:`narrow_sense_heritability` of the mean of the components that it sees, with its
    standard error.

    Args:
        components: how many there are.
        additive: which is the additive genetic one.
        **options: of ``torchmetrics.Metric``.

    Raises:
        TypeError, InputError: if a number is no whole number, or out of its range.
    """

    higher_is_better = None
    spread: Tensor

    def __init__(self, components: int, additive: int = 0, **options: Any) -> None:
        super().__init__((check_count("components", components, 1),), **options)
        _check_additive(additive, components)
        self.additive = additive
        spread = torch.zeros(components, components, dtype=torch.float64)
        self.add_state("spread", spread, dist_reduce_fx="sum")

    def update(self, components: Tensor, covariance: Tensor) -> None:
        """Take variances (k,) and the covariance of their estimates (k, k) in."""
        k = len(self.total)
        components, covariance = _components(components, k), _covariance(covariance, k)
        self.add(components, 1)
        self.spread = self.spread + covariance.double()

    def compute(self) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Heritability and standard error."""
        spread = self.spread / self.count
        return narrow_sense_heritability(super().compute(), spread, self.additive)


def _components(components: Tensor, k: int | str) -> Tensor:
    check_tensor("components", components, (k,))
    if bool((components < 0).any()) or not bool(components.sum() > 0):
        raise InputError(
            f"`components` is {components.tolist()}: expected variances, none negative and not all "
            "zero"
        )
    return one_precision(components)[0]


def _covariance(covariance: Tensor, k: int) -> Tensor:
    check_tensor("covariance", covariance, (k, k))
    check_covariance("covariance", covariance)
    if bool((covariance.diagonal() < 0).any()):
        raise InputError(f"`covariance` is {covariance.tolist()}: expected no negative variance")
    return covariance


def _check_additive(additive: int, k: int) -> None:
    if check_count("additive", additive) >= k:
        raise InputError(f"`additive` is {additive}: expected one of the components, 0 to {k - 1}")
