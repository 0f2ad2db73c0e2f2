r"""The likelihood of crossed factors too large for a factorisation, by products alone.

One factor is eliminated exactly, as in the blocked solver. The system of the
others, scaled by its diagonal blocks, is :math:`\hat M = I + E` with nothing on
the diagonal of E. It is never formed: preconditioned conjugate gradients solve
with it, and their coefficients give Lanczos quadrature for its log-determinant.

What is exact (to the tolerance of the solves): BLUEs, BLUPs, the generalised
residual sum of squares, the average information. What is estimated by
random signs z, fixed once for all evaluations: the log-determinant
and traces of :math:`\hat M^{-1}`. Their first-order parts, known to be zero, are
taken off each sample, so that only second-order noise is left.

Reference:
    Golub and Meurant, Matrices, Moments and Quadrature (2010), chapters 7 and 11;
    Ubaru, Chen and Saad, SIAM Journal on Matrix Analysis 38 (2017) 1075;
    Kündig and Sigrist, arXiv:2405.04330, section 3.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import nan
from typing import ClassVar

import torch
from torch import Tensor
from torch.linalg import solve_triangular

from openreml_nn.likelihood.fixed import FixedPart
from openreml_nn.likelihood.problem import (
    Cost,
    Evaluation,
    NotPositiveDefiniteError,
    Problem,
    cholesky,
)
from openreml_nn.likelihood.residual import Residual, White
from openreml_nn.likelihood.solver import Solver
from openreml_nn.likelihood.system.cross import Cross, System, entries_of
from openreml_nn.likelihood.system.grouped import (
    Crossed,
    GroupedEvaluation,
    GroupedProblem,
    Layout,
    grid_of,
    inner,
    root,
    separated,
    steps_of,
)
from openreml_nn.likelihood.system.products import Pattern, Products
from openreml_nn.support.checks import check_count, check_number
from openreml_nn.support.errors import InputError
from openreml_nn.terms.covariance import Covariance, RepeatedCovariance, ScaledCovariance
from openreml_nn.terms.design import IndexedDesign
from openreml_nn.terms.kernel import Kernel
from openreml_nn.terms.term import Term

__all__ = ["Krylov", "KrylovProblem"]

_MOST_STEPS = 1000
#: Steps of conjugate gradients in a forecast.
_STEPS = 30
_REASON = "by products alone"


@dataclass(frozen=True)
class Krylov(Solver):
    """Conjugate gradients and random signs: for crossed factors that are too large otherwise.

    Args:
        probes: random signs, which share the work of one sparse product. Where there are as many
            as patterns of signs, each of these is taken once, and the likelihood is exact. By
            default 24, and 192 where levels are related: relatives differ less from each other
            than the system from its diagonal.
        tolerance: relative residual at which the solves for data end.
        probe_tolerance: that at which the solves for probes end.
        seed: of the random signs, which are the same at all evaluations.

    Raises:
        TypeError, InputError: if an option is no number of its kind.
    """

    name: ClassVar[str] = "krylov"
    probes: int | None = None
    tolerance: float = 1e-11
    probe_tolerance: float = 1e-6
    seed: int = 0

    def __post_init__(self) -> None:
        if self.probes is not None:
            check_count("probes", self.probes, 1)
        check_number("tolerance", self.tolerance, above=0, below=1)
        check_number("probe_tolerance", self.probe_tolerance, above=0, below=1)
        check_count("seed", self.seed)

    def forecast(self, terms: Sequence[Term], p: int, dtype: torch.dtype) -> Cost | None:
        if self.obstacle(terms) is not None:
            return None
        terms = separated(terms)
        layout = Layout.of(terms)
        n, q = terms[0].design.shape[0], sum(terms[i].design.shape[1] for i in layout.random)
        count = self.count(any(_kernel_of(terms[i]) is not None for i in layout.rest))
        # No more levels meet than there are rows.
        work, held = 4.0 * n * (count + p + 1), 8.0 * (n + (count + p + 1) * q)
        steps = steps_of(terms, layout, p)
        return Cost(_STEPS * work, dtype.itemsize * held, False, _REASON, steps)

    def problem(self, fixed: FixedPart, terms: Sequence[Term], method: str) -> Problem:
        return KrylovProblem(fixed, terms, method, self)

    def obstacle(self, terms: Sequence[Term]) -> str | None:
        terms = separated(terms)
        try:
            residual = Residual.of(terms)
        except InputError as error:
            return str(error)
        for i, term in enumerate(terms):
            if i not in residual.at and _levels_of(term) is None:
                return (
                    "the krylov solver needs grouping factors with independent levels, or related "
                    f"by a known inverse: term {term.name!r} is none"
                )
        return "the krylov solver needs residuals of one variance" if residual.moves else None

    def count(self, related: bool) -> int:
        """How many random signs are taken, where levels are related or not."""
        return self.probes or (192 if related else 24)

    def signs(self, q: int, related: bool) -> Tensor:
        """The random signs (q, count)."""
        count = self.count(related)
        if _is_every(q, count):
            bits = torch.arange(2**q)[None, :] >> torch.arange(q)[:, None]
            return 2 * (bits & 1) - 1
        generator = torch.Generator().manual_seed(self.seed)
        return 2 * torch.randint(0, 2, (q, count), generator=generator) - 1


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


def _diagonal(prior: Tensor | None, like: Tensor) -> Tensor:
    """Diagonal of a sparse matrix as (q, 1), of the identity as (1, 1)."""
    if prior is None:
        return like.new_ones(1, 1)
    found = prior.to_sparse_coo().coalesce()
    on = found.indices()[0] == found.indices()[1]
    return found.values()[on][:, None]


def _is_every(q: int, count: int) -> bool:
    """Whether so many signs are as many as there are patterns of q, 2^q."""
    return count.bit_length() > q


def _sparse(index: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    found = torch.sparse_coo_tensor(index, values, shape, check_invariants=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR", UserWarning)  # torch calls them beta
        return found.coalesce().to_sparse_csr()


def _kernel_of(term: Term) -> Kernel | None:
    g = term.covariance
    return g.kernel if isinstance(g, ScaledCovariance) else None


def _levels_of(term: Term) -> tuple[int, int] | None:
    """Levels and effects of a term with independent levels, or a kernel known by its inverse."""
    z, kernel = term.design, _kernel_of(term)
    if kernel is None:
        return grid_of(term)
    if kernel.inverse is None or not isinstance(z, IndexedDesign):
        return None
    k = len(term.covariance.matrix)
    return (z.levels, z.effects) if z.effects == k and z.levels == kernel.size else None


class KrylovProblem(GroupedProblem):
    """The system of the other terms by conjugate gradients.

    Raises:
        InputError: if a random term is not a grouping factor with independent levels, or the
            residuals have more than one variance.
    """

    has_second_derivatives = False

    def __init__(
        self, fixed: FixedPart, terms: Sequence[Term], method: str, solver: Krylov
    ) -> None:
        solver.check(terms)
        super().__init__(fixed, terms, method)
        self.solver = solver
        terms = separated(terms)
        # A kernel is known by its inverse: its levels count as a grid, and no block is formed.
        self.grids = [_levels_of(terms[i]) for i in self.layout.rest]
        self.kernels = [_kernel_of(terms[i]) for i in self.layout.rest]
        self.log_det_kernels = 0.0
        for kernel, grid in zip(self.kernels, self.grids, strict=True):
            if kernel is not None:
                assert grid is not None
                self.log_det_kernels += grid[1] * kernel.log_det()
        self.priors = [self._prior(kernel) for kernel in self.kernels]
        self.kernel_diagonals = [_diagonal(prior, self._f) for prior in self.priors]
        white = self.residual.white([torch.ones_like(self._f[:1, :1])])
        designs = [white.design(design) for design in self._designs]
        pattern = Pattern.of(designs)
        products = pattern.products(designs, white.rows(self._f))
        self._constant = self._place(pattern, products), white
        related = any(kernel is not None for kernel in self.kernels)
        self.probes = solver.signs(self.q, related).to(self._f)
        self.start: Tensor | None = None  # the last solution for the data

    def anew(self, fixed: FixedPart, terms: Sequence[Term]) -> Problem:
        return KrylovProblem(fixed, terms, self.method, self.solver)

    def with_fixed(self, fixed: FixedPart) -> Problem:
        found = super().with_fixed(fixed)
        assert isinstance(found, KrylovProblem)
        if self.start is not None and self.start.shape[1] != fixed.Q.shape[1] + 1:
            found.start = None
        return found

    def system(self, residual: Sequence[Tensor]) -> tuple[System, White, Tensor]:
        assert self._constant is not None
        return (*self._constant, residual[0].reshape(()))

    def _evaluate(self, terms: Sequence[Term], matrices: list[Tensor]) -> Evaluation:
        return _KrylovEvaluation(self, terms, matrices)

    def recorded(self, matrices: Sequence[Tensor]) -> Tensor:
        raise NotImplementedError(
            "the krylov solver has no second derivative, and no gradient by a trainable design: "
            "use solver='blocked'"
        )

    def cost(self) -> Cost | None:
        found = self.solver.forecast(self.terms, self.p, self._f.dtype)
        assert found is not None and self._constant is not None
        columns = self.probes.shape[1] + self.p + 1
        held = self._constant[0].W.entries + 8.0 * columns * (self.q + self.levels * self.k)
        return replace(found, bytes=self._f.itemsize * held)

    def _place(self, pattern: Pattern, products: Products) -> System:
        ones, r = len(self.widths), self._f.shape[1]
        count = len(self._designs)

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
        A11 = torch.cat(rows, 1) if ones else self._f.new_zeros(0, 0, 0)
        self._starts = [sum(self.sizes[:i]) for i in range(len(self.sizes))]
        cells = []
        for u in range(ones, count) if ones else ():
            value = torch.cat([products.zz[t, u] for t in range(ones)], 1)
            cells.append((*between(0, u), value))
        shape = (self.levels, self.k, self.q)
        W = ListedCross(cells, shape, self._starts if ones else [], self._f)
        self.own = [products.zz[t, t] for t in range(ones, count)]  # (levels_t, k_t, k_t)
        rest = {
            (t - ones, u - ones): (*between(t, u), products.zz[t, u])
            for t in range(ones, count)
            for u in range(t, count)
        }
        self._square = self._sparse_square(rest)
        zf = products.zf
        first = [zf[t].unflatten(0, (self.levels, w)) for t, w in enumerate(self.widths)]
        A1f = torch.cat(first, 1) if first else self._f.new_zeros(0, 0, r)
        A2f = torch.cat(zf[ones:]) if zf[ones:] else self._f.new_zeros(0, r)
        return System(A11, W, A1f, self._f.new_zeros(0), A2f, products.ff)

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
            return self._f.new_zeros(0, 0)
        return _sparse(torch.cat(index, 1), torch.cat(values), (self.q, self.q))

    def _prior(self, kernel: Kernel | None) -> Tensor | None:
        """The inverse of a kernel, sparse."""
        if kernel is None:
            return None
        assert kernel.inverse is not None
        found = kernel.inverse.to(self._f).to_sparse_coo().coalesce()
        return _sparse(found.indices(), found.values(), (kernel.size, kernel.size))

    @cached_property
    def _control(self) -> Tensor | None:
        """For each probe, how far the sampled log-determinant of the kernels' inverses is off
        the known one; None if there are no kernels."""
        if not any(kernel is not None for kernel in self.kernels):
            return None
        none = [block.new_zeros(block.shape) for block in self.own]
        alone = _Scaled(self, torch.zeros_like, none, none)
        z = self.probes
        _, T = _conjugate_gradients(
            alone.times, z, torch.zeros_like(z), self.solver.probe_tolerance
        )
        return _log_samples(T, self.q) + alone.log_det + self.log_det_kernels

    def controlled(self, samples: Tensor) -> Tensor:
        """Samples (probes, …) less what goes with the errors that are known."""
        control = self._control
        if control is None or not float(control.var()) > 0:
            return samples
        centred = control - control.mean()
        slope = torch.tensordot(centred, samples, dims=([0], [0])) / (centred @ centred)
        return samples - control.reshape(-1, *[1] * (samples.dim() - 1)) * slope

    def times_22(self, x: Tensor) -> Tensor:
        """:math:`Z_2^\\top Z_2 x`."""
        return self._square @ x

    def by_levels(self, x: Tensor) -> list[Tensor]:
        """From (q, m) to each other term's (levels, k, m)."""
        grids = [grid for grid in self.grids if grid is not None]
        pieces = zip(x.split(self.sizes), grids, strict=True) if self.sizes else ()
        return [piece.unflatten(0, grid) for piece, grid in pieces]

    def flat(self, parts: Sequence[Tensor], like: Tensor) -> Tensor:
        """Back from :meth:`by_levels`."""
        return torch.cat([part.flatten(0, 1) for part in parts]) if parts else like


class _Scaled:
    r"""The system :math:`B + \Lambda^\top E_{22} \Lambda`, scaled by its own diagonal blocks
    :math:`C C^\top` to :math:`\hat M`; B is the identity, or the inverse of a kernel.

    Args:
        times: :math:`E_{22} x`.
        own: own blocks of :math:`E_{22}`, (levels, k, k) for each term.
        roots: blocks of :math:`\Lambda`, (levels or 1, k, k) for each term.
    """

    def __init__(
        self,
        problem: KrylovProblem,
        times: Callable[[Tensor], Tensor],
        own: Sequence[Tensor],
        roots: Sequence[Tensor],
    ) -> None:
        self._problem, self._times_e22, self.roots = problem, times, roots
        blocks = [L.mT @ block @ L for L, block in zip(roots, own, strict=True)]
        for block, kernel in zip(blocks, problem.kernel_diagonals, strict=True):
            block.diagonal(dim1=1, dim2=2).add_(kernel)
        factors = [cholesky(block, "V") for block in blocks]
        self.log_det = 2 * sum(C.diagonal(dim1=1, dim2=2).log().sum() for C in factors)
        # C^-1 and C^-1 Lambda', which moves effects to the system, for each term (levels, k, k).
        self.inverses = [_inverse(C) for C in factors]
        self.halves = [C @ L.mT for C, L in zip(self.inverses, roots, strict=True)]

    def to(self, x: Tensor) -> Tensor:
        r""":math:`C^{-1} \Lambda^\top x`, from random effects to the system."""
        return self._each(self.halves, x)

    def back(self, x: Tensor) -> Tensor:
        r""":math:`\Lambda C^{-\top} x`, from the system to random effects."""
        return self._each([block.mT for block in self.halves], x)

    def _each(self, blocks: Sequence[Tensor], x: Tensor) -> Tensor:
        parts = zip(blocks, self._problem.by_levels(x), strict=True)
        return self._problem.flat([_times(block, part) for block, part in parts], x)

    def times(self, x: Tensor) -> Tensor:
        r""":math:`\hat M x`."""
        parts = []
        pieces = zip(self.inverses, self._problem.priors, self._problem.by_levels(x), strict=True)
        for inverse, prior, part in pieces:
            half = _times(inverse.mT, part)
            if prior is not None:
                half = (prior @ half.flatten(1)).reshape(half.shape)
            parts.append(_times(inverse, half))
        return self._problem.flat(parts, x) + self.to(self._times_e22(self.back(x)))


def _inverse(C: Tensor) -> Tensor:
    """Inverses of small triangles."""
    eye = torch.eye(C.shape[-1], dtype=C.dtype, device=C.device)
    return solve_triangular(C, eye.expand_as(C), upper=False)


def _times(block: Tensor, x: Tensor) -> Tensor:
    """Block by block; products of single numbers are far faster as such."""
    return block * x if block.shape[-1] == 1 else block @ x


class _KrylovEvaluation(GroupedEvaluation):
    _problem: KrylovProblem

    def __init__(
        self, problem: KrylovProblem, terms: Sequence[Term], matrices: Sequence[Tensor]
    ) -> None:
        super().__init__(problem, terms, matrices)
        at, s, W = self._at, self._s, self._at.W
        assert isinstance(W, ListedCross)
        self._Kd = self._P / s**2
        self._own = own = [block / s for block in problem.own]
        if problem.levels:
            for i, (a, b, value) in enumerate(W.cells):
                K = self._Kd[a] if len(self._Kd) > 1 else self._Kd
                own[i] = own[i].index_add(0, b, -(value.mT @ K @ value))
        grids = [grid for grid in problem.grids if grid is not None]
        roots = [root.blocks(*grid) for root, grid in zip(self._root2, grids, strict=True)]
        self._grids = grids
        self._system = _Scaled(problem, self._times_e22, own, roots)
        self._b = b = self._system.to(self._E2f)
        start = problem.start if problem.start is not None else torch.zeros_like(b)
        self._x, _ = _conjugate_gradients(self._system.times, b, start, problem.solver.tolerance)
        problem.start = self._x
        F = at.Aff / s - inner(self._half_f, self._half_f) - b.mT @ self._x

        z = problem.probes
        zero = torch.zeros_like(z)
        self._inverse_z, T = _conjugate_gradients(
            self._system.times, z, zero, problem.solver.probe_tolerance
        )
        samples = _log_samples(T, problem.q)
        log_det = self._log_det + self._system.log_det + problem.log_det_kernels
        if problem.q:
            samples = problem.controlled(samples)
            log_det = log_det + samples.mean()
            if not _is_every(problem.q, len(samples)):
                self.error = float(samples.std() / len(samples) ** 0.5 / 2)
        self._profile(log_det, F)

    @staticmethod
    def _root_of(term: Term) -> Covariance:
        """Of a kernel's term that of its effects: the kernel enters by its inverse."""
        if isinstance(term.covariance, ScaledCovariance):
            alone = RepeatedCovariance(term.covariance.matrix, term.covariance.kernel.size)
            return root(replace(term, covariance=alone))
        return root(term)

    def _times_e22(self, x: Tensor) -> Tensor:
        W = self._at.W
        found = self._problem.times_22(x) / self._s
        if self._problem.levels:
            found = found - W.t_times(self._Kd @ W.times(x))
        return found

    def _explained(self, T2: Tensor) -> tuple[Tensor, Tensor]:
        right = self._system.to(T2)
        zero = torch.zeros_like(right)
        x, _ = _conjugate_gradients(self._system.times, right, zero, self._problem.solver.tolerance)
        return right.mT @ x, self._b[:, :-1].mT @ x

    def _times_22(self, x: Tensor) -> Tensor:
        return self._problem.times_22(x)

    # ------------------------------------------------------------------ Z' P y and Z' P Z

    @cached_property
    def _crossed(self) -> Crossed:
        problem, at, s = self._problem, self._at, self._s
        x = self._solved
        Z1f = at.A1f / s
        if problem.levels:
            Z1f = self._reduced(at.A1f - at.W.times(x)) / s
        Z2f = self._E2f - self._times_e22(x)
        B1 = self._reduced(at.A11 / s)
        if problem.levels and problem.q:
            B1 = B1 - self._reduced(self._reduced(self._quadratic()).mT) / s**2
        return self._cross(Z1f, Z2f, B1, self._inner_22())

    @cached_property
    def _solved(self) -> Tensor:
        return self._system.back(self._x)

    def _gain(self) -> Tensor:
        gain = self._gain_1
        for own, half in zip(self._problem.own, self._system.roots, strict=True):
            squares = (half.mT @ (own / self._s) @ half).diagonal(dim1=1, dim2=2)
            gain = torch.maximum(gain, squares.amax())
        return gain

    def _quadratic(self) -> Tensor:
        r"""Diagonal blocks of :math:`W N W^\top`, the inverse's own diagonal blocks exactly."""
        problem, W = self._problem, self._at.W
        assert isinstance(W, ListedCross)
        found = self._P.new_zeros(problem.levels, problem.k, problem.k)
        for (a, b, value), half in zip(W.cells, self._system.halves, strict=True):
            part = value @ half.mT[b]
            found = found.index_add(0, a, part @ part.mT)
        left = W.times(self._system.back(self._inverse_z - problem.probes))
        right = W.times(self._system.back(problem.probes))
        noisy = left @ right.mT / problem.probes.shape[1]
        return found + (noisy + noisy.mT) / 2

    def _inner_22(self) -> list[Tensor]:
        r"""Own blocks of :math:`Z_2^\top V^{-1} Z_2 = (I + E_{22} G)^{-1} E_{22}`.

        With :math:`E_{22} = F + O`, F its own blocks, and :math:`H = (I + FG)^{-1}` this is

        .. math:: HF + HOH^\top - (H O \Lambda C^{-\top}) \hat M^{-1} (H O \Lambda C^{-\top})^\top

        of which the first part is exact and the second has no own blocks. No root is
        inverted, and no large numbers are subtracted.
        """
        problem, z, system = self._problem, self._problem.probes, self._system
        right, left = system.back(z), system.back(self._inverse_z)
        parts = (right, left, self._times_e22(right), self._times_e22(left))
        found = []
        pieces = zip(
            problem.kernels, self._own, system.roots, *map(problem.by_levels, parts), strict=True
        )
        for kernel, F, L, one, other, E_one, E_other in pieces:
            if kernel is not None:
                found.append(F.new_zeros(0))  # what a kernel needs is not its levels' own blocks
                continue
            eye = torch.eye(F.shape[-1], dtype=F.dtype, device=F.device)
            system_of_own = eye + F @ (L @ L.mT)
            both = torch.cat([F, E_one - F @ one, E_other - F @ other], 2)
            B, a, b = torch.linalg.solve(system_of_own, both).split(
                [F.shape[-1], z.shape[1], z.shape[1]], 2
            )
            gained = a @ b.mT / z.shape[1]
            found.append(B - (gained + gained.mT) / 2)
        return found

    # ------------------------------------------------------------------ kernels

    def _scores_of_rest(self, reml: bool) -> list[Tensor]:
        problem, z = self._problem, self._crossed
        found = []
        u, Y = problem.by_levels(z.u2[:, None]), problem.by_levels(z.Y2.mT)
        pieces = zip(self._rest, problem.kernels, u, Y, z.B2, z.R2, strict=True)
        for i, (g, kernel, own, lost, B, R) in enumerate(pieces):
            if kernel is None:
                S2 = (own @ own.mT - B + R if reml else own @ own.mT - B) / 2
                found.append(g.fold_blocks(S2))
                continue
            score = _through(kernel, own) - self._trace(i)
            found.append((score + _through(kernel, lost) if reml else score) / 2)
        return found

    def _trace(self, i: int) -> Tensor:
        r""":math:`\sum_{ij} K_{ij} (Z_2^\top V^{-1} Z_2)_{ij}` of a kernel's term, (t, t).

        By :math:`K \Lambda^\top Z^\top V^{-1} Z = M^{-1} \Lambda^\top E_{22}` this is the sum of
        the own blocks of :math:`E_{22} \Lambda M^{-1} \Lambda^{-1}`, of which the part of
        :math:`\hat M`'s own blocks is exact.
        """
        problem, system, z = self._problem, self._system, self._problem.probes
        L, F = system.roots[i][0], self._own[i]
        half = system.inverses[i]
        own = half.mT @ half
        if len(L) == 1 and float(L) == 0:
            return (F @ own).sum(0)  # what is left where the root cancels

        def part(x: Tensor) -> Tensor:
            return problem.by_levels(x)[i]

        moved = part(self._times_e22(system.back(self._inverse_z - z)))
        # Less its first-order part, which has no own blocks.
        moved = moved + F @ part(system.back(system.times(z) - z))
        sign = _times(half.mT, part(z))
        samples = problem.controlled(torch.einsum("lam,lbm->mab", moved, sign))
        total = ((F @ L @ own).sum(0) + samples.mean(0)) @ torch.linalg.pinv(L)
        return (total + total.mT) / 2

    def _conditional(self) -> tuple[list[Tensor], list[Tensor]]:
        problem, z, P = self._problem, self._problem.probes, self._P
        whole = P
        if problem.levels and problem.q:
            whole = P + P @ self._quadratic() @ P / self._s**2
        # The inverse of the system less its first-order parts, of which the own blocks are known.
        sample = self._inverse_z + self._system.times(z) - 2 * z
        rest = []
        pieces = zip(
            self._system.halves, problem.by_levels(sample), problem.by_levels(z), strict=True
        )
        for half, moved, sign in pieces:
            mean = moved @ sign.mT / z.shape[1]
            eye = torch.eye(half.shape[-1], dtype=half.dtype, device=half.device)
            rest.append(half.mT @ (eye + (mean + mean.mT) / 2) @ half)
        return problem.split_blocks(whole), rest


def _through(kernel: Kernel, x: Tensor) -> Tensor:
    r""":math:`\sum_{ij} K_{ij} x_i x_j^\top` for x (q, t, m), (t, t)."""
    moved = kernel.multiply(x.flatten(1)).reshape(x.shape)
    return torch.einsum("iam,ibm->ab", x, moved)


def _conjugate_gradients(
    times: Callable[[Tensor], Tensor], b: Tensor, x: Tensor, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Solve for each column of b (q, m), from x on.

    Returns:
        The solution, and the Lanczos matrix of each column, (m, steps, steps), padded with ones
        on its diagonal.

    Raises:
        NotPositiveDefiniteError: if the residual is not below the tolerance in 1,000 steps.
    """
    m = b.shape[1]
    found = x.clone()
    tolerance = max(tolerance, 20 * torch.finfo(b.dtype).eps)
    if not b.numel():
        return found, torch.ones(m, 1, 1, dtype=b.dtype, device=b.device)
    r = b - times(x) if bool(x.any()) else b.clone()
    goal = tolerance * torch.linalg.vector_norm(b, dim=0)
    squares = (r * r).sum(0)
    # What is worked on are the columns that have not converged.
    active = (squares.sqrt() > goal).nonzero()[:, 0]
    x, r, squares, goal = found[:, active], r[:, active], squares[active], goal[active]
    p = r.clone()
    alphas: list[Tensor] = []
    betas: list[Tensor] = []
    for _ in range(_MOST_STEPS):
        if not len(active):
            return found, _lanczos(alphas, betas, b)
        Mp = times(p)
        alpha = squares / (p * Mp).sum(0)
        x.addcmul_(p, alpha)
        r.addcmul_(Mp, alpha, value=-1)
        new = (r * r).sum(0)
        beta, squares = new / squares, new
        p.mul_(beta).add_(r)
        alphas.append(_spread(alpha, active, m))
        betas.append(_spread(beta, active, m))
        going = new.sqrt() > goal
        if not bool(going.all()):
            found[:, active] = x
            kept = going.nonzero()[:, 0]
            active, x, r, p = active[kept], x[:, kept], r[:, kept], p[:, kept]
            squares, goal = squares[kept], goal[kept]
    raise NotPositiveDefiniteError(
        "V is not positive definite to working precision: "
        f"conjugate gradients did not converge in {_MOST_STEPS} steps"
    )


def _log_samples(T: Tensor, q: int) -> Tensor:
    r""":math:`z^\top (\log \hat M - E) z` for each probe from its Lanczos matrix (m, steps, steps).

    The first-order part :math:`z^\top E z`, which is taken off, has the expectation zero.
    """
    values, vectors = torch.linalg.eigh(T)
    weights = vectors[:, 0, :] ** 2
    return q * ((weights * values.log()).sum(1) - (T[:, 0, 0] - 1))


def _spread(values: Tensor, active: Tensor, m: int) -> Tensor:
    """Values of the active columns among all m, NaN for the others."""
    return values.new_full((m,), nan).index_copy(0, active, values)


def _lanczos(alphas: list[Tensor], betas: list[Tensor], like: Tensor) -> Tensor:
    """Tridiagonal matrices (m, steps, steps) from the coefficients of conjugate gradients."""
    if not alphas:
        return torch.ones(like.shape[1], 1, 1, dtype=like.dtype, device=like.device)
    a, b = torch.stack(alphas, 1), torch.stack(betas, 1)  # (m, steps)
    diagonal = 1 / a
    diagonal[:, 1:] += b[:, :-1] / a[:, :-1]
    # Past the last step of a column there is nothing, and nothing to couple to.
    over = a[:, 1:].isnan()
    off = torch.where(over, 0.0, b[:, :-1].sqrt() / a[:, :-1])
    diagonal[:, 1:] = torch.where(over, 1.0, diagonal[:, 1:])
    return torch.diag_embed(diagonal) + torch.diag_embed(off, 1) + torch.diag_embed(off, -1)
