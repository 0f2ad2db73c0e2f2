r"""Where each cross-product stands in the system of the random effects."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from openreml_nn.likelihood.system.cross import (
    Cross,
    DenseCross,
    SparseCross,
    SparsePattern,
    entries_of,
)
from openreml_nn.likelihood.system.crossproducts import Pattern, Products
from openreml_nn.likelihood.system.partition import Partition
from openreml_nn.likelihood.system.roles import Roles
from openreml_nn.support.modes import outside_transforms
from openreml_nn.terms.design import Design, IndexedDesign

__all__ = ["Placement", "System", "placed"]

#: More pairs than these would take more than 1.5 GB.
_MOST_PAIRS = 2**26


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


class Placement:
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
            with outside_transforms():
                self._place_sparse(linked, pair_cost, device)

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

    def _place_sparse(self, linked: Sequence[bool], pair_cost: float, device: torch.device) -> None:
        """By non-zeros, if that is less work."""
        places = [self._columns(i) for i in range(len(self._two))]
        level, column = (torch.cat(each) for each in zip(*places, strict=True))
        count = torch.bincount(level, minlength=self.levels).double()
        pairs = float((count * (count + 1) / 2).sum())
        if pair_cost * pairs > float(self.levels) * self.q**2 or pairs > _MOST_PAIRS:
            return
        cell = level * self.q + column
        self._order = torch.arange(len(cell), device=device)
        if bool((cell[1:] < cell[:-1]).any()):  # looking takes a tenth of the time of sorting
            self._order = torch.argsort(cell)
            level, column = level[self._order], column[self._order]
        first = level.diff(prepend=level[:1] - 1) != 0
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


def placed(
    designs: Sequence[Design],
    pattern: Pattern,
    roles: Roles,
    grids: Sequence[tuple[int, int] | None],
    pair_cost: float,
) -> Placement:
    """Where the products of terms stand in the order of their roles; grids are those of
    :func:`grid_of` of the others."""
    split, linked = len(roles.eliminated), [grid is None for grid in grids]
    two = range(split, len(designs))
    return Placement(designs, pattern, range(split), two, linked, pair_cost)


def _device(designs: Sequence[Design]) -> torch.device:
    for design in designs:
        for tensor in design.tensors:
            if tensor is not None:
                return tensor.device
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
