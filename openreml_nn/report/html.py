"""One page of HTML for one or many runs, which needs no other file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import pandas as pd

from openreml_nn.report.contents import Cell, Row, RunContents, Sheet, number
from openreml_nn.report.runs import best, collect, compared
from openreml_nn.support.checks import check_instance
from openreml_nn.support.errors import InputError
from openreml_nn.support.files import write_text
from openreml_nn.version import __version__

__all__ = ["write_report"]

_HERE = Path(__file__).parent
#: What the page calls the columns of the table of runs.
_HEADINGS = {
    "log_likelihood": "log-likelihood",
    "aic": "AIC",
    "bic": "BIC",
    "val_mse": "held-out mean squared error",
    "val_negative_log_density": "held-out negative log density",
    "val_coverage": "held-out coverage",
}
#: What stands below the estimates of all runs.
_CRITERIA = ("log_likelihood", "aic", "bic")


def write_report(folder: str | Path, path: str | Path) -> int:
    """Gather the runs below a folder into one page.

    The page has for each run the diagnosis, the model in words, variance components and fixed
    effects with intervals, and plots that say the name under the pointer and zoom. Several runs stand
    side by side before that, with the messages of those that failed. Tables are sorted by their
    headings and copied to a spreadsheet.

    Args:
        folder: of a run, or of many.
        path: of the page.

    Returns:
        The number of runs that have a result.

    Raises:
        InputError: if there is no run.
        TypeError: if an argument is no path.
    """
    import jinja2  # its compiler takes long to import

    for name, value in (("folder", folder), ("path", path)):
        check_instance(name, value, (str, os.PathLike), "a path")
    if not str(path):
        raise InputError("`path` is empty: expected the file of the page")
    fitted = collect(folder)
    table = collect(folder, with_failed=True)
    found = best(table)
    names = {
        str(run): Path(folder).resolve().name if run == "." else str(run) for run in fitted["run"]
    }
    runs = [
        RunContents(Path(folder) / run, name, f"run{i}")
        for i, (run, name) in enumerate(names.items())
    ]
    contexts = [run.context() for run in runs]
    keys = dict(zip(names, (run.key for run in runs), strict=True))
    page = (
        jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        .from_string(_read("page.html"))
        .render(
            title=fitted["formula"].iloc[0] if fitted["formula"].nunique() == 1 else "Report",
            version=__version__,
            date=date.today().isoformat(),
            style=_verbatim("page.css"),
            script=_verbatim("page.js"),
            runs=contexts,
            failed=table.loc[~table["run"].isin(fitted["run"])].to_dict("records"),
            plots={key: plot for run in runs for key, plot in run.charts.plots.items()},
            overview=_overview(table, found),
            side_by_side=_side_by_side([run.record for run in runs], list(names.values())),
            best=names[found[0]] if found else None,
            best_id=keys[found[0]] if found else None,
            by=_HEADINGS.get(found[1], found[1]) if found else None,
        )
    )
    write_text(path, page)
    return len(runs)


def _read(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _verbatim(name: str) -> Any:
    """A file of ours, which is not escaped."""
    from markupsafe import Markup

    return Markup(_read(name))


def _overview(table: pd.DataFrame, found: tuple[str, str] | None) -> Sheet:
    """A row for each run: what differs between them."""
    shown = compared(table)
    rows = [
        Row([number(value) for value in row], marked=found is not None and row[0] == found[0])
        for row in shown.to_numpy(dtype=object).tolist()
    ]
    return Sheet([_HEADINGS.get(c, str(c)) for c in shown], rows)


def _side_by_side(records: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Sheet:
    """A row for each quantity and a column for each run."""
    columns = [_quantities(record) for record in records]
    rows = []
    criteria = [_HEADINGS[key] for key in _CRITERIA]
    quantities = dict.fromkeys(key for column in columns for key in column)
    for name in sorted(quantities, key=lambda name: name in criteria):
        texts = [column.get(name, ("", None)) for column in columns]
        first = texts[0][0]
        cells = [Cell(text, value, text not in ("", first)) for text, value in texts]
        rows.append(Row([Cell(name), *cells]))
    return Sheet(["Quantity", *names], rows)


def _quantities(record: Mapping[str, Any]) -> dict[str, tuple[str, float | None]]:
    """The estimates of a run by name: what is shown, and the number."""
    found: dict[str, tuple[str, float | None]] = {}
    for part in record["fixed"]:
        error = part["std_error"]
        shown = number(part["estimate"]).text + ("" if error is None else f" ({error:.3g})")
        found[part["name"]] = shown, part["estimate"]
    for part in record["random"]:
        for i, effect in enumerate(part["effects"]):
            value = number(part["covariance"][i][i])
            found[f"variance of {part['group']}: {effect}"] = value.text, value.value
            for j in range(i):
                value = number(part["correlation"][i][j])
                name = f"correlation of {part['group']}: {part['effects'][j]}, {effect}"
                found[name] = value.text, value.value
    residual = number(record["residual"]["variance"])
    found["residual variance"] = residual.text, residual.value
    for name, value in record.get("family_parameters", {}).items():
        found[name] = number(value).text, value
    for key in _CRITERIA:
        cell = number(record["fit"][key])
        found[_HEADINGS[key]] = cell.text, cell.value
    return found
