"""Moves of the covariance parameters by which the likelihood does not fall."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, isfinite

import torch
from torch import Tensor

from openreml_nn.estimation.curvature import Curvature
from openreml_nn.likelihood.loss import Objective
from openreml_nn.support.errors import NotPositiveDefiniteError, NumericalError

__all__ = ["Safeguard", "edge_of"]


def edge_of(objective: Objective) -> str:
    """Why the likelihood does not exist at the end of a full step; empty where it does.

    The parameters are left as they are.
    """
    with torch.no_grad():
        c = Curvature([objective])
        c.at.write(c.u + c.move)
        try:
            objective.evaluate()
        except NumericalError as error:
            return str(error)
        finally:
            c.at.write(c.u)
    return ""


class Safeguard:
    """Moves from one point, each of which is taken only if the likelihood does not fall.

    Args:
        objectives: the likelihoods.
        owned: the parameters to move; all that require a gradient if None.
        weights: what each log-likelihood is multiplied by; 1 if None.

    Attributes:
        start: the log-likelihood at the point.
        curvature: score and curvature there.

    Raises:
        NotPositiveDefiniteError, NumericalError: if the likelihood does not exist at the point.
        RuntimeError: if none of the parameters belongs to a covariance.
    """

    def __init__(
        self,
        objectives: Sequence[Objective],
        owned: Sequence[Tensor] | None,
        weights: Sequence[float] | None,
    ) -> None:
        self._objectives = objectives
        self._weights = [1.0] * len(objectives) if weights is None else list(weights)
        try:
            self.start = self._total()
        except NotPositiveDefiniteError as error:
            text = f"at the starting values {error}"
            raise NotPositiveDefiniteError(text) from error
        if not isfinite(self.start):
            raise NumericalError(f"the log-likelihood at the starting values is {self.start}")
        self.curvature = c = Curvature(objectives, owned, self._weights, self._evaluations)
        if not len(c.at):
            raise RuntimeError("none of AIREML's parameters belongs to a covariance in the loss")
        # Differences of the likelihood below this are rounding, as are those within what an
        # estimated likelihood is known to.
        eps = torch.finfo(objectives[0].problem.fixed.y.dtype).eps
        self._slack = 100 * eps * (abs(self.start) + c.rows)
        self._slack += sum(e.error + 3 * e.noise for e in self._evaluations)

    def _log_likelihood(self) -> float:
        """The log-likelihood at the parameters as they are; minus infinity where it does not exist."""
        try:
            total = self._total()
        except NumericalError:
            return -inf
        return total if isfinite(total) else -inf

    def _total(self) -> float:
        """The weighted sum of the log-likelihoods; a NumericalError says why there is none."""
        # Kept: what follows at the same parameters would lower the covariance again. Those before
        # are let go first, for the memory of their factors.
        self._evaluations = []
        self._evaluations = [o.evaluate() for o in self._objectives]
        return sum(
            w * float(e.log_likelihood)
            for e, w in zip(self._evaluations, self._weights, strict=True)
        )

    def has_scores(self) -> bool:
        """Whether the next step can start from where the likelihood was last evaluated: digits are
        left for the derivatives, and no parameter is infinite, as a length of which the data know
        only that it is long."""
        if not _is_finite(self.curvature):
            return False
        try:
            for o, evaluation in zip(self._objectives, self._evaluations, strict=True):
                if not o.moves:
                    evaluation.scores()
        except NumericalError:
            return False
        return True

    def _log_likelihood_at(self, u: Tensor) -> float:
        self.curvature.at.write(u)
        return self._log_likelihood()

    def trust(self, move: Tensor) -> float | None:
        """Move without an evaluation at the end; returns the log-likelihood that is promised there,
        None where the move comes near to a boundary, and is not made."""
        c = self.curvature
        if bool(_ends(c, move)[2].any()):
            return None
        c.at.write(c.u + move)
        if _is_finite(c):
            return self.start + _promised(c, move)
        c.at.write(c.u)
        return None

    def attempt(self, move: Tensor) -> float | None:
        """Move unless the likelihood falls; returns the log-likelihood reached."""
        c = self.curvature
        u, target = c.u, c.u + move
        bound, gap, ends = _ends(c, move)
        reached = self._log_likelihood_at(target)
        # A step that keeps half of what is promised, and is not all the way to the boundary, needs
        # no better one.
        promised = _promised(c, move)
        inside = bool((move.abs() < 0.98 * gap)[ends].all())
        least = self.start - self._slack
        if not bool(ends.any()) or (reached - self.start > promised / 2 and inside):
            return reached if reached >= least else None
        # Perhaps it ends at the boundary, perhaps the step is too long.
        halfway = u + torch.where(move < 0, -gap, gap) / 2
        candidates = [torch.where(ends, bound, target), target, torch.where(ends, halfway, target)]
        values = [
            self._log_likelihood_at(candidates[0]),
            reached,
            self._log_likelihood_at(candidates[2]),
        ]
        best = values.index(max(values))
        if values[0] >= values[best] - self._slack:
            best = 0
        if values[best] < least:
            return None
        if best != len(candidates) - 1:
            self._log_likelihood_at(candidates[best])
        return values[best]

    def attempt_kink(self) -> float | None:
        """Move as far as the first kink that the full step crosses, if the likelihood rises there;
        returns the log-likelihood reached, None where there is no such kink."""
        c = self.curvature
        best, target = self.start + self._slack, None
        for j, kinks in c.kinks.items():
            gap = (kinks - c.u[j]) / c.move[j]  # as a part of the step
            crossed = (gap > 0) & (gap < 1)
            if j in c.held or not bool(crossed.any()):
                continue
            at = crossed.nonzero()[:, 0][gap[crossed].argmin()]
            for move in (gap[at] * c.move, c.move):
                u = c.u + move
                u[j] = kinks[at]
                reached = self._log_likelihood_at(u)
                if reached > best:
                    best, target = reached, u
        if target is None:
            self.curvature.at.write(c.u)
            return None
        return self._log_likelihood_at(target)

    def settle(self) -> float | None:
        """Put coordinates within a fraction of a standard error of a boundary onto it.

        What converges towards a boundary would else end near it, at 1e-45 in place of 0. Returns
        the log-likelihood reached; None where none was put there.
        """
        c = self.curvature
        low, high = c.at.ends(c.u)
        bound = torch.where((c.u - low) < (high - c.u), low, high)
        gap = (bound - c.u).abs()
        bend = c.hessian.diagonal().abs()
        near = (gap > 0) & (gap**2 * bend < 1e-3) & ~c.silent
        for j in near.nonzero()[:, 0].tolist():
            target = c.u.clone()
            target[j] = bound[j]
            reached = self._log_likelihood_at(target)
            if reached >= self.start - self._slack:
                return reached
        if bool(near.any()):
            self._log_likelihood_at(c.u)
        return None

    def escape(self, is_flat: bool) -> float | None:
        """Leave a boundary or a saddle where the likelihood rises from there, which no gradient
        shows.

        Args:
            is_flat: whether the score is so small that the point may be a saddle.

        Returns:
            The log-likelihood reached; None where it rises nowhere.
        """
        c = self.curvature
        low, _ = c.at.ends(c.u)
        for j in c.stuck:
            distance = c.boundary_step(j) ** 0.5
            for _ in range(40):
                target = c.u.clone()
                target[j] += distance if float(low[j]) == float(c.u[j]) else -distance
                reached = self._log_likelihood_at(target)
                if reached > self.start + self._slack:
                    return reached
                distance /= 2
        if is_flat:
            for direction in c.descents:
                for length in (1.0, -1.0, 0.1, -0.1):
                    reached = self._log_likelihood_at(c.u + length * direction)
                    if reached > self.start + self._slack:
                        return reached
        if c.stuck or len(c.descents):
            self._log_likelihood_at(c.u)
        return None


def _is_finite(c: Curvature) -> bool:
    """Whether all parameters are, as they stand."""
    natural = (e.trans(e.tensor.detach()) for e in c.at.entries)
    return all(bool(torch.isfinite(value).all()) for value in natural)


def _ends(c: Curvature, move: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each coordinate the boundary that it moves to, how far that is, and whether the move is
    about as long."""
    low, high = c.at.ends(c.u)
    bound = torch.where(move < 0, low, high)
    gap = (bound - c.u).abs()
    return bound, gap, (gap > 0) & (move.abs() >= 0.9 * gap)


def _promised(c: Curvature, move: Tensor) -> float:
    """By how much the log-likelihood rises with a move, were it quadratic."""
    return float(c.score @ move - move @ c.hessian @ move / 2)
