"""Estimated marginal means and their contrasts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, product

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from openreml_nn.estimation import Result
from openreml_nn.inference.contrasts import Inference
from openreml_nn.inference.degrees import estimates, inference_of
from openreml_nn.inference.nesting import marginal, nesting_of
from openreml_nn.inference.refit import check_level, source_of
from openreml_nn.inference.response import Response
from openreml_nn.support.checks import check_choice, check_mapping, check_names, check_number
from openreml_nn.support.errors import InputError
from openreml_nn.table.syntax import bare

__all__ = ["MarginalMeans", "emmeans"]

ADJUSTMENTS = ("tukey", "bonferroni", "none")
SCALES = ("link", "response")


@dataclass(frozen=True)
class MarginalMeans:
    """Marginal means, as :func:`emmeans` yields them.

    Attributes:
        table: name, estimate, std_error, df, statistic, p, low, high and note: ``"not estimable"``
            where the data do not say what the mean is (its numbers are NaN), empty elsewhere.
        L: their contrasts of the fixed effects, (k, p); NaN where they are not estimable.
        quantity: what the means are, as emmeans names the column: ``"emmean"``, and on the scale
            of the response ``"prob"`` of a binomial family, ``"rate"`` of counts, else ``"response"``.
    """

    table: pd.DataFrame
    L: Tensor = field(repr=False)
    quantity: str
    _rows: Tensor = field(repr=False)
    _result: Result = field(repr=False)
    _how: Inference = field(repr=False)
    _level: float = field(repr=False)
    _response: Response | None = field(repr=False)

    def pairs(self, adjust: str = "tukey") -> pd.DataFrame:
        """All pairwise differences, in the columns of ``table``.

        A difference may be estimable where the means are not. Of means on the scale of the
        response it is back-transformed with a log link to a ratio, named ``a / b``, and with a logit
        one to an odds ratio; with other links it stays on the link scale. Tests are of the link scale.

        Args:
            adjust: p values for many comparisons: ``"tukey"`` (studentised range),
                ``"bonferroni"`` or ``"none"``. Intervals are not adjusted.

        Raises:
            InputError: if ``adjust`` is unknown.
        """
        from scipy import stats

        check_choice("adjust", adjust, ADJUSTMENTS)
        names = self.table["name"].tolist()
        which = list(combinations(range(len(names)), 2))
        rows = torch.stack([self._rows[i] - self._rows[j] for i, j in which])
        labels = [f"{names[i]} - {names[j]}" for i, j in which]
        found = _estimated(self._result, rows, labels, self._how, self._level)[0]
        if adjust == "bonferroni":
            found["p"] = np.minimum(1, found["p"] * len(which))
        elif adjust == "tukey":
            spread = np.sqrt(2) * found["statistic"].abs()
            found["p"] = stats.studentized_range.sf(spread, len(names), found["df"])
        if self._response is not None and self._response.has_ratios:
            labels = [f"{names[i]} / {names[j]}" for i, j in which]
            found = self._response.ratios(found.assign(name=labels))
        return found


def emmeans(
    result: Result,
    factors: str | Sequence[str],
    at: Mapping[str, float] | None = None,
    ddf: str | None = None,
    level: float = 0.95,
    scale: str = "link",
) -> MarginalMeans:
    """Estimated marginal means of the levels of factors.

    A mean is that of predictions without random effects and without an offset over a grid of all levels
    of all factors among the fixed effects, with numeric columns at their means: the average over the
    other factors, with equal weights.
    A factor is nested in another where each of its levels is met with one level of that, or where
    the formula says so (``a/b``); it is then averaged within that factor, over the cells that the
    data have. A mean that needs a cell about which the data say nothing is NaN, whichever level
    of a factor comes first, and is noted as not estimable.

    Args:
        result: a fit by :func:`lmm`.
        factors: one or several factors among the fixed effects.
        at: values of numeric columns, where not at their means.
        ddf, level: as in :func:`coefficients`.
        scale: of a response that is not Gaussian, ``"link"``, or ``"response"``: means and ends of
            intervals are then back-transformed, :math:`g^{-1}(m)`, with standard errors by the delta
            method; statistics and p values stay those of the link scale. They are means at
            random effects of zero, not over their distribution.

    Raises:
        InputError: if the fit has no formula, a name is not that of a factor or column, or ``scale``
            is ``"response"`` for a Gaussian or ordinal response, which has no such scale.
        TypeError: if an argument is of another kind.

    Reference:
        Searle, Speed and Milliken, The American Statistician 34 (1980) 216; Lenth, emmeans (R
        package, 2022), on nested factors.

    >>> from openreml_nn import lmm
    >>> from openreml_nn.datasets import oats
    >>> result = lmm("yield ~ nitro + Variety + (1 | Block/Variety)", oats())
    >>> emmeans(result, "Variety").table[["name", "estimate", "df"]].round(1)
              name  estimate   df
    0  Golden Rain     104.5  8.9
    1   Marvellous     109.8  8.9
    2      Victory      97.6  8.9
    """
    source, level = source_of(result), check_level(level)
    encoder = result.encoder
    if encoder is None:
        raise InputError("`result` has no formula: marginal means are for fits by lmm()")
    given = [factors] if isinstance(factors, str) else check_names("factors", factors)
    wanted = [bare(name) for name in given]
    used, levels = encoder.fixed.columns, encoder.fixed_levels
    unknown = [name for name in wanted if name not in levels]
    if unknown or not wanted or len(set(wanted)) < len(wanted):
        known = (
            f"some of {list(levels)}, each once" if levels else "a fit with a factor in its formula"
        )
        raise InputError(f"`factors` are {wanted}: expected {known}")
    numeric = {name: source.means[name] for name in used if name not in levels}
    if at is not None:
        check_mapping("at", at)
        for name, value in at.items():
            if name not in numeric:
                raise InputError(f"`at` has {name!r}: expected some of {list(numeric)}")
            numeric[name] = check_number(f"at[{name!r}]", value)
    how = inference_of(result, ddf)
    check_choice("scale", scale, SCALES)
    response = Response.of(result) if scale == "response" else None
    grid = pd.DataFrame(list(product(*levels.values())), columns=list(levels))
    X = torch.from_numpy(encoder.fixed_matrix(grid.assign(**numeric)))
    nesting = nesting_of(source.cells[list(levels)], encoder.fixed)
    names, rows = marginal(grid, X, wanted, nesting, source.cells)
    table, L = _estimated(result, rows, names, how, level)
    quantity = "emmean"
    if response is not None:
        table, quantity = response.means(table), response.quantity
    return MarginalMeans(table, L, quantity, rows, result, how, level, response)


def _estimated(
    result: Result, rows: Tensor, names: Sequence[str], how: Inference, level: float
) -> tuple[pd.DataFrame, Tensor]:
    """Estimates for rows (k, a) of X with all columns, with a note, and what they are of the kept
    columns; NaN where that is not estimable."""
    known = result.fixed.estimable(rows)
    L = rows[:, list(result.fixed.columns)].clone()
    L[~known] = torch.nan
    table = estimates(result, L, names, how, level)
    table["note"] = np.where(known.numpy(force=True), "", "not estimable")
    return table, L
