"""Estimated marginal means and their contrasts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, product
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor

from openreml_nn.estimation import REMLResult
from openreml_nn.inference.degrees import estimates
from openreml_nn.inference.refit import source_of

__all__ = ["MarginalMeans", "emmeans"]

ADJUSTMENTS = ("tukey", "bonferroni", "none")


@dataclass(frozen=True)
class MarginalMeans:
    """Marginal means, as :func:`emmeans` yields them.

    Attributes:
        table: name, estimate, std_error, df, statistic, p, low, high.
        L: their contrasts of the fixed effects, (k, p).
    """

    table: pd.DataFrame
    L: Tensor = field(repr=False)
    _result: REMLResult = field(repr=False)
    _ddf: str = field(repr=False)
    _level: float = field(repr=False)

    def pairs(self, adjust: str = "tukey") -> pd.DataFrame:
        """All pairwise differences, in the columns of ``table``.

        Args:
            adjust: p values for many comparisons: ``"tukey"`` (studentised range),
                ``"bonferroni"`` or ``"none"``. Intervals are not adjusted.

        Raises:
            ValueError: if ``adjust`` is unknown.
        """
        if adjust not in ADJUSTMENTS:
            raise ValueError(f"`adjust` is {adjust!r}: expected one of {', '.join(ADJUSTMENTS)}")
        names = self.table["name"].tolist()
        which = list(combinations(range(len(names)), 2))
        L = torch.stack([self.L[i] - self.L[j] for i, j in which])
        labels = [f"{names[i]} - {names[j]}" for i, j in which]
        found = estimates(self._result, L, labels, self._ddf, self._level)
        if adjust == "bonferroni":
            found["p"] = np.minimum(1, found["p"] * len(which))
        elif adjust == "tukey":
            spread = np.sqrt(2) * found["statistic"].abs()
            found["p"] = stats.studentized_range.sf(spread, len(names), found["df"])
        return found


def emmeans(
    result: REMLResult,
    factors: str | Sequence[str],
    at: Mapping[str, float] | None = None,
    ddf: str = "satterthwaite",
    level: float = 0.95,
) -> MarginalMeans:
    """Estimated marginal means of the levels of factors.

    Predictions without random effects, over a grid of all levels of all factors among the fixed
    effects, with numeric columns at their means; averaged over the other factors with equal weights.

    Args:
        result: a fit by :func:`lmm`.
        factors: one or several factors among the fixed effects.
        at: values of numeric columns, where not at their means.
        ddf, level: as in :func:`coefficients`.

    Raises:
        ValueError: if the fit has no formula, or a name is not that of a factor or column.

    Reference:
        Searle, Speed and Milliken, The American Statistician 34 (1980) 216.

    >>> from openreml_nn import lmm
    >>> from openreml_nn.datasets import oats
    >>> result = lmm("yield ~ nitro + Variety + (1 | Block/Variety)", oats())
    >>> emmeans(result, "Variety").table[["name", "estimate", "df"]].round(2)
              name  estimate    df
    0  Golden Rain    104.50  8.87
    1   Marvellous    109.79  8.87
    2      Victory     97.62  8.87
    """
    encoder = source_of(result).encoder
    if encoder is None:
        raise ValueError("the fit has no formula: marginal means are for fits by lmm()")
    factors = [factors] if isinstance(factors, str) else list(factors)
    used, levels = encoder.fixed.columns, encoder.fixed_levels
    unknown = [name for name in factors if name not in levels]
    if unknown or not factors:
        raise ValueError(f"`factors` are {factors}: expected some of {list(levels)}")
    means = source_of(result).means
    numeric = {name: means[name] for name in used if name not in levels}
    for name, value in (at or {}).items():
        if name not in numeric:
            raise ValueError(f"`at` has {name!r}: expected some of {list(numeric)}")
        numeric[name] = value
    grid = pd.DataFrame(list(product(*levels.values())), columns=list(levels))
    X = encoder.fixed_matrix(grid.assign(**numeric))[:, list(result.fixed.columns)]
    keys: Any = grid[factors].apply(tuple, axis=1)
    cells = list(product(*(levels[name] for name in factors)))
    L = torch.stack([torch.from_numpy(X[(keys == cell).to_numpy()].mean(0)) for cell in cells])
    names = [", ".join(cell) for cell in cells]
    table = estimates(result, L, names, ddf, level)
    return MarginalMeans(table, L, result, ddf, level)
