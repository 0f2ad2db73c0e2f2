r"""The system of the random effects under weights that move: :math:`I + \Lambda^\top Z^\top W Z\Lambda`.

It is that of the blocked solver, with the weights of the rows in the place of
:math:`R^{-1}`. The factor with most columns is eliminated first, and what remains falls apart into
groups of columns. Weights may be negative, as those of an observed information are, as long as the
system is positive definite.

Coefficients of X, if any, are effects without a prior: they border the system.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.linalg import solve_triangular

from openreml_nn.likelihood.effects import RandomEffects
from openreml_nn.likelihood.problem import NotPositiveDefiniteError, cholesky
from openreml_nn.likelihood.system.elimination import inner, root
from openreml_nn.likelihood.system.placement import Placement, System
from openreml_nn.likelihood.system.products import Pattern, Products, same_codes
from openreml_nn.likelihood.system.roles import by_levels, grid_of
from openreml_nn.terms.base import Covariance
from openreml_nn.terms.design import DenseDesign, Design, IdentityDesign, IndexedDesign
from openreml_nn.terms.term import Term

__all__ = ["Factor", "Prior", "Stacked", "effects_of", "log_det", "products_of"]


class Stacked:
    r"""The designs of the random terms and where their effects stand.

    A vector of effects is flat: first those of the eliminated factor, level by level, then those of
    the other terms.

    Args:
        terms: the random terms, at least one.
        pair_cost: see :class:`Blocked`; None where no factor is eliminated and the system is one
            dense matrix.

    Attributes:
        order: positions of the terms, those eliminated first.
        designs: their designs.
        effects: effects of a level of each.
        levels, k: levels of the eliminated factor, and effects of each.
        q: columns of the other terms.
    """

    def __init__(self, terms: Sequence[Term], pair_cost: float | None) -> None:
        effects = [term.effects for term in terms]
        terms = [by_levels(_indexed(term)) for term in terms]
        grids = [None if pair_cost is None else grid_of(term) for term in terms]
        factors: list[list[int]] = []
        for i, grid in enumerate(grids):
            for factor in factors if grid is not None else ():
                one, two = terms[factor[0]].design, terms[i].design
                assert isinstance(one, IndexedDesign) and isinstance(two, IndexedDesign)
                if same_codes(one, two):
                    factor.append(i)
                    break
            else:
                if grid is not None:
                    factors.append([i])
        width = [sum(terms[i].design.shape[1] for i in factor) for factor in factors]
        first = factors[width.index(max(width))] if factors else []
        rest = [i for i in range(len(terms)) if i not in first]
        self.order = [*first, *rest]
        self.split = len(first)
        self.grids = [grids[i] for i in rest]
        self.effects = [effects[i] for i in self.order]
        self.designs = [terms[i].design for i in self.order]
        self.widths = [self.designs[j].shape[1] // self._levels() for j in range(self.split)]
        self.levels, self.k = self._levels(), sum(self.widths)
        self.sizes = [design.shape[1] for design in self.designs[self.split :]]
        self.q = sum(self.sizes)
        self.pattern = Pattern.of(self.designs)
        count = len(self.order)
        linked = [grid is None for grid in self.grids]
        self.placement = Placement(
            self.designs,
            self.pattern,
            range(self.split),
            range(self.split, count),
            linked,
            pair_cost or 0.0,
        )
        self.partition = self.placement.partition

    def _levels(self) -> int:
        first = self.designs[0] if self.split else None
        return first.levels if isinstance(first, IndexedDesign) else 0

    def grid(self, j: int) -> tuple[int, int] | None:
        """Levels and effects of the j-th term in order, None where its levels are not independent."""
        if j < self.split:
            return self.levels, self.widths[j]
        return self.grids[j - self.split]

    @property
    def size(self) -> int:
        """Number of random effects."""
        return self.levels * self.k + self.q

    def of_designs(self, terms: Sequence[Term]) -> list[Design]:
        """The designs of the same terms, with their graph, in order."""
        return [by_levels(_indexed(terms[i])).design for i in self.order]

    def split_flat(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """From flat effects (size, m) to (levels, k, m) and (q, m)."""
        one, two = x[: self.levels * self.k], x[self.levels * self.k :]
        return one.reshape(self.levels, self.k, x.shape[1]), two

    def joined(self, one: Tensor, two: Tensor) -> Tensor:
        """From (levels, k, m) and (q, m) to flat effects."""
        return torch.cat([one.flatten(0, 1), two]) if self.q else one.flatten(0, 1)

    def by_term(self, x: Tensor) -> list[Tensor]:
        """Effects (size, m) of each term, in order."""
        one, two = self.split_flat(x)
        found = [part.flatten(0, 1) for part in one.split(self.widths, 1)] if self.split else []
        return [*found, *two.split(self.sizes)]

    def rows(self, x: Tensor, designs: Sequence[Design] | None = None) -> Tensor:
        r""":math:`Z x` for flat effects (size, m)."""
        found: Tensor | None = None
        for design, part in zip(designs or self.designs, self.by_term(x), strict=True):
            product = design.matmul(part)
            found = product if found is None else found + product
        assert found is not None
        return found

    def t_rows(self, v: Tensor, designs: Sequence[Design] | None = None) -> Tensor:
        r""":math:`Z^\top v` for (n, m), flat."""
        found = [design.t_matmul(v) for design in designs or self.designs]
        ones = [x.unflatten(0, (self.levels, -1)) for x in found[: self.split]]
        one = torch.cat(ones, 1) if ones else v.new_zeros(self.levels, self.k, v.shape[1])
        rest = found[self.split :]
        return self.joined(one, torch.cat(rest) if rest else v.new_zeros(0, v.shape[1]))


class Prior:
    r"""The covariances of the random effects, :math:`G = \Lambda\Lambda^\top`.

    Args:
        layout: where the effects stand.
        covariances: of the terms, in the layout's order.
    """

    def __init__(self, layout: Stacked, covariances: Sequence[Covariance]) -> None:
        self.layout = layout
        self.first = list(covariances[: layout.split])
        self.rest = list(covariances[layout.split :])

    @classmethod
    def of(cls, layout: Stacked, terms: Sequence[Term]) -> Prior:
        """That of terms, without their graph."""
        return cls(layout, [terms[i].detach().covariance for i in layout.order])

    def roots(self, terms: Sequence[Term]) -> Prior:
        r""":math:`\Lambda` of terms in the place of G.

        Raises:
            NotPositiveDefiniteError: if a covariance is not positive semi-definite.
        """
        return Prior(self.layout, [root(terms[i].detach()) for i in self.layout.order])

    def blocks(self, like: Tensor) -> Tensor:
        """Blocks of the eliminated factor, (levels or 1, k, k)."""
        layout = self.layout
        parts = [
            part.blocks(layout.levels, width)
            for part, width in zip(self.first, layout.widths, strict=True)
        ]
        if not parts:
            return like.new_zeros(1, 0, 0)
        if len(parts) == 1:
            return parts[0]
        joint = like.new_zeros(max(map(len, parts)), layout.k, layout.k)
        at = 0
        for part in parts:
            after = layout.k - at - part.shape[1]
            joint = joint + torch.nn.functional.pad(part, (at, after, at, after))
            at += part.shape[1]
        return joint

    def times(self, x: Tensor, transpose: bool = False) -> Tensor:
        """The whole matrix times flat effects (size, m)."""
        one, two = self.layout.split_flat(x)
        if self.first:
            blocks = self.blocks(x)
            one = _times(blocks.mT if transpose else blocks, one)
        return self.layout.joined(one, self.times_rest(two, transpose))

    def times_rest(self, x: Tensor, transpose: bool = False) -> Tensor:
        """The other terms' part times (q, m)."""
        pieces = zip(self.rest, x.split(self.layout.sizes), strict=True)
        found = [part.multiply(piece, transpose) for part, piece in pieces]
        return torch.cat(found) if len(found) > 1 else found[0] if found else x

    def sandwich(self, square: Tensor, transpose: bool = False) -> Tensor:
        r""":math:`\Lambda^\top S \Lambda` of the other terms, or with the transposes, for symmetric S by
        groups of columns."""
        by = self.layout.partition
        if all(root.is_scalar for root in self.rest):
            scale = by.spread(self.times_rest(square.new_ones(self.layout.q, 1)))
            return square * scale * scale.mT
        half = by.spread(self.times_rest(by.collect(square), not transpose))
        return by.spread(self.times_rest(by.collect(half.mT), not transpose))


def products_of(layout: Stacked, designs: Sequence[Design], weights: Tensor, X: Tensor) -> System:
    r"""The products of :math:`[Z \,|\, X]` with themselves under weights, in their places."""
    scaled = [_scaled(design, weights) for design in designs]
    zz = {}
    for (t, u), cells in layout.pattern.cells.items():
        one, two = scaled[t], designs[u]
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
    weighted = weights[:, None] * X
    products = Products(zz, [design.t_matmul(weighted) for design in designs], X.mT @ weighted)
    return layout.placement.place(products)


class Factor:
    r"""The Cholesky factor of :math:`H = I + \Lambda^\top A\Lambda`, bordered by the coefficients of X.

    Args:
        at: products under the weights, :math:`A = Z^\top W Z` among them.
        roots: :math:`\Lambda`.

    Raises:
        NotPositiveDefiniteError: if the system is not positive definite.
    """

    def __init__(self, at: System, roots: Prior) -> None:
        self._at, self._roots, self.layout = at, roots, roots.layout
        L = self._L = roots.blocks(at.A11)
        eye = torch.eye(self.layout.k, dtype=L.dtype, device=L.device)
        D = eye + _times(_times(L.mT, at.A11), L)
        what = "the curvature of the random effects at the mode"
        self._C = _cholesky(D, what)
        half = _forward(self._C, L.mT.expand_as(D))
        self._half = half
        self._E22, self._Lc = at.A22, at.A22
        if self.layout.q:
            self._E22 = at.A22 - at.W.gram(half, half)
            M = roots.sandwich(self._E22)
            M.diagonal(dim1=1, dim2=2).add_(1)
            self._Lc = cholesky(M, what)
        self._of_X, self._S = None, None
        self._inverse: tuple[Tensor, Tensor] | None = None
        if at.Aff.numel():
            self._of_X = roots.times(self.layout.joined(at.A1f, at.A2f), True)  # Lambda' Z' W X
            self._solved = self._solve(self._of_X)
            self._S = cholesky(at.Aff - self._of_X.mT @ self._solved, _SEPARATED)

    def half_log_det(self) -> Tensor:
        """Half the logarithm of the determinant, of the border too."""
        found = self._C.diagonal(dim1=1, dim2=2).log().sum()
        found = found + self._Lc.diagonal(dim1=1, dim2=2).log().sum()
        return found if self._S is None else found + self._S.diagonal().log().sum()

    def solve(self, g: Tensor, g_X: Tensor) -> tuple[Tensor, Tensor]:
        """:math:`H^{-1}` times a vector (size, m) and its border (p, m)."""
        u = self._solve(g)
        if self._S is None or self._of_X is None:
            return u, g_X
        beta = torch.cholesky_solve(g_X - self._of_X.mT @ u, self._S)
        return u - self._solved @ beta, beta

    def _solve(self, g: Tensor) -> Tensor:
        layout, W, by = self.layout, self._at.W, self.layout.partition
        one, two = layout.split_flat(g)
        one = _forward(self._C, one)
        if layout.q:
            two = two - self._roots.times_rest(W.t_times(self._half.mT @ one), True)
            two = by.collect(torch.cholesky_solve(by.spread(two), self._Lc))
            one = one - self._half @ W.times(self._roots.times_rest(two))
        return layout.joined(_backward(self._C, one), two)

    def fixed_covariance(self) -> Tensor:
        """The inverse of the border's Schur complement, (p, p)."""
        assert self._S is not None
        return torch.cholesky_inverse(self._S)

    def _inverses(self) -> tuple[Tensor, Tensor]:
        r""":math:`M^{-1}` and :math:`N = \Lambda_2 M^{-1}\Lambda_2^\top`, by groups of columns."""
        if self._inverse is None:
            inverse = torch.cholesky_inverse(self._Lc)
            self._inverse = inverse, self._roots.sandwich(inverse, transpose=True)
        return self._inverse

    def log_det(self, at: System, prior: Prior) -> Tensor:
        r"""A function with the value's derivatives by the products and by the eliminated factor's
        covariances: those of :math:`\tfrac12\log|D| + \tfrac12\langle N, E\rangle`, where E is the
        other terms' system, at which N is held."""
        D, K = _reduced(at, prior)
        value = D.log().sum() if D.shape[-1] == 1 else torch.linalg.slogdet(D).logabsdet.sum()
        eye = torch.eye(self.layout.k, dtype=D.dtype, device=D.device)
        E22 = at.A22 - at.W.gram(eye.expand_as(K), K)
        return (value + (self._inverses()[1] * E22).sum()) / 2

    def of_rest(self, prior: Prior) -> list[Tensor]:
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

    def variances(self) -> list[Tensor]:
        r"""Blocks of :math:`\Lambda H^{-1}\Lambda^\top` by levels, (q, k, k) for each term in the
        layout's order, the coefficients of X held."""
        layout, by = self.layout, self.layout.partition
        N = self._inverses()[1]
        P = self._half.mT @ self._half
        whole = P + P @ self._at.W.quadratic(N) @ P if layout.q else P
        found, start = [], 0
        for width in layout.widths:
            found.append(whole[:, start : start + width, start : start + width])
            start += width
        start = 0
        for size, k in zip(layout.sizes, layout.effects[layout.split :], strict=True):
            found.append(by.own(N, start, size // k, k))
            start += size
        return found


_SEPARATED = "the information on the fixed effects (the data are separated, or say nothing of one of them): it"


def log_det(at: System, prior: Prior) -> Tensor:
    r"""Half of :math:`\log|I + A G|`, bordered by X, by plain differentiable operations.

    In G itself: a factor of G has no derivative where G is singular.
    """
    layout = prior.layout
    by = layout.partition
    eye = torch.eye(layout.k, dtype=at.A11.dtype, device=at.A11.device)
    D, K = _reduced(at, prior)
    value = D.log().sum() if layout.k == 1 else torch.linalg.slogdet(D).logabsdet.sum()
    KA = K @ at.A1f
    E2f = at.A2f
    Eff = at.Aff - inner(at.A1f, KA)
    if layout.q:
        E22 = at.A22 - at.W.gram(eye.expand_as(K), K)
        E2f = E2f - at.W.t_times(KA)
        M = by.spread(prior.times_rest(by.collect(E22)))  # G2 E22
        M = M + torch.eye(by.size, dtype=M.dtype, device=M.device)
        value = value + torch.linalg.slogdet(M).logabsdet.sum()
        x = by.collect(torch.linalg.solve(M, by.spread(prior.times_rest(E2f))))
        Eff = Eff - E2f.mT @ x
    return value / 2 + torch.linalg.slogdet(Eff).logabsdet / 2


def _reduced(at: System, prior: Prior) -> tuple[Tensor, Tensor]:
    r""":math:`D = I + A_{11} G_1` and :math:`G_1 D^{-1}`, level by level."""
    G1 = prior.blocks(at.A11)
    eye = torch.eye(prior.layout.k, dtype=G1.dtype, device=G1.device)
    D = eye + _times(at.A11, G1)
    if prior.layout.k == 1:
        return D, G1 / D
    return D, torch.linalg.solve(D.mT, G1.mT.expand_as(D)).mT


def _starts(sizes: Sequence[int]) -> list[int]:
    return [sum(sizes[:i]) for i in range(len(sizes))]


def effects_of(
    terms: Sequence[Term], layout: Stacked, b: Tensor, factor: Factor
) -> list[RandomEffects]:
    """The modes of the effects of each term with their conditional variances, in the terms' order."""
    found = {}
    parts = zip(layout.order, layout.by_term(b[:, None]), factor.variances(), strict=True)
    for i, values, variances in parts:
        found[i] = RandomEffects(terms[i].name, values.reshape(variances.shape[:2]), variances)
    return [found[i] for i in sorted(found)]


def _times(a: Tensor, b: Tensor) -> Tensor:
    """Products of blocks; of one entry they are numbers."""
    return a * b if a.shape[-2:] == (1, 1) else a @ b


def _cholesky(D: Tensor, what: str) -> Tensor:
    if D.shape[-1] != 1:
        return cholesky(D, what)
    if not bool((D > 0).all()):
        raise NotPositiveDefiniteError(f"{what} is not positive definite")
    return D.sqrt()


def _forward(C: Tensor, x: Tensor) -> Tensor:
    """:math:`C^{-1} x` for lower triangular blocks."""
    return x / C if C.shape[-1] == 1 else solve_triangular(C, x, upper=False)


def _backward(C: Tensor, x: Tensor) -> Tensor:
    r""":math:`C^{-\top} x` for lower triangular blocks."""
    return x / C if C.shape[-1] == 1 else solve_triangular(C.mT, x, upper=True)


def _indexed(term: Term) -> Term:
    """An effect of each row is one of a factor that has a level for each."""
    if isinstance(term.design, IdentityDesign):
        codes = torch.arange(term.design.shape[0], device=term.covariance.matrix.device)
        return replace(term, design=IndexedDesign(codes, None, len(codes), absent=False))
    return term


def _scaled(design: Design, weights: Tensor) -> Design:
    if isinstance(design, DenseDesign):
        return DenseDesign(design.matrix.to(weights) * weights[:, None])
    assert isinstance(design, IndexedDesign)
    values = weights[:, None]
    if design.values is not None:
        values = design.values.to(weights) * values
    return IndexedDesign(design.codes, values, design.levels, absent=False)
