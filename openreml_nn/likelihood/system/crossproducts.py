r"""Cross-products of the columns of :math:`[Z_1 | \dots | Z_r | f]`: all that the
blocked solver needs of the data, with f the fixed effects' columns and y.

A product of two grouping factors has an entry for each pair of levels that
meet in some row. Products add up over rows, so that they can be had from one
part of the data after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from openreml_nn.support.modes import outside_transforms
from openreml_nn.terms.design import (
    CodedDesign,
    DenseDesign,
    Design,
    IndexedDesign,
    MembershipDesign,
)

__all__ = ["Cells", "Pattern", "Products", "Statistics"]


class Cells:
    """Pairs of levels of two grouping factors that meet in some row.

    Attributes:
        a: (cells,) level of the first, ascending.
        b: (cells,) level of the second, ascending within one of the first.
    """

    def __init__(self, a: Tensor, b: Tensor, of_row: Tensor | None = None) -> None:
        self.a, self.b = a, b
        self._of_row = of_row

    @classmethod
    def of(cls, one: CodedDesign, two: CodedDesign, *, rows: bool = True) -> Cells:
        """Those of two designs of the same rows; in one with several levels all of a row meet.

        Args:
            one: the first design.
            two: the second design.
            rows: whether the cell of each row is kept, which :meth:`sum` needs.
        """
        if isinstance(one, IndexedDesign) and isinstance(two, IndexedDesign):
            if same_codes(one, two):
                level = torch.arange(one.levels, device=one.codes.device)
                return cls(level, level, one.codes)
            key = one.codes * two.levels + two.codes
        else:
            left, right = (d.codes.reshape(len(d.codes), -1) for d in (one, two))
            key = (left[:, :, None] * two.levels + right[:, None, :]).flatten()
        if rows:
            cell, inverse = torch.unique(key, return_inverse=True)
            return cls(cell // two.levels, cell % two.levels, inverse)
        # NumPy sorts in a third of the time that torch.unique takes.
        ordered = torch.from_numpy(np.sort(key.numpy(force=True))).to(key.device)
        cell = torch.unique_consecutive(ordered)
        return cls(cell // two.levels, cell % two.levels)

    def sum(self, one: CodedDesign, two: CodedDesign, like: Tensor) -> Tensor:
        """Cross-products cell by cell, (cells, effects of one, effects of two)."""
        assert self._of_row is not None
        left, right = by_level(one, like), by_level(two, like)
        part = (left[:, :, None, :, None] * right[:, None, :, None, :]).flatten(3).flatten(0, 2)
        total = part.new_zeros(len(self.a), part.shape[1]).index_add(0, self._of_row, part)
        return total.unflatten(1, (left.shape[2], right.shape[2]))


def same_codes(one: IndexedDesign, two: IndexedDesign) -> bool:
    """Whether two designs are of one grouping factor."""
    if one.levels != two.levels:
        return False
    return one.codes is two.codes or torch.equal(one.codes, two.codes)


def values_of(design: IndexedDesign, like: Tensor) -> Tensor:
    """The design's values, ones where it has none, (n, k)."""
    if design.values is None:
        return like.new_ones(design.shape[0], 1)
    return design.values.to(like)


def by_level(design: CodedDesign, like: Tensor) -> Tensor:
    """The design's values for each level of a row, (n, m, k)."""
    if isinstance(design, MembershipDesign):
        return design.by_level.to(like)
    return values_of(design, like)[:, None]


class Pattern:
    """Which pairs of levels meet, for each pair of terms t ≤ u; it depends on codes alone.

    Attributes:
        cells: for each pair its cells, None where a design is dense.
    """

    def __init__(self, cells: dict[tuple[int, int], Cells | None]) -> None:
        self.cells = cells

    @classmethod
    def of(cls, designs: Sequence[Design], *, members: bool = False, rows: bool = True) -> Pattern:
        """That of some designs of the same rows.

        Args:
            designs: as they are multiplied.
            members: whether a design with several levels in a row has a pattern too, in place
                of being dense.
            rows: whether the cells of the rows are kept, which products need.
        """
        coded = CodedDesign if members else IndexedDesign
        found: dict[tuple[int, int], Cells | None] = {}
        with outside_transforms():
            for t, one in enumerate(designs):
                for u, two in enumerate(designs[t:], t):
                    both = isinstance(one, coded) and isinstance(two, coded)
                    found[t, u] = Cells.of(one, two, rows=rows) if both else None  # type: ignore[arg-type]
        return cls(found)

    def products(self, designs: Sequence[Design], f: Tensor) -> Products:
        """Cross-products of designs with these codes and of f, (n, r)."""
        zz = {}
        for (t, u), cells in self.cells.items():
            one, two = designs[t], designs[u]
            if cells is None:
                zz[t, u] = _dense_product(one, two, f)
            else:
                assert isinstance(one, CodedDesign) and isinstance(two, CodedDesign)
                zz[t, u] = cells.sum(one, two, f)
        return Products(zz, [design.t_matmul(f) for design in designs], f.mT @ f)


@dataclass(frozen=True)
class Products:
    r"""Cross-products of some rows.

    Attributes:
        zz: :math:`Z_t^\top Z_u`, by cells (cells, k_t, k_u), or (q_t, q_u) where a design is dense.
        zf: :math:`Z_t^\top f`, (q_t, r).
        ff: :math:`f^\top f`, (r, r).
    """

    zz: dict[tuple[int, int], Tensor]
    zf: list[Tensor]
    ff: Tensor


@dataclass(frozen=True)
class Statistics:
    """Cross-products of some rows with where they belong: they add up over rows.

    Attributes:
        sizes: levels and effects of each design.
        cells: levels that meet, for each pair of designs t ≤ u: (cells,) of t and of u.
        products: their cross-products.
        rows: number of rows.
        log_det: :math:`\\log|R|` of the rows at a residual variance of 1, by which they were weighted.
    """

    sizes: list[tuple[int, int]]
    cells: dict[tuple[int, int], tuple[Tensor, Tensor]]
    products: Products
    rows: int
    log_det: float = 0.0

    @classmethod
    def of(
        cls, designs: Sequence[CodedDesign], f: Tensor, weights: Tensor | None = None
    ) -> Statistics:
        """Those of some rows, each weighted by its weight (n,), if there are weights."""
        log_det = 0.0
        if weights is not None:
            half = weights.sqrt()[:, None]
            f, log_det = half * f, -float(weights.log().sum())
            designs = [d.with_values(lambda values: half * values, f) for d in designs]
        pattern = Pattern.of(designs, members=True)
        cells = {}
        for pair, found in pattern.cells.items():
            assert found is not None
            cells[pair] = (found.a, found.b)
        sizes = [(d.levels, d.shape[1] // d.levels) for d in designs]
        return cls(sizes, cells, pattern.products(designs, f), len(f), log_det)

    def to(self, device: torch.device) -> Statistics:
        """On a device."""
        p = self.products
        zz = {pair: value.to(device) for pair, value in p.zz.items()}
        products = Products(zz, [part.to(device) for part in p.zf], p.ff.to(device))
        cells = {pair: (a.to(device), b.to(device)) for pair, (a, b) in self.cells.items()}
        return Statistics(self.sizes, cells, products, self.rows, self.log_det)

    def relabelled(self, places: Sequence[Tensor], levels: Sequence[int]) -> Statistics:
        """With level i of design t as level ``places[t][i]`` of ``levels[t]``."""
        cells, zz = {}, {}
        for (t, u), (a, b) in self.cells.items():
            a, b = places[t][a], places[u][b]
            order = torch.argsort(a * levels[u] + b)  # levels ascend, as everywhere
            cells[t, u] = a[order], b[order]
            zz[t, u] = self.products.zz[t, u][order]
        zf = []
        for (count, k), place, size, part in zip(
            self.sizes, places, levels, self.products.zf, strict=True
        ):
            whole = part.new_zeros(size, k * part.shape[1])
            whole[place] = part.reshape(count, -1)
            zf.append(whole.reshape(size * k, -1))
        products = Products(zz, zf, self.products.ff)
        sizes = [(size, k) for size, (_, k) in zip(levels, self.sizes, strict=True)]
        return Statistics(sizes, cells, products, self.rows, self.log_det)

    def __add__(self, other: Statistics) -> Statistics:
        """Of the rows of both, where the levels of each design are the same."""
        cells, zz = {}, {}
        for (t, u), (a, b) in self.cells.items():
            c, d = other.cells[t, u]
            size = self.sizes[u][0]
            key = torch.cat([a * size + b, c * size + d])
            cell, inverse = torch.unique(key, return_inverse=True)
            values = torch.cat([self.products.zz[t, u], other.products.zz[t, u]])
            zz[t, u] = values.new_zeros(len(cell), *values.shape[1:]).index_add(0, inverse, values)
            cells[t, u] = (cell // size, cell % size)
        zf = [x + y for x, y in zip(self.products.zf, other.products.zf, strict=True)]
        products = Products(zz, zf, self.products.ff + other.products.ff)
        rows, log_det = self.rows + other.rows, self.log_det + other.log_det
        return Statistics(self.sizes, cells, products, rows, log_det)

    def mapped(self, M: Tensor) -> Statistics:
        """With the columns :math:`f M` in the place of f."""
        p = self.products
        products = Products(p.zz, [part @ M for part in p.zf], M.mT @ p.ff @ M)
        return Statistics(self.sizes, self.cells, products, self.rows, self.log_det)

    def ordered(self, order: Sequence[int]) -> tuple[Pattern, Products]:
        """Pattern and products of the designs in another order."""
        cells: dict[tuple[int, int], Cells | None] = {}
        zz = {}
        for t, i in enumerate(order):
            for u, j in enumerate(order[t:], t):
                a, b = self.cells[min(i, j), max(i, j)]
                value = self.products.zz[min(i, j), max(i, j)]
                if i > j:
                    place = torch.argsort(b * self.sizes[j][0] + a)
                    a, b, value = b[place], a[place], value.mT[place]
                cells[t, u] = Cells(a, b)
                zz[t, u] = value
        zf = [self.products.zf[i] for i in order]
        return Pattern(cells), Products(zz, zf, self.products.ff)


def _dense_product(one: Design, two: Design, like: Tensor) -> Tensor:
    if isinstance(two, DenseDesign):
        return one.t_matmul(two.matrix.to(like))
    assert isinstance(one, DenseDesign)
    return two.t_matmul(one.matrix.to(like)).mT
