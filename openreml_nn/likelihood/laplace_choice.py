"""Which system the mode of the random effects is found in."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from openreml_nn.likelihood.laplace_sparse import NO_APPROXIMATION, SparseSpace
from openreml_nn.likelihood.laplace_system import BlockedSpace
from openreml_nn.likelihood.plan import Auto, Plan, check_solver
from openreml_nn.likelihood.problem import Cost
from openreml_nn.likelihood.solver import Solver, check_held
from openreml_nn.likelihood.solvers import Blocked, Dense, Sparse
from openreml_nn.likelihood.system.roles import grid_of
from openreml_nn.support.errors import InputError
from openreml_nn.terms.term import Term

__all__ = ["laplace_solver", "planned", "space_of"]

#: With fewer columns beside the largest factor's than these, blocks of them are fast.
_FEW = 200
_REASON = "the weights of the rows move"


def laplace_solver(solver: str | Solver) -> Solver:
    """The solver of a name, or the one that was given, if it takes weights that move.

    Raises:
        TypeError, InputError: if it is none, or takes none.
    """
    found = check_solver(solver)
    if not isinstance(found, Auto | Blocked | Dense | Sparse):
        raise InputError(
            f"`solver` is {found.name!r}, which is for Gaussian responses: expected 'auto', "
            "'blocked', 'dense' or 'sparse'"
        )
    return found


def space_of(terms: Sequence[Term], solver: Solver, by_blocks: bool) -> BlockedSpace | SparseSpace:
    """Where the effects stand: by blocks, where that is asked for, or as the solver has it.

    Raises:
        InputError: if the solver does not fit the terms, or would hold more than it may.
    """
    fits = SparseSpace.fits(terms)
    if isinstance(solver, Sparse):
        if not fits:
            raise InputError(
                "`solver` is 'sparse', but a random term has a dense design, or a covariance in which "
                "all levels meet: expected 'auto', 'blocked' or 'dense'"
            )
        if not by_blocks:
            return SparseSpace(terms, solver)
    like = terms[0].covariance.matrix
    if isinstance(solver, Auto) and fits and not by_blocks:
        exact = like.dtype == torch.float64 and like.device.type == "cpu"
        if exact and _columns_of_others(terms) >= _FEW:
            return SparseSpace(terms, Sparse())
    choice = solver if isinstance(solver, Blocked | Dense) else Blocked()
    space = BlockedSpace(terms, choice.pair_cost if isinstance(choice, Blocked) else None)
    held = like.element_size() * space.placement.cost(0)[1]
    check_held(choice, held, space.size, NO_APPROXIMATION)
    return space


def _columns_of_others(terms: Sequence[Term]) -> int:
    """Columns beside those of the largest factor with independent levels."""
    sizes = [term.design.shape[1] for term in terms]
    independent = [q for q, term in zip(sizes, terms, strict=True) if grid_of(term) is not None]
    return sum(sizes) - max(independent, default=0)


def planned(space: BlockedSpace | SparseSpace, solver: Solver, rows: int, p: int) -> Plan:
    """The plan of an evaluation for some rows and p coefficients of X."""
    if isinstance(space, SparseSpace):
        choice: Solver = solver if isinstance(solver, Sparse) else Sparse()
        return Plan(choice, _REASON, rows, p, space.cost(p))
    work, entries = space.placement.cost(p)
    work += 4.0 * rows * (space.k + len(space.designs)) ** 2
    steps = [f"{space.levels} blocks of {space.k} x {space.k}"] if space.levels else []
    if space.q:
        by = space.partition
        size = f"{by.size} x {by.size}"
        steps.append(f"{space.q} columns: {max(by.count, 1)} groups of at most {size}")
    cost = Cost(work, 8.0 * entries, True, "in the space of the random effects", tuple(steps))
    return Plan(
        solver if isinstance(solver, Blocked | Dense) else Blocked(), _REASON, rows, p, cost
    )
