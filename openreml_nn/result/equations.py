"""Henderson's mixed-model equations without the priors: cross-products of rows with R^-1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from openreml_nn.likelihood.fixed import FixedPart
from openreml_nn.likelihood.problem import cholesky
from openreml_nn.likelihood.residual import BlockResidual, Residual
from openreml_nn.likelihood.system.crossproducts import Pattern, Products, Statistics
from openreml_nn.support.errors import InputError
from openreml_nn.terms.covariance import DiagonalCovariance, RepeatedCovariance
from openreml_nn.terms.design import CodedDesign, DenseDesign, Design, IndexedDesign
from openreml_nn.terms.term import Term

__all__ = ["Equations", "FixedBasis"]

#: A covariance of the residuals without blocks is not formed for more rows.
_MOST_ROWS = 5_000


@dataclass(frozen=True)
class FixedBasis:
    r"""How the fixed part is held: the equations have :math:`Q = X \cdot` ``basis``, whose columns are
    orthonormal for the rows of a fit, and :math:`y - X b`.

    Attributes:
        basis: (p, r), X with all its columns.
        offset: b (p,).
    """

    basis: Tensor
    offset: Tensor

    @classmethod
    def of(cls, fixed: FixedPart) -> FixedBasis:
        """The basis of a fixed part."""
        p = len(fixed.aliases)
        basis, offset = fixed.T.new_zeros(p, len(fixed.T)), fixed.T.new_zeros(p)
        basis[fixed.columns], offset[fixed.columns] = fixed.T.detach(), fixed.offset.detach()
        return cls(basis, offset)

    @classmethod
    def none(cls, like: Tensor) -> FixedBasis:
        """Without coefficients."""
        return cls(like.new_zeros(0, 0), like.new_zeros(0))


@dataclass(frozen=True)
class Equations:
    r"""What the equations hold of the rows: cross-products with :math:`R^{-1}`.

    Attributes:
        sizes: levels and effects of each random term.
        pattern: which levels of two terms meet.
        products: cross-products of the terms, and of the columns [Q | y - X b]; without the last
            where there is no Gaussian response.
        fixed: what Q and b are.
        rows: how many there are.
        log_det: :math:`\log|R|`.
    """

    sizes: Sequence[tuple[int, int]]
    pattern: Pattern
    products: Products
    fixed: FixedBasis
    rows: int
    log_det: float

    @classmethod
    def of(
        cls,
        designs: Sequence[CodedDesign],
        residual: Sequence[Term],
        f: Tensor,
        fixed: FixedBasis,
    ) -> Equations | None:
        """Equations of some rows; None for residuals that are correlated over more than 5,000 rows
        in no known blocks.

        Args:
            designs: of each random term.
            residual: the terms of the residuals, in the precision of ``f``.
            f: the columns of the fixed part, see above.
            fixed: what they are.
        """
        white = _whitened(designs, residual, f)
        if white is None:
            return None
        found, f, log_det = white
        pattern = Pattern.of(found, members=True)
        sizes = [(d.levels, d.shape[1] // d.levels) for d in designs]
        return cls(sizes, pattern, pattern.products(found, f), fixed, len(f), log_det)

    @classmethod
    def of_statistics(
        cls, statistics: Statistics, variance: Tensor, fixed: FixedBasis
    ) -> Equations:
        """Equations of cross-products of rows with one residual variance, that of a weight of 1."""
        pattern, found = statistics.ordered(range(len(statistics.sizes)))
        zz = {pair: value / variance for pair, value in found.zz.items()}
        products = Products(zz, [part / variance for part in found.zf], found.ff / variance)
        log_det = statistics.log_det + statistics.rows * float(variance.log())
        return cls(statistics.sizes, pattern, products, fixed, statistics.rows, log_det)

    @property
    def has_response(self) -> bool:
        """Whether y is among the columns."""
        return len(self.products.ff) > self.fixed.basis.shape[1]

    def statistics(self) -> Statistics | None:
        """The cross-products as they add up over rows; None where levels have no cells, because
        the residuals of rows of different levels are correlated."""
        cells = {}
        for pair, found in self.pattern.cells.items():
            if found is None:
                return None
            cells[pair] = (found.a, found.b)
        return Statistics(list(self.sizes), cells, self.products, self.rows, self.log_det)

    def between(self, t: int, u: int) -> tuple[Tensor, Tensor, Tensor]:
        """Level of t, column of u and entry (cells, k_t) of each product of the two."""
        if t > u:
            (q, k), (levels, width) = self.sizes[u], self.sizes[t]
        else:
            (q, k), (levels, width) = self.sizes[t], self.sizes[u]
        pair = (min(t, u), max(t, u))
        cells, value = self.pattern.cells[pair], self.products.zz[pair]
        if cells is None:
            one = torch.arange(q * levels, device=value.device)
            a, b = one // levels, one % levels
            value = value.reshape(q, k, levels, width).movedim(1, 2).flatten(0, 1)
        else:
            a, b = cells.a, cells.b
        if t > u:
            a, b, value, width = b, a, value.mT, k
        effect = torch.arange(width, device=value.device)
        column = (b[:, None] * width + effect).flatten()
        level = a[:, None].expand(-1, width).flatten()
        return level, column, value.mT.flatten(0, 1)

    def dense(self, t: int, u: int) -> Tensor:
        r""":math:`Z_t^\top R^{-1} Z_u` as a matrix."""
        (q, k), (levels, width) = self.sizes[t], self.sizes[u]
        level, column, entries = self.between(t, u)
        found = entries.new_zeros(q, levels * width, k)
        found[level, column] = entries
        return found.movedim(1, 2).flatten(0, 1)

    def own(self, t: int) -> Tensor:
        """The blocks of a term's levels, (levels, k, k)."""
        cells, value = self.pattern.cells[t, t], self.products.zz[t, t]
        assert cells is not None
        q, k = self.sizes[t]
        found = value.new_zeros(q, k, k)
        found[cells.a] = value
        return found

    def is_blocked(self, t: int) -> bool:
        """Whether no two levels of a term have a product."""
        cells = self.pattern.cells[t, t]
        return cells is not None and (cells.a is cells.b or torch.equal(cells.a, cells.b))


def _whitened(
    designs: Sequence[CodedDesign], residual: Sequence[Term], f: Tensor
) -> tuple[list[Design], Tensor, float] | None:
    """Designs and f of rows that R makes independent and of variance 1, and the logarithm of its
    determinant."""
    try:
        R = _blocks(residual)
    except InputError:
        return None if len(f) > _MOST_ROWS else _whitened_densely(designs, residual, f)
    matrices = R.matrices(residual)
    if R.moves:
        white = R.white(matrices)
        within = [
            d if isinstance(d, IndexedDesign) and R.is_within(d.codes) else DenseDesign(d.dense(f))
            for d in designs
        ]
        return [white.design(design) for design in within], white.rows(f), float(white.log_det)
    scale = matrices[0].reshape(()).rsqrt()
    white = R.white([torch.ones_like(matrices[0])])
    log_det = float(white.log_det - 2 * len(f) * scale.log())
    return [_times(white.design(d), scale, f) for d in designs], scale * white.rows(f), log_det


def _blocks(terms: Sequence[Term]) -> Residual:
    """R of all the terms, by blocks of rows.

    Raises:
        InputError: if it has none.
    """
    R = Residual.of(terms)
    if len(R.at) == len(terms):
        return R
    # Beside independent errors what is correlated within groups counts as an effect, elsewhere.
    if all(isinstance(t.covariance, DiagonalCovariance | RepeatedCovariance) for t in terms):
        return BlockResidual(list(range(len(terms))), terms)
    raise InputError("the residuals have no blocks that are known")


def _times(design: Design, scale: Tensor, like: Tensor) -> Design:
    assert isinstance(design, CodedDesign)
    return design.with_values(lambda values: scale * values, like)


def _whitened_densely(
    designs: Sequence[CodedDesign], terms: Sequence[Term], f: Tensor
) -> tuple[list[Design], Tensor, float]:
    L = cholesky(torch.stack([term.dense() for term in terms]).sum(0), "R")
    rows = [torch.linalg.solve_triangular(L, d.dense(f), upper=False) for d in designs]
    found: list[Design] = [DenseDesign(row) for row in rows]
    log_det = 2 * float(L.diagonal().log().sum())
    return found, torch.linalg.solve_triangular(L, f, upper=False), log_det
