"""Solves with the factor, supernode by supernode."""

from __future__ import annotations

import numpy as np

from openreml_nn.likelihood.system.sparse.blas import gemm, trsm, trsv
from openreml_nn.support.compilation import compiled

__all__ = ["NARROW", "backward", "forward"]

_R, _N, _T, _U = 82, 78, 84, 85  # characters
#: Blocks with fewer columns are multiplied in loops: a call would take longer.
NARROW = 4
#: Fewer right-hand sides are solved for one by one.
_FEW = 4


@compiled
def forward(routines, first, row_start, rows, value_start, values, x):
    """:math:`L^{-1} x` in place, for x (n, m)."""
    m = x.shape[1]
    most = 1
    for s in range(len(first) - 1):
        most = max(most, row_start[s + 1] - row_start[s] - first[s + 1] + first[s])
    work = np.empty((most, m))
    base, at_x, room = values.ctypes.data, x.ctypes.data, work.ctypes.data
    for s in range(len(first) - 1):
        lo, w = first[s], first[s + 1] - first[s]
        begin, below = row_start[s] + w, row_start[s + 1] - row_start[s] - w
        own = value_start[s]
        if w <= NARROW:
            for k in range(w):
                root = values[own + k * w + k]
                for c in range(m):
                    x[lo + k, c] /= root
                for i in range(k + 1, w):
                    a = values[own + i * w + k]
                    for c in range(m):
                        x[lo + i, c] -= a * x[lo + k, c]
            for i in range(below):
                row = rows[begin + i]
                for k in range(w):
                    a = values[own + (w + i) * w + k]
                    if a != 0.0:
                        for c in range(m):
                            x[row, c] -= a * x[lo + k, c]
            continue
        if m < _FEW:
            for c in range(m):
                trsv(routines, (_U, _T, _N, w, base + 8 * own, w, at_x + 8 * (lo * m + c), m))
        else:  # by columns that is X' op(A')^-1
            trsm(routines, (
                _R, _U, _N, _N, m, w, 1.0, base + 8 * own, w, at_x + 8 * lo * m, m,
            ))  # fmt: skip
        if below:
            gemm(routines, (
                _N, _N, m, below, w, 1.0, at_x + 8 * lo * m, m,
                base + 8 * (own + w * w), w, 0.0, room, m,
            ))  # fmt: skip
            for i in range(below):
                row = rows[begin + i]
                for c in range(m):
                    x[row, c] -= work[i, c]
    return work[0, 0]


@compiled
def backward(routines, first, row_start, rows, value_start, values, x):
    r""":math:`L^{-\top} x` in place, for x (n, m)."""
    m = x.shape[1]
    most = 1
    for s in range(len(first) - 1):
        most = max(most, row_start[s + 1] - row_start[s] - first[s + 1] + first[s])
    work = np.empty((most, m))
    base, at_x, room = values.ctypes.data, x.ctypes.data, work.ctypes.data
    for s in range(len(first) - 2, -1, -1):
        lo, w = first[s], first[s + 1] - first[s]
        begin, below = row_start[s] + w, row_start[s + 1] - row_start[s] - w
        own = value_start[s]
        if w <= NARROW:
            for i in range(below):
                row = rows[begin + i]
                for k in range(w):
                    a = values[own + (w + i) * w + k]
                    if a != 0.0:
                        for c in range(m):
                            x[lo + k, c] -= a * x[row, c]
        elif below:
            for i in range(below):
                row = rows[begin + i]
                for c in range(m):
                    work[i, c] = x[row, c]
            gemm(routines, (
                _N, _T, m, w, below, -1.0, room, m,
                base + 8 * (own + w * w), w, 1.0, at_x + 8 * lo * m, m,
            ))  # fmt: skip
        if w > NARROW and m < _FEW:
            for c in range(m):
                trsv(routines, (_U, _N, _N, w, base + 8 * own, w, at_x + 8 * (lo * m + c), m))
            continue
        if w > NARROW:
            trsm(routines, (
                _R, _U, _T, _N, m, w, 1.0, base + 8 * own, w, at_x + 8 * lo * m, m,
            ))  # fmt: skip
            continue
        for k in range(w - 1, -1, -1):
            root = values[own + k * w + k]
            for c in range(m):
                x[lo + k, c] /= root
            for j in range(k):
                a = values[own + k * w + j]
                for c in range(m):
                    x[lo + j, c] -= a * x[lo + k, c]
    return work[0, 0]
