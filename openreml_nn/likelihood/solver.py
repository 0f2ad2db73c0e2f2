"""What a solver is: an object with its options, which forecasts its cost and prepares a problem."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import ClassVar

import torch

from openreml_nn.likelihood.fixed import FixedPart
from openreml_nn.likelihood.problem import Cost, Problem
from openreml_nn.likelihood.system.crossproducts import Statistics
from openreml_nn.support.errors import InputError
from openreml_nn.terms.term import Term

__all__ = ["Solver", "check_held"]


@dataclass(frozen=True)
class Solver:
    r"""A way to the likelihood of :math:`y \sim N(X\beta, \sum_t Z_t G_t Z_t^\top)`.

    A solver is a frozen dataclass whose fields are its options, all with a default. Its class is
    one file of ``likelihood/solvers/`` and an entry of ``SOLVERS`` there, by which ``solver="name"``
    and ``solver="auto"`` find it.

    Attributes:
        name: what it is called.
        exact: whether its likelihood is computed, and not estimated by Monte Carlo; the plan asks
            the others for a forecast only where no exact one fits.
        least: operations that an evaluation takes whatever the terms; the plan asks for no forecast
            where another solver takes fewer.
    """

    name: ClassVar[str]
    exact: ClassVar[bool] = True
    least: ClassVar[float] = 0.0

    def with_progress(self, progress: Callable[[str, float], None]) -> Solver:
        """The solver that calls ``progress`` with what it is at and the share of it that is done, where
        that takes seconds; by default nothing does."""
        return self

    def forecast(self, terms: Sequence[Term], p: int, dtype: torch.dtype) -> Cost | None:
        """What an evaluation would take; None where the solver does not fit the terms.

        Args:
            terms: the lowered covariance.
            p: number of fixed effects.
            dtype: of the numbers.
        """
        raise NotImplementedError

    def problem(self, fixed: FixedPart, terms: Sequence[Term], method: str) -> Problem:
        """The data prepared for this solver.

        Args:
            fixed: the prepared response and model matrix.
            terms: the lowered covariance.
            method: ``"reml"`` or ``"ml"``.

        Raises:
            InputError: if the solver does not fit the terms; the message is :meth:`obstacle`.
        """
        raise NotImplementedError

    def forecast_of_sums(self, terms: Sequence[Term], p: int, sums: Statistics) -> Cost | None:
        """What an evaluation would take of sums by level in the place of rows; None where the solver
        does not fit the terms, or needs the rows.

        Args:
            terms: the lowered covariance, of any rows.
            p: number of fixed effects.
            sums: cross-products of the random terms, in their order.
        """
        return None

    def problem_of_sums(
        self, fixed: FixedPart, terms: Sequence[Term], method: str, sums: Statistics
    ) -> Problem:
        """The sums prepared for this solver.

        Args:
            fixed: of no rows.
            terms, method: as for :meth:`problem`, of any rows.
            sums: cross-products of the random terms, in their order, and of f.

        Raises:
            InputError: if the solver needs the rows.
        """
        raise InputError(
            f"solver {self.name!r} needs all rows at once, and there are sums by level"
        )

    def obstacle(self, terms: Sequence[Term]) -> str | None:
        """Why the solver does not fit the terms, in a sentence; None where it does."""
        return None

    def check(self, terms: Sequence[Term]) -> None:
        """Refuse terms that the solver does not fit.

        Raises:
            InputError: if it does not.
        """
        obstacle = self.obstacle(terms)
        if obstacle is not None:
            raise InputError(obstacle)


def check_held(
    solver: Solver,
    held: float,
    columns: int,
    limit: tuple[float, str] = (inf, ""),
) -> None:
    """Refuse a factor that would hold more bytes than it may, or than the machine has.

    Args:
        solver: whose factor it is.
        held: bytes.
        columns: of the system.
        limit: bytes that it may hold, and what allows more.

    Raises:
        InputError: if it would.
    """
    machine, (memory, more) = _memory_of_machine(), limit
    if held <= min(memory, machine):
        return
    may, allow = f"may hold {memory / 2**30:.3g}", more
    if machine < memory:
        may, allow = f"the machine has {machine / 2**30:.3g}", "a larger machine does it"
    raise InputError(
        f"the {solver.name} solver would hold {held / 2**30:.3g} GiB for a factor of {columns} "
        f"columns, and {may}: solver='krylov' is approximate and holds little, {allow}"
    )


def _memory_of_machine() -> float:
    """Bytes of memory; without end where the system does not say."""
    try:
        return float(os.sysconf("SC_PHYS_PAGES")) * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return inf
