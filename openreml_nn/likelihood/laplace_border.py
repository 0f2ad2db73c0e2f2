r"""The coefficients of X beside the random effects: effects without a prior, which border their system.

With H the system of the effects alone and :math:`B = \Lambda^\top Z^\top W X` the whole is

.. math::
    \begin{pmatrix} H & B \\ B^\top & X^\top W X \end{pmatrix},\qquad
    S = X^\top W X - B^\top H^{-1} B.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor
from torch.linalg import solve_triangular

from openreml_nn.likelihood.laplace_space import Point
from openreml_nn.likelihood.problem import cholesky

__all__ = ["Border"]

_INFORMATION = (
    "the information on the fixed effects (the data are separated, or do not determine one of "
    "them): it"
)


class Border:
    r"""The border of a system by the coefficients of X, maybe by none.

    Args:
        point: the random effects with :math:`\Lambda`.
        solve: :math:`H^{-1}` times (size, m).
        weights: of the rows, W, (n,).
        X: (n, p).

    Attributes:
        X: (n, p).
        count: p.

    Raises:
        NotPositiveDefiniteError: if S is not positive definite.
    """

    def __init__(
        self, point: Point, solve: Callable[[Tensor], Tensor], weights: Tensor, X: Tensor
    ) -> None:
        self.X, self.count, self._point = X, X.shape[1], point
        if self.count:
            weighted = weights[:, None] * X
            B = [point.slope(column.contiguous()) for column in weighted.unbind(1)]
            self._B = torch.stack(B, 1)
            self._solved = solve(self._B)
            self._L = cholesky(X.mT @ weighted - self._B.mT @ self._solved, _INFORMATION)

    def half_log_det(self) -> Tensor:
        """Half the logarithm of the determinant of S."""
        return self._L.diagonal().log().sum() if self.count else self.X.new_zeros(())

    def solve(self, u: Tensor, g_X: Tensor) -> tuple[Tensor, Tensor]:
        """The whole's solution from that of the effects alone (size, m), and its border (p, m)."""
        if not self.count:
            return u, g_X
        beta = torch.cholesky_solve(g_X - self._B.mT @ u, self._L)
        return u - self._solved @ beta, beta

    def covariance(self) -> Tensor:
        """:math:`S^{-1}`, (p, p)."""
        return torch.cholesky_inverse(self._L)

    @cached_property
    def root(self) -> Tensor:
        """A root of what the coefficients add to the inverse, (size, p)."""
        return solve_triangular(self._L, self._solved.mT, upper=False).mT

    @cached_property
    def rest(self) -> Tensor:
        """A root of what the coefficients add to the covariance of the rows' predictors, (n, p): of each
        column what the effects do not explain."""
        explained = [self._point.predictor(column.contiguous()) for column in self.root.unbind(1)]
        return solve_triangular(self._L, self.X.mT, upper=False).mT - torch.stack(explained, 1)
