"""Correlation along an order in which each position depends on the one before it alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from openreml_nn.covariance.exchangeable import within_bounds
from openreml_nn.covariance.matrix import FreeParams, Matrix
from openreml_nn.covariance.params import free_specs, merge_specs
from openreml_nn.covariance.transform import TransformExp
from openreml_nn.support.checks import check_count
from openreml_nn.terms.covariance import DenseCovariance
from openreml_nn.terms.design import IdentityDesign
from openreml_nn.terms.precision import PrecisionCovariance
from openreml_nn.terms.scaled import ScaledPrecision
from openreml_nn.terms.series import LONG, StepPrecision
from openreml_nn.terms.term import Term

__all__ = ["AntedependenceMatrix"]


class AntedependenceMatrix(Matrix):
    r"""First-order antedependence, :math:`V_{ij} = \sigma_i \sigma_j \prod_{k=i}^{j-1} \rho_k`
    for i ≤ j.

    =========== ================================ =======
    parameter   transform                        default
    =========== ================================ =======
    ``sigma_i`` :math:`e^x`                      0
    ``rho_k``   sigmoid, scaled to (−1, 1)       0
    =========== ================================ =======

    for i = 0 … n − 1 and k = 0 … n − 2: standard deviations, and the
    correlation of each occasion with the next. Always positive definite.

    Args:
        n: size.
        param_specs: specifications that replace the ones above.

    Shape:
        Output: (n, n).

    Raises:
        TypeError, InputError: if ``n`` is no whole number of 1 or more, or a specification is
            invalid.

    Reference:
        Gabriel, Annals of Mathematical Statistics 33 (1962) 201; Kenward,
        Applied Statistics 36 (1987) 296.

    >>> AntedependenceMatrix(3)(torch.tensor([0.0, 0.0, 0.6931472, 1.0986123, 1.0986123]))
    tensor([[1.0000, 0.5000, 0.5000],
            [0.5000, 1.0000, 1.0000],
            [0.5000, 1.0000, 4.0000]])
    """

    def __init__(self, n: int, param_specs: Mapping[str, Any] | None = None) -> None:
        n = check_count("n", n, 1)
        default = free_specs([f"sigma_{i}" for i in range(n)], trans=TransformExp(degree=1))
        default |= free_specs([f"rho_{k}" for k in range(n - 1)], trans=within_bounds(-1.0, 1.0))
        super().__init__((n, n), merge_specs(default, param_specs))

    def _natural(self, free_params: FreeParams) -> tuple[Tensor, Tensor, Tensor]:
        """Standard deviations (n,), the upper triangle of the correlations, all correlations."""
        n = self.shape[0]
        natural = self.build_params(free_params)
        sigma, rho = natural[:n], natural[n:]
        # Row i multiplies the correlations after i: ones before, then their running product.
        step = torch.cat([torch.ones_like(sigma[:1]), rho]).expand(n, n)
        after = torch.ones_like(step, dtype=torch.bool).triu(1)
        upper = torch.where(after, step, 1.0).cumprod(1).triu()
        return sigma, upper, upper + upper.triu(1).mT

    def forward(self, free_params: FreeParams = None) -> Tensor:
        sigma, _, R = self._natural(free_params)
        return sigma[:, None] * R * sigma

    def manual_grad(self, free_params: FreeParams = None) -> tuple[Tensor | None, list[str]]:
        n = self.shape[0]
        sigma, upper, R = self._natural(free_params)
        eye = torch.eye(n, dtype=sigma.dtype, device=sigma.device)
        rows = eye[:, :, None] * (R * sigma)[:, None, :]
        slices = [rows + rows.mT]
        for k in range(n - 1):
            # d R_ij / d rho_k = R_ik R_(k+1)j for i <= k < j.
            left = torch.where(torch.arange(n, device=sigma.device) <= k, upper[:, k], 0.0)
            part = torch.outer(sigma * left, sigma * upper[k + 1])
            slices.append((part + part.mT)[None])
        return self.free_grad(torch.cat(slices), free_params)

    def manual_vjp(self, cotangent: Tensor, free_params: FreeParams = None) -> Tensor:
        self.check_cotangent(cotangent)
        sigma, upper, R = self._natural(free_params)
        both = cotangent + cotangent.mT
        by_sigma = ((both * R) @ sigma[:, None])[:, 0]
        # For all k at once: sum over i <= k < j of C_ij R_ik R_(k+1)j.
        C = sigma[:, None] * both * sigma
        after = (upper[1:] @ C.mT).mT  # (i, k): sum over j > k of C_ij R_(k+1)j
        by_rho = (upper[:, :-1] * after).sum(0)
        return self.free_vjp(torch.cat([by_sigma, by_rho]), free_params)

    def variances(self) -> Tensor:
        return self.build_params()[: self.shape[0]] ** 2

    def structure(self) -> list[Term]:
        n = self.shape[0]
        if n <= LONG:
            return [Term(IdentityDesign(n), DenseCovariance(self(), chained=True))]
        natural = self.build_params()
        x = torch.cat([torch.ones_like(natural[:1]), natural])
        g = PrecisionCovariance(x, ScaledPrecision(StepPrecision(n)))
        return [Term(IdentityDesign(n), g)]

    def moment_start(self, variance: Tensor) -> bool:
        n = self.shape[0]
        for name in self.param_names[n:]:
            self.set_start(name, torch.zeros_like(variance[0]))
        scales = zip(self.param_names[:n], variance.sqrt(), strict=True)
        moved = [self.set_start(name, value) for name, value in scales]
        return all(moved)
