"""Maximum likelihood for many responses of one design at once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import grad, grad_and_value, jacrev, vmap

from openreml_nn.estimation.coordinates import Coordinates
from openreml_nn.estimation.curvature import spectrum_in_scales
from openreml_nn.inference.refit import Refit, matrix_entries
from openreml_nn.likelihood.loss import Objective
from openreml_nn.likelihood.problem import Problem
from openreml_nn.likelihood.solvers.dense import DenseProblem
from openreml_nn.likelihood.system.grouped import GroupedProblem
from openreml_nn.terms.precision import PrecisionCovariance

__all__ = ["Maxima", "maximise"]

#: Numbers that a batch may hold for its designs and systems; what it computes is a few dozen times that.
_MOST = 3_000_000
#: A standard deviation this small beside its estimate may be zero.
_GONE = 1e-2


class Maxima(NamedTuple):
    """What was found for each response.

    Attributes:
        found: (B,) whether it was; where not, the other numbers mean nothing.
        log_likelihood: (B,).
        numbers: (B, m) standard deviations and correlations as in :func:`matrix_entries`, then the
            fixed effects.
    """

    found: Tensor
    log_likelihood: Tensor
    numbers: Tensor


def maximise(refit: Refit, y: Tensor) -> Maxima:
    r"""Maximise the likelihood of each response by Newton's method from the estimates.

    The steps of all responses are taken together, with derivatives by ``torch.func``. Left to a fit
    of its own is a response whose likelihood is too large for that, does not converge, or
    ends where a standard deviation may be zero.

    Args:
        refit: the model at its estimates.
        y: (n, B) responses.
    """
    refit.reset()
    objective = refit.objective()
    entries = list(matrix_entries(refit.result).values())
    width = len(entries) + len(refit.result.fixed.names)
    # Precisions are computed by numpy, one at a time.
    alone = objective.moves or any(
        isinstance(term.covariance, PrecisionCovariance) for term in objective.terms()
    )
    count, size = y.shape[1], 0 if alone else _size(objective.problem)
    chunk = _MOST // size if size else 0
    if chunk < 4:
        nothing = y.new_full((count,), torch.nan)
        return Maxima(nothing > 0, nothing, y.new_full((count, width), torch.nan))
    newton = _Newton(objective, entries)
    with warnings.catch_warnings():
        # Of operations that torch takes one by one.
        warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
        parts = [newton.run(part) for part in y.T.split(chunk)]
    return Maxima(*(torch.cat(list(column)) for column in zip(*parts, strict=True)))


def _size(problem: Problem) -> int:
    """Numbers that one likelihood holds; 0 if it cannot be batched."""
    if isinstance(problem, DenseProblem):
        return problem.n * (2 * problem.n + problem.p + 2)
    if not isinstance(problem, GroupedProblem) or not problem.has_second_derivatives:
        return 0
    return problem.n * (problem.p + 2) + problem.levels * problem.k**2 + problem.q**2


class _Newton:
    def __init__(self, objective: Objective, entries: Sequence[tuple[int, int, int]]) -> None:
        problem, fixed = objective.problem, objective.problem.fixed
        self.fixed = fixed
        at = Coordinates([objective])
        self.start = at.read(fixed.y)
        self.vanishing = at.vanishing(fixed.y)

        def log_likelihood(u: Tensor, y: Tensor) -> Tensor:
            moved = problem.with_fixed(replace(fixed, y=y))
            return moved.recorded(objective.matrices(at.natural(0, u)))

        def gradient(u: Tensor, y: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            slope, value = grad_and_value(log_likelihood)(u, y)
            return slope, (slope, value)

        def numbers(u: Tensor, y: Tensor) -> Tensor:
            terms = objective.terms(at.natural(0, u))
            matrices = [term.shown() for term in terms]
            found = []
            for index, i, j in entries:
                m = matrices[index]
                scale = (m[i, i] * m[j, j]).sqrt()
                found.append(scale.sqrt() if i == j else m[i, j] / scale)
            # P y is minus the slope by y, and V P y what generalised least squares leaves of y.
            p_y = -grad(log_likelihood, argnums=1)(u, y)[:, None]
            for term in terms:
                z = term.design
                y = y - z.matmul(term.covariance.multiply(z.t_matmul(p_y)))[:, 0]
            return torch.cat([torch.stack(found), fixed.T @ (fixed.Q.mT @ y)])

        self.value: Callable[..., Tensor] = vmap(log_likelihood)
        # Forward mode gives wrong numbers here: torch 2.13 batches the tangents of solve() wrongly.
        self.curvature: Callable[..., Any] = vmap(jacrev(gradient, has_aux=True))
        self.numbers: Callable[..., Tensor] = vmap(numbers)

    def run(self, y: Tensor) -> Maxima:
        """The maxima for responses (B, n)."""
        offset = y @ self.fixed.Q
        y = y - offset @ self.fixed.Q.mT
        u = self.start.repeat(len(y), 1)
        value = y.new_full((len(y),), torch.nan)
        found = torch.zeros(len(y), dtype=torch.bool, device=y.device)
        active = torch.arange(len(y), device=y.device)
        for _ in range(40):
            hessian, (slope, value[active]) = self.curvature(u[active], y[active])
            good = hessian.isfinite().all(2).all(1) & slope.isfinite().all(1)
            active, hessian, slope = active[good], hessian[good], slope[good]
            move, peak = _step(hessian, slope)
            near = (slope * move).sum(1).clamp(min=0).sqrt() < 1e-7
            found[active[near & peak]] = True
            active, move = active[~near], move[~near]
            active = active[self._search(u, y, value, active, move)]
            if not len(active):
                break
        tiny = u.abs() < _GONE * self.start.abs()
        found &= ~(tiny & self.vanishing).any(1) & (self.start != 0).all()
        numbers = self.numbers(u, y)
        first = numbers.shape[1] - len(self.fixed.offset)
        numbers[:, first:] += offset @ self.fixed.T.mT
        return Maxima(found, value, numbers)

    def _search(self, u: Tensor, y: Tensor, value: Tensor, at: Tensor, move: Tensor) -> Tensor:
        """Take the longest step that does not lower the likelihood; returns which took one."""
        took = torch.zeros(len(at), dtype=torch.bool, device=at.device)
        length = 1.0
        for _ in range(20):
            left = (~took).nonzero()[:, 0]
            if not len(left):
                break
            which = at[left]
            trial = u[which] + length * move[left]
            reached = self.value(trial, y[which])
            better = reached >= value[which] - 1e-12 * value[which].abs()
            u[which[better]] = trial[better]
            took[left[better]] = True
            length /= 2
        return took


def _step(hessian: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """Newton steps with the curvature made positive, and whether it was."""
    size = hessian.diagonal(dim1=1, dim2=2).abs()
    unit = torch.where(size > 0, size, 1).sqrt()
    values, vectors = spectrum_in_scales(-hessian, unit)
    steep = values.abs().clamp(min=1e-10)
    inner = vectors.mT @ (slope / unit)[:, :, None] / steep[:, :, None]
    return (vectors @ inner)[:, :, 0] / unit, (values > 1e-8).all(1)
