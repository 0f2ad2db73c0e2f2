"""What the search for a mode asks of a solver: the random effects, and the system of a Newton step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from openreml_nn.likelihood.effects import RandomEffects
from openreml_nn.likelihood.problem import Cost
from openreml_nn.likelihood.solver import Solver
from openreml_nn.terms.term import Term

__all__ = ["Factor", "Point", "Space"]


class Factor(Protocol):
    r"""A factor of :math:`H = \Lambda^\top Z^\top W Z\Lambda + Q`, bordered by the coefficients of X.

    Attributes:
        weights: (n,) of the rows, W.
        error: standard error of :meth:`half_log_det`, 0 where it is computed.
    """

    weights: Tensor

    @property
    def error(self) -> float: ...

    def alone(self) -> Factor:
        """The same without the coefficients of X."""
        ...

    def half_log_det(self) -> Tensor:
        r"""Half of :math:`\log|H| - \log|Q|`, of the border too."""
        ...

    def solve(self, g: Tensor, g_X: Tensor) -> tuple[Tensor, Tensor]:
        """:math:`H^{-1}` times a vector (size, 1) and its border (p, 1)."""
        ...

    def fixed_covariance(self) -> Tensor:
        """The inverse of the border's Schur complement, (p, p)."""
        ...

    def half_variances(self) -> Tensor:
        """Half the variance of each row's predictor, (n,): derivatives of :meth:`half_log_det` by W."""
        ...

    def of_matrices(self, u: Tensor, s: Tensor, first: Tensor, f: Tensor) -> list[Tensor]:
        r"""Derivatives of the value by the matrix of each term, in the terms' order.

        Args:
            u: (size,) the mode.
            s: (size, 1) :math:`H^{-1}\Lambda^\top Z^\top t`.
            first: (n,) :math:`\ell'`.
            f: (n,) :math:`t - Wc`.
        """
        ...

    def random(self, terms: Sequence[Term], u: Tensor) -> list[RandomEffects]:
        """The modes of the effects of each term with their conditional variances, the coefficients
        of X held."""
        ...


class Point(Protocol):
    r"""The random effects :math:`b = \Lambda u` at some covariances, with :math:`Q` the precision of u.

    Attributes:
        is_cheap: whether a factor takes no longer than what a step does to the rows anyway.
    """

    is_cheap: bool

    def predictor(self, u: Tensor) -> Tensor:
        r""":math:`Z\Lambda u` for u (size,), (n,)."""
        ...

    def slope(self, v: Tensor) -> Tensor:
        r""":math:`\Lambda^\top Z^\top v` for v (n,), (size,)."""
        ...

    def prior(self, u: Tensor) -> Tensor:
        """:math:`Q u` for u (size,)."""
        ...

    def factor(self, weights: Tensor, X: Tensor) -> Factor:
        """The factor of the system under weights of the rows (n,), bordered by X (n, p).

        Raises:
            NotPositiveDefiniteError: if it is not positive definite.
        """
        ...


class Space(Protocol):
    """Where the random effects of some terms stand.

    Attributes:
        solver: whose system it is, with its options.
        reason: why that solver is taken.
    """

    @property
    def solver(self) -> Solver: ...

    @property
    def reason(self) -> str: ...

    def cost(self, p: int) -> Cost:
        """What an evaluation takes with p coefficients of X."""
        ...

    @property
    def size(self) -> int:
        """Number of random effects."""
        ...

    def at(self, terms: Sequence[Term]) -> Point:
        """The effects at the covariances of terms of the same designs.

        Raises:
            NotPositiveDefiniteError: if a covariance is not positive semi-definite.
        """
        ...
