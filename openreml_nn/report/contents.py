"""What the page of a run shows, read from the files of the run."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from math import exp, isfinite
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import OmegaConf

from openreml_nn.report.charts import Charts, interval
from openreml_nn.support.names import shortened
from openreml_nn.table import read_table

__all__ = ["Cell", "Row", "RunContents", "Sheet", "number"]

#: Captions of the pictures of a run, by the stems of their files.
_CAPTIONS = {
    "calibration": "Share of successes against predicted probability",
    "covariance": "Covariance of the first rows",
    "profile": "Profile zeta of each parameter",
    "semivariogram": "Semivariogram of the residuals",
    "shares": "Shares of the variance, with standard errors",
}


@dataclass(frozen=True)
class Cell:
    """What stands in a table: a text, and the number behind it if there is one."""

    text: str
    value: float | None = None
    differs: bool = False


@dataclass(frozen=True)
class Row:
    """Cells, of which the first names the row."""

    cells: list[Cell]
    marked: bool = False


@dataclass(frozen=True)
class Sheet:
    """A table of the page."""

    columns: list[str]
    rows: list[Row]


def number(value: object) -> Cell:
    """A number with six digits, or whatever it is as text; empty where there is none."""
    if isinstance(value, bool):
        return Cell("yes" if value else "no")
    if not isinstance(value, int | float):
        return Cell("" if value is None else str(value))
    if isinstance(value, int):
        return Cell(str(value), value)
    return Cell(f"{value:.6g}", value) if isfinite(value) else Cell("")


@dataclass
class RunContents:
    """One run: its record, and what the page says of it.

    Args:
        folder: of the run.
        name: on the page.
        key: of its places on the page.
    """

    folder: Path
    name: str
    key: str

    def __post_init__(self) -> None:
        self.record = json.loads((self.folder / "result.json").read_text(encoding="utf-8"))
        self.charts = Charts(self.key)
        self.details: dict[str, Any] = self.record.get("details", {})
        self.config = OmegaConf.create(self._text("config.yaml") or "{}")

    def context(self) -> dict[str, Any]:
        """What the template asks for; fills :attr:`charts`."""
        variance, fixed = self.variance(), self.fixed()
        forest = self.charts.forest(self.record["fixed"])
        charts = []
        if (table := self._csv("blup.csv")) is not None:
            charts += self.charts.caterpillars(table)
        if (table := self._csv("residuals.csv")) is not None:
            kind = self.details.get("residuals", "residual")
            charts += self.charts.residuals(table, self.record["data"]["rows"], kind)
        is_restricted = self.record["model"]["method"] == "reml"
        charts += self.charts.path(
            self.details.get("history") or [], "restricted " * is_restricted + "log-likelihood"
        )
        others = self.parameters()
        parts = ["Diagnosis", "Model", *(["Variance components"] if variance else [])]
        parts += ["Structures"] if others else []
        parts += [*(["Fixed effects"] if fixed else []), *(["Plots"] if charts else [])]
        return {
            "id": self.key,
            "name": self.name,
            "parts": parts,
            "formula": self.formula(),
            "words": self.words(),
            "facts": self.facts(),
            "diagnosis": self.diagnosis(),
            "fine": "The fit has converged, and no variance is at its boundary.",
            "variance": variance,
            "variance_caption": "Variances with intervals of 95% on the scale of their logarithm; a "
            "covariance, or a variance no larger than its standard error, has none",
            "parameters": others,
            "fixed": fixed,
            "forest": forest,
            "charts": charts,
            "images": self._images(),
            "summary": self._text("summary.txt") or "(there is no summary.txt)",
            "config": self._text("config.yaml"),
        }

    def formula(self) -> list[str]:
        """The formula, and the options that define the model beside it."""
        lines = [str(self.record["model"]["formula"])]
        for name in ("residual", "weights", "zi", "pedigree"):
            value = OmegaConf.select(self.config, f"model.{name}")
            if isinstance(value, str) and value:
                lines.append(f"{name} = {value}")
        return lines

    def words(self) -> str:
        """The model in a sentence or two."""
        model, data = self.record["model"], self.record["data"]
        response = str(model["formula"]).partition("~")[0].strip()
        family = str(model.get("family") or "Gaussian").replace("_", " ")
        kind = f"{response} is modelled as a response of the {family} family"
        if link := model.get("link"):
            kind += f" with {link} link"
        terms: list[str] = []
        structure = OmegaConf.select(self.config, "model.residual")
        structure = structure if isinstance(structure, str) else ""
        for part in self.record["random"]:
            if structure and part["group"] == structure.partition("+")[0].strip():
                continue  # a field beside its nugget is the residual of the reader
            terms.append(_random_effects(part["effects"], part["levels"], part["group"]))
        method = {"reml": "restricted maximum likelihood (REML)", "ml": "maximum likelihood (ML)"}
        dropped = data["dropped_rows"]
        left = f" {_count(dropped, 'row')} with missing values left out." if dropped else ""
        fit = f"It was fitted by {method[model['method']]} to {_count(data['rows'], 'row')}.{left}"
        listed = " and ".join(filter(None, [", ".join(terms[:-1]), *terms[-1:]]))
        random = f" The random part has {listed}." if terms else ""
        errors = f" The errors have the structure {structure}." if structure else ""
        return f"{kind}, with {self._mean()}.{random}{errors} {fit}"

    def _mean(self) -> str:
        """The fixed part of the model, in words."""
        fixed = self.record["data"]["fixed_effects"]
        if OmegaConf.select(self.config, "model.network") is not None:
            return "a network for its mean" + (
                f" and {_count(fixed, 'coefficient')} of its features" if fixed else ""
            )
        return _count(fixed, "fixed effect")

    def facts(self) -> list[tuple[str, str]]:
        """Names and values of the fit."""
        fit = self.record["fit"]
        named = {
            "Log-likelihood": "log_likelihood",
            "AIC": "aic",
            "BIC": "bic",
            "Iterations": "iterations",
            "Optimizer": "optimizer",
            "Solver": "solver",
            "Seconds": "seconds",
        }
        found = [(name, number(fit[key]).text) for name, key in named.items()]
        if not self.details.get("exact", True):
            found.append(("Likelihood", "estimated, not exact"))
        for name, value in self.record.get("family_parameters", {}).items():
            found.append((f"Parameter {name} of the family", number(value).text))
        for name, value in self.record.get("validation", {}).items():
            said = name.removeprefix("val_").replace("_", " ").replace("mse", "mean squared error")
            found.append((f"Held-out {said}", number(value).text))
        return found

    def diagnosis(self) -> list[str]:
        """What is wrong, in sentences; empty where nothing is."""
        fit = self.record["fit"]
        if (said := self.details.get("diagnosis")) is not None:
            return list(said)
        found = [] if fit["converged"] else ["The fit has not converged."]
        return found + (["The fit is singular."] if fit["singular"] else [])

    def variance(self) -> Sheet | None:
        """Variance components with intervals."""
        table = self._csv("variance.csv")
        if table is None or table.empty:
            return None
        columns = ["Term", "Effect", "Variance", "Std. error", "95% from", "to", "Std. dev."]
        columns.append("Correlation")
        rows = []
        for part in table.itertuples(index=False):
            low, high = _log_interval(part.covariance, part.std_error, bool(part.effect2))
            effect = f"{part.effect1}, {part.effect2}" if part.effect2 else part.effect1
            cells = [Cell(part.group), Cell(effect)]
            values = [part.covariance, part.std_error, low, high, part.std_dev, part.correlation]
            cells += [number(None if v is None else float(v)) for v in values]
            rows.append(Row(cells))
        return Sheet(columns, rows)

    def parameters(self) -> Sheet | None:
        """Correlations, ranges and the like: what variances and covariances do not show."""
        found = self.details.get("parameters") or []
        names = shortened(part["name"] for part in found)
        rows = [
            Row([Cell(names[part["name"]]), number(part["value"]), number(part["std_error"])])
            for part in found
            if not part["fixed"] and not _is_covariance(part["name"])
        ]
        return Sheet(["Parameter", "Estimate", "Std. error"], rows) if rows else None

    def fixed(self) -> Sheet | None:
        """Fixed effects with intervals."""
        if not self.record["fixed"]:
            return None
        rows = []
        for part in self.record["fixed"]:
            estimate, error = part["estimate"], part["std_error"]
            ends = [None, None] if None in (estimate, error) else interval(estimate, error)
            values = [estimate, error, *ends, part["statistic"]]
            rows.append(Row([Cell(part["name"]), *map(number, values)]))
        statistic = "z value" if self.record["model"].get("family") else "t value"
        return Sheet(["Effect", "Estimate", "Std. error", "95% from", "to", statistic], rows)

    def _images(self) -> list[dict[str, str]]:
        """The pictures of what the page does not draw itself."""
        titles = [plot["title"] for plot in self.charts.plots.values()]
        drawn = {stem for stem in ("convergence", "residuals") if _any(titles, stem.capitalize())}
        found = []
        for path in sorted((self.folder / "plots").glob("*.png")):
            is_blup = path.stem.startswith("blup_") and _any(titles, "BLUPs")
            if not is_blup and path.stem not in drawn:
                data = base64.b64encode(path.read_bytes()).decode()
                name = _CAPTIONS.get(path.stem, path.stem.replace("_", " "))
                found.append({"name": name, "data": data})
        return found

    def _csv(self, name: str) -> pd.DataFrame | None:
        """A table of the run, its names as text; None where there is none or it has no rows."""
        path = self.folder / name
        if not path.is_file() or pd.read_csv(path, nrows=1).empty:
            return None
        table = read_table(path)
        for column in ("group", "level", "effect", "effect1", "effect2"):
            if column in table:
                missing = "NA" if column == "level" else ""
                table[column] = [missing if pd.isna(v) else str(v) for v in table[column]]
        return table

    def _text(self, name: str) -> str:
        path = self.folder / name
        return path.read_text(encoding="utf-8") if path.is_file() else ""


def _is_covariance(path: str) -> bool:
    """Whether a parameter is a variance or of a Cholesky factor, which the components show."""
    *places, name = path.split("/")
    return name.startswith("sigma^2") or (name.startswith("L_") and "loadings" not in places)


def _random_effects(effects: list[str], levels: int, group: str) -> str:
    """What one term of the random part adds to the model, in words."""
    slopes = [effect for effect in effects if effect != "(Intercept)"]
    parts = [] if len(slopes) == len(effects) and effects else ["random intercepts"]
    if slopes:
        parts.append(f"random effects of {', '.join(slopes)}")
    return f"{' and '.join(parts)} for {_count(levels, 'level')} of {group}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _any(titles: list[str], word: str) -> bool:
    return any(word in title for title in titles)


def _log_interval(
    value: float, error: float, is_covariance: bool
) -> tuple[float | None, float | None]:
    """An interval of a variance on the scale of its logarithm; of a covariance none."""
    if is_covariance or not value > error >= 0:
        return None, None
    factor = exp(min(1.96 * error / value, 500.0))
    return value / factor, value * factor
