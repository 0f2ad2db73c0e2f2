r"""The likelihood in the space of the random effects: V is never formed.

For :math:`V = \sum_t Z_t G_t Z_t^\top + \sigma^2 I` everything follows from
the cross-products of :math:`[Z_1 \,|\, Z_2 \,|\, X \,|\, y]`, computed once. The
factor with most columns, :math:`Z_1`, is eliminated first: its part of the
system is block diagonal, one small block a level. What remains falls apart
into groups of columns that have nothing in common: many small ones where the
other factors are nested, a single dense one where they are crossed.

With :math:`G = \Lambda\Lambda^\top` a variance of zero is an ordinary point:
no inverse of G is taken.

Reference:
    Bates, Mächler, Bolker and Walker, Journal of Statistical Software 67(1)
    (2015), sections 3.3 to 3.6; Harville, JASA 72 (1977), sections 4 and 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor
from torch.linalg import solve_triangular

from openreml_nn.likelihood.fixed import FixedPart, traced
from openreml_nn.likelihood.problem import (
    Cost,
    Evaluation,
    Problem,
    RandomEffects,
    cholesky,
    pivot_loss,
)
from openreml_nn.likelihood.residual import White
from openreml_nn.likelihood.solver import Solver
from openreml_nn.likelihood.system.cross import Arrangement, System
from openreml_nn.likelihood.system.grouped import (
    Crossed,
    GroupedEvaluation,
    GroupedProblem,
    Layout,
    arranged,
    grid_of,
    inner,
    separated,
    steps_of,
)
from openreml_nn.likelihood.system.partition import Partition
from openreml_nn.likelihood.system.products import Pattern, Statistics
from openreml_nn.support.checks import check_number
from openreml_nn.support.errors import InputError
from openreml_nn.terms.covariance import Covariance, DiagonalCovariance
from openreml_nn.terms.design import IndexedDesign
from openreml_nn.terms.term import Term

__all__ = ["Blocked", "BlockedProblem"]

#: Where more bytes than these could be held, it is looked at which levels meet.
_LARGE = 2**28
_REASON = "in the space of the random effects"


@dataclass(frozen=True)
class Blocked(Solver):
    """The system of the random effects, the largest factor eliminated level by level.

    Args:
        pair_cost: what a pair of columns that meet in a level costs, in operations of a dense
            product: it is far from the others in memory, while a dense product runs at full
            speed. With 0 pairs are listed wherever they can be.

    Raises:
        TypeError, InputError: if it is no number, or negative.
    """

    name: ClassVar[str] = "blocked"
    pair_cost: float = 1000.0

    def __post_init__(self) -> None:
        check_number("pair_cost", self.pair_cost, least=0)

    def forecast(self, terms: Sequence[Term], p: int, dtype: torch.dtype) -> Cost | None:
        if self.obstacle(terms) is not None:
            return None
        terms = separated(terms)
        layout = Layout.of(terms)
        levels, k = layout.sizes(terms)
        q = sum(terms[i].design.shape[1] for i in layout.rest)
        r = q + p + 1
        work = 2.0 * levels * k * (k * k + k * r) + levels * k * r**2 + q**3 / 3 + r**3 / 3
        held = 2.0 * levels * k * r + 2 * levels * k * k + 3 * r * r
        if layout.residual.moves:
            n, m = terms[0].design.shape[0], layout.residual.size
            designs = [terms[i].design for i in layout.rest]
            mixed = [
                design.shape[1]
                for design in designs
                if isinstance(design, IndexedDesign) and not layout.residual.is_within(design.codes)
            ]
            columns = k + sum(mixed) + p + 1
            work += 4.0 * n * (m + k) * columns
            held += 4.0 * n * columns
        held *= dtype.itemsize
        if held > _LARGE:
            designs = [terms[i].design for i in layout.random]
            grids = [grid_of(terms[i]) for i in layout.rest]
            _, arrangement = arranged(designs, layout, grids, self.pair_cost)
            held = min(held, dtype.itemsize * arrangement.cost(p + 1)[1])
        steps = steps_of(terms, layout, p, Partition.of_one(q, torch.device("cpu")))
        return Cost(max(work, 1.0), held, True, _REASON, steps)

    def problem(self, fixed: FixedPart, terms: Sequence[Term], method: str) -> Problem:
        return BlockedProblem(fixed, terms, method, self)

    def obstacle(self, terms: Sequence[Term]) -> str | None:
        try:
            Layout.of(separated(terms))
        except InputError as error:
            return str(error)
        return None


class BlockedProblem(GroupedProblem):
    """The system of the other terms by a Cholesky factor.

    With a scalar residual the cross-products are had once, or given.

    Args:
        fixed, terms, method: see :class:`Problem`.
        solver: with its options.
        statistics: cross-products of the random terms, in their order, and of f, for rows that
            are not at hand; the residual has one variance.
    """

    def __init__(
        self,
        fixed: FixedPart,
        terms: Sequence[Term],
        method: str,
        solver: Blocked,
        statistics: Statistics | None = None,
    ) -> None:
        super().__init__(fixed, terms, method)
        self.solver = solver
        self._has_rows = statistics is None
        products = pattern = None
        if statistics is not None:
            # The rows themselves are not at hand: terms and fixed part are of any rows.
            self.n = statistics.rows
            random = sorted(self.layout.random)
            order = [random.index(i) for i in self.layout.random]
            pattern, products = statistics.ordered(order)
        pattern, arrangement = arranged(
            self._designs, self.layout, self.grids, solver.pair_cost, pattern
        )
        self.partition = arrangement.partition
        self._cost = arrangement.cost(self.p + 1)
        self._moving: tuple[Pattern, Arrangement] | None = (pattern, arrangement)
        if products is not None:
            white = self.residual.white([torch.ones_like(products.ff[:1, :1])])
            self._constant, self._moving = (arrangement.place(products), white), None
        elif not self.residual.moves:
            # Then the products are all that is needed, and what leads to them can go.
            self._constant = self._system([torch.ones_like(self._f[:1, :1])])
            self._moving = None

    def anew(self, fixed: FixedPart, terms: Sequence[Term]) -> Problem:
        return BlockedProblem(fixed, terms, self.method, self.solver)

    def system(self, residual: Sequence[Tensor]) -> tuple[System, White, Tensor]:
        """The system of white rows, R without a scalar residual's variance, and that variance."""
        if self._constant is not None:
            return (*self._constant, residual[0].reshape(()))
        return (*self._system(residual), self._f.new_ones(()))

    def _system(self, residual: Sequence[Tensor]) -> tuple[System, White]:
        assert self._moving is not None
        pattern, arrangement = self._moving
        white = self.residual.white(residual)
        designs = [white.design(design) for design in self._designs]
        products = pattern.products(designs, white.rows(self._f))
        return arrangement.place(products), white

    def _evaluate(self, terms: Sequence[Term], matrices: list[Tensor]) -> Evaluation:
        return _BlockedEvaluation(self, terms, matrices)

    def precise(self, terms: Sequence[Term]) -> Evaluation | None:
        return super().precise(terms) if self._has_rows else None

    def recorded(self, matrices: Sequence[Tensor]) -> Tensor:
        # In G itself: a factor of G has no derivative where G is singular.
        split = len(matrices) - len(self._forms)
        at, white, s = self.system(matrices[:split])
        forms = zip(self._forms, matrices[split:], strict=True)
        random = [form.with_matrix(matrix) for form, matrix in forms]
        first, rest = random[: len(self.widths)], random[len(self.widths) :]
        eye = torch.eye(self.k, dtype=s.dtype, device=s.device)
        G1 = self.joint_blocks(first, eye)
        D = eye + at.A11 @ G1 / s
        K = torch.linalg.solve(D.mT, G1.mT).mT / s**2  # G1 D^-1 / s^2
        KA = K @ at.A1f
        E22 = at.A22 / s - at.W.gram(eye.expand_as(K), K)
        E2f = at.A2f / s - at.W.t_times(KA)
        Eff = at.Aff / s - inner(at.A1f, KA)
        by = self.partition
        M = by.spread(self.multiply(rest, by.collect(E22)))  # G2 E22
        M = M + torch.eye(by.size, dtype=s.dtype, device=s.device)
        if not traced(M, D):
            # For symmetric G and A the diagonal of A G bounds that of their product by roots.
            sizes = [x.detach().diagonal(dim1=1, dim2=2).amax() for x in (D, M) if x.numel()]
            self.check_rounding(torch.finfo(s.dtype).eps * max(map(float, sizes), default=1.0))
        x = by.collect(torch.linalg.solve(M, by.spread(self.multiply(rest, E2f))))
        F = Eff - E2f.mT @ x
        log_det = white.log_det + self.n * s.log() + _log_det(D).sum() + _log_det(M).sum()
        return self._profile(log_det, F[:-1, :-1], F[:-1, -1], F[-1, -1])[0]

    def cost(self) -> Cost | None:
        if not self.q:
            return None
        work, entries = self._cost
        if self.residual.moves:
            r = self.p + 1
            work += 4.0 * self.n * (self.residual.size + self.k + r) * (self.k + r)
            entries += 4.0 * self.n * (self.residual.size + self.k + r)
        steps = steps_of(separated(self.terms), self.layout, self.p, self.partition)
        return Cost(work, self._f.itemsize * entries, True, _REASON, steps)

    def sandwich(
        self, roots: Sequence[Covariance], square: Tensor, transpose: bool = False
    ) -> Tensor:
        """:math:`\\Lambda S \\Lambda^\\top` (or transposed) for symmetric S by groups of columns."""
        by = self.partition
        # A root of one entry is a multiple of the identity.
        if all(isinstance(root, DiagonalCovariance) or len(root.matrix) == 1 for root in roots):
            scale = by.spread(self.multiply(roots, square.new_ones(self.q, 1)))
            return square * scale * scale.mT
        half = by.spread(self.multiply(roots, by.collect(square), transpose))
        return by.spread(self.multiply(roots, by.collect(half.mT), transpose))

    def own_blocks(self, square: Tensor) -> list[Tensor]:
        """Each other term's own part of a matrix by groups of columns: (levels, k, k) where its
        levels are independent."""
        found, at = [], 0
        for size, grid in zip(self.sizes, self.grids, strict=True):
            if grid is None:
                column = torch.arange(at, at + size, device=square.device)
                index = self.partition.index(column[:, None], column)
                found.append(square.reshape(-1)[index])
            else:
                found.append(self.partition.own(square, at, *grid))
            at += size
        return found


class _BlockedEvaluation(GroupedEvaluation):
    _problem: BlockedProblem

    def __init__(
        self, problem: BlockedProblem, terms: Sequence[Term], matrices: Sequence[Tensor]
    ) -> None:
        super().__init__(problem, terms, matrices)
        at, s = self._at, self._s
        half = self._half / s
        self._E22 = at.A22 / s - at.W.gram(half, half)
        self._M = problem.sandwich(self._root2, self._E22, transpose=True)
        self._M.diagonal(dim1=1, dim2=2).add_(1)
        self._Lc = cholesky(self._M, "V")
        self._K = self._forward_2(self._E2f)
        F = at.Aff / s - inner(self._half_f, self._half_f) - inner(self._K, self._K)
        self._profile(self._log_det + 2 * self._Lc.diagonal(dim1=1, dim2=2).log().sum(), F)
        # It takes products with Lambda D^-1 Lambda' as they are, and not by roots.
        self.recorded_rounding = self.rounding * self._pivot_loss**0.5

    def _forward_2(self, x: Tensor) -> Tensor:
        """Lc^-1 L2' x for x (q, m), by groups of columns."""
        problem = self._problem
        rows = problem.partition.spread(problem.multiply(self._root2, x, transpose=True))
        return solve_triangular(self._Lc, rows, upper=False)

    def _gain(self) -> Tensor:
        lost = self._pivot_loss**0.5
        if not self._problem.q:
            return self._gain_1 * lost
        lost = max(lost, pivot_loss(self._M, self._Lc))
        reduced = self._E22.diagonal(dim1=1, dim2=2)
        whole = self._at.A22.diagonal(dim1=1, dim2=2) / self._s
        gain = (self._M.diagonal(dim1=1, dim2=2) - 1) * (whole / reduced)
        return torch.maximum(self._gain_1, gain.nan_to_num(0.0, 0.0, 0.0).amax()) * lost

    def _explained(self, T2: Tensor) -> tuple[Tensor, Tensor]:
        e2 = self._forward_2(T2)
        return inner(e2, e2), inner(self._K[..., :-1], e2)

    def _times_22(self, x: Tensor) -> Tensor:
        by = self._problem.partition
        return by.collect(self._at.A22 @ by.spread(x))

    # ------------------------------------------------------------------ Z' P y and Z' P Z

    @cached_property
    def _crossed(self) -> Crossed:
        r"""What the score, the information and the BLUPs share."""
        problem, s = self._problem, self._s
        A = self._at.A11 / s
        x, by = self._solved, problem.partition
        Z1f = self._reduced(self._at.A1f - self._at.W.times(x)) / s  # Z1' V^-1 [Q | y]
        Z2f = self._E2f - by.collect(self._E22 @ by.spread(x))
        M_inverse, inverse = self._inverses
        B1 = self._reduced(A)
        if problem.q:
            B1 = B1 - self._reduced(self._reduced(self._quadratic).mT) / s**2
        return self._cross(Z1f, Z2f, B1, self._inner_22(M_inverse, inverse))

    @cached_property
    def _solved(self) -> Tensor:
        problem = self._problem
        back = solve_triangular(self._Lc.mT, self._K, upper=True)
        return problem.multiply(self._root2, problem.partition.collect(back))

    @cached_property
    def _inverses(self) -> tuple[Tensor, Tensor]:
        r""":math:`M^{-1}` and :math:`N = \Lambda_2 M^{-1} \Lambda_2^\top`."""
        inverse = torch.cholesky_inverse(self._Lc)
        return inverse, self._problem.sandwich(self._root2, inverse)

    @cached_property
    def _quadratic(self) -> Tensor:
        r"""Own blocks of :math:`W N W^\top`."""
        return self._at.W.quadratic(self._inverses[1])

    def _conditional(self) -> tuple[list[Tensor], list[Tensor]]:
        # Sums, where the prior less what is known would be a difference.
        problem, P = self._problem, self._P
        whole = P + P @ self._quadratic @ P / self._s**2
        rest = []
        for own, i, grid in zip(
            problem.own_blocks(self._inverses[1]), problem.layout.rest, problem.grids, strict=True
        ):
            if grid is None:
                k = RandomEffects.width(self._terms[i])
                by = (len(own) // k, k)
                own = own.unflatten(1, by).unflatten(0, by).diagonal(dim1=0, dim2=2).movedim(-1, 0)
            rest.append(own)
        return problem.split_blocks(whole), rest

    def _inner_22(self, M_inverse: Tensor, inverse: Tensor) -> list[Tensor]:
        r""":math:`Z_2^\top V^{-1} Z_2`, E22 less E22 (L2 M^-1 L2') E22, each term's own part."""
        problem = self._problem
        gain = problem.partition.diagonal(self._M) - 1
        if all(grid is not None and grid[1] == 1 for grid in problem.grids) and bool(
            (gain > 1e-4).all()
        ):
            # L2' of it L2 is I - M^-1: no product of large matrices, where no digits are lost.
            root = problem.multiply(self._root2, torch.ones_like(gain)[:, None])[:, 0]
            diagonal = (1 - problem.partition.diagonal(M_inverse)) / root**2
            return [part[:, None, None] for part in diagonal.split(problem.sizes)]
        return problem.own_blocks(self._E22 - self._E22 @ inverse @ self._E22)

    def _scores(self) -> list[Tensor]:
        if not self._problem.residual.moves:
            return super()._scores()
        if not self._problem.has_digits(self.recorded_rounding):
            better = self._problem.more_precise(self)
            if better is not None:
                return better.scores()
            self._problem.check_rounding(self.recorded_rounding)
        with torch.enable_grad():
            matrices = [matrix.detach().requires_grad_() for matrix in self._matrices]
            value = self._problem.recorded(matrices)
            return list(torch.autograd.grad(value, matrices))


def _log_det(matrix: Tensor) -> Tensor:
    return torch.linalg.slogdet(matrix).logabsdet
