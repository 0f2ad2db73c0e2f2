r"""The likelihood on a complete grid of rows by columns: a field trial.

For :math:`V = A \otimes B + \tau I + Z G Z^\top` with :math:`A = U_A D_A U_A^\top` and
:math:`B = U_B D_B U_B^\top`, the data in the coordinates :math:`(U_A \otimes U_B)^\top y` have the
variances :math:`d_{ij} = D_{A,i} D_{B,j} + \tau` but for the random effects: two small
decompositions take the place of that of all plots. The rows may be in any order, and have weights
that A ⊗ B and :math:`\tau I` share: :math:`V = D\Pi(A \otimes B + \tau I)\Pi^\top D + Z G Z^\top`
is that in the rows :math:`\Pi^\top D^{-1} y`.

Reference:
    Gilmour, Cullis and Verbyla, Journal of Agricultural, Biological and
    Environmental Statistics 2 (1997) 269; Rakitsch et al., NeurIPS 26 (2013), section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.linalg import solve_triangular

from openreml_nn.likelihood.effects import RandomEffects
from openreml_nn.likelihood.fixed import FixedPart
from openreml_nn.likelihood.problem import Cost, Evaluation, Problem, cholesky
from openreml_nn.likelihood.solver import Solver
from openreml_nn.likelihood.solvers.dense import DenseProblem
from openreml_nn.likelihood.system.elimination import root
from openreml_nn.likelihood.system.square_root import SquareRootEvaluation
from openreml_nn.support.errors import NotPositiveDefiniteError
from openreml_nn.support.spectrum import decomposed
from openreml_nn.terms.covariance import KroneckerCovariance, kronecker
from openreml_nn.terms.design import Design, IdentityDesign, IndexedDesign
from openreml_nn.terms.term import Term, has_own_columns

__all__ = ["Grid", "GridProblem"]


@dataclass(frozen=True)
class Grid(Solver):
    """Two small eigendecompositions: for a Kronecker product over a complete grid of rows."""

    name: ClassVar[str] = "grid"

    def forecast(self, terms: Sequence[Term], p: int, dtype: torch.dtype) -> Cost | None:
        places = GridTerms.of(terms)
        if places is None:
            return None
        g = terms[places.grid].covariance
        assert isinstance(g, KroneckerCovariance)
        (r, c), n = g.sizes, terms[0].design.shape[0]
        q = sum(terms[i].design.shape[1] for i in places.rest)
        steps = [f"eigendecompositions of {r} x {r} and {c} x {c}"]
        if places.rest:
            names = ", ".join(repr(terms[i].name) for i in places.rest)
            steps.append(f"{names}: dense, {q} x {q}")
        steps.append(f"fixed effects: dense, {p} x {p}")
        columns = q + p + 1
        work = 10.0 * (r**3 + c**3) + 8.0 * n * (r + c) * columns + 4.0 * n * columns**2
        held = 4.0 * dtype.itemsize * n * columns
        return Cost(work, held, True, "a complete grid: decomposed by its sides", tuple(steps))

    def problem(self, fixed: FixedPart, terms: Sequence[Term], method: str) -> Problem:
        return GridProblem(fixed, terms, method)

    def obstacle(self, terms: Sequence[Term]) -> str | None:
        if GridTerms.of(terms) is not None:
            return None
        return (
            "the grid solver needs one Kronecker product over the rows, each in a place of its own "
            "and none missing, and independent errors at most beside it, of the same weights"
        )


@dataclass(frozen=True)
class GridTerms:
    """Positions of the grid's term, of the terms :math:`\\tau I`, and of the others.

    Attributes:
        grid, nugget, rest: these positions.
        order: (n,) row of each place of the grid; None where the rows are in its order.
        scale: (n,) known standard deviations of the rows up to a factor; None for equal ones.
    """

    grid: int
    nugget: list[int]
    rest: list[int]
    order: Tensor | None = None
    scale: Tensor | None = None

    @classmethod
    def of(cls, terms: Sequence[Term]) -> GridTerms | None:
        """None if there is not one grid over all rows, or another term over them."""
        if not any(isinstance(term.covariance, KroneckerCovariance) for term in terms):
            return None
        over = [i for i, term in enumerate(terms) if _is_over_rows(term.design)]
        grid = [i for i in over if isinstance(terms[i].covariance, KroneckerCovariance)]
        if len(grid) != 1:
            return None
        design, scale = terms[grid[0]].design, _scale(terms[grid[0]].design)
        nugget = [
            i
            for i in over
            if terms[i].covariance.is_scalar and _same(_scale(terms[i].design), scale)
        ]
        rest = [i for i in range(len(terms)) if i not in (*grid, *nugget)]
        if any(isinstance(terms[i].design, IdentityDesign) for i in rest):
            return None
        order = design.codes.argsort() if isinstance(design, IndexedDesign) else None
        return cls(grid[0], nugget, rest, order, scale)

    def to_grid(self, x: Tensor) -> Tensor:
        """Rows (n, m) as they stand in the grid, of equal weights."""
        x = x if self.scale is None else x / self.scale.to(x)[:, None]
        return x if self.order is None else x[self.order]

    def from_grid(self, x: Tensor) -> Tensor:
        """The transpose of :meth:`to_grid`."""
        found = x if self.order is None else torch.empty_like(x).index_copy(0, self.order, x)
        return found if self.scale is None else found / self.scale.to(x)[:, None]


def _is_over_rows(design: Design) -> bool:
    """Whether each row has a column of its own, and each column a row."""
    n, q = design.shape
    return isinstance(design, IdentityDesign) or (n == q and has_own_columns(design))


def _scale(design: Design) -> Tensor | None:
    values = design.values if isinstance(design, IndexedDesign) else None
    return None if values is None else values.detach()[:, 0]


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)


class GridProblem(Problem):
    """Depends on the matrix of each term, as the dense solver does."""

    has_second_derivatives = False  # recorded() is that of the dense solver

    def __init__(self, fixed: FixedPart, terms: Sequence[Term], method: str) -> None:
        super().__init__(fixed, terms, method)
        Grid().check(terms)
        found = GridTerms.of(terms)
        assert found is not None
        self.places = found
        self._dense = DenseProblem(fixed, terms, method)

    def with_fixed(self, fixed: FixedPart) -> Problem:
        found = super().with_fixed(fixed)
        assert isinstance(found, GridProblem)
        found._dense = DenseProblem(fixed, self._dense.terms, self.method)
        return found

    def matrices(self, terms: Sequence[Term]) -> list[Tensor]:
        return self._dense.matrices(terms)

    def recorded(self, matrices: Sequence[Tensor]) -> Tensor:
        # Decompositions have no derivative where eigenvalues meet, as without correlation.
        return self._dense.recorded(matrices)

    def evaluate_unchecked(self, terms: Sequence[Term], matrices: list[Tensor]) -> Evaluation:
        return _GridEvaluation(self, terms)

    def precise(self, terms: Sequence[Term]) -> Evaluation | None:
        return SquareRootEvaluation.of(self, self._dense.placed(terms))


class _GridEvaluation(Evaluation):
    problem: GridProblem

    def __init__(self, problem: GridProblem, terms: Sequence[Term]) -> None:
        self.problem, self._terms = problem, terms
        places = problem.places
        f = places.to_grid(torch.cat([problem.fixed.Q, problem.fixed.y[:, None]], 1))
        g = terms[places.grid].covariance
        assert isinstance(g, KroneckerCovariance)
        self._A, self._B = g.parts()
        values_a, self._Ua = decomposed(self._A, "the covariance of the rows of the grid")
        values_b, self._Ub = decomposed(self._B, "the covariance of the columns of the grid")
        nugget = sum(
            (terms[i].covariance.matrix.reshape(()) for i in places.nugget), f.new_zeros(())
        )
        self._values_a, self._values_b = values_a, values_b
        self._d = d = values_a[:, None] * values_b + nugget  # (r, c)
        if not bool((d > 0).all()) or (places.scale is not None and not bool(places.scale.all())):
            raise NotPositiveDefiniteError("V is not positive definite")
        self._Z = [places.to_grid(terms[i].design.dense(f)) for i in places.rest]
        scaled = [
            root(terms[i]).multiply(Z.mT, transpose=True).mT
            for i, Z in zip(places.rest, self._Z, strict=True)
        ]
        ZL = self._white(torch.cat(scaled, 1) if scaled else f[:, :0])
        M = ZL.mT @ ZL
        M.diagonal().add_(1)
        gain = float(M.diagonal().max()) if len(M) else 1.0
        self.rounding = torch.finfo(f.dtype).eps * max(gain, float(d.max() / d.min()))
        self.recorded_rounding = self.rounding
        self._Lc = Lc = cholesky(M, "V")
        self._nugget = nugget
        white = self._white(f)
        self._H = solve_triangular(Lc, ZL.mT, upper=False).mT  # V^-1 is I - H H' in white rows
        self._K = K = self._H.mT @ white
        F = white.mT @ white - K.mT @ K
        log_det = d.log().sum() + 2 * Lc.diagonal().log().sum()
        if places.scale is not None:
            log_det = log_det + 2 * places.scale.to(f).abs().log().sum()
        self.log_likelihood, self.gamma_factor, half = problem.profile(
            log_det, F[:-1, :-1], F[:-1, -1], F[-1, -1]
        )
        self.y_p_y = F[-1, -1] - half @ half
        self.gamma = solve_triangular(self.gamma_factor.mT, half[:, None], upper=True)[:, 0]
        rest = white - self._H @ K
        self._lost = solve_triangular(self.gamma_factor, rest[:, :-1].mT, upper=False).mT
        self._p_y = self._back((rest[:, -1] - rest[:, :-1] @ self.gamma)[:, None])[:, 0]
        self._rest = rest

    # ------------------------------------------------------------------ coordinates

    def _by_grid(self, x: Tensor) -> Tensor:
        return x.reshape(*self._d.shape, -1)

    def _white(self, x: Tensor) -> Tensor:
        r""":math:`d^{-1/2} (U_A \otimes U_B)^\top x` for x (n, m)."""
        return kronecker(self._Ua.mT, self._Ub.mT, x) / self._d.sqrt().reshape(-1, 1)

    def _back(self, x: Tensor) -> Tensor:
        r""":math:`(U_A \otimes U_B) d^{-1/2} x`."""
        return kronecker(self._Ua, self._Ub, x / self._d.sqrt().reshape(-1, 1))

    # ------------------------------------------------------------------ derivatives

    def inverse_times_data(self) -> Tensor:
        return self.problem.places.from_grid(self._back(self._rest))

    def scores_unchecked(self) -> list[Tensor]:
        problem, places = self.problem, self.problem.places
        lost = [self._H, self._lost] if problem.method == "reml" else [self._H]
        low = self._back(torch.cat(lost, 1))  # R^-1 less its square is the inner matrix
        found: dict[int, Tensor] = {places.grid: self._score_of_grid(low)}
        trace = (1 / self._d).sum() - (low * low).sum()
        for i in places.nugget:
            found[i] = ((self._p_y @ self._p_y - trace) / 2).reshape(1, 1)
        for i, Z in zip(places.rest, self._Z, strict=True):
            white, own = self._white(Z), Z.mT @ low
            u = Z.mT @ self._p_y
            inner = white.mT @ white - own @ own.mT
            found[i] = self._terms[i].covariance.fold((torch.outer(u, u) - inner) / 2)
        return [found[i] for i in sorted(found)]

    def _score_of_grid(self, low: Tensor) -> Tensor:
        y, L = self._by_grid(self._p_y[:, None]), self._by_grid(low)
        parts = []
        for side in ("A", "B"):
            if side == "A":
                rows, other, U = (y, L), self._B, self._Ua
                own = (self._values_b / self._d).sum(1)
            else:
                rows, other, U = (y.transpose(0, 1), L.transpose(0, 1)), self._A, self._Ub
                own = (self._values_a[:, None] / self._d).sum(0)
            square = [x.flatten(1) @ (other @ x).flatten(1).mT for x in rows]
            inner = (U * own) @ U.mT - square[1]
            parts.append(((square[0] - inner) / 2).reshape(-1))
        return torch.cat(parts)

    def information(self, derivatives: Sequence[Tensor]) -> Tensor:
        places, y = self.problem.places, self._p_y
        working = y.new_zeros(len(y), len(derivatives[0]))
        g = self._terms[places.grid].covariance
        assert isinstance(g, KroneckerCovariance)
        for j, d in enumerate(derivatives[places.grid]):
            working[:, j] += g.along(d, y[:, None])[:, 0]
        for i in places.nugget:
            working = working + y[:, None] * derivatives[i].reshape(-1)
        for i, Z in zip(places.rest, self._Z, strict=True):
            u = (Z.mT @ y)[:, None]
            form = self._terms[i].covariance
            moved = [form.along(d, u) for d in derivatives[i]]
            working = working + Z @ torch.cat(moved, 1)
        white = self._white(working)
        own, lost = self._H.mT @ white, self._lost.mT @ white
        return (white.mT @ white - own.mT @ own - lost.mT @ lost) / 2

    def random_effects(self) -> list[RandomEffects]:
        places, terms = self.problem.places, self._terms
        low = self._back(torch.cat([self._H, self._lost], 1))
        found = {}
        term = terms[places.grid]
        values = term.covariance.multiply(self._p_y[:, None])
        known = self._values_a[:, None] * self._values_b
        kept = known * self._nugget / self._d
        spread = (self._Ua**2 @ kept @ (self._Ub**2).mT).reshape(-1)
        spread = spread + (term.covariance.multiply(low) ** 2).sum(1)
        found[places.grid] = RandomEffects(term.name, values, spread[:, None, None])
        eye = torch.eye(len(self._Lc), dtype=values.dtype, device=values.device)
        of_X = solve_triangular(self._Lc.mT, self._K[:, :-1], upper=True)
        lost = solve_triangular(self.gamma_factor, of_X.mT, upper=False).mT
        half = torch.cat([solve_triangular(self._Lc.mT, eye, upper=True), lost], 1)
        parts = half.split([Z.shape[1] for Z in self._Z]) if self._Z else ()
        for i, Z, part in zip(places.rest, self._Z, parts, strict=True):
            b = terms[i].covariance.multiply((Z.mT @ self._p_y)[:, None])[:, 0]
            found[i] = RandomEffects.of_roots(terms[i], b, root(terms[i]).multiply(part))
        return [found[i] for i in sorted(found)]
