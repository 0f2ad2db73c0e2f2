"""The plots that the page draws itself, as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

import numpy as np
import pandas as pd

from openreml_nn.report.points import normal_quantiles

__all__ = ["Charts", "interval"]

#: Levels beyond this many are left out of a plot, evenly by rank.
_LEVELS = 2_000


def interval(estimate: float, error: float) -> tuple[float, float]:
    """The ends of a Wald interval of 95%."""
    return estimate - 1.96 * error, estimate + 1.96 * error


class Charts:
    """The plots of a run. Each method returns the key and the title under which the page draws it.

    Args:
        prefix: of the keys.

    Attributes:
        plots: what the page's script is given, by key.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.plots: dict[str, dict[str, Any]] = {}

    def forest(self, fixed: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
        """Fixed effects of a record but for the intercept, which is on another scale."""
        known = [p for p in fixed if None not in (p["estimate"], p["std_error"])]
        shown = [p for p in known if p["name"] != "(Intercept)"][::-1]
        if not shown:
            return None
        ends = [interval(p["estimate"], p["std_error"]) for p in shown]
        return self._chart(
            title="Fixed effects but the intercept, with 95% intervals",
            xlabel="estimate",
            ylabel="",
            x=[p["estimate"] for p in shown],
            low=[low for low, _ in ends],
            high=[high for _, high in ends],
            rows=[p["name"] for p in shown],
            zero=True,
        )

    def caterpillars(self, table: pd.DataFrame) -> list[dict[str, Any]]:
        """BLUPs of each group and effect, in their order."""
        found = []
        for (group, effect), part in table.groupby(["group", "effect"], sort=False):
            part = part.sort_values("blup", kind="stable")
            if (count := len(part)) > _LEVELS:
                part = part.iloc[np.linspace(0, count - 1, _LEVELS).round().astype(int)]
            blup = part["blup"].to_numpy(float)
            half = 1.96 * part["std_error"].to_numpy(float)
            many = (
                f"{len(part):,} of {count:,} levels, evenly by rank"
                if count > _LEVELS
                else f"{count:,} levels"
            )
            found.append(
                self._chart(
                    title=f"{group}: {effect} ({many}), BLUPs with 95% prediction intervals",
                    xlabel="BLUP",
                    ylabel=str(group),
                    x=_listed(blup),
                    low=_listed(blup - half),
                    high=_listed(blup + half),
                    rows=[str(level) for level in part["level"]],
                    zero=True,
                )
            )
        return found

    def residuals(self, table: pd.DataFrame, of: int, kind: str) -> list[dict[str, Any]]:
        """Residuals against fitted values, and their quantiles.

        Args:
            table: of some of the rows.
            of: the number of all rows.
            kind: of the residuals, "residual" or "quantile residual".
        """
        rows = [f"row {row}" for row in table["row"]]
        residual, fitted = (table[name].to_numpy(float) for name in ("residual", "fitted"))
        shown = f"{len(table):,} of {of:,} rows"
        one = self._chart(
            title=f"Residuals against fitted values ({shown})",
            xlabel="fitted value",
            ylabel=kind,
            x=_listed(fitted),
            y=_listed(residual),
            labels=rows,
            level=True,
        )
        order = residual.argsort(kind="stable")
        n = len(residual)
        # Quantile residuals are standard normal where the model is right.
        is_normal = kind == "quantile residual"
        line = [0.0, 1.0] if is_normal else [float(residual.mean()), float(residual.std()) or 1.0]
        other = self._chart(
            title=f"Quantiles of the residuals against normal ones ({shown})",
            xlabel="normal quantile",
            ylabel=kind,
            x=_listed(normal_quantiles(np.arange(n), n)),
            y=_listed(residual[order]),
            labels=[rows[i] for i in order],
            diagonal=line,
        )
        return [one, other]

    def path(self, history: Sequence[Mapping[str, Any]], ylabel: str) -> list[dict[str, Any]]:
        """The log-likelihood, or the restricted one, at each iteration."""
        values = [step.get("log_likelihood") for step in history]
        if len(values) < 2 or None in values:
            return []
        steps = list(range(1, len(values) + 1))
        labels = [f"iteration {i}" for i in steps]
        return [
            self._chart(
                title="Convergence",
                xlabel="iteration",
                ylabel=ylabel,
                x=steps,
                y=values,
                labels=labels,
                path=True,
            )
        ]

    def _chart(self, **plot: Any) -> dict[str, Any]:
        """Keep what the page draws; of each mark, by its name in ``rows`` or ``labels``, what it says."""
        key = f"{self.prefix}-{len(self.plots)}"
        says = []
        for i, x in enumerate(plot["x"]):
            if plot.get("path"):
                text = f"{plot['ylabel']} {plot['y'][i]:.10g}"
            elif "y" in plot:
                text = f"{plot['ylabel']} {_short(plot['y'][i])} at {_short(x)}"
            else:
                text = f"{_short(x)} ({_short(plot['low'][i])} to {_short(plot['high'][i])})"
            says.append(text)
        self.plots[key] = {"key": key, "says": says, **plot}
        return {"key": key, "title": plot["title"]}


def _listed(values: np.ndarray) -> list[float | None]:
    """Numbers with seven digits, which is what a screen shows; None where there is none."""
    return [float(f"{v:.7g}") if isfinite(v) else None for v in values]


def _short(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"
