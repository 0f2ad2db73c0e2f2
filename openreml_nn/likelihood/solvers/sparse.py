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
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from scipy.sparse import csc_matrix, csr_matrix
from torch import Tensor

from openreml_nn.covariance.nodes import functorch
from openreml_nn.likelihood.fixed import FixedPart
from openreml_nn.likelihood.problem import (
    Cost,
    Evaluation,
    Problem,
)
from openreml_nn.likelihood.residual import Residual
from openreml_nn.likelihood.solver import Solver, check_held
from openreml_nn.likelihood.solvers.blocked import Blocked
from openreml_nn.likelihood.solvers.dense import Dense, DenseProblem
from openreml_nn.likelihood.system.crossproducts import Statistics
from openreml_nn.likelihood.system.sparse.equations import Equations
from openreml_nn.likelihood.system.sparse.evaluation import SparseEvaluation, SparseSystem
from openreml_nn.likelihood.system.sparse.fields import FieldResidual, FieldRows
from openreml_nn.likelihood.system.sparse.part import Between
from openreml_nn.likelihood.system.sparse.rows import Rows
from openreml_nn.likelihood.system.sparse.sums import SumRows, are_nested_sums, between_levels
from openreml_nn.likelihood.system.sparse.terms import (
    SparseTerm,
    are_nested,
    has_sparse_inverse,
    is_dense,
    on_cpu,
    over_levels,
)
from openreml_nn.likelihood.system.square_root import SquareRootEvaluation
from openreml_nn.support.checks import check_number, found
from openreml_nn.support.errors import InputError
from openreml_nn.support.modes import outside_transforms
from openreml_nn.terms.term import Term

__all__ = ["Sparse", "SparseProblem"]

#: With fewer columns beside the largest term's than these, others cost little.
_FEW = 500
#: What takes the time of an operation of the factor, its inverse included, in those of a dense
#: product: three, of fronts that are smaller.
_FRONTS = 4.0
_REASON = "what meets is sparse"


@dataclass(frozen=True)
class Sparse(Solver):
    """A sparse factor of the mixed-model equations: for relatives, and for crossed factors.

    Args:
        ordering: gives an order of elimination (q,) for a symmetric pattern (q, q), a SciPy matrix;
            nested dissection by default. The order changes what is computed in no way but in
            rounding, time and memory.
        memory: bytes that a factor and its inverse may hold, or V where second derivatives need it;
            more are refused, and so is more than the machine has.
        progress: called with ``"factor"`` or ``"inverse"`` and the share of it that is done, every
            few seconds of factorisations that take longer; ``print`` will do.

    Raises:
        TypeError, InputError: if an option is not of its kind.
    """

    name: ClassVar[str] = "sparse"
    #: What takes as long as all that an evaluation does beside its factor.
    least: ClassVar[float] = 3e7
    ordering: Callable[[csc_matrix], np.ndarray] | None = None
    memory: float = 16 * 2**30
    progress: Callable[[str, float], None] | None = None

    #: The last analysis, for the problem that follows a forecast.
    _analysed: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_number("memory", self.memory, above=0)
        if self.ordering is not None and not callable(self.ordering):
            raise TypeError(f"`ordering` is {found(self.ordering)}: expected a function")
        if self.progress is not None and not callable(self.progress):
            raise TypeError(f"`progress` is {found(self.progress)}: expected a function")

    def with_progress(self, progress: Callable[[str, float], None]) -> Sparse:
        return replace(self, progress=progress)

    def forecast(self, terms: Sequence[Term], p: int, dtype: torch.dtype) -> Cost | None:
        if self.obstacle(terms) is not None:
            return None
        moved, residual = _moved(terms)
        n = moved[0].design.shape[0]
        effects = [term for i, term in enumerate(moved) if i not in residual.at]
        is_field = isinstance(residual, FieldResidual)
        promising = (is_field or _promising(effects)) and not functorch()
        if not promising or _held_dense(effects) > self.memory:
            # Other solvers take so little, or this one so much, that a bound will do; and within a
            # transform the formula is another solver's.
            q = float(sum(term.design.shape[1] for term in effects))
            work = q**3 + 8.0 * q * q * (p + 2) + 4.0 * n * (p + 1) + Sparse.least + residual.work
            return Cost(work, 16.0 * q * q, True, _REASON, (f"{q:.0f} columns",))
        random = _random_of(moved, residual)
        equations = self._equations(random, residual)
        self._analysed.update(terms=terms, equations=equations)
        found = cost_of(equations, n, p)
        return replace(found, operations=found.operations + residual.work)

    def forecast_of_sums(self, terms: Sequence[Term], p: int, sums: Statistics) -> Cost | None:
        there = on_cpu(terms)
        residual = _residual_of(there)
        if residual.moves:
            return None
        effects = [term for i, term in enumerate(terms) if i not in residual.at]
        held = _held_dense(effects)
        if held > self.memory or not (
            _have_inverse(effects) or (_has_many(effects) and not are_nested_sums(sums))
        ):
            q = float(sum(term.design.shape[1] for term in effects))
            work = q**3 + 8.0 * q * q * (p + 2) + Sparse.least
            return Cost(work, max(16.0 * q * q, held), True, _REASON, (f"{q:.0f} columns",))
        equations = self._equations(_random_of(there, residual), residual, sums)
        self._analysed.update(terms=terms, equations=equations)
        return cost_of(equations, 0, p)

    def problem_of_sums(
        self, fixed: FixedPart, terms: Sequence[Term], method: str, sums: Statistics
    ) -> Problem:
        return SparseProblem(fixed, terms, method, self, sums)

    def analysis(
        self, terms: Sequence[Term], sums: Statistics | None = None
    ) -> tuple[list[SparseTerm], Residual, Equations]:
        """The random terms, the residual, and the equations, analysed; of the levels that meet in
        sums, if there are no rows.

        Raises:
            InputError: if their factor would hold more than ``memory``.
        """
        known: Equations | None = None
        if self._analysed.get("terms") is terms:
            known = self._analysed["equations"]
        self._analysed.clear()
        moved, residual = _moved(terms)
        effects = [term for i, term in enumerate(moved) if i not in residual.at]
        self.check_memory(_held_dense(effects), sum(x.design.shape[1] for x in effects))
        random = _random_of(moved, residual)
        found = self._equations(random, residual, sums) if known is None else known
        self.check_memory(found.symbolic.bytes, found.size)
        return random, residual, found

    def check_memory(self, held: float, columns: int) -> None:
        """Refuse a factor that would hold more bytes than it may, or than the machine has.

        Args:
            held: bytes.
            columns: of the system.

        Raises:
            InputError: if it would.
        """
        check_held(self, held, columns, (self.memory, "`Sparse(memory=...)` allows more"))

    def _equations(
        self, random: Sequence[SparseTerm], residual: Residual, sums: Statistics | None = None
    ) -> Equations:
        parts = [own.part for own in random]
        pattern: csr_matrix | Between | None
        if sums is not None:
            pattern = between_levels(sums)
        elif isinstance(residual, FieldResidual):
            pattern = residual.pattern
        else:
            pattern = Rows.pattern(residual)
        return Equations(parts, pattern, self.ordering, self.progress)

    def problem(self, fixed: FixedPart, terms: Sequence[Term], method: str) -> Problem:
        return SparseProblem(fixed, terms, method, self)

    def obstacle(self, terms: Sequence[Term]) -> str | None:
        try:
            _moved(terms)
        except InputError as error:
            return str(error).replace("blocked", "sparse")
        return None


def _moved(terms: Sequence[Term]) -> tuple[list[Term], Residual]:
    """The terms over levels, and R."""
    with outside_transforms():
        moved = over_levels(on_cpu(terms))
        return moved, _residual_of(moved)


def _residual_of(terms: Sequence[Term]) -> Residual:
    """R, by blocks or by a sparse precision."""
    return FieldResidual.within(terms) or Residual.of(terms)


def _random_of(terms: Sequence[Term], residual: Residual) -> list[SparseTerm]:
    """The random terms, over the rows that the equations have."""
    found = SparseTerm.of_all(terms, residual.at)
    return residual.expanded(found) if isinstance(residual, FieldResidual) else found


def _promising(terms: Sequence[Term]) -> bool:
    """Whether there may be so much to gain that the pattern is worth an analysis."""
    return _have_inverse(terms) or (_has_many(terms) and not are_nested(terms))


def _have_inverse(terms: Sequence[Term]) -> bool:
    """Whether a large term has a sparse precision."""
    large = [term for term in terms if term.design.shape[1] >= _FEW]
    return any(x.covariance.is_chained or has_sparse_inverse(x) for x in large)


def _has_many(terms: Sequence[Term]) -> bool:
    """Whether there are many columns beside the largest term's."""
    sizes = [term.design.shape[1] for term in terms]
    return sum(sizes) - max(sizes, default=0) >= _FEW


def _held_dense(terms: Sequence[Term]) -> float:
    """Bytes of the blocks of terms in which every column meets every other."""
    return 48.0 * sum(x.design.shape[1] for x in terms if is_dense(x)) ** 2


def cost_of(equations: Equations, n: int, p: int) -> Cost:
    """What an evaluation with its scores takes, of n rows and p fixed effects."""
    symbolic = equations.symbolic
    entries = float(symbolic.entries)
    work = (
        _FRONTS * symbolic.operations + 8.0 * entries * (p + 2) + 4.0 * n * (p + 1) + Sparse.least
    )
    held = symbolic.bytes + 8.0 * (n + 4 * equations.size) * (p + 1)
    names = ", ".join(repr(part.name) for part in equations.parts)
    steps = (
        f"{names}: sparse, {equations.size} columns, {entries:.3g} entries of the factor",
        f"fixed effects: dense, {p} x {p}",
    )
    return Cost(work, held, True, _REASON, steps)


class SparseProblem(Problem):
    """Depends on the matrix of each term, as the dense solver does.

    Args:
        fixed, terms, method: see :class:`Problem`.
        solver: with its options.
        sums: cross-products of the random terms, in their order, and of f, for rows that are not at
            hand; the residual has one variance.
    """

    takes_data = True
    has_second_derivatives = False  # recorded() takes far longer than an evaluation

    def __init__(
        self,
        fixed: FixedPart,
        terms: Sequence[Term],
        method: str,
        solver: Sparse | None = None,
        sums: Statistics | None = None,
    ) -> None:
        super().__init__(fixed, terms, method)
        self._sums = sums
        if sums is not None:
            self.n = sums.rows
        self.solver = Sparse() if solver is None else solver
        self.solver.check(terms)
        self._dense = DenseProblem(fixed, terms, method)
        self._system: SparseSystem | None = None
        self._plain: Problem | None = None

    @property
    def system(self) -> SparseSystem:
        """The random terms, the equations and the rows, analysed when they are first asked for: a
        likelihood that is recorded needs none of them."""
        if self._system is None:
            random, residual, equations = self.solver.analysis(self._dense.terms, self._sums)
            rows: Rows
            if self._sums is not None:
                rows = SumRows(equations, residual, self._sums)
            elif isinstance(residual, FieldResidual):
                rows = FieldRows(equations, residual, self.fixed)
            else:
                rows = Rows(equations, residual, self.fixed)
            self._system = SparseSystem(random, equations, rows)
        return self._system

    def anew(self, fixed: FixedPart, terms: Sequence[Term]) -> Problem:
        return SparseProblem(fixed, terms, self.method, self.solver)

    def with_fixed(self, fixed: FixedPart) -> Problem:
        found = super().with_fixed(fixed)
        assert isinstance(found, SparseProblem)
        found._dense = DenseProblem(fixed, self._dense.terms, self.method)
        found._plain = None
        if self._system is not None:
            found._system = self._system._replace(rows=self._system.rows.with_fixed(fixed))
        return found

    def cost(self) -> Cost:
        return cost_of(self.system.equations, 0 if self._sums else self.n, self.p)

    def matrices(self, terms: Sequence[Term]) -> list[Tensor]:
        return self._dense.matrices(terms)

    def recorded(self, matrices: Sequence[Tensor]) -> Tensor:
        terms = [
            replace(term, covariance=term.covariance.with_matrix(matrix))
            for term, matrix in zip(self._dense.terms, matrices, strict=True)
        ]
        if self._plain is None:
            self._plain = self._recording(terms)
        return self._plain.recorded(self._plain.matrices(terms))

    def _recording(self, terms: Sequence[Term]) -> Problem:
        """The problem of the plain formula that holds least: by blocks of effects, or by V."""
        related = any(term.covariance.is_related for term in terms)
        sums, dtype = self._sums, self.fixed.y.dtype
        problems: list[tuple[float, Solver]] = []
        for solver in (
            (Blocked(),) if sums is not None else (Dense(),) if related else (Blocked(), Dense())
        ):
            cost = (
                solver.forecast_of_sums(terms, self.p, sums)
                if sums is not None
                else solver.forecast(terms, self.p, dtype)
            )
            if cost is not None:
                problems.append((10.0 * cost.bytes, solver))  # what autograd keeps of it
        held, least = min(problems, key=lambda found: found[0])
        if held > self.solver.memory:
            raise InputError(
                "derivatives of this kind, second ones and those by designs, come from dense "
                f"matrices that would hold {held / 2**30:.3g} GiB of {self.n} rows, and may hold "
                f"{self.solver.memory / 2**30:.3g}: `Sparse(memory=...)` allows more"
            )
        if sums is not None:
            return least.problem_of_sums(self.fixed, self._dense.terms, self.method, sums)
        return least.problem(self.fixed, self._dense.terms, self.method)

    def evaluate_unchecked(self, terms: Sequence[Term], matrices: list[Tensor]) -> Evaluation:
        return SparseEvaluation(self, self.system, on_cpu(terms))

    def precise(self, terms: Sequence[Term]) -> Evaluation | None:
        if self._sums is not None:
            return None
        return SquareRootEvaluation.of(self, self._dense.placed(terms))
