"""Score and curvature of a likelihood in the coordinates of estimation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from openreml_nn.estimation.coordinates import Coordinates
from openreml_nn.estimation.derivatives import (
    expand,
    hessian_of_value,
    second_derivative,
)
from openreml_nn.likelihood.loss import Objective
from openreml_nn.likelihood.problem import Evaluation
from openreml_nn.support.spectrum import decomposed

__all__ = ["CONVERGED", "CURVATURE", "FLAT", "Curvature", "lost_in_noise", "spectrum_in_scales"]

#: Parameters count as converged this many standard errors from the optimum.
CONVERGED = 1e-3
#: A coordinate this near to a kink is at it, and so far beside it is the slope of a side.
_AT_KINK, _BESIDE = 1e-12, 1e-8
#: A direction counts as flat when its curvature is this small beside the largest.
FLAT = 1e-6
#: What H is called in messages.
CURVATURE = "the curvature of the log-likelihood"


class Curvature:
    r"""Score and curvature of the log-likelihood at the present parameters.

    Where the designs are known, the curvature is the average of the observed and the expected
    information,

    .. math::
        H_{ij} = (J^\top \mathcal{I}_{AI} J)_{ij}
        - w_{ij}\textstyle\sum_t \langle S_t, \partial^2 G_t / \partial u_i \partial u_j\rangle ,

    in the correlations, where :math:`w_{ij} = 1/2`, and in the covariances :math:`G`, where
    :math:`w_{ij} = 1`: V is linear in these, and standard deviations and entries of a factor are
    coordinates of them in which G is quadratic.

    Where a design or a network moves with the parameters, it is the observed information,
    :math:`-\partial^2\ell / \partial u^2`, by automatic differentiation.

    Args:
        objectives: likelihoods, whose logarithms add up.
        owned: the parameters to move; all that require a gradient if None.
        weights: what each log-likelihood is multiplied by; 1 by default.
        evaluations: the likelihoods at the present parameters, where they are at hand.

    Attributes:
        at: the coordinates, ``u`` their present values.
        score: :math:`g = \partial\ell/\partial u`.
        information: average information of u; the observed where the designs move.
        hessian: the curvature H.
        move: the full step :math:`|H|^{-1} g`.
        norm: :math:`\sqrt{g^\top |H|^{-1} g}`.
        condition: condition number of H, scaled to have a diagonal near 1.
        stuck: coordinates at a boundary from which the likelihood rises.
        boundary: names of parameters at a boundary.
        kinks: by coordinate where the likelihood may have a kink, in order.
        held: coordinates at a kink on both sides of which the likelihood falls; the score by these is
            zero, and they do not move.
        kinked: their names.
        indistinct: names of parameters about which the data say nothing, or nothing
            but a combination of them.
    """

    def __init__(
        self,
        objectives: Sequence[Objective],
        owned: Sequence[Tensor] | None = None,
        weights: Sequence[float] | None = None,
        evaluations: Sequence[Evaluation] | None = None,
    ) -> None:
        self.objectives = objectives
        self.weights = [1.0] * len(objectives) if weights is None else list(weights)
        self.indistinct: tuple[str, ...] = ()
        self.boundary: tuple[str, ...] = ()
        self.at = Coordinates(objectives, owned)
        like = objectives[0].problem.fixed.y
        self.u = u = self.at.read(like)
        self.rows = sum(o.problem.n for o in objectives)
        #: The score norm that rounding of the likelihood lets one see.
        self.resolution = (torch.finfo(like.dtype).eps * self.rows) ** 0.5
        self.score = torch.zeros_like(u)
        self.information = torch.zeros(len(u), len(u), dtype=u.dtype, device=u.device)
        self.hessian = torch.zeros_like(self.information)
        self._noise = 0.0
        self.stuck: list[int] = []
        self.held: list[int] = []
        self.kinked: tuple[str, ...] = ()
        self.kinks = {} if any(o.moves for o in objectives) else self.at.kinks(u)
        if not len(u):
            self.move, self.norm, self.condition = u, 0.0, 1.0
            return
        for i, (objective, weight) in enumerate(zip(objectives, self.weights, strict=True)):
            if objective.moves:
                self._add_moving(i, objective, weight)
            else:
                known = objective.evaluate() if evaluations is None else evaluations[i]
                self._noise = max(self._noise, lost_in_noise(known))
                self._add(i, known, weight)
        self.held = [j for j in self.kinks if self._is_top(j)]
        self.kinked = tuple(self.at.names[j] for j in self.held)
        self.score[self.held] = 0
        self.solve(self.hessian)
        at_boundary = self.at.on_boundary(u)
        self.boundary = tuple(
            n for n, ends in zip(self.at.names, at_boundary.tolist(), strict=True) if ends
        )
        self.indistinct = self._indistinct(at_boundary)
        slope = self.hessian.diagonal()
        self.stuck = (at_boundary & (slope < 0) & ~self.silent).nonzero()[:, 0].tolist()

    @property
    def is_optimum(self) -> bool:
        """Whether the fit may end here: the one criterion of steps and of results."""
        return self.norm < max(CONVERGED, self.resolution, self._noise) and not self.stuck

    def _add(self, i: int, evaluation: Evaluation, weight: float) -> None:
        def matrices(x: Tensor) -> tuple[Tensor, ...]:
            return self.matrices(i, x)

        score, curve, slopes = expand(matrices, evaluation.scores(), self.u)
        quadratic = torch.tensor(self.at.quadratic, device=self.u.device)
        information = evaluation.information(slopes)
        self.score += weight * score
        self.information += weight * information
        share = torch.where(quadratic[:, None] & quadratic, 1.0, 0.5).to(curve)
        self.hessian += weight * (information - share * (curve + curve.mT) / 2)

    def _is_top(self, j: int) -> bool:
        """Whether a coordinate is at a kink from which the likelihood falls to both sides."""
        if not bool(((self.kinks[j] - self.u[j]).abs() < _AT_KINK).any()):
            return False
        beside = torch.zeros_like(self.u)
        beside[j] = _BESIDE
        return _score_at(self, self.u - beside, j) > 0 > _score_at(self, self.u + beside, j)

    def _add_moving(self, i: int, objective: Objective, weight: float) -> None:
        """By automatic differentiation of the likelihood itself."""
        k = len(self.at.entries)

        def value(x: Tensor) -> Tensor:
            return objective.recorded(self.at.natural(i, x))

        loose = [part.tensor for part in self.at.loose]
        score, curve = hessian_of_value(value, self.u[:k], loose)
        observed = -(curve + curve.mT).to(self.u) / 2
        self.score += weight * score.to(self.u)
        self.information += weight * observed
        self.hessian += weight * observed

    @property
    def silent(self) -> Tensor:
        """Coordinates about which the data say nothing, whatever their value."""
        y = self.objectives[0].problem.fixed.y
        vanishing = self.at.vanishing(self.u)
        # A standard deviation is as large as that of the response, or an angle 1.
        unit = torch.where(vanishing, y.square().mean(), 1)
        return self.hessian.diagonal().abs() * unit < 1e-9

    def solve(self, hessian: Tensor) -> None:
        """Find the step, its norm and the condition for a curvature."""
        if self.held:
            own = hessian.diagonal()[self.held].abs()
            hessian = hessian.clone()
            hessian[self.held], hessian[:, self.held] = 0, 0
            hessian[self.held, self.held] = torch.where(own > 0, own, 1)
        size = self.information.diagonal().abs() + (hessian - self.information).diagonal().abs()
        self._scale = scale = torch.where(size > 0, size, 1).sqrt()
        self._values, self._vectors = spectrum_in_scales(hessian, scale)
        size = self._values.abs()
        self.move = self.damped(0.0)
        self.norm = float((self.score @ self.move).clamp(min=0).sqrt())
        self.condition = float(size.max() / size.min())

    def damped(self, damping: float) -> Tensor:
        r"""The step :math:`(|H| + \lambda D)^{-1} g` with D the diagonal of the scales."""
        size = self._values.abs()
        floor = float(size.max()) * torch.finfo(size.dtype).eps * 100
        inverse = self._vectors / (size.clamp(min=floor) + damping)
        return inverse @ (self._vectors.mT @ (self.score / self._scale)) / self._scale

    @property
    def descents(self) -> Tensor:
        """Directions in which the likelihood bends upwards, one a row, in coordinates."""
        down = self._values < -1e-3
        return (self._vectors[:, down] / self._scale[:, None]).mT

    def _indistinct(self, at_boundary: Tensor) -> tuple[str, ...]:
        # A change by a standard deviation or a correlation of 1 that moves the likelihood by
        # nothing, and directions that are flat beside the steepest.
        names, u = self.at.names, torch.where(at_boundary, 0, self.u)
        bend = self.hessian.diagonal().abs()
        silent = torch.where(u != 0, u**2 * bend < 1e-10, (bend == 0) & ~at_boundary)
        found = {name for name, is_silent in zip(names, silent.tolist(), strict=True) if is_silent}
        flat = self._values.abs() < FLAT * self._values.abs().max()
        for direction in (self._vectors[:, flat] / self._scale[:, None]).T:
            weight = (direction * u).abs()
            if float(weight.max()) > 0:
                found |= {n for n, w in zip(names, weight, strict=True) if w > 0.1 * weight.max()}
        return tuple(name for name in names if name in found)

    def matrices(self, i: int, u: Tensor) -> tuple[Tensor, ...]:
        """Matrices of the i-th problem as a function of the coordinates."""
        return self.objectives[i].matrices(self.at.natural(i, u))

    def boundary_step(self, j: int) -> float:
        r"""The scoring step of :math:`(u_j - b)^2` away from the boundary b."""
        slope = information = 0.0
        for i, (objective, weight) in enumerate(zip(self.objectives, self.weights, strict=True)):
            if objective.moves:
                # The second derivative by u_j is twice the slope by its square.
                return float(1 / (-self.hessian[j, j]).clamp(min=1e-300))
            evaluation = objective.evaluate()

            def matrices(x: Tensor, i: int = i) -> tuple[Tensor, ...]:
                return self.matrices(i, x)

            half = [d / 2 for d in second_derivative(matrices, self.u, j)]
            slope += weight * sum(
                float((s * d).sum()) for s, d in zip(evaluation.scores(), half, strict=True)
            )
            information += weight * float(evaluation.information([d[None] for d in half]))
        return slope / information if information > 0 else 1.0


def lost_in_noise(evaluation: Evaluation) -> float:
    """The score norm of a step whose gain, half of its square, rounding leaves unknown."""
    return (2 * evaluation.noise) ** 0.5


def _score_at(c: Curvature, u: Tensor, j: int) -> float:
    """The score by a coordinate at another point; the parameters are left as they are."""
    total = 0.0
    try:
        c.at.write(u)
        for i, (objective, weight) in enumerate(zip(c.objectives, c.weights, strict=True)):

            def matrices(x: Tensor, i: int = i) -> tuple[Tensor, ...]:
                return c.matrices(i, x)

            total += weight * float(expand(matrices, objective.evaluate().scores(), u)[0][j])
    finally:
        c.at.write(c.u)
    return total


def spectrum_in_scales(hessian: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    r"""Eigenvalues (…, m) and eigenvectors (…, m, m) of :math:`D^{-1} H D^{-1}`, in which D are the scales.

    Args:
        hessian: H, (…, m, m), the curvature of a log-likelihood.
        scale: the diagonal of D, (…, m).

    Raises:
        NumericalError: if H holds numbers that are not finite.
    """
    return decomposed(hessian / (scale[..., :, None] * scale[..., None, :]), CURVATURE)
