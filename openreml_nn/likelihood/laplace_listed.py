"""The system of the random effects by its non-zeros, with weights that move: for products with vectors only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from openreml_nn.likelihood.laplace_layout import Prior, Stacked, times_blocks, with_levels
from openreml_nn.likelihood.laplace_system import weighted_products
from openreml_nn.likelihood.problem import cholesky
from openreml_nn.likelihood.system.blocks import block_solve, block_times
from openreml_nn.likelihood.system.conjugate import conjugate_gradients
from openreml_nn.likelihood.system.listed import (
    Levels,
    ListedPlaces,
    own_blocks,
    without_levels,
)
from openreml_nn.likelihood.system.scaled import ScaledSystem
from openreml_nn.support.errors import InputError
from openreml_nn.terms.term import Term

__all__ = ["ListedLayout", "ListedSystem"]


class ListedLayout(Stacked):
    """Where the random effects of some terms stand, and which of their levels meet.

    Args:
        terms: the random terms, at least one.

    Attributes:
        others: the levels of the terms that are not eliminated, ``rest`` in order.
        places: where their products have their entries.
        own_pairs: pairs of terms whose products the blocks of a level depend on.

    Raises:
        InputError: if a term is no grouping factor with independent levels, or related by a known
            inverse.
    """

    def __init__(self, terms: Sequence[Term]) -> None:
        obstacle = self.obstacle(terms)
        if obstacle is not None:
            raise InputError(obstacle)
        super().__init__(terms)
        like = terms[0].covariance.matrix
        split, count = self.split, len(self.order)
        self.others = Levels([with_levels(terms[i]) for i in self.order[split:]], like)
        self.grids = list(self.others.grids)
        self.rest = range(split, count)
        shape = self.levels, self.k, self.q
        self.places = ListedPlaces(self.pattern, split, self.others, shape, like.device)
        self.own_pairs = [(t, u) for t in range(split) for u in range(t, count)]
        self.own_pairs += [(t, t) for t in self.rest]

    @staticmethod
    def obstacle(terms: Sequence[Term]) -> str | None:
        """Why some terms have no such system, in a sentence; None where they have."""
        return without_levels(map(with_levels, terms))

    def blocks_of(self, roots: Prior) -> list[Tensor]:
        """Blocks of the other terms' covariances, (levels or 1, k, k) for each."""
        return [x.blocks(*grid) for x, grid in zip(roots.rest, self.others.grids, strict=True)]


class ListedSystem:
    r""":math:`H = Q + \Lambda^\top Z^\top W Z\Lambda` with the largest factor eliminated.

    Args:
        layout: where the effects stand.
        roots: :math:`\Lambda`; for levels that are related that of their effects.
        weights: of the rows, (n,).
        tolerance: relative residual at which solves end.

    Attributes:
        C: Cholesky factor of :math:`D = I + \Lambda_1^\top A_{11}\Lambda_1`, (levels, k, k).
        K: :math:`\Lambda_1 D^{-1}\Lambda_1^\top`, (levels, k, k).
        W: :math:`Z_1^\top W Z_2`.
        own: own blocks of :math:`E_{22}`, what is left of the other terms, (levels, k, k) for each.
        scaled: their system, scaled by its own blocks.

    Raises:
        NotPositiveDefiniteError: if a block is not positive definite.
    """

    def __init__(
        self, layout: ListedLayout, roots: Prior, weights: Tensor, tolerance: float
    ) -> None:
        self.layout, self.others, self._roots = layout, layout.others, roots
        self._tolerance, split = tolerance, layout.split
        zz = weighted_products(layout.pattern, layout.designs, weights)
        empty = weights.new_zeros(0, 0, 0)
        self._A11 = own_blocks(zz, split) if split else empty
        self.W = layout.places.cross(zz, weights)
        L = self._L = roots.blocks(weights)
        eye = torch.eye(layout.k, dtype=L.dtype, device=L.device)
        D = eye + times_blocks(times_blocks(L.mT, self._A11), L) if split else empty
        self.C = cholesky(D, "the curvature of the random effects at the mode")
        self._half = block_solve(self.C, L.mT.expand_as(D)) if split else empty
        self.K = block_times(self._half.mT, self._half)
        self._A22 = layout.places.square(zz, weights)
        self.own = own = [zz[t, t] for t in layout.rest]
        for i, (a, b, value) in enumerate(self.W.cells):
            own[i] = own[i].index_add(0, b, -(value.mT @ self.K[a] @ value))
        self.scaled = ScaledSystem(self.others, self.times_rest, own, layout.blocks_of(roots))

    def times_rest(self, x: Tensor) -> Tensor:
        """:math:`E_{22} x` for effects (q, m)."""
        found = self._A22 @ x
        if self.layout.levels:
            found = found - self.W.t_times(block_times(self.K, self.W.times(x)))
        return found

    def carried(self, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r"""What effects b (q, m) carry with them: :math:`W b` and :math:`(I + A_{11}G_1)^{-1} W b`, both
        (levels, k, m), and the predictor of the rows (n, m) with the eliminated factor's effects that
        belong to b."""
        layout = self.layout
        if not layout.levels:
            none = b.new_zeros(0, 0, b.shape[1])
            return none, none, layout.rows(b)
        met = self.W.times(b)
        if layout.k == 1:
            lost = met / self.C**2
        else:
            eye = torch.eye(layout.k, dtype=b.dtype, device=b.device)
            lost = torch.linalg.solve(eye + self._A11 @ (self._L @ self._L.mT), met)
        return met, lost, layout.rows(layout.joined(-block_times(self.K, met), b))

    def solve_rest(self, x: Tensor) -> Tensor:
        r""":math:`(Q_2 + \Lambda_2^\top E_{22}\Lambda_2)^{-1} x` for (q, m).

        Raises:
            NotPositiveDefiniteError: if the system is not positive definite.
        """
        right = self.scaled.scaled(x)
        found, _ = conjugate_gradients(
            self.scaled.times, right, torch.zeros_like(right), self._tolerance
        )
        return self.scaled.unscaled(found)

    def solve(self, g: Tensor) -> Tensor:
        """:math:`H^{-1} g` for flat effects (size, m).

        Raises:
            NotPositiveDefiniteError: if H is not positive definite.
        """
        layout, roots = self.layout, self._roots
        one, two = layout.split_flat(g)
        if not layout.levels:
            return self.solve_rest(two)
        one = block_solve(self.C, one)
        if layout.q:
            two = two - roots.times_rest(self.W.t_times(block_times(self._half.mT, one)), True)
            two = self.solve_rest(two)
            one = one - block_times(self._half, self.W.times(roots.times_rest(two)))
        return layout.joined(block_solve(self.C, one, transpose=True), two)
