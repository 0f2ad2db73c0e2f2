"""What a solver is: an object with its options, which forecasts its cost and prepares a problem."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from openreml_nn.likelihood.fixed import FixedPart
from openreml_nn.likelihood.problem import Cost, Problem
from openreml_nn.support.errors import InputError
from openreml_nn.terms.term import Term

__all__ = ["Solver"]


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
