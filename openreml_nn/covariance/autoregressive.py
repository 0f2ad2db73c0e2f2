"""Correlation that decays along an order: time, or position in a row."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openreml_nn.covariance.exchangeable import within_bounds
from openreml_nn.covariance.matrix import FreeParams, Matrix, differentiated
from openreml_nn.covariance.params import free_specs, merge_specs
from openreml_nn.covariance.start import harmonic_mean
from openreml_nn.covariance.transform import TransformExpPow2
from openreml_nn.support.checks import check_count
from openreml_nn.support.errors import InputError
from openreml_nn.terms.covariance import DenseCovariance
from openreml_nn.terms.design import IdentityDesign
from openreml_nn.terms.precision import PrecisionCovariance
from openreml_nn.terms.series import LONG, SeriesPrecision
from openreml_nn.terms.term import Term

__all__ = ["AR1Matrix", "StationaryMatrix", "ToeplitzMatrix"]


def _lags(n: int, like: Tensor) -> Tensor:
    """|i - j|, (n, n), as numbers."""
    at = torch.arange(n, dtype=like.dtype, device=like.device)
    return (at[:, None] - at).abs()


def _banded(values: Tensor) -> Tensor:
    """The symmetric matrix with one value for each lag, (…, n) to (…, n, n)."""
    # Row i is the window that starts n - 1 - i places into n-1, …, 1, 0, 1, …, n-1.
    n = values.shape[-1]
    mirrored = torch.cat([values.flip(-1), values[..., 1:]], -1)
    return mirrored.unfold(-1, n, 1).flip(-2)


def _times(a: Tensor, b: Tensor) -> Tensor:
    """Products of numbers with their derivatives, which stand below them: by the product rule."""
    return torch.cat([a[:1] * b[:1], a[1:] * b[:1] + a[:1] * b[1:]])


def _diagonal_sums(cotangent: Tensor, count: int) -> Tensor:
    """Sums of a square matrix over both diagonals of lag 0 … count - 1."""
    n = cotangent.shape[0]
    lags = _lags(n, cotangent).long().reshape(-1)
    sums = cotangent.new_zeros(n).index_add(0, lags, cotangent.reshape(-1))
    return sums[:count]


class AR1Matrix(Matrix):
    r"""First-order autoregressive covariance :math:`V_{ij} = \sigma^2 \rho^{|i-j|}`.

    =========== ================================ =======
    parameter   transform                        default
    =========== ================================ =======
    ``sigma^2`` :math:`e^{2x}`                   0
    ``rho``     sigmoid, scaled to (−1, 1)       0
    =========== ================================ =======

    Args:
        n: size.
        param_specs: specifications that replace the ones above.

    Shape:
        Output: (n, n).

    Raises:
        TypeError, InputError: if ``n`` is no whole number of 1 or more, or a specification is
            invalid.

    >>> AR1Matrix(3)(torch.tensor([0.0, 1.0986123]))
    tensor([[1.0000, 0.5000, 0.2500],
            [0.5000, 1.0000, 0.5000],
            [0.2500, 0.5000, 1.0000]])
    """

    def __init__(self, n: int, param_specs: Mapping[str, Any] | None = None) -> None:
        n = check_count("n", n, 1)
        default = free_specs(["sigma^2"], trans=TransformExpPow2())
        default |= free_specs(["rho"], trans=within_bounds(-1.0, 1.0))
        super().__init__((n, n), merge_specs(default, param_specs))
        self._steps: np.ndarray | None = None

    def _powers(self, rho: Tensor) -> Tensor:
        r""":math:`\rho^l` for the lags l = 0 … n - 1."""
        n = self.shape[0]
        if not differentiated(rho):
            return rho ** torch.arange(n, dtype=rho.dtype, device=rho.device)
        # By products: the second derivative of a power is NaN at zero in torch.
        powers, step = torch.ones_like(rho), rho
        while len(powers) < n:
            powers = torch.cat([powers, powers * step])
            step = step * step
        return powers[:n]

    def _slopes(self, powers: Tensor) -> Tensor:
        """Derivatives of the powers, by shifting them: rho, which may be zero, divides nothing."""
        lag = torch.arange(1, self.shape[0], dtype=powers.dtype, device=powers.device)
        return torch.nn.functional.pad(lag * powers[:-1], (1, 0))

    def forward(self, free_params: FreeParams = None) -> Tensor:
        variance, rho = self.build_params(free_params).split(1)
        if self._steps is not None:
            return variance * SeriesPrecision(self._steps).covariance(rho)
        return _banded(variance * self._powers(rho))

    def manual_grad(self, free_params: FreeParams = None) -> tuple[Tensor | None, list[str]]:
        variance, rho = self.build_params(free_params).split(1)
        if self._steps is not None:
            series = SeriesPrecision(self._steps)
            by_rho = series.covariance_along(rho, torch.ones_like(rho))
            return self.free_grad(
                torch.stack([series.covariance(rho), variance * by_rho]), free_params
            )
        powers = self._powers(rho)
        slices = _banded(torch.stack([powers, variance * self._slopes(powers)]))
        return self.free_grad(slices, free_params)

    def manual_vjp(self, cotangent: Tensor, free_params: FreeParams = None) -> Tensor:
        self.check_cotangent(cotangent)
        if self._steps is not None:
            slices, _ = self.manual_grad(free_params)
            empty = cotangent.new_zeros(0)
            return empty if slices is None else (slices * cotangent).sum((1, 2))
        variance, rho = self.build_params(free_params).split(1)
        powers = self._powers(rho)
        sums = _diagonal_sums(cotangent, self.shape[0])
        pulled = torch.stack([sums @ powers, sums @ (variance * self._slopes(powers))])
        return self.free_vjp(pulled, free_params)

    def structure(self) -> list[Term]:
        n = self.shape[0]
        steps = (np.arange(n) > 0).astype(np.int64) if self._steps is None else self._steps
        if n <= LONG and (steps[1:] > 0).all():
            return [Term(IdentityDesign(n), DenseCovariance(self(), chained=True))]
        return [
            Term(
                IdentityDesign(n), PrecisionCovariance(self.build_params(), SeriesPrecision(steps))
            )
        ]

    def variances(self) -> Tensor:
        return self.build_params()[:1].expand(self.shape[0])

    def at(self, series: Tensor, positions: Tensor) -> AR1Matrix:
        """The process at some of its positions in independent series, with the parameters of this matrix.

        Args:
            series: (n,) which series, in ascending order.
            positions: (n,) which of the rows of this matrix, ascending within a series.

        >>> one = AR1Matrix(3)
        >>> one.at(torch.tensor([0, 0, 1]), torch.tensor([0, 2, 1])).shape
        (3, 3)
        """
        times = positions
        if self._steps is not None:
            times = torch.from_numpy(self._steps).to(positions.device).cumsum(0)[positions]
        later = (series[1:] == series[:-1]).long()
        steps = torch.cat([later[:0].new_zeros(1), later * times.diff()])
        found = copy.copy(self)
        found.known_shape = (len(steps), len(steps))
        found._steps = steps.cpu().numpy()
        return found

    def moment_start(self, variance: Tensor) -> bool:
        self.set_start(self.param_names[1], torch.zeros_like(variance[0]))
        return self.set_start(self.param_names[0], harmonic_mean(variance))

    def start_reach(self, reach: float) -> bool:
        return self.set_start(self.param_names[1], torch.tensor(reach))


class ToeplitzMatrix(Matrix):
    r"""One covariance for each lag, :math:`V_{ij} = \sigma^2 \rho_{|i-j|}`, zero from lag b on.

    =========== ================================ =======
    parameter   transform                        default
    =========== ================================ =======
    ``sigma^2`` :math:`e^{2x}`                   0
    ``rho_l``   sigmoid, scaled to (−1, 1)       0
    =========== ================================ =======

    for l = 1 … b − 1. The correlations are free of each other, so that not
    all of their values give a positive-definite matrix.

    Args:
        n: size.
        bands: b, the number of bands with the diagonal; n by default.
        param_specs: specifications that replace the ones above.

    Shape:
        Output: (n, n).

    Raises:
        InputError: if ``bands`` is not between 1 and n.

    >>> ToeplitzMatrix(3, bands=2)(torch.tensor([0.0, 1.0986123]))
    tensor([[1.0000, 0.5000, 0.0000],
            [0.5000, 1.0000, 0.5000],
            [0.0000, 0.5000, 1.0000]])
    """

    def __init__(
        self, n: int, bands: int | None = None, param_specs: Mapping[str, Any] | None = None
    ) -> None:
        n = check_count("n", n, 1)
        self.bands = n if bands is None else check_count("bands", bands, 1)
        if self.bands > n:
            raise InputError(f"`bands` is {bands}: expected 1 to {n}")
        default = free_specs(["sigma^2"], trans=TransformExpPow2())
        default |= free_specs(
            [f"rho_{i}" for i in range(1, self.bands)], trans=within_bounds(-1.0, 1.0)
        )
        super().__init__((n, n), merge_specs(default, param_specs))

    def _by_lag(self, values: Tensor) -> Tensor:
        """The matrix with one value for each of the bands, (…, bands) to (…, n, n)."""
        return _banded(torch.nn.functional.pad(values, (0, self.shape[0] - self.bands)))

    def _natural(self, free_params: FreeParams) -> tuple[Tensor, Tensor]:
        natural = self.build_params(free_params)
        return natural[:1], torch.cat([torch.ones_like(natural[:1]), natural[1:]])

    def forward(self, free_params: FreeParams = None) -> Tensor:
        variance, rho = self._natural(free_params)
        return self._by_lag(variance * rho)

    def manual_grad(self, free_params: FreeParams = None) -> tuple[Tensor | None, list[str]]:
        variance, rho = self._natural(free_params)
        unit = torch.eye(self.bands, dtype=rho.dtype, device=rho.device)[1:]
        slices = self._by_lag(torch.cat([rho[None], variance * unit]))
        return self.free_grad(slices, free_params)

    def manual_vjp(self, cotangent: Tensor, free_params: FreeParams = None) -> Tensor:
        self.check_cotangent(cotangent)
        variance, rho = self._natural(free_params)
        sums = _diagonal_sums(cotangent, self.bands)
        pulled = torch.cat([(sums * rho).sum().reshape(1), variance * sums[1:]])
        return self.free_vjp(pulled, free_params)

    def moment_start(self, variance: Tensor) -> bool:
        for name in self.param_names[1:]:
            self.set_start(name, torch.zeros_like(variance[0]))
        return self.set_start(self.param_names[0], harmonic_mean(variance))


class StationaryMatrix(Matrix):
    r"""A covariance for each lag, :math:`V_{ij} = \sigma^2 \rho_{|i-j|}`, positive definite at all
    values of its parameters: by partial autocorrelations.

    ============= ================================ =======
    parameter     transform                        default
    ============= ================================ =======
    ``sigma^2``   :math:`e^{2x}`                   0
    ``partial_l`` sigmoid, scaled to (−1, 1)       0
    ============= ================================ =======

    for l = 1 … n − 1. ``partial_l`` is the correlation of two positions that are l apart, given
    those between them, :math:`\pi_l`, and the correlations follow by the recursion of Durbin and
    Levinson,

    .. math::
        \rho_l = \pi_l \prod_{j<l} (1 - \pi_j^2) + \sum_{j<l} \varphi_{l-1,j}\,\rho_{l-j},\qquad
        \varphi_{l,j} = \varphi_{l-1,j} - \pi_l\,\varphi_{l-1,l-j},\quad \varphi_{l,l} = \pi_l .

    :class:`ToeplitzMatrix` has the correlations themselves, of which not all values are allowed.

    Args:
        n: size.
        param_specs: specifications that replace the ones above.

    Shape:
        Output: (n, n).

    Raises:
        TypeError, InputError: if ``n`` is no whole number of 1 or more, or a specification is
            invalid.

    Reference:
        Barndorff-Nielsen and Schou, Journal of Multivariate Analysis 3 (1973) 408.

    >>> StationaryMatrix(3)(torch.tensor([0.0, 1.0986123, 0.0]))
    tensor([[1.0000, 0.5000, 0.2500],
            [0.5000, 1.0000, 0.5000],
            [0.2500, 0.5000, 1.0000]])
    """

    def __init__(self, n: int, param_specs: Mapping[str, Any] | None = None) -> None:
        n = check_count("n", n, 1)
        default = free_specs(["sigma^2"], trans=TransformExpPow2())
        default |= free_specs([f"partial_{i}" for i in range(1, n)], trans=within_bounds(-1.0, 1.0))
        super().__init__((n, n), merge_specs(default, param_specs))

    def forward(self, free_params: FreeParams = None) -> Tensor:
        variance, partial = self.build_params(free_params).split([1, self.shape[0] - 1])
        return _banded(variance * self._correlations(partial)[0])

    def _correlations(self, partial: Tensor, slopes: bool = False) -> tuple[Tensor, Tensor]:
        """Correlations by lag (n,), and their derivatives (n - 1, n) if they are asked for."""
        m = len(partial)
        # Each number with its derivatives by all partial correlations, (1 + m, size).
        unit = torch.eye(m, dtype=partial.dtype, device=partial.device)
        rows = 1 + m if slopes else 1
        start = torch.nn.functional.pad(partial.new_ones(1, 1), (0, 0, 0, rows - 1))
        left, rho, phi = start, start, start[:, :0]  # left: the variance that those between leave
        for l in range(m):
            p = torch.cat([partial[None, l : l + 1], unit[: rows - 1, l : l + 1]])
            before = rho[:, 1:].flip(1)
            rho = torch.cat([rho, _times(p, left) + _times(phi, before).sum(1, keepdim=True)], 1)
            phi = torch.cat([phi - _times(p, phi.flip(1)), p], 1)
            left = left - _times(_times(p, p), left)
        return rho[0], rho[1:]

    def manual_grad(self, free_params: FreeParams = None) -> tuple[Tensor | None, list[str]]:
        variance, partial = self.build_params(free_params).split([1, self.shape[0] - 1])
        rho, slopes = self._correlations(partial, slopes=True)
        slices = _banded(torch.cat([rho[None], variance * slopes]))
        return self.free_grad(slices, free_params)

    def manual_vjp(self, cotangent: Tensor, free_params: FreeParams = None) -> Tensor:
        self.check_cotangent(cotangent)
        variance, partial = self.build_params(free_params).split([1, self.shape[0] - 1])
        rho, slopes = self._correlations(partial, slopes=True)
        sums = _diagonal_sums(cotangent, self.shape[0])
        pulled = torch.cat([rho[None], variance * slopes]) @ sums[:, None]
        return self.free_vjp(pulled[:, 0], free_params)

    def moment_start(self, variance: Tensor) -> bool:
        for name in self.param_names[1:]:
            self.set_start(name, torch.zeros_like(variance[0]))
        return self.set_start(self.param_names[0], harmonic_mean(variance))
