"""A linear mixed model from a formula and a table."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from openreml_nn.covariance import Relationship
from openreml_nn.estimation import Result, fit_reml
from openreml_nn.estimation.fit import moment_start
from openreml_nn.likelihood import REMLLoss
from openreml_nn.likelihood.plan import check_solver
from openreml_nn.likelihood.solver import Solver
from openreml_nn.likelihood.solvers.dense import check_method
from openreml_nn.model.batch import Batch
from openreml_nn.model.constraints import Constraint, Constraints
from openreml_nn.model.fitted_variance import fit_by_fitted, is_by_fitted
from openreml_nn.model.mixed_model import MixedModel
from openreml_nn.model.relations import relations_of
from openreml_nn.model.seen import SeenRows
from openreml_nn.model.several import refuse_copies
from openreml_nn.model.stream import fit_stream
from openreml_nn.model.structures import bases_of, labels_of, linear_model
from openreml_nn.result.equations import FixedBasis
from openreml_nn.result.result import Label
from openreml_nn.support.checks import (
    check_count,
    check_flag,
    check_names,
    check_number,
    check_table,
    check_text,
)
from openreml_nn.support.display import show_share
from openreml_nn.support.errors import InputError
from openreml_nn.table import Encoder, TableFile
from openreml_nn.table.reading import given_table
from openreml_nn.table.traits import WITHIN_UNIT
from openreml_nn.terms.term import Term

__all__ = ["in_user_basis", "lmm", "with_model"]


def lmm(
    formula: str,
    table: pd.DataFrame | str | os.PathLike[str] | TableFile,
    *,
    method: str = "reml",
    solver: str | Solver = "auto",
    categorical: Sequence[str] = (),
    weights: str | None = None,
    residual: str | None = None,
    residual_variance: float | None = None,
    pedigree: pd.DataFrame | Relationship | str | os.PathLike[str] | None = None,
    kernels: Mapping[str, Any] | None = None,
    constraints: Mapping[str, Constraint] | None = None,
    starts: Mapping[str, float] | None = None,
    chunk_rows: int | None = None,
    progress: bool | None = None,
    max_iterations: int = 200,
) -> Result:
    r"""Fit a linear mixed model to a table by AI-REML.

    The response is fitted on the scale of the left side of the formula: with ``log(y) ~ …`` fitted
    values and predictions are of log(y).

    Args:
        formula: an lme4-style formula.
        table: a data frame, the path or URI of a file, or a :class:`TableFile`; rows with missing
            values are left out with a warning.
        method: ``"reml"`` or ``"ml"``.
        solver: see :class:`REMLLoss`.
        categorical: numeric columns to be taken as factors.
        weights: column of weights: the residual variance of a row is divided by its weight.
        residual: correlation of the rows of a group, ``"ar1(time | subject)"``,
            ``"cs(subject)"`` or ``"us(time | subject)"``; a variance for each stratum,
            ``"diag(sex)"``, or one that is a function of a column or of the fitted values,
            ``"power(x)"``, ``"exp(fitted)"``, ``"const_power(x)"``; both, ``"power(x):ar1(time | subject)"``;
            independent rows of one variance by default. Fitted values are those of the fit itself,
            found again until they stay; inference takes them as known.
        residual_variance: the residual variance where it is known, that of a row of weight 1: with
            weights :math:`1 / s_i^2` and 1, row i has error variance :math:`s_i^2`.
        pedigree: for ``ped(animal)`` in the formula: a table animal, sire, dam, or its path.
        kernels: for ``vm(level, K)`` in the formula: each matrix, with the names of the levels, or
            its path, by its name; ``vm(level, K, inverse = TRUE)`` takes the inverse.
        constraints: what is held, bounded or tied of the covariance parameters, by the names that
            :attr:`Result.parameters` have, on the natural scale: ``{"animal/rho": 0.5}`` holds,
            ``{"g/sigma^2": (0.1, 2.0)}`` bounds, ``{"a/sigma^2": "b/sigma^2"}`` ties; see
            :func:`constrain`.
        starts: values from which covariance parameters start, by the same names; the fit then runs
            from this start only. The others start from the scale of the data.
        chunk_rows: rows of a file that are held at a time, see :func:`fit_stream`; all by default.
        progress: with ``chunk_rows`` whether a bar shows how far a file is read, which it does by
            default; else whether lines on stderr show how far sparse factors of many seconds are.
        max_iterations: after so many the fit stops, with a warning.

    Raises:
        InputError: if the formula, the table or an option is invalid.

    >>> from openreml_nn.datasets import sleepstudy
    >>> result = lmm("Reaction ~ Days + (Days | Subject)", sleepstudy())
    >>> f"{result.log_likelihood:.4f}"
    '-871.8141'
    """
    check_text("formula", formula)
    check_table("table", table)
    check_names("categorical", categorical)
    for name, value in (("residual", residual), ("weights", weights)):
        if value is not None:
            check_text(name, value)
    check_method(method)
    check_solver(solver)
    check_count("max_iterations", max_iterations, 1)
    _check_variance(residual_variance, residual)
    constrained = Constraints(constraints, starts)
    if progress is not None:
        check_flag("progress", progress)
        if chunk_rows is None and not progress:
            raise InputError(
                "`progress` is False without `chunk_rows`, where nothing shows by default: leave it out"
            )
    if chunk_rows is not None:
        if isinstance(table, pd.DataFrame):
            raise InputError("`chunk_rows` is for a file: the table is in memory already")
        of_table = {
            "pedigree": pedigree, "kernels": kernels, "constraints": constraints, "starts": starts
        }  # fmt: skip
        for name, given in of_table.items():
            if given is not None:
                raise InputError(f"`{name}` is not for chunks: leave out `chunk_rows`")
        return fit_stream(
            formula,
            table,
            chunk_rows=chunk_rows,
            method=method,
            solver=solver,
            categorical=categorical,
            weights=weights,
            residual=residual,
            residual_variance=residual_variance,
            max_iterations=max_iterations,
            progress=progress is not False,
        )
    if progress:
        solver = check_solver(solver).with_progress(show_share)
    table, source, dialect = given_table(table)
    known = residual_variance is not None
    relations = relations_of(pedigree, kernels)
    encoder = Encoder(formula, categorical, source, residual, weights, known, relations)
    encoder.dialect = dialect
    if encoder.formula.traits:
        _check_variance(residual_variance, WITHIN_UNIT)
    encoded = encoder.fit(table)
    if encoder.formula.traits and residual is None:
        cells, names = encoded.batch()["residual"], [name for name, _ in encoder.formula.traits]
        refuse_copies(encoded.adjusted, encoded.X, cells, names)
    # Names are of parameters in the user's basis.
    bases = {} if constrained else bases_of(encoded.random)
    labels, batch = labels_of(encoded), encoded.batch()
    model = linear_model(encoded, method, solver, residual_variance, bases)

    def fit(batch: Batch, begins: bool = True) -> Result:
        if begins:
            constrained.applied(model, batch)
        covariance = model.covariance(batch)
        if begins and constrained.starts:
            moment_start(REMLLoss(covariance, method, solver), encoded.adjusted, encoded.X)
            constrained.begin(model, batch)
        return fit_reml(
            covariance,
            encoded.adjusted,
            encoded.X,
            method=method,
            solver=solver,
            start="moments" if begins and not constrained.starts else "current",
            max_iterations=max_iterations,
            names=encoded.names,
            labels=labels | {name: labels[name]._replace(basis=B) for name, B in bases.items()},
        )

    if is_by_fitted(encoded):
        result, batch = fit_by_fitted(encoded, fit)
    else:
        result = fit(batch)
    result = with_model(result, model, batch)
    if bases:
        result = in_user_basis(result, model, batch, labels)
    assert result.source is not None
    cells = encoder.cells(encoded.kept(table))
    return replace(
        result,
        source=replace(result.source, means=encoder.learned.means, cells=cells),
        fitted=result.fitted if encoded.offset is None else result.fitted + encoded.offset,
        formula=formula,
        dropped_rows=encoded.dropped_rows,
        encoder=encoder,
        constraints=constrained.held,
    )


def in_user_basis(
    result: Result, model: MixedModel, batch: Batch, labels: Mapping[str, Label]
) -> Result:
    """A result whose source has the covariance of the user's values of random slopes.

    Args:
        result: of a fit with random effects in bases of their own, see :class:`RandomEffect`; its
            parameters are in the user's.
        model: that was fitted.
        batch: the rows.
        labels: names of levels and effects, without bases.
    """
    plain = copy.deepcopy(model)
    for effect in plain.effects().values():
        effect.basis = torch.eye(effect.effects).to(effect.basis)
    covariance = plain.covariance(batch)
    stored = {estimate.name: estimate.untransformed for estimate in result.parameters}
    with torch.no_grad():
        for entry in covariance.parameter_entries().entries:
            entry.tensor.fill_(stored[entry.name])
    assert result.source is not None
    return replace(result, source=replace(result.source, covariance=covariance, labels=labels))


def with_model(
    result: Result, model: MixedModel, batch: Batch, residual: Term | None = None
) -> Result:
    """A result with a copy of its model, which predicts.

    Args:
        result: of a fit of the model's covariance.
        model: with its parameters at the estimates.
        batch: the rows.
        residual: what stands for the residual where a family has its place.
    """
    # Names of levels, which may be many, are shared.
    names = {id(effect.names): effect.names for effect in model.effects().values()}
    source, model = result.source, copy.deepcopy(model, names)
    assert source is not None
    if any(label.basis is not None for label in source.labels.values()):
        model.update(batch)  # the result has the effects in another basis
        return replace(result, model=model)
    model.remember(result.random, result.fixed, result.fixed.aliases)
    X, columns = source.X, list(result.fixed.columns)
    y = source.y if residual is None else None
    model.remember_errors(
        source.covariance, lambda: _orthonormal(y, X, columns), len(columns), X.dtype, residual
    )
    if source.offset is not None:
        options = model.method, model.quadrature, model.solver
        data = source.y, source.offset, X, source.weights
        model.seen = SeenRows.of(options, columns, source.covariance, model.effects(), data)
    return replace(result, model=model)


def _orthonormal(y: Tensor | None, X: Tensor, columns: Sequence[int]) -> tuple[Tensor, FixedBasis]:
    """Some columns of X in an orthonormal basis, and what they leave of y; with the basis."""
    Q, R = torch.linalg.qr(X[:, columns])
    basis, offset = X.new_zeros(X.shape[1], len(columns)), X.new_zeros(X.shape[1])
    basis[columns] = torch.linalg.solve_triangular(R, torch.eye(len(R)).to(R), upper=True)
    if y is None:
        return Q, FixedBasis(basis, offset)
    offset = basis @ (Q.mT @ y)
    return torch.cat([Q, (y - X @ offset)[:, None]], 1), FixedBasis(basis, offset)


def _check_variance(variance: float | None, residual: str | None) -> None:
    if variance is None:
        return
    check_number("residual_variance", variance, above=0)
    if residual is not None:
        raise InputError(
            "`residual_variance` is of residuals of one variance: leave out `residual`"
        )
