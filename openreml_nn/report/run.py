"""The files of a run, each written whole or not at all."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from numbers import Real
from pathlib import Path
from types import NoneType
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from openreml_nn.inference import Profile, diagnose
from openreml_nn.report.plots import (
    caterpillar,
    convergence,
    covariance_map,
    residuals,
    semivariogram,
    shares,
    zeta,
)
from openreml_nn.result.record import record
from openreml_nn.result.result import Result
from openreml_nn.result.tables import blup_table, fixed_table, variance_table
from openreml_nn.support.checks import (
    check_count,
    check_instance,
    check_mapping,
    check_number,
    check_tensor,
)
from openreml_nn.support.files import replacing, write_text
from openreml_nn.table import write_table

__all__ = ["Run", "costs_nothing", "write_plots", "write_run", "write_tables"]


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

    Raises:
        TypeError, ValueError: if one is of another kind, or negative.
    """

    result: Result
    formula: str
    dropped_rows: int
    optimizer: str
    seconds: float
    validation: Mapping[str, float] = field(default_factory=dict)
    profile: Profile | None = None
    places: Tensor | None = None

    def __post_init__(self) -> None:
        check_instance("result", self.result, Result)
        check_instance("formula", self.formula, str)
        check_count("dropped_rows", self.dropped_rows)
        check_instance("optimizer", self.optimizer, str)
        check_number("seconds", self.seconds, least=0)
        check_mapping("validation", self.validation, Real)
        check_instance("profile", self.profile, (Profile, NoneType), "a Profile, or None")
        if self.places is not None:
            check_tensor("places", self.places, (self.result.rows, "k"))

    def summary(self) -> str:
        """The result as text, with what is wrong with it in plain words."""
        parts = [self.result.summary(self.formula), *diagnose(self.result)]
        return "\n".join(parts).rstrip("\n") + "\n"

    def record(self) -> dict[str, Any]:
        """What ``result.json`` holds (schema 1); numbers that do not exist are None."""
        result = replace(
            self.result,
            formula=self.formula,
            dropped_rows=self.dropped_rows,
            optimizer=self.optimizer,
            seconds=self.seconds,
        )
        return record(result, self.validation)


def write_run(run: Run, directory: str | Path) -> Path:
    """Write the tables, ``result.json``, ``summary.txt`` and the plots; see :func:`write_tables`
    and :func:`write_plots`.

    Returns:
        The directory, which is made if there is none.
    """
    write_tables(run, directory)
    return write_plots(run, directory)


def write_tables(run: Run, directory: str | Path) -> Path:
    """Write the CSV files, ``summary.txt`` and ``result.json``.

    ``result.json`` comes last: where it stands, all tables are of the same fit. What an earlier
    run has left in the directory goes first.

    Returns:
        The directory, which is made if there is none.

    Raises:
        TypeError: if ``run`` is no :class:`Run`.
    """
    check_instance("run", run, Run)
    folder = _folder(directory)
    folder.mkdir(parents=True, exist_ok=True)
    for old in (folder / "result.json", *(folder / "plots").glob("*.png")):
        old.unlink(missing_ok=True)
    write_table(fixed_table(run.result), folder / "fixed.csv")
    write_table(variance_table(run.result), folder / "variance.csv")
    write_table(blup_table(run.result), folder / "blup.csv")
    if run.profile is not None:
        write_table(run.profile.intervals(), folder / "profile.csv")
    with costs_nothing("summary.txt"):
        write_text(folder / "summary.txt", run.summary())
    write_text(folder / "result.json", json.dumps(run.record(), indent=2, allow_nan=False) + "\n")
    return folder


def write_plots(run: Run, directory: str | Path) -> Path:
    """Draw the result into ``plots``. A plot that fails is left out with a warning.

    Returns:
        The directory, which is made if there is none.

    Raises:
        TypeError: if ``run`` is no :class:`Run`.
    """
    check_instance("run", run, Run)
    folder = _folder(directory)
    for name, draw in _plots(run).items():
        with costs_nothing(f"plot {name}"):
            (folder / "plots").mkdir(parents=True, exist_ok=True)
            figure = draw()
            with replacing(folder / "plots" / f"{name}.png") as temporary:
                figure.savefig(temporary, dpi=150)
    return folder


@contextmanager
def costs_nothing(what: str) -> Iterator[None]:
    """Make a warning of one line of any error, so that what comes after a fit never costs it."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())
        kind = type(error).__name__
        warnings.warn(
            f"{what} is left out: {f'{kind}: {reason}' if reason else kind}",
            RuntimeWarning,
            stacklevel=3,
        )


def _folder(directory: str | Path) -> Path:
    check_instance("directory", directory, (str, os.PathLike), "a path")
    return Path(directory)


def _plots(run: Run) -> Mapping[str, Callable[[], Figure]]:
    """What to draw, by the names of the files."""
    result = run.result
    figures: dict[str, Callable[[], Figure]] = {"convergence": partial(convergence, result)}
    if run.profile is not None:
        figures["profile"] = partial(zeta, run.profile)
    if run.places is not None:
        figures["semivariogram"] = partial(semivariogram, result, run.places)
    if len(result.residuals):
        figures["residuals"] = partial(residuals, result)
    if result.source is not None:
        figures["shares"] = partial(shares, result)
        figures["covariance"] = partial(covariance_map, result)
    groups = dict.fromkeys(c.group for c in result.components if c.group != "Residual")
    for group in groups:
        name = "blup_" + re.sub(r"[^\w.-]", "_", group)
        figures[name] = partial(caterpillar, result, group)
    return figures
