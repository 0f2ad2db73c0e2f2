r"""The likelihood by a sparse Cholesky factor of the mixed-model equations.

With the effects of each term :math:`b = \Lambda u` and Q the known precision of u (the identity, or
a kernel's inverse such as that of a pedigree for each effect of a level), everything follows from

.. math::
    M = \Lambda^\top Z^\top R^{-1} Z \Lambda + Q,\qquad
    \log|V| = \log|R| + \log|M| - \log|Q|,\qquad
    V^{-1} = R^{-1} - R^{-1} Z \Lambda M^{-1} \Lambda^\top Z^\top R^{-1}

A variance of zero is an ordinary point. Derivatives need the entries of :math:`M^{-1}` within the
pattern of its factor only, by :math:`Q^{-1}\Lambda^\top Z^\top V^{-1} Z = M^{-1}\Lambda^\top Z^\top
R^{-1} Z`, in which no digits cancel. All is computed in float64 on the CPU.

Reference:
    Henderson, Biometrics 31 (1975) 423; Misztal and Perez-Enciso, Journal of Dairy Science 76
    (1993) 1479, for the selected inverse; Johnson and Thompson, Journal of Dairy Science 78 (1995)
    449, for the average information.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from scipy.linalg import solve_triangular
from scipy.sparse import csc_matrix
from torch import Tensor

from openreml_nn.likelihood.effects import RandomEffects
from openreml_nn.likelihood.fixed import FixedPart
from openreml_nn.likelihood.problem import (
    Cost,
    Evaluation,
    NotPositiveDefiniteError,
    Problem,
)
from openreml_nn.likelihood.residual import Residual
from openreml_nn.likelihood.solver import Solver
from openreml_nn.likelihood.solvers.dense import DenseProblem
from openreml_nn.likelihood.system.sparse.equations import Equations
from openreml_nn.likelihood.system.sparse.rows import Rows
from openreml_nn.likelihood.system.sparse.terms import (
    SparseTerm,
    are_nested,
    known_inverse,
    over_levels,
)
from openreml_nn.likelihood.system.square_root import SquareRootEvaluation
from openreml_nn.support.errors import InputError, NumericalError
from openreml_nn.terms.term import Term

__all__ = ["Sparse", "SparseProblem"]

#: Operations that take as long as what an evaluation does beside them, at least.
_OVERHEAD = 3e7
#: With fewer columns beside the largest term's than these, others cost little.
_FEW = 500


@dataclass(frozen=True)
class Sparse(Solver):
    """A sparse factor of the mixed-model equations: for relatives, and for crossed factors.

    Args:
        ordering: gives an order of elimination (q,) for a symmetric pattern (q, q), a SciPy matrix;
            nested dissection by default. The order changes what is computed in no way but in
            rounding, time and memory.
        memory: bytes that a factor and its inverse may hold, or V where second derivatives need it;
            more are refused.
    """

    name: ClassVar[str] = "sparse"
    ordering: Callable[[csc_matrix], np.ndarray] | None = None
    memory: float = 16 * 2**30

    #: The last analysis, for the problem that follows a forecast.
    _analysed: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def forecast(self, terms: Sequence[Term], p: int, dtype: torch.dtype) -> Cost | None:
        if self.obstacle(terms) is not None:
            return None
        moved = over_levels(terms)
        residual = Residual.of(moved)
        n = moved[0].design.shape[0]
        if not _promising([term for i, term in enumerate(moved) if i not in residual.at]):
            # Other solvers take so little that a bound will do.
            q = float(sum(x.design.shape[1] for i, x in enumerate(moved) if i not in residual.at))
            work = q**3 + 8.0 * q * q * (p + 2) + 4.0 * n * (p + 1) + _OVERHEAD
            return Cost(work, 16.0 * q * q, True, "what meets is sparse", (f"{q:.0f} columns",))
        random = SparseTerm.of_all(moved, residual.at)
        equations = self._equations(random, residual)
        self._analysed.update(terms=terms, equations=equations)
        return cost_of(equations, n, p)

    def analysis(self, terms: Sequence[Term]) -> tuple[list[SparseTerm], Residual, Equations]:
        """The random terms, the residual, and the equations, analysed.

        Raises:
            InputError: if their factor would hold more than ``memory``.
        """
        known: Equations | None = None
        if self._analysed.get("terms") is terms:
            known = self._analysed["equations"]
        self._analysed.clear()
        moved = over_levels(terms)
        residual = Residual.of(moved)
        random = SparseTerm.of_all(moved, residual.at)
        found = self._equations(random, residual) if known is None else known
        held = 16.0 * found.symbolic.entries
        if held > self.memory:
            raise InputError(
                f"the sparse solver would hold {held / 2**30:.3g} GiB for a factor of "
                f"{found.size} columns, and may hold {self.memory / 2**30:.3g}: "
                "solver='krylov' is approximate and holds little, `Sparse(memory=...)` allows more"
            )
        return random, residual, found

    def _equations(self, random: Sequence[SparseTerm], residual: Residual) -> Equations:
        parts = [own.part for own in random]
        return Equations(parts, Rows.pattern(residual), self.ordering)

    def problem(self, fixed: FixedPart, terms: Sequence[Term], method: str) -> Problem:
        return SparseProblem(fixed, terms, method, self)

    def obstacle(self, terms: Sequence[Term]) -> str | None:
        try:
            Residual.of(over_levels(terms))
        except InputError as error:
            return str(error).replace("blocked", "sparse")
        return None


def _promising(terms: Sequence[Term]) -> bool:
    """Whether there may be so much to gain that the pattern is worth an analysis."""
    inverses = [known_inverse(term) is not None for term in terms]
    if any(x and term.design.shape[1] >= _FEW for x, term in zip(inverses, terms, strict=True)):
        return True
    sizes = [term.design.shape[1] for term in terms]
    return sum(sizes) - max(sizes, default=0) >= _FEW and not are_nested(terms)


def cost_of(equations: Equations, n: int, p: int) -> Cost:
    """What an evaluation with its scores takes, of n rows and p fixed effects."""
    symbolic = equations.symbolic
    entries = float(symbolic.entries)
    work = 3 * symbolic.operations + 8.0 * entries * (p + 2) + 4.0 * n * (p + 1) + _OVERHEAD
    held = 8.0 * (2 * entries + (n + 4 * equations.size) * (p + 1))
    names = ", ".join(repr(part.name) for part in equations.parts)
    steps = (
        f"{names}: sparse, {equations.size} columns, {entries:.3g} entries of the factor",
        f"fixed effects: dense, {p} x {p}",
    )
    return Cost(work, held, True, "what meets is sparse", steps)


class SparseProblem(Problem):
    """Depends on the matrix of each term, as the dense solver does.

    Args:
        fixed, terms, method: see :class:`Problem`.
        solver: with its options.
    """

    takes_data = True
    has_second_derivatives = False  # recorded() is that of the dense solver

    def __init__(
        self, fixed: FixedPart, terms: Sequence[Term], method: str, solver: Sparse | None = None
    ) -> None:
        super().__init__(fixed, terms, method)
        self.solver = Sparse() if solver is None else solver
        self.solver.check(terms)
        self._dense = DenseProblem(fixed, terms, method)
        self.random, residual, self.equations = self.solver.analysis(terms)
        self.rows = Rows(self.equations, residual, fixed)

    def anew(self, fixed: FixedPart, terms: Sequence[Term]) -> Problem:
        return SparseProblem(fixed, terms, self.method, self.solver)

    def with_fixed(self, fixed: FixedPart) -> Problem:
        found = super().with_fixed(fixed)
        assert isinstance(found, SparseProblem)
        found.rows = self.rows.with_fixed(fixed)
        found._dense = DenseProblem(fixed, self._dense.terms, self.method)
        return found

    def cost(self) -> Cost:
        return cost_of(self.equations, self.n, self.p)

    def matrices(self, terms: Sequence[Term]) -> list[Tensor]:
        return self._dense.matrices(terms)

    def recorded(self, matrices: Sequence[Tensor]) -> Tensor:
        held = 80.0 * self.n**2  # V, and what autograd keeps of it
        if held > self.solver.memory:
            raise InputError(
                f"derivatives of this kind come from V itself, and of {self.n} rows that would "
                f"hold {held / 2**30:.3g} GiB: the sparse solver has none for so many"
            )
        return self._dense.recorded(matrices)

    def evaluate_unchecked(self, terms: Sequence[Term], matrices: list[Tensor]) -> Evaluation:
        return _SparseEvaluation(self, terms)

    def precise(self, terms: Sequence[Term]) -> Evaluation | None:
        return SquareRootEvaluation.of(self, self._dense.placed(terms))


class _SparseEvaluation(Evaluation):
    problem: SparseProblem

    def __init__(self, problem: SparseProblem, terms: Sequence[Term]) -> None:
        self.problem, self._terms = problem, terms
        self._at = at = problem.rows.at([terms[i].covariance.matrix for i in problem.rows.terms])
        equations = problem.equations
        largest = equations.largest(at.blocks)
        self._roots = roots = [
            own.roots(terms[own.at], size)
            for own, size in zip(problem.random, largest, strict=True)
        ]
        self._moved = [
            cross.transform(data, roots[cross.one].lifted, roots[cross.other].lifted)
            for cross, data in zip(equations.crosses, at.blocks, strict=True)
        ]
        prior = equations.log_det_prior
        try:
            self._factor = equations.factor(self._moved)
        except NumericalError:
            raise NotPositiveDefiniteError("V is not positive definite") from None
        log_det = at.log_det + self._factor.log_det - prior
        self._half = self._factor.half(self._each(at.Zf, "lifted", transpose=True))
        F = at.ff - self._half.T @ self._half
        found, factor, white = problem.profile(
            *map(torch.as_tensor, (np.asarray(log_det), F[:-1, :-1], F[:-1, -1], F[-1, -1]))
        )
        dtype = problem.fixed.y.dtype
        y_p_y = float(F[-1, -1] - white @ white)
        self._C = C = factor.numpy()
        self._gamma = gamma = solve_triangular(C, white.numpy(), lower=True, trans=1)
        like = problem.fixed.y
        self.log_likelihood, self.y_p_y = found.to(like), like.new_tensor(y_p_y)
        self.gamma, self.gamma_factor = torch.from_numpy(gamma).to(like), factor.to(like)
        self._y_p_y = y_p_y
        # What is left of the sums of squares, and how far the random effects exceed the residual.
        after = F.diagonal().copy()
        after[-1] = problem.n + y_p_y
        gain = max(equations.largest(self._moved), default=0.0)
        lost = max(float((at.ff.diagonal() / after).max()), max(gain, 1.0), at.condition)
        lost = max(lost, self._factor.loss**0.5 * max(gain, 1.0))
        self.rounding = torch.finfo(torch.float64).eps * lost
        if dtype != torch.float64:
            self.rounding += torch.finfo(dtype).eps * max(gain, 1.0) ** 0.5
        self.recorded_rounding = self.rounding

    # ------------------------------------------------------------------ helpers

    def _each(self, x: np.ndarray, which: str, transpose: bool = False) -> np.ndarray:
        r""":math:`\Lambda x`, or :math:`\Lambda^\top x`, for x (q, m)."""
        parts = self.problem.equations.split(x)
        found = [
            root.times(getattr(root, which), part, transpose)
            for root, part in zip(self._roots, parts, strict=True)
        ]
        return np.concatenate(found) if found else x

    @cached_property
    def _u(self) -> np.ndarray:
        r""":math:`M^{-1}\Lambda^\top Z^\top R^{-1} f`, (q, p + 1)."""
        return self._factor.back(self._half)

    @cached_property
    def _u_y(self) -> np.ndarray:
        """BLUPs of u, (q, 1)."""
        return self._u[:, -1:] - self._u[:, :-1] @ self._gamma[:, None]

    @cached_property
    def _u_X(self) -> np.ndarray:
        """A root of what the fixed effects add to the variance of u, (q, p)."""
        return solve_triangular(self._C, self._u[:, :-1].T, lower=True).T

    def _effects(self, u: np.ndarray, which: str) -> np.ndarray:
        """Effects of the columns of Z, of u (q, m)."""
        parts = self.problem.equations.split(self._each(u, which))
        own = self.problem.random
        found = [x.part.to_effects(part) for x, part in zip(own, parts, strict=True)]
        return np.concatenate(found) if found else u

    def _to(self, x: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x)).to(self.problem.fixed.y)

    def inverse_times_data(self) -> Tensor:
        return self._to(self._at.rest(self._effects(self._u, "lifted")))

    # ------------------------------------------------------------------ derivatives

    @cached_property
    def _pulled(self) -> list[np.ndarray]:
        r"""For each term twice :math:`\Lambda^\top S \Lambda` with S its score, summed over levels
        (1, k, k), or (levels, 1, 1) where each level has a variance of its own."""
        problem = self.problem
        own = problem.random
        traces = problem.equations.traces(
            self._factor.inverse, self._moved, [x.by_level for x in own]
        )
        columns = [self._u_y, self._u_X] if problem.method == "reml" else [self._u_y]
        u = problem.equations.split(np.concatenate(columns, 1))
        found = []
        for x, trace, part in zip(own, traces, u, strict=True):
            other = x.part.times_prior(part)
            if x.by_level:
                total = (part * other).sum(1)[:, None, None]
            else:
                k = x.part.effects
                shape = (x.part.levels, k, part.shape[1])
                one, two = (y.reshape(shape).transpose(1, 0, 2) for y in (part, other))
                total = (one.reshape(k, -1) @ two.reshape(k, -1).T)[None]
            found.append(total - trace)
        return found

    def scores_unchecked(self) -> list[Tensor]:
        problem, found = self.problem, {}
        for x, root, pulled in zip(problem.random, self._roots, self._pulled, strict=True):
            found[x.at] = x.fold(self._terms[x.at], root.unpull(pulled) / 2).to(problem.fixed.y)
        for i, score in zip(problem.rows.terms, self._scores_of_rows(), strict=True):
            found[i] = score
        return [found[i] for i in sorted(found)]

    def _scores_of_rows(self) -> list[Tensor]:
        problem, at = self.problem, self._at
        reml = problem.method == "reml"
        if at.scale is not None:
            # By V = sum Z G Z' + s R: tr(P V) = n - p and y' P V P y = y' P y.
            explained = sum(float(np.trace(x, axis1=1, axis2=2).sum()) for x in self._pulled)
            rank = problem.n - (problem.p if reml else 0)
            score = (self._y_p_y - rank - explained) / (2 * at.scale)
            return [self._to(np.full((1, 1), score)) for _ in problem.rows.terms]
        roots = [root.lifted for root in self._roots]
        rest = at.rest(self._effects(self._u, "lifted"))
        p_y = rest[:, -1] - rest[:, :-1] @ self._gamma
        lost = solve_triangular(self._C, rest[:, :-1].T, lower=True).T
        columns = lost if reml else lost[:, :0]
        inner = problem.equations.inverse_of_effects(self._factor.inverse, roots)
        found = problem.rows.scores(at, inner, p_y, columns)
        return [score.to(problem.fixed.y) for score in found]

    def information(self, derivatives: Sequence[Tensor]) -> Tensor:
        problem, at = self.problem, self._at
        u = problem.equations.split(self._u_y)
        m = len(derivatives[0])
        moved = [
            x.along(self._terms[x.at], derivatives[x.at], root.unlift(part))
            for x, root, part in zip(problem.random, self._roots, u, strict=True)
        ]
        c = np.concatenate(moved) if moved else np.zeros((0, m))
        own = [derivatives[i] for i in problem.rows.terms]
        if at.scale is not None:
            # Working variates are combinations of the columns of Z and f: they cost nothing in n.
            ds = sum(d.reshape(m).double().numpy() for d in own) / at.scale
            c = c - self._each(self._u_y, "lifted") * ds
            Cf = np.zeros((problem.p + 1, m))
            Cf[-1] = ds
            T = problem.equations.times(at.blocks, c) + at.Zf @ Cf
            Tf = at.Zf.T @ c + at.ff @ Cf
            total = c.T @ T + Cf.T @ Tf
        else:
            rest = at.rest(self._effects(self._u, "lifted"))
            p_y = rest[:, -1] - rest[:, :-1] @ self._gamma
            T, Tf, total = problem.rows.working(at, c, own, p_y)
        e = self._factor.half(self._each(T, "lifted", transpose=True))
        part = solve_triangular(self._C, Tf[:-1] - self._half[:, :-1].T @ e, lower=True)
        return self._to((total - e.T @ e - part.T @ part) / 2)

    def random_effects(self) -> list[RandomEffects]:
        problem = self.problem
        values = problem.equations.split(self._effects(self._u_y, "root"))
        lost = problem.equations.split(self._effects(self._u_X, "root"))
        found = []
        for i, (x, root) in enumerate(zip(problem.random, self._roots, strict=True)):
            w = x.part.width
            spread = root.variances(problem.equations, self._factor.inverse, i)
            added = lost[i].reshape(len(lost[i]) // w, w, problem.p)
            spread = spread + added @ added.transpose(0, 2, 1)
            name = self._terms[x.at].name
            found.append(RandomEffects(name, self._to(values[i].reshape(-1, w)), self._to(spread)))
        return found
