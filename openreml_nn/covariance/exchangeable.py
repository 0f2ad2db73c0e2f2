"""Matrices in which all rows are alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from openreml_nn.covariance.matrix import FreeParams, Matrix
from openreml_nn.covariance.params import free_specs, merge_specs
from openreml_nn.covariance.start import harmonic_mean
from openreml_nn.covariance.transform import (
    Transform,
    TransformChain,
    TransformExpPow2,
    TransformScaleShift,
    TransformSigmoid,
)
from openreml_nn.support.checks import check_count

__all__ = ["CompoundSymmetricMatrix", "EqualEntryMatrix", "EquicorrelationMatrix", "within_bounds"]


def within_bounds(low: float, high: float) -> Transform:
    """A sigmoid scaled to ``(low, high)``."""
    return TransformChain([TransformSigmoid(), TransformScaleShift(high - low, low)])


def _least_correlation(n: int) -> float:
    """The lower bound of a common correlation of n rows; of one row it means nothing."""
    return -1 / (n - 1) if n > 1 else -1.0


def _common_correlation(n: int) -> dict[str, dict[str, Any]]:
    return free_specs(["rho"], trans=within_bounds(_least_correlation(n), 1.0))


def _off_and_on(cotangent: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of a square matrix off and on its diagonal."""
    on = cotangent.diagonal().sum()
    return cotangent.sum() - on, on


def _mixed(n: int, off: Tensor, on: Tensor) -> Tensor:
    """The matrix with ``off`` off the diagonal and ``on`` on it."""
    eye = torch.eye(n, dtype=off.dtype, device=off.device)
    return off + (on - off) * eye


class EqualEntryMatrix(Matrix):
    r"""All entries equal, :math:`\sigma^2 J_{n \times m}`.

    =========== ============== =======
    parameter   transform      default
    =========== ============== =======
    ``sigma^2`` :math:`e^{2x}` 0
    =========== ============== =======

    As a square covariance it is one random effect that all rows share; its
    rank is one.

    Args:
        n: number of rows.
        m: number of columns; n by default.
        param_specs: specifications that replace the ones above.

    Shape:
        Output: (n, m).

    Raises:
        TypeError, InputError: if a size is no whole number of 1 or more, or a specification is
            invalid.

    >>> EqualEntryMatrix(2)(torch.tensor([0.5]))
    tensor([[2.7183, 2.7183],
            [2.7183, 2.7183]])
    """

    def __init__(
        self, n: int, m: int | None = None, param_specs: Mapping[str, Any] | None = None
    ) -> None:
        n = check_count("n", n, 1)
        m = n if m is None else check_count("m", m, 1)
        default = free_specs(["sigma^2"], trans=TransformExpPow2())
        super().__init__((n, m), merge_specs(default, param_specs))

    def forward(self, free_params: FreeParams = None) -> Tensor:
        return self.build_params(free_params).expand(self.shape).clone()

    def manual_grad(self, free_params: FreeParams = None) -> tuple[Tensor | None, list[str]]:
        if not self.num_free_params:
            return None, []
        slope = self.trans_grad(free_params)
        return slope.expand(1, *self.shape).clone(), self.free_param_names

    def manual_vjp(self, cotangent: Tensor, free_params: FreeParams = None) -> Tensor:
        self.check_cotangent(cotangent)
        return self.free_vjp(cotangent.sum().reshape(1), free_params)

    def moment_start(self, variance: Tensor) -> bool:
        return self.set_start(self.param_names[0], harmonic_mean(variance))


class EquicorrelationMatrix(Matrix):
    r"""Common correlation, :math:`(1-\rho) I + \rho J`.

    ========= ========================================= =======
    parameter transform                                 default
    ========= ========================================= =======
    ``rho``   sigmoid, scaled to :math:`(-1/(n-1), 1)`  0
    ========= ========================================= =======

    The interval is where the matrix is positive definite.

    Args:
        n: size.
        param_specs: specifications that replace the ones above.

    Shape:
        Output: (n, n).

    Raises:
        TypeError, InputError: if ``n`` is no whole number of 1 or more, or a specification is
            invalid.

    >>> EquicorrelationMatrix(2)(torch.tensor([0.0]))
    tensor([[1., 0.],
            [0., 1.]])
    """

    def __init__(self, n: int, param_specs: Mapping[str, Any] | None = None) -> None:
        n = check_count("n", n, 1)
        super().__init__((n, n), merge_specs(_common_correlation(n), param_specs))

    @property
    def rho_min(self) -> float:
        """The lower bound of ``rho``, -1 / (n - 1), where the matrix becomes singular."""
        return _least_correlation(self.shape[0])

    def forward(self, free_params: FreeParams = None) -> Tensor:
        rho = self.build_params(free_params)
        return _mixed(self.shape[0], rho, torch.ones_like(rho))

    def manual_grad(self, free_params: FreeParams = None) -> tuple[Tensor | None, list[str]]:
        one = torch.ones_like(self.build_params(free_params))
        return self.free_grad(_mixed(self.shape[0], one, 0 * one)[None], free_params)

    def manual_vjp(self, cotangent: Tensor, free_params: FreeParams = None) -> Tensor:
        self.check_cotangent(cotangent)
        off, _ = _off_and_on(cotangent)
        return self.free_vjp(off.reshape(1), free_params)

    def moment_start(self, variance: Tensor) -> bool:
        self.set_start(self.param_names[0], torch.zeros_like(variance[0]))
        return False


class CompoundSymmetricMatrix(Matrix):
    r"""Common variance and correlation, :math:`\sigma^2[(1-\rho) I + \rho J]`.

    =========== ========================================= =======
    parameter   transform                                 default
    =========== ========================================= =======
    ``sigma^2`` :math:`e^{2x}`                            0
    ``rho``     sigmoid, scaled to :math:`(-1/(n-1), 1)`  0
    =========== ========================================= =======

    Args:
        n: size.
        param_specs: specifications that replace the ones above.

    Shape:
        Output: (n, n).

    Raises:
        TypeError, InputError: if ``n`` is no whole number of 1 or more, or a specification is
            invalid.

    >>> CompoundSymmetricMatrix(2)(torch.tensor([0.5, 0.0]))
    tensor([[2.7183, 0.0000],
            [0.0000, 2.7183]])
    """

    def __init__(self, n: int, param_specs: Mapping[str, Any] | None = None) -> None:
        n = check_count("n", n, 1)
        default = free_specs(["sigma^2"], trans=TransformExpPow2()) | _common_correlation(n)
        super().__init__((n, n), merge_specs(default, param_specs))

    @property
    def rho_min(self) -> float:
        """The lower bound of ``rho``, -1 / (n - 1), where the matrix becomes singular."""
        return _least_correlation(self.shape[0])

    def forward(self, free_params: FreeParams = None) -> Tensor:
        variance, rho = self.build_params(free_params).split(1)
        return _mixed(self.shape[0], variance * rho, variance)

    def manual_grad(self, free_params: FreeParams = None) -> tuple[Tensor | None, list[str]]:
        variance, rho = self.build_params(free_params).split(1)
        n, one = self.shape[0], torch.ones_like(variance)
        slices = torch.stack([_mixed(n, rho, one), _mixed(n, variance, 0 * one)])
        return self.free_grad(slices, free_params)

    def manual_vjp(self, cotangent: Tensor, free_params: FreeParams = None) -> Tensor:
        self.check_cotangent(cotangent)
        variance, rho = self.build_params(free_params)
        off, on = _off_and_on(cotangent)
        return self.free_vjp(torch.stack([on + rho * off, variance * off]), free_params)

    def moment_start(self, variance: Tensor) -> bool:
        self.set_start(self.param_names[1], torch.zeros_like(variance[0]))
        return self.set_start(self.param_names[0], harmonic_mean(variance))
