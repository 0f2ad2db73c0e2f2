"""How the levels of a group are related: by a known matrix, or by their places."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from openreml_nn.support.errors import InputError
from openreml_nn.support.spectrum import eigenvalues
from openreml_nn.table.levels import label
from openreml_nn.table.reading import TableFile
from openreml_nn.table.structure import Structure

__all__ = ["Graph", "Known", "Places", "Walk", "check_graph", "check_kernel", "read_kernel"]


@dataclass(frozen=True)
class Known:
    """A matrix between levels that is known up to a factor.

    Attributes:
        names: of the levels, in the order of its rows; None where they are those of the data.
        matrix: (q, q), or its inverse, dense or sparse.
        is_inverse: whether it is the inverse.
    """

    names: tuple[str, ...] | None
    matrix: Tensor
    is_inverse: bool = False


@dataclass(frozen=True)
class Places:
    """Levels at places, whose correlation falls with their distance.

    Attributes:
        structure: the kernel.
        coordinates: (q, d).
    """

    structure: Structure
    coordinates: Tensor


@dataclass(frozen=True)
class Walk:
    """Levels at whole times, one step apart.

    Attributes:
        name: ``rw1`` and ``rw2``, random walks, or ``ar1``.
        size: how many.
    """

    name: str
    size: int


@dataclass(frozen=True)
class Graph:
    """Levels that are areas beside their neighbours.

    Attributes:
        name: ``car`` or ``icar``.
        weights: W of the neighbours, (q, q), symmetric, dense or sparse.
    """

    name: str
    weights: Tensor


def read_kernel(name: str, value: Any) -> Known:
    """A matrix with the names of its levels, as a user gives it.

    Args:
        name: what messages call it.
        value: a data frame whose columns, and whose index or first column, are the names; a data
            frame of the neighbours in a graph, with the columns ``from`` and ``to`` and perhaps
            ``weight``; the path of such a table; or a tensor or array, (q, q), for the levels as the
            data have them.

    Raises:
        InputError: if rows and columns differ, a name stands twice, or the matrix is not symmetric
            and finite.
    """
    what = f"kernel {name!r}"
    if isinstance(value, str | os.PathLike):
        value = (value if isinstance(value, TableFile) else TableFile(value)).read()
    if isinstance(value, pd.DataFrame) and list(value.columns) in _EDGES:
        return _of_edges(what, value)
    if isinstance(value, pd.DataFrame):
        names, matrix = _named(what, value)
    elif isinstance(value, Tensor | np.ndarray):
        names, matrix = None, torch.as_tensor(value)
    else:
        raise TypeError(
            f"{what} is a {type(value).__name__}: expected a data frame with the names of levels, "
            "a tensor, or the path of a table"
        )
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
        raise InputError(f"{what} has shape {tuple(matrix.shape)}: expected (q, q)")
    if matrix.is_complex():
        raise TypeError(f"{what} is {matrix.dtype}: expected numbers")
    matrix = matrix.to(torch.float64)
    if matrix.layout == torch.strided:
        _check(what, matrix, names)
    return Known(names, matrix)


#: The columns of a table of neighbours.
_EDGES = (["from", "to"], ["from", "to", "weight"])


def _of_edges(what: str, table: pd.DataFrame) -> Known:
    """The weights of a graph from its pairs of neighbours, each in one order or in both."""
    if not len(table):
        raise InputError(f"{what} has no row: expected pairs of neighbours")
    missing = table.isna().any(axis=1).to_numpy()
    if missing.any():
        raise InputError(f"{what} has no value in row {int(missing.argmax()) + 1}")
    ends = [[label(value) for value in table[end]] for end in ("from", "to")]
    names = tuple(dict.fromkeys(name for pair in zip(*ends, strict=True) for name in pair))
    at = {name: i for i, name in enumerate(names)}
    row, column = (np.array([at[name] for name in end]) for end in ends)
    try:
        weights = np.asarray(table["weight"] if "weight" in table else np.ones(len(table)), float)
    except (TypeError, ValueError):
        raise InputError(f"{what}: its column 'weight' holds what is no number") from None
    pairs = pd.DataFrame({"i": np.minimum(row, column), "j": np.maximum(row, column)})
    order = pairs.assign(forth=row <= column)
    odd = order.duplicated().to_numpy()
    apart = pairs.assign(w=weights).groupby(["i", "j"])["w"].transform("nunique").to_numpy() > 1
    for wrong, said in ((odd, "twice"), (apart, "with two weights"), (row == column, "as a pair")):
        if wrong.any():
            k = int(wrong.argmax())
            raise InputError(f"{what} has {ends[0][k]!r} and {ends[1][k]!r} {said} in row {k + 1}")
    if not np.isfinite(weights).all():
        raise InputError(f"{what} has a weight that is not finite")
    kept = ~pairs.duplicated().to_numpy()
    low, high, w = row[kept], column[kept], weights[kept]
    index = np.stack([np.concatenate([low, high]), np.concatenate([high, low])])
    values = torch.from_numpy(np.concatenate([w, w]))
    shape = (len(names), len(names))
    graph = torch.sparse_coo_tensor(torch.from_numpy(index), values, shape, check_invariants=True)
    return Known(names, graph.coalesce())


def _named(what: str, table: pd.DataFrame) -> tuple[tuple[str, ...], Tensor]:
    rows, columns = len(table), table.shape[1]
    if columns == rows + 1:  # the names are a column, as in a file
        table = table.set_index(table.columns[0])
    elif columns != rows:
        raise InputError(f"{what} has {rows} rows and {columns} columns: expected as many")
    names = tuple(map(label, table.columns))
    own = tuple(map(label, table.index))
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{what} has the level {twice!r} twice")
    if isinstance(table.index, pd.RangeIndex) and set(own) != set(names):
        own = names
    if set(own) != set(names):
        odd = next(name for name in (*names, *own) if (name in own) != (name in names))
        raise InputError(
            f"{what}: its rows and columns must have the same names: {odd!r} stands in one only"
        )
    at = {name: i for i, name in enumerate(own)}
    try:
        values = table.to_numpy(dtype=np.float64)[[at[name] for name in names]]
    except (TypeError, ValueError):
        raise InputError(f"{what} holds what is no number") from None
    return names, torch.from_numpy(np.ascontiguousarray(values))


def _check(what: str, matrix: Tensor, names: Sequence[str] | None) -> None:
    def named(i: int) -> str:
        return repr(names[i]) if names else str(i)

    bad = (~torch.isfinite(matrix)).nonzero()
    if len(bad):
        i, j = bad[0].tolist()
        raise InputError(f"{what} is {float(matrix[i, j]):g} between {named(i)} and {named(j)}")
    gap = (matrix - matrix.mT).abs()
    if float(gap.max()) > 1e3 * torch.finfo(matrix.dtype).eps * float(matrix.abs().max()):
        i, j = divmod(int(gap.argmax()), len(matrix))
        raise InputError(
            f"{what} is not symmetric: {float(matrix[i, j]):g} and {float(matrix[j, i]):g} between "
            f"{named(i)} and {named(j)}"
        )


def check_kernel(what: str, known: Known, inverse: bool = False) -> None:
    """Refuse a matrix that is no covariance.

    Args:
        what: the matrix in messages.
        known: what it is.
        inverse: whether the formula says that it is the inverse.

    Raises:
        InputError: if its smallest eigenvalue is negative, or it is sparse and no inverse.
    """
    matrix = known.matrix
    if matrix.layout != torch.strided and not (inverse or known.is_inverse):
        raise InputError(
            f"{what} is sparse, as a graph or an inverse is: expected a dense matrix, "
            "`inverse = TRUE`, or (1 | car(area, W)) for a graph"
        )
    if matrix.layout != torch.strided or len(matrix) > _CHECKED:
        return
    least = float(eigenvalues(matrix, what)[0])
    if least < -1e-8 * float(matrix.abs().max()) * len(matrix):
        raise InputError(
            f"{what} is not positive semi-definite: its smallest eigenvalue is {least:.4g}"
        )


def check_graph(what: str, known: Known) -> None:
    """Refuse a matrix that has not the weights of neighbours.

    Raises:
        InputError: if a weight is negative, or a level its own neighbour or without one.
    """
    entries = known.matrix.to_sparse_coo().coalesce()
    (row, column), weights = entries.indices(), entries.values()

    def named(i: int) -> str:
        return repr(known.names[i]) if known.names else str(i)

    wrong = (weights < 0) | ((row == column) & (weights != 0))
    if bool(wrong.any()):
        at = int(wrong.long().argmax())
        i, j = int(row[at]), int(column[at])
        raise InputError(
            f"{what} has the weight {float(weights[at]):g} between {named(i)} and {named(j)}: "
            "expected those of neighbours, positive, and zero for a level and itself"
        )
    sums = torch.zeros(len(known.matrix), dtype=weights.dtype).index_add(0, row, weights)
    if bool((sums == 0).any()):
        alone = named(int((sums == 0).long().argmax()))
        raise InputError(f"{what} has no neighbour of {alone}: join it to one, or leave it out")


#: Larger matrices are left to the factorisation of the fit, which takes less time.
_CHECKED = 3000
