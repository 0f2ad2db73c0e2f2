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
from openreml_nn.likelihood.problem import Cost, Evaluation, Problem, cholesky, pivot_loss
from openreml_nn.likelihood.residual import White
from openreml_nn.likelihood.solver import Solver
from openreml_nn.likelihood.system.crossproducts import Pattern, Statistics
from openreml_nn.likelihood.system.elimination import inner
from openreml_nn.likelihood.system.evaluation import Crossed, GroupedEvaluation
from openreml_nn.likelihood.system.grouped import GroupedProblem
from openreml_nn.likelihood.system.partition import Partition
from openreml_nn.likelihood.system.placement import Placement, System, placed
from openreml_nn.likelihood.system.roles import Roles, grid_of, separated, steps_of
from openreml_nn.support.checks import check_number
from openreml_nn.support.errors import InputError
from openreml_nn.terms.base import Covariance
from openreml_nn.terms.design import IndexedDesign
from openreml_nn.terms.term import Term

__all__ = ["Blocked", "BlockedEvaluation", "BlockedProblem"]

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
    #: Its hundreds of small steps take as long as these.
    least: ClassVar[float] = 1e6
    pair_cost: float = 1000.0

    def __post_init__(self) -> None:
        check_number("pair_cost", self.pair_cost, least=0)

    def forecast(self, terms: Sequence[Term], p: int, dtype: torch.dtype) -> Cost | None:
        terms = separated(terms)
        try:
            roles = Roles.of(terms)
        except InputError:
            return None
        levels, k = roles.sizes(terms)
        q = sum(terms[i].design.shape[1] for i in roles.rest)
        r = q + p + 1
        work = 2.0 * levels * k * (4 * k * k + 2 * k * (p + 1) + q * q) + 2.0 * q**3
        work += (levels * k + q) * (p + 1) * r
        held = 2.0 * levels * k * r + 2 * levels * k * k + 3 * r * r
        if roles.residual.moves:
            n, m = terms[0].design.shape[0], roles.residual.size
            designs = [terms[i].design for i in roles.rest]
            mixed = [
                design.shape[1]
                for design in designs
                if isinstance(design, IndexedDesign) and not roles.residual.is_within(design.codes)
            ]
            columns = k + sum(mixed) + p + 1
            work += 4.0 * n * (m + k) * columns + roles.residual.work
            held += 4.0 * n * columns
        held *= dtype.itemsize
        if held > _LARGE:
            own, entries = self._place(terms, roles, None).cost(p + 1)
            work, held = min(work, own), min(held, dtype.itemsize * entries)
        steps = steps_of(terms, roles, p, Partition.of_one(q, torch.device("cpu")))
        return Cost(work + Blocked.least, held, True, _REASON, steps)

    def problem(self, fixed: FixedPart, terms: Sequence[Term], method: str) -> Problem:
        return BlockedProblem(fixed, terms, method, self)

    def forecast_of_sums(self, terms: Sequence[Term], p: int, sums: Statistics) -> Cost | None:
        terms = separated(terms)
        roles = Roles.of(terms)
        placement = self._place(terms, roles, sums.ordered(roles.order)[0])
        work, entries = placement.cost(p + 1)
        steps = steps_of(terms, roles, p, placement.partition)
        return Cost(work + Blocked.least, 8.0 * entries, True, _REASON, steps)

    def _place(self, terms: Sequence[Term], roles: Roles, pattern: Pattern | None) -> Placement:
        designs = [terms[i].design for i in roles.random]
        grids = [grid_of(terms[i]) for i in roles.rest]
        known = pattern or Pattern.of(designs, rows=False)
        return placed(designs, known, roles, grids, self.pair_cost)

    def problem_of_sums(
        self, fixed: FixedPart, terms: Sequence[Term], method: str, sums: Statistics
    ) -> Problem:
        return BlockedProblem(fixed, terms, method, self, sums)

    def obstacle(self, terms: Sequence[Term]) -> str | None:
        try:
            Roles.of(separated(terms))
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
            are not at hand; the residual has one variance, or a subclass has its :meth:`system`.

    Attributes:
        moving: what leads to the system, where R moves by more than a factor.
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
            pattern, products = statistics.ordered(self.order)
        pattern = Pattern.of(self.designs) if pattern is None else pattern
        placement = placed(self.designs, pattern, self.roles, self.grids, solver.pair_cost)
        self.partition = placement.partition
        self._cost = placement.cost(self.p + 1)
        self.moving: tuple[Pattern, Placement] | None = (pattern, placement)
        if self.residual.moves:
            return
        # The products are all that is needed, and what leads to them can go.
        if statistics is not None and products is not None:
            white = self.residual.white([torch.ones_like(products.ff[:1, :1])])
            white.log_det = white.log_det + statistics.log_det
            self.constant = placement.place(products), white
        else:
            self.constant = self._system([torch.ones_like(self.f[:1, :1])])
        self.moving = None

    def anew(self, fixed: FixedPart, terms: Sequence[Term]) -> Problem:
        return BlockedProblem(fixed, terms, self.method, self.solver)

    def system(self, residual: Sequence[Tensor]) -> tuple[System, White, Tensor]:
        if self.constant is not None:
            return (*self.constant, residual[0].reshape(()))
        return (*self._system(residual), self.f.new_ones(()))

    def _system(self, residual: Sequence[Tensor]) -> tuple[System, White]:
        assert self.moving is not None
        pattern, placement = self.moving
        white = self.residual.white(residual)
        designs = [white.design(design) for design in self.designs]
        products = pattern.products(designs, white.rows(self.f))
        return placement.place(products), white

    def evaluate_unchecked(self, terms: Sequence[Term], matrices: list[Tensor]) -> Evaluation:
        return BlockedEvaluation(self, terms, matrices)

    def precise(self, terms: Sequence[Term]) -> Evaluation | None:
        return super().precise(terms) if self._has_rows else None

    def recorded(self, matrices: Sequence[Tensor]) -> Tensor:
        # In G itself: a factor of G has no derivative where G is singular.
        split = len(matrices) - len(self.forms)
        at, white, s = self.system(matrices[:split])
        forms = zip(self.forms, matrices[split:], strict=True)
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
        log_det = white.log_det + self.n * s.log() + _log_abs_det(D).sum() + _log_abs_det(M).sum()
        return self.profile(log_det, F[:-1, :-1], F[:-1, -1], F[-1, -1])[0]

    def cost(self) -> Cost | None:
        if not self.q:
            return None
        work, entries = self._cost
        if self.residual.moves:
            r = self.p + 1
            work += 4.0 * self.n * (self.residual.size + self.k + r) * (self.k + r)
            entries += 4.0 * self.n * (self.residual.size + self.k + r)
        steps = steps_of(separated(self.terms), self.roles, self.p, self.partition)
        work += Blocked.least
        return Cost(work, self.f.itemsize * entries, True, _REASON, steps)

    def sandwich(
        self, roots: Sequence[Covariance], square: Tensor, transpose: bool = False
    ) -> Tensor:
        """:math:`\\Lambda S \\Lambda^\\top` (or transposed) for symmetric S by groups of columns."""
        by = self.partition
        if all(root.is_diagonal for root in roots):
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


class BlockedEvaluation(GroupedEvaluation):
    """The likelihood at one point, the other terms by a Cholesky factor."""

    problem: BlockedProblem

    def __init__(
        self, problem: BlockedProblem, terms: Sequence[Term], matrices: Sequence[Tensor]
    ) -> None:
        super().__init__(problem, terms, matrices)
        at, s = self.system, self.s
        F, log_det = at.Aff / s - inner(self.half_f, self.half_f), self.log_det
        if problem.q:
            half = self.half / s
            self._E22 = at.A22 / s - at.W.gram(half, half)
            self._M = problem.sandwich(self.root2, self._E22, transpose=True)
            self._M.diagonal(dim1=1, dim2=2).add_(1)
            self._Lc = cholesky(self._M, "V")
            self._K = self._forward_2(self.E2f)
            F = F - inner(self._K, self._K)
            log_det = log_det + 2 * self._Lc.diagonal(dim1=1, dim2=2).log().sum()
        self.log_likelihood = self.profile(log_det, F)
        # It takes products with Lambda D^-1 Lambda' as they are, and not by roots.
        self.recorded_rounding = self.rounding * self.pivot_loss**0.5

    def _forward_2(self, x: Tensor) -> Tensor:
        """Lc^-1 L2' x for x (q, m), by groups of columns."""
        problem = self.problem
        rows = problem.partition.spread(problem.multiply(self.root2, x, transpose=True))
        return solve_triangular(self._Lc, rows, upper=False)

    def gain(self) -> Tensor:
        lost = self.pivot_loss**0.5
        if not self.problem.q:
            return self.gain_1 * lost
        lost = max(lost, pivot_loss(self._M, self._Lc))
        reduced = self._E22.diagonal(dim1=1, dim2=2)
        whole = self.system.A22.diagonal(dim1=1, dim2=2) / self.s
        gain = (self._M.diagonal(dim1=1, dim2=2) - 1) * (whole / reduced)
        return torch.maximum(self.gain_1, gain.nan_to_num(0.0, 0.0, 0.0).amax()) * lost

    def explained(self, T2: Tensor) -> tuple[Tensor, Tensor]:
        if not self.problem.q:
            m = T2.shape[1]
            return T2.new_zeros(m, m), T2.new_zeros(self.problem.p, m)
        e2 = self._forward_2(T2)
        return inner(e2, e2), inner(self._K[..., :-1], e2)

    def times_22(self, x: Tensor) -> Tensor:
        by = self.problem.partition
        return by.collect(self.system.A22 @ by.spread(x))

    # ------------------------------------------------------------------ Z' P y and Z' P Z

    @cached_property
    def crossed(self) -> Crossed:
        r"""What the score, the information and the BLUPs share."""
        problem, s = self.problem, self.s
        A = self.system.A11 / s
        if not problem.q:
            Z1f = self.reduced(self.system.A1f) / s
            return self.cross(Z1f, self.E2f, self.reduced(A), [])
        x, by = self.solved, problem.partition
        Z1f = self.reduced(self.system.A1f - self.system.W.times(x)) / s  # Z1' V^-1 [Q | y]
        Z2f = self.E2f - by.collect(self._E22 @ by.spread(x))
        M_inverse, inverse = self._inverses
        B1 = self.reduced(A) - self.reduced(self.reduced(self._quadratic).mT) / s**2
        return self.cross(Z1f, Z2f, B1, self._inner_22(M_inverse, inverse))

    @cached_property
    def solved(self) -> Tensor:
        problem = self.problem
        if not problem.q:
            return self.E2f
        back = solve_triangular(self._Lc.mT, self._K, upper=True)
        return problem.multiply(self.root2, problem.partition.collect(back))

    @cached_property
    def _inverses(self) -> tuple[Tensor, Tensor]:
        r""":math:`M^{-1}` and :math:`N = \Lambda_2 M^{-1} \Lambda_2^\top`."""
        inverse = torch.cholesky_inverse(self._Lc)
        return inverse, self.problem.sandwich(self.root2, inverse)

    @cached_property
    def _quadratic(self) -> Tensor:
        r"""Own blocks of :math:`W N W^\top`."""
        return self.system.W.quadratic(self._inverses[1])

    def conditional(self) -> tuple[list[Tensor], list[Tensor]]:
        # Sums, where the prior less what is known would be a difference.
        problem, P = self.problem, self.N1
        if not problem.q:
            return problem.split_blocks(P), []
        whole = P + P @ self._quadratic @ P / self.s**2
        rest = []
        for own, i, grid in zip(
            problem.own_blocks(self._inverses[1]), problem.roles.rest, problem.grids, strict=True
        ):
            if grid is None:
                k = self.terms[i].effects
                by = (len(own) // k, k)
                own = own.unflatten(1, by).unflatten(0, by).diagonal(dim1=0, dim2=2).movedim(-1, 0)
            rest.append(own)
        return problem.split_blocks(whole), rest

    def _inner_22(self, M_inverse: Tensor, inverse: Tensor) -> list[Tensor]:
        r""":math:`Z_2^\top V^{-1} Z_2`, E22 less E22 (L2 M^-1 L2') E22, each term's own part."""
        problem = self.problem
        gain = problem.partition.diagonal(self._M) - 1
        if all(grid is not None and grid[1] == 1 for grid in problem.grids) and bool(
            (gain > 1e-4).all()
        ):
            # L2' of it L2 is I - M^-1: no product of large matrices, where no digits are lost.
            root = problem.multiply(self.root2, torch.ones_like(gain)[:, None])[:, 0]
            diagonal = (1 - problem.partition.diagonal(M_inverse)) / root**2
            return [part[:, None, None] for part in diagonal.split(problem.sizes)]
        return problem.own_blocks(self._E22 - self._E22 @ inverse @ self._E22)

    def scores_unchecked(self) -> list[Tensor]:
        if not self.problem.residual.moves:
            return super().scores_unchecked()
        if not self.problem.has_digits(self.recorded_rounding):
            better = self.problem.more_precise(self)
            if better is not None:
                return better.scores()
            self.problem.check_rounding(self.recorded_rounding)
        with torch.enable_grad():
            matrices = [matrix.detach().requires_grad_() for matrix in self.matrices]
            value = self.problem.recorded(matrices)
            return list(torch.autograd.grad(value, matrices))


def _log_abs_det(matrix: Tensor) -> Tensor:
    return torch.linalg.slogdet(matrix).logabsdet
