"""The transforms that are one formula each."""

from __future__ import annotations

from math import copysign, log, pi, remainder

import torch
from torch import Tensor

from openreml_nn.covariance.transform.base import (
    POSITIVE,
    REALS,
    Interval,
    Transform,
    check_inside,
    check_tensor,
    finite_number,
)
from openreml_nn.support.errors import InputError

__all__ = [
    "TransformExp",
    "TransformExp2",
    "TransformExp10",
    "TransformExpPow2",
    "TransformIdentity",
    "TransformPow",
    "TransformScaleShift",
    "TransformSigmoid",
]


class TransformIdentity(Transform):
    r""":math:`t(x) = x`.

    >>> TransformIdentity()(torch.tensor([0.5]))
    tensor([0.5000])
    """

    def __call__(self, x: Tensor) -> Tensor:
        return check_tensor(x)

    def inverse(self, value: Tensor) -> Tensor:
        return check_inside(value, self)

    def grad(self, x: Tensor) -> Tensor:
        return torch.ones_like(check_tensor(x))


class _Exponential(Transform):
    """:math:`t(x) = e^{rx}`, with a coordinate in closed form."""

    codomain = POSITIVE
    #: The power of the coordinate that the value is.
    degree = 2
    _rate: float

    def __init__(self, degree: int = 2) -> None:
        if isinstance(degree, bool) or not isinstance(degree, int):
            raise TypeError(f"`degree` is {degree!r}: expected an int")
        if degree not in (0, 1, 2):
            raise InputError(f"`degree` is {degree!r}: expected 0, 1 or 2")
        if degree != 2:
            # Only then, so that the usual transform is shown without arguments.
            self.degree = degree

    @property
    def vanishes(self) -> bool:
        return self.degree > 0

    def _log(self, value: Tensor) -> Tensor:
        """:meth:`inverse` without a look at the value."""
        raise NotImplementedError

    def inverse(self, value: Tensor) -> Tensor:
        return self._log(check_inside(value, self))

    def coordinate(self, x: Tensor) -> Tensor:
        check_tensor(x)
        return torch.exp(self._rate * x / self.degree) if self.degree else x

    def from_coordinate(self, u: Tensor) -> Tensor:
        check_tensor(u, "u")
        return self.degree * self._log(u.abs()) if self.degree else u

    def at_coordinate(self, u: Tensor) -> Tensor:
        check_tensor(u, "u")
        if self.degree == 2:
            return u * u
        return u if self.degree else self(u)


class TransformExp(_Exponential):
    r""":math:`t(x) = e^x`, for positive quantities.

    Args:
        degree: estimation steps in :math:`u = \varphi^{1/\text{degree}}`: 2
            for a variance, 1 for a standard deviation. With 0, for a quantity
            of which zero is no ordinary value, such as a length, it steps in
            :math:`x = \log\varphi`.

    Raises:
        TypeError: if ``degree`` is no int.
        InputError: if it is another number (a ValueError).

    >>> TransformExp()(torch.tensor([0.0]))
    tensor([1.])
    """

    _rate = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        return torch.exp(check_tensor(x))

    def _log(self, value: Tensor) -> Tensor:
        return torch.log(value)

    def grad(self, x: Tensor) -> Tensor:
        return torch.exp(check_tensor(x))


class TransformExp2(_Exponential):
    r""":math:`t(x) = 2^x`, for positive quantities; ``degree`` as in :class:`TransformExp`.

    >>> TransformExp2()(torch.tensor([3.0]))
    tensor([8.])
    """

    _rate = log(2)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.exp2(check_tensor(x))

    def _log(self, value: Tensor) -> Tensor:
        return torch.log2(value)

    def grad(self, x: Tensor) -> Tensor:
        return torch.exp2(check_tensor(x)) * self._rate


class TransformExp10(_Exponential):
    r""":math:`t(x) = 10^x`, for positive quantities; ``degree`` as in :class:`TransformExp`.

    >>> TransformExp10()(torch.tensor([2.0]))
    tensor([100.])
    """

    _rate = log(10)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.pow(10.0, check_tensor(x))

    def _log(self, value: Tensor) -> Tensor:
        return torch.log10(value)

    def grad(self, x: Tensor) -> Tensor:
        return torch.pow(10.0, check_tensor(x)) * self._rate


class TransformExpPow2(_Exponential):
    r""":math:`t(x) = e^{2x}`, for variances: :math:`e^x` is the standard deviation.

    ``degree`` as in :class:`TransformExp`.

    >>> TransformExpPow2()(torch.tensor([0.0, 0.5]))
    tensor([1.0000, 2.7183])
    """

    _rate = 2.0

    def __call__(self, x: Tensor) -> Tensor:
        return torch.exp(2 * check_tensor(x))

    def _log(self, value: Tensor) -> Tensor:
        return torch.log(value) / 2

    def grad(self, x: Tensor) -> Tensor:
        return 2 * torch.exp(2 * check_tensor(x))


class TransformPow(Transform):
    r""":math:`t(x) = x^p`.

    One to one on the whole line for an odd natural number :math:`p`, and on
    :math:`x > 0` for any other; there :meth:`inverse` gives the positive root.

    Args:
        factor: the exponent :math:`p`, not zero.

    Raises:
        TypeError: if ``factor`` is not a number.
        InputError: if it is zero or not finite (a ValueError).

    >>> TransformPow(2.0)(torch.tensor([3.0]))
    tensor([9.])
    """

    def __init__(self, factor: float = 2.0) -> None:
        self.factor = finite_number("factor", factor)
        if self.factor == 0:
            raise InputError("`factor` is 0: a constant has no inverse")

    @property
    def domain(self) -> Interval:
        return REALS if self.factor > 0 and self.factor % 2 == 1 else POSITIVE

    @property
    def codomain(self) -> Interval:
        return self.domain

    def __call__(self, x: Tensor) -> Tensor:
        return torch.pow(check_tensor(x), self.factor)

    def inverse(self, value: Tensor) -> Tensor:
        check_inside(value, self)
        if self.domain == POSITIVE:
            return torch.pow(value, 1.0 / self.factor)
        return value.sign() * torch.pow(value.abs(), 1.0 / self.factor)

    def grad(self, x: Tensor) -> Tensor:
        return self.factor * torch.pow(check_tensor(x), self.factor - 1.0)


class TransformScaleShift(Transform):
    r""":math:`t(x) = a x + b`.

    Args:
        a: slope, not zero.
        b: intercept.

    Raises:
        TypeError: if ``a`` or ``b`` is not a number.
        InputError: if ``a`` is zero, or one of them not finite (a ValueError).

    >>> TransformScaleShift(2.0, -1.0)(torch.tensor([0.5]))
    tensor([0.])
    """

    def __init__(self, a: float, b: float = 0.0) -> None:
        self.a = finite_number("a", a)
        self.b = finite_number("b", b)
        if self.a == 0:
            raise InputError("`a` is 0: a constant has no inverse")

    def __call__(self, x: Tensor) -> Tensor:
        return self.a * check_tensor(x) + self.b

    def inverse(self, value: Tensor) -> Tensor:
        return (check_inside(value, self) - self.b) / self.a

    def grad(self, x: Tensor) -> Tensor:
        return torch.full_like(check_tensor(x), self.a)


class TransformSigmoid(Transform):
    r""":math:`t(x) = 1 / (1 + e^{-x})`, into :math:`(0, 1)`.

    Estimation steps in the angle u of :math:`t = (1 + \sin u)/2`, in which both
    ends, such as correlations of ±1, are ordinary points.

    >>> TransformSigmoid()(torch.tensor([0.0]))
    tensor([0.5000])
    """

    codomain = (0.0, 1.0)
    bounds = (-pi / 2, pi / 2)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.sigmoid(check_tensor(x))

    def inverse(self, value: Tensor) -> Tensor:
        return torch.logit(check_inside(value, self))

    def grad(self, x: Tensor) -> Tensor:
        value = torch.sigmoid(check_tensor(x))
        return value * (1 - value)

    def coordinate(self, x: Tensor) -> Tensor:
        # sin u = tanh(x / 2), by what keeps its digits at both ends.
        return torch.atan(torch.sinh(check_tensor(x) / 2))

    def from_coordinate(self, u: Tensor) -> Tensor:
        # Of t and of 1 - t, which is small where t is near 1.
        check_tensor(u, "u")
        t, rest = torch.sin((pi / 2 + u) / 2), torch.sin((pi / 2 - u) / 2)
        return 2 * torch.log(t.abs() / rest.abs())

    def at_coordinate(self, u: Tensor) -> Tensor:
        return torch.sin((pi / 2 + check_tensor(u, "u")) / 2) ** 2

    def fold(self, u: float) -> float:
        u = remainder(u, 2 * pi)
        return u if abs(u) <= pi / 2 else copysign(pi, u) - u
