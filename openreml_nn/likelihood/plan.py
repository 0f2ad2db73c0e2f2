"""Which solver is taken, why, and what it will cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import ClassVar

import torch

from openreml_nn.likelihood.fixed import FixedPart
from openreml_nn.likelihood.problem import Cost, Problem
from openreml_nn.likelihood.solver import Solver
from openreml_nn.likelihood.solvers import SOLVERS
from openreml_nn.likelihood.system.crossproducts import Statistics
from openreml_nn.support.checks import check_choice, check_instance, check_number
from openreml_nn.support.errors import InputError
from openreml_nn.terms.term import Term

__all__ = ["Auto", "Plan", "check_solver", "warning_of"]

#: So many times less work is worth an approximation.
_FAR_LESS = 10.0


@dataclass(frozen=True)
class Auto(Solver):
    """The solver of least cost.

    It is, of the exact solvers that fit the terms and hold no more than ``memory``, the one with
    the fewest operations. Where none holds so little, or each takes more than ``operations`` and an
    approximate one a tenth of them at most, that is taken, with a warning; where there is none, the
    exact one with the fewest operations.

    Args:
        memory: bytes that an exact solver may hold.
        operations: that an evaluation by an exact solver may take; the default are about half a
            minute on a core.
        progress: of the solver that is taken, see :meth:`Solver.with_progress`.

    Raises:
        TypeError, InputError: if one of these is no number above 0.
    """

    name: ClassVar[str] = "auto"
    memory: float = 4 * 2**30
    operations: float = 1e12
    progress: Callable[[str, float], None] | None = None

    def __post_init__(self) -> None:
        check_number("memory", self.memory, above=0)
        check_number("operations", self.operations, above=0)

    def with_progress(self, progress: Callable[[str, float], None]) -> Auto:
        return replace(self, progress=progress)

    def choose(
        self,
        terms: Sequence[Term],
        p: int,
        dtype: torch.dtype,
        sums: Statistics | None = None,
    ) -> tuple[Solver, Cost, str]:
        """The solver, its cost, and why it is taken; of those that take sums by level, if they are
        given in the place of rows."""
        known: list[tuple[Solver, Cost | None]] = []
        least, is_small = inf, False
        for make in SOLVERS.values():
            if make.exact and make.least >= least:
                is_small = True
            elif make.exact:
                solver = make()
                if self.progress is not None:
                    solver = solver.with_progress(self.progress)
                found = _forecast(solver, terms, p, dtype, sums)
                known.append((solver, found))
                if found is not None and found.bytes <= self.memory:
                    least = min(least, found.operations)
        exact = [(solver, cost) for solver, cost in known if cost is not None]
        exact.sort(key=lambda found: found[1].operations)
        small = [found for found in exact if found[1].bytes <= self.memory]
        best, most = (small or exact)[0][0].name, (small or exact)[0][1].operations
        held = min(cost.bytes for _, cost in exact)
        if held > self.memory or most > self.operations:
            for solver, rough in _approximate(terms, p, dtype, sums):
                why = self.excuse(held, most, rough, best)
                if why is not None:
                    return solver, rough, why
        (solver, cost), *others = small or exact
        if others:
            ratio = others[0][1].operations / max(cost.operations, 1.0)
            why = f"{ratio:.3g} times less work than the {others[0][0].name} solver"
            return solver, cost, f"{cost.reason}, {why}"
        if len(exact) > 1:
            least = min(cost.bytes for _, cost in exact if cost.bytes > self.memory)
            return solver, cost, f"{cost.reason}, others would need {least / 2**30:.3g} GiB"
        if is_small:
            return solver, cost, f"{cost.reason}, as there are few rows"
        refused = [other.obstacle(terms) for other, found in known if found is None]
        return solver, cost, "; ".join(x for x in refused if x) or cost.reason

    def excuse(self, held: float, operations: float, rough: Cost, best: str) -> str | None:
        """Why an approximate solver is taken; None where an exact one is.

        Args:
            held: bytes that an exact solver holds at least.
            operations: that it takes.
            rough: what the approximate one takes.
            best: name of the exact solver of least cost.
        """
        insist = f"solver={best!r} insists on an exact one"
        if held > self.memory:
            return f"exact solvers would need {held / 2**30:.3g} GiB; {insist}"
        ratio = operations / rough.operations
        if operations > self.operations and ratio >= _FAR_LESS:
            many = f"{operations:.3g} operations, {ratio:.3g} times as many"
            return f"an exact evaluation would take {many}; {insist}"
        return None

    def forecast(self, terms: Sequence[Term], p: int, dtype: torch.dtype) -> Cost:
        return self.choose(terms, p, dtype)[1]

    def problem(self, fixed: FixedPart, terms: Sequence[Term], method: str) -> Problem:
        choice = self.choose(terms, fixed.Q.shape[1], fixed.y.dtype)[0]
        return choice.problem(fixed, terms, method)


def _forecast(
    solver: Solver, terms: Sequence[Term], p: int, dtype: torch.dtype, sums: Statistics | None
) -> Cost | None:
    """What an evaluation would take, of rows or of sums by level."""
    if sums is None:
        return solver.forecast(terms, p, dtype)
    return solver.forecast_of_sums(terms, p, sums)


def _approximate(
    terms: Sequence[Term], p: int, dtype: torch.dtype, sums: Statistics | None
) -> Iterator[tuple[Solver, Cost]]:
    """The approximate solvers that fit the terms, with their costs."""
    for make in SOLVERS.values():
        solver = make()
        cost = None if make.exact else _forecast(solver, terms, p, dtype, sums)
        if cost is not None:
            yield solver, cost


def check_solver(solver: object) -> Solver:
    """The solver that was given, itself or by its name.

    Raises:
        TypeError: if it is neither a name nor a solver.
        InputError: if there is none of that name.
    """
    if isinstance(solver, Solver):
        return solver
    check_instance("solver", solver, str, "a name, or a solver such as `Krylov()`")
    assert isinstance(solver, str)
    check_choice("solver", solver, (Auto.name, *SOLVERS))
    return _AUTO if solver == Auto.name else SOLVERS[solver]()


# The one without a state of its own: a sparse solver holds what it has analysed.
_AUTO = Auto()


def warning_of(why: str) -> str:
    """What a warning says of an approximate likelihood that was not asked for."""
    return f"the likelihood is approximate: {why}"


@dataclass(frozen=True)
class Plan:
    """A chosen solver; printing it says what was chosen, why, and the predicted cost.

    Attributes:
        choice: the solver with its options.
        reason: why this one.
        rows: number of rows n.
        fixed_effects: number of fixed effects p.
        cost: what an evaluation takes.
    """

    choice: Solver
    reason: str
    rows: int
    fixed_effects: int
    cost: Cost

    @classmethod
    def of(
        cls,
        terms: Sequence[Term],
        p: int,
        solver: str | Solver,
        dtype: torch.dtype,
        sums: Statistics | None = None,
    ) -> Plan:
        """The plan for some terms and p fixed effects.

        Args:
            terms: the lowered covariance.
            p: number of fixed effects.
            solver: that is asked for.
            dtype: of the numbers.
            sums: cross-products by level, in the place of the rows.

        Raises:
            InputError: if the solver that is asked for does not fit the terms, or does not take sums.
        """
        choice = check_solver(solver)
        rows = terms[0].design.shape[0] if sums is None else sums.rows
        if isinstance(choice, Auto):
            choice, found, reason = choice.choose(terms, p, dtype, sums)
            return cls(choice, reason, rows, p, found)
        choice.check(terms)
        cost = _forecast(choice, terms, p, dtype, sums)
        if cost is None:
            raise InputError(
                f"solver {choice.name!r} needs all rows at once: expected 'blocked' or 'sparse' for sums by level"
            )
        return cls(choice, "asked for", rows, p, cost)

    @property
    def solver(self) -> str:
        """Name of the solver."""
        return self.choice.name

    @property
    def exact(self) -> bool:
        """Whether the likelihood is computed, and not estimated by Monte Carlo."""
        return self.cost.exact

    def measured(self, problem: Problem) -> Plan:
        """The plan with what a prepared problem found out: which columns have nothing in common."""
        cost = problem.cost()
        return self if cost is None else replace(self, cost=cost)

    def __str__(self) -> str:
        cost = self.cost
        lines = [
            f"solver   {self.solver}: {self.reason}",
            f"data     {self.rows} rows, {self.fixed_effects} fixed effects",
            *(f"{i + 1:>2}.      {step}" for i, step in enumerate(cost.steps)),
            f"an evaluation takes about {cost.operations:.3g} operations, "
            f"{cost.bytes / 2**20:.3g} MiB",
        ]
        return "\n".join(lines)
