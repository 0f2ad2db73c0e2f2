"""What many narrow supernodes give to a large block, and take from it, line by line of the block.

The rows of a narrow supernode are far apart in a block that is larger than the processor's cache.
All supernodes that reach into a line are therefore taken together, while it is there.

Reference:
    Gustavson, ACM Transactions on Mathematical Software 4 (1978) 250.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from openreml_nn.support.compilation import compiled

__all__ = ["Run", "inverse_of_run", "runs_of", "subtract_by_line"]

#: Runs with fewer products are not worth an order of their own.
_FEW = 100_000


@compiled
def subtract_by_line(
    which, begin, end, last, lines, local, first, row_start, rows, value_start, values, target, w
):
    """Take the products of supernodes with themselves off a block.

    Args:
        which: the supernodes.
        begin, end: of the rows of each that are columns of the block, as places in ``rows``.
        last: where the rows of each end.
        lines: rows of the block.
        local: which line of the block a row is.
        target: where the block begins among the values, less its first column.
        w: columns of the block.
    """
    start = np.zeros(lines + 1, np.int64)
    for c in range(len(which)):
        for p in range(begin[c], last[c]):
            start[local[rows[p]] + 1] += 1
    for i in range(lines):
        start[i + 1] += start[i]
    place, owner = np.empty(start[lines], np.int64), np.empty(start[lines], np.int64)
    free = start[:-1].copy()
    for c in range(len(which)):
        for p in range(begin[c], last[c]):
            at = free[local[rows[p]]]
            place[at], owner[at] = p, c
            free[local[rows[p]]] += 1
    for i in range(lines):
        line = target + i * w
        for e in range(start[i], start[i + 1]):
            p, c = place[e], owner[e]
            d = which[c]
            wide = first[d + 1] - first[d]
            source = value_start[d] - row_start[d] * wide
            for k in range(wide):
                x = values[source + p * wide + k]
                if x != 0.0:
                    for q in range(begin[c], min(p + 1, end[c])):
                        values[line + rows[q]] -= x * values[source + q * wide + k]


class Run(NamedTuple):
    """Supernodes side by side, of one column each, none a descendant of another.

    Attributes:
        low, high: the first of them, and the one after the last.
        line: (m,) where, among the rows of all supernodes, a row of one of them stands in a block
            that has other rows of it as columns; ascending.
        column: (m,) which of them it is.
        place: (m,) which of its rows, as a place in the rows of all.
        segment: (m,) the first of its rows that are columns of that block, likewise.
    """

    low: int
    high: int
    line: np.ndarray
    column: np.ndarray
    place: np.ndarray
    segment: np.ndarray


def runs_of(
    first: np.ndarray, of_column: np.ndarray, row_start: np.ndarray, rows: np.ndarray
) -> list[Run]:
    """Runs with many products, from right to left; see :class:`Symbolic` for the pattern."""
    found = []
    lows, highs = np.empty(len(first), np.int64), np.empty(len(first), np.int64)
    count = _bounds(first, row_start, rows, lows, highs)
    for low, high in zip(lows[:count].tolist(), highs[:count].tolist(), strict=True):
        line, column, place, segment = _lines(low, high, first, of_column, row_start, rows)
        order = np.argsort(line)  # those of one line are of different columns, in any order
        found.append(Run(low, high, line[order], column[order], place[order], segment[order]))
    return found


@compiled
def _bounds(first, row_start, rows, lows, highs):
    """Write where runs with many products begin and end, from right to left, to ``lows`` and ``highs``,
    and give how many there are."""
    count, high = 0, len(first) - 1
    while high > 0:
        low, products = high, 0
        while low > 0 and first[low] - first[low - 1] == 1:
            below, end = row_start[low - 1] + 1, row_start[low]
            if below < end and rows[below] < first[high]:
                break
            products += (end - below) * (end - below)
            low -= 1
        if products >= _FEW:
            lows[count], highs[count] = low, high
            count += 1
        high = min(low, high - 1)
    return count


def _lines(
    low: int,
    high: int,
    first: np.ndarray,
    of_column: np.ndarray,
    row_start: np.ndarray,
    rows: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Lines, columns, places and segments of a run, column by column."""
    place = np.arange(row_start[low], row_start[high])
    own = np.repeat(np.arange(low, high), np.diff(row_start[low : high + 1]))
    place, own = place[place > row_start[own]], own[place > row_start[own]]  # below the diagonal
    to = of_column[rows[place]]
    begins = np.flatnonzero(np.diff(own * len(first) + to, prepend=-1))
    # Each segment has a line for each of its rows, and of those below.
    count = row_start[own[begins] + 1] - place[begins]
    column, segment = np.repeat(own[begins], count), np.repeat(place[begins], count)
    q = segment + np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    block, row = np.repeat(to[begins], count), rows[q]
    line = row_start[block] + row - first[block]
    further = row >= first[block + 1]
    if further.any():
        size = first[-1]
        key = np.repeat(np.arange(len(first) - 1), np.diff(row_start)) * size + rows
        line[further] = np.searchsorted(key, block[further] * size + row[further])
    return line, column, q, segment


@compiled
def inverse_of_run(
    low, high, line, column, place, segment, first, of_column, row_start, rows, value_start, values,
    found,
):  # fmt: skip
    """The inverse in the columns of a run, whose arguments come first."""
    for p in range(value_start[low], value_start[high]):
        found[p] = 0.0
    for e in range(len(line)):
        s, q, p = column[e], place[e], segment[e]
        b = of_column[rows[p]]
        w, limit = first[b + 1] - first[b], first[b + 1]
        block = value_start[b] + (line[e] - row_start[b]) * w - first[b]
        own = value_start[s] - row_start[s]
        x, total = values[own + q], 0.0
        while p < q and rows[p] < limit:
            z = found[block + rows[p]]
            total += z * values[own + p]
            found[own + p] += z * x
            p += 1
        if p == q and rows[q] < limit:
            total += found[block + rows[q]] * x
        found[own + q] += total
    for s in range(low, high):
        own = value_start[s]
        root, total = values[own], 1.0
        for p in range(own + 1, value_start[s + 1]):
            total += values[p] * found[p]
            found[p] /= -root
        found[own] = total / (root * root)
