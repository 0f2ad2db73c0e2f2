"""The system of the random effects by its non-zeros: for products with vectors only."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from openreml_nn.likelihood.fixed import FixedPart
from openreml_nn.likelihood.residual import White
from openreml_nn.likelihood.system.cross import Cross, entries_of
from openreml_nn.likelihood.system.crossproducts import Pattern, Products
from openreml_nn.likelihood.system.grouped import GroupedProblem
from openreml_nn.likelihood.system.placement import System
from openreml_nn.likelihood.system.roles import grid_of, separated
from openreml_nn.terms.design import IndexedDesign
from openreml_nn.terms.kernel import Kernel
from openreml_nn.terms.term import Term

__all__ = [
    "Levels",
    "ListedCross",
    "ListedPlaces",
    "ListedProblem",
    "SparseEntries",
    "levels_of",
    "own_blocks",
    "through",
    "without_levels",
]


def levels_of(term: Term) -> tuple[int, int] | None:
    """Levels and effects of a term with independent levels, or a kernel known by its inverse."""
    z, kernel = term.design, term.covariance.known_kernel
    if kernel is None:
        return grid_of(term)
    if kernel.inverse is None or kernel.null is not None or not isinstance(z, IndexedDesign):
        return None
    k = len(term.covariance.matrix)
    return (z.levels, z.effects) if z.effects == k and z.levels == kernel.size else None


def without_levels(terms: Iterable[Term]) -> str | None:
    """Which of some terms is no grouping factor of such levels, in a sentence; None where all are."""
    for term in terms:
        if levels_of(term) is None:
            return (
                "the krylov solver needs grouping factors with independent levels, or related by a "
                f"known inverse: term {term.name!r} is none"
            )
    return None


class SparseEntries:
    """Where a sparse matrix has its entries, each once: for matrices that differ in their numbers alone.

    Args:
        row, column: (entries,) where each stands.
        shape: of the matrix.
    """

    def __init__(self, row: Tensor, column: Tensor, shape: tuple[int, int]) -> None:
        key = row * shape[1] + column
        self._order: Tensor | None = None
        if bool((key[1:] < key[:-1]).any()):  # looking takes a tenth of the time of sorting
            self._order = torch.argsort(key)
            column = column[self._order]
        starts = torch.nn.functional.pad(torch.bincount(row, minlength=shape[0]).cumsum(0), (1, 0))
        # Short numbers are read in less time, and all of what is multiplied is read each time.
        kind = torch.int32 if max(len(key), *shape) < 2**31 else torch.int64
        self._starts, self._columns, self._shape = starts.to(kind), column.to(kind), shape

    def matrix(self, values: Tensor) -> Tensor:
        """The matrix of some numbers, in the order of the entries."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR", UserWarning)  # torch calls them beta
            return torch.sparse_csr_tensor(
                self._starts,
                self._columns,
                values if self._order is None else values[self._order],
                self._shape,
                check_invariants=False,
            )


class ListedPattern:
    """Where W has its entries.

    Args:
        cells: for each other term the levels that meet, of the eliminated factor and of the term.
        effects: of a level of each of these terms.
        shape: (levels, k, q).
        starts: first column of each term.
        device: of the entries.
    """

    def __init__(
        self,
        cells: Sequence[tuple[Tensor, Tensor]],
        effects: Sequence[int],
        shape: tuple[int, int, int],
        starts: Sequence[int],
        device: torch.device,
    ) -> None:
        self.cells, self.shape = list(cells), shape
        levels, k, q = shape
        none = torch.empty(0, dtype=torch.long, device=device)
        rows, columns = [none], [none]
        for (a, b), m, start in zip(cells, effects, starts, strict=True):
            row, column = entries_of(a, b, (k, m))
            rows.append(row)
            columns.append(start + column)
        row, column = torch.cat(rows), torch.cat(columns)
        self.entries = len(row)
        self.forward = SparseEntries(row, column, (levels * k, q))
        self.backward = SparseEntries(column, row, (q, levels * k))


class ListedCross(Cross):
    """W by its non-zeros, for products with vectors only.

    Args:
        pattern: where they are.
        values: of the cells of each other term, (cells, k, k_t).
        like: of the dtype and device of the entries.

    Attributes:
        cells: for each other term the levels that meet, of the eliminated factor and of the term,
            and the entries (cells, k, k_t).
    """

    def __init__(self, pattern: ListedPattern, values: Sequence[Tensor], like: Tensor) -> None:
        self.cells = [(*pair, value) for pair, value in zip(pattern.cells, values, strict=True)]
        self.shape = pattern.shape
        flat = torch.cat([like.new_empty(0), *(value.reshape(-1) for value in values)])
        self._forward = pattern.forward.matrix(flat)
        self._backward = pattern.backward.matrix(flat)
        self.entries = 4.0 * pattern.entries
        self.work = 2.0 * pattern.entries

    def times(self, x: Tensor) -> Tensor:
        return (self._forward @ x).unflatten(0, self.shape[:2])

    def t_times(self, y: Tensor) -> Tensor:
        return self._backward @ y.flatten(0, 1)


class Levels:
    r"""The levels of terms that are not eliminated, independent or related by a known inverse.

    A kernel is known by its inverse: its levels count as a grid, and no block is formed.

    Args:
        terms: with a column for each of the effects of a level.
        like: of the dtype and device of what is computed.

    Attributes:
        grids: levels and effects of each.
        kernels: the kernel of each, None for independent levels.
        log_det: :math:`\log|K|` of them all, as often as they have effects.
        priors: their inverses, sparse.
        diagonals: the diagonals of these.
    """

    def __init__(self, terms: Sequence[Term], like: Tensor) -> None:
        self.grids = [grid for term in terms if (grid := levels_of(term)) is not None]
        self.sizes = [levels * effects for levels, effects in self.grids]
        self.starts = [sum(self.sizes[:i]) for i in range(len(self.sizes))]
        self.kernels = [term.covariance.known_kernel for term in terms]
        self.log_det = 0.0
        for kernel, (_, effects) in zip(self.kernels, self.grids, strict=True):
            if kernel is not None:
                self.log_det += effects * kernel.log_det()
        self.priors = [_prior(kernel, like) for kernel in self.kernels]
        self.diagonals = [_diagonal(prior, like) for prior in self.priors]

    @property
    def are_related(self) -> bool:
        """Whether a kernel relates levels of one of the terms."""
        return any(kernel is not None for kernel in self.kernels)

    def by_levels(self, x: Tensor) -> list[Tensor]:
        """From (q, m) to each term's (levels, k, m)."""
        pieces = zip(x.split(self.sizes), self.grids, strict=True) if self.sizes else ()
        return [piece.unflatten(0, grid) for piece, grid in pieces]

    def flat(self, parts: Sequence[Tensor], like: Tensor) -> Tensor:
        """One matrix of the parts that :meth:`by_levels` made."""
        return torch.cat([part.flatten(0, 1) for part in parts]) if parts else like

    def times_priors(self, x: Tensor) -> Tensor:
        """The precisions of all terms times x (q, m)."""
        parts = []
        for prior, part in zip(self.priors, self.by_levels(x), strict=True):
            moved = part if prior is None else (prior @ part.flatten(1)).reshape(part.shape)
            parts.append(moved)
        return self.flat(parts, x)

    def square(
        self, cells: Sequence[tuple[int, int, Tensor, Tensor]]
    ) -> tuple[SparseEntries, list[tuple[int, int]]]:
        """Where products of all terms with themselves have their entries, (q, q).

        Args:
            cells: two terms t ≤ u, and the levels of them that meet.

        Returns:
            The entries, and for each of the parts whose values they are to be given in turn the terms
            t and u; of two terms each part stands twice, as it is and with t and u exchanged.
        """
        rows, columns, parts = [], [], []
        for t, u, a, b in cells:
            row, column = entries_of(a, b, (self.grids[t][1], self.grids[u][1]))
            row, column = self.starts[t] + row, self.starts[u] + column
            rows += [row] if t == u else [row, column]
            columns += [column] if t == u else [column, row]
            parts += [(t, u)] if t == u else [(t, u), (t, u)]
        q = sum(self.sizes)
        return SparseEntries(torch.cat(rows), torch.cat(columns), (q, q)), parts


class ListedPlaces:
    """Where products of terms with each other have their entries, the first of one eliminated factor.

    Args:
        pattern: which levels of the designs meet.
        ones: so many terms are eliminated together.
        others: the levels of the terms after these.
        shape: (levels, k, q) of W.
        device: of the entries.

    Attributes:
        cells: for each other term the levels that meet, of the eliminated factor and of the term.
    """

    def __init__(
        self,
        pattern: Pattern,
        ones: int,
        others: Levels,
        shape: tuple[int, int, int],
        device: torch.device,
    ) -> None:
        def between(t: int, u: int) -> tuple[Tensor, Tensor]:
            cells = pattern.cells[t, u]
            assert cells is not None
            return cells.a, cells.b

        count = ones + len(others.grids)
        rest = range(ones, count)
        self._ones, self._met = ones, rest if ones else range(0)
        self._cross = ListedPattern(
            [between(0, u) for u in self._met],
            [others.grids[u - ones][1] for u in self._met],
            shape,
            others.starts if ones else [],
            device,
        )
        self.cells = self._cross.cells
        pairs = [(t, u) for t in rest for u in range(t, count)]
        cells = [(t - ones, u - ones, *between(t, u)) for t, u in pairs]
        self._square = others.square(cells) if cells else None

    def cross(self, zz: Mapping[tuple[int, int], Tensor], like: Tensor) -> ListedCross:
        """W of products t ≤ u of the designs, with ``like`` as :class:`ListedCross` takes it."""
        values = [torch.cat([zz[t, u] for t in range(self._ones)], 1) for u in self._met]
        return ListedCross(self._cross, values, like)

    def square(self, zz: Mapping[tuple[int, int], Tensor], like: Tensor) -> Tensor:
        """Products of the other terms with themselves, sparse (q, q); empty where there are none."""
        if self._square is None:
            return like.new_zeros(0, 0)
        entries, parts = self._square
        values = [zz[self._ones + t, self._ones + u].reshape(-1) for t, u in parts]
        return entries.matrix(torch.cat(values))


def own_blocks(zz: Mapping[tuple[int, int], Tensor], ones: int) -> Tensor:
    """Diagonal blocks (levels, k, k) of terms of one grouping factor, the first ``ones`` of all, from
    their products t ≤ u."""
    rows = [
        torch.cat([zz[min(t, u), max(t, u)].mT if t > u else zz[t, u] for u in range(ones)], 2)
        for t in range(ones)
    ]
    return torch.cat(rows, 1)


class ListedProblem(GroupedProblem):
    r"""The system by its non-zeros, for residuals of one variance.

    Attributes:
        others: the levels of the other terms.
        own: own blocks of :math:`Z_2^\top Z_2`, (levels, k, k) for each other term.
    """

    def __init__(self, fixed: FixedPart, terms: Sequence[Term], method: str) -> None:
        super().__init__(fixed, terms, method)
        terms = separated(terms)
        self.others = Levels([terms[i] for i in self.roles.rest], self.f)
        self.grids = list(self.others.grids)
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
        zz = products.zz
        A11 = own_blocks(zz, ones) if ones else self.f.new_zeros(0, 0, 0)
        shape = self.levels, self.k, self.q
        places = ListedPlaces(pattern, ones, self.others, shape, self.f.device)
        self.own = [zz[t, t] for t in range(ones, len(self.designs))]  # (levels_t, k_t, k_t)
        self._square = places.square(zz, self.f)
        zf = products.zf
        first = [zf[t].unflatten(0, (self.levels, w)) for t, w in enumerate(self.widths)]
        A1f = torch.cat(first, 1) if first else self.f.new_zeros(0, 0, r)
        A2f = torch.cat(zf[ones:]) if zf[ones:] else self.f.new_zeros(0, r)
        return System(A11, places.cross(zz, self.f), A1f, self.f.new_zeros(0), A2f, products.ff)

    def times_22(self, x: Tensor) -> Tensor:
        """:math:`Z_2^\\top Z_2 x`."""
        return self._square @ x


def through(kernel: Kernel, x: Tensor, y: Tensor) -> Tensor:
    r""":math:`\sum_{ij} K_{ij} x_i y_j^\top` for x and y (q, t, m), (t, t)."""
    moved = kernel.multiply(y.flatten(1)).reshape(y.shape)
    return torch.einsum("iam,ibm->ab", x, moved)


def _prior(kernel: Kernel | None, like: Tensor) -> Tensor | None:
    """The inverse of a kernel, sparse."""
    if kernel is None:
        return None
    assert kernel.inverse is not None
    found = kernel.inverse.to(like).to_sparse_coo().coalesce()
    row, column = found.indices()
    return SparseEntries(row, column, (kernel.size, kernel.size)).matrix(found.values())


def _diagonal(prior: Tensor | None, like: Tensor) -> Tensor:
    """Diagonal of a sparse matrix as (q, 1), of the identity as (1, 1)."""
    if prior is None:
        return like.new_ones(1, 1)
    found = prior.to_sparse_coo().coalesce()
    on = found.indices()[0] == found.indices()[1]
    return found.values()[on][:, None]
