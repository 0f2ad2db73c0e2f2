r"""Correlations that depend on a distance.

With :math:`r = d / \ell` a correlation is c(r); its derivatives are those by :math:`\log\ell`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import ClassVar

import torch
from torch import Tensor

from openreml_nn.support.checks import found
from openreml_nn.support.errors import InputError

__all__ = [
    "Correlation",
    "ExponentialCorrelation",
    "GaussianCorrelation",
    "MaternCorrelation",
    "SphericalCorrelation",
]


class Correlation:
    """A correlation :math:`c(r)` that falls with the distance, in lengths.

    Attributes:
        reach: the length at which a fit starts, beside that of a correlation without an end.
        ends: whether it is zero from r = 1 on.
        kink: the r at which the first derivative jumps; None for none.
        is_markov: whether it is :math:`e^{-r}`: on a line each place depends on those before it through
            the last alone.
    """

    reach: ClassVar[float] = 1.0
    ends: ClassVar[bool] = False
    kink: ClassVar[float | None] = None

    @property
    def is_markov(self) -> bool:
        return False

    def kinks(self, distance: Tensor) -> Tensor:
        """The lengths at which one of some distances is at the kink, in order."""
        if self.kink is None:
            return distance.new_empty(0)
        return (distance[distance > 0] / self.kink).unique()

    def value(self, r: Tensor) -> Tensor:
        """:math:`c(r)`."""
        raise NotImplementedError

    def slope(self, r: Tensor) -> Tensor:
        r"""The first derivative by :math:`\log\ell`, :math:`-r c'(r)`."""
        raise NotImplementedError

    def bend(self, r: Tensor) -> Tensor:
        r"""The second derivative by :math:`\log\ell`, :math:`r (r c'(r))'`."""
        raise NotImplementedError


@dataclass(frozen=True)
class ExponentialCorrelation(Correlation):
    """:math:`e^{-r}`.

    >>> ExponentialCorrelation().value(torch.tensor([0.0, 1.0]))
    tensor([1.0000, 0.3679])
    """

    @property
    def is_markov(self) -> bool:
        return True

    def value(self, r: Tensor) -> Tensor:
        return torch.exp(-r)

    def slope(self, r: Tensor) -> Tensor:
        return r * torch.exp(-r)

    def bend(self, r: Tensor) -> Tensor:
        return r * (r - 1) * torch.exp(-r)


@dataclass(frozen=True)
class GaussianCorrelation(Correlation):
    """:math:`e^{-r^2/2}`.

    >>> GaussianCorrelation().value(torch.tensor([0.0, 1.0]))
    tensor([1.0000, 0.6065])
    """

    def value(self, r: Tensor) -> Tensor:
        return torch.exp(-r * r / 2)

    def slope(self, r: Tensor) -> Tensor:
        return r * r * torch.exp(-r * r / 2)

    def bend(self, r: Tensor) -> Tensor:
        return r * r * (r * r - 2) * torch.exp(-r * r / 2)


@dataclass(frozen=True)
class MaternCorrelation(Correlation):
    r"""With :math:`s = \sqrt{2\nu}\, r`: :math:`e^{-s}`, :math:`(1+s)e^{-s}` or
    :math:`(1+s+s^2/3)e^{-s}`.

    Args:
        nu: 0.5, 1.5 or 2.5.

    Raises:
        InputError: if ``nu`` is another number.

    >>> MaternCorrelation(1.5).value(torch.tensor([0.0, 1.0]))
    tensor([1.0000, 0.4834])
    """

    nu: float = 1.5

    def __post_init__(self) -> None:
        if not isinstance(self.nu, int | float) or self.nu not in (0.5, 1.5, 2.5):
            raise InputError(f"`nu` is {found(self.nu)}: expected 0.5, 1.5 or 2.5")

    @property
    def is_markov(self) -> bool:
        return self.nu == 0.5

    def value(self, r: Tensor) -> Tensor:
        s = sqrt(2 * self.nu) * r
        match self.nu:
            case 0.5:
                return torch.exp(-s)
            case 1.5:
                return (1 + s) * torch.exp(-s)
        return (1 + s + s * s / 3) * torch.exp(-s)

    def slope(self, r: Tensor) -> Tensor:
        s = sqrt(2 * self.nu) * r
        match self.nu:
            case 0.5:
                return s * torch.exp(-s)
            case 1.5:
                return s * s * torch.exp(-s)
        return s * s * (1 + s) / 3 * torch.exp(-s)

    def bend(self, r: Tensor) -> Tensor:
        s = sqrt(2 * self.nu) * r
        match self.nu:
            case 0.5:
                return s * (s - 1) * torch.exp(-s)
            case 1.5:
                return s * s * (s - 2) * torch.exp(-s)
        return s * s * (s * s - 2 * s - 2) / 3 * torch.exp(-s)


@dataclass(frozen=True)
class SphericalCorrelation(Correlation):
    r""":math:`1 - \tfrac32 r + \tfrac12 r^3` for r < 1, zero beyond.

    It is a correlation in up to three dimensions.

    >>> SphericalCorrelation().value(torch.tensor([0.0, 0.5]))
    tensor([1.0000, 0.3125])
    """

    # A fit starts with a length that most pairs are within.
    reach: ClassVar[float] = 3.0
    ends: ClassVar[bool] = True

    def value(self, r: Tensor) -> Tensor:
        inner = r.clamp(max=1)
        return 1 - 1.5 * inner + 0.5 * inner**3

    def slope(self, r: Tensor) -> Tensor:
        inner = r.clamp(max=1)
        return 1.5 * (inner - inner**3)

    def bend(self, r: Tensor) -> Tensor:
        return torch.where(r < 1, 1.5 * r * (3 * r * r - 1), 0.0)
