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
    shown,
)
from openreml_nn.errors import InputError

__all__ = ["TransformChain"]


class TransformChain(Transform):
    r"""Composition :math:`t(x) = t_m(\dots t_1(x))`; the first in the list acts first.

    Its domain and codomain follow from those of its elements. If the last
    element vanishes and those before it reach every real number, as in
    :math:`e^{ax+b}`, the coordinate is that element's; so a chain of one
    transform is that transform. If another element vanishes, as in
    :math:`e^x + b`, the chain does, and the coordinate is the square root of
    what the value has above the lower end of the codomain.

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
        # Which element's zero the chain can reach.
        self._vanishing: int | None = None
        for i, element in enumerate(self.chain):
            if element.vanishes and self._codomain == REALS:
                self._vanishing = i
            self._codomain = _image(element, self._codomain)

    def _taken(self) -> Interval:
        """The numbers that every element can take in its turn."""
        taken = REALS
        for element in reversed(self.chain):
            low, high = element.codomain
            common = max(low, taken[0]), min(high, taken[1])
            if common[0] >= common[1]:
                raise InputError(
                    f"`chain` holds {element!r}, which yields numbers in {shown((low, high))}, "
                    f"before one that takes those in {shown(taken)}"
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
        bounded = isfinite(self.codomain[0]) and self.codomain[1] == inf
        return self._last or (self._vanishing is not None and bounded)

    @property
    def _last(self) -> bool:
        """Whether the coordinate is that of the last element."""
        return self._vanishing == len(self.chain) - 1

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
        if not self._last:
            return super().coordinate(x)
        for element in self.chain[:-1]:
            x = element(x)
        return self.chain[-1].coordinate(x)

    def from_coordinate(self, u: Tensor) -> Tensor:
        if not self._last:
            return super().from_coordinate(u)
        return self._back(self.chain[-1].from_coordinate(u), len(self.chain) - 1)

    def at_coordinate(self, u: Tensor) -> Tensor:
        return self.chain[-1].at_coordinate(u) if self._last else super().at_coordinate(u)


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
