r"""Determinant and inverse of a sparse matrix near its diagonal, without a factor.

For :math:`A = D + O` with the diagonal D they are, to second order in :math:`D^{-1}O`,

.. math::
    \log|A| \approx \log|D| - \tfrac12 \mathrm{tr}\{(D^{-1}O)^2\},\qquad
    A^{-1} \approx D^{-1} - D^{-1} O D^{-1} + \mathrm{diag}(D^{-1} O D^{-1} O D^{-1}),

the latter the derivative of the former by the entries of A.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from openreml_nn.likelihood.system.sparse.equations import Equations
from openreml_nn.likelihood.system.sparse.part import Cross
from openreml_nn.support.errors import NotPositiveDefiniteError

__all__ = ["SecondOrder", "near_solve"]

#: The relative residual at which solves end, and the steps they take at most.
_TOLERANCE, _MOST_STEPS = 1e-2, 20


class SecondOrder:
    r"""An identity and blocks of some equations, to second order about the diagonal.

    Args:
        equations: where the blocks stand.
        blocks: in the order of their crosses.

    Attributes:
        log_det: about :math:`\log|A|`.
        inverse: about the entries of the inverse of A in the places of the crosses, whatever elsewhere.

    Raises:
        NotPositiveDefiniteError: if the diagonal is not positive.
    """

    def __init__(self, equations: Equations, blocks: Sequence[np.ndarray]) -> None:
        pairs = list(zip(equations.crosses, blocks, strict=True))
        diagonal, squares = np.ones(equations.size), np.zeros(equations.size)
        for cross, data in pairs:
            if cross.one == cross.other:
                row, column = _places(equations, cross)
                diagonal += _sums(row, data * (row == column), len(diagonal))
        if not bool((diagonal > 0).all()):
            raise NotPositiveDefiniteError("the diagonal of the system is not positive")
        scale = 1 / diagonal
        self.inverse = inverse = equations.symbolic.memory.take()
        for cross, data in pairs:
            row, column = _places(equations, cross)
            found = data * scale[row] * scale[column]
            inverse[cross.place] = -found
            found *= data
            if cross.one == cross.other:
                found *= row != column
            else:  # the transposed blocks are not held
                squares += _sums(column, found, len(scale))
            squares += _sums(row, found, len(scale))
        for cross, _ in pairs:
            if cross.one == cross.other:
                row, column = _places(equations, cross)
                at = np.broadcast_to(row, cross.place.shape)[row == column]
                inverse[cross.place[row == column]] = (scale * (1 + squares))[at]
        self.log_det = -float(np.log(scale).sum() + squares.sum() / 2)


def _places(equations: Equations, cross: Cross) -> tuple[np.ndarray, np.ndarray]:
    """Rows (b, k, 1) and columns (b, 1, m) of the entries of blocks."""
    (k, m), start = cross.shape, equations.start
    row = start[cross.one] + cross.row[:, None] * k + np.arange(k)
    column = start[cross.other] + cross.column[:, None] * m + np.arange(m)
    return row[:, :, None], column[:, None, :]


def _sums(places: np.ndarray, values: np.ndarray, size: int) -> np.ndarray:
    """Values of the same place, added up."""
    at = np.broadcast_to(places, values.shape)
    return np.bincount(at.reshape(-1), values.reshape(-1), size)


def near_solve(
    times: Callable[[np.ndarray], np.ndarray],
    solve: Callable[[np.ndarray], np.ndarray],
    b: np.ndarray,
) -> np.ndarray:
    """About :math:`A^{-1} b` for b (size, m), by conjugate gradients.

    Args:
        times: products with A.
        solve: solves with a matrix near A.
        b: the right sides.
    """
    x, r = np.zeros_like(b), b.copy()
    z = p = solve(r)
    goal, rz = (_TOLERANCE * np.linalg.norm(b, axis=0)) ** 2, (r * z).sum(0)
    for _ in range(_MOST_STEPS):
        Ap = times(p)
        bend = (p * Ap).sum(0)
        alpha = np.divide(rz, bend, out=np.zeros_like(rz), where=bend > 0)
        x, r = x + alpha * p, r - alpha * Ap
        if ((r * r).sum(0) <= goal).all():
            break
        z, before = solve(r), rz
        rz = (r * z).sum(0)
        p = z + np.divide(rz, before, out=np.zeros_like(rz), where=before > 0) * p
    return x
