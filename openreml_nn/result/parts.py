"""What a fit is made of: estimates, components, steps, and what they were had from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import nan
from typing import Any, NamedTuple

import torch
from torch import Tensor

from openreml_nn.covariance import Matrix
from openreml_nn.likelihood.fixed import estimable

__all__ = [
    "RESIDUAL_GROUP",
    "Component",
    "Estimate",
    "FixedEffects",
    "Label",
    "Record",
    "Source",
    "Start",
]

#: What stands for a grouping factor in the residual's component.
RESIDUAL_GROUP = "Residual"


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

    @property
    def is_residual(self) -> bool:
        """Whether the label is the residual's; a grouping factor of the same name has levels."""
        return self.group == RESIDUAL_GROUP and not self.levels


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
        covariance: (k, k), or variances alone, of a diagonal term (q,) and of more places in series than
            have their correlations formed (k,).
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
    def is_residual(self) -> bool:
        """Whether the component is the residual; a grouping factor of the same name has levels."""
        return self.group == RESIDUAL_GROUP and not self.levels

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
    """Another start of a fit, and where it ended; the result is of the best start.

    Attributes:
        log_likelihood: at its end.
        iterations: its steps.
        converged: whether it ended at an optimum. A start that is left because, at the pace of its
            last steps, it cannot end as the best did not.
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
    """The covariance, data and options from which a result was computed, for inference.

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
        weights: (n,) factors of the rows' log-densities, of a response that is not Gaussian; None
            where all are one.
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
    weights: Tensor | None = None
