"""A result with rows that came after the fit."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, TypeVar

import pandas as pd

from openreml_nn.likelihood.effects import RandomEffects
from openreml_nn.result.prediction import moved
from openreml_nn.result.values import FitValues
from openreml_nn.support.errors import InputError
from openreml_nn.table.columns import as_of_table

__all__ = ["with_rows"]

Values = TypeVar("Values", bound=FitValues)


def with_rows(result: Values, encoder: Any, table: pd.DataFrame) -> Values:
    """A result with more rows at the same parameters, see :meth:`Result.update`.

    Args:
        result: of the rows before.
        encoder: the result's, which names the new rows in messages.
        table: the new rows.
    """
    if encoder.formula.traits and len(table):
        raise InputError(
            f"formula {result.formula!r}: a fit of several responses takes up no further rows: fit all "
            "rows"
        )
    if result.family is not None:
        table = _numbered(result, encoder, table)
    told, source = encoder.source, result.encoder.source
    encoder, model = copy.deepcopy(encoder), copy.deepcopy(result.model)
    encoded = encoder.more(table)
    encoder.source = source
    levels = {d.name: d.levels for d in encoded.random}
    known = {name: effect.levels for name, effect in model.effects().items()}
    names = {name: labels[known[name] :] for name, labels in levels.items()}
    batch = moved(encoded.batch(), model.beta.device)
    columns = list(result.fixed.columns)
    of = {"y": str(result.formula).partition("~")[0].strip(), "weights": encoder.weights}
    with as_of_table(table, encoded.rows, of, told):
        found = model.add(batch, names)
    estimate, covariance = found.coefficients, found.covariance
    effects = [RandomEffects(n, *effect.known()) for n, effect in model.effects().items()]
    by_name = {effect.name: effect for effect in effects}
    covariance = covariance[columns][:, columns]
    fixed = replace(result.fixed, estimate=estimate[columns], covariance=covariance)
    none = result.fitted[:0]
    return replace(
        result,
        rows=result.rows + len(encoded.rows),
        dropped_rows=result.dropped_rows + encoded.dropped_rows,
        log_likelihood=found.log_likelihood[result.method],
        log_likelihood_error=0.0,
        fixed=fixed,
        components=tuple(
            replace(c, levels=levels[c.name]) if c.name in levels else c for c in result.components
        ),
        random=tuple(by_name.get(r.name, r) for r in result.random),
        fitted=none,
        residuals=none,
        source=None,
        encoder=encoder,
        model=model,
    )


def _numbered(result: FitValues, encoder: Any, table: pd.DataFrame) -> pd.DataFrame:
    """The new rows with the numbers of the response's categories.

    Raises:
        InputError: if the result takes up no rows, or a category is unknown.
    """
    cbind = str(result.formula).lstrip().startswith("cbind")
    if cbind or result.zi is not None:
        why = "of cbind(successes, failures)" if cbind else "with a zero part"
        raise InputError(
            f"`result` is of the family {result.family!r}, {why}: it takes up no rows; fit all rows"
        )
    codes, name = encoder.categories, str(result.formula).partition("~")[0].strip().strip("`")
    if codes is None or name not in table.columns:
        return table
    odd = table[name].dropna()
    odd = odd[~odd.isin(list(codes))]
    if len(odd):
        raise InputError(
            f"{encoder.source}: the response {name!r} is {odd.iloc[0]!r}: expected one of {list(codes)}"
        )
    return table.assign(**{name: table[name].map(codes).astype(float)})
