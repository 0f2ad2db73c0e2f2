r"""The system of the random effects: where each cross-product stands in it.

The eliminated factor has a row of k entries for each level in
:math:`W = Z_1^\top Z_2`. A level meets few of the other terms' columns when
those are grouping factors, and then only what it meets is stored and
multiplied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from openreml_nn.likelihood.system.partition import Partition
from openreml_nn.likelihood.system.products import Pattern, Products
from openreml_nn.terms.design import DenseDesign, Design, IndexedDesign

__all__ = [
    "Arrangement",
    "Cross",
    "DenseCross",
    "SparseCross",
    "SparsePattern",
    "System",
    "entries_of",
]

#: Pairs of entries that are worked on at a time, to bound memory.
_CHUNK = 2**21
#: More pairs than these would take more than 1.5 GB.
_MOST_PAIRS = 2**26
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


@dataclass(frozen=True)
class System:
    r"""Cross-products by their places: 1 is the eliminated factor, 2 the other terms.

    Attributes:
        A11: (levels, k, k) diagonal blocks of :math:`Z_1^\top Z_1`.
        W: :math:`Z_1^\top Z_2`.
        A1f: (levels, k, r).
        A22: :math:`Z_2^\top Z_2` by groups of columns.
        A2f: (q, r).
        Aff: (r, r).
    """

    A11: Tensor
    W: Cross
    A1f: Tensor
    A22: Tensor
    A2f: Tensor
    Aff: Tensor


class Arrangement:
    """Where the cross-products of some terms stand in the system.

    Args:
        designs: of all terms: their sizes are what counts.
        pattern: which of their levels meet.
        one: positions of the eliminated terms, of one grouping factor.
        two: positions of the others.
        linked: for each of those, whether its columns belong together whatever the data.
        pair_cost: of a pair of entries that meet, in operations of a dense product.

    Attributes:
        levels, k: levels of the eliminated factor, and effects of each.
        widths: how many of the effects each eliminated term has.
        sizes: columns of each other term; ``q`` in all.
        partition: groups of the other terms' columns.
    """

    def __init__(
        self,
        designs: Sequence[Design],
        pattern: Pattern,
        one: Sequence[int],
        two: Sequence[int],
        linked: Sequence[bool],
        pair_cost: float,
    ) -> None:
        device = _device(designs)
        self._one, self._two, self._pattern = list(one), list(two), pattern
        self._designs = [_Size.of(design) for design in designs]
        first = [self._designs[t] for t in one]
        self.levels = first[0].levels if first else 0
        self.widths = [size.effects for size in first]
        self.k = sum(self.widths)
        self.sizes = [self._designs[t].columns for t in two]
        self._starts = [sum(self.sizes[:i]) for i in range(len(self.sizes))]
        self.q = sum(self.sizes)
        self.partition = Partition.of_one(self.q, device)
        self._order: Tensor | None = None
        self._targets: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        if self.levels and two and all(self._designs[t].indexed for t in two):
            self._arrange_sparse(linked, pair_cost, device)

    @property
    def is_sparse(self) -> bool:
        """Whether W is held by its non-zeros."""
        return self._order is not None

    def cost(self, r: int) -> tuple[float, float]:
        """Operations of an evaluation with its scores for r columns of f, and entries held."""
        k, q = self.k, self.q
        held, work = float(self.levels * k * q), float(self.levels * k * q) * q
        if self.is_sparse:
            held = 3 * self._pairs + len(self._level) * k
            work = 4 * self._pairs * k**2
        groups = max(self.partition.count, 1) * float(self.partition.size) ** 2
        own = self.levels * k * (8.0 * k * k + 4 * k * r)
        work = own + 2 * work + 2 * groups * self.partition.size
        return work, held + 5 * groups + 8.0 * self.levels * k * (k + r)

    @cached_property
    def _sparse(self) -> SparsePattern:
        shape = (self.levels, self.k, self.q)
        return SparsePattern(self._level, self._column, shape, self.partition)

    def _arrange_sparse(
        self, linked: Sequence[bool], pair_cost: float, device: torch.device
    ) -> None:
        """By non-zeros, if that is less work."""
        places = [self._columns(i) for i in range(len(self._two))]
        level = torch.cat([a for a, _ in places])
        column = torch.cat([b for _, b in places])
        count = torch.bincount(level, minlength=self.levels).double()
        pairs = float((count * (count + 1) / 2).sum())
        if pair_cost * pairs > float(self.levels) * self.q**2 or pairs > _MOST_PAIRS:
            return
        cell, self._order = (level * self.q + column).sort()
        level, column = cell // self.q, cell % self.q
        first = torch.ones_like(level, dtype=torch.bool)
        first[1:] = level[1:] != level[:-1]
        # A level links all columns that it meets: each to the first of them.
        anchor = column[first][first.cumsum(0) - 1]
        cells = self._cells_of_rest()
        edges = [(anchor, column), *cells.values(), *self._links(linked, device)]
        self.partition = Partition.of(self.q, edges, device)
        self._targets = {
            pair: (self.partition.index(row, col), row <= col) for pair, (row, col) in cells.items()
        }
        self._level, self._column, self._pairs = level, column, pairs

    def _between(self, t: int, u: int) -> tuple[Tensor, Tensor]:
        """Levels of terms t and u that meet."""
        cells = self._pattern.cells[min(t, u), max(t, u)]
        assert cells is not None
        return (cells.a, cells.b) if t <= u else (cells.b, cells.a)

    def _value(self, products: Products, t: int, u: int) -> Tensor:
        value = products.zz[min(t, u), max(t, u)]
        return value if t <= u else value.mT

    def _columns(self, i: int) -> tuple[Tensor, Tensor]:
        """Level and column of the non-zeros of W for the i-th other term, effect by effect."""
        t = self._two[i]
        a, b = self._between(self._one[0], t)
        effect = torch.arange(self._designs[t].effects, device=a.device)
        column = self._starts[i] + b[:, None] * len(effect) + effect
        return a.repeat_interleave(len(effect)), column.reshape(-1)

    def _cells_of_rest(self) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
        """Rows and columns of entries of A22, those of a term with itself both ways round."""
        found = {}
        for i, t in enumerate(self._two):
            for j, u in enumerate(self._two[i:], i):
                a, b = self._between(t, u)
                effects = self._designs[t].effects, self._designs[u].effects
                row, column = entries_of(a, b, effects)
                found[i, j] = self._starts[i] + row, self._starts[j] + column
        return found

    def _links(
        self, linked: Sequence[bool], device: torch.device
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Edges between columns that belong together whatever the data: those of a linked term,
        and the effects of one level."""
        for t, together, start, size in zip(
            self._two, linked, self._starts, self.sizes, strict=True
        ):
            column = torch.arange(start, start + size, device=device)
            step = size if together else self._designs[t].effects
            yield (column - start) // step * step + start, column

    # ------------------------------------------------------------------ products in their places

    def place(self, products: Products) -> System:
        """The system of some products."""
        like = products.ff
        r = like.shape[1]
        by_level = (self.levels, self.k, r)
        ones = [
            products.zf[t].unflatten(0, (self.levels, w))
            for t, w in zip(self._one, self.widths, strict=True)
        ]
        A1f = torch.cat(ones, 1) if ones else like.new_zeros(by_level)
        twos = [products.zf[t] for t in self._two]
        A2f = torch.cat(twos) if twos else like.new_zeros(0, r)
        if not self.is_sparse:
            W: Cross = DenseCross(self._dense_w(products))
            A22 = self._dense_square(products)
        else:
            W = SparseCross(self._sparse, self._sparse_values(products))
            A22 = self._sparse_square(products)
        return System(self._own(products), W, A1f, A22, A2f, products.ff)

    def _own(self, products: Products) -> Tensor:
        """A11: a level meets itself only."""
        rows = [torch.cat([self._value(products, t, u) for u in self._one], 2) for t in self._one]
        return torch.cat(rows, 1) if rows else products.ff.new_zeros(0, 0, 0)

    def _sparse_values(self, products: Products) -> Tensor:
        parts = []
        for u in self._two:
            value = torch.cat([self._value(products, t, u) for t in self._one], 1)
            parts.append(
                value.mT.flatten(0, 1)
            )  # cells, effects of the other term by effects of ours
        return torch.cat(parts)[self._order]

    def _sparse_square(self, products: Products) -> Tensor:
        flat = self.partition.zeros(products.ff)
        for (i, j), (target, kept) in self._targets.items():
            value = self._value(products, self._two[i], self._two[j]).reshape(-1)
            flat = flat.index_add(0, target[kept], value[kept])
        upper = self.partition.square(flat)
        return upper + upper.triu(1).mT

    def _dense_w(self, products: Products) -> Tensor:
        if not (self._one and self._two):
            return products.ff.new_zeros(self.levels, self.k, self.q)
        rows = [
            torch.cat([self._dense(products, t, u) for u in self._two], 1).unflatten(
                0, (self.levels, -1)
            )
            for t in self._one
        ]
        return torch.cat(rows, 1)

    def _dense_square(self, products: Products) -> Tensor:
        rows = [torch.cat([self._dense(products, t, u) for u in self._two], 1) for t in self._two]
        return (torch.cat(rows) if rows else products.ff.new_zeros(0, 0))[None]

    def _dense(self, products: Products, t: int, u: int) -> Tensor:
        """(q_t, q_u)"""
        value = self._value(products, t, u)
        if self._pattern.cells[min(t, u), max(t, u)] is None:
            return value
        a, b = self._between(t, u)
        levels = self._designs[t].levels, self._designs[u].levels
        whole = value.new_zeros(levels[0] * levels[1], *value.shape[1:])
        whole = whole.index_add(0, a * levels[1] + b, value).unflatten(0, levels)
        return whole.transpose(1, 2).flatten(2, 3).flatten(0, 1)


def _device(designs: Sequence[Design]) -> torch.device:
    for design in designs:
        if isinstance(design, IndexedDesign):
            return design.codes.device
        if isinstance(design, DenseDesign):
            return design.matrix.device
    return torch.device("cpu")


@dataclass(frozen=True)
class _Size:
    """Size of a design, without its rows."""

    indexed: bool
    levels: int
    effects: int

    @classmethod
    def of(cls, design: Design) -> _Size:
        if isinstance(design, IndexedDesign):
            return cls(True, design.levels, design.effects)
        return cls(False, 1, design.shape[1])

    @property
    def columns(self) -> int:
        return self.levels * self.effects
