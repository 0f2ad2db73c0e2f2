"""What a transform is, and what it says of numbers that it does not take."""

from __future__ import annotations

from math import inf, isfinite
from numbers import Real

import torch
from torch import Tensor

from openreml_nn.support.errors import InputError

__all__ = [
    "POSITIVE",
    "REALS",
    "Interval",
    "Transform",
    "check_inside",
    "check_tensor",
    "finite_number",
    "interval_text",
]

#: The ends of an open interval.
Interval = tuple[float, float]

REALS: Interval = (-inf, inf)
POSITIVE: Interval = (0.0, inf)


class Transform:
    r"""Elementwise differentiable bijection :math:`\varphi = t(x)` of intervals.

    Subclasses implement :meth:`__call__`, :meth:`inverse` and :meth:`grad`,
    each mapping a tensor of any shape to a tensor of the same shape, and
    declare :attr:`domain` and :attr:`codomain` where they are not the whole
    line.

    Estimation does not step in :math:`x` when :math:`x \to -\infty` is an
    ordinary answer (a variance of zero): then the transform :attr:`vanishes`.
    It steps in the *coordinate* :math:`u`, in which the model is smooth across
    that point. By default :math:`\varphi = L + u^2` with L the lower end of
    the codomain, so that the coordinate of a variance is the standard
    deviation.

    The coordinate may have boundary points, :attr:`bounds`. The model is even
    about each, so that a coordinate beyond one stands for its mirror image, as
    a negative standard deviation for a positive one: see :meth:`fold`.
    """

    @property
    def domain(self) -> Interval:
        """Open interval of the numbers that the transform takes."""
        return REALS

    @property
    def codomain(self) -> Interval:
        """Open interval of the values that the transform yields."""
        return REALS

    @property
    def vanishes(self) -> bool:
        """Whether the coordinate is bounded below by zero, so that zero is a boundary."""
        return False

    def __call__(self, x: Tensor) -> Tensor:
        """Value :math:`t(x)`."""
        raise NotImplementedError(f"{type(self).__name__} does not implement __call__")

    def inverse(self, value: Tensor) -> Tensor:
        r"""Unconstrained number :math:`t^{-1}(\varphi)`; infinite at an end of the codomain.

        Raises:
            TypeError: if ``value`` is not a tensor.
            InputError: if a value is NaN or outside the codomain (a ValueError).
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement inverse")

    def grad(self, x: Tensor) -> Tensor:
        """Elementwise derivative :math:`t'(x)`, of the shape of ``x``."""
        raise NotImplementedError(f"{type(self).__name__} does not implement grad")

    def coordinate(self, x: Tensor) -> Tensor:
        """Coordinate :math:`u(x)` in which estimation steps."""
        return torch.sqrt(self(x) - self.codomain[0]) if self.vanishes else check_tensor(x)

    def from_coordinate(self, u: Tensor) -> Tensor:
        """Unconstrained number :math:`x(u)`."""
        check_tensor(u, "u")
        return self.inverse(self.codomain[0] + u * u) if self.vanishes else u

    def at_coordinate(self, u: Tensor) -> Tensor:
        """Value :math:`t(x(u))`, smooth in ``u`` also where ``x(u)`` is infinite."""
        check_tensor(u, "u")
        return self.codomain[0] + u * u if self.vanishes else self(u)

    @property
    def bounds(self) -> tuple[float, ...]:
        """Boundary points of the coordinate."""
        return (0.0,) if self.vanishes else ()

    def fold(self, u: float) -> float:
        """The coordinate within its bounds that means the same as ``u``."""
        return abs(u) if self.vanishes else u

    def _arguments(self) -> dict[str, object]:
        """What it was made with; what a constructor derived has an underscore."""
        return {k: v for k, v in self.__dict__.items() if not k.startswith("_")}

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        return hash((type(self), repr(self)))

    def __repr__(self) -> str:
        args = ", ".join(f"{key}={value!r}" for key, value in self._arguments().items())
        return f"{type(self).__name__}({args})"


def check_tensor(x: Tensor, name: str = "x") -> Tensor:
    """What a transform was given, which is a tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"`{name}` is a {type(x).__name__}: expected a tensor")
    if x.is_complex():
        raise TypeError(f"`{name}` is {x.dtype}: expected a tensor of real numbers")
    return x


def check_inside(value: Tensor, trans: Transform) -> Tensor:
    """The value, which lies in the closure of a transform's codomain."""
    check_tensor(value, "value")
    if value.is_meta or torch._C._functorch.is_functorch_wrapped_tensor(value):
        return value
    low, high = trans.codomain
    outside = ~((value >= low) & (value <= high))  # also NaN
    if bool(outside.any()):
        found = float(value[outside].flatten()[0])
        raise InputError(
            f"`value` is {found:.6g}: {trans!r} yields numbers in {interval_text(trans.codomain)}"
        )
    return value


def finite_number(name: str, value: float) -> float:
    """An argument of a transform as a float."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"`{name}` is {value!r}: expected a number")
    if not isfinite(value):
        raise InputError(f"`{name}` is {value}: expected a finite number")
    return float(value)


def interval_text(interval: Interval) -> str:
    """An interval as messages have it."""
    low, high = (end + 0.0 for end in interval)  # no minus zero
    return f"({low:.6g}, {high:.6g})"
