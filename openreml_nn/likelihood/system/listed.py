"""The system of the random effects by its non-zeros: for products with vectors only."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from openreml_nn.likelihood.fixed import FixedPart
from openreml_nn.likelihood.residual import White
from openreml_nn.likelihood.system.cross import Cross, entries_of
from openreml_nn.likelihood.system.grouped import GroupedProblem
from openreml_nn.likelihood.system.placement import System
from openreml_nn.likelihood.system.products import Pattern, Products
from openreml_nn.likelihood.system.roles import grid_of, separated
from openreml_nn.terms.design import IndexedDesign
from openreml_nn.terms.kernel import Kernel
from openreml_nn.terms.term import Term

__all__ = ["ListedCross", "ListedProblem", "levels_of"]


def levels_of(term: Term) -> tuple[int, int] | None:
    """Levels and effects of a term with independent levels, or a kernel known by its inverse."""
    z, kernel = term.design, term.covariance.known_kernel
    if kernel is None:
        return grid_of(term)
    if kernel.inverse is None or kernel.null is not None or not isinstance(z, IndexedDesign):
        return None
    k = len(term.covariance.matrix)
    return (z.levels, z.effects) if z.effects == k and z.levels == kernel.size else None


class ListedCross(Cross):
    """W by its non-zeros, for products with vectors only.

    Args:
        cells: for each other term the levels that meet, of the eliminated factor and of the term,
            and the entries (cells, k, k_t).
        shape: (levels, k, q).
        starts: first column of each term.
        like: of the dtype and device of the entries.
    """

    def __init__(
        self,
        cells: Sequence[tuple[Tensor, Tensor, Tensor]],
        shape: tuple[int, int, int],
        starts: Sequence[int],
        like: Tensor,
    ) -> None:
        self.cells, self.shape = cells, shape
        levels, k, q = shape
        none = torch.empty(0, dtype=torch.long, device=like.device)
        rows, columns, values = [none], [none], [like.new_empty(0)]
        if cells:
            rows, columns, values = [], [], []
        for (a, b, value), start in zip(cells, starts, strict=True):
            row, column = entries_of(a, b, (k, value.shape[2]))
            rows.append(row)
            columns.append(start + column)
            values.append(value.reshape(-1))
        index = torch.stack([torch.cat(rows), torch.cat(columns)])
        self._forward = _sparse(index, torch.cat(values), (levels * k, q))
        self._backward = _sparse(index.flip(0), torch.cat(values), (q, levels * k))
        self.entries = 4.0 * index.shape[1]
        self.work = 2.0 * index.shape[1]

    def times(self, x: Tensor) -> Tensor:
        return (self._forward @ x).unflatten(0, self.shape[:2])

    def t_times(self, y: Tensor) -> Tensor:
        return self._backward @ y.flatten(0, 1)


class ListedProblem(GroupedProblem):
    r"""The system by its non-zeros, for residuals of one variance.

    A kernel is known by its inverse: its levels count as a grid, and no block is formed.

    Attributes:
        kernels: the kernel of each other term, None for independent levels.
        log_det_kernels: :math:`\log|K|` of them all, as often as they have effects.
        priors: their inverses, sparse.
        kernel_diagonals: the diagonals of these.
        own: own blocks of :math:`Z_2^\top Z_2`, (levels, k, k) for each other term.
    """

    def __init__(self, fixed: FixedPart, terms: Sequence[Term], method: str) -> None:
        super().__init__(fixed, terms, method)
        terms = separated(terms)
        self.grids = [levels_of(terms[i]) for i in self.roles.rest]
        self.kernels = [terms[i].covariance.known_kernel for i in self.roles.rest]
        self.log_det_kernels = 0.0
        for kernel, grid in zip(self.kernels, self.grids, strict=True):
            if kernel is not None:
                assert grid is not None
                self.log_det_kernels += grid[1] * kernel.log_det()
        self.priors = [self._prior(kernel) for kernel in self.kernels]
        self.kernel_diagonals = [_diagonal(prior, self.f) for prior in self.priors]
        white = self.residual.white([torch.ones_like(self.f[:1, :1])])
        designs = [white.design(design) for design in self.designs]
        pattern = Pattern.of(designs)
        products = pattern.products(designs, white.rows(self.f))
        self.constant = self._place(pattern, products), white

    def system(self, residual: Sequence[Tensor]) -> tuple[System, White, Tensor]:
        assert self.constant is not None
        return (*self.constant, residual[0].reshape(()))

    def _place(self, pattern: Pattern, products: Products) -> System:
        ones, r = len(self.widths), self.f.shape[1]
        count = len(self.designs)

        def between(t: int, u: int) -> tuple[Tensor, Tensor]:
            cells = pattern.cells[t, u]
            assert cells is not None
            return cells.a, cells.b

        rows = [
            torch.cat(
                [
                    products.zz[min(t, u), max(t, u)].transpose(1, 2)
                    if t > u
                    else products.zz[t, u]
                    for u in range(ones)
                ],
                2,
            )
            for t in range(ones)
        ]
        A11 = torch.cat(rows, 1) if ones else self.f.new_zeros(0, 0, 0)
        self._starts = [sum(self.sizes[:i]) for i in range(len(self.sizes))]
        cells = []
        for u in range(ones, count) if ones else ():
            value = torch.cat([products.zz[t, u] for t in range(ones)], 1)
            cells.append((*between(0, u), value))
        shape = (self.levels, self.k, self.q)
        W = ListedCross(cells, shape, self._starts if ones else [], self.f)
        self.own = [products.zz[t, t] for t in range(ones, count)]  # (levels_t, k_t, k_t)
        rest = {
            (t - ones, u - ones): (*between(t, u), products.zz[t, u])
            for t in range(ones, count)
            for u in range(t, count)
        }
        self._square = self._sparse_square(rest)
        zf = products.zf
        first = [zf[t].unflatten(0, (self.levels, w)) for t, w in enumerate(self.widths)]
        A1f = torch.cat(first, 1) if first else self.f.new_zeros(0, 0, r)
        A2f = torch.cat(zf[ones:]) if zf[ones:] else self.f.new_zeros(0, r)
        return System(A11, W, A1f, self.f.new_zeros(0), A2f, products.ff)

    def _sparse_square(self, cells: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]]) -> Tensor:
        """:math:`Z_2^\\top Z_2`, sparse (q, q)."""
        index, values = [], []
        for (t, u), (a, b, value) in cells.items():
            row, column = entries_of(a, b, (value.shape[1], value.shape[2]))
            row, column = self._starts[t] + row, self._starts[u] + column
            index.append(torch.stack([row, column]))
            values.append(value.reshape(-1))
            if t != u:
                index.append(torch.stack([column, row]))
                values.append(value.reshape(-1))
        if not index:
            return self.f.new_zeros(0, 0)
        return _sparse(torch.cat(index, 1), torch.cat(values), (self.q, self.q))

    def _prior(self, kernel: Kernel | None) -> Tensor | None:
        """The inverse of a kernel, sparse."""
        if kernel is None:
            return None
        assert kernel.inverse is not None
        found = kernel.inverse.to(self.f).to_sparse_coo().coalesce()
        return _sparse(found.indices(), found.values(), (kernel.size, kernel.size))

    def times_22(self, x: Tensor) -> Tensor:
        """:math:`Z_2^\\top Z_2 x`."""
        return self._square @ x

    def by_levels(self, x: Tensor) -> list[Tensor]:
        """From (q, m) to each other term's (levels, k, m)."""
        grids = [grid for grid in self.grids if grid is not None]
        pieces = zip(x.split(self.sizes), grids, strict=True) if self.sizes else ()
        return [piece.unflatten(0, grid) for piece, grid in pieces]

    def flat(self, parts: Sequence[Tensor], like: Tensor) -> Tensor:
        """One matrix of the parts that :meth:`by_levels` made."""
        return torch.cat([part.flatten(0, 1) for part in parts]) if parts else like


def _diagonal(prior: Tensor | None, like: Tensor) -> Tensor:
    """Diagonal of a sparse matrix as (q, 1), of the identity as (1, 1)."""
    if prior is None:
        return like.new_ones(1, 1)
    found = prior.to_sparse_coo().coalesce()
    on = found.indices()[0] == found.indices()[1]
    return found.values()[on][:, None]


def _sparse(index: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    found = torch.sparse_coo_tensor(index, values, shape, check_invariants=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR", UserWarning)  # torch calls them beta
        return found.coalesce().to_sparse_csr()
