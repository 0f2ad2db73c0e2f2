"""Plots of a result; each function returns a matplotlib figure."""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.special import ndtri
from torch import Tensor

from openreml_nn.estimation.result import Result
from openreml_nn.estimation.tables import blup_table
from openreml_nn.inference import Profile, variance_shares
from openreml_nn.inference.refit import Refit

__all__ = [
    "caterpillar",
    "convergence",
    "covariance",
    "residuals",
    "semivariogram",
    "shares",
    "zeta",
]

#: Levels beyond this many are drawn without their names.
_NAMED = 60
#: Points beyond this many are drawn as a density.
_POINTS = 20_000


def caterpillar(result: Result, group: str) -> Figure:
    """BLUPs of a grouping factor with 95% prediction intervals, a panel for each effect.

    Raises:
        ValueError: if the result has no random effect of that group.
    """
    table = blup_table(result)
    table = table[table["group"] == group]
    if table.empty:
        raise ValueError(f"`group` is {group!r}: expected one of {_groups(result)}")
    effects = list(dict.fromkeys(table["effect"]))
    levels = len(table) // len(effects)
    named = levels <= _NAMED
    height = 1.5 + 0.16 * levels if named else 6.0
    figure = Figure(figsize=(1.5 + 3.2 * len(effects), height), layout="constrained")
    axes = figure.subplots(1, len(effects), squeeze=False)[0]
    # All panels in the order of the first effect, so that a level keeps its line.
    first = table[table["effect"] == effects[0]].sort_values("blup")
    order = first["level"].tolist()
    for axis, effect in zip(axes, effects, strict=True):
        part = table[table["effect"] == effect].set_index("level").loc[order]
        at = np.arange(levels)
        half = 1.96 * part["std_error"]
        low, high = part["blup"] - half, part["blup"] + half
        if named:
            axis.hlines(at, low, high, color="C0", lw=1, alpha=0.6)
        else:
            axis.fill_betweenx(at, low, high, color="C0", lw=0, alpha=0.35, step="mid")
        axis.plot(part["blup"], at, "o", color="C0", ms=3 if named else 1)
        axis.axvline(0, color="0.5", lw=0.8, ls="--")
        axis.set_title(effect)
        axis.set_ylim(-1, levels)
        axis.set_yticks(at if named and axis is axes[0] else [])
        if named and axis is axes[0]:
            axis.set_yticklabels(order, fontsize=7)
    axes[0].set_ylabel(f"{group} ({levels} levels)")
    figure.supxlabel("BLUP with 95% prediction interval", fontsize=10)
    return figure


def convergence(result: Result) -> Figure:
    """Log-likelihood and transformed covariance parameters at the end of each iteration."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    step = np.arange(1, result.iterations + 1)
    marker = "o" if result.iterations <= 50 else ""
    values = [record.log_likelihood for record in result.history]
    left.plot(step, values, marker=marker, ms=3)
    left.set_ylabel("log-likelihood" if result.method == "ml" else "restricted log-likelihood")
    left.ticklabel_format(useOffset=False, axis="y")
    names = list(result.history[0].parameters) if result.history else []
    for name in names[:12]:
        path = np.array([record.parameters[name] for record in result.history])
        scale = abs(path[-1]) or 1.0
        right.plot(step, path / scale, marker=marker, ms=3, label=name)
    right.set_ylabel("parameter / |its last value|")
    if names:
        right.legend(fontsize=7)
    for axis in (left, right):
        axis.set_xlabel("iteration")
        axis.locator_params(axis="x", integer=True)
    return figure


def residuals(result: Result) -> Figure:
    """Conditional residuals against fitted values, and their quantiles against normal ones."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    x = result.fitted.numpy(force=True)
    y = result.residuals.numpy(force=True)
    _cloud(left, x, y)
    left.axhline(0, color="0.5", lw=0.8, ls="--")
    left.set_xlabel("fitted value")
    left.set_ylabel("residual")
    n = len(y)
    # Blom's plotting positions; of many rows, quantiles do.
    at = np.linspace(0, n - 1, min(n, _POINTS)).astype(int)
    normal = ndtri((at + 1 - 0.375) / (n + 0.25))
    scale = y.std() or 1.0
    right.plot(normal, np.sort(y)[at] / scale, "o", ms=3, alpha=0.6)
    right.axline((0, 0), slope=1, color="0.5", lw=0.8, ls="--")
    right.set_xlabel("normal quantile")
    right.set_ylabel("residual / its standard deviation")
    return figure


def shares(result: Result) -> Figure:
    """Share of each term in the variance of a row, with standard errors."""
    table = variance_shares(result)[::-1]
    figure = Figure(figsize=(6, 1.2 + 0.4 * len(table)), layout="constrained")
    axis = figure.subplots()
    at = np.arange(len(table))
    axis.barh(at, table["share"], xerr=table["std_error"].fillna(0), color="C0", alpha=0.7)
    axis.set_yticks(at, table["group"])
    axis.set_xlim(0, 1)
    axis.set_xlabel("share of the variance, with its standard error")
    return figure


def covariance(result: Result, rows: int = 60) -> Figure:
    """The covariance V of the first rows, at the estimates.

    Raises:
        ValueError: if the rows were streamed.
    """
    refit = Refit(result)
    widest = max(term.design.shape[1] for term in refit.objective().terms())
    # The rows of all designs are held, n times as many numbers as there are levels.
    n = min(rows, result.rows, max(1, 10_000_000 // widest))
    own = refit.source.rows
    at = torch.arange(n) if own is None else own[:n].cpu()
    with torch.no_grad():
        terms = refit.covariance.terms(at.to(refit.y.device))
        V = sum(
            (t.design.matmul(t.covariance.multiply(t.design.dense(refit.y).mT)) for t in terms),
            start=refit.y.new_zeros(n, n),
        ).numpy(force=True)
    figure = Figure(figsize=(5.5, 4.6), layout="constrained")
    axis = figure.subplots()
    size = abs(V).max()
    image = axis.imshow(V, cmap="RdBu_r", vmin=-size, vmax=size)
    figure.colorbar(image, ax=axis, label="covariance")
    axis.set_xlabel(f"row (the first {n} of {result.rows})")
    axis.set_ylabel("row")
    return figure


def zeta(profile: Profile) -> Figure:
    """Profile zeta of each parameter, straight where a Wald interval would do."""
    curves = profile.curves
    columns = min(3, len(curves))
    lines = -(-len(curves) // columns)
    figure = Figure(figsize=(3 * columns, 2.4 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis, (name, curve) in zip(axes, curves.items(), strict=False):
        axis.plot(curve.values, curve.zeta, lw=1.2)
        axis.axhline(0, color="0.5", lw=0.8)
        for level in (0.5, 0.95):
            low, high = curve.interval(level)
            z = float(ndtri((1 + level) / 2))
            axis.plot([low, low], [-z, 0], color="C1", lw=0.8)
            axis.plot([high, high], [0, z], color="C1", lw=0.8)
        axis.set_title(name, fontsize=9)
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
        ValueError: if ``places`` has another number of rows, or the rows were streamed.

    Reference:
        Matheron, Economic Geology 58 (1963) 1246, eq. 3.
    """
    if len(places) != result.rows:
        raise ValueError(f"`places` has {len(places)} rows: expected {result.rows}")
    refit = Refit(result)
    marginal = refit.y - refit.X @ result.fixed.estimate
    generator = torch.Generator().manual_seed(seed)
    at = torch.randperm(result.rows, generator=generator)[:2000]
    distance = torch.pdist(places[at].double()).numpy(force=True)
    edges = np.linspace(0, distance.max() / 2, bins + 1)
    which = np.digitize(distance, edges) - 1
    figure = Figure(figsize=(6, 4), layout="constrained")
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


def _cloud(axis: Axes, x: np.ndarray, y: np.ndarray) -> None:
    """Points, or their density where there are many."""
    if len(x) > _POINTS:
        axis.hexbin(x, y, gridsize=80, bins="log", cmap="Blues", mincnt=1)
    else:
        axis.plot(x, y, "o", ms=3, alpha=0.6)


def _groups(result: Result) -> list[str]:
    named = {c.name: c.group for c in result.components}
    return list(dict.fromkeys(named[effects.name] for effects in result.random))
