"""Transforms from the real line to the scale on which a parameter is named.

A parameter called ``sigma^2`` is stored as an unconstrained number ``x``; its
transform yields the variance. Every transform is an elementwise map with an
inverse and a derivative.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import copysign, pi, remainder

import torch
from torch import Tensor

__all__ = [
    "Transform",
    "TransformChain",
    "TransformExp",
    "TransformExpPow2",
    "TransformIdentity",
    "TransformInterval",
    "TransformPow",
    "TransformScaleShift",
    "TransformSigmoid",
]


class Transform:
    r"""Elementwise differentiable bijection :math:`\varphi = t(x)`.

    Subclasses implement :meth:`__call__`, :meth:`inverse` and :meth:`grad`,
    each mapping a tensor of any shape to a tensor of the same shape.

    Estimation does not step in :math:`x` when :math:`x \to -\infty` is an
    ordinary answer (a variance of zero). It steps in the *coordinate*
    :math:`u`, in which the model is smooth across that point: for
    :math:`\varphi = e^{2x}` the standard deviation :math:`u = e^x`. A
    transform for which this differs from :math:`x` overrides
    :meth:`coordinate`, :meth:`from_coordinate` and :meth:`at_coordinate`.

    The coordinate may have boundary points, :attr:`bounds`. The model is even
    about each, so that a coordinate beyond one stands for its mirror image, as
    a negative standard deviation for a positive one: see :meth:`fold`.
    """

    #: Whether the coordinate is bounded below by zero, so that zero is a boundary.
    vanishes = False

    def __call__(self, x: Tensor) -> Tensor:
        """Value :math:`t(x)`."""
        raise NotImplementedError

    def inverse(self, value: Tensor) -> Tensor:
        """Unconstrained number :math:`t^{-1}(\\varphi)`."""
        raise NotImplementedError

    def grad(self, x: Tensor) -> Tensor:
        """Elementwise derivative :math:`t'(x)`, of the shape of ``x``."""
        raise NotImplementedError

    def coordinate(self, x: Tensor) -> Tensor:
        """Coordinate :math:`u(x)` in which estimation steps."""
        return x

    def from_coordinate(self, u: Tensor) -> Tensor:
        """Unconstrained number :math:`x(u)`."""
        return u

    def at_coordinate(self, u: Tensor) -> Tensor:
        """Value :math:`t(x(u))`, smooth in ``u`` also where ``x(u)`` is infinite."""
        return self(u)

    @property
    def bounds(self) -> tuple[float, ...]:
        """Boundary points of the coordinate."""
        return (0.0,) if self.vanishes else ()

    def fold(self, u: float) -> float:
        """The coordinate within its bounds that means the same as ``u``."""
        return abs(u) if self.vanishes else u

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        return hash((type(self), repr(self)))

    def __repr__(self) -> str:
        args = ", ".join(f"{key}={value!r}" for key, value in self.__dict__.items())
        return f"{type(self).__name__}({args})"


class TransformIdentity(Transform):
    r""":math:`t(x) = x`.

    >>> TransformIdentity()(torch.tensor([0.5]))
    tensor([0.5000])
    """

    def __call__(self, x: Tensor) -> Tensor:
        return x

    def inverse(self, value: Tensor) -> Tensor:
        return value

    def grad(self, x: Tensor) -> Tensor:
        return torch.ones_like(x)


class TransformExp(Transform):
    r""":math:`t(x) = e^x`, for positive quantities.

    >>> TransformExp()(torch.tensor([0.0]))
    tensor([1.])
    """

    vanishes = True

    def __call__(self, x: Tensor) -> Tensor:
        return torch.exp(x)

    def inverse(self, value: Tensor) -> Tensor:
        return torch.log(value)

    def grad(self, x: Tensor) -> Tensor:
        return torch.exp(x)

    def coordinate(self, x: Tensor) -> Tensor:
        return torch.exp(x)

    def from_coordinate(self, u: Tensor) -> Tensor:
        return torch.log(u.abs())

    def at_coordinate(self, u: Tensor) -> Tensor:
        return u


class TransformExpPow2(Transform):
    r""":math:`t(x) = e^{2x}`, for variances: :math:`e^x` is the standard deviation.

    >>> TransformExpPow2()(torch.tensor([0.0, 0.5]))
    tensor([1.0000, 2.7183])
    """

    vanishes = True

    def __call__(self, x: Tensor) -> Tensor:
        return torch.exp(2 * x)

    def inverse(self, value: Tensor) -> Tensor:
        return torch.log(value) / 2

    def grad(self, x: Tensor) -> Tensor:
        return 2 * torch.exp(2 * x)

    def coordinate(self, x: Tensor) -> Tensor:
        return torch.exp(x)

    def from_coordinate(self, u: Tensor) -> Tensor:
        return torch.log(u.abs())

    def at_coordinate(self, u: Tensor) -> Tensor:
        return u * u


class TransformPow(Transform):
    r""":math:`t(x) = x^p`.

    One to one on :math:`x \ge 0`; :meth:`inverse` gives the non-negative root.

    Args:
        factor: the exponent :math:`p`.

    >>> TransformPow(2.0)(torch.tensor([3.0]))
    tensor([9.])
    """

    def __init__(self, factor: float = 2.0) -> None:
        self.factor = factor

    def __call__(self, x: Tensor) -> Tensor:
        return torch.pow(x, self.factor)

    def inverse(self, value: Tensor) -> Tensor:
        return torch.pow(value, 1.0 / self.factor)

    def grad(self, x: Tensor) -> Tensor:
        return self.factor * torch.pow(x, self.factor - 1.0)


class TransformScaleShift(Transform):
    r""":math:`t(x) = a x + b`.

    Args:
        a: slope, not zero.
        b: intercept.

    Raises:
        ValueError: if ``a`` is zero.

    >>> TransformScaleShift(2.0, -1.0)(torch.tensor([0.5]))
    tensor([0.])
    """

    def __init__(self, a: float, b: float = 0.0) -> None:
        if a == 0:
            raise ValueError("`a` is 0: a constant has no inverse")
        self.a = a
        self.b = b

    def __call__(self, x: Tensor) -> Tensor:
        return self.a * x + self.b

    def inverse(self, value: Tensor) -> Tensor:
        return (value - self.b) / self.a

    def grad(self, x: Tensor) -> Tensor:
        return torch.full_like(x, self.a)


class TransformSigmoid(Transform):
    r""":math:`t(x) = 1 / (1 + e^{-x})`, into :math:`(0, 1)`.

    >>> TransformSigmoid()(torch.tensor([0.0]))
    tensor([0.5000])
    """

    def __call__(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x)

    def inverse(self, value: Tensor) -> Tensor:
        return torch.logit(value)

    def grad(self, x: Tensor) -> Tensor:
        value = torch.sigmoid(x)
        return value * (1 - value)


class TransformChain(Transform):
    r"""Composition :math:`t(x) = t_m(\dots t_1(x))`; the first in the list acts first.

    Args:
        chain: a transform or a sequence of transforms.

    Raises:
        TypeError: if an element is not a :class:`Transform`.

    >>> TransformChain([TransformSigmoid(), TransformScaleShift(2.0, -1.0)])(torch.tensor([0.0]))
    tensor([0.])
    """

    def __init__(self, chain: Transform | Sequence[Transform]) -> None:
        self.chain = [chain] if isinstance(chain, Transform) else list(chain)
        for element in self.chain:
            if not isinstance(element, Transform):
                raise TypeError(
                    f"`chain` holds a {type(element).__name__}: expected Transform instances"
                )

    def __call__(self, x: Tensor) -> Tensor:
        for element in self.chain:
            x = element(x)
        return x

    def inverse(self, value: Tensor) -> Tensor:
        for element in reversed(self.chain):
            value = element.inverse(value)
        return value

    def grad(self, x: Tensor) -> Tensor:
        slope = torch.ones_like(x)
        for element in self.chain:
            slope = slope * element.grad(x)
            x = element(x)
        return slope


class TransformInterval(TransformChain):
    r"""A sigmoid scaled to an interval, :math:`t(x) = a + (b - a) / (1 + e^{-x})`.

    Estimation steps in the angle u of :math:`t = (a + b)/2 + (b - a)/2\,\sin u`, in which
    the ends, such as correlations of ±1, are ordinary points.

    Args:
        low: a, the lower end.
        high: b, the upper end.

    >>> TransformInterval(-1.0, 1.0)(torch.tensor([0.0]))
    tensor([0.])
    """

    def __init__(self, low: float, high: float) -> None:
        super().__init__([TransformSigmoid(), TransformScaleShift(high - low, low)])

    @property
    def bounds(self) -> tuple[float, ...]:
        return -pi / 2, pi / 2

    def fold(self, u: float) -> float:
        u = remainder(u, 2 * pi)
        return u if abs(u) <= pi / 2 else copysign(pi, u) - u

    def _ends(self) -> tuple[float, float]:
        scale = self.chain[1]
        assert isinstance(scale, TransformScaleShift)
        return scale.b, scale.a + scale.b

    def coordinate(self, x: Tensor) -> Tensor:
        # sin u = tanh(x / 2), by what keeps its digits at both ends.
        return torch.atan(torch.sinh(x.clamp(-1e3, 1e3) / 2))

    def from_coordinate(self, u: Tensor) -> Tensor:
        # As an end is approached, 1 - |sin u| = 2 sin^2 of half the distance to it.
        up, down = torch.sin((pi / 2 + u) / 2), torch.sin((pi / 2 - u) / 2)
        return 2 * torch.log(up.abs() / down.abs())

    def at_coordinate(self, u: Tensor) -> Tensor:
        low, high = self._ends()
        return low + (high - low) * torch.sin((pi / 2 + u) / 2) ** 2
