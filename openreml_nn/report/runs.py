"""A table of runs, and the best of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import OmegaConf

from openreml_nn.support.errors import InputError

__all__ = ["FAILED", "best", "collect", "compared", "failures", "status_of"]

#: What a run of a sweep leaves that has failed: its exit status, its message and its options.
FAILED = "failed.json"

#: What is told of each run, where its ``result.json`` has it.
_FIT = ("converged", "singular", "log_likelihood", "deviance", "aic", "bic", "seconds")
#: What a run that failed lacks; all else in its row are options, which other runs may have by default.
_OUTCOMES = {"formula", "method", "rows", *_FIT}


def failures(folder: str | Path) -> dict[Path, int]:
    """The folders of the runs below a folder that have failed, and their exit statuses."""
    return {path.parent: status_of(path) for path in Path(folder).rglob(FAILED)}


def status_of(path: Path) -> int:
    """The exit status in the file that a failed run has left.

    Raises:
        InputError: if the file is of something else.
    """
    with _named(path):
        return int(json.loads(path.read_text(encoding="utf-8"))["status"])


def collect(folder: str | Path, with_failed: bool = False) -> pd.DataFrame:
    """A data frame with a row for each run below a folder: what was overridden, and what came out.

    Args:
        folder: of the runs.
        with_failed: whether those that failed have a row, with their message in the column
            ``error``.

    Raises:
        InputError: if there is no run, or a ``result.json`` is of something else.
    """
    failed = failures(folder)
    found = [path for path in Path(folder).rglob("result.json") if path.parent not in failed]
    if with_failed:
        found += [path / FAILED for path in failed]
    rows = []
    for path in sorted(found, key=_number):
        with _named(path):
            rows.append(_row(path, Path(folder)))
    if not rows:
        raise InputError(f"folder {str(folder)!r} has no run: expected a result.json below it")
    return pd.DataFrame(rows)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Names the file that is not what a run writes."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"file {str(path)!r} is not the result of a run ({type(error).__name__}: {error})"
        ) from error


def _row(path: Path, folder: Path) -> dict[str, Any]:
    result = json.loads(path.read_text(encoding="utf-8"))
    overrides = path.parent / ".hydra" / "overrides.yaml"
    given = list(OmegaConf.load(overrides)) if overrides.is_file() else []
    given = result["overrides"] if path.name == FAILED else given
    options = {}
    for text in given:
        name, _, value = str(text).lstrip("+").partition("=")
        # Sweeps write booleans as Python does, single runs as they were typed.
        options[name] = value.lower() if value.lower() in ("true", "false") else value
    row = {"run": str(path.parent.relative_to(folder)), **options}
    if path.name == FAILED:
        return row | {"error": result["error"]}
    row |= {"formula": result["model"]["formula"], "method": result["model"]["method"]}
    row["rows"] = result["data"]["rows"]
    row |= {key: result["fit"][key] for key in _FIT}
    for part in result["random"]:
        for j, (effect, entry) in enumerate(zip(part["effects"], part["covariance"], strict=True)):
            row[f"{part['group']} {effect} variance"] = entry[j]
    row["residual variance"] = result["residual"]["variance"]
    return row | result.get("validation", {})


def compared(table: pd.DataFrame) -> pd.DataFrame:
    """What differs between the runs of a table, as people read it: without variances, messages, and
    what other columns say too.

    Args:
        table: from :func:`collect`.
    """
    shown = table.copy()
    # A run that failed has no formula and no method, but the options that set them.
    for name in ("formula", "method"):
        if (option := f"model.{name}") in shown:
            given = shown[option].str.strip("\"'")
            shown[name] = shown[name].fillna(given) if name in shown else given
    hidden = {"model.formula", "model.method", "deviance", "error"}  # deviance: -2 log-likelihoods
    hidden |= {c for c in shown if c.endswith(" variance")}
    if len(shown) > 1:
        for name in shown:
            is_outcome = name in _OUTCOMES or name.startswith("val_")
            if shown[name].nunique(dropna=is_outcome) <= 1 and name != "run":
                hidden.add(name)
    return shown[[c for c in shown if c not in hidden]]


def best(table: pd.DataFrame) -> tuple[str, str] | None:
    """The best run and by what: log density of the rows held out; else AIC, where the models have
    one likelihood (``ml``, or ``reml`` with the same formula); None where nothing compares, as between
    runs of different data. Runs that failed are none of them."""
    if "error" in table:
        table = table[table["error"].isna()]
    if table.empty:
        return None
    response = table["formula"].str.partition("~")[0].str.strip()
    if max(table["rows"].nunique(), response.nunique()) > 1:
        return None
    by = "val_negative_log_density"
    if by not in table:
        if table["method"].nunique() > 1:
            return None
        if table["method"].iloc[0] == "reml" and table["formula"].nunique() > 1:
            return None
        by = "aic"
    if table[by].isna().all():
        return None
    return str(table.loc[table[by].idxmin(), "run"]), by


def _number(path: Path) -> tuple[int, str]:
    name = path.parent.name
    return (int(name) if name.isdigit() else -1, str(path))
