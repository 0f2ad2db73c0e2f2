"""What is fitted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

from tests.benchmarks import tables

__all__ = ["CASES", "Case"]


@dataclass(frozen=True)
class Case:
    """A table, a formula and who fits it.

    Attributes:
        name: as on the command line.
        what: what the heading says.
        table: makes the table.
        formula: the model, by REML.
        factors: columns of numbers that are factors.
        engines: ours and the peers that fit such a model.
    """

    name: str
    what: str
    table: Callable[[], pd.DataFrame]
    formula: str
    factors: tuple[str, ...]
    engines: tuple[str, ...] = ("ours", "mixedlm", "lme4")


_NESTED = "y ~ x + (1 | a) + (1 | b) + (1 | c) + (1 | d)"
CASES = {
    case.name: case
    for case in [
        Case(
            "insteval",
            "73,421 rows, factors of 2,972 x 1,128 x 14 levels",
            tables.insteval,
            "y ~ 1 + service + (1 | s) + (1 | d) + (1 | dept)",
            ("service", "s", "d", "dept"),
        ),
        Case(
            "slopes",
            "1,000,000 rows, 100,000 subjects, correlated random slopes",
            tables.slopes,
            "y ~ x0 + x1 + x2 + x3 + x4 + (x0 | g)",
            ("g",),
        ),
        Case(
            "crossed",
            "200,000 rows, 20,000 users x 2,000 items",
            tables.crossed,
            "y ~ x + (1 | user) + (1 | item)",
            ("user", "item"),
            ("ours", "mixedlm"),
        ),
        *(
            Case(
                f"nested-{n}",
                f"{n:,} rows, four nested levels",
                lambda n=n: tables.nested(n),  # type: ignore[misc]
                _NESTED,
                ("a", "b", "c", "d"),
                ("ours",),
            )
            for n in (100_000, 1_000_000)
        ),
    ]
}
