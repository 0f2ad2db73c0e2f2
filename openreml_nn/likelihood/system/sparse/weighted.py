"""What the sparse equations take from rows whose weights move: compiled loops over the rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from openreml_nn.likelihood.system.sparse.equations import Equations
from openreml_nn.likelihood.system.sparse.part import Cross
from openreml_nn.support.compilation import compiled
from openreml_nn.terms.design import IdentityDesign, IndexedDesign
from openreml_nn.terms.term import Term

__all__ = ["EffectRows"]


@dataclass(frozen=True)
class _Segment:
    """Columns of a term that a row meets, side by side within a block of its covariance.

    Attributes:
        column: (n,) the first of them.
        values: (n, m) the row's entries there; None for a one.
    """

    column: np.ndarray
    values: np.ndarray | None


@dataclass(frozen=True)
class _Meeting:
    """Where two segments of a row meet in the blocks of a cross.

    Attributes:
        one, other: the segments.
        base: (n,) where the first of their entries stands in the flattened blocks.
        stride: entries from one row of a block to the next.
        scale: how often the meeting counts: twice where its transpose is not held.
    """

    one: _Segment
    other: _Segment
    base: np.ndarray
    stride: int
    scale: float


class EffectRows:
    r"""The rows of indexed designs: products with Z, and blocks of :math:`Z^\top W Z`.

    Args:
        terms: of the effects, whose designs are indexed.
        equations: with a part for each.
    """

    def __init__(self, terms: Sequence[Term], equations: Equations) -> None:
        self._equations = equations
        self._segments = [
            _segments(term, part.effects) for term, part in zip(terms, equations.parts, strict=True)
        ]
        self._meetings = [self._meeting(cross) for cross in equations.crosses]

    def _meeting(self, cross: Cross) -> list[_Meeting]:
        (k, m), found = cross.shape, []
        width = self._equations.parts[cross.other].levels
        for one in self._segments[cross.one]:
            for other in self._segments[cross.other]:
                if width * len(cross.start) == len(cross.row) + width:
                    block = one.column // k * width + other.column // m  # all blocks are there
                else:
                    block = _blocks_at(
                        one.column // k, other.column // m, cross.start, cross.column
                    )
                base = block * (k * m) + one.column % k * m + other.column % m
                scale = 1.0 if cross.one == cross.other else 2.0
                found.append(_Meeting(one, other, base, m, scale))
        return found

    def products(self, weights: np.ndarray) -> list[np.ndarray]:
        r"""Blocks of :math:`Z^\top W Z` in the order of the equations' crosses."""
        found = []
        for cross, meetings in zip(self._equations.crosses, self._meetings, strict=True):
            data = np.zeros(cross.place.size)
            for at in meetings:
                if at.one.values is None and at.other.values is None:
                    _count(at.base, weights, data)
                else:
                    one, other = _values(at.one), _values(at.other)
                    _sum_blocks(at.base, one, other, weights, at.stride, data)
            found.append(data.reshape(cross.place.shape))
        return found

    def quadratic(self, blocks: Sequence[np.ndarray]) -> np.ndarray:
        r""":math:`z_i^\top V z_i` for each row, of the symmetric V of such blocks, (n,)."""
        total = np.zeros(len(self._segments[0][0].column))
        for data, meetings in zip(blocks, self._meetings, strict=True):
            flat = np.ascontiguousarray(data).reshape(-1)
            for at in meetings:
                if at.one.values is None and at.other.values is None:
                    _look_up(at.base, flat, at.scale, total)
                else:
                    one, other = _values(at.one), _values(at.other)
                    _add_forms(at.base, one, other, flat, at.stride, at.scale, total)
        return total

    def times(self, b: np.ndarray) -> np.ndarray:
        """:math:`Z b` for b (size,), (n,)."""
        total = np.zeros(len(self._segments[0][0].column))
        for start, segments in zip(self._equations.start, self._segments, strict=False):
            for own in segments:
                if own.values is None:
                    _pick(own.column, b[start:], total)
                else:
                    _add_products(own.column, own.values, b[start:], total)
        return total

    def t_times(self, v: np.ndarray) -> np.ndarray:
        r""":math:`Z^\top v` for v (n,), (size,)."""
        total = np.zeros(self._equations.size)
        for start, segments in zip(self._equations.start, self._segments, strict=False):
            for own in segments:
                if own.values is None:
                    _count(own.column, v, total[start:])
                else:
                    _sum_columns(own.column, own.values, v, total[start:])
        return total


def _segments(term: Term, k: int) -> list[_Segment]:
    """What a row meets of a term whose covariance has blocks of k columns."""
    design = term.design
    if isinstance(design, IdentityDesign):
        return [_Segment(np.arange(design.shape[0]), None)]
    assert isinstance(design, IndexedDesign)
    e = design.effects
    column = design.codes.numpy().astype(np.int64) * e
    if design.values is None:
        return [_Segment(column, None)]
    values, width = design.values.detach().double().numpy(), min(e, k)
    return [
        _Segment(column + j, np.ascontiguousarray(values[:, j : j + width]))
        for j in range(0, e, width)
    ]


def _values(segment: _Segment) -> np.ndarray:
    return np.ones((len(segment.column), 1)) if segment.values is None else segment.values


@compiled
def _blocks_at(row, column, start, columns):
    """Which block of a matrix by rows of blocks stands at each place."""
    found = np.empty(len(row), np.int64)
    for i in range(len(row)):
        low, high = start[row[i]], start[row[i] + 1] - 1
        while low < high:
            middle = (low + high) // 2
            if columns[middle] < column[i]:
                low = middle + 1
            else:
                high = middle
        found[i] = low
    return found


@compiled
def _count(base, weights, total):
    for i in range(len(base)):
        total[base[i]] += weights[i]


@compiled
def _sum_blocks(base, one, other, weights, stride, total):
    for i in range(len(base)):
        for a in range(one.shape[1]):
            x = weights[i] * one[i, a]
            at = base[i] + a * stride
            for b in range(other.shape[1]):
                total[at + b] += x * other[i, b]


@compiled
def _look_up(base, blocks, scale, total):
    for i in range(len(base)):
        total[i] += scale * blocks[base[i]]


@compiled
def _add_forms(base, one, other, blocks, stride, scale, total):
    for i in range(len(base)):
        own = 0.0
        for a in range(one.shape[1]):
            at, x = base[i] + a * stride, 0.0
            for b in range(other.shape[1]):
                x += blocks[at + b] * other[i, b]
            own += one[i, a] * x
        total[i] += scale * own


@compiled
def _pick(column, x, total):
    for i in range(len(column)):
        total[i] += x[column[i]]


@compiled
def _add_products(column, values, x, total):
    for i in range(len(column)):
        for a in range(values.shape[1]):
            total[i] += values[i, a] * x[column[i] + a]


@compiled
def _sum_columns(column, values, v, total):
    for i in range(len(column)):
        for a in range(values.shape[1]):
            total[column[i] + a] += values[i, a] * v[i]
