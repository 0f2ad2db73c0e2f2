r"""What of a sparse Cholesky factor depends on the pattern alone.

Columns whose patterns below are (nearly) the same stand together as a supernode, a dense block of
rows, so that nearly all operations are products of dense matrices.

Reference:
    Davis, Direct Methods for Sparse Linear Systems (2006), chapter 4; Ashcraft and Grimes, ACM
    Transactions on Mathematical Software 15 (1989) 291, for merging supernodes.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.sparse import csc_matrix

from openreml_nn.likelihood.system.sparse.columns import Run, runs_of
from openreml_nn.likelihood.system.sparse.forest import (
    column_counts,
    elimination_tree,
    inverted,
    postorder,
    relabelled,
)
from openreml_nn.likelihood.system.sparse.memory import Pool
from openreml_nn.likelihood.system.sparse.ordering import nested_dissections
from openreml_nn.support.compilation import compiled

__all__ = ["PANEL", "Symbolic"]


#: Rows of the inverse that are gathered at a time.
PANEL = 128
#: A factor that takes more operations is worth other orders.
_LONG = 5e9
#: Bytes of a factor beyond which no other order makes it one that fits: orders differ by less than twice.
_LOST = 2.0**34
#: To add an entry of an update to a block, and to take it out for the inverse, is as long as so many
#: operations of products of blocks, of updates that have so many rows.
_ENTRY, _TALL = 32.0, 64
#: A factorisation says how far it is each time that it has taken so many.
_PIECE = 2e10


@dataclass(frozen=True)
class Symbolic:
    r"""The pattern of the factor :math:`P A P^\top = L L^\top`.

    Attributes:
        order: (n,) which row of A is the k-th of the permuted matrix.
        place: (n,) its inverse.
        first: (s + 1,) first column of each supernode.
        of_column: (n,) supernode of each column.
        row_start: (s + 1,) where a supernode's rows begin in ``rows``.
        rows: rows of each supernode, ascending, its own columns first.
        value_start: (s + 1,) where a supernode's block, (rows, columns) row by row, begins.
        operations: floating-point operations of a factorisation.
        work: entries of the largest update.
    """

    order: np.ndarray
    place: np.ndarray
    first: np.ndarray
    of_column: np.ndarray
    row_start: np.ndarray
    rows: np.ndarray
    value_start: np.ndarray
    operations: float
    work: int

    @property
    def size(self) -> int:
        """Rows of the matrix, n."""
        return len(self.order)

    @property
    def entries(self) -> int:
        """Numbers that the factor holds, zeros of its blocks among them."""
        return int(self.value_start[-1])

    @classmethod
    def of(cls, pattern: csc_matrix, order: np.ndarray | None = None) -> Symbolic:
        """From a symmetric pattern, both triangles with the diagonal.

        Args:
            pattern: (n, n).
            order: an order of elimination, (n,); nested dissection by default, of long ones the
                best of several.
        """
        if order is not None:
            return cls._ordered(pattern, order)
        orders = nested_dissections(pattern)
        best = cls._ordered(pattern, next(orders))
        if best.operations > _LONG and best.bytes < _LOST:
            for other in orders:
                found = cls._ordered(pattern, other)
                best = min(best, found, key=lambda each: each.operations)
        return best

    @classmethod
    def _ordered(cls, pattern: csc_matrix, order: np.ndarray) -> Symbolic:
        n = pattern.shape[0]
        start, index = pattern.indptr.astype(np.int64), pattern.indices.astype(np.int64)
        parent = elimination_tree(n, start, index, order, inverted(order))
        post = postorder(parent)
        order = np.ascontiguousarray(order[post])
        place = inverted(order)
        parent = relabelled(parent, post)
        count = column_counts(n, start, index, order, place, parent)
        new = (parent[:-1] != np.arange(1, n)) | (count[:-1] != count[1:] + 1)
        begins = np.flatnonzero(np.concatenate([[True], new])[:n])
        order, first, height = _supernodes(parent, count, begins, order)
        place = inverted(order)
        of_column = np.repeat(np.arange(len(height)), np.diff(first))
        row_start = np.concatenate([[0], np.cumsum(height)])
        rows = _rows(start, index, order, place, first, of_column, row_start)
        shift = np.repeat(np.arange(len(height)), height) * n
        rows = np.sort(rows + shift) - shift
        value_start = np.concatenate([[0], np.cumsum(height * np.diff(first))])
        operations = float(_operations(first, row_start).sum())
        work = _largest_update(first, of_column, row_start, rows)
        return cls(order, place, first, of_column, row_start, rows, value_start, operations, work)

    @property
    def bytes(self) -> float:
        """What a factor and its inverse hold at most."""
        below = int((np.diff(self.row_start) - np.diff(self.first)).max(initial=0))
        return 16.0 * self.entries + 8.0 * (self.work + below * min(below, PANEL))

    @property
    def pattern(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """What compiled functions take."""
        return self.first, self.of_column, self.row_start, self.rows, self.value_start

    @cached_property
    def pieces(self) -> list[int]:
        """Supernodes between which the work is about the same, from 0 to their number; those ends
        alone of what is short."""
        done = np.cumsum(_operations(self.first, self.row_start))
        count = min(int(self.operations / _PIECE), 200) + 1
        inner = np.searchsorted(done, done[-1:] * np.arange(1, count) / count)
        return sorted({0, *map(int, inner), len(done)})

    @cached_property
    def runs(self) -> list[Run]:
        """Runs of single columns, from right to left, whose inverse is computed together."""
        return runs_of(self.first, self.of_column, self.row_start, self.rows)

    @cached_property
    def pieces_with_runs(self) -> list[tuple[int, int, Run | None]]:
        """Supernodes from right to left, each run as one piece."""
        runs = {run.low: run for run in self.runs}
        ends = {end for end in self.pieces if not any(r.low < end < r.high for r in self.runs)}
        ends |= {end for run in self.runs for end in (run.low, run.high)}
        pairs = list(itertools.pairwise(sorted(ends)))
        return [(low, high, runs.get(low)) for low, high in reversed(pairs)]

    @cached_property
    def diagonal(self) -> np.ndarray:
        """Where the diagonal of A stands in the factor's values, in the order of elimination, (n,)."""
        width = np.diff(self.first)[self.of_column]
        local = np.arange(self.size) - self.first[self.of_column]
        return self.value_start[self.of_column] + local * (width + 1)

    @cached_property
    def memory(self) -> Pool:
        """Memory of factors that are no more, (entries,) numbers each."""
        return Pool(self.entries)

    def where(self, row: np.ndarray, column: np.ndarray) -> np.ndarray:
        """Where entries of A stand in the factor's values; -1 where they are not in its pattern.

        Args:
            row, column: (m,) rows and columns of A, in either triangle.
        """
        a, b = self.place[row], self.place[column]
        low, high = np.maximum(a, b), np.minimum(a, b)
        return _where(
            low, high, self.first, self.of_column, self.row_start, self.rows, self.value_start
        )


def _operations(first: np.ndarray, row_start: np.ndarray) -> np.ndarray:
    """Floating-point operations of each supernode and of what it gives to others."""
    w = np.diff(first).astype(float)
    below = np.diff(row_start) - w
    return w**3 / 3 + w * w * below + w * below * (below + 1)


def _supernodes(
    parent: np.ndarray, count: np.ndarray, begins: np.ndarray, order: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Supernodes of fundamental ones, of which those are merged that gain by it.

    Args:
        parent: of each column in the elimination tree, in postorder.
        count: entries of each column of L.
        begins: first columns of the fundamental supernodes.
        order: which row of A is each column.

    Returns:
        The order in which the columns of each supernode are side by side, the first column of each
        and the end, (s + 1,), and its rows.
    """
    ends = np.append(begins, len(parent))[1:]
    width = ends - begins
    above = parent[ends - 1]
    of_column = np.repeat(np.arange(len(begins)), width)
    up = np.where(above < 0, -1, of_column[above])
    top = np.arange(len(begins))
    _merged(up, width.copy(), count[begins] - width, top, np.zeros(len(begins)))
    groups = np.unique(top)
    number = np.searchsorted(groups, top)
    above = np.where(up[groups] < 0, -1, number[up[groups]])
    rank = inverted(postorder(above))
    wide = np.zeros(len(groups), np.int64)
    np.add.at(wide, rank[number], width)
    below = np.empty_like(wide)
    below[rank] = (count[begins] - width)[groups]
    side_by_side = np.argsort(rank[number][of_column], kind="stable")
    return order[side_by_side], np.concatenate([[0], np.cumsum(wide)]), wide + below


@compiled
def _merged(up, wide, below, top, zeros):
    """Write for each fundamental supernode the last of those that it is merged with to ``top``.

    A supernode is merged with its parent to one block with explicit zeros, where these are few, or
    cost less than to add its products to the parent's entries one by one.

    Args:
        up: the parent of each, after it; -1 where there is none.
        wide: its columns, to which those of what is merged with it are added.
        below: its rows below these.
        top: the numbers of the supernodes.
        zeros: explicit ones of each, none yet.
    """
    s = len(up)
    head, following = np.empty(s, np.int64), np.empty(s, np.int64)
    for p in range(s):
        head[p] = following[p] = -1
    for p in range(s):
        kept = -1
        c = head[p]
        while c != -1:
            after = following[c]
            w, rows = wide[c] + wide[p], wide[p] + below[p]
            more = zeros[c] + zeros[p] + wide[c] * (rows - below[c])
            total = w * (w + 1) / 2 + w * below[p]
            share = 0.8 if w <= 4 else 0.3 if w <= 16 else 0.1 if w <= 48 else 0.05
            r = float(below[c])
            added = wide[c] * (float(rows) ** 2 - r * r)
            if more <= share * total or (r >= _TALL and added <= _ENTRY * r * r):
                top[c], wide[p], zeros[p] = p, w, more
                last = head[c]  # its children are the parent's
                if last != -1:
                    while following[last] != -1:
                        last = following[last]
                    following[last] = after
                    after = head[c]
            else:
                following[c] = kept
                kept = c
            c = after
        head[p] = kept
        if up[p] != -1:
            following[p] = head[up[p]]
            head[up[p]] = p
    for c in range(s - 1, -1, -1):
        top[c] = top[top[c]]


@compiled
def _rows(start, index, order, place, first, of_column, row_start):
    """Rows of each supernode, in no order: sorting takes longer to compile than all the rest."""
    n, s = len(order), len(first) - 1
    rows = np.empty(row_start[s], np.int64)
    mark, head, following = np.empty(n, np.int64), np.empty(s, np.int64), np.empty(s, np.int64)
    for j in range(n):
        mark[j] = -1
    for b in range(s):
        head[b] = following[b] = -1
    for b in range(s):
        lo, hi, used = first[b], first[b + 1], row_start[b]
        for j in range(lo, hi):
            rows[used] = j
            used += 1
        for j in range(lo, hi):
            column = order[j]
            for p in range(start[column], start[column + 1]):
                i = place[index[p]]
                if i >= hi and mark[i] != b:
                    mark[i] = b
                    rows[used] = i
                    used += 1
        child = head[b]
        while child != -1:
            for p in range(row_start[child], row_start[child + 1]):
                i = rows[p]
                if i >= hi and mark[i] != b:
                    mark[i] = b
                    rows[used] = i
                    used += 1
            child = following[child]
        below = row_start[b] + hi - lo
        if used > below:
            least = n
            for p in range(below, used):
                least = min(least, rows[p])
            above = of_column[least]
            following[b] = head[above]
            head[above] = b
    return rows


def _largest_update(
    first: np.ndarray, of_column: np.ndarray, row_start: np.ndarray, rows: np.ndarray
) -> int:
    """Entries of the largest update: what a supernode's rows are to one of those after it."""
    own = np.repeat(np.arange(len(first) - 1), np.diff(row_start))
    to = of_column[rows]
    # Where within a supernode's rows those of another begin, and those of the next one.
    begins = np.flatnonzero(np.diff(own * len(first) + to, prepend=-1))
    ends = np.append(begins[1:], len(rows))
    size = (row_start[own[begins] + 1] - begins) * (ends - begins)
    return int(size[to[begins] != own[begins]].max(initial=1))


@compiled
def _where(low, high, first, of_column, row_start, rows, value_start):
    found = np.empty(len(low), np.int64)
    for e in range(len(low)):
        b = of_column[high[e]]
        begin, end = row_start[b], row_start[b + 1]
        p, last = begin, end
        while p < last:
            middle = (p + last) // 2
            if rows[middle] < low[e]:
                p = middle + 1
            else:
                last = middle
        if p == end or rows[p] != low[e]:
            found[e] = -1
        else:
            width = first[b + 1] - first[b]
            found[e] = value_start[b] + (p - begin) * width + high[e] - first[b]
    return found
