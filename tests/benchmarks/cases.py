"""What is fitted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.benchmarks import tables

__all__ = ["CASES", "Case"]


@dataclass(frozen=True)
class Case:
    """A table, a formula and who fits it.

    Attributes:
        name: as on the command line.
        what: what the heading says.
        write: writes the table as Parquet.
        formula: the model, by REML.
        factors: columns of numbers that are factors.
        engines: ours first, and the peers that fit such a model.
        runs: at most so many runs of each, in turn.
        notes: where a peer fits another model, or not all of it.
    """

    name: str
    what: str
    write: Callable[[Path], None]
    formula: str
    factors: tuple[str, ...]
    engines: tuple[str, ...]
    runs: int = 3
    notes: tuple[str, ...] = ()


_FULL = "GPBoost maximises the full likelihood, all others the restricted one."
_SLOPES = "GPBoost's slopes are not correlated with its intercepts: it fits a smaller model."
_SHORT = (
    "GPBoost's fits of responses that are not Gaussian are without standard errors, ours with them."
)
_STEPS = "GPyTorch takes 50 steps of Adam on the full likelihood, without standard errors."
_PLACES = (
    "Of places GPBoost's default approximates the density of the rows by neighbouring rows, most of which are "
    "of the same place; its latent form and ours approximate that of the effects of places."
)
_CROSSED = "y ~ x + (1 | user) + (1 | item)"
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
            ("ours", "mixedlm", "gpboost", "lme4"),
            notes=(_FULL,),
        ),
        Case(
            "slopes",
            "1,000,000 rows, 100,000 subjects, correlated random slopes",
            tables.slopes,
            "y ~ x0 + x1 + x2 + x3 + x4 + (x0 | g)",
            ("g",),
            ("ours", "mixedlm", "gpboost", "lme4"),
            notes=(_FULL, _SLOPES),
        ),
        Case(
            "crossed",
            "200,000 rows, 20,000 users x 2,000 items",
            partial(tables.crossed, n=200_000, users=20_000, items=2_000),
            _CROSSED,
            ("user", "item"),
            ("ours", "ours, krylov", "mixedlm", "gpboost"),
            notes=(_FULL,),
        ),
        Case(
            "ratings",
            "1,000,209 rows, 6,040 users x 3,706 items",
            partial(tables.crossed, n=1_000_209, users=6_040, items=3_706),
            _CROSSED,
            ("user", "item"),
            ("ours", "ours, krylov", "gpboost"),
            runs=1,
            notes=(_FULL,),
        ),
        Case(
            "large",
            "1,000,000 rows, 100,000 users x 10,000 items",
            partial(tables.crossed, n=1_000_000, users=100_000, items=10_000),
            _CROSSED,
            ("user", "item"),
            ("ours", "gpboost"),
            runs=1,
            notes=(_FULL,),
        ),
        *(
            Case(
                f"nested-{n}",
                f"{n:,} rows, four nested levels",
                partial(tables.nested, n=n),
                _NESTED,
                ("a", "b", "c", "d"),
                ("ours",),
            )
            for n in (100_000, 1_000_000)
        ),
        *(
            Case(
                f"{name}-{n}",
                f"{n:,} rows, {n // 10:,} groups, {name}",
                partial(tables.responses, n=n, counts=name == "counts"),
                "y ~ x + (1 | g)",
                ("g",),
                (f"ours, {family}", f"gpboost, {family}"),
                notes=(_SHORT,),
            )
            for name, family, n in (
                ("binary", "binomial", 100_000),
                ("binary", "binomial", 1_000_000),
                ("counts", "poisson", 1_000_000),
            )
        ),
        Case(
            "choices",
            "200,000 binary rows, 20,000 users x 2,000 items",
            tables.choices,
            "y ~ x + (1 | user) + (1 | item)",
            ("user", "item"),
            ("ours, binomial", "gpboost, binomial"),
            notes=(_SHORT,),
        ),
        Case(
            "insteval-binary",
            "InstEval as y >= 4, three crossed factors",
            partial(tables.binary, table=tables.insteval, column="y", above=3),
            "b ~ service + (1 | s) + (1 | d) + (1 | dept)",
            ("service", "s", "d", "dept"),
            ("ours, binomial", "gpboost, binomial", "lme4, binomial"),
            runs=1,
            notes=(_SHORT,),
        ),
        Case(
            "contraception",
            "1,934 binary rows, 60 districts",
            tables.contraception,
            "y ~ age + I(age^2) + urban + livch + (1 | district)",
            ("livch", "district"),
            ("ours, binomial", "lme4, binomial"),
        ),
        *(
            Case(
                f"places-{q}",
                f"{10 * q:,} rows of {q:,} places, Matérn 3/2, 20 neighbours",
                partial(tables.places, q=q),
                "y ~ x + (1 | matern(east, north, nu = 1.5, neighbours = 20))",
                (),
                ("ours", "gpboost, places", "gpboost, places, latent"),
                runs=1,
                notes=(_FULL, _PLACES),
            )
            for q in (2_000, 10_000)
        ),
        Case(
            "kernel",
            "one dense kernel, n = 2,000",
            partial(tables.kernel, n=2_000),
            "",
            (),
            ("ours, kernel", "gpytorch", "pyreml, kernel"),
            notes=(_STEPS,),
        ),
        *(
            Case(
                f"pedigree-{n}",
                f"{n:,} animals with a record each, ten generations",
                partial(tables.pedigree, n=n),
                "",
                (),
                engines,
                runs=1,
            )
            for n, engines in (
                (2_000, ("ours, pedigree", "pyreml, pedigree")),
                (20_000, ("ours, pedigree",)),
            )
        ),
        *(
            Case(
                f"chunks-{n}",
                f"{n:,} rows from Parquet in chunks of 500,000",
                partial(tables.chunked, n=n),
                "y ~ x + (x | user) + (1 | item)",
                ("user", "item"),
                ("ours, in chunks",),
                runs=1,
            )
            for n in (2_000_000, 10_000_000)
        ),
    ]
}
