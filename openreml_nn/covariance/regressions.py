"""Regressions of places on their neighbours, with derivatives by the length of the correlation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openreml_nn.covariance.correlation import Correlation
from openreml_nn.covariance.nodes import functorch, has_values
from openreml_nn.support.compilation import compiled

__all__ = ["Regressions"]

#: Places whose regressions are computed at once, so that what is held is in the processor's cache.
_AT_ONCE = 256
#: So many places are worth compiled code, which the sparse solver loads for as many columns.
_MANY = 500
#: In lengths: a length near zero would make distances infinite, where correlations are zero long
#: before.
_FARTHEST = 1e4
_EPS = float(np.finfo(np.float64).eps)


@dataclass(frozen=True)
class Regressions:
    r"""The regressions of places on neighbours, as they depend on the logarithm of the length.

    With C the correlations among the neighbours of a place and c those with it, its weights are
    :math:`b = C^{-1} c` and its variance beside them is :math:`d = 1 - c^\top b`.

    Args:
        places: (k, s) the places.
        others: (q, s) those among which the neighbours are.
        neighbours: (k, m) the neighbours of each; -1 past the last.
        correlation: what it is.
        pairs: (k, (m + 1)(m + 2)/2) where the distances of the pairs of a place and its neighbours,
            the place first, stand in ``apart``, those of a lower triangle row by row; None where each
            is computed when it is needed.
        apart: (e,) distances.
    """

    places: Tensor
    others: Tensor
    neighbours: Tensor
    correlation: Correlation
    pairs: np.ndarray | None = None
    apart: Tensor | None = None
    #: The last length without a graph, and what was computed there: plain numbers.
    _kept: dict[float, list[Tensor]] = field(default_factory=dict, repr=False, compare=False)

    def at(self, log_length: Tensor, order: int = 0) -> Tensor:
        """d (k,) and then the weights (k, m), row by row, or their first or second derivatives.

        They are differentiable up to the second derivative. Where rounding leaves no variance, d is
        NaN.
        """
        if functorch():
            # Forward mode within forward mode forgets what a custom function has saved.
            return self.computed(log_length, order)[order]
        return _Regressed.apply(log_length, self, order)

    def derivative(self, log_length: Tensor, order: int) -> Tensor:
        """What :meth:`at` returns, or its first or second derivative."""
        if not has_values(log_length):
            return self.computed(log_length, order)[order]
        with torch.inference_mode(False), torch.no_grad():
            key = float(log_length)
            known = self._kept.get(key, [])
            if order >= len(known):
                # Who asks for one derivative of a fit asks for the other next.
                most = 2 if order else 0
                is_many = len(self.places) >= _MANY and self.places.device.type == "cpu"
                known = self._many(key, most) if is_many else self.computed(log_length, most)
                self._kept.clear()
                self._kept[key] = known
            return known[order].clone()

    def computed(self, log_length: Tensor, order: int) -> list[Tensor]:
        """The regressions with their derivatives up to an order."""
        parts = [
            self._part(log_length, order, slice(i, i + _AT_ONCE))
            for i in range(0, len(self.places), _AT_ONCE)
        ]
        found = []
        for each in zip(*parts, strict=True):
            d, B = (torch.cat(part) for part in zip(*each, strict=True))
            found.append(torch.cat([d, B.reshape(-1)]))
        return found

    def _many(self, log_length: float, order: int) -> list[Tensor]:
        """:meth:`computed` for many places, by compiled code."""
        (k, m), correlation = self.neighbours.shape, self.correlation
        kinds = (correlation.value, correlation.slope, correlation.bend)
        count = (self.neighbours >= 0).sum(1).numpy()
        d, B = np.zeros((3, k)), np.zeros((3, k, m))
        for rows, apart, pairs in self._pairs():
            r = (apart / np.exp(log_length)).clamp(max=_FARTHEST)
            values = [kind(r).numpy() for kind in kinds[: order + 1]]
            values += values[:1] * (2 - order)  # not looked at
            _regressed(pairs, *values, count[rows], order, d[:, rows], B[:, rows])
        found = np.concatenate([d, B.reshape(3, -1)], 1)
        return list(torch.from_numpy(found[: order + 1]))

    def _pairs(self) -> Iterator[tuple[slice, Tensor, np.ndarray]]:
        """Some places, distances, and where those of the pairs of each place stand among them."""
        k, m = self.neighbours.shape
        if self.pairs is not None and self.apart is not None:
            yield slice(0, k), self.apart, self.pairs
            return
        p, q = np.tril_indices(m + 1)
        for start in range(0, k, 16 * _AT_ONCE):
            rows = slice(start, start + 16 * _AT_ONCE)
            own = self.places[rows, None].double()
            both = torch.cat([own, self.others[self.neighbours[rows].clamp(min=0)].double()], 1)
            apart = torch.linalg.vector_norm(both[:, p] - both[:, q], dim=-1)
            pairs = np.arange(apart.numel(), dtype=np.int32).reshape(apart.shape)
            yield rows, apart.reshape(-1), pairs

    def _part(self, log_length: Tensor, order: int, rows: slice) -> list[tuple[Tensor, Tensor]]:
        """d and the weights of some places, with their derivatives."""
        at, own = self.neighbours[rows], self.places[rows].double()
        missing, k, m = at < 0, *at.shape
        if not m:
            zero = own.new_zeros(k) + 0 * log_length
            return [(zero + (i == 0), own.new_zeros(k, 0)) for i in range(order + 1)]
        near = self.others[at.clamp(min=0)].double()  # (k, m, s)
        length = log_length.exp()
        is_full = has_values(at) and not bool(missing.any())
        apart = missing[:, :, None] | missing[:, None, :]
        kinds = (self.correlation.value, self.correlation.slope, self.correlation.bend)

        r = (torch.linalg.vector_norm(near - own[:, None], dim=-1) / length).clamp(max=_FARTHEST)
        c = [f(r) for f in kinds[: order + 1]]
        r = torch.linalg.vector_norm(near[:, :, None] - near[:, None], dim=-1) / length
        r = r.clamp(max=_FARTHEST)
        C = [f(r) for f in kinds[: order + 1]]
        if not is_full:
            c = [x.masked_fill(missing, 0.0) for x in c]
            C = [x.masked_fill(apart, 0.0) for x in C]
            C[0] = C[0] + torch.diag_embed(missing.to(C[0]))
        factor, info = torch.linalg.cholesky_ex(C[0])

        def solved(x: Tensor) -> Tensor:
            return torch.cholesky_solve(x[..., None], factor)[..., 0]

        def times(A: Tensor, x: Tensor) -> Tensor:
            return (A @ x[..., None])[..., 0]

        b = solved(c[0])
        d = 1 - (c[0] * b).sum(-1)
        d = torch.where((info == 0) & (d > torch.finfo(d.dtype).eps), d, torch.nan)
        found = [(d, b)]
        if order > 0:
            # C b = c and its derivatives; of d the terms with those of b fall out.
            b1 = solved(c[1] - times(C[1], b))
            found.append(((times(C[1], b) * b - 2 * c[1] * b).sum(-1), b1))
        if order > 1:
            b2 = solved(c[2] - 2 * times(C[1], b1) - times(C[2], b))
            bent = times(C[2], b) * b + 2 * times(C[1], b) * b1 - 2 * c[2] * b - 2 * c[1] * b1
            found.append((bent.sum(-1), b2))
        return found


class _Regressed(torch.autograd.Function):
    """Regressions as one operation of autograd: what it keeps is the length alone."""

    @staticmethod
    def forward(log_length: Tensor, regressions: Regressions, order: int) -> Tensor:
        return regressions.derivative(log_length, order)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        log_length, ctx.regressions, ctx.order = inputs
        ctx.save_for_backward(log_length)
        ctx.save_for_forward(log_length)

    @staticmethod
    def _following(ctx: Any) -> int:
        if ctx.order == 2:
            raise NotImplementedError("neighbours have no third derivative by the length")
        return int(ctx.order) + 1

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        (log_length,) = ctx.saved_tensors
        slope = _Regressed.apply(log_length, ctx.regressions, _Regressed._following(ctx))
        return (cotangent * slope).sum().reshape(1), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        (log_length,) = ctx.saved_tensors
        order = _Regressed._following(ctx)
        return tangent * ctx.regressions.computed(log_length, order)[order]


@compiled
def _regressed(pairs, value, slope, bend, count, order, d, B):
    """d (3, k) and the weights (3, k, m) with their derivatives up to an order, see
    :class:`Regressions`; ``value``, ``slope`` and ``bend`` of the correlation at the distances."""
    m = B.shape[2]
    L, C1 = np.empty((m, m)), np.empty((m, m))
    y, first, second = np.empty(m), np.empty(m), np.empty(m)
    for i in range(len(count)):
        k, left = count[i], 1.0
        # The factor of C, row by row, and y = L^-1 c.
        for p in range(k):
            at = (p + 1) * (p + 2) // 2
            rest = 1.0
            y[p] = value[pairs[i, at]]
            for j in range(p):
                x = value[pairs[i, at + 1 + j]]
                for t in range(j):
                    x -= L[p, t] * L[j, t]
                x /= L[j, j]
                L[p, j] = x
                rest -= x * x
                y[p] -= x * y[j]
            if not rest > 0.0:
                left = np.nan
                break
            L[p, p] = np.sqrt(rest)
            y[p] /= L[p, p]
            left -= y[p] * y[p]
        if not left > _EPS:
            d[:, i] = np.nan
            B[:, i] = np.nan
            continue
        d[0, i] = left
        b = B[0, i]
        for p in range(k):
            b[p] = y[p]
        _solved_back(L, k, b)
        if order == 0:
            continue
        # C b = c and its derivatives; of d the terms with those of b fall out.
        for p in range(k):
            first[p] = 0.0
            second[p] = 0.0
        for p in range(k):
            at = (p + 1) * (p + 2) // 2 + 1
            for j in range(p):
                x, z = slope[pairs[i, at + j]], bend[pairs[i, at + j]]
                C1[p, j] = x
                first[p] += x * b[j]
                first[j] += x * b[p]
                second[p] += z * b[j]
                second[j] += z * b[p]
        b1, b2 = B[1, i], B[2, i]
        for p in range(k):
            at = (p + 1) * (p + 2) // 2
            c1, c2 = slope[pairs[i, at]], bend[pairs[i, at]]
            d[1, i] += (first[p] - 2.0 * c1) * b[p]
            d[2, i] += (second[p] - 2.0 * c2) * b[p]
            b1[p] = c1 - first[p]
            b2[p] = c2 - second[p]
            first[p] -= c1
        _solved_forth(L, k, b1)
        _solved_back(L, k, b1)
        for p in range(k):
            d[2, i] += 2.0 * first[p] * b1[p]
            for j in range(p):
                b2[p] -= 2.0 * C1[p, j] * b1[j]
                b2[j] -= 2.0 * C1[p, j] * b1[p]
        _solved_forth(L, k, b2)
        _solved_back(L, k, b2)
    return order


@compiled
def _solved_forth(L, k, x):
    """L^-1 x in place."""
    for p in range(k):
        for j in range(p):
            x[p] -= L[p, j] * x[j]
        x[p] /= L[p, p]
    return k


@compiled
def _solved_back(L, k, x):
    """L^-T x in place."""
    for p in range(k - 1, -1, -1):
        x[p] /= L[p, p]
        for j in range(p):
            x[j] -= L[p, j] * x[p]
    return k
