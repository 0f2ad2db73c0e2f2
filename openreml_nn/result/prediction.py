"""Predictions of new observations and their variances, from what is known of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from openreml_nn.covariance import Matrix
from openreml_nn.families import Family
from openreml_nn.result.joint import JointErrors
from openreml_nn.result.places import Kriging, PlacedDesign
from openreml_nn.support.checks import check_instance, check_number
from openreml_nn.support.warning import warn
from openreml_nn.terms.base import Covariance
from openreml_nn.terms.covariance import DenseCovariance, RepeatedCovariance, ScaledCovariance
from openreml_nn.terms.design import CodedDesign, IdentityDesign, IndexedDesign, design_of
from openreml_nn.terms.kernel import Kernel
from openreml_nn.terms.precision import PrecisionCovariance

__all__ = [
    "KnownEffect",
    "Prediction",
    "log_predictive",
    "lowered",
    "moved",
    "normal_interval",
    "on_response",
    "predict_table",
    "predicted",
    "prior_of",
]

#: Points of quadrature over a linear predictor.
_NODES = 41
#: Of which this many are taken at once.
_TOGETHER = 8


class Prediction(NamedTuple):
    """Predictions of some rows, (n,) each; of several responses means (n, t), and as variance the
    covariance of the responses of a row, (n, t, t).

    Attributes:
        mean: with the random effects of the levels that are known.
        variance: of a new observation: of the random effects given the data, of
            the coefficients (head ``"gls"``), and of the residual, which is independent of those of
            the data.
        population_mean: without random effects.
    """

    mean: Tensor
    variance: Tensor
    population_mean: Tensor


@dataclass(frozen=True)
class KnownEffect:
    """The rows of one random effect, and what is known of it.

    Attributes:
        codes: (n,) level of each row, -1 for one that was not seen; (n, m) of rows of m levels each.
        z: (n, k) values of the effects; (n, m, k) of such rows.
        values: (q, k) BLUPs.
        variances: (q, k, k) their prediction-error variances.
        prior: yields the covariance (k, k) of the effects of a level that was not seen.
        kriging: rows of levels that were not seen, at places among those of the levels; None for
            none.
    """

    codes: Tensor
    z: Tensor
    values: Tensor
    variances: Tensor
    prior: Callable[[], Tensor]
    kriging: Kriging | None = None

    def means(self, z: Tensor) -> Tensor:
        """What the BLUPs of the known levels of each row add up to, (n,)."""
        known = (self.codes >= 0)[..., None]
        b = torch.where(known, self.values[self.codes.clamp(min=0)].to(z), 0)
        if self.kriging is not None:
            b[self.kriging.rows] = self.kriging.means(self.values.to(z))
        return (z * b).flatten(1).sum(1)

    def prior_variance(self, like: Tensor, among: Tensor | None = None) -> Tensor:
        """What the levels of each row have of their prior variance (n,): all, or those ``among``, (n,) or
        (n, m). Levels of a row are independent there."""
        z = self.z.to(like)
        # Not by einsum, whose path by opt_einsum, where that is installed, takes rows for a constant.
        each = ((z @ self.prior().to(z)) * z).sum(-1)
        each = each if among is None else torch.where(among, each, 0)
        return each if each.dim() == 1 else each.sum(1)  # len() would be a constant in a program

    def variance_of_blups(self, among: Tensor) -> Tensor:
        """The most that the variance of the error of the BLUPs of the levels ``among`` can be (n,), of one
        level its own: the sum of m standard deviations, squared."""
        z = self.z.to(self.variances)
        own = self.variances[self.codes.clamp(min=0)]
        each = torch.where(among, torch.einsum("...k,...kl,...l->...", z, own, z), 0)
        if each.dim() == 1:
            return each
        return each.clamp(min=0).sqrt().sum(1) ** 2


def predicted(
    population: Tensor,
    X: Tensor,
    spread: Tensor,
    effects: Sequence[KnownEffect],
    errors: JointErrors,
) -> Prediction:
    r"""Mean and variance of the predictors of new observations, which have residuals beside.

    The error of :math:`x^\top\hat\beta + \sum_t z_t^\top \hat b_t` has the variance that the joint
    covariance of coefficients and BLUPs gives it; a level that was not seen adds
    :math:`z^\top G z`. A place among those of the levels adds what the levels leave of that, and the
    error of what they say; where the joint covariance is not at hand, the most that this can be.
    Before there were data, every level is one that was not seen.

    Args:
        population: (n,) the mean without random effects.
        X: (n, p) rows of the model matrix; p = 0 where there are no coefficients.
        spread: (p, p) covariance of the coefficients.
        effects: of each random effect.
        errors: the joint covariance.
    """
    mean, variance = population, torch.zeros_like(population)
    designs: list[CodedDesign | PlacedDesign] = []
    errors.settle()
    for effect in effects:
        z = effect.z.to(mean)
        kriging = effect.kriging if bool(errors.is_known) else None
        mean = mean + replace(effect, kriging=kriging).means(z)
        unseen = (effect.codes < 0) | ~errors.is_known
        if bool(unseen.any()):
            prior = effect.prior_variance(z, unseen)
            if kriging is not None:  # the part that the places do not tell
                prior[kriging.rows] = prior[kriging.rows] * kriging.left.to(z)
            variance = variance + prior
        design = design_of(torch.where(unseen, -1, effect.codes), z, len(effect.values))
        if effect.kriging is None:
            designs.append(design)
            continue
        assert isinstance(design, IndexedDesign)
        designs.append(PlacedDesign(design, effect.kriging, z))
    variance = variance + _error_variance(designs, X, spread, effects, errors)
    # Of a mean that the data do not tell, they do not tell the error either.
    return Prediction(mean, torch.where(mean.isnan(), torch.nan, variance), population)


def _error_variance(
    designs: Sequence[CodedDesign | PlacedDesign],
    X: Tensor,
    spread: Tensor,
    effects: Sequence[KnownEffect],
    errors: JointErrors,
) -> Tensor:
    r"""Variance of the error of the coefficients and of the BLUPs of known levels (n,).

    Where their covariances are not at hand, the sum of m variances stands for that of the sum, which
    is no more than m times as large: :math:`(\sum_i s_i)^2 \le m \sum_i s_i^2`.
    """
    if errors.has_variances():
        return errors.variance(designs, X).to(X)
    if bool(errors.is_known):
        warn(
            "predictive variances take random effects of different factors, and coefficients, "
            "as independent: there are too many for their joint covariance, and what the true ones "
            f"have beside the residual's is at most {len(effects) + (X.shape[1] > 0)} times as large",
        )
    found = torch.einsum("np,pq,nq->n", X, spread.to(X), X)
    for each, effect in zip(designs, effects, strict=True):
        found = found + effect.variance_of_blups((effect.codes >= 0) & errors.is_known).to(X)
        if isinstance(each, PlacedDesign) and bool(errors.is_known):
            rows = each.kriging.rows
            z = each.z[rows].to(X)
            prior = torch.einsum("nk,kl,nl->n", z, effect.prior().to(z), z)
            explained = (1 - each.kriging.left.to(z)) * prior
            most = torch.minimum(each.kriging.bound(z, effect.variances), explained)
            found = found.index_add(0, rows, most)
    return found


def predict_table(
    encoder: Any, model: Any, table: pd.DataFrame, level: float = 0.95
) -> pd.DataFrame:
    """Predictions for the rows of a table, with its index; rows with missing values are left out.

    Args:
        encoder: makes a batch of a table, an :class:`openreml_nn.table.Encoder`.
        model: predicts for a batch, an :class:`openreml_nn.MixedModel`.
        table: with the columns of the formula; the response is not needed.
        level: of ``low`` and ``high``, see :meth:`openreml_nn.MixedModel.interval`.

    Returns:
        A data frame with the columns ``mean``, ``variance``, ``population_mean``, ``low``, ``high``,
        for several responses ``trait`` before them and a row for each response.

    Raises:
        InputError: if a column is missing, or a level of a factor of the fixed effects is unknown.
        TypeError: if ``table`` is no data frame.
    """
    check_instance("table", table, pd.DataFrame, "a data frame")
    check_number("level", level, above=0, below=1)
    encoded = encoder.transform(table)
    found, low, high = model.interval(moved(encoded.batch(), model.beta.device), level)
    columns = {**found._asdict(), "low": low, "high": high}
    values = {name: value.double().numpy(force=True) for name, value in columns.items()}
    trait = {} if encoded.trait is None else {"trait": encoded.trait}
    return pd.DataFrame(trait | values, index=table.index[encoded.rows])


def moved(x: Any, device: torch.device) -> Any:
    """The tensors of a batch on a device."""
    if isinstance(x, Mapping):
        return {key: moved(item, device) for key, item in x.items()}
    return x.to(device)


def normal_interval(mean: Tensor, variance: Tensor, level: float = 0.95) -> tuple[Tensor, Tensor]:
    r"""The interval :math:`\mu \pm z_{(1 + level)/2}\,\sigma` of normal observations.

    Args:
        mean: (n,).
        variance: (n,).
        level: probability that an observation is within it.

    Returns:
        Its lower and upper ends, (n,) each.

    Raises:
        InputError: if the level is not between 0 and 1.

    >>> low, high = normal_interval(torch.zeros(1), torch.ones(1))
    >>> f"{float(low):.3f} {float(high):.3f}"
    '-1.960 1.960'
    """
    check_number("level", level, above=0, below=1)
    quantile = torch.special.ndtri(torch.tensor((1 + level) / 2, dtype=torch.float64))
    half = quantile.to(mean) * variance.sqrt()
    return mean - half, mean + half


def on_response(family: Family, found: Prediction, effects: Sequence[KnownEffect]) -> Prediction:
    r"""Predictions of the linear predictor on the scale of the response.

    With :math:`a \sim N(\hat\eta, v)` the mean is :math:`E\,\mu(a)`, and the variance of a new
    observation :math:`E\,V(a) + \mathrm{var}\,\mu(a)`, by Gauss-Hermite quadrature. The
    population's mean is :math:`E\,\mu(a)` for random effects of their prior.

    Args:
        family: of the response.
        found: of the linear predictor.
        effects: of each random effect.
    """
    prior = torch.zeros_like(found.variance)
    for effect in effects:
        prior = prior + effect.prior_variance(prior)
    mean, square = _expected(family, found.mean, found.variance)
    variance = square - mean * mean
    population, _ = _expected(family, found.population_mean, prior)
    return Prediction(mean, variance.clamp(min=0), population)


def log_predictive(family: Family, y: Tensor, found: Prediction) -> Tensor:
    r""":math:`\log E\,p(y_i \mid a_i)` with :math:`a_i \sim N(\hat\eta_i, v_i)`, (n,), by Gauss-Hermite
    quadrature.

    Args:
        family: of the response.
        y: the responses.
        found: predictions of the linear predictor.
    """
    spread = found.variance.clamp(min=0).sqrt()
    parts = [
        weight.log() + family.log_density(y, found.mean + node * spread)
        for node, weight in zip(*_hermite(spread), strict=True)
    ]
    return torch.logsumexp(torch.stack(parts), 0)


def _hermite(like: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes and weights of the expectation over a standard normal variable, (m,) each.

    They are tensors because an export to ONNX rounds Python's numbers to single precision.
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(_NODES)
    found = torch.tensor([nodes.tolist(), (weights / weights.sum()).tolist()], dtype=torch.float64)
    nodes, weights = found.to(like)
    return nodes, weights


def _expected(family: Family, eta: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """The expectation of the response and of its square for a normal predictor."""
    spread = variance.clamp(min=0).sqrt()
    mean, square = torch.zeros_like(eta), torch.zeros_like(eta)
    # A few nodes at a time: one by one takes long, all at once takes memory where rows are many.
    parts = (tensor.split(_TOGETHER) for tensor in _hermite(spread))
    for nodes, weights in zip(*parts, strict=True):
        a = eta + nodes[:, None] * spread
        own = family.mean(a)
        mean = mean + weights @ own
        square = square + weights @ (family.variance(a) + own * own)
    return mean, square


def lowered(g: Matrix, dtype: torch.dtype | None = None) -> Covariance:
    """The covariance of all levels by its structure, in the order of its columns, with ``dtype`` as
    :meth:`Matrix.terms` takes it."""
    terms = g.terms(None, dtype)
    if len(terms) == 1 and isinstance(terms[0].design, IdentityDesign):
        return terms[0].covariance
    with nullcontext() if dtype is None else g.computed_in(dtype):
        return DenseCovariance(g())


def prior_of(g: Covariance, levels: int, effects: int) -> Tensor:
    """Covariance of the effects of a level that was not seen, (k, k): where levels differ, the mean
    of their own.

    Args:
        g: of all levels.
        levels: q.
        effects: k.
    """
    if isinstance(g, RepeatedCovariance):
        return g.blocks(levels, effects)[0]
    if isinstance(g, ScaledCovariance) and len(g.matrix) == effects:
        return _mean_diagonal(g.kernel).to(g.matrix) * g.matrix
    if isinstance(g, PrecisionCovariance) and g.effects == effects:
        return g.of_new()
    blocks = g.whole(levels * effects).unflatten(1, (levels, effects))
    return blocks.unflatten(0, (levels, effects)).diagonal(dim1=0, dim2=2).mean(-1)


def _mean_diagonal(kernel: Kernel) -> Tensor:
    """That of K, which may be too large to be held where its inverse is sparse."""
    if kernel.inverse is None:
        return kernel.dense().diagonal().mean()
    total = torch.zeros((), dtype=torch.float64)
    for some in torch.arange(kernel.size).split(512):
        unit = torch.zeros(kernel.size, len(some), dtype=torch.float64)
        unit[some, torch.arange(len(some))] = 1
        total += kernel.multiply(unit)[some].diagonal().sum()
    return total / kernel.size
