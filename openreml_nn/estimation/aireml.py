"""Average-information REML as an optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import inf, isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor

from openreml_nn.covariance.matrix import Matrix, Recorded
from openreml_nn.covariance.params import Entry
from openreml_nn.estimation.derivatives import hessian_of_sum, jacobian, second_derivative
from openreml_nn.likelihood.loss import Objective, listen
from openreml_nn.likelihood.problem import NotPositiveDefiniteError

#: A direction counts as flat when its curvature is this small beside the largest.
FLAT = 1e-6

__all__ = ["AIREML", "Coordinates", "Curvature", "Step", "average_information_step"]


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


class AIREML(torch.optim.Optimizer):
    r"""Safeguarded average-information steps on covariance parameters.

    A step maximises the likelihoods of every :class:`REMLLoss` that its
    closure evaluates, over those of its parameters that belong to the
    covariances. It moves in coordinates in which a variance of zero is an
    ordinary point (the standard deviation for a variance), by

    .. math::
        u \leftarrow u + |H|^{-1} g,\qquad
        H = J^\top \mathcal{I}_{AI} J - \textstyle\sum_t \langle S_t, \partial^2 G_t / \partial u^2\rangle

    with g the score, J the derivatives of the covariance matrices, S the
    scores by their entries and :math:`|H|` the curvature with its eigenvalues
    made positive. The step is halved until the likelihood does not fall.
    A variance whose step ends at or below zero is also tried at zero, and
    leaves zero again where the likelihood rises from there.

    Args:
        params: parameters, or groups of them.
        tolerance: score norm (in standard errors) that counts as converged.

    Attributes:
        last: the last :class:`Step`, None before the first.

    Raises:
        RuntimeError: by :meth:`step`, if the closure evaluates no REMLLoss or
            none of the parameters belongs to its covariance.

    Reference:
        Gilmour, Thompson and Cullis, Biometrics 51 (1995) 1440; Johnson and
        Thompson, Journal of Dairy Science 78 (1995) 449.

    >>> from openreml_nn.covariance import ScalarMatrix
    >>> from openreml_nn.likelihood import REMLLoss
    >>> loss = REMLLoss(ScalarMatrix(4).double())
    >>> y, X = torch.tensor([1.0, 2.0, 4.0, 5.0]).double(), torch.ones(4, 1).double()
    >>> optimizer = AIREML(loss.parameters())
    >>> while not (optimizer.last and optimizer.last.converged):
    ...     value = optimizer.step(lambda: loss(y, X))
    >>> f"{loss.covariance.build_params().item():.4f}"
    '3.3333'
    """

    def __init__(self, params: Iterable[Any], tolerance: float = 1e-6) -> None:
        if not tolerance > 0:
            raise ValueError(f"`tolerance` is {tolerance}: expected a positive number")
        super().__init__(params, {"tolerance": tolerance})
        self.last: Step | None = None

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Evaluate the closure and take one step; returns what the closure returned."""
        if closure is None:
            raise RuntimeError("AIREML needs a closure that evaluates the loss: step(closure)")
        with torch.enable_grad(), listen() as heard:
            value = closure()
        objectives = list({id(o.problem): o for o in heard}.values())
        if not objectives:
            raise RuntimeError("the closure evaluated no REMLLoss: AIREML needs its likelihood")
        owned = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        tolerance = min(group["tolerance"] for group in self.param_groups)
        self.last = average_information_step(objectives, owned, tolerance)
        return value


def average_information_step(
    objectives: Sequence[Objective], parameters: Sequence[Tensor], tolerance: float = 1e-6
) -> Step:
    """The step of :class:`AIREML` on some likelihoods.

    A fit calls this and not the optimizer, because making any
    ``torch.optim.Optimizer`` imports torch's compiler, which takes longer than
    many a fit.
    """
    with torch.no_grad():
        return _Stepper(objectives, parameters).step(tolerance)


class Coordinates:
    """The free parameters of some covariances in the coordinates of estimation.

    Args:
        objectives: likelihoods whose covariances hold the parameters.
        owned: the parameters to move, of those that `requires_grad`; all of these if None.
    """

    def __init__(
        self, objectives: Sequence[Objective], owned: Sequence[Tensor] | None = None
    ) -> None:
        wanted = None if owned is None else {id(p) for p in owned}
        self.entries: list[Entry] = []
        self._maps: list[tuple[list[Entry], list[int | None]]] = []
        place: dict[int, int] = {}
        for objective in objectives:
            free = list(objective.covariance._layout().free)
            at: list[int | None] = []
            for e in free:
                key = id(e.tensor)
                if e.estimated and (wanted is None or key in wanted):
                    if key not in place:
                        place[key] = len(self.entries)
                        self.entries.append(e)
                    at.append(place[key])
                else:
                    at.append(None)
            self._maps.append((free, at))

    @property
    def vanishing(self) -> list[bool]:
        """Which coordinates end at zero."""
        return [e.trans.vanishes for e in self.entries]

    def read(self, like: Tensor) -> Tensor:
        """Present coordinates, on the dtype and device of ``like``."""
        found = [e.trans.coordinate(e.tensor.detach().to(like)) for e in self.entries]
        return torch.cat(found) if found else like.new_empty(0)

    def write(self, u: Tensor) -> None:
        """Set the parameters to coordinates, which are made canonical first."""
        by_leaf: dict[int, tuple[Matrix, dict[str, float]]] = {}
        for e, value in zip(self.entries, u.tolist(), strict=True):
            by_leaf.setdefault(id(e.leaf), (e.leaf, {}))[1][e.local] = value
        for leaf, values in by_leaf.values():
            for name, value in leaf.canonical(values).items():
                parameter = leaf._parameters[name]
                assert parameter is not None
                number = torch.tensor([value], dtype=u.dtype, device=u.device)
                parameter.copy_(leaf._trans[name].from_coordinate(number))

    def natural(self, objective: int, u: Tensor) -> Recorded:
        """All free parameters of one objective's covariance, transformed, as a function of u."""
        free, at = self._maps[objective]
        if not free:
            return Recorded(u, natural=True)
        values = [
            e.trans(e.tensor.detach().to(u)) if i is None else e.trans.at_coordinate(u[i : i + 1])
            for e, i in zip(free, at, strict=True)
        ]
        return Recorded(torch.cat(values), natural=True)


class Curvature:
    r"""Score and curvature of the log-likelihood at the present parameters.

    Attributes:
        at: the coordinates, ``u`` their present values.
        score: :math:`g = \partial\ell/\partial u`.
        information: average information of u.
        hessian: the curvature H of :class:`AIREML`.
        move: the full step :math:`|H|^{-1} g`.
        norm: :math:`\sqrt{g^\top |H|^{-1} g}`.
        condition: condition number of H, scaled to have a diagonal near 1.
        stuck: coordinates at zero from which the likelihood rises.
        indistinct: names of parameters about which the data say nothing, or nothing
            but a combination of them.
    """

    def __init__(
        self, objectives: Sequence[Objective], owned: Sequence[Tensor] | None = None
    ) -> None:
        self.objectives = objectives
        self.indistinct: tuple[str, ...] = ()
        self.at = Coordinates(objectives, owned)
        self.u = u = self.at.read(objectives[0].problem.fixed.y)
        self.score = torch.zeros_like(u)
        self.information = torch.zeros(len(u), len(u), dtype=u.dtype, device=u.device)
        bend = torch.zeros_like(self.information)
        if not len(u):
            self.hessian, self.move = bend, u
            self.norm, self.condition, self.stuck = 0.0, 1.0, []
            return
        for i, objective in enumerate(objectives):
            evaluation = objective.evaluate()

            def matrices(x: Tensor, i: int = i) -> tuple[Tensor, ...]:
                return self.matrices(i, x)

            score, curve = hessian_of_sum(matrices, evaluation.scores(), u)
            self.score += score
            bend += curve
            self.information += evaluation.information(jacobian(matrices, u))
        self.hessian = self.information - (bend + bend.mT) / 2
        size = self.information.diagonal() + bend.diagonal().abs()
        scale = torch.where(size > 0, size, 1).sqrt()
        values, vectors = torch.linalg.eigh(self.hessian / (scale[:, None] * scale))
        size = values.abs()
        floor = float(size.max()) * torch.finfo(u.dtype).eps * 100
        inverse = vectors / size.clamp(min=floor)
        self.move = inverse @ (vectors.mT @ (self.score / scale)) / scale
        self.norm = float((self.score @ self.move).clamp(min=0).sqrt())
        self.condition = float(size.max() / size.min())
        self.indistinct = self._indistinct(values, vectors, scale)
        self.stuck = [
            j
            for j, vanishes in enumerate(self.at.vanishing)
            if vanishes and float(u[j]) == 0 and float(self.hessian[j, j]) < 0
        ]

    def _indistinct(self, values: Tensor, vectors: Tensor, scale: Tensor) -> tuple[str, ...]:
        # A change by a standard deviation or a correlation of 1 that moves the likelihood by
        # nothing, and directions that are flat beside the steepest.
        names = [e.name for e in self.at.entries]
        silent = (self.u != 0) & (self.u**2 * self.hessian.diagonal().abs() < 1e-10)
        found = {name for name, is_silent in zip(names, silent.tolist(), strict=True) if is_silent}
        flat = values.abs() < FLAT * values.abs().max()
        for direction in (vectors[:, flat] / scale[:, None]).T:
            weight = (direction * self.u).abs()
            found |= {n for n, w in zip(names, weight, strict=True) if w > 0.1 * weight.max()}
        return tuple(name for name in names if name in found)

    def matrices(self, i: int, u: Tensor) -> tuple[Tensor, ...]:
        """Matrices of the i-th problem as a function of the coordinates."""
        return self.objectives[i].matrices(self.at.natural(i, u))

    def variance_step(self, j: int) -> float:
        r"""The scoring step of :math:`u_j^2` from zero."""
        slope = information = 0.0
        for i, objective in enumerate(self.objectives):
            evaluation = objective.evaluate()

            def matrices(x: Tensor, i: int = i) -> tuple[Tensor, ...]:
                return self.matrices(i, x)

            half = [d / 2 for d in second_derivative(matrices, self.u, j)]
            slope += sum(float((s * d).sum()) for s, d in zip(evaluation.scores(), half))
            information += float(evaluation.information([d[None] for d in half]))
        return slope / information


class _Stepper:
    """One step: everything that depends on the point it starts from."""

    def __init__(self, objectives: Sequence[Objective], owned: Sequence[Tensor]) -> None:
        self._objectives = objectives
        self._rows = sum(o.problem.n for o in objectives)
        self._eps = torch.finfo(objectives[0].problem.fixed.y.dtype).eps
        self._start = self._log_likelihood()
        if not isfinite(self._start):
            raise NotPositiveDefiniteError("V is not positive definite at the starting values")
        self._curvature = Curvature(objectives, owned)
        if not self._curvature.at.entries:
            raise RuntimeError("none of AIREML's parameters belongs to a covariance in the loss")
        # Differences of the likelihood below this are rounding.
        self._least = self._start - 100 * self._eps * (abs(self._start) + self._rows)
        # As are those within what an estimated likelihood is known to.
        self._least -= sum(o.evaluate().error for o in objectives)

    def step(self, tolerance: float) -> Step:
        c = self._curvature
        escaped = self._escape()
        if escaped is not None:
            return Step(escaped, c.norm, 1.0, c.condition, False)
        # The score norm that rounding of the likelihood lets one see.
        resolution = max(tolerance, (self._eps * self._rows) ** 0.5)
        if c.norm < resolution:
            return Step(self._start, c.norm, 0.0, c.condition, True)
        length = 1.0
        for _ in range(60):
            reached = self._try(length * c.move)
            if reached is not None:
                return Step(reached, c.norm, length, c.condition, False)
            length /= 2
        c.at.write(c.u)
        return Step(self._start, c.norm, 0.0, c.condition, False)

    def _log_likelihood(self) -> float:
        """At the parameters as they are; minus infinity where it does not exist."""
        try:
            total = sum(float(o.evaluate().log_likelihood) for o in self._objectives)
        except NotPositiveDefiniteError:
            return -inf
        return total if isfinite(total) else -inf

    def _at(self, u: Tensor) -> float:
        self._curvature.at.write(u)
        return self._log_likelihood()

    def _try(self, move: Tensor) -> float | None:
        """Move unless the likelihood falls; returns the log-likelihood reached."""
        u = self._curvature.u
        target = u + move
        vanishing = torch.tensor(self._curvature.at.vanishing, device=u.device)
        ends = vanishing & (u > 0) & (target <= 0.1 * u)
        reached = self._at(target)
        # What the quadratic promises; a step that keeps half of it, and is not all the way to zero,
        # needs no better one.
        promised = float(self._curvature.score @ move - move @ self._curvature.hessian @ move / 2)
        kept = reached - self._start > promised / 2 and bool((target > 0.02 * u)[ends].all())
        if not bool(ends.any()) or kept:
            return reached if reached >= self._least else None
        # Perhaps it ends at zero, perhaps the step is too long.
        candidates = [target, torch.where(ends, 0, target), torch.where(ends, u / 2, target)]
        values = [reached, *(self._at(v) for v in candidates[1:])]
        best = values.index(max(values))
        if values[best] < self._least:
            return None
        if best != len(candidates) - 1:
            self._at(candidates[best])
        return values[best]

    def _escape(self) -> float | None:
        """Leave zero where the likelihood rises from there, which no gradient shows."""
        c = self._curvature
        for j in c.stuck:
            variance = c.variance_step(j)
            for _ in range(40):
                target = c.u.clone()
                target[j] = variance**0.5
                reached = self._at(target)
                if reached > 2 * self._start - self._least:
                    return reached
                variance /= 4
        if c.stuck:
            self._at(c.u)
        return None
