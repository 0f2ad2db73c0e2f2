"""Averages over a grid of factors of which some are nested in others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from torch import Tensor

from openreml_nn.table.algebra import Part
from openreml_nn.table.syntax import names_in

__all__ = ["marginal", "nesting_of"]

Nesting = Mapping[str, Sequence[str]]


def nesting_of(cells: pd.DataFrame, fixed: Part) -> dict[str, list[str]]:
    """The factors in which each factor is nested, where there are some.

    One is nested in another if each of its levels is met with one level of that, or if it stands in
    the formula beside that and never without it, as ``b`` in ``a + a:b``.

    Args:
        cells: the combinations of levels that the data have, a column for each factor.
        fixed: the fixed effects.
    """
    found: dict[str, list[str]] = {}
    for name in cells.columns:
        for other in cells.columns:
            if other == name or name in found.get(other, ()):
                continue
            together = cells[[name, other]].drop_duplicates()
            if cells[other].nunique() > 1 and len(together) == cells[name].nunique():
                found.setdefault(name, []).append(other)
    terms = [set(names_in(*term)) & set(cells) for term in fixed.terms]
    for name in cells.columns:
        own = [term for term in terms if name in term]
        if not own or {name} in own:
            continue
        always = set.intersection(*own) - {name}
        # Two factors that only ever stand together are crossed.
        outer = [o for o in cells.columns if o in always and {o} in terms]
        found[name] = list(dict.fromkeys([*found.get(name, []), *outer]))
    found = {name: outer for name, outer in found.items() if outer}
    for name, outer in found.items():
        further = [o for inner in outer for o in found.get(inner, [])]
        found[name] = [o for o in dict.fromkeys([*outer, *further]) if o != name]
    return found


def marginal(
    grid: pd.DataFrame, X: Tensor, wanted: Sequence[str], nesting: Nesting, cells: pd.DataFrame
) -> tuple[list[str], Tensor]:
    """Names and means of the rows of X (m, a) for each combination of levels of some factors.

    A nested factor is averaged over the levels that the data have within those in which it is
    nested, before these are averaged; cells of it that they lack are left out.

    Args:
        grid: levels of all factors, row for row of X.
        X: rows of the model matrix.
        wanted: factors whose combinations are asked for.
        nesting: as of :func:`nesting_of`.
        cells: the combinations of levels that the data have.
    """
    kept = pd.Series(True, index=grid.index)
    for name, outer in nesting.items():
        columns = [name, *outer]
        kept &= pd.MultiIndex.from_frame(grid[columns]).isin(
            pd.MultiIndex.from_frame(cells[columns])
        )
    grid, X = grid[kept], X[torch.tensor(kept.to_numpy())]
    inside = [o for name in wanted for o in nesting.get(name, []) if o not in wanted]
    named = [*wanted, *dict.fromkeys(inside)]
    others = [name for name in grid.columns if name not in named]
    others.sort(key=lambda name: -len(nesting.get(name, ())))
    for i in range(len(others) + 1):
        grid, X = _mean_over(grid, X, [*named, *others[i:]])
    if not pd.MultiIndex.from_frame(grid[list(wanted)]).has_duplicates:
        named = list(wanted)
    return [", ".join(labels) for labels in grid[named].itertuples(index=False)], X


def _mean_over(grid: pd.DataFrame, X: Tensor, columns: list[str]) -> tuple[pd.DataFrame, Tensor]:
    """Means of the rows of X with equal levels of some columns, in the order of their levels."""
    order = {name: {x: i for i, x in enumerate(dict.fromkeys(grid[name]))} for name in columns}
    ranks = pd.DataFrame({name: grid[name].map(order[name]) for name in columns})
    codes = torch.tensor(ranks.groupby(columns, sort=True).ngroup().to_numpy())
    count = torch.bincount(codes).to(X)
    means = X.new_zeros(len(count), X.shape[1]).index_add(0, codes, X) / count[:, None]
    first = ranks.assign(row=range(len(ranks))).groupby(columns, sort=True)["row"].first()
    return grid.iloc[first.to_numpy()][columns], means
