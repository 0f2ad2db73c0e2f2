r"""The system of the random effects under weights that move: :math:`I + \Lambda^\top Z^\top W Z\Lambda`.

It is that of the blocked solver, with the weights of the rows in the place of
:math:`R^{-1}`. The factor with most columns is eliminated first, and what remains falls apart into
groups of columns. Weights may be negative, as those of an observed information are, as long as the
system is positive definite.

Coefficients of X, if any, are effects without a prior: they border the system.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import copy

import torch
from torch import Tensor

from openreml_nn.likelihood.effects import RandomEffects
from openreml_nn.likelihood.laplace_border import Border
from openreml_nn.likelihood.laplace_determinant import log_det, reduced, slopes_alone
from openreml_nn.likelihood.laplace_layout import Prior, Stacked, times_blocks
from openreml_nn.likelihood.problem import Cost, cholesky
from openreml_nn.likelihood.solver import check_held
from openreml_nn.likelihood.solvers import Blocked, Dense
from openreml_nn.likelihood.system.blocks import block_solve
from openreml_nn.likelihood.system.crossproducts import Pattern, Products
from openreml_nn.likelihood.system.placement import Placement, System
from openreml_nn.support.errors import NotPositiveDefiniteError
from openreml_nn.terms.design import DenseDesign, Design, IndexedDesign
from openreml_nn.terms.term import Term

__all__ = [
    "BlockedFactor",
    "BlockedPoint",
    "BlockedSpace",
    "products_of",
    "weighted_products",
]


def products_of(
    layout: BlockedSpace, designs: Sequence[Design], weights: Tensor, X: Tensor
) -> System:
    r"""The products of :math:`[Z \,|\, X]` with themselves under weights, in their places."""
    zz = weighted_products(layout.pattern, designs, weights)
    weighted = weights[:, None] * X
    products = Products(zz, [design.t_matmul(weighted) for design in designs], X.mT @ weighted)
    return layout.placement.place(products)


def weighted_products(
    pattern: Pattern,
    designs: Sequence[Design],
    weights: Tensor,
    pairs: Iterable[tuple[int, int]] | None = None,
) -> dict[tuple[int, int], Tensor]:
    """The products of designs with each other under weights: of some pairs of them t ≤ u, of all by
    default."""
    scaled = [_scaled(design, weights) for design in designs]
    zz = {}
    for t, u in pattern.cells if pairs is None else pairs:
        cells, one, two = pattern.cells[t, u], scaled[t], designs[u]
        if cells is not None:
            assert isinstance(one, IndexedDesign) and isinstance(two, IndexedDesign)
            if t == u and two.values is None:
                # Intercepts: the weights of each level, added up.
                total = weights.new_zeros(two.levels).index_add(0, two.codes, weights)
                zz[t, u] = total[:, None, None]
            else:
                zz[t, u] = cells.sum(one, two, weights)
        elif isinstance(two, DenseDesign):
            zz[t, u] = one.t_matmul(two.matrix.to(weights))
        else:
            assert isinstance(one, DenseDesign)
            zz[t, u] = two.t_matmul(one.matrix.to(weights)).mT
    return zz


class BlockedSpace(Stacked):
    """Where the random effects of some terms stand, the largest factor to be eliminated.

    Args:
        terms: the random terms, at least one.
        solver: with its options; the dense one eliminates no factor, and its system is one dense matrix.
    """

    reason = "the weights of the rows move"

    def __init__(self, terms: Sequence[Term], solver: Blocked | Dense) -> None:
        super().__init__(terms, isinstance(solver, Blocked))
        self.solver, self._entry = solver, terms[0].covariance.matrix.element_size()
        ones, rest = range(self.split), range(self.split, len(self.order))
        linked = [grid is None for grid in self.grids]
        pair_cost = solver.pair_cost if isinstance(solver, Blocked) else 0.0
        self.placement = Placement(self.designs, self.pattern, ones, rest, linked, pair_cost)
        self.partition = self.placement.partition

    def check_memory(self) -> None:
        """Refuse blocks that would hold more than the machine does.

        Raises:
            InputError: if they would.
        """
        held = self._entry * self.placement.cost(0)[1]
        check_held(self.solver, held, self.size)

    def cost(self, p: int) -> Cost:
        """What an evaluation takes with p coefficients of X."""
        work, entries = self.placement.cost(p)
        work += 4.0 * self.designs[0].shape[0] * (self.k + len(self.designs)) ** 2
        steps = [f"{self.levels} blocks of {self.k} x {self.k}"] if self.levels else []
        if self.q:
            by = self.partition
            size = f"{by.size} x {by.size}"
            steps.append(f"{self.q} columns: {max(by.count, 1)} groups of at most {size}")
        return Cost(work, 8.0 * entries, True, "in the space of the random effects", tuple(steps))

    def at(self, terms: Sequence[Term]) -> BlockedPoint:
        return BlockedPoint(self, terms)


class BlockedPoint:
    """The random effects at some covariances.

    Args:
        layout: where they stand.
        terms: with these covariances.
    """

    def __init__(self, layout: BlockedSpace, terms: Sequence[Term]) -> None:
        self.layout = layout
        self.covariances = Prior.of(layout, terms)
        self.roots = self.covariances.roots(terms)
        #: Whether a factor takes no longer than what a step does to the rows anyway.
        self.is_cheap = not layout.q

    def predictor(self, u: Tensor) -> Tensor:
        return self.layout.rows(self.roots.times(u[:, None]))[:, 0]

    def slope(self, v: Tensor) -> Tensor:
        return self.roots.times(self.layout.t_rows(v[:, None]), True)[:, 0]

    def prior(self, u: Tensor) -> Tensor:
        return u

    def factor(self, weights: Tensor, X: Tensor) -> BlockedFactor:
        return BlockedFactor(self, weights, X)


class BlockedFactor:
    r"""The Cholesky factor of :math:`H = I + \Lambda^\top A\Lambda`, bordered by the coefficients of X.

    Args:
        point: the random effects with :math:`\Lambda`.
        weights: of the rows, (n,), in :math:`A = Z^\top W Z`.
        X: (n, p).

    Raises:
        NotPositiveDefiniteError: if the system is not positive definite.
    """

    error = 0.0

    def __init__(self, point: BlockedPoint, weights: Tensor, X: Tensor) -> None:
        self._point = point
        self.weights = weights if point.is_cheap else weights.clone()
        self._roots, self.layout = point.roots, point.layout
        roots = self._roots
        self._at = at = products_of(self.layout, self.layout.designs, weights, X[:, :0])
        L = self._L = roots.blocks(at.A11)
        eye = torch.eye(self.layout.k, dtype=L.dtype, device=L.device)
        D = eye + times_blocks(times_blocks(L.mT, at.A11), L)
        what = "the curvature of the random effects at the mode"
        self._C = _cholesky(D, what)
        half = block_solve(self._C, L.mT.expand_as(D))
        self._half = half
        self._E22, self._Lc = at.A22, at.A22
        if self.layout.q:
            self._E22 = at.A22 - at.W.gram(half, half)
            M = roots.sandwich(self._E22, self.layout.partition)
            M.diagonal(dim1=1, dim2=2).add_(1)
            self._Lc = cholesky(M, what)
        self._inverse: tuple[Tensor, Tensor] | None = None
        self._slopes: tuple[Tensor, list[Tensor]] | None = None
        self._border = Border(point, self._solve, weights, X)

    def alone(self) -> BlockedFactor:
        """The same without the coefficients of X."""
        found = copy(self)
        found._border = Border(self._point, self._solve, self.weights, self._border.X[:, :0])
        found._slopes = None
        return found

    def half_log_det(self) -> Tensor:
        """Half the logarithm of the determinant, of the border too."""
        found = self._C.diagonal(dim1=1, dim2=2).log().sum()
        found = found + self._Lc.diagonal(dim1=1, dim2=2).log().sum()
        return found + self._border.half_log_det()

    def solve(self, g: Tensor, g_X: Tensor) -> tuple[Tensor, Tensor]:
        """:math:`H^{-1}` times a vector (size, m) and its border (p, m)."""
        return self._border.solve(self._solve(g), g_X)

    def _solve(self, g: Tensor) -> Tensor:
        layout, W, by = self.layout, self._at.W, self.layout.partition
        one, two = layout.split_flat(g)
        one = block_solve(self._C, one)
        if layout.q:
            two = two - self._roots.times_rest(W.t_times(self._half.mT @ one), True)
            two = by.collect(torch.cholesky_solve(by.spread(two), self._Lc))
            one = one - self._half @ W.times(self._roots.times_rest(two))
        return layout.joined(block_solve(self._C, one, transpose=True), two)

    def fixed_covariance(self) -> Tensor:
        """The inverse of the border's Schur complement, (p, p)."""
        return self._border.covariance()

    def _inverses(self) -> tuple[Tensor, Tensor]:
        r""":math:`M^{-1}` and :math:`N = \Lambda_2 M^{-1}\Lambda_2^\top`, by groups of columns."""
        if self._inverse is None:
            inverse = torch.cholesky_inverse(self._Lc)
            self._inverse = (
                inverse,
                self._roots.sandwich(inverse, self.layout.partition, transpose=True),
            )
        return self._inverse

    def _derivatives(self) -> tuple[Tensor, list[Tensor]]:
        """Half the variances of the rows' predictors, and the determinant's part by each matrix."""
        if self._slopes is not None:
            return self._slopes
        if not (self.layout.q or self._border.count):
            prior = self._point.covariances
            self._slopes = slopes_alone(self._at, prior, self._half, self.layout.designs)
            return self._slopes
        layout, prior = self.layout, self._point.covariances
        forms = [*prior.first, *prior.rest]
        with torch.enable_grad():
            weights = self.weights.detach().requires_grad_()
            matrices = [form.matrix.detach().requires_grad_() for form in forms]
            held = [form.with_matrix(m) for form, m in zip(forms, matrices, strict=True)]
            at = products_of(layout, layout.designs, weights, self._border.X)
            bordered = self._border.count > 0
            prior_of = Prior(layout, held)
            value = (
                log_det(at, prior_of, layout.partition) if bordered else self._log_det(at, prior_of)
            )
            half, *parts = torch.autograd.grad(
                value, [weights, *matrices], allow_unused=True, materialize_grads=True
            )
        if not bordered:
            rest = self._of_rest(prior)
            parts[layout.split :] = [
                part + own.reshape(part.shape)
                for part, own in zip(parts[layout.split :], rest, strict=True)
            ]
        self._slopes = half, list(parts)
        return self._slopes

    def half_variances(self) -> Tensor:
        return self._derivatives()[0]

    def of_matrices(self, u: Tensor, s: Tensor, first: Tensor, f: Tensor) -> list[Tensor]:
        layout, (_, parts) = self.layout, self._derivatives()
        prior = self._point.covariances
        both = [layout.by_term(layout.t_rows(x[:, None])) for x in (first, f)]
        found = {}
        for j, (e, own, form) in enumerate(zip(*both, [*prior.first, *prior.rest], strict=True)):
            grid = layout.grid(j)
            e, own = (x.reshape(grid or (1, -1)) for x in (e, own))
            # e (f - e / 2)' and its transpose, level by level.
            outer = e[:, :, None] * (own - e / 2)[:, None, :]
            square = (outer + outer.mT) / 2
            folded = form.fold(square[0]) if grid is None else form.fold_blocks(square)
            found[layout.order[j]] = parts[j] + folded.reshape(parts[j].shape)
        return [found[i] for i in sorted(found)]

    def _log_det(self, at: System, prior: Prior) -> Tensor:
        r"""A function with the value's derivatives by the products and by the eliminated factor's
        covariances: those of :math:`\tfrac12\log|D| + \tfrac12\langle N, E\rangle`, where E is the
        other terms' system, at which N is held."""
        D, K = reduced(at, prior)
        value = D.log().sum() if D.shape[-1] == 1 else torch.linalg.slogdet(D).logabsdet.sum()
        eye = torch.eye(self.layout.k, dtype=D.dtype, device=D.device)
        E22 = at.A22 - at.W.gram(eye.expand_as(K), K)
        return (value + (self._inverses()[1] * E22).sum()) / 2

    def _of_rest(self, prior: Prior) -> list[Tensor]:
        r"""Derivatives of the value by the other terms' covariances,
        :math:`\tfrac12(E - E N E)` in each term's own part."""
        layout, by, E = self.layout, self.layout.partition, self._E22
        inverse, N = self._inverses()
        columns = [(start, size) for start, size in zip(_starts(layout.sizes), layout.sizes)]
        plain = all(grid is not None and grid[1] == 1 for grid in layout.grids)
        one = self._roots.times_rest(E.new_ones(layout.q, 1))[:, 0] if plain else E[:0, 0, 0]
        if plain and bool((by.diagonal(E) * one**2 > 1e-4).all()):
            # Of one effect a level: no product of large matrices where no digits are lost.
            diagonal = (1 - by.diagonal(inverse)) / one**2
            squares = [diagonal[start : start + size, None, None] for start, size in columns]
        else:
            whole = E - E @ N @ E
            squares = []
            for (start, size), grid in zip(columns, layout.grids, strict=True):
                if grid is not None:
                    squares.append(by.own(whole, start, *grid))
                    continue
                place = torch.arange(start, start + size, device=E.device)
                squares.append(whole.reshape(-1)[by.index(place[:, None], place)])
        return [
            form.fold(square / 2) if grid is None else form.fold_blocks(square / 2)
            for form, square, grid in zip(prior.rest, squares, layout.grids, strict=True)
        ]

    def random(self, terms: Sequence[Term], u: Tensor) -> list[RandomEffects]:
        layout, by = self.layout, self.layout.partition
        N = self._inverses()[1]
        P = self._half.mT @ self._half
        whole = P + P @ self._at.W.quadratic(N) @ P if layout.q else P
        variances, start = [], 0
        for width in layout.widths:
            variances.append(whole[:, start : start + width, start : start + width])
            start += width
        start = 0
        for size, k in zip(layout.sizes, layout.effects[layout.split :], strict=True):
            variances.append(by.own(N, start, size // k, k))
            start += size
        found = {}
        parts = layout.by_term(self._roots.times(u[:, None]))
        for i, values, spread in zip(layout.order, parts, variances, strict=True):
            found[i] = RandomEffects(terms[i].name, values.reshape(spread.shape[:2]), spread)
        return [found[i] for i in sorted(found)]


def _starts(sizes: Sequence[int]) -> list[int]:
    return [sum(sizes[:i]) for i in range(len(sizes))]


def _cholesky(D: Tensor, what: str) -> Tensor:
    if D.shape[-1] != 1:
        return cholesky(D, what)
    if not bool((D > 0).all()):
        raise NotPositiveDefiniteError(f"{what} is not positive definite")
    return D.sqrt()


def _scaled(design: Design, weights: Tensor) -> Design:
    if isinstance(design, DenseDesign):
        return DenseDesign(design.matrix.to(weights) * weights[:, None])
    assert isinstance(design, IndexedDesign)
    values = weights[:, None]
    if design.values is not None:
        values = design.values.to(weights) * values
    return IndexedDesign(design.codes, values, design.levels, absent=False)
