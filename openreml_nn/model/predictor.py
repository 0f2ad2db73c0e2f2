"""Predictions of a mixed model, from what rows have said of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch
from torch import Tensor

from openreml_nn.covariance import Matrix
from openreml_nn.covariance.kernel import DistanceMatrix
from openreml_nn.covariance.spaced import distances
from openreml_nn.likelihood.fixed import estimable
from openreml_nn.model.adding import added
from openreml_nn.model.batch import Batch, level_places, part, responding, row_values, take
from openreml_nn.model.means import evaluating
from openreml_nn.model.posterior import Posterior
from openreml_nn.model.random_effect import RandomEffect, coded_effects, kernel_of
from openreml_nn.model.residual import structure_of
from openreml_nn.result.places import Kriging
from openreml_nn.result.prediction import (
    KnownEffect,
    Prediction,
    log_predictive,
    normal_interval,
    on_response,
    predicted,
)
from openreml_nn.result.solution import Solution
from openreml_nn.result.tables import table_of_blups
from openreml_nn.support.checks import found as described
from openreml_nn.support.errors import InputError
from openreml_nn.support.modes import outside_inference

__all__ = ["Predictor"]


class Predictor(Posterior):
    """A mixed model as far as it predicts; see :class:`Posterior` for its parts."""

    def check_loaded(self) -> None:
        """Refuse a model whose parameters have no values.

        Raises:
            InputError: if it is on the meta device.
        """
        if self.joint.is_known.is_meta or any(p.is_meta for p in self.parameters()):
            raise InputError(
                "the model is on the meta device, where nothing has a value: expected one with values, "
                "by load_state_dict(state, assign=True), or by to_empty(device=...) and load_state_dict(state)"
            )

    @property
    def precision(self) -> torch.dtype:
        """The precision of predictions: the widest of what the rows have said and of the residual's
        parameters, and float32 at least."""
        own = [effect.blup for effect in self.effects().values()]
        own += [self.beta] if self.head == "gls" else []
        found = torch.float32
        for tensor in (*own, *self.residual.parameters(), *self.residual.buffers()):
            if tensor.is_floating_point():
                found = torch.promote_types(found, tensor.dtype)
        return found

    def add(self, batch: Batch, levels: Mapping[str, Sequence[str]] | None = None) -> Solution:
        r"""Add rows to those that BLUPs and coefficients are from, without these: the same as
        :meth:`update` with all of them at the present parameters, and exact.

        A code that follows the known ones is a new level, which the model has from then on. Of the
        rows before, the cross-products with :math:`R^{-1}` are kept, in the checkpoint too; they are
        of the network and the residual variances as they were at the update. With a family the rows
        themselves are kept, in no checkpoint, with what the network said of them then, and modes and
        coefficients are found anew from all of them.

        Args:
            batch: the new rows, as :meth:`update` takes them.
            levels: by random effect the names of new levels, where its levels have names.

        Returns:
            The estimates from all rows, with their log-likelihood.

        Raises:
            InputError: as :meth:`update`, if there was none before, or for a model of which rows do
                not add up: with correlated residuals, or, beside the widest factor of
                independent levels, more than 2,000 effects and coefficients whose factor has
                more than 50 million entries.
        """
        with evaluating(self), outside_inference(False):
            return added(self, batch, levels or {})

    def blups(self) -> pd.DataFrame:
        """BLUPs as a table: group, level, effect, blup, and std_error, the root of the
        prediction-error variance."""
        return table_of_blups(
            (name, effect.names or range(effect.levels), effect.effect_names, *effect.known())
            for name, effect in self.effects().items()
        )

    @torch.no_grad()
    def predict(self, batch: Batch) -> Prediction:
        """Mean and variance of new observations, for known and for unknown levels.

        The variance counts every covariance, of BLUPs of different factors and of coefficients
        with BLUPs, where beside the widest factor of independent levels there are at most 2,000
        effects and coefficients, or a factor of them has no more than 50 million entries, which
        10,000 places of a dense kernel have. With more, a warning says that it takes them as independent. The
        residual of a new observation is independent of those of the data; its variance is divided
        by the row's weight where the batch has weights. A level that was not seen has its prior; one
        at a place, with its coordinates in ``batch["places"]``, the mean and variance given the places
        of the fit. Before :meth:`update` the variance is that
        of the priors. With a family all is on the scale of the response: means are expectations
        over the random effects, given the data or, of the population, without them. Of t responses
        means are (n, t), and the variance is their covariance (n, t, t). Of a mean
        without parameters a row has NaN where the data do not say its expectation.

        Raises:
            TypeError, InputError: as in :meth:`loss`, or before :meth:`update` with head ``"gls"``.
        """
        return self.interval(batch)[0]

    @torch.no_grad()
    def interval(self, batch: Batch, level: float = 0.95) -> tuple[Prediction, Tensor, Tensor]:
        """Predictions with the lower and the upper end of an interval for each row, (n,) each, or for
        each response, (n, t).

        For a Gaussian response it holds a new observation with the probability ``level``; with a
        family, the mean of new observations of the row.

        Raises:
            TypeError, InputError: as in :meth:`predict`, or if the level is not between 0 and 1.
        """
        rows = _Rows.of(self, batch)
        found, effects = rows.predicted(self)
        if self.family is not None:
            family = self.family.of_rows(batch.get("zi"))
            low, high = normal_interval(found.mean, found.variance, level)
            found = on_response(family, found, effects)
            return found, family.mean(low), family.mean(high)
        residual = rows.residuals(self, found.mean)
        whole = _by_row(found._replace(variance=found.variance + residual), self.responses)
        low, high = normal_interval(whole.mean, whole.variance, level)
        if self.responses > 1:
            residual = residual.reshape(whole.mean.shape)
            own = whole.variance - residual
            whole = whole._replace(variance=rows.covariances(self, own, residual))
        return whole, low, high

    @torch.no_grad()
    def log_density(self, batch: Batch) -> Tensor:
        r"""Logarithm of the predictive density of each row's response (n,), at the parameters'
        estimates: Gaussian with the mean and variance of :meth:`predict`; with a family
        :math:`E\,p(y \mid a)` over the predictor a. A row without a response, NaN in ``y``, has NaN. Of
        several responses it is that of each, (n, t).

        Raises:
            TypeError, InputError: as in :meth:`predict`, or if ``y`` does not fit.
        """
        given = _Rows.of(self, batch)
        found, _ = given.predicted(self)
        y = part(batch, "y").to(found.mean)
        if self.family is None:
            variance = found.variance + given.residuals(self, found.mean)
            found = _by_row(found._replace(variance=variance), self.responses)
        if len(y) != len(found.mean) or (self.family is None and y.shape != found.mean.shape):
            raise InputError(
                f"`batch['y']` is {described(y)}: expected {tuple(found.mean.shape)}, as predictions are"
            )
        if self.family is not None:
            weights = row_values(batch, "weights", len(y), positive=True)
            if weights is not None:  # a predictive density is that of one row: only trials count
                y, _ = self.family.with_weights(y, weights)
            own, rows = responding({"y": self.family.with_inputs(y, batch.get("zi"))})
            self.family.check(own["y"])
            if rows is None:
                return log_predictive(self.family, own["y"], found)
            there = Prediction(*(value[rows] for value in found))
            density = log_predictive(self.family, own["y"], there)
            return torch.full_like(found.mean, torch.nan).index_copy(0, rows, density)
        return -((2 * torch.pi * found.variance).log() + (y - found.mean) ** 2 / found.variance) / 2


def _by_row(found: Prediction, responses: int) -> Prediction:
    """Predictions of several responses, (n, t) each."""
    if responses == 1:
        return found
    return Prediction(*(value.unflatten(0, (-1, responses)) for value in found))


@dataclass(frozen=True)
class _Rows:
    """What a prediction takes of some rows; of several responses there is a row for each.

    Attributes:
        population: (n,) the response, or its linear predictor, without random effects.
        X: (n, p) features with head ``"gls"``, else p = 0.
        coded: by random effect the level of each row (n,) and values (n, k).
        batch: the rows themselves.
    """

    population: Tensor
    X: Tensor
    coded: Mapping[str, tuple[Tensor, Tensor]]
    batch: Batch

    @classmethod
    def of(cls, model: Predictor, batch: Batch) -> _Rows:
        """Those of a batch."""
        model.check_loaded()
        with evaluating(model):
            output = model(batch)
            model.check(batch)
            if model.responses > 1:
                batch = {key: value for key, value in batch.items() if key != "y"}
            batch, output = model.single(batch, output, is_data=False)
            n, dtype = len(output), torch.promote_types(output.dtype, model.precision)
            if model.head == "gls":
                if not bool(model.joint.is_known):
                    raise InputError("there are no coefficients yet: call update() with the data")
                X = output[:, : len(model.beta)].to(dtype)
                population = X @ model.beta.to(X)
                if not any(True for _ in model.mean.parameters()):
                    population = torch.where(estimable(X, model.aliases), population, torch.nan)
            else:
                population = output.to(dtype)
                X = population.new_zeros(n, 0)
            offset = row_values(batch, "offset", n)
            if offset is not None:
                population = population + offset.to(population)
            coded = {
                name: (codes, population.new_ones(*codes.shape, 1) if values is None else values)
                for name, (codes, values) in coded_effects(model.effects(), batch, n).items()
            }
            return cls(population, X, coded, batch)

    def predicted(self, model: Predictor) -> tuple[Prediction, list[KnownEffect]]:
        """Predictions of the linear predictor, and what is known of effects."""
        dtype = self.population.dtype
        effects = [
            _known_effect(model.effects()[name], name, codes, z, self.batch, dtype)
            for name, (codes, z) in self.coded.items()
        ]
        spread = model.beta_covariance
        return predicted(self.population, self.X, spread, effects, model.joint), effects

    def residuals(self, model: Predictor, mean: Tensor) -> Tensor:
        """Variances of the residuals (n,) of a Gaussian response, whose means are known."""
        structure, batch = structure_of(model.residual), self.batch
        if structure.of_fitted:
            batch = {**batch, "covariate": mean}
        with evaluating(model):
            return structure.variances(batch, len(mean)).to(mean)

    def covariances(self, model: Predictor, own: Tensor, residual: Tensor) -> Tensor:
        r"""Covariance (n, t, t) of the t responses of each row, from the variances (n, t) of their linear
        predictors and of their residuals.

        That of two linear predictors is :math:`(\mathrm{var}(a + b) - \mathrm{var}\,a -
        \mathrm{var}\,b) / 2`, and a sum of two rows of the same levels is a row too.
        """
        n, t = own.shape
        j, k = torch.triu_indices(t, t, 1, device=own.device)
        start = t * torch.arange(n, device=own.device)[:, None]
        one, other = ((start + at).reshape(-1) for at in (j, k))
        places = {key: at for key, at in self.batch.get("places", {}).items() if at is not None}
        sums = _Rows(
            self.population[one],
            self.X[one] + self.X[other],
            {name: (codes[one], z[one] + z[other]) for name, (codes, z) in self.coded.items()},
            {"places": take(places, one)},
        )
        together = sums.predicted(model)[0].variance.reshape(n, -1)
        pairs = (together - own[:, j] - own[:, k]) / 2
        if isinstance(model.residual, Matrix) and model.residual.shape == (t, t):
            R = model.residual().to(own)
            scale = (residual / R.diagonal()).sqrt()  # by weights
            pairs = pairs + R[j, k] * scale[:, j] * scale[:, k]
        found = torch.diag_embed(own + residual)
        found[:, j, k] = found[:, k, j] = pairs
        return found


def _known_effect(
    effect: RandomEffect, name: str, codes: Tensor, z: Tensor, batch: Batch, dtype: torch.dtype
) -> KnownEffect:
    """What is known of a random effect in some rows.

    Args:
        effect: the random effect.
        name: its name.
        codes: (n,) levels, -1 for one that was not seen; (n, m) of rows of m levels each.
        z: (n, k) values of the effects in their basis; (n, m, k) of such rows.
        batch: the rows, with coordinates in ``batch["places"]`` where the effect has them.
        dtype: in which covariances are computed.
    """

    def prior() -> Tensor:
        return effect.prior_in_basis(dtype)

    known = KnownEffect(codes, z, effect.blup, effect.variance, prior)
    at, kernel = level_places(batch, name, effect.places, len(codes)), kernel_of(effect.g)
    if at is None or kernel is None or effect.places is None:
        return known
    rows = (codes < 0).nonzero()[:, 0]
    own = at[rows].to(effect.places)
    with kernel.computed_in(dtype):
        if isinstance(kernel, DistanceMatrix) and not kernel.is_chain():
            c = kernel.between(distances(own, effect.places))
            return replace(known, kriging=Kriging.of(rows, kernel(), c))
        if not len(rows):
            return known
        return replace(known, kriging=Kriging(rows, *kernel.regressed(own)))
