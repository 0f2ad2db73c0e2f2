r"""Cross-products :math:`W = Z_1^\top Z_2` of the eliminated factor with the other terms.

W has a row of k entries for each level of the eliminated factor. A level
meets few of the other terms' columns when those are grouping factors, and
then only what it meets is stored and multiplied.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from openreml_nn.covariance.design import DenseDesign, Design, IndexedDesign
from openreml_nn.likelihood.partition import Partition

__all__ = ["Cross", "DenseCross", "SparseCross", "cross_product", "values_of"]

#: Pairs of entries that are worked on at a time, to bound memory.
_CHUNK = 2**21
#: A pair costs about as much as so many entries of a dense product: it is far from the others in
#: memory, while a dense product runs at full speed.
PAIR_COST = 1000
#: More pairs than these would take more than 1.5 GB.
_MOST_PAIRS = 2**26
#: Columns that a symmetric dense product is split into, so that half of it need not be computed.
_PANELS = 8


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

    def gram(self, K: Tensor) -> Tensor:
        r""":math:`\sum_l W_l^\top K_l W_l` for symmetric K (levels, k, k), by groups of columns."""
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

    def gram(self, K: Tensor) -> Tensor:
        left, right = self.W.flatten(0, 1).mT, (K @ self.W).flatten(0, 1)
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


class SparseCross(Cross):
    """W by its non-zero columns, level by level.

    Args:
        level: (nnz,) level of each non-zero column, ascending.
        column: (nnz,) its position among the q columns, ascending within a level.
        values: (nnz, k) its entries.
        shape: (levels, k, q).
        partition: groups of the q columns; columns of one level are of one group.
    """

    def __init__(
        self,
        level: Tensor,
        column: Tensor,
        values: Tensor,
        shape: tuple[int, int, int],
        partition: Partition,
    ) -> None:
        self.level, self.column, self.values = level, column, values
        self.shape = shape
        self.partition = partition
        # Each pair (a, b) of columns of one level with a <= b, as positions among the non-zeros.
        count = torch.bincount(level, minlength=shape[0])
        ends = count.cumsum(0)[level]
        at = torch.arange(len(level), device=level.device)
        partners = ends - at
        self._a = at.repeat_interleave(partners)
        starts = partners.cumsum(0) - partners
        self._b = torch.arange(len(self._a), device=level.device) - (starts - at)[self._a]
        self._target = partition.index(column[self._a], column[self._b])
        self._own = partition.index(column, column)
        pairs, k = float(len(self._target)), shape[1]
        self.entries = 3 * pairs + values.numel()
        self.work = 4 * pairs * k * k
        if k == 1:
            # With one effect a pair is one number; what it was made of is not needed again.
            self._product = values[self._a, 0] * values[self._b, 0]
            self._pair_level = level[self._a]
            del self._a, self._b

    def times(self, x: Tensor) -> Tensor:
        levels, k, _ = self.shape
        part = self.values[:, :, None] * x[self.column][:, None, :]
        return x.new_zeros(levels, k, x.shape[1]).index_add(0, self.level, part)

    def t_times(self, y: Tensor) -> Tensor:
        part = (self.values[:, :, None] * y[self.level]).sum(1)
        return y.new_zeros(self.shape[2], y.shape[2]).index_add(0, self.column, part)

    def gram(self, K: Tensor) -> Tensor:
        total = self.partition.zeros(K)
        if self.shape[1] == 1:
            part = K[:, 0, 0][self._pair_level] * self._product
            # In place where it can be: q * q is the largest of all.
            traced = torch._C._functorch.is_functorch_wrapped_tensor(K)
            add = total.index_add if traced else total.index_add_
            total = add(0, self._target, part)
        else:
            for a, b, target in self._chunks():
                left = (self.values[a][:, None, :] @ K[self.level[a]])[:, 0]
                total = total.index_add(0, target, (left * self.values[b]).sum(1))
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


def cross_product(
    one: IndexedDesign, two: Sequence[Design], linked: Sequence[bool], like: Tensor
) -> tuple[Cross, Tensor, Partition]:
    """Cross-products of the eliminated factor with the others, and of those.

    Args:
        one: design of the eliminated factor.
        two: the other designs.
        linked: whether the columns of a design belong together whatever the data.
        like: gives dtype and device.

    Returns:
        W, :math:`Z_2^\\top Z_2` by groups of columns, and the groups.
    """
    q = sum(design.shape[1] for design in two)
    whole = Partition.of_one(q, like.device)
    if not (one.levels and two and all(isinstance(design, IndexedDesign) for design in two)):
        return DenseCross(_dense(one, two, like)), _square(two, like), whole
    level, column, values = _non_zeros(one, two, like)  # type: ignore[arg-type]
    count = torch.bincount(level, minlength=one.levels).double()
    pairs = float((count * (count + 1) / 2).sum())
    if PAIR_COST * pairs > float(one.levels) * q**2 or pairs > _MOST_PAIRS:
        return DenseCross(_dense(one, two, like)), _square(two, like), whole
    cells = _cells(two, like)  # type: ignore[arg-type]
    first = torch.ones_like(level, dtype=torch.bool)
    first[1:] = level[1:] != level[:-1]
    # A level links all columns that it meets: each to the first of them.
    anchor = column[first][first.cumsum(0) - 1]
    edges = [(anchor, column), *[(i, j) for i, j, _ in cells], *_links(two, linked, like)]
    partition = Partition.of(q, edges, like.device)
    flat = partition.zeros(like)
    for i, j, value in cells:
        flat = flat.index_add(0, partition.index(i, j), value)
    upper = partition.square(flat)
    square = upper + upper.triu(1).mT
    shape = (one.levels, one.effects, q)
    return SparseCross(level, column, values, shape, partition), square, partition


def _links(
    two: Sequence[Design], linked: Sequence[bool], like: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Edges between columns that belong together whatever the data: those of a linked design,
    and the effects of one level."""
    found, start = [], 0
    for design, together in zip(two, linked, strict=True):
        assert isinstance(design, IndexedDesign)
        column = torch.arange(start, start + design.shape[1], device=like.device)
        step = design.shape[1] if together else design.effects
        found.append(((column - start) // step * step + start, column))
        start += design.shape[1]
    return found


def _cells(two: Sequence[IndexedDesign], like: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    r"""Entries of :math:`Z_2^\\top Z_2` on and above its diagonal: row, column, value."""
    found = []
    starts = [0]
    for design in two:
        starts.append(starts[-1] + design.shape[1])
    for t, a in enumerate(two):
        for u, b in enumerate(two[t:], t):
            level, column, values = _non_zeros(a, [b], like)
            for i in range(a.effects):
                row, col = starts[t] + level * a.effects + i, starts[u] + column
                kept = row <= col
                found.append((row[kept], col[kept], values[kept, i]))
    return found


def _square(two: Sequence[Design], like: Tensor) -> Tensor:
    rows = [torch.cat([product(a, b, like) for b in two], 1) for a in two]
    return (torch.cat(rows) if rows else like.new_zeros(0, 0))[None]


def values_of(design: IndexedDesign, like: Tensor) -> Tensor:
    """The design's values, ones where it has none, (n, k)."""
    return like.new_ones(len(like), 1) if design.values is None else design.values.to(like)


def _non_zeros(
    one: IndexedDesign, two: Sequence[IndexedDesign], like: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Levels, columns and values of the cells that some row is in."""
    q = sum(design.shape[1] for design in two)
    left = values_of(one, like)
    cells, parts = [], []
    offset = 0
    for design in two:
        right = values_of(design, like)
        cell, inverse = torch.unique(one.codes * design.levels + design.codes, return_inverse=True)
        level, code = cell // design.levels, cell % design.levels
        for j in range(design.effects):
            total = like.new_zeros(len(cell), one.effects)
            parts.append(total.index_add(0, inverse, left * right[:, j : j + 1]))
            cells.append(level * q + offset + code * design.effects + j)
        offset += design.shape[1]
    cell, order = torch.cat(cells).sort()
    return cell // q, cell % q, torch.cat(parts)[order]


def _dense(one: IndexedDesign, two: Sequence[Design], like: Tensor) -> Tensor:
    if not two:
        return like.new_zeros(one.levels, one.effects, 0)
    parts = [product(one, design, like) for design in two]
    return torch.cat(parts, 1).unflatten(0, (one.levels, one.effects))


def product(a: Design, b: Design, like: Tensor) -> Tensor:
    """:math:`Z_a^\\top Z_b`, (columns of a, columns of b)."""
    if isinstance(a, DenseDesign):
        return b.t_matmul(a.matrix.to(like)).mT
    if isinstance(b, DenseDesign):
        return a.t_matmul(b.matrix.to(like))
    assert isinstance(a, IndexedDesign) and isinstance(b, IndexedDesign)
    rows, columns = a.shape[1], b.shape[1]
    total = like.new_zeros(rows * columns)
    if not total.numel():
        return total.reshape(rows, columns)
    va, vb = values_of(a, like), values_of(b, like)
    for i in range(a.effects):
        for j in range(b.effects):
            at = (a.codes * a.effects + i) * columns + b.codes * b.effects + j
            total = total.index_add(0, at, va[:, i] * vb[:, j])
    return total.reshape(rows, columns)
