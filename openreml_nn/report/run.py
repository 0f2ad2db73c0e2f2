"""The files of a run, each written whole or not at all."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor

from openreml_nn.estimation.result import Component, Result, finite
from openreml_nn.estimation.tables import blup_table, fixed_table, variance_table
from openreml_nn.files import replacing, write_text
from openreml_nn.inference import Profile, diagnose
from openreml_nn.report.plots import (
    caterpillar,
    convergence,
    covariance,
    residuals,
    semivariogram,
    shares,
    zeta,
)

__all__ = ["Run", "write_run"]


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
        profile: of the likelihood, if it was asked for.
        places: where the rows are (n, k), of a spatial model.
    """

    result: Result
    formula: str
    dropped_rows: int
    optimizer: str
    seconds: float
    validation: Mapping[str, float] = field(default_factory=dict)
    profile: Profile | None = None
    places: Tensor | None = None

    def summary(self) -> str:
        """The result as text, with what is wrong with it in plain words."""
        parts = [self.result.summary(self.formula), *diagnose(self.result)]
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


def write_run(run: Run, directory: str | Path) -> Path:
    """Write ``result.json``, ``summary.txt``, CSV files and the plots.

    ``result.json`` comes last: where it stands, all else is complete.

    Returns:
        The directory, which is made if there is none.
    """
    folder = Path(directory)
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    result = run.result
    write_text(folder / "summary.txt", run.summary())
    _write_csv(fixed_table(result), folder / "fixed.csv")
    _write_csv(variance_table(result), folder / "variance.csv")
    _write_csv(blup_table(result), folder / "blup.csv")
    if run.profile is not None:
        _write_csv(run.profile.intervals(), folder / "profile.csv")
    for name, figure in _plots(run).items():
        with replacing(folder / "plots" / f"{name}.png") as temporary:
            figure.savefig(temporary, dpi=150)
    write_text(folder / "result.json", json.dumps(run.record(), indent=2, allow_nan=False) + "\n")
    return folder


def _write_csv(table: pd.DataFrame, path: Path) -> None:
    with replacing(path) as temporary:
        table.to_csv(temporary, index=False)


def _plots(run: Run) -> Mapping[str, Figure]:
    result = run.result
    figures = {"convergence": convergence(result)}
    if run.profile is not None:
        figures["profile"] = zeta(run.profile)
    if run.places is not None:
        figures["semivariogram"] = semivariogram(result, run.places)
    if len(result.residuals):
        figures["residuals"] = residuals(result)
    if result.source is not None:
        figures["shares"] = shares(result)
        figures["covariance"] = covariance(result)
    groups = dict.fromkeys(c.group for c in result.components if c.group != "Residual")
    for group in groups:
        figures["blup_" + re.sub(r"[^\w.-]", "_", group)] = caterpillar(result, group)
    return figures
