"""One-hot designs from labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from numbers import Integral
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from openreml_nn.covariance.matrix import FreeParams, Matrix
from openreml_nn.covariance.nodes import has_values
from openreml_nn.support.checks import check_count, check_flag, found
from openreml_nn.support.errors import InputError
from openreml_nn.support.warning import warn
from openreml_nn.terms.design import IndexedDesign

__all__ = ["DummyMatrix"]

Labels = Any  # a sequence, array, series, categorical or tensor


class DummyMatrix(Matrix):
    r"""One-hot design :math:`Z` of a factor, or of the interaction of several.

    :math:`Z_{il} = 1` where row i has level l. With ``covariates`` of shape
    (n, k) each level has k columns, and row i holds its covariates in those
    of its level: the design of random slopes, columns level by level.

    Only the level of each row is stored. The design follows the dtype and
    device of what it is called with.

    Args:
        *labels: one or more sequences of labels (strings, numbers,
            categoricals, arrays, tensors) of one length n.
        levels: the levels of each factor in order, a list of lists (for one
            factor also a flat list); by default the sorted labels, or a
            categorical's own categories. Rows whose label is not among them
            are rows of zeros, with a warning.
        lex_order: whether the columns are sorted, also those of given levels: for a kernel or a
            pedigree, whose levels stand in an order of their own, it must be False.
        drop_first: whether the first column is dropped.
        drop_empty_cols: whether columns (combinations of levels) that no row
            has are dropped.
        covariates: (n,) or (n, k) tensor of values in place of ones, or a module
            that yields one when called. A parameter, a tensor that requires a
            gradient and the parameters of a module stay trainable.

    Attributes:
        codes: (n,) level of each row, -1 for a row of zeros.

    Shape:
        Output: (n, number of levels), or (n, number of levels · k) with covariates.

    Raises:
        InputError: if there are no labels, lengths differ, labels are missing
            (the rows are named), or ``levels`` or ``covariates`` do not fit.
        TypeError: if labels are a single string.

    >>> DummyMatrix(["b", "a", "b"])()
    tensor([[0., 1.],
            [1., 0.],
            [0., 1.]])
    """

    codes: Tensor
    covariates: Tensor | nn.Module | None

    def __init__(
        self,
        *labels: Labels,
        levels: Sequence[Any] | None = None,
        lex_order: bool = True,
        drop_first: bool = False,
        drop_empty_cols: bool = False,
        covariates: Tensor | nn.Module | None = None,
    ) -> None:
        for flag, name in (
            (lex_order, "lex_order"),
            (drop_first, "drop_first"),
            (drop_empty_cols, "drop_empty_cols"),
        ):
            check_flag(name, flag)
        columns = [_as_series(label, i) for i, label in enumerate(labels)]
        if not columns or not len(columns[0]):
            raise InputError("`labels` are empty: DummyMatrix needs at least one label")
        n = len(columns[0])
        if any(len(column) != n for column in columns):
            raise InputError(
                f"`labels` have lengths {[len(c) for c in columns]}: expected the same length"
            )
        factors = _factors(columns, levels)
        codes, combos = _interact(columns, factors, drop_empty_cols)
        if lex_order:
            order = sorted(range(len(combos)), key=lambda i: _sort_key(combos[i]))
        else:
            order = list(range(len(combos)))
        if drop_first:
            order = order[1:]
        if not order:
            raise InputError("no columns are left: the factor has a single level")
        position = np.full(len(combos) + 1, -1, dtype=np.int64)
        position[order] = np.arange(len(order))
        names = ["⋈".join(map(str, combos[i])) for i in order]
        written = [":".join(map(str, combos[i])) for i in order]
        if len(set(written)) < len(written):
            written = [repr(combos[i]) for i in order]
        self._build(torch.from_numpy(position[codes]), names, covariates, written)

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        levels: Sequence[str] | int,
        values: Tensor | nn.Module | None = None,
    ) -> DummyMatrix:
        """The design of level codes, as an embedding takes them.

        Args:
            codes: (n,) level of each row, from 0; -1 for a row of zeros.
            levels: names of the levels, or how many there are.
            values: (n,) or (n, k) entries in place of ones, as ``covariates`` for labels.

        Raises:
            InputError: if a code is out of range or ``codes`` is not 1-D.

        >>> DummyMatrix.from_codes(torch.tensor([1, 0, 1]), 2)()
        tensor([[0., 1.],
                [1., 0.],
                [0., 1.]])
        """
        names = _level_names(levels)
        count = names if isinstance(names, int) else len(names)
        if not isinstance(codes, Tensor):
            raise TypeError(f"`codes` is {found(codes)}: expected a tensor of integers")
        if codes.dim() != 1 or codes.dtype not in _INTEGERS or not len(codes):
            raise InputError(
                f"`codes` is {codes.dtype} of shape {tuple(codes.shape)}: expected (n,) integers"
            )
        if not -1 <= int(codes.min()) <= int(codes.max()) < count:
            raise InputError(f"`codes` reach beyond the {count} levels")
        made = cls.__new__(cls)
        made._build(codes.long(), names, values, called="values")
        return made

    def _build(
        self,
        codes: Tensor,
        names: list[str] | int,
        covariates: Tensor | nn.Module | None,
        labels: list[str] | None = None,
        called: str = "covariates",
    ) -> None:
        n, k = len(codes), 1
        if isinstance(covariates, nn.Module):
            with torch.no_grad():
                k = _checked(covariates(), n, called).shape[1]
        elif covariates is not None:
            covariates = _checked(covariates, n, called)
            if has_values(covariates) and not bool(torch.isfinite(covariates.detach()).all()):
                raise InputError(f"`{called}` has an entry that is not finite")
            k = covariates.shape[1]
        levels = names if isinstance(names, int) else len(names)
        super().__init__((n, levels * k), {})
        self._levels = levels
        self._colnames = None if isinstance(names, int) else names
        self._labels = labels
        self.register_buffer("like", torch.empty(0), persistent=False)
        self.register_data("codes", codes)
        self._absent = not codes.is_meta and bool((codes < 0).any())
        if isinstance(covariates, nn.Module):
            self.covariates = covariates
        elif isinstance(covariates, nn.Parameter):
            self.register_parameter("covariates", covariates)
        else:
            self.register_data("covariates", covariates)

    @property
    def colnames(self) -> list[str]:
        """Names of the levels in the order of the columns, those of several factors joined by
        ``⋈``."""
        if self._colnames is None:
            self._colnames = list(map(str, range(self._levels)))
        return self._colnames

    @property
    def labels(self) -> list[str]:
        """Names of the levels for tables, those of several factors joined by ``:`` as in a formula; as
        tuples where that makes two alike."""
        return self.colnames if self._labels is None else self._labels

    @property
    def design(self) -> IndexedDesign:
        """The design by level codes."""
        return IndexedDesign(self.codes, self.values(), self._levels, self._absent)

    def values(self) -> Tensor | None:
        """Covariates as they are now, (n, k); None for ones."""
        if isinstance(self.covariates, nn.Module):
            return _checked(self.covariates(), self.shape[0])
        return self.covariates

    def forward(self, free_params: FreeParams = None) -> Tensor:
        like = self.flat_params(free_params)
        design = self.design
        levels = torch.arange(design.levels, device=like.device)
        one_hot = (design.codes[:, None] == levels).to(like.dtype)
        if design.values is None:
            return one_hot
        values = design.values.to(like)
        return (one_hot[:, :, None] * values[:, None, :]).reshape(self.shape)

    def manual_grad(self, free_params: FreeParams = None) -> tuple[Tensor | None, list[str]]:
        return None, []

    @property
    def repr_dict(self) -> dict[str, Any]:
        return {"shape": self.shape}


_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)


def _level_names(levels: Sequence[str] | int) -> list[str] | int:
    """Names of levels, or their number where they are called by that."""
    if isinstance(levels, Integral) and not isinstance(levels, bool):
        return check_count("levels", levels, 1)
    if isinstance(levels, str | bytes | Mapping | Tensor) or not isinstance(levels, Iterable):
        raise TypeError(f"`levels` is {found(levels)}: expected names, or how many there are")
    names = list(levels)
    if not names:
        raise InputError("`levels` is empty: expected at least one name")
    return names


def _checked(covariates: Any, n: int, called: str = "covariates") -> Tensor:
    """Covariates as (n, k)."""
    if not isinstance(covariates, Tensor) or not covariates.is_floating_point():
        got = covariates.dtype if isinstance(covariates, Tensor) else found(covariates)
        raise TypeError(f"`{called}` is {got}: expected a floating-point tensor or a module")
    if covariates.dim() == 1:
        covariates = covariates[:, None]
    if covariates.dim() != 2 or covariates.shape[0] != n:
        raise InputError(f"`{called}` has shape {tuple(covariates.shape)}: expected ({n}, k)")
    return covariates


def _as_series(label: Labels, i: int) -> pd.Series:
    if isinstance(label, str | bytes | Mapping | set) or not hasattr(label, "__len__"):
        raise TypeError(f"labels {i} are {found(label)}: expected a sequence of labels")
    if getattr(label, "ndim", 1) != 1:
        raise InputError(f"labels {i} are {found(label)}: expected (n,)")
    if isinstance(label, Tensor):
        label = label.detach().cpu().numpy()
    series = pd.Series(label).reset_index(drop=True)
    missing = np.flatnonzero(series.isna().to_numpy())
    if missing.size:
        rows = ", ".join(map(str, missing[:5] + 1)) + (", …" if missing.size > 5 else "")
        raise InputError(f"labels {i} are missing in {missing.size} row(s): {rows}")
    return series


def _factors(columns: list[pd.Series], levels: Sequence[Any] | None) -> list[list[Any]]:
    """The levels of each factor."""
    if levels is None:
        return [
            list(c.cat.categories)
            if isinstance(c.dtype, pd.CategoricalDtype)
            else sorted(c.unique().tolist(), key=lambda value: _sort_key((value,)))
            for c in columns
        ]
    if isinstance(levels, str | bytes | Mapping | Tensor) or not isinstance(levels, Iterable):
        raise TypeError(f"`levels` is {found(levels)}: expected a list for each factor")
    levels = list(levels)
    nested = [isinstance(level, list | tuple | np.ndarray | pd.Index) for level in levels]
    if len(columns) == 1 and not any(nested):
        return [list(levels)]
    if not all(nested) or len(levels) != len(columns):
        raise InputError(
            f"`levels` is {found(levels)}: expected one list of levels for each of {len(columns)} factors"
        )
    return [list(level) for level in levels]


def _interact(
    columns: list[pd.Series], factors: list[list[Any]], observed_only: bool
) -> tuple[np.ndarray, list[tuple[Any, ...]]]:
    """Code of each row among the combinations of levels, and those combinations."""
    n = len(columns[0])
    total = np.zeros(n, dtype=np.int64)
    known = np.ones(n, dtype=bool)
    sizes = [len(levels) for levels in factors]
    for column, levels, size in zip(columns, factors, sizes, strict=True):
        if isinstance(column.dtype, pd.CategoricalDtype) and list(column.cat.categories) == levels:
            codes = column.cat.codes
        else:
            index = pd.Index(levels, dtype=object)
            if not index.is_unique:
                raise InputError(f"`levels` names {index[index.duplicated()][0]!r} twice")
            codes = index.get_indexer(column.astype(object))
        part = np.asarray(codes, dtype=np.int64)
        known &= part >= 0
        total = total * size + part
    if not known.all():
        rows = np.flatnonzero(~known)
        labels = sorted({tuple(str(c.iloc[i]) for c in columns) for i in rows[:100]})
        warn(
            f"{rows.size} row(s) have a combination that is not among the levels "
            f"and become rows of zeros: {labels[:5]}"
        )
    cells = np.unique(total[known]) if observed_only else np.arange(prod(sizes))
    found = np.full(n, -1, dtype=np.int64)
    found[known] = np.searchsorted(cells, total[known])
    if len(factors) == 1:
        return found, [(factors[0][cell],) for cell in cells.tolist()]
    parts = []
    rest = cells
    for size in reversed(sizes):
        parts.append(rest % size)
        rest = rest // size
    parts.reverse()
    combos = [
        tuple(levels[cell[j]] for j, levels in enumerate(factors))
        for cell in zip(*(p.tolist() for p in parts), strict=True)
    ]
    return found, combos


def _sort_key(combo: tuple[Any, ...]) -> tuple[Any, ...]:
    """Numbers by size before everything else by spelling."""
    return tuple(
        (0, float(value), "")
        if isinstance(value, int | float | np.number)
        else (1, 0.0, str(value))
        for value in combo
    )
