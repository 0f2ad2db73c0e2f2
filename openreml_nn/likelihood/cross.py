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

__all__ = ["Cross", "DenseCross", "SparseCross", "cross_product", "product", "values_of"]

#: Pairs of entries that are worked on at a time, to bound memory.
_CHUNK = 2**21
#: A pair costs about as much as so many multiplications of a dense product.
PAIR_COST = 25


class Cross:
    """W, (levels, k, q), known by its products; K and the results hold a block a level."""

    def times(self, x: Tensor) -> Tensor:
        """:math:`W x` for x (q, m), (levels, k, m)."""
        raise NotImplementedError

    def t_times(self, y: Tensor) -> Tensor:
        r""":math:`W^\top y` for y (levels, k, m), (q, m)."""
        raise NotImplementedError

    def gram(self, K: Tensor) -> Tensor:
        r""":math:`\sum_l W_l^\top K_l W_l` for symmetric K (levels, k, k), (q, q)."""
        raise NotImplementedError

    def quadratic(self, Q: Tensor) -> Tensor:
        r""":math:`W_l Q W_l^\top` for symmetric Q (q, q), (levels, k, k)."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        """W itself."""
        raise NotImplementedError


class DenseCross(Cross):
    """W with all its entries."""

    def __init__(self, W: Tensor) -> None:
        self.W = W

    def times(self, x: Tensor) -> Tensor:
        return self.W @ x

    def t_times(self, y: Tensor) -> Tensor:
        return self.W.flatten(0, 1).mT @ y.flatten(0, 1)

    def gram(self, K: Tensor) -> Tensor:
        return self.W.flatten(0, 1).mT @ (K @ self.W).flatten(0, 1)

    def quadratic(self, Q: Tensor) -> Tensor:
        return (self.W @ Q) @ self.W.mT

    def dense(self) -> Tensor:
        return self.W


class SparseCross(Cross):
    """W by its non-zero columns, level by level.

    Args:
        level: (nnz,) level of each non-zero column, ascending.
        column: (nnz,) its position among the q columns, ascending within a level.
        values: (nnz, k) its entries.
        shape: (levels, k, q).
    """

    def __init__(
        self, level: Tensor, column: Tensor, values: Tensor, shape: tuple[int, int, int]
    ) -> None:
        self.level, self.column, self.values = level, column, values
        self.shape = shape
        # Each pair (a, b) of columns of one level with a <= b, as positions among the non-zeros.
        count = torch.bincount(level, minlength=shape[0])
        ends = count.cumsum(0)[level]
        at = torch.arange(len(level), device=level.device)
        partners = ends - at
        self._a = at.repeat_interleave(partners)
        starts = partners.cumsum(0) - partners
        self._b = torch.arange(len(self._a), device=level.device) - (starts - at)[self._a]
        self._target = column[self._a] * shape[2] + column[self._b]
        if shape[1] == 1:
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
        q = self.shape[2]
        total = K.new_zeros(q * q)
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
        upper = total.reshape(q, q)
        return upper + upper.triu(1).mT

    def quadratic(self, Q: Tensor) -> Tensor:
        levels, k, _ = self.shape
        flat = Q.reshape(-1)
        own = self.values[:, :, None] * self.values[:, None, :]
        own = own * Q.diagonal()[self.column][:, None, None]
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

    def dense(self) -> Tensor:
        levels, k, q = self.shape
        dense = self.values.new_zeros(levels, q, k)
        dense[self.level, self.column] = self.values
        return dense.mT

    def _chunks(self) -> zip[tuple[Tensor, ...]]:
        return zip(*(x.split(_CHUNK) for x in (self._a, self._b, self._target)))


def cross_product(one: IndexedDesign, two: Sequence[Design], like: Tensor) -> Cross:
    """W for the eliminated factor's design and the others', sparse where that is less work."""
    shape = (one.levels, one.effects, sum(design.shape[1] for design in two))
    if not (one.levels and two and all(isinstance(design, IndexedDesign) for design in two)):
        return DenseCross(_dense(one, two, like))
    level, column, values = _non_zeros(one, two, like)  # type: ignore[arg-type]
    count = torch.bincount(level, minlength=one.levels).double()
    pairs = float((count * (count + 1) / 2).sum())
    if PAIR_COST * pairs > float(one.levels) * shape[2] ** 2 or pairs > 2**28:
        return DenseCross(_dense(one, two, like))
    return SparseCross(level, column, values, shape)


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
