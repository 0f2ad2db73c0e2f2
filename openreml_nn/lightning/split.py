"""Which rows of a table are held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from openreml_nn.support.checks import check_choice, check_count, check_number, check_text
from openreml_nn.support.errors import InputError

__all__ = ["Split"]


@dataclass(frozen=True)
class Split:
    """A share of the rows that is held out for validation.

    Args:
        validation: the share.
        split: which rows: ``"random"`` ones; ``"group"``, the share of each level; ``"unseen"``, all
            rows of a share of the levels.
        split_by: columns of the levels, ``a`` or ``a:b``.
        seed: of the draw.

    Raises:
        TypeError, InputError: if one of them is of another kind, or out of range.
    """

    validation: float = 0.0
    split: str = "random"
    split_by: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_number("validation", self.validation, least=0, below=1)
        check_choice("split", self.split, ("random", "group", "unseen"))
        if self.split_by is not None:
            check_text("split_by", self.split_by)
        check_count("seed", self.seed)

    def held_out(self, table: pd.DataFrame, groups: Sequence[str], source: str) -> np.ndarray:
        """Whether each row is held out (n,).

        Args:
            table: the rows.
            groups: grouping factors of the formula, the first of which is split by where nothing
                else is said.
            source: what messages call the table.

        Raises:
            InputError: if that is no row, or the table has no such column.
        """
        rng, n = np.random.default_rng(self.seed), len(table)
        if self.split == "random":
            out = rng.permutation(n) < round(self.validation * n)
        else:
            out = self._by_level(table, groups, source, rng)
        if not out.any():
            raise InputError(
                f"`validation` is {self.validation}: no row of {n} is held out; raise it"
            )
        return out

    def _by_level(
        self, table: pd.DataFrame, groups: Sequence[str], source: str, rng: np.random.Generator
    ) -> np.ndarray:
        by = self.split_by or (groups[0] if groups else None)
        if by is None:
            raise InputError(f"split {self.split!r}: `split_by` names no column to split by")
        columns = by.split(":")
        for column in columns:
            if column not in table.columns:
                raise InputError(f"{source} has no column {column!r} to split by")
        level = table.groupby(columns, sort=False, dropna=False).ngroup().to_numpy()
        levels = int(level.max()) + 1
        if self.split == "unseen":
            return (rng.permutation(levels) < round(self.validation * levels))[level]
        order = rng.permutation(len(table))
        place = pd.Series(order).groupby(level).rank().to_numpy() - 1
        size = np.bincount(level)[level]
        return place < np.minimum(np.round(self.validation * size), size - 1)
