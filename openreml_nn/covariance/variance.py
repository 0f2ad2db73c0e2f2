"""Independent rows whose variance is a function of a covariate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from openreml_nn.covariance.matrix import FreeParams, Matrix
from openreml_nn.covariance.params import free_specs, merge_specs
from openreml_nn.covariance.start import harmonic_mean
from openreml_nn.covariance.transform import TransformExp, TransformExpPow2, TransformIdentity
from openreml_nn.support.checks import found
from openreml_nn.support.errors import InputError
from openreml_nn.terms.covariance import DiagonalCovariance
from openreml_nn.terms.design import IdentityDesign
from openreml_nn.terms.term import Term

__all__ = ["VarianceFunction"]


class VarianceFunction(Matrix):
    r"""Variances :math:`V_{ii} = \sigma^2 |x_i|^{2\delta}`, :math:`\sigma^2 e^{2 \delta x_i}`, or
    :math:`\sigma^2 (c + |x_i|^\delta)^2`.

    ============ ============== =======
    parameter    transform      default
    ============ ============== =======
    ``sigma^2``  :math:`e^{2x}` 0
    ``delta``    identity       0
    ``constant`` :math:`e^x`    0
    ============ ============== =======

    The constant c is that of ``"const_power"`` alone.

    Args:
        covariate: x, (n,); not zero for a power.
        kind: ``"power"``, ``"exp"`` or ``"const_power"``.
        param_specs: specifications that replace the ones above.

    Shape:
        Output: (n, n).

    Raises:
        InputError: if ``kind`` is another word, or a value is not finite or, for a power, zero.

    Reference:
        Pinheiro and Bates, Mixed-Effects Models in S and S-PLUS (2000), section 5.2.1.

    >>> VarianceFunction(torch.tensor([1.0, 4.0]))(torch.tensor([0.0, 0.5]))
    tensor([[1., 0.],
            [0., 4.]])
    """

    logarithm: Tensor

    def __init__(
        self,
        covariate: Tensor,
        kind: str = "power",
        param_specs: Mapping[str, Any] | None = None,
    ) -> None:
        if kind not in ("power", "exp", "const_power"):
            raise InputError(f"`kind` is {kind!r}: expected 'power', 'exp' or 'const_power'")
        if not isinstance(covariate, Tensor) or not covariate.is_floating_point():
            raise TypeError(f"`covariate` is {found(covariate)}: expected a floating-point tensor")
        if covariate.dim() != 1 or not len(covariate):
            raise InputError(f"`covariate` has shape {tuple(covariate.shape)}: expected (n,)")
        logarithm = covariate if kind == "exp" else covariate.abs().log()
        if not covariate.is_meta and not bool(torch.isfinite(logarithm).all()):
            row = int((~torch.isfinite(logarithm)).nonzero()[0])
            wanted = "a finite number" + ("" if kind == "exp" else " other than zero")
            raise InputError(
                f"`covariate` is {float(covariate[row]):g} in row {row}: expected {wanted}"
            )
        # Its logarithm moves in proportion to delta where x is far from 1, whatever the unit of x.
        default = free_specs(["sigma^2"], trans=TransformExpPow2(degree=0))
        default |= free_specs(["delta"], trans=TransformIdentity())
        if kind == "const_power":
            default |= free_specs(["constant"], trans=TransformExp(degree=2))
        super().__init__((len(covariate),) * 2, merge_specs(default, param_specs))
        self.register_data("logarithm", logarithm)
        self.kind = kind

    def at(self, covariate: Tensor) -> VarianceFunction:
        """The variance function, with these parameters, of other values of the covariate (n,)."""
        made = VarianceFunction(covariate.to(self.logarithm), self.kind)
        made.own_trans = self.own_trans
        for name in self.param_names:
            if name in self.fixed_param_names:
                made.fix(name, self.get_buffer(name))
            else:
                made.register_parameter(name, self.get_parameter(name))
        return made

    def variances(self, free_params: FreeParams = None) -> Tensor:
        """The diagonal (n,)."""
        variance, delta, *constant = self.build_params(free_params).split(1)
        unit = torch.exp(delta * self.logarithm.to(delta))
        return variance * (sum(constant) + unit) ** 2

    def forward(self, free_params: FreeParams = None) -> Tensor:
        return torch.diag(self.variances(free_params))

    def manual_grad(self, free_params: FreeParams = None) -> tuple[Tensor | None, list[str]]:
        return self.free_grad(torch.diag_embed(self._slopes(free_params)), free_params)

    def manual_vjp(self, cotangent: Tensor, free_params: FreeParams = None) -> Tensor:
        self.check_cotangent(cotangent)
        return self.free_vjp(self._slopes(free_params) @ cotangent.diagonal(), free_params)

    def _slopes(self, free_params: FreeParams) -> Tensor:
        """Derivatives of the variances by each parameter, (2 or 3, n)."""
        variance, delta, *constant = self.build_params(free_params).split(1)
        x = self.logarithm.to(delta)
        unit = torch.exp(delta * x)
        sd = sum(constant) + unit
        slopes = [sd**2, 2 * variance * sd * unit * x]
        return torch.stack([*slopes, 2 * variance * sd] if constant else slopes)

    def structure(self) -> list[Term]:
        return [Term(IdentityDesign(self.shape[0]), DiagonalCovariance(self.variances(None)))]

    def moment_start(self, variance: Tensor) -> bool:
        start = harmonic_mean(variance)
        self.set_start(self.param_names[1], torch.zeros_like(variance[0]))
        if self.kind == "const_power":
            self.set_start(self.param_names[2], torch.ones_like(variance[0]))
            start = start / 4
        return self.set_start(self.param_names[0], start)
