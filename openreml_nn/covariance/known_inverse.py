"""A matrix that is known by its inverse, which is sparse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from openreml_nn.covariance.matrix import FreeParams, Matrix
from openreml_nn.covariance.params import free_specs, merge_specs
from openreml_nn.covariance.start import harmonic_mean
from openreml_nn.covariance.transform import TransformExpPow2
from openreml_nn.support.checks import check_constant, check_symmetric, found
from openreml_nn.support.errors import InputError
from openreml_nn.terms.covariance import ScaledCovariance
from openreml_nn.terms.design import IdentityDesign
from openreml_nn.terms.kernel import Kernel, same_content
from openreml_nn.terms.term import Term

__all__ = ["KnownInverseMatrix"]


class KnownInverseMatrix(Matrix):
    r"""A matrix known by its sparse inverse, up to a factor: :math:`\sigma^2 (K^{-1})^{-1}`.

    =========== ============== =======
    parameter   transform      default
    =========== ============== =======
    ``sigma^2`` :math:`e^{2x}` 0
    =========== ============== =======

    Calling it forms the dense matrix, which is for small n.

    Args:
        inverse: :math:`K^{-1}`, (n, n), sparse or dense, such as
            :attr:`Pedigree.inverse`.
        null: what the inverse is zero on, (n, k) orthonormal, such as the constant of a random walk:
            K is then its pseudo-inverse, and effects have nothing of it.
        param_specs: specifications that replace the ones above.

    Shape:
        Output: (n, n).

    Raises:
        InputError: if ``inverse`` is not square, dense and not symmetric, requires a gradient, or is not
            zero on ``null``.
        NotPositiveDefiniteError: by calling the matrix, if ``inverse`` is not positive definite.

    >>> from openreml_nn.covariance import Pedigree
    >>> pedigree = Pedigree.of(["c"], ["a"], ["b"])
    >>> KnownInverseMatrix(pedigree.inverse)(torch.tensor([0.0])).round(decimals=4).abs()
    tensor([[1.0000, 0.0000, 0.5000],
            [0.0000, 1.0000, 0.5000],
            [0.5000, 0.5000, 1.0000]])
    """

    inverse: Tensor
    null: Tensor | None

    def __init__(
        self,
        inverse: Tensor,
        param_specs: Mapping[str, Any] | None = None,
        null: Tensor | None = None,
    ) -> None:
        if not isinstance(inverse, Tensor) or not inverse.is_floating_point():
            got = inverse.dtype if isinstance(inverse, Tensor) else found(inverse)
            raise TypeError(f"`inverse` is {got}: expected a floating-point tensor")
        if inverse.dim() != 2 or inverse.shape[0] != inverse.shape[1] or not len(inverse):
            raise InputError(f"`inverse` has shape {tuple(inverse.shape)}: expected (n, n)")
        check_constant("inverse", inverse)
        if inverse.layout == torch.strided:
            check_symmetric("inverse", inverse)
        default = free_specs(["sigma^2"], trans=TransformExpPow2())
        super().__init__(tuple(inverse.shape), merge_specs(default, param_specs))
        if null is not None:
            _check_null(null, inverse)
        self.register_data("inverse", inverse)
        self.register_data("null", null)
        self._kernel: Kernel | None = None

    @property
    def kernel(self) -> Kernel:
        """K, which depends on no parameter: what is computed of it is kept while that is the same."""
        if self._kernel is None or not same_content(self._kernel.source, self.inverse):
            self._kernel = Kernel(inverse=self.inverse, null=self.null)
        return self._kernel

    def _matrix(self, like: Tensor) -> Tensor:
        return self.kernel.dense().to(like)

    def forward(self, free_params: FreeParams = None) -> Tensor:
        variance = self.build_params(free_params)
        return variance * self._matrix(variance)

    def manual_grad(self, free_params: FreeParams = None) -> tuple[Tensor | None, list[str]]:
        return self.free_grad(self._matrix(self.flat_params(free_params))[None], free_params)

    def manual_vjp(self, cotangent: Tensor, free_params: FreeParams = None) -> Tensor:
        self.check_cotangent(cotangent)
        pulled = (cotangent * self._matrix(cotangent)).sum().reshape(1)
        return self.free_vjp(pulled, free_params)

    def structure(self) -> list[Term]:
        variance = self.build_params().reshape(1, 1)
        whole = Term(IdentityDesign(self.shape[0]), ScaledCovariance(variance, self.kernel))
        return [whole]

    def moment_start(self, variance: Tensor) -> bool:
        return self.set_start(self.param_names[0], harmonic_mean(variance))


def _check_null(null: Tensor, inverse: Tensor) -> None:
    if not isinstance(null, Tensor) or null.dtype != inverse.dtype:
        got = null.dtype if isinstance(null, Tensor) else found(null)
        raise TypeError(f"`null` is {got}: expected a tensor of {inverse.dtype}, as `inverse` is")
    n = len(inverse)
    if null.dim() != 2 or len(null) != n or not 0 < null.shape[1] < n:
        raise InputError(f"`null` has shape {tuple(null.shape)}: expected ({n}, k)")
    rounding = 1e4 * torch.finfo(null.dtype).eps
    eye = torch.eye(null.shape[1], dtype=null.dtype, device=null.device)
    if not float((null.mT @ null - eye).abs().max()) < rounding:
        raise InputError(
            "`null` is not orthonormal: expected columns of length one, at right angles"
        )
    left = inverse @ null
    size = inverse.to_dense() if inverse.layout == torch.strided else inverse.coalesce().values()
    if not float(left.abs().max()) < rounding * float(size.abs().max()):
        raise InputError("`null` is not what `inverse` is zero on: their product is not zero")
