"""What data have said of a mean and of random effects, and the predictions that follow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from openreml_nn.covariance import DummyMatrix, Matrix, Operator, Sum
from openreml_nn.covariance.params import operand_name
from openreml_nn.families import Family
from openreml_nn.likelihood.effects import Coefficients, RandomEffects
from openreml_nn.likelihood.fixed import estimable
from openreml_nn.model.batch import Batch, part, row_values, rows_of
from openreml_nn.model.means import evaluating
from openreml_nn.model.random_effect import Effects, RandomEffect, coded_effects
from openreml_nn.model.residual import ResidualStructure, structure_of
from openreml_nn.result.equations import Equations
from openreml_nn.result.joint import JointErrors
from openreml_nn.result.prediction import (
    KnownEffect,
    Prediction,
    log_predictive,
    lowered,
    normal_interval,
    on_response,
    predicted,
)
from openreml_nn.result.result import FixedEffects
from openreml_nn.result.tables import table_of_blups
from openreml_nn.support.errors import InputError
from openreml_nn.terms.term import Term

__all__ = ["Predictor"]


class Predictor(nn.Module):
    """The parts of a mixed model, with the coefficients and BLUPs that were found from data.

    A subclass yields the mean, or the features, of a batch, in its ``forward``.

    Args:
        mean: the network of the mean, or of the features.
        random: random effects by name.
        residual: of a row, as :func:`structure_of` takes it, or a family.
        head: ``"ml"`` or ``"gls"``, whether the network yields the mean or features.

    Attributes:
        beta: (p,) coefficients of the features, with head ``"gls"``; 0 for those that were dropped.
        beta_covariance: (p, p) their covariance.
        aliases: (p, d) null space of the features.
        joint: the joint covariance of coefficients and BLUPs.
    """

    beta: Tensor
    beta_covariance: Tensor
    aliases: Tensor

    def __init__(
        self, mean: nn.Module, random: Mapping[str, RandomEffect], residual: nn.Module, head: str
    ) -> None:
        super().__init__()
        self.mean = mean
        self.random = Effects(random)
        self.residual = residual
        self.head = head
        none = torch.zeros(0, 0, dtype=torch.float64)
        self.register_buffer("beta", none.reshape(0))
        self.register_buffer("beta_covariance", none)
        self.register_buffer("aliases", none)
        self.joint = JointErrors()

    @property
    def family(self) -> Family | None:
        """The family of the response, which has the residual's place; None for a Gaussian one."""
        return self.residual if isinstance(self.residual, Family) else None

    def covariance_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the covariance: what :class:`AIREML` is for."""
        for effect in self.effects().values():
            yield from effect.g.parameters()
        if isinstance(self.residual, Matrix | ResidualStructure):
            yield from self.residual.parameters()

    def network_parameters(self) -> Iterator[nn.Parameter]:
        """All other parameters."""
        own = {id(p) for p in self.covariance_parameters()}
        return (p for p in self.parameters() if id(p) not in own)

    def effects(self) -> dict[str, RandomEffect]:
        """The random effects by name."""
        return dict(self.random.items())

    @torch.no_grad()
    def remember(
        self, random: Sequence[RandomEffects], fixed: Coefficients | FixedEffects, aliases: Tensor
    ) -> None:
        """Take up BLUPs and coefficients.

        Args:
            random: BLUPs of each random effect.
            fixed: coefficients of the kept columns of X, with their covariance.
            aliases: (p, d) the null space of X with all its columns.
        """
        effects = {operand_name(name, {"residual"}): e for name, e in self.effects().items()}
        for found in random:
            if found.name not in effects:
                continue  # of the rows' own errors
            effect = effects[found.name]
            q, k = effect.blup.shape
            # Rows of no known level had levels of their own, which come after the others.
            effect.blup.copy_(found.values.reshape(-1, k)[:q])
            effect.variance.copy_(found.variances.reshape(-1, k, k)[:q])
        at, p = torch.tensor(fixed.columns, dtype=torch.long, device=aliases.device), len(aliases)
        self.beta = aliases.new_zeros(p).index_copy(0, at, fixed.estimate.to(aliases))
        self.beta_covariance = aliases.new_zeros(p, p)
        self.beta_covariance[at[:, None], at] = fixed.covariance.to(aliases)
        self.aliases = aliases.clone()

    @torch.no_grad()
    def remember_errors(
        self,
        covariance: Matrix,
        fixed: Callable[[], tuple[Tensor, Tensor]],
        r: int,
        residual: Term | None = None,
    ) -> None:
        """Take up what the variances of predictions need, which is computed when one is asked for.

        Args:
            covariance: of the rows, as :meth:`covariance` makes it.
            fixed: yields X in an orthonormal basis, Q (n, r), and the basis (p, r).
            r: number of coefficients.
            residual: what stands for the residual where a family has its place.
        """
        assert isinstance(covariance, Sum)
        parts = list(covariance.operands.values())
        own = [part for part in parts[len(self.random) :] if isinstance(part, Matrix)]
        terms = [term.detach() for part in own for term in part.terms()]
        if residual is not None:
            terms = [residual]
        random = [part for part in parts[: len(self.random)] if isinstance(part, Operator)]
        pairs = [part.operands.values() for part in random]
        designs = [z.design for z, _ in pairs if isinstance(z, DummyMatrix)]
        self.joint.update(
            [lowered(g).map(Tensor.detach) for _, g in pairs if isinstance(g, Matrix)],
            [(design.levels, design.effects) for design in designs],
            r,
            lambda: Equations.of(designs, terms, *fixed()),
        )

    def blups(self) -> pd.DataFrame:
        """BLUPs as a table: group, level, effect, blup, and std_error, the root of the
        prediction-error variance."""
        return table_of_blups(
            (name, effect.names or range(effect.levels), effect.effect_names, *effect.known())
            for name, effect in self.effects().items()
        )

    def random_part(self, batch: Batch) -> Tensor:
        r""":math:`\sum_t z_t^\top \hat b_t` of each row (n,), zero for unknown levels."""
        n = rows_of(batch)
        total = self.joint.covariance.new_zeros(n)
        for name, (codes, values) in coded_effects(self.effects(), batch, n).items():
            effect = self.effects()[name]
            z = total.new_ones(n, 1) if values is None else values
            total = total + effect.contribution(codes, z.to(effect.blup))
        return total

    @torch.no_grad()
    def predict(self, batch: Batch) -> Prediction:
        """Mean and variance of new observations, for known and for unknown levels.

        The variance counts every covariance, of BLUPs of different factors and of coefficients
        with BLUPs, where beside the widest factor of independent levels there are at most 2,000
        effects and coefficients. With more, a warning says that it takes them as independent. The
        residual of a new observation is independent of those of the data; its variance is divided
        by the row's weight where the batch has weights. Before :meth:`update` the variance is that
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
            return on_response(self.family.of_rows(batch.get("zi")), found, effects, level)
        return found, *normal_interval(found.mean, found.variance, level)

    @torch.no_grad()
    def log_density(self, batch: Batch) -> Tensor:
        r"""Logarithm of the predictive density of each row's response (n,), at the parameters'
        estimates: Gaussian with the mean and variance of :meth:`predict`; with a family
        :math:`E\,p(y \mid a)` over the predictor a.

        Raises:
            TypeError, InputError: as in :meth:`predict`, or if ``y`` does not fit.
        """
        found, _ = _linear_predictor(self, batch)
        y = part(batch, "y").to(found.mean)
        if len(y) != len(found.mean):
            raise InputError(f"`y` has {len(y)} rows but `mean` yields {len(found.mean)}")
        if self.family is not None:
            y = self.family.with_inputs(y, batch.get("zi"))
            self.family.check(y)
            return log_predictive(self.family, y, found)
        return -((2 * torch.pi * found.variance).log() + (y - found.mean) ** 2 / found.variance) / 2

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # The number of coefficients is known only once there are features.
        for name in ("beta", "beta_covariance", "aliases"):
            if prefix + name in state_dict:
                setattr(self, name, torch.empty_like(state_dict[prefix + name]))
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _linear_predictor(model: Predictor, batch: Batch) -> tuple[Prediction, list[KnownEffect]]:
    """Predictions of the response, or of its linear predictor, and what is known of effects."""
    with evaluating(model):
        output = model(batch)
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
            effects.append(model.effects()[name].of_rows(codes, z))
        residual = population.new_zeros(n)
        if model.family is None:
            residual = structure_of(model.residual).variances(batch, n)
        found = predicted(population, X, model.beta_covariance, effects, model.joint, residual)
        return found, effects
