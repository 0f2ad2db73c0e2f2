"""Designs: how the rows of the data meet the columns of a random effect."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = [
    "CodedDesign",
    "DenseDesign",
    "Design",
    "IdentityDesign",
    "IndexedDesign",
    "MembershipDesign",
    "SparseDesign",
    "design_of",
]


class Design:
    r"""A design :math:`Z` of shape (n, q), known by its products."""

    shape: tuple[int, int]
    #: Columns of each level.
    effects = 1

    def matmul(self, x: Tensor) -> Tensor:
        r""":math:`Z x` for ``x`` of shape (q, m)."""
        raise NotImplementedError

    def t_matmul(self, x: Tensor) -> Tensor:
        r""":math:`Z^\top x` for ``x`` of shape (n, m)."""
        raise NotImplementedError

    def take(self, rows: Tensor) -> Design:
        """The design of some of the rows."""
        raise NotImplementedError

    @property
    def tensors(self) -> list[Tensor | None]:
        """What it holds."""
        return []

    def map(self, function: Callable[[Tensor], Tensor]) -> Design:
        """A copy of the design with ``function`` applied to its tensors."""
        return self

    def dense(self, like: Tensor) -> Tensor:
        """The matrix itself, on the dtype and device of ``like``."""
        eye = torch.eye(self.shape[1], dtype=like.dtype, device=like.device)
        return self.matmul(eye)


class IdentityDesign(Design):
    """Every row is its own column."""

    def __init__(self, size: int) -> None:
        self.shape = (size, size)

    def matmul(self, x: Tensor) -> Tensor:
        return x

    def t_matmul(self, x: Tensor) -> Tensor:
        return x

    def take(self, rows: Tensor) -> Design:
        return IndexedDesign(rows, None, self.shape[1], absent=False)


class DenseDesign(Design):
    """A design without structure; ``matrix`` may require a gradient."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.shape = (matrix.shape[0], matrix.shape[1])

    def matmul(self, x: Tensor) -> Tensor:
        return self.matrix.to(x) @ x

    def t_matmul(self, x: Tensor) -> Tensor:
        return self.matrix.to(x).mT @ x

    def take(self, rows: Tensor) -> Design:
        return DenseDesign(self.matrix[rows])

    @property
    def tensors(self) -> list[Tensor | None]:
        return [self.matrix]

    def map(self, function: Callable[[Tensor], Tensor]) -> Design:
        return DenseDesign(function(self.matrix))


class IndexedDesign(Design):
    r"""Row i holds ``values[i]`` in the k columns of level ``codes[i]``, zeros elsewhere.

    Args:
        codes: (n,) level of each row, from 0; -1 is a row of zeros.
        values: (n, k) entries, or None for ones with k = 1. May require a gradient.
        levels: number of levels; the shape is (n, levels · k), columns level by level.
        absent: whether a code is -1, where it is known: nobody then looks at the
            codes, which would wait for their device.
    """

    def __init__(
        self, codes: Tensor, values: Tensor | None, levels: int, absent: bool | None = None
    ) -> None:
        if bool((codes < 0).any()) if absent is None else absent:
            absent_rows = codes < 0
            kept = (~absent_rows).to(torch.get_default_dtype() if values is None else values.dtype)
            values = kept[:, None] if values is None else values * kept[:, None]
            codes = codes.clamp(min=0)
        self.codes = codes
        self.values = values
        self.levels = levels
        self.effects = 1 if values is None else values.shape[1]
        self.shape = (codes.shape[0], levels * self.effects)

    def matmul(self, x: Tensor) -> Tensor:
        if self.values is None:
            return x.index_select(0, self.codes)
        blocks = x.reshape(self.levels, self.effects, x.shape[1]).index_select(0, self.codes)
        return (self.values.to(x)[:, :, None] * blocks).sum(1)

    def t_matmul(self, x: Tensor) -> Tensor:
        if self.values is None:
            return x.new_zeros(self.levels, x.shape[1]).index_add(0, self.codes, x)
        weighted = self.values.to(x)[:, :, None] * x[:, None, :]
        total = x.new_zeros(self.levels, self.effects, x.shape[1])
        return total.index_add(0, self.codes, weighted).reshape(self.shape[1], x.shape[1])

    def entries(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Columns and values of the entries of each row, (n, k), in the dtype of ``like``."""
        effect = torch.arange(self.effects, device=self.codes.device)
        columns = self.codes[:, None] * self.effects + effect
        values = like.new_ones(columns.shape) if self.values is None else self.values.to(like)
        return columns, values

    def dense(self, like: Tensor) -> Tensor:
        # Not by products with an identity, which holds levels x levels numbers.
        return like.new_zeros(self.shape).scatter(1, *self.entries(like))

    def take(self, rows: Tensor) -> IndexedDesign:
        values = None if self.values is None else self.values[rows]
        return IndexedDesign(self.codes[rows], values, self.levels, absent=False)

    def with_values(self, function: Callable[[Tensor], Tensor], like: Tensor) -> IndexedDesign:
        """The design with ``function`` applied to its values (n, w), in the dtype of ``like``."""
        values = like.new_ones(self.shape[0], 1) if self.values is None else self.values.to(like)
        return IndexedDesign(self.codes, function(values), self.levels, absent=False)

    @property
    def tensors(self) -> list[Tensor | None]:
        return [self.codes, self.values]

    def map(self, function: Callable[[Tensor], Tensor]) -> Design:
        values = None if self.values is None else function(self.values)
        return IndexedDesign(function(self.codes), values, self.levels, absent=False)


class SparseDesign(DenseDesign):
    r"""Row i holds ``values[i]`` in the columns ``columns[i]``, which may name one twice, zeros elsewhere.

    It is formed only by a solver that has no use for the zeros.

    Args:
        columns: (n, w), from 0.
        values: (n, w) entries; those of a column that stands twice add up.
        size: number of columns.
    """

    def __init__(self, columns: Tensor, values: Tensor, size: int) -> None:
        self.columns, self.values = columns, values
        self.shape = (columns.shape[0], size)

    @property
    def matrix(self) -> Tensor:  # type: ignore[override]
        """The matrix itself, (n, size)."""
        return self.values.new_zeros(self.shape).scatter_add(1, self.columns, self.values)

    def matmul(self, x: Tensor) -> Tensor:
        return (self.values.to(x)[:, :, None] * x[self.columns]).sum(1)

    def t_matmul(self, x: Tensor) -> Tensor:
        weighted = self.values.to(x)[:, :, None] * x[:, None, :]
        total = x.new_zeros(self.shape[1], x.shape[1])
        return total.index_add(0, self.columns.flatten(), weighted.flatten(0, 1))

    def take(self, rows: Tensor) -> SparseDesign:
        return SparseDesign(self.columns[rows], self.values[rows], self.shape[1])

    @property
    def tensors(self) -> list[Tensor | None]:
        return [self.columns, self.values]

    def map(self, function: Callable[[Tensor], Tensor]) -> Design:
        return SparseDesign(function(self.columns), function(self.values), self.shape[1])

    def dense(self, like: Tensor) -> Tensor:
        return self.matrix.to(like)


class MembershipDesign(SparseDesign):
    r"""Row i holds the sum over j of ``values[i, j]`` in the k columns of level ``codes[i, j]``.

    Args:
        codes: (n, m) levels of each row, from 0; -1 adds nothing.
        values: (n, m, k) entries, or None for ones with k = 1. May require a gradient.
        levels: number of levels; the shape is (n, levels · k), columns level by level.
    """

    def __init__(self, codes: Tensor, values: Tensor | None, levels: int) -> None:
        if values is None:
            values = torch.ones(*codes.shape, 1, device=codes.device)
        values = values.masked_fill((codes < 0)[:, :, None], 0.0)
        codes = codes.clamp(min=0)
        self.codes, self.by_level = codes, values
        self.levels, self.width = levels, values.shape[2]
        columns = codes[:, :, None] * self.width + torch.arange(self.width, device=codes.device)
        super().__init__(columns.flatten(1), values.flatten(1), levels * self.width)

    def take(self, rows: Tensor) -> MembershipDesign:
        return MembershipDesign(self.codes[rows], self.by_level[rows], self.levels)

    @property
    def tensors(self) -> list[Tensor | None]:
        return [self.codes, self.by_level]

    def map(self, function: Callable[[Tensor], Tensor]) -> Design:
        return MembershipDesign(function(self.codes), function(self.by_level), self.levels)

    def entries(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Columns and values of the entries of each row, (n, m k), in the dtype of ``like``."""
        return self.columns, self.values.to(like)

    def with_values(self, function: Callable[[Tensor], Tensor], like: Tensor) -> MembershipDesign:
        """The design with ``function`` applied to its values (n, w), in the dtype of ``like``."""
        values = function(self.values.to(like)).reshape(self.by_level.shape)
        return MembershipDesign(self.codes, values, self.levels)


#: Designs that are known by the levels of the rows.
CodedDesign = IndexedDesign | MembershipDesign


def design_of(
    codes: Tensor, values: Tensor | None, levels: int, absent: bool | None = None
) -> CodedDesign:
    """The design of rows of one level each, ``codes`` (n,) with ``values`` (n, k), or of m levels
    each, (n, m) with (n, m, k); ``absent`` as :class:`IndexedDesign` takes it."""
    if codes.dim() == 2:
        return MembershipDesign(codes, values, levels)
    return IndexedDesign(codes, values, levels, absent)
