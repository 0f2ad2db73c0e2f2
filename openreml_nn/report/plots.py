"""Plots of a result; each function returns a matplotlib figure."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from openreml_nn.estimation.result import REMLResult
from openreml_nn.estimation.tables import blup_table

__all__ = ["caterpillar", "convergence", "residuals"]

#: Levels beyond this many are drawn without their names.
_NAMED = 60
#: Points beyond this many are drawn as a density.
_POINTS = 20_000


def caterpillar(result: REMLResult, group: str) -> Figure:
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


def convergence(result: REMLResult) -> Figure:
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


def residuals(result: REMLResult) -> Figure:
    """Conditional residuals against fitted values."""
    figure = Figure(figsize=(5.5, 4), layout="constrained")
    axis = figure.subplots()
    x = result.fitted.numpy(force=True)
    y = result.residuals.numpy(force=True)
    if len(x) > _POINTS:
        axis.hexbin(x, y, gridsize=80, bins="log", cmap="Blues", mincnt=1)
    else:
        axis.plot(x, y, "o", ms=3, alpha=0.6)
    axis.axhline(0, color="0.5", lw=0.8, ls="--")
    axis.set_xlabel("fitted value")
    axis.set_ylabel("residual")
    return figure


def _groups(result: REMLResult) -> list[str]:
    named = {c.name: c.group for c in result.components}
    return list(dict.fromkeys(named[effects.name] for effects in result.random))
