"""Several starts of a marginal likelihood that may have several maxima."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from functools import partial

import torch

from openreml_nn.covariance import Matrix
from openreml_nn.estimation.marginal_start import set_start
from openreml_nn.estimation.marginal_steps import MarginalFit
from openreml_nn.estimation.starts import FIRST_STEPS, REACHES, SAME_OPTIMUM, reaches
from openreml_nn.result import Start
from openreml_nn.support.errors import NumericalError

__all__ = ["climb_from_reaches", "may_end"]


def may_end(fit: MarginalFit) -> bool:
    """Whether some estimated correlation ends at a length, as a spherical one: the likelihood has a kink
    wherever a pair of places comes within it, and may have several maxima."""
    return any(
        matrix.ends() and matrix.start_reach(REACHES[0])
        for matrix in fit.loss.covariance.modules()
        if isinstance(matrix, Matrix)
    )


def climb_from_reaches(fit: MarginalFit, most: int) -> tuple[MarginalFit, bool, list[Start]]:
    """Climb from each reach of the correlations.

    Args:
        fit: the likelihood.
        most: steps of a run, at most; after the first ones the best run alone goes on.

    Returns:
        The run that ended as the best, whether it has arrived, and where the others ended.

    Raises:
        NumericalError: if no run has a start.
    """
    own = [p.detach().clone() for p in fit.own]
    runs: list[tuple[MarginalFit, bool]] = []
    failure: NumericalError | None = None
    for reach_of in reaches(fit.loss.covariance):
        run = copy(fit)
        run.history = []
        with torch.no_grad():
            for parameter, value in zip(fit.own, own, strict=True):
                parameter.copy_(value)
        try:
            set_start(run, partial(_start_at, reach_of))
            runs.append((run, run.climb(min(most, FIRST_STEPS))))
        except NumericalError as error:
            failure = failure or error
    if failure is not None and not runs:
        raise failure
    best, arrived = min(runs, key=lambda run: run[0].value)
    others = [
        Start(
            -run.value + run.jacobian,
            len(run.history),
            converged,
            abs(run.value - best.value) < SAME_OPTIMUM,
            run.history[-1].parameters if run.history else {},
        )
        for run, converged in runs
        if run is not best
    ]
    if not arrived and most > FIRST_STEPS:
        arrived = best.climb(most - len(best.history))
    return best, arrived, others


def _start_at(reach_of: Sequence[tuple[Matrix, float]]) -> None:
    """Let each of some correlations reach as far as is said beside it."""
    for matrix, reach in reach_of:
        matrix.start_reach(reach)
