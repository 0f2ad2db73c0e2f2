"""One page of HTML for one or many runs."""

from __future__ import annotations

import base64
import os
from math import isnan
from pathlib import Path
from typing import Any

from openreml_nn.report.runs import best, collect
from openreml_nn.support.checks import check_instance
from openreml_nn.support.errors import InputError
from openreml_nn.support.files import write_text

__all__ = ["write_report"]

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; }
pre { background: #f6f6f6; padding: 1rem; overflow-x: auto; line-height: 1.25; }
table { border-collapse: collapse; font-size: 14px; }
.wide { overflow-x: auto; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
td { white-space: nowrap; }
tr.best td { font-weight: bold; background: #eef6ee; }
figure { display: inline-block; margin: .5rem; vertical-align: top; }
figcaption { text-align: center; color: #555; font-size: 14px; }
img { max-width: 100%; height: auto; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% if rows|length > 1 %}
<h2>Runs</h2>
<div class="wide">
<table>
<tr>{% for name in columns %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in rows %}
<tr{% if row[0] == best %} class="best"{% endif %}>
{%- for value in row %}<td>{{ value }}</td>{% endfor %}</tr>
{% endfor %}
</table>
</div>
{% if best is not none %}<p>Best run by {{ by }}: {{ best }}.</p>{% endif %}
{% endif %}
{% for run in runs %}
<h2>{{ run.name }}</h2>
<pre>{{ run.summary }}</pre>
{% for plot in run.plots %}
<figure><img src="data:image/png;base64,{{ plot.data }}" alt="{{ plot.name }}" width="520">
<figcaption>{{ plot.name }}</figcaption></figure>
{% endfor %}
{% endfor %}
</body>
</html>
"""


def write_report(folder: str | Path, path: str | Path) -> int:
    """Gather the runs below a folder into one page that needs no other file.

    Args:
        folder: of a run, or of many.
        path: of the page.

    Returns:
        The number of runs.

    Raises:
        InputError: if there is no run.
        TypeError: if an argument is no path.
    """
    import jinja2  # its compiler takes long to import

    for name, value in (("folder", folder), ("path", path)):
        check_instance(name, value, (str, os.PathLike), "a path")
    if not str(path):
        raise InputError("`path` is empty: expected the file of the page")
    table = collect(folder)
    found = best(table)
    shown = table.drop(columns=[c for c in table if table[c].nunique() <= 1 and c != "run"])
    runs = [_run(Path(folder), str(name)) for name in table["run"]]
    page = (
        jinja2.Environment(autoescape=True)
        .from_string(_PAGE)
        .render(
            title=table["formula"].iloc[0] if table["formula"].nunique() == 1 else "Report",
            columns=list(shown),
            rows=[[_shown(value) for value in row] for row in shown.to_numpy().tolist()],
            best=found[0] if found else None,
            by=found[1] if found else None,
            runs=runs,
        )
    )
    write_text(path, page)
    return len(runs)


def _run(folder: Path, name: str) -> dict[str, Any]:
    run = folder / name
    plots = [
        {"name": path.stem, "data": base64.b64encode(path.read_bytes()).decode()}
        for path in sorted((run / "plots").glob("*.png"))
    ]
    text = run / "summary.txt"
    summary = text.read_text(encoding="utf-8") if text.is_file() else "(there is no summary.txt)"
    return {"name": run.name if name == "." else name, "summary": summary, "plots": plots}


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return "" if isnan(value) else f"{value:.6g}"
    return str(value)
