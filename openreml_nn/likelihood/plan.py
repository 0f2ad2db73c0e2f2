"""Which solver, why, and what it will cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from openreml_nn.likelihood.problem import Problem
from openreml_nn.likelihood.solvers.blocked import BlockedProblem
from openreml_nn.likelihood.solvers.dense import DenseProblem
from openreml_nn.likelihood.solvers.grid import GridProblem, GridTerms
from openreml_nn.likelihood.solvers.krylov import KrylovProblem
from openreml_nn.likelihood.solvers.spectral import SpectralProblem, spectral_terms
from openreml_nn.likelihood.system.grouped import (
    GroupedProblem,
    Layout,
    arranged,
    grid_of,
    separated,
)
from openreml_nn.likelihood.system.partition import Partition
from openreml_nn.support.checks import check_choice
from openreml_nn.terms.covariance import KroneckerCovariance
from openreml_nn.terms.design import Design, IndexedDesign
from openreml_nn.terms.term import Term

__all__ = ["Plan", "check_solver"]

SOLVERS: dict[str, type[Problem]] = {
    "dense": DenseProblem,
    "blocked": BlockedProblem,
    "grid": GridProblem,
    "krylov": KrylovProblem,
    "spectral": SpectralProblem,
}


#: An exact solver that would hold more than this is left for the approximate one, with a warning.
MOST_BYTES = 4 * 2**30


def check_solver(solver: str) -> None:
    """Raise unless ``solver`` is one that exists."""
    check_choice("solver", solver, ("auto", *SOLVERS))


@dataclass(frozen=True)
class Plan:
    """A chosen solver; printing it says what was chosen, why, and the predicted cost.

    Attributes:
        solver: ``"dense"``, ``"blocked"``, ``"krylov"``, ``"spectral"`` or ``"grid"``.
        reason: why this one.
        rows: number of rows n.
        fixed_effects: number of fixed effects p.
        order: what is eliminated, in order, with sizes.
        work: predicted floating-point operations of one evaluation.
        memory: predicted bytes held during one evaluation.
    """

    solver: str
    reason: str
    rows: int
    fixed_effects: int
    order: tuple[str, ...]
    work: float
    memory: float

    @classmethod
    def of(cls, terms: Sequence[Term], fixed_effects: int, solver: str, dtype: torch.dtype) -> Plan:
        """Choose by predicted work, unless ``solver`` names one.

        Raises:
            ValueError: if the blocked solver is asked for and cannot be had.
        """
        check_solver(solver)
        rows = terms[0].design.shape[0]
        dense = _dense(rows, fixed_effects, dtype.itemsize)
        if solver == "dense":
            return cls("dense", "asked for", rows, fixed_effects, *dense)
        spectral = _spectral(rows, fixed_effects, dtype)
        if solver == "spectral":
            return cls("spectral", "asked for", rows, fixed_effects, *spectral)
        if solver == "auto" and spectral_terms(terms) and spectral[2] < MOST_BYTES:
            reason = "one known kernel: decomposed once"
            return cls("spectral", reason, rows, fixed_effects, *spectral)
        if solver == "krylov":
            parts = separated(terms)
            found = _blocked(parts, Layout.of(parts), fixed_effects, dtype.itemsize)
            return cls("krylov", "asked for", rows, fixed_effects, *found)
        grid = _grid(terms, fixed_effects, dtype.itemsize)
        if solver == "grid" or (solver == "auto" and grid is not None and grid[1] < dense[1]):
            reason = "a complete grid: decomposed by its sides"
            found = dense if grid is None else grid
            return cls(
                "grid", "asked for" if solver == "grid" else reason, rows, fixed_effects, *found
            )
        try:
            parts = separated(terms)
            blocked = _blocked(parts, Layout.of(parts), fixed_effects, dtype.itemsize)
        except ValueError as error:
            if solver == "blocked":
                raise
            return cls("dense", str(error), rows, fixed_effects, *dense)
        if solver == "blocked":
            return cls("blocked", "asked for", rows, fixed_effects, *blocked)
        if min(blocked[2], dense[2]) > MOST_BYTES and KrylovProblem.fits(parts):
            needed = min(_forecast(parts, fixed_effects, dtype.itemsize), dense[2])
            if needed > MOST_BYTES:
                reason = f"exact solvers would need {needed / 2**30:.3g} GiB"
                return cls("krylov", reason, rows, fixed_effects, *blocked)
        if blocked[1] <= dense[1]:
            reason = f"{dense[1] / blocked[1]:.3g} times less work than the dense solver"
            return cls("blocked", reason, rows, fixed_effects, *blocked)
        reason = f"{blocked[1] / dense[1]:.3g} times less work than the blocked solver"
        return cls("dense", reason, rows, fixed_effects, *dense)

    @property
    def problem(self) -> type[Problem]:
        """The class that carries the plan out."""
        return SOLVERS[self.solver]

    @property
    def exact(self) -> bool:
        """Whether its likelihood is computed, and not estimated by Monte Carlo."""
        return self.problem.exact

    def measured(self, problem: Problem, terms: Sequence[Term]) -> Plan:
        """The plan with what a prepared problem found out: which columns have nothing in common."""
        if not isinstance(problem, GroupedProblem) or not problem.q:
            return self
        partition = problem.partition if isinstance(problem, BlockedProblem) else None
        order = _steps(separated(terms), problem.layout, self.fixed_effects, partition)
        work, memory = problem.cost()
        return replace(self, order=order, work=work, memory=memory)

    def __str__(self) -> str:
        lines = [
            f"solver   {self.solver}: {self.reason}",
            f"data     {self.rows} rows, {self.fixed_effects} fixed effects",
            *(f"{i + 1:>2}.      {step}" for i, step in enumerate(self.order)),
            f"an evaluation takes about {self.work:.3g} operations, {self.memory / 2**20:.3g} MiB",
        ]
        return "\n".join(lines)


def _dense(rows: int, p: int, itemsize: int) -> tuple[tuple[str, ...], float, float]:
    work = rows**3 / 3 + 2 * rows**2 * (p + 1)
    return (f"Cholesky factor of V, {rows} x {rows}",), work, 3 * itemsize * rows**2


def _spectral(rows: int, p: int, dtype: torch.dtype) -> tuple[tuple[str, ...], float, float]:
    order = (f"eigendecomposition of the kernel, {rows} x {rows}, once",)
    return order, 10.0 * rows * (p + 1) ** 2, dtype.itemsize * 2.0 * rows**2


def _grid(
    terms: Sequence[Term], p: int, itemsize: int
) -> tuple[tuple[str, ...], float, float] | None:
    places = GridTerms.of(terms)
    if places is None:
        return None
    g = terms[places.grid].covariance
    assert isinstance(g, KroneckerCovariance)
    (r, c), n = g.sizes, terms[0].design.shape[0]
    q = sum(terms[i].design.shape[1] for i in places.rest)
    order = [f"eigendecompositions of {r} x {r} and {c} x {c}"]
    if places.rest:
        names = ", ".join(repr(terms[i].name) for i in places.rest)
        order.append(f"{names}: dense, {q} x {q}")
    order.append(f"fixed effects: dense, {p} x {p}")
    columns = q + p + 1
    work = 10.0 * (r**3 + c**3) + 8.0 * n * (r + c) * columns + 4.0 * n * columns**2
    return tuple(order), work, 4.0 * itemsize * n * columns


def _forecast(terms: Sequence[Term], p: int, itemsize: int) -> float:
    """Bytes that the blocked solver would hold, from which levels meet."""
    layout = Layout.of(terms)
    designs = [terms[i].design for i in layout.random]
    _, arrangement = arranged(designs, layout, [grid_of(terms[i]) for i in layout.rest])
    return itemsize * arrangement.cost(p + 1)[1]


def _blocked(
    terms: Sequence[Term], layout: Layout, p: int, itemsize: int
) -> tuple[tuple[str, ...], float, float]:
    levels, k = _eliminated(terms, layout)
    q = sum(terms[i].design.shape[1] for i in layout.rest)
    r = q + p + 1
    work = 2.0 * levels * k * (k * k + k * r) + levels * k * r**2 + q**3 / 3 + r**3 / 3
    memory = itemsize * (2.0 * levels * k * r + 2 * levels * k * k + 3 * r * r)
    if layout.residual.moves:
        rows, m = terms[0].design.shape[0], layout.residual.size
        designs = [terms[i].design for i in layout.rest]
        dense = sum(d.shape[1] for d in designs if _densified(d, layout))
        work += 4.0 * rows * (m + k) * (k + dense + p + 1)
        memory += 4.0 * itemsize * rows * (k + dense + p + 1)
    return (
        _steps(terms, layout, p, Partition.of_one(q, torch.device("cpu"))),
        max(work, 1.0),
        memory,
    )


def _densified(design: Design, layout: Layout) -> bool:
    """Whether R mixes levels of an indexed design."""
    return isinstance(design, IndexedDesign) and not layout.residual.is_within(design.codes)


def _eliminated(terms: Sequence[Term], layout: Layout) -> tuple[int, int]:
    """Levels of the eliminated factor and effects of each, (0, 1) if there is none."""
    if not layout.eliminated:
        return 0, 1
    levels = getattr(terms[layout.eliminated[0]].design, "levels", 1)
    return levels, sum(terms[i].design.shape[1] for i in layout.eliminated) // levels


def _steps(
    terms: Sequence[Term], layout: Layout, p: int, groups: Partition | None = None
) -> tuple[str, ...]:
    """What is eliminated, in order; ``groups`` are those of the other terms' columns, if known."""
    steps = []
    if layout.residual.moves:
        block = f"{layout.residual.size} x {layout.residual.size}"
        steps.append(f"residuals: blocks of at most {block}, anew at each evaluation")
    if layout.eliminated:
        levels, k = _eliminated(terms, layout)
        names = " and ".join(repr(terms[i].name) for i in layout.eliminated)
        steps.append(f"{names}: {levels} blocks of {k} x {k}")
    if layout.rest:
        q = sum(terms[i].design.shape[1] for i in layout.rest)
        names = ", ".join(repr(terms[i].name) for i in layout.rest)
        if groups is None:
            steps.append(f"{names}: conjugate gradients, {q} columns")
        elif groups.whole:
            steps.append(f"{names}: dense, {q} x {q}")
        else:
            size = f"{groups.size} x {groups.size}"
            steps.append(f"{names}: {groups.count} groups of at most {size}")
    return (*steps, f"fixed effects: dense, {p} x {p}")
