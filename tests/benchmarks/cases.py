"""What is fitted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["CASES", "Case"]


@dataclass(frozen=True)
class Case:
    """A table, a formula and who fits it."""

    name: str
    what: str
    table: Path
    formula: str
    factors: tuple[str, ...]
    engines: tuple[str, ...] = ("ours", "lme4")


CASES = {
    case.name: case
    for case in [
        Case(
            "insteval",
            "73,421 rows, factors of 2,972 x 1,128 x 14 levels, REML",
            Path(__file__).parents[1] / "reference" / "insteval.csv.gz",
            "y ~ 1 + service + (1 | s) + (1 | d) + (1 | dept)",
            ("service", "s", "d", "dept"),
        ),
    ]
}
