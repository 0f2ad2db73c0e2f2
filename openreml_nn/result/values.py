"""The values of a fit, and the criteria that follow from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import log, nan
from typing import Any

from torch import Tensor

from openreml_nn.likelihood.effects import RandomEffects
from openreml_nn.likelihood.plan import Plan
from openreml_nn.result.parts import Component, Estimate, FixedEffects, Record, Source, Start

__all__ = ["FitValues"]


@dataclass(frozen=True)
class FitValues:
    r"""Values of a fitted mixed model, linear or generalised.

    Attributes:
        method: ``"reml"`` or ``"ml"``.
        converged: whether the score norm is below a thousandth of a standard error.
        singular: the terms whose covariance is on the boundary: some
            combination of their effects has less than 1e-4 residual standard
            deviations.
        indistinct: parameters that the data cannot tell apart, or say nothing about.
        boundary: parameters at a boundary: a variance of 0, a correlation of ±1.
        kinks: ranges that lie at an observed distance, where the likelihood has a kink: it falls to both
            sides, with a slope, and they have no standard error.
        score_norm: distance to the optimum in standard errors.
        condition: condition number of the scaled curvature.
        rows: number of rows n.
        log_likelihood: the (restricted) log-likelihood, constants included.
        log_likelihood_error: what is unknown of it: its Monte Carlo standard error where the solver is
            not exact, and what rounding leaves where that is more than 1e-6; else 0.
        fixed: BLUEs.
        parameters: covariance parameters.
        components: covariance of each term, the residual last where there is one.
        random: BLUPs with prediction-error variances.
        fitted: (n,) :math:`X\hat\beta + \sum_t Z_t \hat b_t`; empty where rows were streamed
            or came later.
        residuals: (n,) :math:`y` less that.
        history: record of the iterations.
        plan: the solver's plan.
        num_params: number of estimated parameters of the covariance.
        starts: where the fit ended from its other starts, if it had any; see :class:`Start`.
        source: data and model, for inference; None where rows were streamed or
            came later.
        formula: what was fitted, as it was written; None without one.
        dropped_rows: rows of the table left out because of missing values.
        optimizer: class name of the optimizer.
        seconds: wall time of the fit.
        encoder: what made X of a table, an :class:`openreml_nn.table.Encoder`; None without one.
        model: the :class:`openreml_nn.MixedModel` at the estimates, which predicts; None without
            a formula.
        family: of the response of a generalised linear mixed model; None for a linear one.
        link: of the family; None for a linear mixed model.
        quadrature: its points of quadrature over the random effects; 1 is Laplace's approximation.
        zi: formula of its zero part; None without one.
        family_parameters: its family's parameters, or thresholds.
        constraints: what a user held (a value), bounded (a pair of ends) or tied (the name of another)
            of the parameters, by their names.
    """

    method: str
    converged: bool
    singular: tuple[str, ...]
    indistinct: tuple[str, ...]
    boundary: tuple[str, ...]
    score_norm: float
    condition: float
    rows: int
    log_likelihood: float
    log_likelihood_error: float
    fixed: FixedEffects
    parameters: tuple[Estimate, ...]
    components: tuple[Component, ...]
    random: tuple[RandomEffects, ...]
    fitted: Tensor = field(repr=False)
    residuals: Tensor = field(repr=False)
    history: tuple[Record, ...]
    plan: Plan
    num_params: int
    kinks: tuple[str, ...] = ()
    starts: tuple[Start, ...] = ()
    source: Source | None = field(default=None, repr=False, compare=False)
    formula: str | None = None
    dropped_rows: int = 0
    optimizer: str = "AIREML"
    seconds: float = field(default=nan, compare=False)
    encoder: Any = field(default=None, repr=False, compare=False)
    model: Any = field(default=None, repr=False, compare=False)
    family: str | None = None
    link: str | None = None
    quadrature: int = 1
    zi: str | None = None
    family_parameters: tuple[Estimate, ...] = ()
    constraints: Mapping[str, Any] = field(default_factory=dict)

    @property
    def iterations(self) -> int:
        """Number of iterations of the reported run, from its own start."""
        return len(self.history)

    @property
    def groups(self) -> dict[str, int]:
        """The number of levels of each grouping factor."""
        return {c.group: len(c.levels) for c in self.components if not c.is_residual}

    @property
    def deviance(self) -> float:
        r""":math:`-2\ell`, for REML also called the REML criterion."""
        return -2 * self.log_likelihood

    @property
    def aic(self) -> float:
        r""":math:`-2\ell + 2k` with k fixed effects and covariance parameters."""
        return self.deviance + 2 * (len(self.fixed.names) + self.num_params)

    @property
    def bic(self) -> float:
        r""":math:`-2\ell + k\log n`."""
        return self.deviance + log(self.rows) * (len(self.fixed.names) + self.num_params)

    @property
    def residual_variance(self) -> float:
        """Variance of the residual, on average over its strata or positions; that of a row of
        weight 1; NaN for a response that is not Gaussian."""
        if self.family is not None:
            own = {e.name: e.value for e in self.family_parameters}
            return own["sigma^2"] if self.family == "gaussian" else nan
        found = [c.covariance for c in self.components if c.is_residual]
        return sum(float((c if c.dim() == 1 else c.diagonal()).mean()) for c in found)
