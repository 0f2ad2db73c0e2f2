"""Kernels of geostatistics beside the spherical one: linear, and rational quadratic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from openreml_nn.covariance.correlation import Correlation
from openreml_nn.covariance.kernel import DistanceMatrix

__all__ = [
    "LinearCorrelation",
    "LinearMatrix",
    "RationalQuadraticCorrelation",
    "RationalQuadraticMatrix",
]


@dataclass(frozen=True)
class LinearCorrelation(Correlation):
    r""":math:`1 - r` for r < 1, zero beyond.

    It is a correlation in one dimension only.

    >>> LinearCorrelation().value(torch.tensor([0.0, 0.25, 2.0]))
    tensor([1.0000, 0.7500, 0.0000])
    """

    # A fit starts with a length that most pairs are within.
    reach: ClassVar[float] = 3.0
    ends: ClassVar[bool] = True
    kink: ClassVar[float | None] = 1.0

    def value(self, r: Tensor) -> Tensor:
        return 1 - r.clamp(max=1)

    def slope(self, r: Tensor) -> Tensor:
        return torch.where(r < 1, r, 0.0)

    def bend(self, r: Tensor) -> Tensor:
        return -self.slope(r)


@dataclass(frozen=True)
class RationalQuadraticCorrelation(Correlation):
    r""":math:`1 / (1 + r^2)`.

    >>> RationalQuadraticCorrelation().value(torch.tensor([0.0, 1.0]))
    tensor([1.0000, 0.5000])
    """

    def value(self, r: Tensor) -> Tensor:
        return 1 / (1 + r * r)

    def slope(self, r: Tensor) -> Tensor:
        return 2 * r * r / (1 + r * r) ** 2

    def bend(self, r: Tensor) -> Tensor:
        square = r * r
        return 4 * square * (square - 1) / (1 + square) ** 3


class LinearMatrix(DistanceMatrix):
    r"""Linear covariance :math:`V_{ij} = \sigma^2 (1 - r)` for :math:`r = d_{ij}/\ell < 1`, zero
    beyond.

    =============== ============== =======
    parameter       transform      default
    =============== ============== =======
    ``sigma^2``     :math:`e^{2x}` 0
    ``lengthscale`` :math:`e^x`    0
    =============== ============== =======

    It is a covariance in one dimension only; ``lengthscale`` is the range.

    Args:
        distance: (n, n) distances.
        param_specs: specifications that replace the ones above.

    Shape:
        Output: (n, n).

    Raises:
        InputError: as in :class:`ExponentialMatrix`.

    Reference:
        Pinheiro and Bates, Mixed-Effects Models in S and S-PLUS (2000), section 5.3.2.

    >>> LinearMatrix(torch.tensor([[0.0, 0.25], [0.25, 0.0]]))(torch.zeros(2))
    tensor([[1.0000, 0.7500],
            [0.7500, 1.0000]])
    """

    correlation = LinearCorrelation()


class RationalQuadraticMatrix(DistanceMatrix):
    r"""Rational quadratic covariance :math:`V_{ij} = \sigma^2 / (1 + d_{ij}^2 / \ell^2)`.

    =============== ============== =======
    parameter       transform      default
    =============== ============== =======
    ``sigma^2``     :math:`e^{2x}` 0
    ``lengthscale`` :math:`e^x`    0
    =============== ============== =======

    Args:
        distance: (n, n) distances, such as
            ``torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")``.
        param_specs: specifications that replace the ones above.

    Shape:
        Output: (n, n).

    Raises:
        InputError: as in :class:`ExponentialMatrix`.

    Reference:
        Pinheiro and Bates, Mixed-Effects Models in S and S-PLUS (2000), section 5.3.2.

    >>> RationalQuadraticMatrix(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))(torch.zeros(2))
    tensor([[1.0000, 0.5000],
            [0.5000, 1.0000]])
    """

    correlation = RationalQuadraticCorrelation()
