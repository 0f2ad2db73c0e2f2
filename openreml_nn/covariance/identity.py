"""The identity and its multiples: independent effects of equal variance."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from openreml_nn.covariance.matrix import FreeParams, Matrix
from openreml_nn.covariance.params import free_specs, merge_specs
from openreml_nn.covariance.start import harmonic_mean
from openreml_nn.covariance.transform import TransformExpPow2
from openreml_nn.support.checks import check_count
from openreml_nn.terms.covariance import DiagonalCovariance, RepeatedCovariance
from openreml_nn.terms.design import IdentityDesign
from openreml_nn.terms.term import Term

__all__ = ["DiagonalMatrix", "IdentityMatrix", "ScalarMatrix"]


def _eye(size: int, like: Tensor) -> Tensor:
    return torch.eye(size, dtype=like.dtype, device=like.device)


class IdentityMatrix(Matrix):
    r"""Identity matrix :math:`I_n`.

    Args:
        n: size.

    Shape:
        Output: (n, n).

    Raises:
        TypeError, InputError: if ``n`` is no whole number of 1 or more.

    >>> IdentityMatrix(2)()
    tensor([[1., 0.],
            [0., 1.]])
    """

    def __init__(self, n: int) -> None:
        n = check_count("n", n, 1)
        super().__init__((n, n), {})
        # Nothing else would remember a dtype and a device.
        self.register_buffer("like", torch.empty(0), persistent=False)

    def forward(self, free_params: FreeParams = None) -> Tensor:
        return _eye(self.shape[0], self.flat_params(free_params))

    def manual_grad(self, free_params: FreeParams = None) -> tuple[Tensor | None, list[str]]:
        return None, []

    def structure(self) -> list[Term]:
        n = self.shape[0]
        one = _eye(1, self.flat_params(None))
        return [Term(IdentityDesign(n), RepeatedCovariance(one, n, one))]


class ScalarMatrix(Matrix):
    r"""Homoscedastic covariance :math:`\sigma^2 I_n`.

    =========== ============== =======
    parameter   transform      default
    =========== ============== =======
    ``sigma^2`` :math:`e^{2x}` 0
    =========== ============== =======

    Args:
        n: size.
        param_specs: specifications that replace the ones above.

    Shape:
        Output: (n, n).

    Raises:
        TypeError, InputError: if ``n`` is no whole number of 1 or more, or a specification is
            invalid.

    >>> ScalarMatrix(2)(torch.tensor([0.5]))
    tensor([[2.7183, 0.0000],
            [0.0000, 2.7183]])
    """

    def __init__(self, n: int, param_specs: Mapping[str, Any] | None = None) -> None:
        n = check_count("n", n, 1)
        specs = merge_specs(free_specs(["sigma^2"], trans=TransformExpPow2()), param_specs)
        super().__init__((n, n), specs)

    def forward(self, free_params: FreeParams = None) -> Tensor:
        return torch.diag_embed(self.build_params(free_params).expand(self.shape[0]))

    def manual_grad(self, free_params: FreeParams = None) -> tuple[Tensor | None, list[str]]:
        if not self.num_free_params:
            return None, []
        slope = self.trans_grad(free_params).expand(self.shape[0])
        return torch.diag_embed(slope)[None], self.free_param_names

    def manual_vjp(self, cotangent: Tensor, free_params: FreeParams = None) -> Tensor:
        self.check_cotangent(cotangent)
        return self.free_vjp(cotangent.diagonal().sum().reshape(1), free_params)

    def structure(self) -> list[Term]:
        n = self.shape[0]
        variance = self.build_params().reshape(1, 1)
        return [Term(IdentityDesign(n), RepeatedCovariance(variance, n))]

    def moment_start(self, variance: Tensor) -> bool:
        return self.set_start(self.param_names[0], harmonic_mean(variance))

    def of_size(self, n: int) -> ScalarMatrix:
        """A matrix of this variance for n rows: both have one parameter, free or fixed.

        >>> one = ScalarMatrix(1)
        >>> one.of_size(3).get_parameter("sigma^2") is one.get_parameter("sigma^2")
        True
        """
        found = copy.copy(self)
        found.known_shape = (check_count("n", n, 1),) * 2
        return found


class DiagonalMatrix(Matrix):
    r"""Heteroscedastic covariance :math:`\mathrm{diag}(\sigma^2_0, \dots, \sigma^2_{n-1})`.

    ============= ============== =======
    parameter     transform      default
    ============= ============== =======
    ``sigma^2_i`` :math:`e^{2x}` 0
    ============= ============== =======

    Args:
        n: size.
        param_specs: specifications that replace the ones above.

    Shape:
        Output: (n, n).

    Raises:
        TypeError, InputError: if ``n`` is no whole number of 1 or more, or a specification is
            invalid.

    >>> DiagonalMatrix(2)(torch.tensor([0.0, 0.5]))
    tensor([[1.0000, 0.0000],
            [0.0000, 2.7183]])
    """

    def __init__(self, n: int, param_specs: Mapping[str, Any] | None = None) -> None:
        n = check_count("n", n, 1)
        names = [f"sigma^2_{i}" for i in range(n)]
        default = free_specs(names, trans=TransformExpPow2())
        super().__init__((n, n), merge_specs(default, param_specs))

    def forward(self, free_params: FreeParams = None) -> Tensor:
        return torch.diag_embed(self.build_params(free_params))

    def manual_grad(self, free_params: FreeParams = None) -> tuple[Tensor | None, list[str]]:
        n = self.shape[0]
        diagonal = torch.arange(n, device=self.flat_params(free_params).device) * (n + 1)
        return self.entries_grad([diagonal], free_params)

    def manual_vjp(self, cotangent: Tensor, free_params: FreeParams = None) -> Tensor:
        self.check_cotangent(cotangent)
        return self.free_vjp(cotangent.diagonal(), free_params)

    def push_forward(self, tangent: Tensor, free_params: Tensor) -> Tensor:
        full = tangent.new_zeros(self.num_params)
        index = torch.tensor(self.free_param_index, device=tangent.device)
        return torch.diag_embed(full.index_add(0, index, tangent * self.trans_grad(free_params)))

    def structure(self) -> list[Term]:
        variances = self.build_params()
        return [Term(IdentityDesign(self.shape[0]), DiagonalCovariance(variances))]

    def moment_start(self, variance: Tensor) -> bool:
        scales = zip(self.param_names, variance, strict=True)
        moved = [self.set_start(name, value) for name, value in scales]
        return all(moved)
