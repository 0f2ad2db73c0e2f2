"""What a fit found."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import log, nan
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from openreml_nn.checks import check_instance
from openreml_nn.covariance import DummyMatrix, Matrix
from openreml_nn.covariance.design import IndexedDesign
from openreml_nn.covariance.operator import Operator
from openreml_nn.covariance.terms import (
    KroneckerCovariance,
    RepeatedCovariance,
    ScaledCovariance,
    Term,
    residual_terms,
)
from openreml_nn.errors import InputError
from openreml_nn.estimation.aireml import Curvature
from openreml_nn.estimation.derivatives import jacobian
from openreml_nn.files import write_text
from openreml_nn.likelihood.fixed import estimable
from openreml_nn.likelihood.loss import Objective
from openreml_nn.likelihood.plan import Plan
from openreml_nn.likelihood.problem import Evaluation, RandomEffects

__all__ = ["Component", "Estimate", "FixedEffects", "Label", "Record", "Result", "Start"]

#: A random effect this many residual standard deviations small is none (as in lme4).
SINGULAR = 1e-4


class Label(NamedTuple):
    """Names for the tables: of a term's grouping factor, its effects and its levels."""

    group: str
    effects: Sequence[str]
    levels: Sequence[str]


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
        encoder: what made X of a table, an :class:`openreml_nn.table.Encoder`; None without one.
        means: means of the table's numeric columns.
        cells: the combinations of levels of the factors of X that the rows have, a data frame;
            None without an encoder.
    """

    covariance: Matrix
    y: Tensor
    X: Tensor
    rows: Tensor | None
    names: tuple[str, ...]
    labels: Mapping[str, Label]
    encoder: Any = None
    means: Mapping[str, float] = field(default_factory=dict)
    cells: Any = None


@dataclass(frozen=True)
class Result:
    r"""A fitted linear mixed model.

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
        weight 1."""
        found = [c.covariance for c in self.components if c.group == "Residual"]
        return sum(float((c if c.dim() == 1 else c.diagonal()).mean()) for c in found)

    def predict(self, table: Any) -> Any:
        r"""Predictions for a table, on the scale of the formula's left side.

        ``mean`` is :math:`x^\top\hat\beta + \sum_t z_t^\top \hat b_t`, in which levels that were not
        seen have :math:`\hat b = 0` and are counted in a warning, and ``population_mean`` is
        :math:`x^\top\hat\beta`; NaN where the data do not say what that is. Both hold the offset.

        Args:
            table: a data frame with the columns of the formula; the response is not needed.

        Returns:
            A data frame with the table's index; rows with missing values are left out.

        Raises:
            InputError: if there is no formula, a column is missing, or a level of a factor of the
                fixed effects is unknown.
        """
        import pandas as pd

        if self.source is None or self.source.encoder is None:
            raise InputError("`result` has no formula: predictions are for fits by lmm()")
        encoded = self.source.encoder.transform(table)
        population = self.fixed.predict(encoded.X)
        if encoded.offset is not None:
            population = population + encoded.offset
        mean = population.clone()
        blups = {effects.name: effects.values for effects in self.random}
        for design in encoded.random:
            known = blups[design.name][design.codes.clamp(min=0)]
            mean += torch.where(design.codes >= 0, (design.values * known).sum(1), 0)
        columns = {"mean": mean.numpy(), "population_mean": population.numpy()}
        return pd.DataFrame(columns, index=table.index[encoded.rows])

    def summary(self, title: str | None = None) -> str:
        """The model as text, in the order of lme4's summary."""
        from openreml_nn.estimation.summary import summarise

        check_instance("title", title, (str, NoneType), "text, or None")
        return summarise(self, title)

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write all but the BLUPs and fitted values to a JSON file, whole or not at all."""
        check_instance("path", path, (str, os.PathLike), "a path")
        write_text(path, json.dumps(self.to_dict(), indent=2) + "\n")

    def to_dict(self) -> dict[str, Any]:
        """What :meth:`to_json` writes. Numbers that do not exist are None."""
        fixed = zip(
            self.fixed.names,
            self.fixed.estimate.tolist(),
            self.fixed.std_error.tolist(),
            self.fixed.statistic.tolist(),
            strict=True,
        )
        return finite(
            {
                "method": self.method,
                "converged": self.converged,
                "singular": list(self.singular),
                "indistinct": list(self.indistinct),
                "boundary": list(self.boundary),
                "score_norm": self.score_norm,
                "condition": self.condition,
                "rows": self.rows,
                "log_likelihood": self.log_likelihood,
                "log_likelihood_error": self.log_likelihood_error,
                "deviance": self.deviance,
                "aic": self.aic,
                "bic": self.bic,
                "solver": self.plan.solver,
                "exact": self.plan.exact,
                "fixed": [
                    {"name": n, "estimate": b, "std_error": s, "statistic": t}
                    for n, b, s, t in fixed
                ],
                "parameters": [vars(estimate) for estimate in self.parameters],
                "components": [
                    {
                        "group": c.group,
                        "effects": list(c.effects),
                        "levels": len(c.levels),
                        "covariance": c.covariance.tolist(),
                        "std_error": c.std_error.tolist(),
                    }
                    for c in self.components
                ],
                "history": [vars(record) for record in self.history],
                "starts": [vars(start) for start in self.starts],
            }
        )

    @classmethod
    def of(
        cls,
        objective: Objective,
        plan: Plan,
        y: Tensor | None,
        X: Tensor | None,
        history: Sequence[Record] = (),
        names: Sequence[str] | None = None,
        labels: Mapping[str, Label] | None = None,
        starts: Sequence[Start] = (),
    ) -> Result:
        """The result at the present parameters, however they were found.

        Without the rows, ``y`` and ``X``, there are no fitted values.
        """
        with torch.no_grad():
            found = _Builder(objective, labels or {}).build(plan, y, X, history, names)
            return replace(found, starts=tuple(starts))


def finite(value: Any) -> Any:
    """The same structure with None for numbers that JSON cannot hold."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value


class _Builder:
    def __init__(self, objective: Objective, labels: Mapping[str, Label]) -> None:
        self._objective = objective
        self._labels = labels
        self._evaluation: Evaluation = objective.evaluate()
        self._terms = [term.detach() for term in objective.terms()]
        self._curvature = Curvature([objective])

    def build(
        self,
        plan: Plan,
        y: Tensor | None,
        X: Tensor | None,
        history: Sequence[Record],
        names: Sequence[str] | None,
    ) -> Result:
        problem, evaluation = self._objective.problem, self._evaluation
        fixed = self._fixed(names)
        dtype = problem.fixed.y.dtype
        random = evaluation.random_effects()
        fitted = residuals = fixed.estimate.new_empty(0)
        if y is not None and X is not None:
            fitted = X.detach().to(dtype)[:, list(fixed.columns)] @ fixed.estimate
            for term, effects in zip(self._random_terms, random, strict=True):
                fitted = fitted + term.design.matmul(effects.values.reshape(-1, 1))[:, 0]
            residuals = y.detach().to(dtype) - fitted
        negligible = self._negligible()
        components = self._components(negligible)
        curvature = self._curvature
        return Result(
            method=problem.method,
            # A run that was still moving ended at its limit of iterations.
            converged=curvature.is_optimum and not (history and history[-1].step > 0),
            singular=tuple(dict.fromkeys(c.group for c in components if c.singular)),
            # Of a variance that is zero the data say nothing more.
            indistinct=tuple(
                name
                for name in curvature.indistinct
                if not any(name.startswith(f"{term}/") for term in negligible)
            ),
            boundary=curvature.boundary,
            score_norm=curvature.norm,
            condition=curvature.condition,
            rows=problem.n,
            log_likelihood=float(evaluation.log_likelihood),
            log_likelihood_error=evaluation.error,
            fixed=fixed,
            parameters=self._parameters(),
            components=tuple(components),
            random=tuple(random),
            fitted=fitted,
            residuals=residuals,
            history=tuple(history),
            plan=plan,
            num_params=len(curvature.at),
            source=self._source(y, X, names),
        )

    def _source(
        self, y: Tensor | None, X: Tensor | None, names: Sequence[str] | None
    ) -> Source | None:
        if y is None or X is None:
            return None
        objective = self._objective
        names = tuple(names or [f"X{j}" for j in range(X.shape[1])])
        return Source(objective.covariance, y, X, objective.rows, names, self._labels)

    @property
    def _random_terms(self) -> list[Term]:
        residual = residual_terms(self._terms)
        return [term for i, term in enumerate(self._terms) if i not in residual]

    def _fixed(self, names: Sequence[str] | None) -> FixedEffects:
        part, evaluation = self._objective.problem.fixed, self._evaluation
        spread = part.T @ torch.cholesky_inverse(evaluation.gamma_factor) @ part.T.mT
        names = names or [f"X{j}" for j in range(max(part.columns, default=-1) + 1)]
        kept = tuple(names[j] for j in part.columns)
        estimate = part.coefficients(evaluation.gamma)
        return FixedEffects(kept, estimate, spread, tuple(part.columns), part.aliases)

    @cached_property
    def _spread(self) -> Tensor:
        """Covariance of the coordinates; NaN for those at a boundary or without information."""
        at, information = self._curvature.at, self._curvature.information
        u = self._curvature.u
        inner = (~at.on_boundary(u) & (information.diagonal() != 0)).nonzero()[:, 0]
        spread = torch.full_like(information, nan)
        part = information[inner][:, inner]
        scale = part.diagonal().sqrt()
        scale = torch.where(scale > 0, scale, 1)
        inverse = torch.linalg.pinv(part / (scale[:, None] * scale), hermitian=True)
        spread[inner[:, None], inner] = inverse / (scale[:, None] * scale)
        return spread

    def _parameters(self) -> tuple[Estimate, ...]:
        covariance = self._objective.covariance
        at, u = self._curvature.at, self._curvature.u
        errors = dict(
            zip(
                [(id(e.leaf), e.local) for e in at.entries],
                zip(u, self._spread.diagonal().sqrt(), strict=True),
                strict=False,
            )
        )
        found = []
        for e in covariance.parameter_entries().entries:
            x = e.tensor.detach().to(u)
            value, stored = float(e.trans(x)), float(x)
            std_error = stored_error = nan
            if (id(e.leaf), e.local) in errors:
                coordinate, spread = errors[id(e.leaf), e.local]
                std_error = float(_slope(e.trans.at_coordinate, coordinate) * spread)
                stored_error = float(_slope(e.trans.from_coordinate, coordinate) * spread)
            fixed = not (e.free and e.tensor.requires_grad)
            found.append(Estimate(e.name, value, std_error, stored, stored_error, fixed))
        # Weights of designs and networks, as they are.
        start = len(at.entries)
        rest = zip(at.names, u.tolist(), self._spread.diagonal().sqrt().tolist(), strict=True)
        for name, value, error in list(rest)[start:]:
            found.append(Estimate(name, value, error, value, error))
        return tuple(found)

    def _components(self, negligible: Mapping[str, Tensor]) -> list[Component]:
        u = self._curvature.u
        at = self._curvature.at

        def matrices(x: Tensor) -> tuple[Tensor, ...]:
            terms = self._objective.terms(at.natural(0, x))
            return tuple(self._shown(term) for term in terms)

        jacobians = jacobian(matrices, u) if len(u) else [None] * len(self._terms)
        # A coordinate at zero has no standard error, but entries that do not depend on it have.
        spread = self._spread
        known = torch.where(spread.isnan(), 0, spread)
        missing = spread.diagonal().isnan()
        found = []
        for term, J in zip(self._terms, jacobians, strict=True):
            matrix = self._shown(term)
            error = torch.zeros_like(matrix)
            if J is not None:
                error = torch.einsum("i...,ij,j...->...", J, known, J).clamp(min=0).sqrt()
                lost = (J[missing] != 0).any(0) | (matrix == 0)
                error = torch.where(lost, nan, error)
            group, effects, levels = self._label(term)
            names = tuple(effects), tuple(levels)
            gone = negligible.get(term.name)
            vanished = () if gone is None else tuple(e for e, g in zip(names[0], gone) if g)
            found.append(
                Component(term.name, group, *names, matrix, error, gone is not None, vanished)
            )
        return found

    def _shown(self, term: Term) -> Tensor:
        """The covariance of the effects of a level, on average where levels have their own."""
        matrix = term.covariance.shown()
        if term.name in self._labels and matrix.dim() == 2:
            k = len(self._labels[term.name].effects)
            if len(matrix) > k:
                blocks = matrix.unflatten(1, (-1, k)).unflatten(0, (-1, k))
                return blocks.diagonal(dim1=0, dim2=2).mean(-1)
        return matrix

    def _label(self, term: Term) -> Label:
        if term.name in self._labels:
            return self._labels[term.name]
        if any(term is self._terms[i] for i in residual_terms(self._terms)):
            size = len(term.covariance.matrix)
            return Label("Residual", [str(i) for i in range(size)] if size > 1 else ("",), ())
        k = term.covariance.shown().shape[0]
        effects = ("(Intercept)",) if k == 1 else tuple(f"effect_{i}" for i in range(k))
        return Label(term.name, effects, self._levels(term, term.design.shape[1] // k))

    def _levels(self, term: Term, count: int) -> tuple[str, ...]:
        """Names of a term's levels: those of its design's labels, or places."""
        node: Any = self._objective.covariance
        for name in filter(None, term.name.split("/")):
            node = node.operands.get(name) if isinstance(node, Operator) else None
        if isinstance(node, Operator):
            for operand in node.operands.values():
                if isinstance(operand, DummyMatrix) and len(operand.labels) == count:
                    return tuple(operand.labels)
        g = term.covariance
        if isinstance(g, KroneckerCovariance) and g.sizes[0] * g.sizes[1] == count:
            rows, columns = (range(1, size + 1) for size in g.sizes)
            return tuple(f"{i}:{j}" for i in rows for j in columns)
        return tuple(map(str, range(count)))

    def _negligible(self) -> dict[str, Tensor]:
        """Terms of which some combination of effects is negligible beside the residual, by name,
        each with which of its effects (k,) are themselves."""
        residual = 0.0
        for i in residual_terms(self._terms):
            matrix = self._terms[i].covariance.matrix
            residual += float((matrix if matrix.dim() == 1 else matrix.diagonal()).mean())
        found: dict[str, Tensor] = {}
        if not residual:
            return found
        for term in self._random_terms:
            matrix = term.covariance.shown()
            if isinstance(term.covariance, RepeatedCovariance):
                z = term.design
                scale = torch.ones_like(matrix.diagonal())
                values = z.values if isinstance(z, IndexedDesign) else None
                if values is not None and values.shape[1] == len(scale):
                    scale = (values.detach().to(scale) ** 2).mean(0).sqrt()
                scaled = scale[:, None] * matrix * scale
                variances, least = scaled.diagonal(), torch.linalg.eigvalsh(scaled)[0]
            elif isinstance(term.covariance, ScaledCovariance):
                variances, least = matrix.diagonal(), torch.linalg.eigvalsh(matrix)[0]
            elif matrix.dim() == 1:
                variances, least = matrix, matrix.min()
            else:
                continue
            if float(least) < SINGULAR**2 * residual:
                found[term.name] = variances < SINGULAR**2 * residual
        return found


def _slope(function: Any, u: Tensor) -> Tensor:
    with torch.enable_grad():
        x = u.detach().clone().requires_grad_()
        return torch.autograd.grad(function(x).sum(), x)[0].abs()
