"""Newton steps to a mode by a factor that is not made anew at each of them."""

from __future__ import annotations

import torch
from torch import Tensor

from openreml_nn.likelihood.laplace_space import Factor
from openreml_nn.support.errors import NumericalError

__all__ = ["Steps"]

#: So many of the last changes of the gradient are known.
_KNOWN = 6


class Steps:
    r"""Steps :math:`H^{-1} g` by a factor near the true one, corrected by the changes of the gradient that
    were seen since the factor was made: those of L-BFGS, with the factor for its first matrix.

    Args:
        factor: of the system, bordered by the coefficients of X.
        size: number of random effects.

    Reference:
        Nocedal and Wright, Numerical Optimization (2006), section 7.2.
    """

    def __init__(self, factor: Factor, size: int) -> None:
        self.factor, self._size = factor, size
        self._last: tuple[Tensor, Tensor] | None = None
        self._pairs: list[tuple[Tensor, Tensor, float]] = []

    def step(self, x: Tensor, g: Tensor) -> tuple[Tensor, float]:
        """The step from x, a vector of the effects and then the coefficients, and its squared length.

        Args:
            x: (size + p,) where it begins.
            g: the gradient there.

        Raises:
            NumericalError: if there is none.
        """
        if self._last is not None:
            s, y = x - self._last[0], g - self._last[1]
            bend = float(s @ y)
            if bend > 0:
                self._pairs = [*self._pairs[1 - _KNOWN :], (s, y, bend)]
        self._last = x, g
        rest, parts = g, []
        for s, y, bend in reversed(self._pairs):
            part = float(s @ rest) / bend
            rest = rest - part * y
            parts.append(part)
        u, beta = self.factor.solve(rest[: self._size, None], rest[self._size :, None])
        move = torch.cat([u, beta])[:, 0]
        for (s, y, bend), part in zip(self._pairs, reversed(parts), strict=True):
            move = move + (part - float(y @ move) / bend) * s
        gain = float(g @ move)
        if not gain >= 0 or gain == float("inf"):
            raise NumericalError(f"the step to the mode of the random effects is {gain:.3g} long")
        return move, gain
