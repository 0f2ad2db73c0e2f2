"""Correlation in time beyond the first-order autoregression in whole steps."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf, log, pi, remainder
from typing import Any

import torch
from torch import Tensor

from openreml_nn.covariance.exchangeable import within_bounds
from openreml_nn.covariance.matrix import FreeParams, Matrix
from openreml_nn.covariance.nodes import has_values
from openreml_nn.covariance.params import free_specs, merge_specs
from openreml_nn.covariance.spaced import SpacedMatrix, check_distance, shortest
from openreml_nn.covariance.start import harmonic_mean
from openreml_nn.covariance.transform import TransformExpPow2, TransformSigmoid
from openreml_nn.support.checks import check_count
from openreml_nn.support.errors import InputError, NumericalError

__all__ = ["ARMAMatrix", "ContinuousAR1Matrix"]

#: -log rho at a start is not below this: beyond it rho has no digits in float64.
_SLOWEST = 1e-11
_INSTEAD = "expected times in a unit nearer to their distances, or exponential(…), whose length has any unit"
#: The correlation at the shortest distance that counts as none.
_NONE = 1e-20


class _Decay(TransformSigmoid):
    r"""A sigmoid :math:`\rho = 1 / (1 + e^{-x})` of which a fit sees :math:`\rho^m`.

    Estimation steps in the angle u of :math:`\rho^m = (1 + \sin u)/2` with m the shortest distance
    between two times. All correlations are powers of :math:`\rho^m` of exponents that are not below 1,
    so that they are smooth in u, and u does not depend on the unit of times.

    Args:
        unit: the shortest distance m.
    """

    def __init__(self, unit: float) -> None:
        self.unit = unit
        self._lowest = self._angle(torch.tensor(_NONE, dtype=torch.float64).log()).item()

    @property
    def bounds(self) -> tuple[float, ...]:  # type: ignore[override]
        return (self._lowest, pi / 2)

    @staticmethod
    def _angle(log_t: Tensor) -> Tensor:
        # By what keeps its digits at both ends.
        return 2 * torch.atan2((log_t / 2).exp(), (-torch.expm1(log_t)).sqrt()) - pi / 2

    @staticmethod
    def _log(u: Tensor) -> Tensor:
        """log t of t = (1 + sin u)/2."""
        s, c = torch.sin((pi / 2 + u) / 2), torch.sin((pi / 2 - u) / 2)
        near = torch.log1p(-(c * c).clamp(max=0.75))
        # Not of |s|: torch takes its second derivative by way of its compiler, which takes seconds to import.
        return torch.where(s < c, (s * s).log(), near)

    def coordinate(self, x: Tensor) -> Tensor:
        u = self._angle(self.unit * torch.nn.functional.logsigmoid(x))
        return u.clamp(min=self._lowest)

    def from_coordinate(self, u: Tensor) -> Tensor:
        log_rho = self._log(u) / self.unit
        x = log_rho - torch.log(-torch.expm1(log_rho))
        return torch.where(u > self._lowest, x, -inf)

    def at_coordinate(self, u: Tensor) -> Tensor:
        return torch.exp(self._log(u) / self.unit)

    def fold(self, u: float) -> float:
        low, high = self.bounds
        u = abs(remainder(u - low, 2 * (high - low)))
        return low + u

    def __eq__(self, other: object) -> bool:
        # The same function of x, in whatever coordinate a fit sees it: such parameters can be tied.
        return type(self) is type(other)

    def __hash__(self) -> int:
        return hash(type(self))


class ContinuousAR1Matrix(SpacedMatrix):
    r"""Autoregression in continuous time, :math:`V_{ij} = \sigma^2 \rho^{d_{ij}}`, also known as
    the Ornstein–Uhlenbeck covariance.

    =========== ============== =======
    parameter   transform      default
    =========== ============== =======
    ``sigma^2`` :math:`e^{2x}` 0
    ``rho``     sigmoid        0
    =========== ============== =======

    ``rho`` is the correlation of two times that are one unit apart. A fit does not depend on that
    unit, as far as rho has digits: from :math:`10^{-138}` to :math:`1 - 10^{-11}`.

    Args:
        distance: (n, n) differences of times, :math:`|t_i - t_j|`; or the times themselves, (n,), in any
            order.
        param_specs: specifications that replace the ones above.

    Shape:
        Output: (n, n).

    Raises:
        TypeError, InputError: if ``distance`` is not symmetric with zeros on its diagonal and no
            negative entry, nor (n,) distinct times.
        NumericalError: if rho is so small that it has no digits.

    Reference:
        Pinheiro and Bates, Mixed-Effects Models in S and S-PLUS (2000), section 5.3.1.

    >>> ContinuousAR1Matrix(torch.tensor([[0.0, 2.0], [2.0, 0.0]]))(torch.zeros(2))
    tensor([[1.0000, 0.2500],
            [0.2500, 1.0000]])
    """

    def __init__(self, distance: Tensor, param_specs: Mapping[str, Any] | None = None) -> None:
        check_distance(distance, "differences of times")
        default = free_specs(["sigma^2"], trans=TransformExpPow2())
        default |= free_specs(["rho"], trans=_Decay(shortest(distance)))
        super().__init__(distance, merge_specs(default, param_specs))

    def rate(self) -> Tensor:
        _, rho = self._checked(None)
        # A correlation of zero is none between any times, and stays so when it moves.
        none = -40 * log(_NONE) / shortest(self.distance)
        return torch.where(rho > 0, -torch.where(rho > 0, rho, 0.5).log(), none)

    def _parts(self, free_params: FreeParams) -> tuple[Tensor, Tensor, Tensor]:
        """Variance, rho and the distances."""
        variance, rho = self._checked(free_params)
        return variance, rho, self.apart().to(rho)

    def _checked(self, free_params: FreeParams) -> tuple[Tensor, Tensor]:
        """Variance and rho."""
        variance, rho = self.build_params(free_params).split(1)
        x = None if free_params is not None else self.stored(self.param_names[1]).detach()
        # Values in place of the stored one may be many at a time, which cannot be looked at.
        looked = x is not None and has_values(x) and has_values(rho) and -inf < float(x)
        if looked and not float(rho.detach()) >= _smallest(rho):
            raise NumericalError(
                f"`rho`, the correlation at a distance of 1, is below {_smallest(rho):.0e}, where "
                f"{rho.dtype} has no digits: {_INSTEAD}"
            )
        return variance, rho

    def forward(self, free_params: FreeParams = None) -> Tensor:
        variance, rho, d = self._parts(free_params)
        powers = torch.where(rho > 0, torch.where(rho > 0, rho, 1) ** d, d == 0)
        return variance * self.together(powers)

    def manual_grad(self, free_params: FreeParams = None) -> tuple[Tensor | None, list[str]]:
        variance, rho, d = self._parts(free_params)
        slope = torch.where((d > 0) & (rho > 0), d * rho ** (d - 1), 0)
        slices = self.together(torch.stack([rho**d, variance * slope]))
        return self.free_grad(slices, free_params)

    def moment_start(self, variance: Tensor) -> bool:
        self.start_reach(1 / 3)
        return self.set_start(self.param_names[0], harmonic_mean(variance))

    def start_reach(self, reach: float) -> bool:
        apart = self.spread()
        if not apart.numel():
            return False
        rate = float(1 / (reach * apart.median()))
        start = apart.new_tensor(-rate).exp()
        has_digits = rate >= _SLOWEST and float(start) >= _smallest(start)
        if self.param_names[1] in self.free_param_names and not has_digits:
            raise InputError(
                f"times are {float(apart.median()):.3g} apart (their median) and `rho` is the "
                f"correlation at a distance of 1, which has no digits there: {_INSTEAD}"
            )
        return self.set_start(self.param_names[1], start)


def _smallest(like: Tensor) -> float:
    """The least rho above zero of whose inverse the square has digits, as second derivatives take it."""
    return float(torch.finfo(like.dtype).tiny ** 0.45)


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

    Raises:
        TypeError, InputError: if ``n`` is no whole number of 1 or more, or a specification is
            invalid.

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
