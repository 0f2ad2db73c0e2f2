"""A result with rows that came after the fit."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import pandas as pd
import torch

from openreml_nn.covariance import Operator
from openreml_nn.likelihood.effects import RandomEffects
from openreml_nn.result.prediction import moved
from openreml_nn.result.values import FitValues
from openreml_nn.support.errors import InputError

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
    source = result.encoder.source
    encoder, model = copy.deepcopy(encoder), copy.deepcopy(result.model)
    encoded = encoder.more(table)
    encoder.source = source
    levels = {d.name: d.levels for d in encoded.random}
    known = {name: effect.levels for name, effect in model.effects().items()}
    names = {name: labels[known[name] :] for name, labels in levels.items()}
    batch = moved(encoded.batch(), model.beta.device)
    columns = list(result.fixed.columns)
    if result.family is None:
        found = model.add(batch, names)
        estimate, covariance = found.coefficients, found.covariance
        log_likelihood = found.log_likelihood[result.method]
    else:
        log_likelihood = _modes(result, model, batch, names)
        estimate, covariance = model.beta, model.beta_covariance
    effects = [RandomEffects(n, *effect.known()) for n, effect in model.effects().items()]
    by_name = {effect.name: effect for effect in effects}
    covariance = covariance[columns][:, columns]
    fixed = replace(result.fixed, estimate=estimate[columns], covariance=covariance)
    none = result.fitted[:0]
    return replace(
        result,
        rows=result.rows + len(encoded.rows),
        dropped_rows=result.dropped_rows + encoded.dropped_rows,
        log_likelihood=log_likelihood,
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
        InputError: if the result, of a family, takes up no rows, or a category is unknown.
    """
    source = result.source
    why = (
        "ordinal, whose first column is a threshold"
        if result.family == "ordinal"
        else "with a zero part"
        if result.zi is not None
        else "without its rows, as of a result that was updated before"
        if source is None
        else "of cbind(successes, failures)"
        if source.y.dim() == 2
        else "with columns of X that depend on others"
        if result.fixed.aliases.shape[1]
        else "and has a network"
        if any(True for _ in result.model.mean.parameters())
        else None
    )
    if why is not None:
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


def _modes(
    result: FitValues, model: Any, batch: Mapping[str, Any], names: Mapping[str, Sequence[str]]
) -> float:
    """Find modes and coefficients from the rows of a fit and new ones, at the parameters of the model,
    which takes them up; the log-likelihood of all rows."""
    source = result.source
    assert source is not None and isinstance(source.covariance, Operator)
    device = model.beta.device
    groups, values = dict(batch["groups"]), dict(batch["values"])
    parts = list(source.covariance.operands.values())
    for (name, effect), part in zip(model.effects().items(), parts, strict=True):
        assert isinstance(part, Operator)
        design: Any = part.operands["z"]
        design = design.design
        if len(names[name]):
            effect.grow(effect.levels + len(names[name]), names[name])
        groups[name] = torch.cat([design.codes.to(device), groups[name]])
        if name in values:
            values[name] = torch.cat([design.values.to(device), values[name]])
    x, n = batch["x"], len(batch["x"])
    before = x.new_zeros(len(source.y)) if source.offset is None else source.offset.to(device)
    offset = batch.get("offset")
    whole: dict[str, Any] = {
        "x": torch.cat([source.X.to(device), x]),
        "y": torch.cat([source.y.to(device), batch["y"]]),
        "groups": groups,
        "values": values,
        "offset": torch.cat([before, x.new_zeros(n) if offset is None else offset]),
    }
    if source.weights is not None:
        whole["weights"] = torch.cat([source.weights.to(device), batch["weights"]])
    model.update(whole)
    with torch.no_grad():
        return -float(model.loss(whole)) * len(whole["y"])
