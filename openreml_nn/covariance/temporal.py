"""Correlation in time beyond the first-order autoregression in whole steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from openreml_nn.covariance.exchangeable import within_bounds
from openreml_nn.covariance.kernel import check_symmetric
from openreml_nn.covariance.matrix import FreeParams, Matrix
from openreml_nn.covariance.params import free_specs, merge_specs
from openreml_nn.covariance.start import harmonic_mean
from openreml_nn.covariance.transform import TransformExpPow2, TransformSigmoid
from openreml_nn.support.checks import check_count
from openreml_nn.support.errors import InputError

__all__ = ["ARMAMatrix", "ContinuousAR1Matrix"]

#: Between these is -log rho at a start: a step in the angle of rho has no digits beyond them.
_SLOWEST, _FASTEST = 1e-11, 60.0


class ContinuousAR1Matrix(Matrix):
    r"""Autoregression in continuous time, :math:`V_{ij} = \sigma^2 \rho^{d_{ij}}`, also known as
    the Ornstein–Uhlenbeck covariance.

    =========== ============== =======
    parameter   transform      default
    =========== ============== =======
    ``sigma^2`` :math:`e^{2x}` 0
    ``rho``     sigmoid        0
    =========== ============== =======

    ``rho`` is the correlation of two times that are one unit apart.

    Args:
        distance: (n, n) differences of times, :math:`|t_i - t_j|`.
        param_specs: specifications that replace the ones above.

    Shape:
        Output: (n, n).

    Raises:
        InputError: if ``distance`` is not symmetric with zeros on its diagonal and no negative
            entry.

    Reference:
        Pinheiro and Bates, Mixed-Effects Models in S and S-PLUS (2000), section 5.3.1.

    >>> ContinuousAR1Matrix(torch.tensor([[0.0, 2.0], [2.0, 0.0]]))(torch.zeros(2))
    tensor([[1.0000, 0.2500],
            [0.2500, 1.0000]])
    """

    distance: Tensor

    def __init__(self, distance: Tensor, param_specs: Mapping[str, Any] | None = None) -> None:
        check_symmetric("distance", distance)
        if bool((distance < 0).any()) or bool((distance.diagonal() != 0).any()):
            raise InputError(
                "`distance` has a negative entry or one on the diagonal that is not zero: expected "
                "differences of times"
            )
        default = free_specs(["sigma^2"], trans=TransformExpPow2())
        default |= free_specs(["rho"], trans=TransformSigmoid())
        super().__init__(tuple(distance.shape), merge_specs(default, param_specs))
        self.register_data("distance", distance)

    def forward(self, free_params: FreeParams = None) -> Tensor:
        variance, rho = self.build_params(free_params).split(1)
        return variance * torch.exp(rho.log() * self.distance.to(rho))

    def manual_grad(self, free_params: FreeParams = None) -> tuple[Tensor | None, list[str]]:
        variance, rho = self.build_params(free_params).split(1)
        d = self.distance.to(rho)
        R = torch.exp(rho.log() * d)
        return self.free_grad(torch.stack([R, variance * d * R / rho]), free_params)

    def moment_start(self, variance: Tensor) -> bool:
        self.start_reach(1 / 3)
        return self.set_start(self.param_names[0], harmonic_mean(variance))

    def start_reach(self, reach: float) -> bool:
        apart = self.distance[self.distance > 0]
        if not apart.numel():
            return False
        rate = float(1 / (reach * apart.median()))
        if self.param_names[1] in self.free_param_names and not _SLOWEST < rate < _FASTEST:
            raise InputError(
                f"times are {float(apart.median()):.3g} apart (their median) and `rho` is the "
                "correlation at a distance of 1, which has no digits there: expected times in a "
                "unit nearer to their distances, or exponential(…), whose length has any unit"
            )
        return self.set_start(self.param_names[1], apart.new_tensor(-rate).exp())


class ARMAMatrix(Matrix):
    r"""ARMA(1, 1): :math:`V_{ij} = \sigma^2` on the diagonal and
    :math:`\sigma^2 \gamma \varphi^{|i-j|-1}` off it, with
    :math:`\gamma = (1 + \varphi\theta)(\varphi + \theta) / (1 + 2\varphi\theta + \theta^2)`.

    =========== ================================ =======
    parameter   transform                        default
    =========== ================================ =======
    ``sigma^2`` :math:`e^{2x}`                   0
    ``phi``     sigmoid, scaled to (−1, 1)       0
    ``theta``   sigmoid, scaled to (−1, 1)       0
    =========== ================================ =======

    Where ``phi`` is minus ``theta`` there is no correlation, and the data cannot tell them apart.

    Args:
        n: size.
        param_specs: specifications that replace the ones above.

    Shape:
        Output: (n, n).

    Reference:
        Box, Jenkins and Reinsel, Time Series Analysis (1994), section 3.4.

    >>> ARMAMatrix(3)(torch.tensor([0.0, 1.0986123, 0.0]))
    tensor([[1.0000, 0.5000, 0.2500],
            [0.5000, 1.0000, 0.5000],
            [0.2500, 0.5000, 1.0000]])
    """

    def __init__(self, n: int, param_specs: Mapping[str, Any] | None = None) -> None:
        n = check_count("n", n, 1)
        default = free_specs(["sigma^2"], trans=TransformExpPow2())
        default |= free_specs(["phi", "theta"], trans=within_bounds(-1.0, 1.0))
        super().__init__((n, n), merge_specs(default, param_specs))

    def forward(self, free_params: FreeParams = None) -> Tensor:
        variance, phi, theta = self.build_params(free_params).split(1)
        gamma = (1 + phi * theta) * (phi + theta) / (1 + 2 * phi * theta + theta**2)
        lags = torch.cat([torch.ones_like(gamma), gamma * self._powers(phi)])
        return variance * self._banded(lags)

    def _powers(self, phi: Tensor) -> Tensor:
        r""":math:`\varphi^{l-1}` for the lags l = 1 … n - 1."""
        # By products: the second derivative of a power is NaN at zero in torch.
        powers, step = torch.ones_like(phi), phi
        while len(powers) < self.shape[0]:
            powers = torch.cat([powers, powers * step])
            step = step * step
        return powers[: self.shape[0] - 1]

    def _banded(self, lags: Tensor) -> Tensor:
        """The symmetric matrix with one value for each lag."""
        at = torch.arange(self.shape[0], device=lags.device)
        return lags[(at[:, None] - at).abs()]

    def manual_grad(self, free_params: FreeParams = None) -> tuple[Tensor | None, list[str]]:
        variance, phi, theta = self.build_params(free_params).split(1)
        powers, zero = self._powers(phi), torch.zeros_like(phi)
        top, bottom = (1 + phi * theta) * (phi + theta), 1 + 2 * phi * theta + theta**2
        gamma = top / bottom
        by_phi = (theta * (phi + theta) + 1 + phi * theta - gamma * 2 * theta) / bottom
        by_theta = (phi * (phi + theta) + 1 + phi * theta - gamma * 2 * (phi + theta)) / bottom
        steps = (
            torch.arange(1, max(len(powers), 1), dtype=phi.dtype, device=phi.device) * powers[:-1]
        )
        rising = torch.cat([zero, steps])[: len(powers)]
        slices = [
            self._banded(torch.cat([torch.ones_like(gamma), gamma * powers])),
            variance * self._banded(torch.cat([zero, by_phi * powers + gamma * rising])),
            variance * self._banded(torch.cat([zero, by_theta * powers])),
        ]
        return self.free_grad(torch.stack(slices), free_params)

    def moment_start(self, variance: Tensor) -> bool:
        for name in self.param_names[1:]:
            self.set_start(name, torch.zeros_like(variance[0]))
        return self.set_start(self.param_names[0], harmonic_mean(variance))

    def start_reach(self, reach: float) -> bool:
        return self.set_start(self.param_names[1], torch.tensor(reach))
