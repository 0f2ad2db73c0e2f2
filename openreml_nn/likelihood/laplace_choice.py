"""Which system the mode of the random effects is found in."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from openreml_nn.likelihood.laplace_krylov import KrylovSpace
from openreml_nn.likelihood.laplace_space import Space
from openreml_nn.likelihood.laplace_sparse import SparseSpace
from openreml_nn.likelihood.laplace_system import BlockedSpace
from openreml_nn.likelihood.plan import Auto, Plan, check_solver, warning_of
from openreml_nn.likelihood.solver import Solver
from openreml_nn.likelihood.solvers import Blocked, Dense, Krylov, Sparse
from openreml_nn.likelihood.system.roles import grid_of
from openreml_nn.support.errors import InputError
from openreml_nn.support.warning import warn
from openreml_nn.terms.term import Term

__all__ = ["laplace_solver", "planned", "space_of"]

#: With fewer columns beside the largest factor's than these, blocks of them are fast.
_FEW = 200


def laplace_solver(solver: str | Solver) -> Solver:
    """The solver of a name, or the one that was given, if it takes weights that move.

    Raises:
        TypeError, InputError: if it is none, or takes none.
    """
    found = check_solver(solver)
    if not isinstance(found, Auto | Blocked | Dense | Sparse | Krylov):
        raise InputError(
            f"`solver` is {found.name!r}, which is for Gaussian responses: expected 'auto', "
            "'blocked', 'dense', 'sparse' or 'krylov'"
        )
    return found


def space_of(terms: Sequence[Term], solver: Solver, by_blocks: bool) -> Space:
    """Where the effects stand: by blocks, where that is asked for, or as the solver has it.

    Raises:
        InputError: if the solver does not fit the terms, or would hold more than it may.
    """
    if isinstance(solver, Krylov):
        if by_blocks:
            raise InputError(
                "`solver` is 'krylov', which has neither quadrature nor gradients by a design or, with "
                "REML, by X: expected 'auto', 'blocked' or 'dense'"
            )
        return KrylovSpace(terms, solver)
    fits = SparseSpace.fits(terms)
    if isinstance(solver, Sparse) and not fits:
        raise InputError(
            "`solver` is 'sparse', but a random term has a dense design, or a covariance in which "
            "all levels meet: expected 'auto', 'blocked' or 'dense'"
        )
    found = _exact_space(terms, solver, fits, by_blocks)
    if isinstance(solver, Auto) and not by_blocks and KrylovSpace.obstacle(terms) is None:
        cost, rough = found.cost(0), KrylovSpace.forecast(terms)
        best = Sparse.name if isinstance(found, SparseSpace) else Blocked.name
        why = solver.excuse(cost.bytes, cost.operations, rough, best)
        if why is not None:
            warn(warning_of(why))
            return KrylovSpace(terms, Krylov(), why)
    found.check_memory()
    return found


def _exact_space(
    terms: Sequence[Term], solver: Solver, fits: bool, by_blocks: bool
) -> SparseSpace | BlockedSpace:
    """That of an exact solver, which holds no more yet than where it stands."""
    if isinstance(solver, Sparse) and not by_blocks:
        return SparseSpace(terms, solver)
    like = terms[0].covariance.matrix
    if isinstance(solver, Auto) and fits and not by_blocks:
        exact = like.dtype == torch.float64 and like.device.type == "cpu"
        if exact and _columns_of_others(terms) >= _FEW:
            return SparseSpace(terms, Sparse())
    return BlockedSpace(terms, solver if isinstance(solver, Blocked | Dense) else Blocked())


def _columns_of_others(terms: Sequence[Term]) -> int:
    """Columns beside those of the largest factor with independent levels."""
    sizes = [term.design.shape[1] for term in terms]
    independent = [q for q, term in zip(sizes, terms, strict=True) if grid_of(term) is not None]
    return sum(sizes) - max(independent, default=0)


def planned(space: Space, rows: int, p: int) -> Plan:
    """The plan of an evaluation for some rows and p coefficients of X."""
    return Plan(space.solver, space.reason, rows, p, space.cost(p))
