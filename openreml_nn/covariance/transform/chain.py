"""Transforms one after another."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, isfinite, isnan

import torch
from torch import Tensor

from openreml_nn.covariance.transform.base import (
    REALS,
    Interval,
    Transform,
    check_inside,
    check_tensor,
    interval_text,
)
from openreml_nn.covariance.transform.elementary import TransformIdentity, TransformScaleShift
from openreml_nn.support.errors import InputError

__all__ = ["TransformChain"]


class TransformChain(Transform):
    r"""Composition :math:`t(x) = t_m(\dots t_1(x))`; the first in the list acts first.

    Its domain and codomain follow from those of its elements. If one of them
    has a coordinate of its own, those before it reach every real number and
    those after it are linear, as in :math:`e^{ax+b}` and :math:`e^x + b`, the
    coordinate is that element's; so a chain of one transform is that
    transform. If those after it are not, as in :math:`(e^x)^2`, and the chain
    vanishes as well, the coordinate is that of any :class:`Transform` that
    vanishes.

    Args:
        chain: a transform or a sequence of transforms.

    Raises:
        TypeError: if an element is not a :class:`Transform`.
        InputError: if there is no element, or one takes no number that those
            before it yield (a ValueError).

    >>> from openreml_nn.covariance.transform import TransformScaleShift, TransformSigmoid
    >>> correlation = TransformChain([TransformSigmoid(), TransformScaleShift(2.0, -1.0)])
    >>> correlation(torch.tensor([0.0]))
    tensor([0.])
    >>> correlation.codomain
    (-1.0, 1.0)
    """

    def __init__(self, chain: Transform | Sequence[Transform]) -> None:
        if not isinstance(chain, Transform | Sequence) or isinstance(chain, str):
            raise TypeError(f"`chain` is {chain!r}: expected a sequence of Transform instances")
        self.chain = (chain,) if isinstance(chain, Transform) else tuple(chain)
        for element in self.chain:
            if not isinstance(element, Transform):
                raise TypeError(
                    f"`chain` holds a {type(element).__name__}: expected Transform instances"
                )
        if not self.chain:
            raise InputError("`chain` is empty: expected at least one Transform")
        self._domain = self._codomain = self._taken()
        #: Position of the element whose coordinate the chain has, if there is one.
        self._kept: int | None = None
        reached = False
        for i, element in enumerate(self.chain):
            if self._codomain == REALS:
                reached = reached or element.vanishes
                if element.bounds and all(_is_linear(e) for e in self.chain[i + 1 :]):
                    self._kept = i
            self._codomain = _image(element, self._codomain)
        bounded = isfinite(self._codomain[0]) and self._codomain[1] == inf
        self._vanishes = reached and bounded

    def _taken(self) -> Interval:
        """The numbers that every element can take in its turn."""
        taken = REALS
        for element in reversed(self.chain):
            low, high = element.codomain
            common = max(low, taken[0]), min(high, taken[1])
            if common[0] >= common[1]:
                raise InputError(
                    f"`chain` holds {element!r}, which yields numbers in {interval_text((low, high))}, "
                    f"before one that takes those in {interval_text(taken)}"
                )
            taken = _preimage(element, common)
        return taken

    @property
    def domain(self) -> Interval:
        return self._domain

    @property
    def codomain(self) -> Interval:
        return self._codomain

    @property
    def vanishes(self) -> bool:
        return self._vanishes if self._kept is None else self.chain[self._kept].vanishes

    @property
    def bounds(self) -> tuple[float, ...]:
        return super().bounds if self._kept is None else self.chain[self._kept].bounds

    def fold(self, u: float) -> float:
        return super().fold(u) if self._kept is None else self.chain[self._kept].fold(u)

    def __call__(self, x: Tensor) -> Tensor:
        check_tensor(x)
        for element in self.chain:
            x = element(x)
        return x

    def inverse(self, value: Tensor) -> Tensor:
        return self._back(check_inside(value, self), len(self.chain))

    def _back(self, value: Tensor, end: int) -> Tensor:
        """The inverse of the elements before ``end``."""
        for element in reversed(self.chain[:end]):
            # Rounding must not carry an end of the chain's codomain across one of the element's.
            value = element.inverse(value.clamp(*element.codomain))
        return value

    def grad(self, x: Tensor) -> Tensor:
        slope = torch.ones_like(check_tensor(x))
        for element in self.chain:
            slope = slope * element.grad(x)
            x = element(x)
        return slope

    def coordinate(self, x: Tensor) -> Tensor:
        if self._kept is None:
            return super().coordinate(x)
        for element in self.chain[: self._kept]:
            x = element(x)
        return self.chain[self._kept].coordinate(x)

    def from_coordinate(self, u: Tensor) -> Tensor:
        if self._kept is None:
            return super().from_coordinate(u)
        return self._back(self.chain[self._kept].from_coordinate(u), self._kept)

    def at_coordinate(self, u: Tensor) -> Tensor:
        if self._kept is None:
            return super().at_coordinate(u)
        value = self.chain[self._kept].at_coordinate(u)
        for element in self.chain[self._kept + 1 :]:
            value = element(value)
        return value


def _is_linear(element: Transform) -> bool:
    return isinstance(element, TransformScaleShift | TransformIdentity)


def _image(element: Transform, taken: Interval) -> Interval:
    """Where a monotone transform takes an interval."""
    low, high = max(taken[0], element.domain[0]), min(taken[1], element.domain[1])
    if (low, high) == element.domain:
        return element.codomain
    first, last = sorted(element(_numbers((low, high))).tolist())
    # A transform of a user need not know infinity.
    return element.codomain if isnan(first) or isnan(last) else (first, last)


def _preimage(element: Transform, yielded: Interval) -> Interval:
    """From where a monotone transform reaches an interval within its codomain."""
    if yielded == element.codomain:
        return element.domain
    first, last = sorted(element.inverse(_numbers(yielded)).tolist())
    return element.domain if isnan(first) or isnan(last) else (first, last)


def _numbers(ends: Interval) -> Tensor:
    # Not on the default device, which may be one without numbers.
    return torch.tensor(ends, dtype=torch.float64, device="cpu")
