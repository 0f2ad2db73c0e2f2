r"""The joint error covariance of coefficients and BLUPs, by Henderson's mixed-model equations.

For :math:`y = X\beta + Z_1 b_1 + Z_2 b_2 + e` the covariance of the errors of
:math:`(\hat b_1, \hat b_2, \hat\beta)` is the inverse of

.. math:: \begin{pmatrix} Z_1^\top R^{-1} Z_1 + G_1^{-1} & A_{12} \\ A_{21} & A_{22} \end{pmatrix}

in which 2 stands for :math:`b_2` and :math:`\beta` together. With independent levels of the first
factor its part is block diagonal, :math:`P_i` of each level, and the rest follows from the
covariance C of the second part and :math:`M = P A_{12}`: the error of :math:`z_1^\top\hat b_1 +
w_2^\top(\hat b_2, \hat\beta)` has the variance

.. math:: z_1^\top P_i z_1 + (w_2 - M_i^\top z_1)^\top C (w_2 - M_i^\top z_1).

Reference:
    Henderson, Biometrics 31 (1975) 423, section 3; Robinson, Statistical Science 6 (1991) 15.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.sparse import csr_array
from torch import Tensor, nn

from openreml_nn.likelihood.problem import cholesky
from openreml_nn.likelihood.system.products import Statistics
from openreml_nn.terms.covariance import DenseCovariance
from openreml_nn.terms.design import IndexedDesign

__all__ = ["Factor", "JointErrors"]

#: More columns than these beside the first factor's are not held, their square at once.
MOST_COLUMNS = 2_000
#: Numbers that are held at a time for the rows that are asked for.
_NUMBERS = 10_000_000


@dataclass(frozen=True)
class Factor:
    """The rows of one random effect and its covariance.

    Attributes:
        design: codes (n,), -1 for a level that is not known, and values (n, k).
        covariance: G of the effects of a level (k, k), or of all levels.
        is_per_level: whether it is that of a level.
    """

    design: IndexedDesign
    covariance: Tensor
    is_per_level: bool

    @property
    def size(self) -> int:
        """Number of columns."""
        return self.design.shape[1]

    def values(self, like: Tensor) -> Tensor:
        """Values of the rows (n, k)."""
        own = self.design.values
        return like.new_ones(self.design.shape[0], 1) if own is None else own.to(like)

    def root(self) -> Tensor:
        r"""Λ of :math:`G = ΛΛ^\top`, of a level or of all."""
        return DenseCovariance(self.covariance).root().matrix

    def whole_root(self) -> Tensor:
        """Λ of all levels (q, q)."""
        root = self.root()
        return torch.block_diag(*[root] * self.design.levels) if self.is_per_level else root


class JointErrors(nn.Module):
    """What the variance of a prediction needs; its buffers travel with the checkpoint.

    Attributes:
        is_known: whether there were data.
        is_exact: whether the parts below were computed from them.
        first: which factor is eliminated first, -1 for none.
        conditional: :math:`P` (levels, k, k) of that factor.
        starts, columns, entries: :math:`M` (levels · k, m) by the columns that each level meets.
        covariance: :math:`C` (m, m) of the other factors' effects and the coefficients.
        basis: (p, r) what the r coefficients in ``covariance`` are for: columns of
            :math:`X \\cdot` ``basis`` are orthonormal.
    """

    is_known: Tensor
    is_exact: Tensor
    first: Tensor
    conditional: Tensor
    starts: Tensor
    columns: Tensor
    entries: Tensor
    covariance: Tensor
    basis: Tensor

    def __init__(self) -> None:
        super().__init__()
        none = torch.zeros(0, dtype=torch.float64)
        self.register_buffer("is_known", torch.tensor(False))
        self.register_buffer("is_exact", torch.tensor(False))
        self.register_buffer("first", torch.tensor(-1))
        self.register_buffer("conditional", none.reshape(0, 0, 0))
        self.register_buffer("starts", torch.zeros(1, dtype=torch.long))
        self.register_buffer("columns", torch.zeros(0, dtype=torch.long))
        self.register_buffer("entries", none.reshape(0, 0))
        self.register_buffer("covariance", none.reshape(0, 0))
        self.register_buffer("basis", none.reshape(0, 0))

    @torch.no_grad()
    def update(
        self, factors: Sequence[Factor], Q: Tensor, precision: Tensor, basis: Tensor
    ) -> None:
        """Compute the parts from all rows, unless there are more than 2,000 columns beside those of
        the first factor, the widest of independent levels.

        Args:
            factors: the random effects.
            Q: X in an orthonormal basis, (n, r).
            precision: 1 / the residual variance of each row (n,).
            basis: :math:`Q = X \\cdot` ``basis``, (p, r).
        """
        self.is_known.fill_(True)
        self.is_exact.fill_(False)
        sizes = [factor.size if factor.is_per_level else -1 for factor in factors]
        first = max(range(len(sizes)), key=sizes.__getitem__) if max(sizes) > 0 else -1
        rest = [factor for i, factor in enumerate(factors) if i != first]
        q, r = sum(factor.size for factor in rest), Q.shape[1]
        if q + r > MOST_COLUMNS:
            return
        # Products with R^-1 of the rest, an effect a column, and of the orthonormal X.
        S = Q.new_zeros(q + r, q + r)
        starts = [sum(f.size for f in rest[:i]) for i in range(len(rest))]
        weighted = precision[:, None]
        for a, start in zip(rest, starts, strict=True):
            S[start : start + a.size, q:] = a.design.t_matmul(weighted * Q)
            for b, other in zip(rest, starts, strict=True):
                if other >= start:
                    part = _products(a, b, precision, Q)
                    S[start : start + a.size, other : other + b.size] = part
        S[q:, q:] = Q.mT @ (weighted * Q)
        upper = S.triu(1)
        S = upper + upper.mT + torch.diag(S.diagonal())
        conditional, cells = Q.new_zeros(0, 0, 0), _Cells.none(Q)
        if first >= 0:
            one = factors[first]
            conditional = self._conditional(one, precision, Q)
            cells = _Cells.of(one, rest, Q, precision)
            moved = cells.times(conditional)
            S = S - cells.inner(moved, q + r)
            cells = moved
        self._solve(S, rest, starts, q)
        self.starts, self.columns, self.entries = cells.starts, cells.columns, cells.entries
        self.first.fill_(first)
        self.conditional, self.basis = conditional, basis
        self.is_exact.fill_(True)

    @torch.no_grad()
    def update_from(
        self,
        statistics: Statistics,
        covariances: Sequence[Tensor],
        is_per_level: Sequence[bool],
        unknown: Sequence[int],
        variance: float,
    ) -> None:
        """The same from the rows' cross-products, without coefficients.

        Args:
            statistics: cross-products of the random effects' designs, in double precision.
            covariances: G of each effect's level, or of all its levels.
            is_per_level: whether it is that of a level.
            unknown: how many levels of each effect, the last ones, no prediction will ask for.
            variance: the residual's, which the cross-products are not divided by.
        """
        self.is_known.fill_(True)
        self.is_exact.fill_(False)
        p, device = statistics.products, self.first.device
        like = p.ff
        factors = []
        for (levels, k), G, own in zip(statistics.sizes, covariances, is_per_level, strict=True):
            none = IndexedDesign(torch.zeros(0).long(), like.new_zeros(0, k), levels, absent=False)
            factors.append(Factor(none, G.to(like), own))
        sizes = [factor.size if factor.is_per_level else -1 for factor in factors]
        first = max(range(len(sizes)), key=sizes.__getitem__) if max(sizes) > 0 else -1
        at = [i for i in range(len(factors)) if i != first]
        rest = [factors[i] for i in at]
        starts = [sum(f.size for f in rest[:i]) for i in range(len(rest))]
        q = sum(factor.size for factor in rest)
        if q > MOST_COLUMNS:
            return

        def cells(t: int, u: int) -> tuple[Tensor, Tensor, Tensor]:
            a, b = statistics.cells[min(t, u), max(t, u)]
            value = p.zz[min(t, u), max(t, u)] / variance
            return (a, b, value) if t <= u else (b, a, value.mT)

        S = like.new_zeros(q, q)
        for t, start in zip(at, starts, strict=True):
            for u, other in zip(at, starts, strict=True):
                a, b, value = cells(t, u)
                row = start + _effects_of(a, value.shape[1])[:, :, None]
                column = other + _effects_of(b, value.shape[2])[:, None, :]
                S[row, column] = value
        conditional, met = like.new_zeros(0, 0, 0), _Cells.none(like)
        if first >= 0:
            levels, k = statistics.sizes[first]
            level, _, value = cells(first, first)
            own = like.new_zeros(levels, k, k).index_copy(0, level, value)
            conditional = _given(own, factors[first].root())
            parts = []
            for t, start in zip(at, starts, strict=True):
                a, b, value = cells(first, t)
                width = value.shape[2]
                column = start + _effects_of(b, width)
                parts.append((a.repeat_interleave(width), column.flatten(), value.mT.flatten(0, 1)))
            met = _Cells.sorted(levels, q, parts, like, k)
            moved = met.times(conditional)
            S = S - met.inner(moved, q)
            met = moved
        self._solve(S, rest, starts, q)
        # Columns of unknown levels stand last, where no design reaches.
        known = [
            start + torch.arange(f.size - unknown[i] * statistics.sizes[i][1])
            for i, f, start in zip(at, rest, starts, strict=True)
        ]
        order = torch.cat([*known, torch.zeros(0).long()])
        gone = torch.ones(q, dtype=torch.bool).index_fill(0, order, False).nonzero()[:, 0]
        order = torch.cat([order, gone])
        place = torch.empty_like(order).index_copy(0, order, torch.arange(q))
        self.covariance = self.covariance[order[:, None], order].to(device)
        if first >= 0:
            kept = statistics.sizes[first][0] - unknown[first]
            conditional, met = conditional[:kept], met.first(kept)
        self.starts, self.columns = met.starts.to(device), place[met.columns].to(device)
        self.entries, self.conditional = met.entries.to(device), conditional.to(device)
        self.basis = like.new_zeros(0, 0).to(device)
        self.first.fill_(first)
        self.is_exact.fill_(True)

    def _conditional(self, one: Factor, precision: Tensor, like: Tensor) -> Tensor:
        """P of each level: the covariance of its effects, given all others."""
        z, q = one.values(like), one.design.levels
        square = z[:, :, None] * z[:, None, :] * precision[:, None, None]
        own = like.new_zeros(q, *square.shape[1:]).index_add(0, one.design.codes, square)
        return _given(own, one.root().to(like))

    def _solve(self, S: Tensor, rest: Sequence[Factor], starts: Sequence[int], q: int) -> None:
        """C from what the first factor leaves of the equations."""
        root = S.new_zeros(q, q)
        for factor, start in zip(rest, starts, strict=True):
            at = slice(start, start + factor.size)
            root[at, at] = factor.whole_root().to(S)
        inner = root.mT @ S[:q, :q] @ root
        inner.diagonal().add_(1)
        half = torch.linalg.solve_triangular(cholesky(inner, "V"), root.mT, upper=False)
        N = half.mT @ half
        T = N @ S[:q, q:]
        spread = torch.cholesky_inverse(cholesky(S[q:, q:] - S[:q, q:].mT @ T, "X' V^-1 X"))
        cross = -T @ spread
        top = torch.cat([N - cross @ T.mT, cross], 1)
        self.covariance = torch.cat([top, torch.cat([cross.mT, spread], 1)])

    def variance(self, designs: Sequence[IndexedDesign], X: Tensor) -> Tensor:
        """Variance of the error of :math:`x^\\top\\hat\\beta + z^\\top\\hat b` of some rows (n,).

        Args:
            designs: of each random effect; a level that is not known is a row of zeros.
            X: (n, p), with p = 0 where there are no coefficients.
        """
        n, m = len(X), len(self.covariance)
        step = max(1, _NUMBERS // max(m, 1))
        parts = [
            self._some([d.take(at) for d in designs], X[at])  # type: ignore[misc]
            for at in torch.arange(n, device=X.device).split(step)
        ]
        return torch.cat(parts) if parts else X.new_zeros(0)

    def _some(self, designs: Sequence[IndexedDesign], X: Tensor) -> Tensor:
        C, first, n = self.covariance, int(self.first), len(X)
        w = C.new_zeros(n, len(C))
        start = 0
        rows = torch.arange(n, device=X.device)
        found = C.new_zeros(n)
        for i, design in enumerate(designs):
            z = C.new_ones(n, 1) if design.values is None else design.values.to(C)
            k = torch.arange(design.effects, device=X.device)
            at = design.codes[:, None] * design.effects + k
            if i != first:
                w[rows[:, None], start + at] += z
                start += design.shape[1]
                continue
            codes = design.codes
            found = torch.einsum("nk,nkl,nl->n", z, self.conditional[codes], z)
            # The cells of each row's level, one after the other.
            lengths = (self.starts[1:] - self.starts[:-1])[codes]
            row = rows.repeat_interleave(lengths)
            offset = self.starts[:-1][codes] - lengths.cumsum(0) + lengths
            place = torch.arange(len(row), device=X.device) + offset[row]
            by = (z[row] * self.entries[place]).sum(1)
            w.index_put_((row, self.columns[place]), -by, accumulate=True)
        w[:, len(C) - self.basis.shape[1] :] += X.to(C) @ self.basis
        return found + ((w @ C) * w).sum(1)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # The sizes are known only once there were data.
        for name in ("conditional", "starts", "columns", "entries", "covariance", "basis"):
            if prefix + name in state_dict:
                own = getattr(self, name)
                setattr(self, name, torch.empty_like(state_dict[prefix + name], device=own.device))
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _given(own: Tensor, root: Tensor) -> Tensor:
    r""":math:`(Z_l^\top R^{-1} Z_l + G^{-1})^{-1}` of each level, with :math:`G = ΛΛ^\top`."""
    inner = root.mT @ own @ root + torch.eye(len(root), dtype=own.dtype, device=own.device)
    half = torch.linalg.solve_triangular(cholesky(inner, "V"), root.mT, upper=False)
    return half.mT @ half


def _effects_of(levels: Tensor, k: int) -> Tensor:
    """Columns of the k effects of some levels, (cells, k)."""
    return levels[:, None] * k + torch.arange(k, device=levels.device)


def _products(a: Factor, b: Factor, precision: Tensor, like: Tensor) -> Tensor:
    r""":math:`Z_a^\top R^{-1} Z_b` as a matrix (q_a, q_b)."""
    block = a.values(like)[:, :, None] * b.values(like)[:, None, :] * precision[:, None, None]
    flat = _columns(a)[:, :, None] * b.size + _columns(b)[:, None, :]
    return (
        like.new_zeros(a.size * b.size)
        .index_add(0, flat.flatten(), block.flatten())
        .reshape(a.size, b.size)
    )


def _columns(factor: Factor) -> Tensor:
    """Columns of the effects of each row's level, (n, k)."""
    design = factor.design
    k = torch.arange(design.effects, device=design.codes.device)
    return design.codes[:, None] * design.effects + k


@dataclass(frozen=True)
class _Cells:
    """The levels of the first factor with the columns of the rest that they meet.

    Attributes:
        starts: (levels + 1,) where the cells of each level start.
        columns: (cells,) column of each.
        entries: (cells, k) products of the level's k effects with the column.
    """

    starts: Tensor
    columns: Tensor
    entries: Tensor

    @classmethod
    def none(cls, like: Tensor) -> _Cells:
        whole = torch.zeros(1, dtype=torch.long, device=like.device)
        return cls(whole, whole[:0], like.new_zeros(0, 0))

    @classmethod
    def of(cls, one: Factor, rest: Sequence[Factor], Q: Tensor, precision: Tensor) -> _Cells:
        r""":math:`Z_1^\top R^{-1} [Z_2 | Q]`."""
        z = one.values(Q) * precision[:, None]
        levels, k, r = one.design.levels, z.shape[1], Q.shape[1]
        start = sum(factor.size for factor in rest)
        width = start + r
        # Each level meets all columns of Q.
        level = torch.arange(levels, device=Q.device)
        keys = [(level[:, None] * width + start + torch.arange(r, device=Q.device)).flatten()]
        by_level = one.design.t_matmul(precision[:, None] * Q).unflatten(0, (levels, k))
        entries = [by_level.mT.flatten(0, 1)]
        start = 0
        for factor in rest:
            column = one.design.codes[:, None] * width + start + _columns(factor)
            key, place = column.flatten().unique(return_inverse=True)
            block = (factor.values(Q)[:, :, None] * z[:, None, :]).flatten(0, 1)
            keys.append(key)
            entries.append(Q.new_zeros(len(key), k).index_add(0, place, block))
            start += factor.size
        order = torch.cat(keys).argsort()
        key = torch.cat(keys)[order]
        count = torch.bincount(key // width, minlength=levels) if width else level.new_zeros(levels)
        starts = torch.cat([level.new_zeros(1), count.cumsum(0)])
        return cls(starts, key % width if width else key, torch.cat(entries)[order])

    @classmethod
    def sorted(
        cls,
        levels: int,
        width: int,
        parts: Sequence[tuple[Tensor, Tensor, Tensor]],
        like: Tensor,
        k: int,
    ) -> _Cells:
        """From levels, columns and entries (cells, k) in any order."""
        none = torch.zeros(0, dtype=torch.long, device=like.device)
        level = torch.cat([none, *(a for a, _, _ in parts)])
        column = torch.cat([none, *(b for _, b, _ in parts)])
        order = (level * max(width, 1) + column).argsort()
        count = torch.bincount(level, minlength=levels)
        starts = torch.cat([none.new_zeros(1), count.cumsum(0)])
        entries = torch.cat([like.new_zeros(0, k), *(value for _, _, value in parts)])
        return cls(starts, column[order], entries[order])

    def first(self, levels: int) -> _Cells:
        """Those of the first levels."""
        count = int(self.starts[levels])
        return _Cells(self.starts[: levels + 1], self.columns[:count], self.entries[:count])

    def levels(self) -> Tensor:
        """Level of each cell."""
        lengths = self.starts[1:] - self.starts[:-1]
        return torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)

    def times(self, P: Tensor) -> _Cells:
        """Each level's entries times its block of P."""
        moved = (P[self.levels()] @ self.entries[:, :, None])[:, :, 0]
        return _Cells(self.starts, self.columns, moved)

    def inner(self, other: _Cells, width: int) -> Tensor:
        """The product of the transpose with another of the same cells, (width, width)."""
        levels, k = len(self.starts) - 1, self.entries.shape[1]
        if levels * k * width <= _NUMBERS:
            a, b = (x.entries.new_zeros(levels, width, k) for x in (self, other))
            at = (self.levels(), self.columns)
            a[at], b[at] = self.entries, other.entries
            return a.movedim(1, -1).flatten(0, 1).mT @ b.movedim(1, -1).flatten(0, 1)
        left, right = (x.sparse(width) for x in (self, other))
        return torch.as_tensor((left.T @ right).toarray()).to(self.entries)

    def sparse(self, width: int) -> csr_array:
        """As a matrix (levels · k, width)."""
        level, k = self.levels()[:, None], self.entries.shape[1]
        row = level * k + torch.arange(k, device=level.device)
        column = self.columns[:, None].expand(row.shape)
        at = tuple(x.flatten().numpy(force=True) for x in (row, column))
        shape = ((len(self.starts) - 1) * k, width)
        return csr_array((self.entries.flatten().numpy(force=True), at), shape=shape)
