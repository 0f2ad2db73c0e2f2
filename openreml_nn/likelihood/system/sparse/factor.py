r"""The Cholesky factor of a sparse matrix by supernodes, solves with it, and its selected inverse.

The factor is computed from left to right: a supernode takes the products of those before it that
reach into its columns. The entries of :math:`A^{-1}` within the pattern of L follow from right to
left by :math:`Z_{RS} = -Z_{RR} L_{RS} L_{SS}^{-1}` and
:math:`Z_{SS} = (L_{SS} L_{SS}^\top)^{-1} - L_{SS}^{-\top} L_{RS}^\top Z_{RS}`.

Reference:
    Ng and Peyton, SIAM Journal on Scientific Computing 14 (1993) 1034; Takahashi, Fagan and Chin,
    8th PICA Conference (1973); Campbell and Davis, technical report TR-95-021 (University of
    Florida, 1995).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cached_property

import numpy as np

from openreml_nn.likelihood.system.sparse.blas import (
    ROUTINES,
    gemm,
    potrf,
    potri,
    symm,
    syrk,
    trsm,
)
from openreml_nn.likelihood.system.sparse.columns import inverse_of_run, subtract_by_line
from openreml_nn.likelihood.system.sparse.symbolic import PANEL, Symbolic
from openreml_nn.likelihood.system.sparse.triangles import NARROW, backward, forward
from openreml_nn.support.compilation import compiled
from openreml_nn.support.errors import NotPositiveDefiniteError

__all__ = ["Factor"]

_L, _R, _N, _T, _U = 76, 82, 78, 84, 85  # characters
#: Blocks with more entries are larger than the cache.
_LARGE = 60_000


class Factor:
    r""":math:`P A P^\top = L L^\top` of one matrix.

    Args:
        symbolic: its pattern.
        values: the entries of A where :meth:`Symbolic.where` says, zeros elsewhere; taken over and
            overwritten.
        progress: called with ``"factor"`` or ``"inverse"`` and the share of its work that is done,
            every few seconds of what takes longer than that.

    Attributes:
        log_det: :math:`\log|A|`.
        loss: how many times rounding is magnified in the pivots, at most.

    Raises:
        NotPositiveDefiniteError: if A is not positive definite.
    """

    def __init__(
        self,
        symbolic: Symbolic,
        values: np.ndarray,
        progress: Callable[[str, float], None] | None = None,
    ) -> None:
        self.symbolic = s = symbolic
        self.values = values
        self._progress = progress
        self._entries = diagonal = values[self.symbolic.diagonal]
        count, work = len(s.first) - 1, np.empty(s.work)
        head, link = np.full(count, -1, np.int64), np.full(count, -1, np.int64)
        state = head, link, np.zeros(count, np.int64)
        for low, high in itertools.pairwise(s.pieces):
            failed = _factor(ROUTINES, low, high, *state, *s.pattern, values, work)
            if failed >= 0:
                raise NotPositiveDefiniteError("the matrix is not positive definite")
            self._report("factor", high / count)
        pivots = values[self.symbolic.diagonal]
        if not np.isfinite(pivots).all():
            raise NotPositiveDefiniteError("the matrix is not positive definite")
        self.log_det = 2.0 * float(np.log(pivots).sum())
        self.loss = float((diagonal / pivots**2).max(initial=1.0))

    def _report(self, what: str, share: float) -> None:
        if self._progress is not None and len(self.symbolic.pieces) > 2:
            self._progress(what, share)

    @property
    def noise(self) -> float:
        r"""What rounding of the entries of A leaves unknown of :math:`\log|A|`, of the order of
        :math:`\epsilon \sqrt{\sum_i (A_{ii} (A^{-1})_{ii})^2}`."""
        spread = self._entries * self.inverse[self.symbolic.diagonal]
        return float(np.finfo(np.float64).eps * np.linalg.norm(spread))

    def half(self, x: np.ndarray) -> np.ndarray:
        r""":math:`L^{-1} P x` for x (n, m)."""
        found = np.ascontiguousarray(x[self.symbolic.order], dtype=np.float64)
        self._run(found, False)
        return found

    def back(self, x: np.ndarray) -> np.ndarray:
        r""":math:`P^\top L^{-\top} x` for x (n, m)."""
        found = np.array(x, dtype=np.float64, order="C")
        self._run(found, True)
        return found[self.symbolic.place]

    @staticmethod
    def inner(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        r""":math:`x^\top A^{-1} y` from :meth:`half` of x and of y."""
        return np.asarray(one.T @ other)

    def solve(self, x: np.ndarray) -> np.ndarray:
        r""":math:`A^{-1} x` for x (n, m)."""
        return self.back(self.half(x))

    def _run(self, x: np.ndarray, backwards: bool) -> None:
        s = self.symbolic
        if not x.size:
            return
        run = backward if backwards else forward
        run(ROUTINES, s.first, s.row_start, s.rows, s.value_start, self.values, x)

    @cached_property
    def inverse(self) -> np.ndarray:
        """Entries of the inverse of A in the pattern of L, where :meth:`Symbolic.where` says."""
        s = self.symbolic
        below = np.diff(s.row_start) - np.diff(s.first)
        room = int(below.max(initial=0))
        found = s.memory.take()
        square = np.empty(max(room * min(room, PANEL), 1))
        half = np.empty(max(int((below * np.diff(s.first)).max(initial=1)), 1))
        for low, high, run in s.pieces_with_runs:
            if run is not None:
                inverse_of_run(*run, *s.pattern, self.values, found)
            else:
                _selected(ROUTINES, low, high, *s.pattern, self.values, found, square, half)
            self._report("inverse", 1 - low / (len(s.first) - 1))
        return found


@compiled
def _factor(
    routines, low, high, head, link, reached, first, of_column, row_start, rows, value_start, values,
    work,
):  # fmt: skip
    """Some supernodes of the factor in place; -1, or the one that has no positive pivot.

    Those before a supernode that have products for it are a list of which the first stands in
    ``head`` and the next ones in ``link``; ``reached`` is how far each of them is.
    """
    count = len(first) - 1
    local = np.zeros(len(of_column), np.int64)
    narrow, begins = np.empty(count, np.int64), np.empty(count, np.int64)
    ends, lasts = np.empty(count, np.int64), np.empty(count, np.int64)
    base, room = values.ctypes.data, work.ctypes.data
    for s in range(low, high):
        lo, hi = first[s], first[s + 1]
        w, begin, end = hi - lo, row_start[s], row_start[s + 1]
        own, few = value_start[s], 0
        is_large = w * (end - begin) > _LARGE
        d = head[s]
        if d != -1:
            for p in range(begin, end):
                local[rows[p]] = p - begin
        while d != -1:
            following = link[d]
            wd, start_d, end_d = first[d + 1] - first[d], row_start[d], row_start[d + 1]
            k1 = reached[d]
            k2 = k1
            while k2 < end_d and rows[k2] < hi:
                k2 += 1
            high, wide = end_d - k1, k2 - k1
            source = value_start[d] + (k1 - start_d) * wd
            if wd <= NARROW and is_large:
                narrow[few], begins[few], ends[few], lasts[few] = d, k1, k2, end_d
                few += 1
            elif wd <= NARROW:
                for i in range(high):
                    target = own + local[rows[k1 + i]] * w - lo
                    for k in range(wd):
                        x = values[source + i * wd + k]
                        if x != 0.0:
                            for j in range(min(i + 1, wide)):
                                values[target + rows[k1 + j]] -= x * values[source + j * wd + k]
            else:
                at = base + 8 * source
                syrk(routines, (_U, _T, wide, wd, 1.0, at, wd, 0.0, room, wide))
                if high > wide:
                    gemm(routines, (
                        _T, _N, wide, high - wide, wd, 1.0, at, wd,
                        at + 8 * wide * wd, wd, 0.0, room + 8 * wide * wide, wide,
                    ))  # fmt: skip
                for i in range(high):
                    target = own + local[rows[k1 + i]] * w - lo
                    for j in range(min(i + 1, wide)):
                        values[target + rows[k1 + j]] -= work[i * wide + j]
            reached[d] = k2
            if k2 < end_d:
                above = of_column[rows[k2]]
                link[d] = head[above]
                head[above] = d
            d = following
        if few:
            subtract_by_line(
                narrow[:few], begins[:few], ends[:few], lasts[:few], end - begin, local,
                first, row_start, rows, value_start, values, own - lo, w,
            )  # fmt: skip
        below = end - begin - w
        if w == 1:
            pivot = values[own]
            if not pivot > 0.0:
                return s
            root = np.sqrt(pivot)
            values[own] = root
            for p in range(own + 1, own + 1 + below):
                values[p] /= root
        else:
            if potrf(routines, (_U, w, base + 8 * own, w)) != 0:
                return s
            if below:
                trsm(routines, (
                    _L, _U, _T, _N, w, below, 1.0, base + 8 * own, w, base + 8 * (own + w * w), w,
                ))  # fmt: skip
        if below:
            reached[s] = begin + w
            above = of_column[rows[begin + w]]
            link[s] = head[above]
            head[above] = s
    return -1 + 0 * int(work[0] != work[0])


@compiled
def _selected(
    routines, low, high, first, of_column, row_start, rows, value_start, values, found, square, half
):
    """The inverse in the columns of some supernodes, those after them known."""
    base, at, room, at_half = (
        values.ctypes.data,
        found.ctypes.data,
        square.ctypes.data,
        half.ctypes.data,
    )
    where = np.empty(len(of_column), np.int64)
    for s in range(high - 1, low - 1, -1):
        w = first[s + 1] - first[s]
        begin, end = row_start[s] + w, row_start[s + 1]
        r, own = end - begin, value_start[s]
        for p in range(w * w):
            found[own + p] = values[own + p]
        if w == 1:
            found[own] = 1.0 / (values[own] * values[own])
        else:
            potri(routines, (_U, w, at + 8 * own, w))  # what is above the diagonal is not looked at
        if r == 0:
            continue
        # Y' = L_SS^-T L_RS', by columns (w, r).
        for p in range(w * r):
            half[p] = values[own + w * w + p]
        if w == 1:
            for p in range(r):
                half[p] /= values[own]
        else:
            trsm(routines, (_L, _U, _N, _N, w, r, 1.0, base + 8 * own, w, at_half, w))
        inner = at + 8 * (own + w * w)
        for p in range(own + w * w, own + w * w + w * r):
            found[p] = 0.0
        # Z_RR by panels of rows of its lower triangle.
        for i1 in range(0, r, PANEL):
            i2 = min(i1 + PANEL, r)
            j1 = 0
            while j1 < i2:
                b = of_column[rows[begin + j1]]
                lo, hi = first[b], first[b + 1]
                wb, begin_b, end_b = hi - lo, row_start[b], row_start[b + 1]
                j2 = j1
                while j2 < r and rows[begin + j2] < hi:
                    j2 += 1
                for i in range(max(i1, j1), min(i2, j2)):
                    where[i] = rows[begin + i] - lo
                p = begin_b + wb
                if end_b - p == r - j2:
                    for i in range(max(i1, j2), i2):
                        where[i] = wb + i - j2
                else:
                    for i in range(max(i1, j2), i2):
                        row = rows[begin + i]
                        step = 1
                        while p + step < end_b and rows[p + step] <= row:
                            p += step
                            step *= 2
                        while rows[p] != row:
                            if p + step < end_b and rows[p + step] <= row:
                                p += step
                            elif step > 1:
                                step //= 2
                            else:
                                p += 1
                        where[i] = p - begin_b
                source = value_start[b] - lo
                for i in range(max(i1, j1), i2):
                    line, to = source + where[i] * wb, (i - i1) * r
                    for j in range(j1, min(i + 1, j2)):
                        square[to + j] = found[line + rows[begin + j]]
                j1 = j2
            m, of_panel = i2 - i1, at_half + 8 * i1 * w
            symm(routines, (
                _R, _U, w, m, -1.0, room + 8 * i1, r, of_panel, w, 1.0, inner + 8 * i1 * w, w,
            ))  # fmt: skip
            if i1:
                gemm(routines, (
                    _N, _T, w, i1, m, -1.0, of_panel, w, room, r, 1.0, inner, w,
                ))  # fmt: skip
                gemm(routines, (
                    _N, _N, w, m, i1, -1.0, at_half, w, room, r, 1.0, inner + 8 * i1 * w, w,
                ))  # fmt: skip
        gemm(routines, (
            _N, _T, w, w, r, -1.0, at_half, w, inner, w, 1.0, at + 8 * own, w,
        ))  # fmt: skip
    return half[0] + square[0]
