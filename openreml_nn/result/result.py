"""What a fit found."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import log, nan
from types import NoneType
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from openreml_nn.covariance import Matrix
from openreml_nn.likelihood.effects import RandomEffects
from openreml_nn.likelihood.fixed import estimable
from openreml_nn.likelihood.plan import Plan
from openreml_nn.result.prediction import predict_table
from openreml_nn.support.checks import check_instance
from openreml_nn.support.errors import InputError
from openreml_nn.support.files import check_writable, write_text

__all__ = ["Component", "Estimate", "FixedEffects", "Label", "Record", "Result", "Start"]


class Label(NamedTuple):
    """Names for the tables: of a term's grouping factor, its effects and its levels.

    Attributes:
        group: the grouping factor as written.
        effects: of a level.
        levels: of the factor.
        basis: B (k, k) where the term holds :math:`z^\\top B` for the values z of the effects, see
            :mod:`openreml_nn.estimation.basis`; a result is of the effects of z.
    """

    group: str
    effects: Sequence[str]
    levels: Sequence[str]
    basis: Tensor | None = None


@dataclass(frozen=True)
class Estimate:
    """A covariance parameter on both scales, with standard errors by the delta method.

    A standard error is NaN for a parameter on the boundary or fixed.

    Attributes:
        name: path in the tree, such as ``subject/g/op_1/L_0_0``.
        value: what its transform yields.
        std_error: its standard error.
        untransformed: the value that the module stores.
        untransformed_std_error: its standard error.
        fixed: whether it was held at its value: fixed, or without a gradient.
    """

    name: str
    value: float
    std_error: float
    untransformed: float
    untransformed_std_error: float
    fixed: bool = False


@dataclass(frozen=True)
class Component:
    """The covariance of one term.

    Attributes:
        name: path of the term in the tree.
        group: name of the grouping factor; ``Residual`` for the residual.
        effects: names of the k effects.
        levels: names of the levels; empty for the residual.
        covariance: (k, k), or (q,) variances of a diagonal term.
        std_error: standard errors of its entries (delta method).
        singular: whether some combination of the effects has no variance.
        vanished: the effects that have none themselves.
    """

    name: str
    group: str
    effects: tuple[str, ...]
    levels: tuple[str, ...]
    covariance: Tensor
    std_error: Tensor
    singular: bool = False
    vanished: tuple[str, ...] = ()

    @property
    def std_dev(self) -> Tensor:
        """Standard deviations of the effects."""
        c = self.covariance
        return (c if c.dim() == 1 else c.diagonal()).sqrt()

    @property
    def correlation(self) -> Tensor:
        """Correlations of the effects; NaN where a variance is zero."""
        scale = self.std_dev
        if self.covariance.dim() == 1:
            return torch.eye(len(scale), dtype=scale.dtype, device=scale.device)
        found = self.covariance / (scale[:, None] * scale[None, :])
        found.diagonal().fill_(1.0)
        return found


@dataclass(frozen=True)
class FixedEffects:
    r"""BLUEs :math:`\hat\beta = (X^\top V^{-1} X)^{-1} X^\top V^{-1} y`.

    Attributes:
        names: names of the kept columns of X.
        estimate: (p,).
        covariance: :math:`(X^\top V^{-1} X)^{-1}` (p, p).
        columns: positions of the kept columns.
        aliases: (a, d) the null space of X with all its a columns, a column for each that was
            dropped: 1 at its own place, minus what it is of the kept ones at theirs.
    """

    names: tuple[str, ...]
    estimate: Tensor
    covariance: Tensor
    columns: tuple[int, ...]
    aliases: Tensor

    def estimable(self, rows: Tensor) -> Tensor:
        r"""Whether the data say what :math:`x^\top\beta` is, for rows x of X with all columns.

        It is so where x is a combination of rows of X, and so orthogonal to its null space.

        Args:
            rows: (m, a), aliased columns included.

        Returns:
            (m,) booleans.
        """
        return estimable(rows, self.aliases)

    def predict(self, rows: Tensor) -> Tensor:
        r""":math:`x^\top\hat\beta` of rows x (m, a) of X with all columns; NaN where it is not
        estimable."""
        found = rows[:, list(self.columns)] @ self.estimate.to(rows)
        return torch.where(self.estimable(rows), found, nan)

    @property
    def std_error(self) -> Tensor:
        """Standard errors."""
        return self.covariance.diagonal().sqrt()

    @property
    def statistic(self) -> Tensor:
        """Estimates divided by their standard errors."""
        return self.estimate / self.std_error


@dataclass(frozen=True)
class Record:
    """One iteration: where it ended and how.

    Attributes:
        log_likelihood: at its end.
        score_norm: at its start, in standard errors; NaN where it was not computed.
        step: accepted fraction of the full step; NaN for other optimizers.
        parameters: transformed parameters at its end, by name.
    """

    log_likelihood: float
    score_norm: float
    step: float
    parameters: Mapping[str, float]

    @classmethod
    def of(
        cls, covariance: Matrix, log_likelihood: float, score_norm: float = nan, step: float = nan
    ) -> Record:
        """With the present parameters of a covariance."""
        with torch.no_grad():
            values = covariance.build_params(out_format="dict")
        parameters = {name: float(value) for name, value in values.items()}
        return cls(log_likelihood, score_norm, step, parameters)


@dataclass(frozen=True)
class Start:
    """Where the fit ended from a start of which the result is not reported.

    Attributes:
        log_likelihood: at its end.
        iterations: its steps.
        converged: whether it ended at an optimum.
        same: whether that is the optimum of the result.
        parameters: transformed parameters at its end, by name.
    """

    log_likelihood: float
    iterations: int
    converged: bool
    same: bool
    parameters: Mapping[str, float]


@dataclass(frozen=True)
class Source:
    """What a result was had from, as inference needs it.

    Attributes:
        covariance: the covariance, whose parameters may have moved since.
        y: response (n,).
        X: model matrix of the fixed effects (n, p), aliased columns included.
        rows: rows of the covariance that the data belong to; None for all.
        names: names of the columns of X.
        labels: name of a term to names for the tables.
        means: means of the table's numeric columns.
        cells: the combinations of levels of the factors of X that the rows have, a data frame;
            None without a formula.
        offset: (n,) known part of the linear predictor of a response that is not Gaussian, from
            which it cannot be taken; None if there is none.
    """

    covariance: Matrix
    y: Tensor
    X: Tensor
    rows: Tensor | None
    names: tuple[str, ...]
    labels: Mapping[str, Label]
    means: Mapping[str, float] = field(default_factory=dict)
    cells: Any = None
    offset: Tensor | None = None


@dataclass(frozen=True)
class Result:
    r"""A fitted mixed model, linear or generalised.

    Attributes:
        method: ``"reml"`` or ``"ml"``.
        converged: whether the score norm is below a thousandth of a standard error.
        singular: the terms whose covariance is on the boundary: some
            combination of their effects has less than 1e-4 residual standard
            deviations.
        indistinct: parameters that the data cannot tell apart, or say nothing about.
        boundary: parameters at a boundary: a variance of 0, a correlation of ±1.
        score_norm: distance to the optimum in standard errors.
        condition: condition number of the scaled curvature.
        rows: number of rows n.
        log_likelihood: the (restricted) log-likelihood, constants included.
        log_likelihood_error: its Monte Carlo standard error; 0 where it is exact.
        fixed: BLUEs.
        parameters: covariance parameters.
        components: covariance of each term, the residual last where there is one.
        random: BLUPs with prediction-error variances.
        fitted: (n,) :math:`X\hat\beta + \sum_t Z_t \hat b_t`; empty where rows were streamed.
        residuals: (n,) :math:`y` less that.
        history: record of the iterations.
        plan: the solver's plan.
        num_params: number of estimated parameters of the covariance.
        starts: where the fit ended from its other starts, if it had any; see :class:`Start`.
        source: data and model, for inference; None where rows were streamed.
        formula: what was fitted, as it was written; None without one.
        dropped_rows: rows of the table left out because of missing values.
        optimizer: class name of the optimizer.
        seconds: wall time of the fit.
        encoder: what made X of a table, an :class:`openreml_nn.table.Encoder`; None without one.
        model: the :class:`openreml_nn.MixedModel` at the estimates, which predicts; None without
            a formula.
        family, link: of the response of a generalised linear mixed model; None for a linear one.
        quadrature: its points of quadrature over the random effects; 1 is Laplace's approximation.
        family_parameters: its family's parameters, or thresholds.
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
    family_parameters: tuple[Estimate, ...] = ()

    @property
    def iterations(self) -> int:
        """Number of iterations of the reported run, from its own start."""
        return len(self.history)

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
        found = [c.covariance for c in self.components if c.group == "Residual"]
        return sum(float((c if c.dim() == 1 else c.diagonal()).mean()) for c in found)

    def predict(self, table: pd.DataFrame, level: float = 0.95) -> pd.DataFrame:
        r"""Predictions of new observations for a table, on the scale of the formula's left side.

        ``mean`` is :math:`x^\top\hat\beta + \sum_t z_t^\top \hat b_t`, in which levels that were not
        seen have :math:`\hat b = 0` and are counted in a warning, and ``population_mean`` is
        :math:`x^\top\hat\beta`; NaN where the data do not say what that is. Both hold the offset.

        ``variance`` is that of :math:`y - \hat y`: the error variance of ``mean``, in which all
        covariances of coefficients and BLUPs count and a level that was not seen has
        :math:`z^\top G z`, and the residual's. That of a row is divided by its weight where the table
        has the weights' column, and is that of its position or stratum where it has its columns, else
        the mean. The residual of a new observation is independent of those of the data. Covariance
        parameters count as known. Beyond 2,000 effects beside the widest factor's, random effects of
        different factors count as independent, with a warning.

        Args:
            table: a data frame with the columns of the formula; the response is not needed.
            level: probability that a new observation is between ``low`` and ``high``.

        Returns:
            A data frame with the table's index and the columns ``mean``, ``variance``,
            ``population_mean``, ``low`` and ``high``; rows with missing values are left out.

        Raises:
            InputError: if there is no formula, a column is missing, or a level of a factor of the
                fixed effects is unknown.

        Reference:
            Henderson, Biometrics 31 (1975) 423.
        """
        if self.encoder is None or self.model is None:
            raise InputError(
                "`result` has no formula, so that a table says nothing to it: expected a fit of a "
                "formula; a model without one predicts by MixedModel.predict(batch)"
            )
        return predict_table(self.encoder, self.model, table, level)

    def summary(self, title: str | None = None) -> str:
        """The model as text, in the order of lme4's summary.

        Args:
            title: what stands for the formula; the result's own by default.
        """
        from openreml_nn.result.summary import summarise

        check_instance("title", title, (str, NoneType), "text, or None")
        return summarise(self, title)

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`to_dict` to a JSON file, whole or not at all.

        Raises:
            InputError: if there can be no file of that name.
        """
        check_instance("path", path, (str, os.PathLike), "a path")
        check_writable("path", path)
        write_text(path, json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n")

    def to_dict(self) -> dict[str, Any]:
        """All but BLUPs and fitted values, by the schema of ``result.json``. Numbers that do not
        exist are None."""
        from openreml_nn.result.record import to_record

        return to_record(self)
