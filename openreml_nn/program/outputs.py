"""The files of a run, each written whole or not at all."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from torch import Tensor

from openreml_nn.inference import Profile, diagnose, heritability
from openreml_nn.inference.genetic import METHODS
from openreml_nn.program.reporting import costs_nothing
from openreml_nn.report.plots import (
    calibration,
    caterpillar,
    convergence,
    covariance_map,
    residuals,
    semivariogram,
    shares,
    zeta,
)
from openreml_nn.report.points import has_quantiles, residual_table
from openreml_nn.result import Result
from openreml_nn.result.record import to_record
from openreml_nn.result.tables import blup_table, fixed_table, variance_table
from openreml_nn.support.display import visible
from openreml_nn.support.files import replacing, write_text
from openreml_nn.table import write_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "summary",
    "write_heritability",
    "write_plots",
    "write_profile",
    "write_record",
    "write_tables",
]


def summary(result: Result) -> str:
    """The result as text, with what is wrong with it in plain words."""
    return "\n".join([result.summary(), *map(visible, diagnose(result))]).rstrip("\n") + "\n"


def write_tables(result: Result, directory: str | Path) -> None:
    """Write the CSV files and ``summary.txt``; the directory is made if there is none."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    write_table(fixed_table(result), folder / "fixed.csv")
    write_table(variance_table(result), folder / "variance.csv")
    write_table(blup_table(result), folder / "blup.csv")
    if len(result.residuals):
        with costs_nothing("residuals.csv"):
            write_table(residual_table(result), folder / "residuals.csv")
    with costs_nothing("summary.txt"):
        write_text(folder / "summary.txt", summary(result))


def write_plots(result: Result, directory: str | Path, places: Tensor | None = None) -> None:
    """Draw the result into ``plots``. A plot that fails is left out with a warning.

    Args:
        result: a fit.
        directory: of the run.
        places: where the rows are (n, k), of a spatial model.
    """
    _draw(Path(directory), _plots(result, places))


def write_profile(profile: Profile, directory: str | Path, is_drawn: bool) -> None:
    """Write the intervals of a profile likelihood, and draw it where that is asked for."""
    write_table(profile.intervals(), Path(directory) / "profile.csv")
    if is_drawn:
        _draw(Path(directory), {"profile": partial(zeta, profile)})


def write_heritability(result: Result, group: str, directory: str | Path) -> pd.DataFrame:
    """Write the heritability of a group by each definition that the response has; returns the table.

    Raises:
        InputError: if the group has no heritability, see :func:`openreml_nn.inference.heritability`.
    """
    # The others are of means of a Gaussian response.
    methods = METHODS if result.family is None else ("plain",)
    found = {method: heritability(result, group, method) for method in methods}
    table = pd.DataFrame(
        {
            "group": group,
            "method": list(found),
            "estimate": [h.estimate for h in found.values()],
            "std_error": [h.std_error for h in found.values()],
        }
    )
    write_table(table, Path(directory) / "heritability.csv")
    return table


def write_record(result: Result, directory: str | Path, validation: Mapping[str, float]) -> None:
    """Write ``result.json``, which says that all else is there and whole.

    Args:
        result: a fit.
        directory: of the run.
        validation: metrics of the rows held out, by name.
    """
    record = to_record(result, validation)
    record["details"]["diagnosis"] = diagnose(result)
    record["details"]["residuals"] = "quantile residual" if has_quantiles(result) else "residual"
    text = json.dumps(record, indent=2, allow_nan=False) + "\n"
    write_text(Path(directory) / "result.json", text)


def _draw(folder: Path, plots: Mapping[str, Callable[[], Figure]]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    for name, draw in plots.items():
        with costs_nothing(f"plot {name}"):
            (folder / "plots").mkdir(parents=True, exist_ok=True)
            # Figure.savefig() would draw twice: once to place the axes, and again with them in place.
            canvas = FigureCanvasAgg(draw())
            canvas.figure.set_dpi(150)
            with replacing(folder / "plots" / f"{name}.png") as temporary:
                canvas.print_png(temporary)


def _plots(result: Result, places: Tensor | None) -> Mapping[str, Callable[[], Figure]]:
    """What to draw, by the names of the files."""
    figures: dict[str, Callable[[], Figure]] = {"convergence": partial(convergence, result)}
    if places is not None and result.source is not None:
        figures["semivariogram"] = partial(semivariogram, result, places)
    if len(result.residuals):
        figures["residuals"] = partial(residuals, result)
    if result.source is not None and result.family == "binomial" and result.source.y.dim() == 1:
        figures["calibration"] = partial(calibration, result.fitted, result.source.y)
    if result.source is not None and result.family is None:  # they are of Gaussian responses
        figures["shares"] = partial(shares, result)
        figures["covariance"] = partial(covariance_map, result)
    groups = dict.fromkeys(c.group for c in result.components if not c.is_residual)
    for group in groups:
        name = "blup_" + re.sub(r"[^\w.-]", "_", group)
        figures[name] = partial(caterpillar, result, group)
    return figures
