r"""The likelihood of several responses of a row from cross-products, with their covariance left open.

The rows of one pattern of missing responses have one :math:`R`, of the responses that are there,
and :math:`Z_a^\top R^{-1} Z_b` is :math:`R^{-1} \otimes \sum_i z_i z_i^\top` where each response has
effects of its own, and sums over responses where they share them. So cross-products of the values z
themselves, pattern by pattern, are all that is needed at any R, and they add up over rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from openreml_nn.likelihood.fixed import FixedPart, traced
from openreml_nn.likelihood.problem import Evaluation, cholesky, pivot_loss
from openreml_nn.likelihood.residual import BlockResidual, White
from openreml_nn.likelihood.solvers.blocked import Blocked, BlockedEvaluation, BlockedProblem
from openreml_nn.likelihood.system.crossproducts import Pattern, Products, Statistics
from openreml_nn.likelihood.system.elimination import inner
from openreml_nn.likelihood.system.placement import System
from openreml_nn.terms.design import IndexedDesign
from openreml_nn.terms.term import Term

__all__ = ["ResponseStatistics", "ResponsesProblem"]

#: Which responses of a row are there.
Present = tuple[bool, ...]


@dataclass(frozen=True)
class ResponseStatistics:
    """Cross-products of some rows with several responses.

    Attributes:
        own: for each design whether each response has effects of its own, (response, value) in their
            order; else the responses share them.
        parts: by which responses are there, the cross-products of the designs' values and of
            f = [X | Y], Y with zeros where a response is missing.
    """

    own: tuple[bool, ...]
    parts: Mapping[Present, Statistics]

    @classmethod
    def of(
        cls,
        designs: Sequence[IndexedDesign],
        own: tuple[bool, ...],
        X: Tensor,
        Y: Tensor,
        weights: Tensor | None = None,
    ) -> ResponseStatistics:
        """The statistics of some rows, for each pattern of responses that are there.

        Args:
            designs: values of each random effect by level.
            own: see above.
            X: (n, p).
            Y: (n, t), NaN where a response is missing.
            weights: (n,), by which R of each row is divided.
        """
        present = ~Y.isnan()
        kinds, kind = present.unique(dim=0, return_inverse=True)
        f, parts = torch.cat([X, Y.nan_to_num(0.0)], 1), {}
        for i, each in enumerate(kinds.tolist()):
            at = (kind == i).nonzero()[:, 0]
            some = [design.take(at) for design in designs]
            parts[tuple(each)] = Statistics.of(
                some, f[at], None if weights is None else weights[at]
            )
        return cls(own, parts)

    @property
    def responses(self) -> int:
        """How many a row has."""
        return len(next(iter(self.parts)))

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Levels of each design, and values."""
        return next(iter(self.parts.values())).sizes

    def __add__(self, other: ResponseStatistics) -> ResponseStatistics:
        """Of the rows of both, where the levels of each design are the same."""
        found = dict(self.parts)
        for present, part in other.parts.items():
            found[present] = found[present] + part if present in found else part
        return ResponseStatistics(self.own, found)

    def _each(self, change: Callable[[Statistics], Statistics]) -> ResponseStatistics:
        return ResponseStatistics(self.own, {key: change(s) for key, s in self.parts.items()})

    def to(self, device: torch.device) -> ResponseStatistics:
        """See :meth:`Statistics.to`."""
        return self._each(lambda part: part.to(device))

    def relabelled(self, places: Sequence[Tensor], levels: Sequence[int]) -> ResponseStatistics:
        """See :meth:`Statistics.relabelled`."""
        return self._each(lambda part: part.relabelled(places, levels))

    def mapped(self, M: Tensor) -> ResponseStatistics:
        """See :meth:`Statistics.mapped`."""
        return self._each(lambda part: part.mapped(M))

    def aligned(self) -> ResponseStatistics:
        """Statistics whose parts all have the same cells."""
        first, *rest = self.parts.values()
        whole = first
        for part in rest:
            whole = whole + part
        zz = {pair: torch.zeros_like(value) for pair, value in whole.products.zz.items()}
        zf = [torch.zeros_like(value) for value in whole.products.zf]
        none = Products(zz, zf, torch.zeros_like(whole.products.ff))
        blank = replace(whole, products=none, rows=0, log_det=0.0)
        return self._each(lambda part: blank + part)

    def at(self, R: Tensor) -> Statistics:
        """Cross-products with :math:`R^{-1}` of rows of one response each, all of the first row, then
        all of the second; of f those of :math:`[I \\otimes X \\mid y]`.

        Args:
            R: (t, t) covariance of the responses of a row.
        """
        found: Statistics | None = None
        for present, part in self.parts.items():
            W, of_R, _ = inverse_of(R, present)
            products = weighted(part.products, W, self.own, part.sizes)
            sizes = [
                (q, k * len(R) if own else k)
                for (q, k), own in zip(part.sizes, self.own, strict=True)
            ]
            count = sum(present)
            log_det = float(of_R) * part.rows + count * part.log_det
            one = Statistics(sizes, part.cells, products, count * part.rows, log_det)
            found = one if found is None else found + one
        assert found is not None
        return found


def inverse_of(R: Tensor, present: Present) -> tuple[Tensor, Tensor, float]:
    """The inverse of R for the responses that are there, zeros for others (t, t); the logarithm of
    the determinant; and how many times rounding is magnified in the factor.

    Raises:
        NotPositiveDefiniteError: if R is not positive definite.
    """
    at = torch.tensor(present, device=R.device).nonzero()[:, 0]
    own = R[at[:, None], at]
    L = cholesky(own, "R")
    index = (at[:, None], at)
    W = R.new_zeros(R.shape).index_put(index, torch.cholesky_inverse(L))
    lost = 1.0 if traced(R) else pivot_loss(own.detach(), L.detach())
    return W, 2 * L.diagonal().log().sum(), lost


def weighted(
    products: Products, W: Tensor, own: Sequence[bool], sizes: Sequence[tuple[int, int]]
) -> Products:
    """Cross-products of values as those of effects and responses, with W (t, t) between responses."""
    t, zz = len(W), {}
    for (a, b), value in products.zz.items():
        w = _between(W, own[a], own[b])
        zz[a, b] = torch.einsum("jl,cab->cjalb", w, value).flatten(3).flatten(1, 2)
    p = len(products.ff) - t
    zf = []
    for value, is_own, size in zip(products.zf, own, sizes, strict=True):
        w, by_level = _between(W, is_own, True), value.unflatten(0, size)
        of_X = torch.einsum("jl,qap->qjalp", w, by_level[..., :p]).flatten(3)
        of_y = torch.einsum("jl,qal->qja", w, by_level[..., p:])
        zf.append(torch.cat([of_X, of_y[..., None]], 3).flatten(0, 2))
    XX, XY, YY = products.ff[:p, :p], products.ff[:p, p:], products.ff[p:, p:]
    Xy = torch.einsum("jl,pl->jp", W, XY).reshape(-1, 1)
    square = torch.einsum("jl,pq->jplq", W, XX).reshape(t * p, t * p)
    ff = torch.cat(
        [torch.cat([square, Xy], 1), torch.cat([Xy.mT, (W * YY).sum().reshape(1, 1)], 1)]
    )
    return Products(zz, zf, ff)


def _between(W: Tensor, left: bool, right: bool) -> Tensor:
    """W summed over responses on the sides that share their effects."""
    W = W if left else W.sum(0, keepdim=True)
    return W if right else W.sum(1, keepdim=True)


class ResponsesProblem(BlockedProblem):
    """The blocked system of several responses of a row, from cross-products.

    Args:
        fixed: of no rows.
        terms: of a few rows, each with all its responses, that have all levels.
        method: see :class:`Problem`.
        statistics: those of all rows.
        M: from :math:`[I \\otimes X \\mid y]` to the columns of ``fixed``.
    """

    def __init__(
        self,
        fixed: FixedPart,
        terms: Sequence[Term],
        method: str,
        statistics: ResponseStatistics,
        M: Tensor,
    ) -> None:
        t = statistics.responses
        whole = statistics.at(torch.eye(t, dtype=M.dtype, device=M.device)).mapped(M)
        super().__init__(fixed, terms, method, Blocked(), whole)
        self._M, self._t = M, t
        order = self.order
        self._own = [statistics.own[i] for i in order]
        self._sizes = [statistics.sizes[i] for i in order]
        self.levels_of = [levels for levels, _ in self._sizes]
        self._parts: dict[Present, tuple[Pattern, Products, int, float]] = {
            present: (*part.ordered(order), part.rows, part.log_det)
            for present, part in statistics.aligned().parts.items()
        }

    def _covariance(self, matrices: Sequence[Tensor]) -> Tensor:
        """R of the responses of a row (t, t)."""
        assert isinstance(self.residual, BlockResidual)
        return self.residual.of_first(self._t, matrices)

    def system(self, residual: Sequence[Tensor]) -> tuple[System, White, Tensor]:
        R, white, found = self._covariance(residual), White(), None
        log_det = R.new_zeros(())
        for present, (_, products, rows, known) in self._parts.items():
            W, own, lost = inverse_of(R, present)
            log_det = log_det + rows * own + sum(present) * known
            white.condition = max(white.condition, lost)
            more = weighted(products, W, self._own, self._sizes)
            found = more if found is None else _sum(found, more)
        assert found is not None and self.moving is not None
        white.log_det = log_det
        zf, M = [part @ self._M for part in found.zf], self._M
        products = Products(found.zz, zf, M.mT @ found.ff @ M)
        return self.moving[1].place(products), white, R.new_ones(())

    def evaluate_unchecked(self, terms: Sequence[Term], matrices: list[Tensor]) -> Evaluation:
        return _ResponsesEvaluation(self, terms, matrices)

    def along_residuals(
        self,
        residual: Sequence[Tensor],
        derivatives: Sequence[Tensor],
        effects: Sequence[Tensor],
        fixed: Tensor,
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        r"""Products of :math:`R^{-1} \dot R_j R^{-1} \hat e` with the designs and with f, for each
        derivative, and :math:`\hat e^\top R^{-1} \dot R_i R^{-1} \dot R_j R^{-1} \hat e`.

        Args:
            residual: matrices of R.
            derivatives: their derivatives by m parameters.
            effects: BLUPs of each design (q, k), in the order of the roles.
            fixed: coefficients of the columns of f but y, (r,).
        """
        R, t = self._covariance(residual), self._t
        m = len(derivatives[0])
        moved = [self._covariance([d[j] for d in derivatives]) for j in range(m)]
        of_f = self._M @ torch.cat([-fixed, fixed.new_ones(1)])
        C_f = torch.cat([of_f[:-1].reshape(t, -1).mT, torch.eye(t).to(R)])  # (p + t, t)
        C = [
            -(b.unflatten(1, (t, k)).mT if own else b[:, :, None].expand(-1, -1, t))
            for b, own, (_, k) in zip(effects, self._own, self._sizes, strict=True)
        ]
        T = [R.new_zeros(b.shape[0], b.shape[1], m) for b in effects]
        T_f, total = R.new_zeros(len(of_f), m), R.new_zeros(m, m)
        p = len(C_f) - t
        for present, (pattern, products, _, _) in self._parts.items():
            W, _, _ = inverse_of(R, present)
            H, H_f = _times(pattern, products, C, C_f)
            S = sum((c.flatten(0, 1).mT @ h.flatten(0, 1) for c, h in zip(C, H, strict=True)), 0)
            S = S + C_f.mT @ H_f  # (t, t), the sum of e e'
            by = [W @ dR @ W for dR in moved]
            for j, X in enumerate(by):
                for i, (h, own) in enumerate(zip(H, self._own, strict=True)):
                    T[i][:, :, j] += torch.einsum("jl,qal->qja", _between(X, own, True), h).flatten(
                        1
                    )
                T_f[:-1, j] += torch.einsum("jl,pl->jp", X, H_f[:p]).reshape(-1)
                T_f[-1, j] += (X * H_f[p:]).sum()
                for i in range(m):
                    total[i, j] += ((by[i] @ moved[j] @ W) * S).sum()
        return T, self._M.mT @ T_f, (total + total.mT) / 2


def _sum(one: Products, other: Products) -> Products:
    zz = {pair: value + other.zz[pair] for pair, value in one.zz.items()}
    zf = [x + y for x, y in zip(one.zf, other.zf, strict=True)]
    return Products(zz, zf, one.ff + other.ff)


def _times(
    pattern: Pattern, products: Products, C: Sequence[Tensor], C_f: Tensor
) -> tuple[list[Tensor], Tensor]:
    """The matrix of cross-products times columns: of the designs (q, k, t) each, and of f."""
    H = [zf.unflatten(0, c.shape[:2]) @ C_f for zf, c in zip(products.zf, C, strict=True)]
    for (a, b), value in products.zz.items():
        cells = pattern.cells[a, b]
        assert cells is not None
        H[a] = H[a].index_add(0, cells.a, value @ C[b][cells.b])
        if a != b:
            H[b] = H[b].index_add(0, cells.b, value.mT @ C[a][cells.a])
    H_f = products.ff @ C_f
    for zf, c in zip(products.zf, C, strict=True):
        H_f = H_f + zf.mT @ c.flatten(0, 1)
    return H, H_f


class _ResponsesEvaluation(BlockedEvaluation):
    problem: ResponsesProblem

    def variates_of_rows(
        self, derivatives: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        problem, at = self.problem, self.system
        split = len(problem.residual.at)
        w1, w2 = self.moved(derivatives[split:])
        C1 = w1.reshape(problem.levels, problem.k, -1)
        b1, b2 = self.blups()
        ones = b1.split(problem.widths, 1) if problem.widths else ()
        count = len(problem.widths)
        rest = zip(b2.split(problem.sizes), problem.levels_of[count:], strict=True)
        effects = [*ones, *(b.reshape(levels, -1) for b, levels in rest)]
        T, T_f, total = problem.along_residuals(
            self.matrices[:split], derivatives[:split], effects, self.gamma
        )
        T1 = torch.cat(T[:count], 1) if count else torch.zeros_like(C1)
        none = T_f.new_zeros(0, T_f.shape[1])
        T2 = torch.cat([x.flatten(0, 1) for x in T[count:]]) if T[count:] else none
        cross = inner(C1, T1) + w2.mT @ T2
        own1 = at.A11 @ C1 + at.W.times(w2)
        own2 = at.W.t_times(C1) + self.times_22(w2)
        own_f = inner(at.A1f, C1) + at.A2f.mT @ w2
        total = total + cross + cross.mT + inner(C1, own1) + w2.mT @ own2
        return T1 + own1, T2 + own2, T_f + own_f, total
