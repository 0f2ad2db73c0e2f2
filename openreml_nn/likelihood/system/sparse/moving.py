r"""Sparse precisions of levels that move with parameters, as the equations take them.

Reference:
    Rue and Held, Gaussian Markov Random Fields (2005), section 2.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from scipy.sparse import csc_matrix
from torch import Tensor

from openreml_nn.likelihood.system.sparse.factor import Factor
from openreml_nn.likelihood.system.sparse.symbolic import Symbolic
from openreml_nn.support.errors import NotPositiveDefiniteError, NumericalError
from openreml_nn.terms.precision import Precision, PrecisionCovariance

__all__ = ["Moving", "MovingAt"]


@dataclass(frozen=True)
class MovingAt:
    r"""A precision Q at one point.

    Attributes:
        precision: what it is.
        numbers: those that it is made of.
        entries: of its lower triangle.
        factor: of Q, where its determinant takes one.
        log_det: :math:`\log|Q|`.
        slope: the derivative of that by the numbers.
    """

    precision: Precision
    numbers: np.ndarray
    entries: np.ndarray
    factor: Factor | None
    log_det: float
    slope: np.ndarray

    @cached_property
    def matrix(self) -> csc_matrix:
        """Q, both triangles."""
        return self.precision.matrix(self.entries)

    def score(self, inverse: np.ndarray, u: np.ndarray, effects: int) -> Tensor:
        r"""The derivative of the log-likelihood by the numbers.

        It is :math:`\tfrac12 (t Q^{-1} - \sum (M^{-1} + u u^\top))` by Q, the sum over the t effects of
        a level.

        Args:
            inverse: entries of :math:`M^{-1}` in the order of Q's, summed over effects.
            u: effects over their root, (q t, m).
            effects: t.
        """
        share = np.where(self.precision.row > self.precision.column, 1.0, 0.5)
        pulled = self.precision.pull(self.numbers, inverse * share)
        pulled += self.precision.pull_square(self.numbers, u.reshape(self.precision.size, -1))
        return torch.from_numpy(effects * self.slope / 2 - pulled)

    def times(self, u: np.ndarray) -> np.ndarray:
        r""":math:`(Q \otimes I) u` for u (q t, m)."""
        by_level = u.reshape(self.precision.size, -1)
        return self.precision.times(self.numbers, by_level).reshape(u.shape)

    def inner(self, u: np.ndarray, effects: int) -> np.ndarray:
        r""":math:`u^\top (Q \otimes I) u` for u (q t, m)."""
        return self.precision.inner(self.numbers, u, effects)

    def along(self, derivatives: Sequence[Tensor], b: np.ndarray) -> np.ndarray:
        r""":math:`\dot G G^{-1} b` for derivatives of the numbers, (q t, m), b (q t, 1)."""
        by_level = b.reshape(self.precision.size, -1)
        found = []
        for d in derivatives:
            dx = d.detach().cpu().double().numpy()
            if not dx.any():
                found.append(np.zeros_like(b))
                continue
            change = self.precision.along(self.numbers, dx, by_level)
            found.append(-self._solve(change).reshape(b.shape))
        return np.concatenate(found, 1)

    def _solve(self, x: np.ndarray) -> np.ndarray:
        if self.factor is not None:
            return self.factor.solve(x)
        return self.precision.solve(self.numbers, x)


class Moving:
    """The pattern of a precision, analysed once.

    Args:
        g: the covariance; its numbers may move.

    Attributes:
        pattern: (q, q), both triangles.
    """

    def __init__(self, g: PrecisionCovariance) -> None:
        self._precision = g.precision
        self.pattern = g.precision.matrix(np.ones(len(g.precision.row)))

    @cached_property
    def _symbolic(self) -> tuple[Symbolic, np.ndarray]:
        """The pattern of a factor of Q, and where the entries stand in it."""
        symbolic = Symbolic.of(self.pattern)
        return symbolic, symbolic.where(self._precision.row, self._precision.column)

    def at(self, g: PrecisionCovariance) -> MovingAt:
        """The precision of a covariance with this pattern.

        Raises:
            NotPositiveDefiniteError: if it is not positive definite.
        """
        numbers = g.parts()[1].detach().cpu().double().numpy()
        try:
            entries = self._precision.entries(numbers)
            found = self._precision.log_det(numbers)
            if found is not None:
                return MovingAt(self._precision, numbers, entries, None, *found)
            symbolic, place = self._symbolic
            values = np.zeros(symbolic.entries)
            values[place] = entries
            factor = Factor(symbolic, values)
        except NumericalError as error:
            raise NotPositiveDefiniteError(f"V is not positive definite: {error}") from None
        off = np.where(self._precision.row > self._precision.column, 2.0, 1.0)
        slope = self._precision.pull(numbers, factor.inverse[place] * off)
        return MovingAt(self._precision, numbers, entries, factor, factor.log_det, slope)
