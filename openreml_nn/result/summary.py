"""A fitted model as text."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from math import isnan
from typing import Any

import torch
from rich import box
from rich.table import Table

from openreml_nn.result.parts import Component, Estimate
from openreml_nn.result.values import FitValues
from openreml_nn.support.display import plain_console, visible
from openreml_nn.support.names import shortened

__all__ = ["singularity", "summarise", "tables", "uncertainty"]

#: Parameters that the table of random effects shows: variances, and factors of covariances.
_PLAIN = re.compile(r"/sigma\^2(_\d+)?$|(?<!/loadings/x)/L_\d+_\d+$")

#: Effects whose correlations have a column, at most: with more, those of the first.
_WIDEST = 7


def summarise(result: FitValues, title: str | None = None) -> str:
    """The tables of :func:`tables` as plain text, 100 columns wide."""
    stream = io.StringIO()
    console = plain_console(file=stream, width=100, color_system=None)
    for part in tables(result, title):
        console.print(part)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


def tables(result: FitValues, title: str | None = None) -> list[Table | str]:
    """Headline, random effects, fixed effects and notes, for a console that reads no markup."""
    by = {"reml": "REML", "ml": "maximum likelihood"}[result.method]
    criterion = {"reml": "REML criterion", "ml": "deviance"}[result.method]
    parts: list[Table | str] = [f"Linear mixed model fit by {by}"]
    if result.family is not None:
        points = result.quadrature
        way = f"quadrature of {points} points" if points > 1 else "Laplace"
        parts = [f"Generalised linear mixed model fit by {by} ({way})"]
        parts.append(f"Family: {result.family} ({result.link})")
    title = title or result.formula
    if title:
        parts.append(f"Formula: {visible(title)}")
    parts.append(
        f"{criterion} {result.deviance:.4f}   log-likelihood {result.log_likelihood:.4f}   "
        f"AIC {result.aic:.2f}   BIC {result.bic:.2f}\n"
    )
    parts.append(_random(result))
    if structural := _structural(result):
        parts.append(_estimates("Structures", structural))
    counts = "".join(f", {visible(group)} {levels}" for group, levels in result.groups.items())
    parts.append(f"Rows {result.rows}" + (f"; levels{counts[1:]}" if counts else "") + "\n")
    if result.fixed.names:
        parts.append(_fixed(result))
    if result.family_parameters:
        title = "Thresholds" if result.family == "ordinal" else "Family"
        parts.append(_estimates(title, [(e.name, e) for e in result.family_parameters]))
    state = "converged" if result.converged else "NOT converged"
    parts.append(
        f"{state} in {result.iterations} iterations, score norm {result.score_norm:.1e} "
        f"standard errors; {result.plan.solver} solver"
    )
    if result.log_likelihood_error:
        parts.append(uncertainty(result))
    singular = [singularity(c) for c in result.components if c.singular]
    if singular:
        parts.append(visible(f"singular fit: {'; '.join(singular)}"))
    if result.constraints:
        parts.append(visible("; ".join(constraint_texts(result.constraints))))
    if result.boundary:
        parts.append(visible(f"at the boundary: {', '.join(result.boundary)}"))
    if result.kinks:
        named = ", ".join(result.kinks)
        parts.append(
            visible(f"{named} lies at an observed distance, where the likelihood has a kink")
        )
    others = [start for start in result.starts if start.converged and not start.same]
    if others:
        best = max(start.log_likelihood for start in others)
        parts.append(
            f"the likelihood has more than one optimum: another one is lower by "
            f"{result.log_likelihood - best:.4f}"
        )
    if result.indistinct:
        parts.append(visible(f"the data cannot tell apart: {', '.join(result.indistinct)}"))
    return parts


def constraint_texts(constraints: Mapping[str, Any]) -> list[str]:
    """What was held, bounded and tied, in words."""
    found = []
    for name, value in constraints.items():
        if isinstance(value, str):
            found.append(f"{name} tied to {value}")
        elif isinstance(value, int | float):
            found.append(f"{name} held at {value:.6g}")
        else:
            low, high = value
            found.append(f"{name} between {low:.6g} and {high:.6g}")
    return found


def uncertainty(result: FitValues) -> str:
    """How far the log-likelihood is known, in words."""
    error = result.log_likelihood_error
    if result.plan.exact:
        return f"rounding leaves about {error:.2g} of the log-likelihood unknown"
    return (
        f"the log-likelihood is estimated, with a standard error of {error:.2g}, and so are the "
        "variances: coefficients and BLUPs are exact at these"
    )


def singularity(component: Component) -> str:
    """What is singular about a component, in words."""
    c, k = component, len(component.effects)
    if c.vanished == ("(Intercept)",) == c.effects:
        return f"the variance of {c.group} is zero"
    if len(c.vanished) == 1:
        return f"the variance of {c.vanished[0]} between levels of {c.group} is zero"
    if c.vanished:
        return f"the variances of {', '.join(c.vanished)} between levels of {c.group} are zero"
    at = int(c.correlation.tril(-1).abs().nan_to_num().argmax())
    i, j = divmod(at, k)
    correlation = (
        f"the correlation of {c.effects[j]} and {c.effects[i]} between levels of {c.group} is "
        f"{float(c.correlation[i, j]):.3f}"
    )
    if k == 2:
        return correlation
    return f"some combination of the effects of {c.group} has no variance ({correlation})"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    return table


def _number(value: float) -> str:
    # Adding zero takes the sign off a zero.
    return "" if isnan(value) else f"{value + 0.0:.5g}"


def _random(result: FitValues) -> Table:
    correlated = [c for c in result.components if c.covariance.dim() == 2 and _has_correlations(c)]
    widest = min(max((len(c.effects) for c in correlated), default=1), _WIDEST)
    correlations = ["Corr"] + [""] * (widest - 2) if widest > 1 else []
    table = _table(
        "Random effects", "Group", "Effect", "Variance", "Std. error", "Std. dev.", *correlations
    )
    table.columns[1].justify = "left"
    for component in result.components:
        for row in _component(component, len(correlations)):
            table.add_row(*map(visible, row))
    return table


def _has_correlations(c: Component) -> bool:
    """Whether some covariance is not zero: those of independent effects, or strata, are exactly so."""
    return bool((c.covariance.tril(-1) != 0).any())


def _is_uniform(c: Component) -> bool:
    """Whether many independent effects have one variance, as the coefficients of a spline do."""
    if c.covariance.dim() != 2 or len(c.effects) < 2:
        return False
    return bool(
        (c.covariance == c.covariance[0, 0] * torch.eye(len(c.effects)).to(c.covariance)).all()
    )


def _component(c: Component, width: int, most: int = 12) -> list[list[str]]:
    if _is_uniform(c):
        common = (c.covariance[0, 0], c.std_error[0, 0], c.std_dev[0])
        shown = [_number(float(x)) for x in common]
        return [[c.group, f"{len(c.effects)} of one variance", *shown, *[""] * width]]
    square = c.covariance.dim() == 2
    variance = c.covariance.diagonal() if square else c.covariance
    error = c.std_error.diagonal() if square else c.std_error
    correlation = c.correlation if square else torch.eye(len(variance))
    rows = []
    for i, name in enumerate(c.effects[:most]):
        cells = []
        if square and width:
            held = c.covariance[i] == 0
            cells = ["" if held[j] else f"{correlation[i, j]:.2f}" for j in range(i)]
        cells = cells[:width] + [""] * (width - len(cells))
        numbers = [_number(float(x[i])) for x in (variance, error, c.std_dev)]
        rows.append([c.group if i == 0 else "", name, *numbers, *cells])
    if len(c.effects) > most:
        rows.append(["", f"… {len(c.effects) - most} more"])
    return rows


def _structural(result: FitValues) -> list[tuple[str, Estimate]]:
    """The parameters of terms of which the covariance alone does not tell them, such as a
    correlation by lags, by the short names that constraints take."""
    names = shortened(p.name for p in result.parameters)
    own = [p for p in result.parameters if not p.fixed or p.name in result.constraints]
    terms = {p.name.split("/")[0] for p in own if not _PLAIN.search(p.name)}
    return [(names[p.name], p) for p in own if p.name.split("/")[0] in terms]


def _estimates(title: str, named: Sequence[tuple[str, Estimate]]) -> Table:
    table = _table(title, "", "Estimate", "Std. error")
    for name, e in named:
        table.add_row(visible(name), _number(e.value), _number(e.std_error))
    return table


def _fixed(result: FitValues) -> Table:
    statistic = "t value" if result.family is None else "z value"
    table = _table("Fixed effects", "", "Estimate", "Std. error", statistic)
    fixed = result.fixed
    rows = zip(fixed.names, fixed.estimate, fixed.std_error, fixed.statistic, strict=True)
    for name, *numbers in rows:
        table.add_row(visible(name), *(_number(float(x)) for x in numbers))
    return table
