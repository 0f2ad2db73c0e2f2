"""The files of a run, each written whole or not at all."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from openreml_nn.inference import Profile, diagnose
from openreml_nn.program.reporting import costs_nothing
from openreml_nn.report.plots import (
    caterpillar,
    convergence,
    covariance,
    residuals,
    semivariogram,
    shares,
    zeta,
)
from openreml_nn.result.result import Component, Result, finite
from openreml_nn.result.tables import blup_table, fixed_table, variance_table
from openreml_nn.support.checks import (
    check_count,
    check_instance,
    check_mapping,
    check_number,
    check_tensor,
)
from openreml_nn.support.display import visible
from openreml_nn.support.files import replacing, write_text
from openreml_nn.table import write_table

__all__ = ["Run", "write_plots", "write_profile", "write_record", "write_tables"]


@dataclass(frozen=True)
class Run:
    """A result and how it was had.

    Attributes:
        result: the fitted model.
        formula: its formula.
        dropped_rows: rows of the table left out because of missing values.
        optimizer: class name of the optimizer.
        seconds: wall time of the fit.
        validation: metrics of the rows held out, by name.
        places: where the rows are (n, k), of a spatial model.

    Raises:
        TypeError, ValueError: if one is of another kind, or negative.
    """

    result: Result
    formula: str
    dropped_rows: int
    optimizer: str
    seconds: float
    validation: Mapping[str, float] = field(default_factory=dict)
    places: Tensor | None = None

    def __post_init__(self) -> None:
        check_instance("result", self.result, Result)
        check_instance("formula", self.formula, str)
        check_count("dropped_rows", self.dropped_rows)
        check_instance("optimizer", self.optimizer, str)
        check_number("seconds", self.seconds, least=0)
        check_mapping("validation", self.validation, Real)
        if self.places is not None:
            check_tensor("places", self.places, (self.result.rows, "k"))

    def summary(self) -> str:
        """The result as text, with what is wrong with it in plain words."""
        parts = [self.result.summary(self.formula), *map(visible, diagnose(self.result))]
        return "\n".join(parts).rstrip("\n") + "\n"

    def record(self) -> dict[str, Any]:
        """What ``result.json`` holds (schema 1); numbers that do not exist are None."""
        result = self.result
        random = [c for c in result.components if c.group != "Residual"]
        found = {p.name: p.value for p in result.parameters}
        return finite(
            {
                "schema": 1,
                "model": {"formula": self.formula, "method": result.method},
                "data": {
                    "rows": result.rows,
                    "dropped_rows": self.dropped_rows,
                    "fixed_effects": len(result.fixed.names),
                    "groups": {c.group: len(c.levels) for c in random},
                },
                "fit": {
                    "converged": result.converged,
                    "singular": bool(result.singular),
                    "iterations": result.iterations,
                    "optimizer": self.optimizer,
                    "solver": result.plan.solver,
                    "seconds": self.seconds,
                    "log_likelihood": result.log_likelihood,
                    "deviance": result.deviance,
                    "aic": result.aic,
                    "bic": result.bic,
                    "score_norm": result.score_norm,
                },
                "fixed": fixed_table(result).to_dict("records"),
                "random": [_random(c) for c in random],
                "residual": {
                    "variance": result.residual_variance,
                    "parameters": {
                        name.rpartition("/")[2]: value
                        for name, value in found.items()
                        if name.startswith("residual/")
                    },
                },
                **({"validation": dict(self.validation)} if self.validation else {}),
            }
        )


def _random(c: Component) -> dict[str, Any]:
    return {
        "group": c.group,
        "effects": list(c.effects),
        "levels": len(c.levels),
        "covariance": c.covariance.tolist(),
        "std_dev": c.std_dev.tolist(),
        "correlation": c.correlation.tolist(),
    }


def write_tables(run: Run, directory: str | Path) -> None:
    """Write the CSV files and ``summary.txt``; the directory is made if there is none."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    write_table(fixed_table(run.result), folder / "fixed.csv")
    write_table(variance_table(run.result), folder / "variance.csv")
    write_table(blup_table(run.result), folder / "blup.csv")
    with costs_nothing("summary.txt"):
        write_text(folder / "summary.txt", run.summary())


def write_profile(profile: Profile, directory: str | Path) -> None:
    """Write the intervals of a profile likelihood and its plot."""
    write_table(profile.intervals(), Path(directory) / "profile.csv")
    _draw(Path(directory), {"profile": partial(zeta, profile)})


def write_plots(run: Run, directory: str | Path) -> None:
    """Draw the result into ``plots``. A plot that fails is left out with a warning."""
    _draw(Path(directory), _plots(run))


def write_record(run: Run, directory: str | Path) -> None:
    """Write ``result.json``, which says that all else is there and whole."""
    text = json.dumps(run.record(), indent=2, allow_nan=False) + "\n"
    write_text(Path(directory) / "result.json", text)


def _draw(folder: Path, plots: Mapping[str, Callable[[], Figure]]) -> None:
    for name, draw in plots.items():
        with costs_nothing(f"plot {name}"):
            (folder / "plots").mkdir(parents=True, exist_ok=True)
            figure = draw()
            with replacing(folder / "plots" / f"{name}.png") as temporary:
                figure.savefig(temporary, dpi=150)


def _plots(run: Run) -> Mapping[str, Callable[[], Figure]]:
    """What to draw, by the names of the files."""
    result = run.result
    figures: dict[str, Callable[[], Figure]] = {"convergence": partial(convergence, result)}
    if run.places is not None:
        figures["semivariogram"] = partial(semivariogram, result, run.places)
    if len(result.residuals):
        figures["residuals"] = partial(residuals, result)
    if result.source is not None:
        figures["shares"] = partial(shares, result)
        figures["covariance"] = partial(covariance, result)
    groups = dict.fromkeys(c.group for c in result.components if c.group != "Residual")
    for group in groups:
        name = "blup_" + re.sub(r"[^\w.-]", "_", group)
        figures[name] = partial(caterpillar, result, group)
    return figures
