r"""Metrics of mixed models, as functions and as torchmetrics modules.

Those of predictions take the mean and the variance of each row, such as
:meth:`MixedModel.predict` yields, and the target; those of a model its variance components. The
modules add up what they see, so that batches, and processes, may be of any size. In a
``MetricCollection`` arguments are passed by name, and each metric takes those that it knows.
"""

from __future__ import annotations

from math import log, pi

import torch
from torch import Tensor
from torchmetrics import Metric

from openreml_nn.likelihood.problem import cholesky
from openreml_nn.support.checks import check_choice, check_count, check_number, check_tensor, found

__all__ = [
    "BLUPReliability",
    "ConditionalR2",
    "GaussianNegativeLogDensity",
    "Heritability",
    "IntervalCoverage",
    "IntervalWidth",
    "IntraclassCorrelation",
    "MarginalR2",
    "RestrictedLogLikelihood",
    "blup_reliability",
    "conditional_r2",
    "gaussian_negative_log_density",
    "heritability",
    "interval_coverage",
    "interval_width",
    "intraclass_correlation",
    "marginal_r2",
]


def gaussian_negative_log_density(mean: Tensor, variance: Tensor, target: Tensor) -> Tensor:
    r"""Mean of :math:`\tfrac12[\log 2\pi v_i + (y_i - m_i)^2 / v_i]`.

    Args:
        mean, variance, target: (n,).

    Raises:
        TypeError: if one is no tensor of real numbers.
        ValueError: if shapes differ, a number is not finite or a variance not positive.

    >>> gaussian_negative_log_density(torch.zeros(2), torch.ones(2), torch.tensor([0.0, 1.0]))
    tensor(1.1689)
    """
    total, count = _density_sums(mean, variance, target)
    return total / count


def interval_coverage(
    mean: Tensor, variance: Tensor, target: Tensor, level: float = 0.95
) -> Tensor:
    """Share of the targets within the central Gaussian intervals of a level.

    Raises:
        TypeError, ValueError: as in :func:`gaussian_negative_log_density`, and if the level is not
            between 0 and 1.

    >>> interval_coverage(torch.zeros(2), torch.ones(2), torch.tensor([0.0, 3.0]))
    tensor(0.5000)
    """
    mean, variance, target = _predictions(mean=mean, variance=variance, target=target)
    inside = (target - mean).abs() <= _quantile(level) * variance.sqrt()
    return inside.to(mean.dtype).mean()


def interval_width(variance: Tensor, level: float = 0.95) -> Tensor:
    """Mean width of the central Gaussian intervals of a level: their sharpness.

    Raises:
        TypeError, ValueError: as in :func:`interval_coverage`.

    >>> interval_width(torch.ones(2))
    tensor(3.9199)
    """
    (variance,) = _predictions(variance=variance)
    return 2 * _quantile(level) * variance.sqrt().mean()


def blup_reliability(variance: Tensor, prior: Tensor | float) -> Tensor:
    r"""Reliability of BLUPs, :math:`1 - \mathrm{PEV} / \sigma_b^2`, for each level.

    Args:
        variance: prediction-error variances (q,).
        prior: the variance component.

    Raises:
        TypeError: if one is no tensor or number.
        ValueError: if the variance component is not positive, or a prediction-error variance not
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
    (variance,) = _floating(variance)
    rounding = torch.finfo(variance.dtype).eps ** 0.5
    if bool(((variance < 0) | (variance > prior * (1 + rounding))).any()):
        worst = variance.min() if bool((variance < 0).any()) else variance.max()
        raise ValueError(
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
        ValueError: if one is negative or not finite, or all are zero.

    Reference:
        Shrout and Fleiss, Psychological Bulletin 86 (1979) 420.

    >>> intraclass_correlation(torch.tensor([1.0, 3.0]))
    tensor([0.2500, 0.7500])
    """
    components = _components(components, "k")
    return components / components.sum()


def heritability(
    components: Tensor, covariance: Tensor, additive: int = 0
) -> tuple[Tensor, Tensor]:
    r"""Narrow-sense heritability :math:`h^2 = \sigma_a^2 / \sum_t \sigma_t^2` and its standard
    error by the delta method.

    Args:
        components: variances (k,), that of the residual among them.
        covariance: of their estimates, (k, k).
        additive: which is the additive genetic one.

    Raises:
        TypeError: if an argument is of another kind.
        ValueError: if shapes do not fit, a variance is negative, the covariance is not symmetric
            or there is no such component.

    Reference:
        Lynch and Walsh, Genetics and Analysis of Quantitative Traits (1998), appendix 1.

    >>> heritability(torch.tensor([1.0, 3.0]), torch.diag(torch.tensor([0.16, 0.16])))
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
        ValueError: if shapes do not fit, a number is not finite or a variance negative.

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

    Raises:
        TypeError, ValueError: as there.

    >>> conditional_r2(torch.tensor([0.0, 2.0]), torch.tensor(2.0), torch.tensor(6.0))
    tensor(0.4000)
    """
    moments, dtype = _moments(population_mean, random, residual)
    return _conditional(moments).to(dtype)


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


class BLUPReliability(_Mean):
    """Mean of :func:`blup_reliability` over levels."""

    higher_is_better = True

    def update(self, error_variance: Tensor, prior: Tensor | float) -> None:
        """Take the prediction-error variances of some levels in."""
        self.total += blup_reliability(error_variance, prior).sum().double()
        self.count += len(error_variance)


class IntraclassCorrelation(_Mean):
    """:func:`intraclass_correlation` of the mean of the components that it sees.

    Args:
        components: how many there are.
    """

    higher_is_better = None

    def __init__(self, components: int, **options: object) -> None:
        super().__init__(**options)
        zero = torch.zeros(check_count("components", components, 1), dtype=torch.float64)
        self.add_state("total", zero, dist_reduce_fx="sum")

    def update(self, components: Tensor) -> None:
        """Take variances (k,) in."""
        self.total += _components(components, len(self.total)).double()
        self.count += 1

    def compute(self) -> Tensor:
        """The shares of the mean components."""
        return intraclass_correlation(self.total / self.count)


class Heritability(_Mean):
    """:func:`heritability` of the mean of the components that it sees, with its standard error.

    Args:
        components: how many there are.
        additive: which is the additive genetic one.
    """

    higher_is_better = None
    spread: Tensor

    def __init__(self, components: int, additive: int = 0, **options: object) -> None:
        super().__init__(**options)
        _check_additive(additive, check_count("components", components, 1))
        zero = torch.zeros(components, dtype=torch.float64)
        self.additive = additive
        self.add_state("total", zero, dist_reduce_fx="sum")
        self.add_state("spread", zero.new_zeros(components, components), dist_reduce_fx="sum")

    def update(self, components: Tensor, covariance: Tensor) -> None:
        """Take variances (k,) and the covariance of their estimates (k, k) in."""
        k = len(self.total)
        components, covariance = _components(components, k), _covariance(covariance, k)
        self.total += components.double()
        self.spread += covariance.double()
        self.count += 1

    def compute(self) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Heritability and standard error."""
        return heritability(self.total / self.count, self.spread / self.count, self.additive)


class _R2(Metric):
    """Rows, and the mean, the variance and the mean variances of the parts, of what was seen."""

    full_state_update = False
    higher_is_better = True
    moments: Tensor

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        # Rows, mean and squared deviations of the predictions, and two sums of variances. Each
        # process's are kept apart until they are merged: a sum of squares would lose digits.
        self.add_state("moments", torch.zeros(5, dtype=torch.float64), dist_reduce_fx=None)

    def update(self, population_mean: Tensor, random: Tensor, residual: Tensor) -> None:
        """Take a batch in."""
        new, _ = _moments(population_mean, random, residual)
        self.moments = _merged(torch.stack([self.moments, new]))


def _moments(
    population_mean: Tensor, random: Tensor, residual: Tensor
) -> tuple[Tensor, torch.dtype]:
    """Rows, mean and squared deviations of the predictions, and two sums of variances, in double
    precision, with the precision of the arguments."""
    check_tensor("population_mean", population_mean, ("n",))
    n = len(population_mean)
    if not n:
        raise ValueError("`population_mean` is empty: expected a prediction for each row")
    for name, part in (("random", random), ("residual", residual)):
        check_tensor(name, part)
        if part.shape not in ((), (n,)) or bool((part < 0).any()):
            raise ValueError(
                f"`{name}` is {found(part)}: expected variances, one number or one for each of "
                f"the {n} rows of `population_mean`, none negative"
            )
    mean, dtype = population_mean.double(), _floating(population_mean, random, residual)[0].dtype
    center = mean.mean()
    new = [center.new_tensor(n), center, ((mean - center) ** 2).sum()]
    new += [part.double().to(center.device).mean() * n for part in (random, residual)]
    return torch.stack(new), dtype


def _merged(moments: Tensor) -> Tensor:
    """Moments of all rows from those of parts, by Chan, Golub and LeVeque (1983), eq. 2.1."""
    n = moments[:, 0].sum()
    mean = (moments[:, 0] * moments[:, 1]).sum() / n
    square = moments[:, 2].sum() + (moments[:, 0] * (moments[:, 1] - mean) ** 2).sum()
    return torch.stack([n, mean, square, moments[:, 3].sum(), moments[:, 4].sum()])


def _shares(moments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Variances of the fixed part and of the random one, and that of all."""
    n, _, square, random, residual = _merged(moments.reshape(-1, 5))
    fixed = square / (n - 1)
    return fixed, random / n, fixed + (random + residual) / n


def _marginal(moments: Tensor) -> Tensor:
    fixed, _, total = _shares(moments)
    return fixed / total


def _conditional(moments: Tensor) -> Tensor:
    fixed, random, total = _shares(moments)
    return (fixed + random) / total


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


class RestrictedLogLikelihood(Metric):
    r"""Restricted log-likelihood of batches that are independent of each other, such as whole
    groups: exactly that of all rows, fixed effects in common included.

    :math:`\log|V|, X^\top V^{-1}X, X^\top V^{-1}y` and :math:`y^\top V^{-1}y` add up over them.

    Args:
        fixed_effects: columns of X.
        method: ``"reml"`` or ``"ml"``.

    Raises:
        ValueError: if ``method`` is unknown, shapes do not fit, or V or all rows' X do not do.
    """

    full_state_update = False
    higher_is_better = True
    parts: Tensor
    cross: Tensor

    def __init__(self, fixed_effects: int, method: str = "reml", **options: object) -> None:
        super().__init__(**options)
        check_count("fixed_effects", fixed_effects)
        check_choice("method", method, ("reml", "ml"))
        self.method = method
        zero = torch.zeros(fixed_effects + 1, fixed_effects + 1, dtype=torch.float64)
        self.add_state("parts", zero.new_zeros(2), dist_reduce_fx="sum")
        self.add_state("cross", zero, dist_reduce_fx="sum")

    def update(self, y: Tensor, X: Tensor, V: Tensor) -> None:
        """Take a batch in: y (n,), X (n, p) and V (n, n)."""
        check_tensor("y", y, ("n",))
        n, p = len(y), len(self.cross) - 1
        check_tensor("X", X, (n, p))
        check_tensor("V", V, (n, n))
        _check_symmetric("V", V)
        L = cholesky(V.double(), "V")
        W = torch.linalg.solve_triangular(L, torch.cat([X, y[:, None]], 1).double(), upper=False)
        self.parts += torch.stack([2 * L.diagonal().log().sum(), L.new_tensor(float(n))])
        self.cross += W.mT @ W

    def compute(self) -> Tensor:
        """The log-likelihood of what was seen."""
        log_det, n = self.parts
        p = len(self.cross) - 1
        L = cholesky(self.cross, "X'V^-1 X of all batches, or the residual,")
        value = log_det + L[-1, -1] ** 2
        if self.method == "ml":
            return -(value + n * log(2 * pi)) / 2
        return -(value + 2 * L.diagonal()[:p].log().sum() + (n - p) * log(2 * pi)) / 2


def _predictions(**tensors: Tensor) -> list[Tensor]:
    """Vectors of one length, variances among them, in one precision."""
    first, rows = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        check_tensor(name, tensor, ("n",))
        if not len(tensor):
            raise ValueError(f"`{name}` is empty: expected a number for each row")
        if len(tensor) != len(rows):
            raise ValueError(
                f"`{name}` has {len(tensor)} rows but `{first}` {len(rows)}: expected as many"
            )
    variance = tensors["variance"]
    if not bool((variance > 0).all()):
        raise ValueError(f"`variance` has the entry {float(variance.min()):.6g}: expected above 0")
    return _floating(*tensors.values())


def _floating(*tensors: Tensor) -> list[Tensor]:
    """Tensors in their common precision, whole numbers in torch's default one."""
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    if not dtype.is_floating_point:
        dtype = torch.get_default_dtype()
    return [tensor.to(dtype) for tensor in tensors]


def _density_sums(mean: Tensor, variance: Tensor, target: Tensor) -> tuple[Tensor, int]:
    mean, variance, target = _predictions(mean=mean, variance=variance, target=target)
    terms = log(2 * pi) + variance.log() + (target - mean) ** 2 / variance
    return terms.sum() / 2, len(mean)


def _quantile(level: float) -> float:
    level = check_number("level", level, above=0, below=1)
    return float(torch.special.ndtri(torch.tensor((1 + level) / 2, dtype=torch.float64)))


def _components(components: Tensor, k: int | str) -> Tensor:
    check_tensor("components", components, (k,))
    if bool((components < 0).any()) or not bool(components.sum() > 0):
        raise ValueError(
            f"`components` is {components.tolist()}: expected variances, none negative and not all "
            "zero"
        )
    return _floating(components)[0]


def _covariance(covariance: Tensor, k: int) -> Tensor:
    check_tensor("covariance", covariance, (k, k))
    _check_symmetric("covariance", covariance)
    if bool((covariance.diagonal() < 0).any()):
        raise ValueError(f"`covariance` is {covariance.tolist()}: expected no negative variance")
    return covariance


def _check_symmetric(name: str, matrix: Tensor) -> None:
    if not bool(torch.isclose(matrix, matrix.mT, rtol=1e-5, atol=1e-8).all()):
        raise ValueError(f"`{name}` is not symmetric: expected a covariance matrix")


def _check_additive(additive: int, k: int) -> None:
    if check_count("additive", additive) >= k:
        raise ValueError(f"`additive` is {additive}: expected one of the components, 0 to {k - 1}")
