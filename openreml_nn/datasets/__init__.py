"""Data sets that come with the package, each a function that returns a data frame."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from openreml_nn.datasets.simulated import field, growth, purchases, ratings, visits
from openreml_nn.support.checks import check_choice

__all__ = [
    "FORMULAS",
    "SIMULATED",
    "field",
    "growth",
    "john_alpha",
    "oats",
    "pastes",
    "penicillin",
    "purchases",
    "ratings",
    "slatehall",
    "sleepstudy",
    "table_path",
    "visits",
]

#: Simulated data by name.
SIMULATED = {
    "ratings": ratings,
    "growth": growth,
    "field": field,
    "purchases": purchases,
    "visits": visits,
}

#: The customary model of each.
FORMULAS = {
    "sleepstudy": "Reaction ~ Days + (Days | Subject)",
    "john_alpha": "yield ~ rep + (1 | gen) + (1 | rep:block)",
    "penicillin": "diameter ~ 1 + (1 | plate) + (1 | sample)",
    "pastes": "strength ~ 1 + (1 | batch/cask)",
    "slatehall": "yield ~ 1 + (1 | gen)",
    "oats": "yield ~ nitro * Variety + (1 | Block/Variety)",
}


def table_path(name: str) -> Path:
    """The path of the file of a data set.

    Raises:
        InputError: if there is none of that name.
    """
    check_choice("name", name, FORMULAS)
    return Path(__file__).with_name(f"{name}.csv")


def sleepstudy() -> pd.DataFrame:
    """Reaction time (ms) of 18 subjects on 10 days of sleep deprivation, 180 rows.

    Belenky et al., Journal of Sleep Research 12 (2003) 1-12.
    """
    return pd.read_csv(table_path("sleepstudy"), dtype={"Subject": str})


def john_alpha() -> pd.DataFrame:
    """Yield of oats (t/ha), 24 genotypes in an alpha design of 3 replicates, 72 rows.

    John and Williams, Cyclic and Computer Generated Designs (1995), p. 146.
    """
    return pd.read_csv(table_path("john_alpha"))


def penicillin() -> pd.DataFrame:
    """Diameter (mm) of the zone of inhibition, 6 samples crossed with 24 plates, 144 rows.

    Davies and Goldsmith, Statistical Methods in Research and Production (1972), table 6.6.
    """
    return pd.read_csv(table_path("penicillin"))


def pastes() -> pd.DataFrame:
    """Strength of a chemical paste, 3 casks within each of 10 batches, 60 rows.

    Davies and Goldsmith, Statistical Methods in Research and Production (1972), table 6.5.
    """
    return pd.read_csv(table_path("pastes"))


def slatehall() -> pd.DataFrame:
    """Yield of wheat (g/plot), 25 genotypes in a balanced lattice of 6 replicates in a field of 15
    rows and 10 columns, 150 rows.

    Gilmour, Cullis and Verbyla, Journal of Agricultural, Biological and Environmental Statistics 2
    (1997) 269.
    """
    return pd.read_csv(table_path("slatehall"))


def oats() -> pd.DataFrame:
    """Yield of oats (quarter pounds a plot), nitrogen in split plots of varieties, 72 rows.

    Yates, Journal of Agricultural Science 25 (1935), table II.
    """
    return pd.read_csv(table_path("oats"))
