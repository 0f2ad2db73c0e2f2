"""Predictions of a mixed model, from what rows have said of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from torch import Tensor

from openreml_nn.likelihood.fixed import estimable
from openreml_nn.model.adding import added
from openreml_nn.model.batch import Batch, part, responding, row_values
from openreml_nn.model.means import evaluating
from openreml_nn.model.posterior import Posterior
from openreml_nn.model.random_effect import coded_effects, known_effect
from openreml_nn.model.residual import structure_of
from openreml_nn.result.joint import Solution
from openreml_nn.result.prediction import (
    KnownEffect,
    Prediction,
    log_predictive,
    normal_interval,
    on_response,
    predicted,
)
from openreml_nn.result.tables import table_of_blups
from openreml_nn.support.checks import found as described
from openreml_nn.support.errors import InputError

__all__ = ["Predictor"]


class Predictor(Posterior):
    """A mixed model as far as it predicts; see :class:`Posterior` for its parts."""

    def add(self, batch: Batch, levels: Mapping[str, Sequence[str]] | None = None) -> Solution:
        r"""Add rows to those that BLUPs and coefficients are from, without these: the same as
        :meth:`update` with all of them at the present parameters, and exact.

        A code that follows the known ones is a new level, which the model has from then on. Of the
        rows before, the cross-products with :math:`R^{-1}` are kept, in the checkpoint too; they are
        of the network and the residual variances as they were at the update.

        Args:
            batch: the new rows, as :meth:`update` takes them.
            levels: by random effect the names of new levels, where its levels have names.

        Returns:
            The estimates from all rows, with their log-likelihood.

        Raises:
            InputError: as :meth:`update`, if there was none before, or for a model of which rows do
                not add up: with a family, correlated residuals, or, beside the widest factor of
                independent levels, more than 2,000 effects and coefficients whose sparse factor has
                more than 50 million entries.
        """
        with evaluating(self):
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
        effects and coefficients, or a sparse factor of them has no more than 50 million entries. With
        more, a warning says that it takes them as independent. The
        residual of a new observation is independent of those of the data; its variance is divided
        by the row's weight where the batch has weights. A level that was not seen has its prior; one
        at a place, with its coordinates in ``batch["places"]``, the mean and variance given the places
        of the fit. Before :meth:`update` the variance is that
        of the priors. With a family all is on the scale of the response: means are expectations
        over the random effects, given the data or, of the population, without them. Of a mean
        without parameters a row has NaN where the data do not say its expectation.

        Raises:
            TypeError, InputError: as in :meth:`loss`, or before :meth:`update` with head ``"gls"``.
        """
        return self.interval(batch)[0]

    @torch.no_grad()
    def interval(self, batch: Batch, level: float = 0.95) -> tuple[Prediction, Tensor, Tensor]:
        """Predictions with the lower and the upper end of an interval for each row, (n,) each.

        For a Gaussian response it holds a new observation with the probability ``level``; with a
        family, the mean of new observations of the row.

        Raises:
            TypeError, InputError: as in :meth:`predict`, or if the level is not between 0 and 1.
        """
        found, effects = _linear_predictor(self, batch)
        if self.family is not None:
            family = self.family.of_rows(batch.get("zi"))
            low, high = normal_interval(found.mean, found.variance, level)
            found = on_response(family, found, effects)
            return found, family.mean(low), family.mean(high)
        if self.responses > 1:
            found = self._by_row(found)
        return found, *normal_interval(found.mean, found.variance, level)

    @torch.no_grad()
    def log_density(self, batch: Batch) -> Tensor:
        r"""Logarithm of the predictive density of each row's response (n,), at the parameters'
        estimates: Gaussian with the mean and variance of :meth:`predict`; with a family
        :math:`E\,p(y \mid a)` over the predictor a. A row without a response, NaN in ``y``, has NaN.

        Raises:
            TypeError, InputError: as in :meth:`predict`, or if ``y`` does not fit.
        """
        found, _ = _linear_predictor(self, batch)
        y = part(batch, "y").to(found.mean)
        if self.responses > 1:
            found = self._by_row(found)
        if len(y) != len(found.mean) or (self.family is None and y.shape != found.mean.shape):
            raise InputError(
                f"`batch['y']` is {described(y)}: expected {tuple(found.mean.shape)}, as predictions are"
            )
        if self.family is not None:
            own, rows = responding({"y": self.family.with_inputs(y, batch.get("zi"))})
            self.family.check(own["y"])
            if rows is None:
                return log_predictive(self.family, own["y"], found)
            there = Prediction(*(value[rows] for value in found))
            density = log_predictive(self.family, own["y"], there)
            return torch.full_like(found.mean, torch.nan).index_copy(0, rows, density)
        return -((2 * torch.pi * found.variance).log() + (y - found.mean) ** 2 / found.variance) / 2

    def _by_row(self, found: Prediction) -> Prediction:
        """Predictions of several responses, (n, t) each."""
        return Prediction(*(value.unflatten(0, (-1, self.responses)) for value in found))


def _linear_predictor(model: Predictor, batch: Batch) -> tuple[Prediction, list[KnownEffect]]:
    """Predictions of the response, or of its linear predictor, and what is known of effects."""
    with evaluating(model):
        output = model(batch)
        model.check(batch)
        if model.responses > 1:
            batch = {key: value for key, value in batch.items() if key != "y"}
        batch, output = model.single(batch, output, is_data=False)
        n = len(output)
        if model.head == "gls":
            if not bool(model.joint.is_known):
                raise InputError("there are no coefficients yet: call update() with the data")
            X = output[:, : len(model.beta)].to(model.beta)
            population = X @ model.beta
            if not any(True for _ in model.mean.parameters()):
                population = torch.where(estimable(X, model.aliases), population, torch.nan)
        else:
            population = output.double()
            X = population.new_zeros(n, 0)
        offset = row_values(batch, "offset", n)
        if offset is not None:
            population = population + offset.to(population)
        effects = []
        for name, (codes, values) in coded_effects(model.effects(), batch, n).items():
            z = population.new_ones(n, 1) if values is None else values
            effects.append(known_effect(model.effects()[name], name, codes, z, batch))
        found = predicted(population, X, model.beta_covariance, effects, model.joint)
        if model.family is not None:
            return found, effects
        structure = structure_of(model.residual)
        if structure.of_fitted:
            batch = {**batch, "covariate": found.mean}
        residual = structure.variances(batch, n).to(found.variance)
        return found._replace(variance=found.variance + residual), effects
