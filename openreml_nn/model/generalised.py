"""A generalised linear mixed model from a formula and a table."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from openreml_nn.covariance import Pedigree
from openreml_nn.estimation.marginal import fit_laplace
from openreml_nn.families import Family, named_family
from openreml_nn.likelihood import LaplaceLoss
from openreml_nn.likelihood.solver import Solver
from openreml_nn.model.linear import read_table_of, with_model
from openreml_nn.model.structures import labels_of, linear_model, relations_of
from openreml_nn.result import FixedEffects, Result
from openreml_nn.support.checks import (
    check_choice,
    check_count,
    check_names,
    check_table,
    check_text,
)
from openreml_nn.support.checks import found as described
from openreml_nn.support.errors import InputError
from openreml_nn.table import Encoder, TableFile

__all__ = ["glmm"]

_CBIND = re.compile(r"^\s*cbind\s*\((.*)\)\s*$", re.DOTALL)


def glmm(
    formula: str,
    table: pd.DataFrame | str | os.PathLike[str] | TableFile,
    *,
    family: str | Family,
    link: str | None = None,
    method: str = "ml",
    quadrature: int = 1,
    solver: str | Solver = "auto",
    categorical: Sequence[str] = (),
    weights: str | None = None,
    residual: str | None = None,
    residual_variance: float | None = None,
    pedigree: pd.DataFrame | Pedigree | str | os.PathLike[str] | None = None,
    kernels: Mapping[str, Any] | None = None,
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
        solver: see :class:`LaplaceLoss`.
        categorical: numeric columns to be taken as factors.
        weights, residual, residual_variance, chunk_rows: of :func:`lmm`; refused here, as the
            residual belongs to the family.
        max_iterations: after so many steps the fit stops, with a warning.

    Raises:
        InputError: if the formula, the table or an option is at fault.
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
    options = {"weights": weights, "residual": residual, "residual_variance": residual_variance}
    for option, value in {**options, "chunk_rows": chunk_rows}.items():
        if value is not None:
            raise InputError(
                f"`{option}` is {described(value)}: expected None, as it is for Gaussian responses, by "
                "lmm()"
            )
    named_family(family, link)  # refused before the table is read
    table, source = read_table_of(table)
    left, right = _sides(formula)
    both = _CBIND.match(left)
    if both is not None and not (family == "binomial" or getattr(family, "name", "") == "binomial"):
        raise InputError(
            f"formula {formula!r}: cbind(successes, failures) is for family 'binomial'"
        )
    name = family if isinstance(family, str) else family.name
    labels: tuple[str, ...] = ()
    if both is not None:
        one, two = _arguments(both.group(1), formula)
        # Rows that miss either are left out of both.
        forms = [f"I(({a}) + 0 * ({b}))~{right}" for a, b in ((one, two), (two, one))]
    else:
        table, labels = _categories(table, left, name)
        forms = [formula]
    relations = relations_of(pedigree, kernels)
    encoders = [
        Encoder(text, categorical, source, known_residual=True, relations=relations)
        for text in forms
    ]
    encoder = encoders[0]
    encoded = encoder.fit(table)
    assert encoded.y is not None
    y = encoded.y
    if both is not None:
        failures = encoders[1].fit(table).y
        assert failures is not None
        y = torch.stack([y, failures], 1)
    own = named_family(family, link, max(2, len(labels)))
    _check_response(own, y, left.strip(), source)
    # The thresholds of an ordinal response take the intercept's place.
    first = int(own.name == "ordinal" and encoded.names[:1] == ("(Intercept)",))
    X = encoded.X[:, first:]
    own = own.to(X.dtype)
    model = linear_model(encoded, method, solver, family=own, quadrature=quadrature)
    loss = LaplaceLoss(model.covariance(encoded.batch()), own, method, quadrature, solver)
    result, found = fit_laplace(
        loss,
        y,
        X,
        encoded.offset,
        max_iterations=max_iterations,
        names=encoded.names[first:],
        labels=labels_of(encoded),
    )
    assert result.source is not None
    cells = encoder.cells(table.iloc[encoded.rows])
    source_of_result = replace(
        result.source, X=encoded.X, means=encoder.learned.means, cells=cells, names=encoded.names
    )
    result = replace(
        result,
        fixed=_shifted(result.fixed, first),
        source=source_of_result,
        formula=formula,
        dropped_rows=encoded.dropped_rows,
        encoder=encoder,
        seconds=time.perf_counter() - began,
    )
    return with_model(result, model, encoded.batch(), found.residual)


def _shifted(fixed: FixedEffects, first: int) -> FixedEffects:
    """Coefficients of a model matrix that has so many columns before its own, without any."""
    before = fixed.aliases.new_zeros(first, fixed.aliases.shape[1])
    columns = tuple(j + first for j in fixed.columns)
    return replace(fixed, columns=columns, aliases=torch.cat([before, fixed.aliases]))


def _sides(formula: str) -> tuple[str, str]:
    left, tilde, right = formula.partition("~")
    if not tilde or not left.strip():
        raise InputError(f"formula {formula!r}: expected a response, '~' and effects")
    return left, right


def _arguments(text: str, formula: str) -> tuple[str, str]:
    """The two arguments of cbind()."""
    depth, at = 0, []
    for i, letter in enumerate(text):
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and not depth:
            at.append(i)
    if len(at) != 1:
        raise InputError(
            f"formula {formula!r}: cbind() has {len(at) + 1} arguments: expected two, successes and "
            "failures"
        )
    return text[: at[0]], text[at[0] + 1 :]


def _categories(
    table: pd.DataFrame, left: str, family: str
) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """The table with a response of categories as their numbers, and the categories."""
    name = left.strip().strip("`")
    if name not in table.columns or family not in ("binomial", "ordinal"):
        return table, ()
    column = table[name]
    is_number = pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)
    if family == "binomial" and (is_number or pd.api.types.is_bool_dtype(column)):
        return table, ()
    if isinstance(column.dtype, pd.CategoricalDtype):
        levels = [level for level in column.cat.categories if (column == level).any()]
    else:
        levels = sorted(column.dropna().unique())
    if family == "binomial" and len(levels) != 2:
        raise InputError(
            f"the response {name!r} has {len(levels)} categories, {levels[:5]}: expected two for "
            "family 'binomial'"
        )
    if family == "ordinal" and len(levels) < 2:
        raise InputError(f"the response {name!r} has one category: expected two or more")
    codes = column.map({level: i for i, level in enumerate(levels)}).astype(float)
    return table.assign(**{name: codes}), tuple(map(str, levels))


def _check_response(family: Family, y: Tensor, left: str, source: str) -> None:
    family.check(y, f"{source}: the response {left!r}")
    if family.name == "binomial":
        total = y if y.dim() == 1 else y[:, 0] / y.sum(1)
        if bool((total == total[0]).all()) and float(total[0]) in (0.0, 1.0):
            raise InputError(
                f"{source}: the response {left!r} is {int(total[0])} in every row: expected both "
                "successes and failures"
            )
    elif bool((y == y[0]).all()):
        raise InputError(f"{source}: the response {left!r} is {float(y[0]):.6g} in every row")
