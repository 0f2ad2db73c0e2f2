"""Plots of a result; each function returns a matplotlib figure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from openreml_nn.inference import Profile, variance_shares
from openreml_nn.inference.refit import Refit, source_of
from openreml_nn.report.lettering import abridged, lettered, literal
from openreml_nn.report.points import (
    QUANTILES,
    has_quantiles,
    normal_quantiles,
    residual_values,
)
from openreml_nn.result.result import Result
from openreml_nn.support.checks import check_count, check_instance, check_tensor
from openreml_nn.support.errors import InputError
from openreml_nn.support.names import shortened
from openreml_nn.terms.covariance import DiagonalCovariance, RepeatedCovariance
from openreml_nn.terms.design import IndexedDesign
from openreml_nn.terms.term import Term

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
__all__ = [
    "calibration",
    "caterpillar",
    "convergence",
    "covariance_map",
    "residuals",
    "semivariogram",
    "shares",
    "zeta",
]

#: Levels beyond this many are drawn without their names.
_NAMED = 60
#: Levels beyond this many are left out of a caterpillar plot, evenly by rank.
_LEVELS = 300
#: Points beyond this many are drawn as a density.
_POINTS = 5_000
#: Numbers that a plot holds of a design without structure.
_NUMBERS = 10_000_000


def caterpillar(result: Result, group: str) -> Figure:
    """BLUPs of a grouping factor with 95% prediction intervals, a panel for each effect.

    Of more than 300 levels, 300 are drawn, the smallest and the largest BLUP of the first effect
    among them and the others evenly by rank between; the axis says so.

    Args:
        result: of a fit with random effects.
        group: the grouping factor, as the formula has it.

    Raises:
        TypeError: if ``result`` is no result.
        InputError: if the result has no random effect of that group.
    """
    check_instance("result", result, Result)
    panels = _panels(result, group)
    _, levels, first, _ = panels[0]
    # All panels in the order of the first effect, so that a level keeps its line.
    order = np.argsort(first, kind="stable")
    if len(order) > _LEVELS:
        order = order[np.linspace(0, len(order) - 1, _LEVELS).round().astype(int)]
    shown = len(order)
    named = shown <= _NAMED
    height = 1.5 + 0.16 * shown if named else 6.0
    count = f"{shown} of {len(first)} levels, evenly by rank"
    count = count if shown < len(first) else f"{shown} levels"
    room = max(8, int(12 * height) - len(count) - 3)  # 12 letters an inch
    names = _texts([levels[i] for i in order], 40) if named else []
    titles = _texts([effect for effect, *_ in panels], 36)
    at = np.arange(shown)
    with lettered([*names, *titles, group]):
        beside = 0.06 * max((len(name) for name in names), default=0)  # inches of names
        figure = _figure(0.8 + beside + 3.2 * len(panels), height)
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, title, (_, _, blup, error) in zip(axes, titles, panels, strict=True):
            middle, half = blup[order], 1.96 * error[order]
            width = 1.0 if named else 200 / shown  # in points: rows stay apart
            axis.hlines(at, middle - half, middle + half, color="C0", lw=width, alpha=0.5)
            axis.plot(middle, at, "o", color="C0", ms=3 if named else 1)
            axis.axvline(0, color="0.5", lw=0.8, ls="--")
            axis.set_title(title, fontsize=10)
            axis.set_xlabel("BLUP, 95% prediction interval", fontsize=9, loc="left")
            axis.set_ylim(-1, shown)
            axis.set_yticks([])
        if named:
            axes[0].set_yticks(at, names, fontsize=7)
        axes[0].set_ylabel(f"{_texts([group], room)[0]} ({count})")
    return figure


def _panels(
    result: Result, group: str
) -> list[tuple[str, tuple[str, ...], np.ndarray, np.ndarray]]:
    """Effect, levels, BLUPs (q,) and their standard errors (q,), for each effect of a factor."""
    named = {c.name: c for c in result.components}
    found = []
    for effects in result.random:
        c = named[effects.name]
        if c.group != group:
            continue
        k = effects.values.shape[1]
        names = c.effects if len(c.effects) == k else tuple(map(str, range(k)))
        variance = effects.variances.diagonal(dim1=1, dim2=2).clamp(min=0)
        for j, name in enumerate(names):
            blup = effects.values[:, j].numpy(force=True)
            found.append((name, c.levels, blup, variance[:, j].sqrt().numpy(force=True)))
    if not found:
        raise InputError(f"`group` is {group!r}: expected one of {_groups(result)}")
    return found


def convergence(result: Result) -> Figure:
    """Log-likelihood and transformed covariance parameters at the end of each iteration.

    Raises:
        TypeError: if ``result`` is no result.
    """
    check_instance("result", result, Result)
    figure = _figure(9, 3.6)
    left, right = figure.subplots(1, 2)
    step = np.arange(1, result.iterations + 1)
    marker = "o" if result.iterations <= 50 else ""
    values = [record.log_likelihood for record in result.history]
    left.plot(step, values, marker=marker, ms=3)
    left.set_ylabel("log-likelihood" if result.method == "ml" else "restricted log-likelihood")
    left.ticklabel_format(useOffset=False, axis="y")
    names = list(result.history[0].parameters)[:12] if result.history else []
    short = shortened(names)
    labels = _texts([short[name] for name in names], 30)
    for name, label in zip(names, labels, strict=True):
        path = np.array([record.parameters[name] for record in result.history])
        scale = abs(path[-1]) or 1.0
        right.plot(step, path / scale, marker=marker, ms=3, label=label)
    right.set_ylabel("parameter / |its last value|")
    with lettered(labels):
        if names:
            right.legend(fontsize=7)
    for axis in (left, right):
        axis.set_xlabel("iteration")
        axis.locator_params(axis="x", integer=True)
    return figure


def residuals(result: Result) -> Figure:
    """Conditional residuals against fitted values, and their quantiles against normal ones; of a
    family randomised quantile residuals, see :func:`openreml_nn.inference.quantile_residuals`.

    Raises:
        TypeError: if ``result`` is no result.
    """
    check_instance("result", result, Result)
    is_family = has_quantiles(result)
    figure = _figure(9, 4)
    left, right = figure.subplots(1, 2)
    x, y = result.fitted.numpy(force=True), residual_values(result)
    _cloud(left, x, y)
    left.axhline(0, color="0.5", lw=0.8, ls="--")
    left.locator_params(axis="x", nbins=5)  # values that are all alike have many digits
    left.set_xlabel("fitted value")
    left.set_ylabel("randomised quantile residual" if is_family else "residual")
    n = len(y)
    # Of many rows, some quantiles do.
    at = np.linspace(0, n - 1, min(n, QUANTILES)).round().astype(int)
    normal = normal_quantiles(at, n)
    scale = 1.0 if is_family else y.std() or 1.0
    right.plot(normal, np.sort(y)[at] / scale, "o", ms=3, alpha=0.6)
    right.axline((0, 0), slope=1, color="0.5", lw=0.8, ls="--")
    right.set_xlabel("normal quantile")
    right.set_ylabel("quantile residual" if is_family else "residual / its standard deviation")
    return figure


def calibration(mean: Tensor, target: Tensor, bins: int = 10) -> Figure:
    """Shares of successes against mean predicted probabilities, of rows in bins of the prediction, with
    95% intervals by Wilson; on the line where predictions are calibrated.

    Args:
        mean: (n,) predicted probabilities.
        target: (n,) of 0 and 1.
        bins: of equal width, of [0, 1].

    Raises:
        TypeError, InputError: as :func:`openreml_nn.metrics.calibration_curve`.

    Reference:
        Wilson, JASA 22 (1927) 209.
    """
    from openreml_nn.metrics import calibration_curve

    curve = calibration_curve(mean, target, bins)
    predicted, observed, n = (c.numpy(force=True) for c in curve[curve[:, 2] > 0].unbind(1))
    figure = _figure(4.6, 4.4)
    axis = figure.subplots()
    z = 1.96
    middle = (observed + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * np.sqrt(observed * (1 - observed) / n + (z / (2 * n)) ** 2) / (1 + z**2 / n)
    axis.axline((0, 0), slope=1, color="0.5", lw=0.8, ls="--")
    axis.vlines(predicted, middle - half, middle + half, color="C0", lw=1, alpha=0.6)
    axis.plot(predicted, observed, "o-", ms=4)
    axis.set_xlim(0, 1)
    axis.set_ylim(0, 1)
    axis.set_xlabel("mean predicted probability")
    axis.set_ylabel("share of successes, with 95% interval")
    return figure


def shares(result: Result) -> Figure:
    """Share of each term in the variance of a row, with standard errors.

    Raises:
        TypeError: if ``result`` is no result.
    """
    check_instance("result", result, Result)
    table = variance_shares(result)[::-1]
    figure = _figure(6, 1.2 + 0.4 * len(table))
    at = np.arange(len(table))
    names = _texts(table["group"], 28)
    with lettered(names):
        axis = figure.subplots()
        axis.set_yticks(at, names)
    axis.barh(at, table["share"], xerr=table["std_error"].fillna(0), color="C0", alpha=0.7)
    axis.set_xlim(0, 1)
    axis.set_xlabel("share of the variance, with its standard error")
    return figure


def covariance_map(result: Result, rows: int = 60) -> Figure:
    """The covariance V of the first rows, at the estimates.

    It is had from the designs of these rows alone. Where levels are correlated and many, there
    are fewer rows than asked for; the axis says how many.

    Args:
        result: a fit.
        rows: how many rows, at least 1.

    Raises:
        TypeError: if ``result`` is no result or ``rows`` no whole number.
        InputError: if the rows were streamed, or ``rows`` is below 1.
    """
    check_instance("result", result, Result)
    check_count("rows", rows, 1)
    refit = Refit(result)
    y, own = refit.y, refit.source.rows
    n = min(rows, result.rows)
    at = torch.arange(n) if own is None else own[:n].cpu()
    with torch.no_grad():
        found = refit.covariance.terms(at.to(y.device), y.dtype)
        terms = [_own_levels(term) for term in found]
        n = max(1, min([n, *(_NUMBERS // term.design.shape[1] for term in terms)]))
        first = torch.arange(n, device=y.device)
        parts = [_dense(term.take(first), y) for term in terms]
        V = sum(parts, start=y.new_zeros(n, n)).numpy(force=True)
    figure = _figure(5.5, 4.6)
    axis = figure.subplots()
    size = abs(V).max()
    ends = 0.5, n + 0.5
    image = axis.imshow(V, cmap="RdBu_r", vmin=-size, vmax=size, extent=(*ends, *ends[::-1]))
    figure.colorbar(image, ax=axis, label="covariance")
    axis.set_xlabel(f"row (the first {n} of {result.rows})")
    axis.set_ylabel("row")
    return figure


def _own_levels(term: Term) -> Term:
    """A term with the levels that its rows have and no others, if levels are independent."""
    z, g = term.design, term.covariance
    if not isinstance(z, IndexedDesign):
        return term
    levels, codes = z.codes.unique(return_inverse=True)
    if isinstance(g, RepeatedCovariance) and (g.levels, len(g.matrix)) == (z.levels, z.effects):
        g = replace(g, levels=len(levels))
    elif isinstance(g, DiagonalCovariance):
        g = g.with_matrix(g.matrix.unflatten(0, (z.levels, z.effects))[levels].flatten())
    else:
        return term
    return replace(term, design=IndexedDesign(codes, z.values, len(levels)), covariance=g)


def _dense(term: Term, like: Tensor) -> Tensor:
    """The covariance of a term's rows (n, n), in the memory of n columns of its effects."""
    eye = torch.eye(term.design.shape[0], dtype=like.dtype, device=like.device)
    return term.design.matmul(term.covariance.multiply(term.design.t_matmul(eye)))


def zeta(profile: Profile) -> Figure:
    """Profile zeta of each parameter, straight where a Wald interval would do.

    Raises:
        TypeError: if ``profile`` is no profile.
    """
    check_instance("profile", profile, Profile)
    curves = profile.curves
    columns = min(3, len(curves))
    lines = -(-len(curves) // columns)
    figure = _figure(3 * columns, 2.4 * lines)
    titles = _texts(list(curves), 36)
    with lettered(titles):
        axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis, title, curve in zip(axes, titles, curves.values(), strict=False):
        axis.plot(curve.values, curve.zeta, lw=1.2)
        axis.axhline(0, color="0.5", lw=0.8)
        for level in (0.5, 0.95):
            low, high = curve.interval(level)
            z = float(torch.special.ndtri(torch.tensor((1 + level) / 2, dtype=torch.float64)))
            axis.plot([low, low], [-z, 0], color="C1", lw=0.8)
            axis.plot([high, high], [0, z], color="C1", lw=0.8)
        axis.set_title(title, fontsize=9)
        axis.set_ylim(-3.2, 3.2)
    for axis in axes[len(curves) :]:
        axis.set_axis_off()
    figure.supylabel("zeta", fontsize=10)
    return figure


def semivariogram(result: Result, places: Tensor, bins: int = 15, seed: int = 0) -> Figure:
    r"""Empirical semivariogram :math:`\gamma(d)`, the mean of :math:`(r_i - r_j)^2 / 2` at distance
    d, of the residuals without random effects and of the conditional ones.

    The first shows how far rows are alike; the second should be flat.

    Args:
        result: a fit.
        places: where each row is, (n, k).
        bins: of the distances, up to half the largest.
        seed: of the rows that are taken where there are more than 2,000.

    Raises:
        InputError: if ``places`` has another number of rows, or the rows were streamed.

    Reference:
        Matheron, Economic Geology 58 (1963) 1246, eq. 3.
    """
    check_instance("result", result, Result)
    check_tensor("places", places, shape=(result.rows, "k"))
    check_count("bins", bins, 1)
    check_count("seed", seed)
    source = source_of(result)
    X = source.X.detach()[:, list(result.fixed.columns)]
    marginal = source.y.detach() - X @ result.fixed.estimate
    generator = torch.Generator().manual_seed(seed)
    at = torch.randperm(result.rows, generator=generator)[:2000]
    distance = torch.pdist(places[at].double()).numpy(force=True)
    edges = np.linspace(0, distance.max() / 2, bins + 1)
    which = np.digitize(distance, edges) - 1
    figure = _figure(6, 4)
    axis = figure.subplots()
    for name, values in (("without random effects", marginal), ("conditional", result.residuals)):
        square = torch.pdist(values[at].double()[:, None]).numpy(force=True) ** 2 / 2
        count = np.bincount(which, minlength=bins)[:bins]
        total = np.bincount(which, square, minlength=bins)[:bins]
        shown = count > 0
        middle = (edges[:-1] + edges[1:]) / 2
        axis.plot(middle[shown], total[shown] / count[shown], "o-", ms=4, label=name)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("distance")
    axis.set_ylabel("semivariance of residuals")
    axis.legend()
    return figure


def _figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches; matplotlib is imported where something is drawn."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _cloud(axis: Axes, x: np.ndarray, y: np.ndarray) -> None:
    """Points, or their density where there are many."""
    if len(x) > _POINTS:
        axis.hexbin(x, y, gridsize=80, bins="log", cmap="Blues", mincnt=1)
    else:
        axis.plot(x, y, "o", ms=3, alpha=0.6)


def _texts(names: Iterable[object], most: int) -> list[str]:
    """Names as they are written, shortened: dollar signs are no formula."""
    return [literal(name) for name in abridged(list(names), most)]


def _groups(result: Result) -> list[str]:
    named = {c.name: c.group for c in result.components}
    return list(dict.fromkeys(named[effects.name] for effects in result.random))
