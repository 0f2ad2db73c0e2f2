"""One step of average information: its direction, its length, and whether one is needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from openreml_nn.estimation.curvature import Curvature
from openreml_nn.estimation.past import Past
from openreml_nn.estimation.safeguard import Safeguard
from openreml_nn.likelihood.loss import Objective

__all__ = ["Step", "average_information_step"]


class Step(NamedTuple):
    r"""What a step of :class:`AIREML` saw and did.

    Attributes:
        log_likelihood: at the end of the step.
        score_norm: :math:`\sqrt{g^\top H^{-1} g}` at its start, the distance to
            the optimum in standard errors.
        length: accepted fraction of the full step; 0 where none was taken.
        condition: condition number of the scaled curvature H.
        converged: whether ``score_norm`` is below the tolerance, so that no
            step was needed.
    """

    log_likelihood: float
    score_norm: float
    length: float
    condition: float
    converged: bool


def average_information_step(
    objectives: Sequence[Objective],
    parameters: Sequence[Tensor] | None = None,
    tolerance: float = 1e-6,
    weights: Sequence[float] | None = None,
    past: Past | None = None,
    trusted: float = 0.0,
) -> Step:
    """The step of :class:`AIREML` on some likelihoods.

    A fit calls this and not the optimizer, because making any
    ``torch.optim.Optimizer`` imports torch's compiler, which takes longer than
    many a fit.

    Args:
        objectives: the likelihoods.
        parameters: those to move; all that require a gradient if None.
        tolerance: score norm that counts as converged.
        weights: what each log-likelihood is multiplied by; 1 by default.
        past: the steps before this one on the same likelihoods, from which the
            curvature is learned; None where the data may have moved.
        trusted: a full step from fewer standard errors, away from boundaries, is taken without an
            evaluation at its end: where the caller evaluates something better there.
    """
    with torch.no_grad():
        guard = Safeguard(objectives, parameters, weights)
        c = guard.curvature
        norm = c.norm
        if past is not None:
            past.see(c)
            c.solve(past.correct(c.hessian))
        reached, length = _moved(guard, norm, tolerance, trusted)
        return Step(reached, norm, length, c.condition, length == 0 and c.is_optimum)


def _moved(guard: Safeguard, norm: float, tolerance: float, trusted: float) -> tuple[float, float]:
    """The log-likelihood after the step, and its length; 0 where none is needed or none is found."""
    c = guard.curvature
    escaped = guard.escape(is_flat=norm < max(1e-3, c.resolution))
    if escaped is not None:
        return escaped, 1.0
    if norm < max(tolerance, c.resolution):
        settled = guard.settle()
        return (guard.start, 0.0) if settled is None else (settled, 1.0)
    if norm < trusted:
        reached = guard.trust(c.move)
        if reached is not None:
            return reached, 1.0
    for move, length in _moves(c):
        if length < 1 and length >= 0.5 and c.kinks:
            # What overshoots a kink falls behind it.
            reached = guard.attempt_kink()
            if reached is not None and guard.has_scores():
                return reached, 1.0
        reached = guard.attempt(move)
        if reached is not None and guard.has_scores():
            return reached, length
    c.at.write(c.u)
    return guard.start, 0.0


def _moves(c: Curvature) -> Iterator[tuple[Tensor, float]]:
    """Moves to be tried in turn, with their lengths beside the full step.

    Parts of the full step come first, because in a curved valley, as of loadings whose
    squares add up, damping takes away what moves along it.
    """
    for length in (1.0, 0.5, 0.25, 0.125, 0.0625, 0.03125):
        yield length * c.move, length
    damping = 0.1
    for _ in range(40):
        yield c.damped(damping), 1 / (1 + damping)
        damping *= 4
