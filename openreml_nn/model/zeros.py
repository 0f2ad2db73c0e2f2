"""The zero part of a table's responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import torch

from openreml_nn.support.errors import InputError
from openreml_nn.table import Encoded, Encoder

__all__ = ["ZeroEncoder"]


class ZeroEncoder(Encoder):
    """A formula with another for the probability of a zero: rows that miss a value of either are left
    out, and what is encoded has the model matrix of the zero part as ``zi``.

    Args:
        formula, categorical, source, **options: see :class:`Encoder`.
        zi: the other, one-sided and without random effects.

    Attributes:
        names: of the columns of the zero part.

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
        self.names: tuple[str, ...] = ()

    def fit(self, table: pd.DataFrame) -> Encoded:
        known = self.zeros.fit(table)
        self.names = known.names
        if torch.linalg.matrix_rank(known.X) < len(known.names):
            raise InputError(
                f"{self.zeros.source}: the columns {list(known.names)} depend on each other: expected "
                "columns of which none is a combination of others"
            )
        return self._joined(super().fit(table.iloc[known.rows]), known)

    def transform(self, table: pd.DataFrame, held_out: bool = False) -> Encoded:
        known = self.zeros.transform(table, held_out)
        return self._joined(super().transform(table.iloc[known.rows], held_out), known)

    @staticmethod
    def _joined(found: Encoded, known: Encoded) -> Encoded:
        """What was encoded of the rows that the zero part has."""
        return replace(
            found,
            rows=known.rows[found.rows],
            dropped_rows=found.dropped_rows + known.dropped_rows,
            zi=known.X[torch.from_numpy(found.rows)],
        )
