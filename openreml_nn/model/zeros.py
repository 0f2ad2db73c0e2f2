"""The zero part of a table's responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from torch import nn

from openreml_nn.families import Family, ZeroInflated
from openreml_nn.support.errors import InputError
from openreml_nn.table import Encoded, Encoder, Learned

__all__ = ["ZeroEncoder", "inflated"]


class ZeroEncoder(Encoder):
    """A formula with another for the probability of a zero: rows that miss a value of either are left
    out, and what is encoded has the model matrix of the zero part as ``zi``.

    Args:
        formula, categorical, source, **options: see :class:`Encoder`.
        zi: the other, one-sided and without random effects.

    Attributes:
        zi: the other.

    Raises:
        InputError: if a formula does not parse.
    """

    def __init__(
        self,
        formula: str,
        zi: str,
        categorical: Sequence[str] = (),
        source: str = "the table",
        **options: Any,
    ) -> None:
        super().__init__(formula, categorical, source, **options)
        left, tilde, right = zi.partition("~")
        if not tilde or left.strip() or "|" in right:
            raise InputError(
                f"`zi` is {zi!r}: expected '~' and fixed effects, such as '~ 1' or '~ 1 + x'"
            )
        own = f"{formula.partition('~')[0]}~{right}"
        self.zeros = Encoder(own, categorical, f"{source}, `zi`", known_residual=True)
        self.zi = zi

    def fit(self, table: pd.DataFrame) -> Encoded:
        known = self.zeros.fit(table)
        if torch.linalg.matrix_rank(known.X) < len(known.names):
            raise InputError(
                f"{self.zeros.source}: the columns {list(known.names)} depend on each other: expected "
                "columns of which none is a combination of others"
            )
        found = self._joined(super().fit(table.iloc[known.rows]), known)
        self.learned.zeros = self.zeros.learned.to_dict()
        return found

    def transform(self, table: pd.DataFrame, held_out: bool = False) -> Encoded:
        self.zeros.learned = Learned.from_dict(self.learned.zeros)
        known = self.zeros.transform(table, held_out)
        return self._joined(super().transform(table.iloc[known.rows], held_out), known)

    def skeleton(self, rows: int, columns: int) -> Encoded:
        zi = torch.zeros(rows, len(self.names), dtype=torch.float64)
        return replace(super().skeleton(rows, columns), zi=zi)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the columns of the zero part."""
        return tuple(self.learned.zeros["names"])

    @staticmethod
    def _joined(found: Encoded, known: Encoded) -> Encoded:
        """What was encoded of the rows that the zero part has."""
        return replace(
            found,
            rows=known.rows[found.rows],
            dropped_rows=found.dropped_rows + known.dropped_rows,
            zi=known.X[torch.from_numpy(found.rows)],
        )


def inflated(family: Family, encoder: Encoder) -> Family:
    """The family of a response whose zero part a formula has, linear in its columns; the family itself
    where there is none.

    Raises:
        InputError: if the family has no zeros to inflate.
    """
    if not isinstance(encoder, ZeroEncoder):
        return family
    names = encoder.names
    return ZeroInflated(family, nn.Linear(len(names), 1, bias=False), names)
