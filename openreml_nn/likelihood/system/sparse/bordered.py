r"""The factor of a sparse matrix within a subspace, as of effects that sum to zero.

Within :math:`N^\top u = 0` a matrix A is what :math:`\tilde A = A + c E E^\top` is, less the corners
E, some columns of the identity, that make the precision of such effects positive definite. With
:math:`U = (\sqrt c E, N)` and N orthonormal,

.. math::
    A^+ = \tilde A^{-1} + \tilde A^{-1} U S^{-1} U^\top \tilde A^{-1},\qquad
    S = \begin{pmatrix} I & 0 \\ 0 & 0 \end{pmatrix} - U^\top \tilde A^{-1} U

is the inverse of A within it, and :math:`\log|\tilde A| + \log|\det S|` its log-determinant.

Reference:
    Rue and Held, Gaussian Markov Random Fields (2005), section 2.3.3.
"""

from __future__ import annotations

from functools import cached_property
from typing import Protocol

import numpy as np

from openreml_nn.likelihood.system.sparse.factor import Factor

__all__ = ["Bordered", "Factored"]


class Factored(Protocol):
    """What the likelihood needs of a factor: :class:`Factor` and :class:`Bordered` have it."""

    log_det: float
    loss: float

    @property
    def noise(self) -> float: ...

    def half(self, x: np.ndarray) -> np.ndarray: ...

    def back(self, x: np.ndarray) -> np.ndarray: ...

    def inner(self, one: np.ndarray, other: np.ndarray) -> np.ndarray: ...

    @property
    def inverse(self) -> np.ndarray: ...


class Bordered:
    """The factor of A within a subspace.

    Args:
        factor: of A with c added at the corners.
        corners: (k,) columns of the corners.
        weight: (k,) c of each.
        null: N, (n, k).

    Attributes:
        log_det, loss: as of :class:`Factor`.
    """

    def __init__(
        self, factor: Factor, corners: np.ndarray, weight: np.ndarray, null: np.ndarray
    ) -> None:
        self._factor, k = factor, len(corners)
        U = np.concatenate([np.zeros_like(null), null], 1)
        U[corners, np.arange(k)] = weight**0.5
        self._H = factor.half(U)
        S = np.diag(np.repeat([1.0, 0.0], k)) - self._H.T @ self._H
        values, vectors = np.linalg.eigh((S + S.T) / 2)
        self._root = vectors / np.abs(values) ** 0.5
        self._sign = np.sign(values)[:, None]
        self.log_det = factor.log_det + float(np.log(np.abs(values)).sum())
        self.loss = factor.loss

    @property
    def noise(self) -> float:
        """As of :class:`Factor`."""
        return self._factor.noise

    def half(self, x: np.ndarray) -> np.ndarray:
        """A root of x (n, m), (n + 2 k, m), of which :meth:`inner` are the products."""
        own = self._factor.half(x)
        return np.concatenate([own, self._root.T @ (self._H.T @ own)])

    def inner(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        r""":math:`x^\top A^+ y` from roots of x and of y."""
        n = len(self._H)
        return np.asarray(one[:n].T @ other[:n] + one[n:].T @ (self._sign * other[n:]))

    def back(self, x: np.ndarray) -> np.ndarray:
        """:math:`A^+ x` from the root of x."""
        n = len(self._H)
        return self._factor.back(x[:n] + self._H @ (self._root @ (self._sign * x[n:])))

    @cached_property
    def inverse(self) -> np.ndarray:
        """Entries of :math:`A^+` in the pattern of the factor."""
        s = self._factor.symbolic
        Y = self._factor.back(self._H @ self._root)[s.order]
        found = self._factor.inverse.copy()
        height, width = np.diff(s.row_start), np.diff(s.first)
        row = np.repeat(s.rows, np.repeat(width, height))
        line = np.repeat(np.arange(len(s.rows)), np.repeat(width, height))
        start = np.concatenate([[0], np.cumsum(np.repeat(width, height))])
        column = np.repeat(s.first[:-1], height * width) + np.arange(len(row)) - start[line]
        for y, sign in zip(Y.T, self._sign[:, 0], strict=True):
            found += sign * y[row] * y[column]
        return found
