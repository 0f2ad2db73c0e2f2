r"""The products :math:`W = Z_1^\top Z_2` of the eliminated factor with the other terms.

The eliminated factor has a row of k entries for each level in W. A level meets few of the other terms' columns when
those are grouping factors, and then only what it meets is stored and
multiplied.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openreml_nn.likelihood.system.partition import Partition

__all__ = [
    "Cross",
    "DenseCross",
    "SparseCross",
    "SparsePattern",
    "entries_of",
]

#: Pairs of entries that are worked on at a time, to bound memory.
_CHUNK = 2**21
#: Columns that a symmetric dense product is split into, so that half of it need not be computed.
_PANELS = 8


def entries_of(a: Tensor, b: Tensor, effects: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Rows and columns of the entries of blocks (cells, k, m), of levels a and b."""
    k, m = effects
    row = a[:, None] * k + torch.arange(k, device=a.device)
    column = b[:, None] * m + torch.arange(m, device=a.device)
    shape = (len(a), k, m)
    return row[:, :, None].expand(shape).reshape(-1), column[:, None, :].expand(shape).reshape(-1)


class Cross:
    """W, (levels, k, q), known by its products; K and the results hold a block a level.

    Attributes:
        entries: how many numbers it holds.
        work: operations of :meth:`gram`, and of :meth:`quadratic`.
    """

    entries: float
    work: float

    def times(self, x: Tensor) -> Tensor:
        """:math:`W x` for x (q, m), (levels, k, m)."""
        raise NotImplementedError

    def t_times(self, y: Tensor) -> Tensor:
        r""":math:`W^\top y` for y (levels, k, m), (q, m)."""
        raise NotImplementedError

    def gram(self, a: Tensor, b: Tensor) -> Tensor:
        r""":math:`\sum_l (a_l W_l)^\top b_l W_l` for a and b (levels, k, k) with symmetric
        :math:`a_l^\top b_l`, by groups of columns."""
        raise NotImplementedError

    def quadratic(self, Q: Tensor) -> Tensor:
        r""":math:`W_l Q W_l^\top` for symmetric Q by groups of columns, (levels, k, k)."""
        raise NotImplementedError


class DenseCross(Cross):
    """W with all its entries."""

    def __init__(self, W: Tensor) -> None:
        self.W = W
        self.entries = float(W.numel())
        self.work = self.entries * W.shape[2]

    def times(self, x: Tensor) -> Tensor:
        return self.W @ x

    def t_times(self, y: Tensor) -> Tensor:
        return self.W.flatten(0, 1).mT @ y.flatten(0, 1)

    def gram(self, a: Tensor, b: Tensor) -> Tensor:
        right = (b @ self.W).flatten(0, 1)
        left = right.mT if a is b else (a @ self.W).flatten(0, 1).mT
        # Panel by panel, only down to the diagonal.
        panels = [left[:end] @ right[:, start:end] for start, end in self._panels()]
        q = self.W.shape[2]
        upper = torch.cat([torch.nn.functional.pad(p, (0, 0, 0, q - len(p))) for p in panels], 1)
        return (upper.triu() + upper.triu(1).mT)[None]

    def quadratic(self, Q: Tensor) -> Tensor:
        # Q is U + U' with U its upper triangle and half its diagonal.
        half = Q[0].triu() - torch.diag_embed(Q[0].diagonal() / 2)
        parts = [self.W[..., :end] @ half[:end, start:end] for start, end in self._panels()]
        found = torch.cat(parts, -1) @ self.W.mT
        return found + found.mT

    def _panels(self) -> list[tuple[int, int]]:
        q = self.W.shape[2]
        width = max(1, -(-q // _PANELS))
        return [(start, min(start + width, q)) for start in range(0, max(q, 1), width)]


class SparsePattern:
    """Where W has non-zero columns, and each pair of columns that a level meets.

    Args:
        level: (nnz,) level of each non-zero column, ascending.
        column: (nnz,) its position among the q columns, ascending within a level.
        shape: (levels, k, q).
        partition: groups of the q columns; columns of one level are of one group.

    Attributes:
        a, b: (pairs,) the two columns of a pair, a ≤ b, as positions among the non-zeros.
        target: (pairs,) where the pair stands in a matrix by groups of columns.
        own: (nnz,) where a column and itself do.
    """

    def __init__(
        self, level: Tensor, column: Tensor, shape: tuple[int, int, int], partition: Partition
    ) -> None:
        self.level, self.column, self.shape, self.partition = level, column, shape, partition
        count = torch.bincount(level, minlength=shape[0])
        ends = count.cumsum(0)[level]
        at = torch.arange(len(level), device=level.device)
        partners = ends - at
        self.a = at.repeat_interleave(partners)
        starts = partners.cumsum(0) - partners
        self.b = torch.arange(len(self.a), device=level.device) - (starts - at)[self.a]
        self.target = partition.index(column[self.a], column[self.b])
        self.own = partition.index(column, column)


class SparseCross(Cross):
    """W by its non-zero columns, level by level.

    Args:
        pattern: where they are.
        values: (nnz, k) its entries.
    """

    def __init__(self, pattern: SparsePattern, values: Tensor) -> None:
        self.level, self.column, self.values = pattern.level, pattern.column, values
        self.shape = pattern.shape
        self.partition = pattern.partition
        self._target, self._own = pattern.target, pattern.own
        pairs, k = float(len(pattern.target)), pattern.shape[1]
        self.entries = 3 * pairs + values.numel()
        self.work = 4 * pairs * k * k
        if k == 1:
            # With one effect a pair is one number; what it was made of is not needed again.
            self._product = values[pattern.a, 0] * values[pattern.b, 0]
            self._pair_level = pattern.level[pattern.a]
        else:
            self._a, self._b = pattern.a, pattern.b

    def times(self, x: Tensor) -> Tensor:
        levels, k, _ = self.shape
        part = self.values[:, :, None] * x[self.column][:, None, :]
        return x.new_zeros(levels, k, x.shape[1]).index_add(0, self.level, part)

    def t_times(self, y: Tensor) -> Tensor:
        part = (self.values[:, :, None] * y[self.level]).sum(1)
        return y.new_zeros(self.shape[2], y.shape[2]).index_add(0, self.column, part)

    def gram(self, a: Tensor, b: Tensor) -> Tensor:
        total = self.partition.zeros(b)
        if self.shape[1] == 1:
            part = (a * b)[:, 0, 0][self._pair_level] * self._product
            # In place where it can be: q * q is the largest of all.
            traced = torch._C._functorch.is_functorch_wrapped_tensor(b)
            add = total.index_add if traced else total.index_add_
            total = add(0, self._target, part)
        else:
            right = (b[self.level] @ self.values[:, :, None])[..., 0]
            left = right if a is b else (a[self.level] @ self.values[:, :, None])[..., 0]
            for one, two, target in self._chunks():
                total = total.index_add(0, target, (left[one] * right[two]).sum(1))
        # Within a group, positions rise with columns: all pairs are on or above the diagonal.
        upper = self.partition.square(total)
        return upper + upper.triu(1).mT

    def quadratic(self, Q: Tensor) -> Tensor:
        levels, k, _ = self.shape
        flat = Q.reshape(-1)
        own = self.values[:, :, None] * self.values[:, None, :]
        own = own * flat[self._own][:, None, None]
        diagonal = Q.new_zeros(levels, k, k).index_add(0, self.level, own)
        upper = Q.new_zeros(levels, k, k)
        if k == 1:
            part = flat[self._target] * self._product
            upper = upper.index_add(0, self._pair_level, part[:, None, None])
        else:
            for a, b, target in self._chunks():
                left = self.values[a] * flat[target][:, None]
                part = left[:, :, None] * self.values[b][:, None, :]
                upper = upper.index_add(0, self.level[a], part)
        return upper + upper.mT - diagonal

    def _chunks(self) -> zip[tuple[Tensor, ...]]:
        return zip(*(x.split(_CHUNK) for x in (self._a, self._b, self._target)))
