"""A generalised linear mixed model from a formula and a table."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from openreml_nn.covariance import Relationship
from openreml_nn.estimation.marginal import fit_laplace
from openreml_nn.families import Family, named_family
from openreml_nn.likelihood.solver import Solver
from openreml_nn.model.batch import Batch
from openreml_nn.model.constraints import Constraint, Constraints
from openreml_nn.model.linear import with_model
from openreml_nn.model.mixed_model import MixedModel
from openreml_nn.model.relations import relations_of
from openreml_nn.model.response import EncodedResponse
from openreml_nn.model.structures import labels_of, linear_model
from openreml_nn.model.zeros import inflated
from openreml_nn.result import FixedEffects, Label, Result
from openreml_nn.support.checks import (
    check_choice,
    check_count,
    check_names,
    check_table,
    check_text,
)
from openreml_nn.support.checks import found as described
from openreml_nn.support.errors import InputError
from openreml_nn.table import TableFile
from openreml_nn.table.reading import given_table

__all__ = ["fit_family", "glmm"]

_HAS_PLACE = "as the family has the residual's place; lmm() does"
#: Options of :func:`lmm` that a family does not take.
_WHY_NOT = {
    "residual": _HAS_PLACE,
    "residual_variance": _HAS_PLACE,
    "chunk_rows": "as a mode needs all rows at once; lmm() does",
}


def glmm(
    formula: str,
    table: pd.DataFrame | str | os.PathLike[str] | TableFile,
    family: str | Family = "binomial",
    link: str | None = None,
    method: str = "ml",
    quadrature: int = 1,
    *,
    zi: str | None = None,
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
    max_iterations: int = 200,
) -> Result:
    r"""Fit a generalised linear mixed model to a table.

    .. math:: y_i \sim p(y_i \mid \eta_i),\qquad \eta = X\beta + Zb,\quad b \sim N(0, G(\theta))

    The random effects are integrated by Laplace's approximation or by adaptive Gauss-Hermite
    quadrature, and :math:`\beta`, :math:`\theta` and the family's parameters are those of the
    highest likelihood, with standard errors from their joint observed information.

    Args:
        formula: an lme4-style formula. A binomial response is 0 or 1, true or false, one of two
            categories (the second in order is the success), or ``cbind(successes, failures)``; an
            ordinal one an ordered categorical, text or numbers, whose levels are the sorted values.
        table: a data frame, the path or URI of a file, or a :class:`TableFile`; rows with missing
            values are left out with a warning.
        family: ``"binomial"``, ``"poisson"``, ``"negative_binomial"``, ``"negative_binomial_1"``,
            ``"gamma"``, ``"beta"``, ``"ordinal"``, ``"gaussian"``, ``"student_t"``, ``"tweedie"``, or a
            :class:`openreml_nn.families.Family`.
        link: ``"logit"``, ``"probit"`` or ``"cloglog"``; the family's own by default.
        method: ``"ml"``, or ``"reml"``, which integrates the coefficients as well.
        quadrature: points of quadrature for each effect of a level, with one grouping factor; 1 is
            Laplace's approximation.
        zi: a formula such as ``"~ 1 + x"``: a count, or a response of 0 and 1, is then 0 with a
            probability of its own, whose logit is linear in these columns, see
            :class:`openreml_nn.families.ZeroInflated`.
        solver: see :class:`LaplaceLoss`.
        categorical: numeric columns to be taken as factors.
        constraints, starts: see :func:`lmm`.
        weights: column of positive prior weights, which multiply the log-densities of the rows, so that
            a row of weight 2 counts as two rows alike; those of binomial proportions are their trials,
            which gives the fit of ``cbind(successes, failures)``.
        residual, residual_variance, chunk_rows: of :func:`lmm`; refused here, as the residual belongs
            to the family.
        max_iterations: after so many steps the fit stops, with a warning.

    Raises:
        InputError: if the formula, the table or an option is invalid.
        NumericalError: if the data are separated.

    Reference:
        Breslow and Clayton, JASA 88 (1993) 9; Bates et al., Journal of Statistical Software 67(1)
        (2015); Brooks et al., The R Journal 9 (2017) 378.

    >>> from openreml_nn.datasets import sleepstudy
    >>> slow = sleepstudy().assign(slow=lambda t: t.Reaction > 300)
    >>> result = glmm("slow ~ Days + (1 | Subject)", slow, family="binomial")
    >>> f"{result.log_likelihood:.3f}"
    '-87.163'
    """
    began = time.perf_counter()
    check_text("formula", formula)
    check_table("table", table)
    check_names("categorical", categorical)
    check_choice("method", method, ("ml", "reml"))
    check_count("max_iterations", max_iterations, 1)
    if weights is not None:
        check_text("weights", weights)
    options = {"residual": residual, "residual_variance": residual_variance}
    for option, value in {**options, "chunk_rows": chunk_rows}.items():
        if value is not None:
            raise InputError(
                f"`{option}` is {described(value)}: glmm() takes none, {_WHY_NOT[option]}"
            )
    constrained = Constraints(constraints, starts)
    named_family(family, link)  # refused before the table is read
    table, source, dialect = given_table(table)
    relations = relations_of(pedigree, kernels)
    response = EncodedResponse(
        formula, family, categorical, source, zi, weights=weights, relations=relations
    )
    response.encoder.dialect = dialect
    encoded, table = response.fit(table)
    if not encoded.random:
        raise InputError(
            f"formula {formula!r} has no random effect: expected one at least, such as '(1 | group)'"
        )
    own = named_family(family, link, max(2, len(response.levels)))
    own = inflated(own, response.encoder).to(encoded.X.dtype)
    model = linear_model(encoded, method, solver, family=own, quadrature=quadrature)
    batch = encoded.batch()
    result = fit_family(
        constrained.applied(model, batch),
        batch,
        names=encoded.names,
        labels=labels_of(encoded),
        max_iterations=max_iterations,
        begin=(lambda: constrained.begin(model, batch)) if constrained.starts else None,
    )
    assert result.source is not None
    encoder = response.encoder
    cells = encoder.cells(encoded.kept(table))
    return replace(
        result,
        source=replace(result.source, means=encoder.learned.means, cells=cells),
        formula=formula,
        zi=zi,
        dropped_rows=encoded.dropped_rows,
        encoder=encoder,
        constraints=constrained.held,
        seconds=time.perf_counter() - began,
    )


def fit_family(
    model: MixedModel,
    batch: Batch,
    output: Tensor | None = None,
    *,
    names: Sequence[str] | None = None,
    labels: Mapping[str, Label] | None = None,
    max_iterations: int = 200,
    begin: Callable[[], None] | None = None,
) -> Result:
    """Fit all but the network of a model with a family: coefficients, covariance and the family's
    parameters, which the model takes up.

    Args:
        model: whose covariance is fitted.
        batch: the rows.
        output: what the network has yielded for them, if it is known: the model matrix with head
            ``"gls"``, the mean with head ``"ml"``.
        names: of the columns of the model matrix.
        labels: see :func:`fit_reml`.
        max_iterations: after so many steps the fit stops, with a warning.
        begin: see :func:`fit_laplace`.

    Raises:
        NumericalError, InputError: as :func:`glmm` does.
    """
    with torch.no_grad():
        output = (model(batch) if output is None else output).double()
    loss, y, offset, X, weights = model.marginal(output, batch)
    if X is None:
        X = output.new_zeros(len(offset), 0)
    names = [f"X{j}" for j in range(X.shape[1])] if names is None else list(names)
    # The thresholds of an ordinal response take the intercept's place.
    first = int(loss.family.name == "ordinal" and names[:1] == ["(Intercept)"])
    result, found = fit_laplace(
        loss,
        y,
        X[:, first:],
        offset,
        max_iterations=max_iterations,
        names=names[first:],
        labels=labels or {},
        begin=begin,
        weights=weights,
    )
    assert result.source is not None
    result = replace(
        result,
        fixed=_shifted(result.fixed, first),
        source=replace(result.source, X=X, names=tuple(names)),
    )
    return with_model(result, model, batch, found.residual)


def _shifted(fixed: FixedEffects, first: int) -> FixedEffects:
    """Coefficients of a model matrix that has so many columns before its own, without any."""
    before = fixed.aliases.new_zeros(first, fixed.aliases.shape[1])
    columns = tuple(j + first for j in fixed.columns)
    return replace(fixed, columns=columns, aliases=torch.cat([before, fixed.aliases]))
