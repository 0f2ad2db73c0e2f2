"""Metrics of predicted probabilities and means of responses that are not Gaussian."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import BinaryAUROC
from torchmetrics.functional.classification import binary_auroc

from openreml_nn.families import Family
from openreml_nn.metrics.sums import Mean, one_precision
from openreml_nn.support.checks import check_count, check_instance, check_tensor
from openreml_nn.support.errors import InputError

__all__ = [
    "AUC",
    "BrierScore",
    "CalibrationCurve",
    "CalibrationError",
    "LogLoss",
    "MeanDeviance",
    "auc",
    "brier_score",
    "calibration_curve",
    "calibration_error",
    "log_loss",
    "mean_deviance",
]


def log_loss(mean: Tensor, target: Tensor) -> Tensor:
    r"""Mean of :math:`-y_i\log p_i - (1 - y_i)\log(1 - p_i)`.

    Args:
        mean: (n,) probabilities p.
        target: (n,) of 0 and 1.

    Raises:
        TypeError: if one is no tensor of real numbers.
        InputError: if shapes differ, a probability is not within [0, 1] or a target not 0 or 1.

    >>> log_loss(torch.tensor([0.5, 0.5]), torch.tensor([0.0, 1.0]))
    tensor(0.6931)
    """
    return _sum_of_log_losses(mean, target) / len(mean)


def brier_score(mean: Tensor, target: Tensor) -> Tensor:
    r"""Mean of :math:`(p_i - y_i)^2`.

    Args:
        mean, target: as in :func:`log_loss`.

    Raises:
        TypeError, InputError: as in :func:`log_loss`.

    Reference:
        Brier, Monthly Weather Review 78 (1950) 1.

    >>> brier_score(torch.tensor([0.5, 1.0]), torch.tensor([0.0, 1.0]))
    tensor(0.1250)
    """
    return _sum_of_squares(mean, target) / len(mean)


def auc(mean: Tensor, target: Tensor) -> Tensor:
    """The area under the receiver operating characteristic: the probability that a success has a
    higher prediction than a failure, ties counting half. NaN where there is one class only.

    Args:
        mean, target: as in :func:`log_loss`.

    Raises:
        TypeError, InputError: as in :func:`log_loss`.

    >>> auc(torch.tensor([0.1, 0.4, 0.35, 0.8]), torch.tensor([0.0, 0.0, 1.0, 1.0]))
    tensor(0.7500)
    """
    mean, target = _probabilities(mean, target)
    if bool((target == target[0]).all()):
        return mean.new_tensor(torch.nan)
    return binary_auroc(mean, target.long(), validate_args=False)


def calibration_error(mean: Tensor, target: Tensor, bins: int = 15) -> Tensor:
    r"""The expected calibration error :math:`\sum_b \tfrac{n_b}{n}|\bar p_b - \bar y_b|` over bins of
    equal width.

    Args:
        mean, target: as in :func:`log_loss`.
        bins: number of bins of [0, 1].

    Raises:
        TypeError, InputError: as in :func:`log_loss`, or if ``bins`` is no positive whole number.

    Reference:
        Naeini, Cooper and Hauskrecht, AAAI (2015) 2901.

    >>> calibration_error(torch.tensor([0.2, 0.2, 0.9]), torch.tensor([0.0, 1.0, 1.0]))
    tensor(0.2333)
    """
    return _sums_of_bins(mean, target, bins).abs().sum() / len(mean)


def calibration_curve(mean: Tensor, target: Tensor, bins: int = 10) -> Tensor:
    """Mean probability, share of successes and number of rows in each bin of the probability.

    Args:
        mean, target: as in :func:`log_loss`.
        bins: number of bins of [0, 1], of equal width.

    Returns:
        (bins, 3); NaN, NaN and 0 of a bin without rows.

    Raises:
        TypeError, InputError: as in :func:`calibration_error`.

    Reference:
        DeGroot and Fienberg, The Statistician 32 (1983) 12.

    >>> calibration_curve(torch.tensor([0.25, 0.25, 0.75]), torch.tensor([0.0, 1.0, 1.0]), 2)
    tensor([[0.2500, 0.5000, 2.0000],
            [0.7500, 1.0000, 1.0000]])
    """
    return _curve(_parts_of_bins(mean, target, bins))


def mean_deviance(mean: Tensor, target: Tensor, family: Family) -> Tensor:
    """Mean of the unit deviances of a family, see :meth:`Family.deviance`.

    Args:
        mean: (n,) means of the responses.
        target: (n,) the responses, or (n, 2) successes and failures.
        family: of the responses.

    Raises:
        TypeError: if an argument is of another kind.
        InputError: if shapes do not fit, the family cannot have a response, or it has no unit deviance, as
            a zero-inflated one has not.

    >>> from openreml_nn.families import Poisson
    >>> mean_deviance(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 2.0]), Poisson())
    tensor(1.)
    """
    return _sum_of_deviances(mean, target, family) / len(mean)


class LogLoss(Mean):
    """:func:`log_loss` over batches."""

    higher_is_better = False

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)

    def update(self, mean: Tensor, target: Tensor) -> None:
        """Take a batch in."""
        self.add(_sum_of_log_losses(mean, target), len(mean))


class BrierScore(Mean):
    """:func:`brier_score` over batches."""

    higher_is_better = False

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)

    def update(self, mean: Tensor, target: Tensor) -> None:
        """Take a batch in."""
        self.add(_sum_of_squares(mean, target), len(mean))


class AUC(BinaryAUROC):
    """:func:`auc` over batches, of which all predictions are kept, in double precision."""

    def __init__(self, **options: Any) -> None:
        super().__init__(validate_args=False, **options)

    def update(self, mean: Tensor, target: Tensor) -> None:
        """Take a batch in."""
        mean, target = _probabilities(mean, target)
        super().update(mean.double(), target.long())

    def sync(self, *args: Any, **options: Any) -> None:
        """Bring the predictions of all processes together, of which some may have none."""
        if isinstance(self.target, list) and not self.target:
            # Processes exchange tensors of one type only.
            self.preds = [torch.zeros(0, dtype=torch.float64, device=self.device)]
            self.target = [torch.zeros(0, dtype=torch.long, device=self.device)]
        super().sync(*args, **options)

    def compute(self) -> Tensor:  # type: ignore[override]
        """The area over what was seen."""
        seen = self.target
        if not len(seen):
            return torch.tensor(torch.nan, device=self.device)
        target = torch.cat(seen) if isinstance(seen, list) else seen
        if bool((target == target[:1]).all()):
            return torch.tensor(torch.nan, device=target.device)
        return BinaryAUROC.compute(self)


class CalibrationError(Mean):
    """:func:`calibration_error` over batches.

    Args:
        bins: number of bins of [0, 1].
        **options: of ``torchmetrics.Metric``.

    Raises:
        TypeError, InputError: if ``bins`` is no positive whole number.
    """

    higher_is_better = False

    def __init__(self, bins: int = 15, **options: Any) -> None:
        self.bins = check_count("bins", bins, 1)
        super().__init__((bins,), **options)

    def update(self, mean: Tensor, target: Tensor) -> None:
        """Take a batch in."""
        self.add(_sums_of_bins(mean, target, self.bins), len(mean))

    def compute(self) -> Tensor:
        """The error over what was seen."""
        return super().compute().abs().sum()


class CalibrationCurve(Metric):
    """:func:`calibration_curve` over batches.

    Args:
        bins: number of bins of [0, 1].
        **options: of ``torchmetrics.Metric``.

    Raises:
        TypeError, InputError: if ``bins`` is no positive whole number.
    """

    full_state_update = False
    sums: Tensor

    def __init__(self, bins: int = 10, **options: Any) -> None:
        super().__init__(**options)
        self.bins = check_count("bins", bins, 1)
        self.add_state("sums", torch.zeros(self.bins, 3, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, mean: Tensor, target: Tensor) -> None:
        """Take a batch in."""
        self.sums = self.sums + _parts_of_bins(mean, target, self.bins)

    def compute(self) -> Tensor:
        """The curve of what was seen."""
        return _curve(self.sums)


class MeanDeviance(Mean):
    """:func:`mean_deviance` over batches.

    Args:
        family: of the responses.
        **options: of ``torchmetrics.Metric``.

    Raises:
        TypeError, InputError: as :func:`mean_deviance` does of the family.
    """

    higher_is_better = False

    def __init__(self, family: Family, **options: Any) -> None:
        super().__init__(**options)
        check_deviance(family)
        self.family = family

    def update(self, mean: Tensor, target: Tensor) -> None:
        """Take a batch in."""
        self.add(_sum_of_deviances(mean, target, self.family), len(mean))


def _sum_of_log_losses(mean: Tensor, target: Tensor) -> Tensor:
    mean, target = _probabilities(mean, target)
    return -(torch.xlogy(target, mean) + torch.special.xlog1py(1 - target, -mean)).sum()


def _sum_of_squares(mean: Tensor, target: Tensor) -> Tensor:
    mean, target = _probabilities(mean, target)
    return ((mean - target) ** 2).sum()


def _sums_of_bins(mean: Tensor, target: Tensor, bins: int) -> Tensor:
    """The sum of p - y in each bin (bins,)."""
    parts = _parts_of_bins(mean, target, bins)
    return parts[:, 0] - parts[:, 1]


def _parts_of_bins(mean: Tensor, target: Tensor, bins: int) -> Tensor:
    """Sums of p, of y and of ones in each bin (bins, 3)."""
    bins = check_count("bins", bins, 1)
    mean, target = _probabilities(mean, target)
    at = (mean * bins).long().clamp(max=bins - 1)
    rows = torch.stack([mean, target, torch.ones_like(mean)], 1)
    return mean.new_zeros(bins, 3).index_add_(0, at, rows)


def _curve(sums: Tensor) -> Tensor:
    """Means from the sums."""
    return torch.cat([sums[:, :2] / sums[:, 2:], sums[:, 2:]], 1)


def check_deviance(family: Family) -> None:
    """Refuse a family without a unit deviance, as of a zero-inflated response, whose variance is no
    function of its mean.

    Raises:
        TypeError: if it is no family.
        InputError: if it has none.
    """
    check_instance("family", family, Family)
    if not family.has_deviance:
        raise InputError(
            f"`family` is {family.name or type(family).__name__!r}, which has no unit deviance: judge "
            "its predictions by the negative log density"
        )


def _sum_of_deviances(mean: Tensor, target: Tensor, family: Family) -> Tensor:
    check_deviance(family)
    check_tensor("mean", mean, ("n",))
    check_instance("target", target, Tensor, "a tensor")
    if target.dim() == 0 or len(target) != len(mean):
        raise InputError(
            f"`target` is {tuple(target.shape)} but `mean` has {len(mean)} rows: expected as many"
        )
    family.check(target, "`target`")
    mean, target = one_precision(mean, target)
    return family.deviance(target, mean).sum()


def _probabilities(mean: Tensor, target: Tensor) -> list[Tensor]:
    """Probabilities and outcomes of one length, in one precision."""
    for name, tensor in (("mean", mean), ("target", target)):
        check_tensor(name, tensor, ("n",))
        if not len(tensor):
            raise InputError(f"`{name}` is empty: expected a number for each row")
    if len(target) != len(mean):
        raise InputError(
            f"`target` is {tuple(target.shape)} but `mean` has {len(mean)} rows: expected as many"
        )
    if not bool(((mean >= 0) & (mean <= 1)).all()):
        worst = mean[(mean < 0) | (mean > 1)][0]
        raise InputError(f"`mean` has the entry {float(worst):.6g}: expected probabilities, 0 to 1")
    if not bool(((target == 0) | (target == 1)).all()):
        worst = target[(target != 0) & (target != 1)][0]
        raise InputError(f"`target` has the entry {float(worst):.6g}: expected 0 or 1")
    return one_precision(mean, target)
