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
from openreml_nn.table.levels import label
from openreml_nn.table.reading import TableFile
from openreml_nn.table.structure import Structure

__all__ = ["Known", "Places", "read_kernel"]


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


def read_kernel(name: str, value: Any) -> Known:
    """A matrix with the names of its levels, as a user gives it.

    Args:
        name: what messages call it.
        value: a data frame whose columns, and whose index or first column, are the names; the path
            of such a table; or a tensor or array, (q, q), for the levels as the data have them.

    Raises:
        InputError: if rows and columns differ, a name stands twice, or the matrix is not symmetric
            and finite.
    """
    what = f"kernel {name!r}"
    if isinstance(value, str | os.PathLike):
        value = (value if isinstance(value, TableFile) else TableFile(value)).read()
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
        odd = next(iter(set(own) ^ set(names)))
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
    least = float(torch.linalg.eigvalsh(matrix)[0]) if len(matrix) <= _CHECKED else 0.0
    if least < -1e-8 * float(matrix.abs().max()) * len(matrix):
        raise InputError(
            f"{what} is not positive semi-definite: its smallest eigenvalue is {least:.4g}"
        )


#: Larger matrices are left to the factorisation of the fit, which takes less time.
_CHECKED = 3000
