"""The products of the levels of one factor with the columns of others that they meet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.sparse import csr_array
from torch import Tensor

from openreml_nn.result.equations import Equations

__all__ = ["LevelCells"]


@dataclass(frozen=True)
class LevelCells:
    """The levels of the first factor with the columns of the rest that they meet.

    Attributes:
        starts: (levels + 1,) where the cells of each level start.
        columns: (cells,) column of each.
        entries: (cells, k) products of the level's k effects with the column.
    """

    starts: Tensor
    columns: Tensor
    entries: Tensor

    @classmethod
    def none(cls, like: Tensor) -> LevelCells:
        whole = torch.zeros(1, dtype=torch.long, device=like.device)
        return cls(whole, whole[:0], like.new_zeros(0, 0))

    @classmethod
    def of(cls, equations: Equations, first: int, rest: Sequence[int]) -> LevelCells:
        r""":math:`Z_1^\top R^{-1} [Z_2 | Q]`."""
        (levels, k), r = equations.sizes[first], equations.fixed.basis.shape[1]
        products = equations.products
        start = sum(levels * k for levels, k in (equations.sizes[u] for u in rest))
        width = start + r
        # Each level meets all columns of Q.
        level = torch.arange(levels, device=products.ff.device)
        keys = [(level[:, None] * width + start + torch.arange(r, device=level.device)).flatten()]
        entries = [products.zf[first][:, :r].unflatten(0, (levels, k)).mT.flatten(0, 1)]
        start = 0
        for u in rest:
            own, column, values = equations.between(first, u)
            keys.append(own * width + start + column)
            entries.append(values)
            start += equations.sizes[u][0] * equations.sizes[u][1]
        order = torch.cat(keys).argsort()
        key = torch.cat(keys)[order]
        count = torch.bincount(key // width, minlength=levels) if width else level.new_zeros(levels)
        starts = torch.cat([level.new_zeros(1), count.cumsum(0)])
        return cls(starts, key % width if width else key, torch.cat(entries)[order])

    def levels(self) -> Tensor:
        """Level of each cell."""
        lengths = self.starts[1:] - self.starts[:-1]
        return torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)

    def times(self, P: Tensor) -> LevelCells:
        """Each level's entries times its block of P."""
        moved = (P[self.levels()] @ self.entries[:, :, None])[:, :, 0]
        return LevelCells(self.starts, self.columns, moved)

    def t_times(self, x: Tensor, width: int) -> Tensor:
        """The transpose times x, a vector for each level (levels, k): (width,)."""
        parts = (self.entries * x[self.levels()]).sum(1)
        return x.new_zeros(width).index_add(0, self.columns, parts)

    def times_vector(self, x: Tensor) -> Tensor:
        """Times x (width,): (levels, k)."""
        parts = self.entries * x[self.columns][:, None]
        shape = len(self.starts) - 1, self.entries.shape[1]
        return x.new_zeros(shape).index_add(0, self.levels(), parts)

    def sandwich(self, C: Tensor, most_numbers: int) -> Tensor:
        """Each level's block of the product with C and the transpose, (levels, k, k)."""
        levels, k, width = len(self.starts) - 1, self.entries.shape[1], len(C)
        step, level = max(1, most_numbers // max(width * k, 1)), self.levels()
        found = []
        for start in range(0, levels, step):
            end = min(start + step, levels)
            at = slice(int(self.starts[start]), int(self.starts[end]))
            own = C.new_zeros(end - start, width, k)
            own[level[at] - start, self.columns[at]] = self.entries[at]
            found.append(own.mT @ (C @ own))
        return torch.cat(found) if found else C.new_zeros(0, k, k)

    def inner(self, other: LevelCells, width: int, most_numbers: int) -> Tensor:
        """The product of the transpose with another of the same cells, (width, width)."""
        levels, k = len(self.starts) - 1, self.entries.shape[1]
        if levels * k * width <= most_numbers:
            a, b = (x.entries.new_zeros(levels, width, k) for x in (self, other))
            at = (self.levels(), self.columns)
            a[at], b[at] = self.entries, other.entries
            return a.movedim(1, -1).flatten(0, 1).mT @ b.movedim(1, -1).flatten(0, 1)
        left, right = (x.sparse(width) for x in (self, other))
        return torch.as_tensor((left.T @ right).toarray()).to(self.entries)

    def sparse(self, width: int) -> csr_array:
        """As a matrix (levels · k, width)."""
        level, k = self.levels()[:, None], self.entries.shape[1]
        row = level * k + torch.arange(k, device=level.device)
        column = self.columns[:, None].expand(row.shape)
        at = tuple(x.flatten().numpy(force=True) for x in (row, column))
        shape = ((len(self.starts) - 1) * k, width)
        return csr_array((self.entries.flatten().numpy(force=True), at), shape=shape)
