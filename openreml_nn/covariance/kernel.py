"""Covariance that depends on a distance, or is known up to a factor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from openreml_nn.covariance.correlation import (
    Correlation,
    ExponentialCorrelation,
    GaussianCorrelation,
    MaternCorrelation,
    SphericalCorrelation,
)
from openreml_nn.covariance.matrix import FreeParams, Matrix
from openreml_nn.covariance.params import free_specs, merge_specs
from openreml_nn.covariance.spaced import SpacedMatrix, check_distance
from openreml_nn.covariance.start import harmonic_mean
from openreml_nn.covariance.transform import TransformExp, TransformExpPow2
from openreml_nn.support.checks import check_symmetric
from openreml_nn.terms.covariance import ScaledCovariance
from openreml_nn.terms.design import IdentityDesign
from openreml_nn.terms.kernel import Kernel
from openreml_nn.terms.term import Term

__all__ = [
    "DistanceMatrix",
    "ExponentialMatrix",
    "GaussianMatrix",
    "KnownMatrix",
    "MaternMatrix",
    "SphericalMatrix",
]

#: What a distance is, in messages.
_EXPECTED = "distances, such as torch.cdist(x, x, compute_mode='donot_use_mm_for_euclid_dist')"


class DistanceMatrix(SpacedMatrix):
    """A kernel of distances, :math:`V_{ij} = \\sigma^2 c(d_{ij} / \\ell)`."""

    correlation: Correlation

    def __init__(self, distance: Tensor, param_specs: Mapping[str, Any] | None = None) -> None:
        check_distance(distance, _EXPECTED)
        default = free_specs(["sigma^2"], trans=TransformExpPow2())
        # A length of zero is no ordinary point.
        default |= free_specs(["lengthscale"], trans=TransformExp(degree=0))
        super().__init__(distance, merge_specs(default, param_specs))

    @property
    def is_markov(self) -> bool:
        return self.correlation.is_markov

    def rate(self) -> Tensor:
        return 1 / self.build_params()[1:]

    def _scaled(self, free_params: FreeParams) -> tuple[Tensor, Tensor, Tensor]:
        """Variance, length and the distances in lengths."""
        variance, length = self.build_params(free_params).split(1)
        # Far beyond where correlations are zero; a length near zero would make it infinite.
        return variance, length, (self.apart().to(length) / length).clamp(max=1e4)

    def forward(self, free_params: FreeParams = None) -> Tensor:
        variance, _, r = self._scaled(free_params)
        return variance * self.together(self.correlation.value(r))

    def between(self, distance: Tensor) -> Tensor:
        """Covariance between places at other distances, at the present parameters."""
        variance, length = self.build_params().split(1)
        return variance * self.correlation.value((distance.to(length) / length).clamp(max=1e4))

    def manual_grad(self, free_params: FreeParams = None) -> tuple[Tensor | None, list[str]]:
        variance, length, r = self._scaled(free_params)
        slices = torch.stack(
            [self.correlation.value(r), variance * self.correlation.slope(r) / length]
        )
        return self.free_grad(self.together(slices), free_params)

    def manual_vjp(self, cotangent: Tensor, free_params: FreeParams = None) -> Tensor:
        self.check_cotangent(cotangent)
        variance, length, r = self._scaled(free_params)
        seen = self.together(cotangent)
        by_variance = (seen * self.correlation.value(r)).sum().reshape(1)
        by_length = (seen * self.correlation.slope(r)).sum() * variance / length
        return self.free_vjp(torch.cat([by_variance, by_length]), free_params)

    def moment_start(self, variance: Tensor) -> bool:
        # A third of the typical distance: correlated with the near, not with the far.
        self.start_reach(1 / 3)
        return self.set_start(self.param_names[0], harmonic_mean(variance))

    def kinks(self) -> Mapping[str, Tensor]:
        if self.correlation.kink is None:
            return {}
        return {self.param_names[1]: self.correlation.kinks(self.apart())}

    def ends(self) -> bool:
        return self.correlation.ends

    def start_reach(self, reach: float) -> bool:
        apart = self.spread()
        start = self.correlation.reach * reach
        return apart.numel() > 0 and self.set_start(self.param_names[1], start * apart.median())


class ExponentialMatrix(DistanceMatrix):
    r"""Exponential covariance :math:`V_{ij} = \sigma^2 e^{-d_{ij}/\ell}`.

    =============== ============== =======
    parameter       transform      default
    =============== ============== =======
    ``sigma^2``     :math:`e^{2x}` 0
    ``lengthscale`` :math:`e^x`    0
    =============== ============== =======

    Args:
        distance: (n, n) distances, such as
            ``torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")``; or places on a line, (n,).
        param_specs: specifications that replace the ones above.

    Shape:
        Output: (n, n).

    Raises:
        TypeError, InputError: if ``distance`` is not symmetric with zeros on its diagonal and no
            negative entry, nor (n,) distinct places.

    Reference:
        Diggle and Ribeiro, Model-based Geostatistics (2007), section 3.4.

    >>> ExponentialMatrix(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))(torch.zeros(2))
    tensor([[1.0000, 0.3679],
            [0.3679, 1.0000]])
    """

    correlation = ExponentialCorrelation()


class GaussianMatrix(DistanceMatrix):
    r"""Gaussian (squared-exponential) covariance
    :math:`V_{ij} = \sigma^2 e^{-d_{ij}^2/(2\ell^2)}`.

    =============== ============== =======
    parameter       transform      default
    =============== ============== =======
    ``sigma^2``     :math:`e^{2x}` 0
    ``lengthscale`` :math:`e^x`    0
    =============== ============== =======

    Args:
        distance: (n, n) distances, such as
            ``torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")``; or places on a line, (n,).
        param_specs: specifications that replace the ones above.

    Shape:
        Output: (n, n).

    Raises:
        InputError: as in :class:`ExponentialMatrix`.

    Reference:
        Rasmussen and Williams, Gaussian Processes for Machine Learning (2006), eq. 4.9.

    >>> GaussianMatrix(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))(torch.zeros(2))
    tensor([[1.0000, 0.6065],
            [0.6065, 1.0000]])
    """

    correlation = GaussianCorrelation()


class MaternMatrix(DistanceMatrix):
    r"""Matérn covariance of smoothness ν = ½, 3/2 or 5/2.

    With :math:`s = \sqrt{2\nu}\, d_{ij}/\ell` the correlation is
    :math:`e^{-s}`, :math:`(1+s)e^{-s}` or :math:`(1+s+s^2/3)e^{-s}`.

    =============== ============== =======
    parameter       transform      default
    =============== ============== =======
    ``sigma^2``     :math:`e^{2x}` 0
    ``lengthscale`` :math:`e^x`    0
    =============== ============== =======

    Args:
        distance: (n, n) distances, such as
            ``torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")``; or places on a line, (n,).
        nu: 0.5, 1.5 or 2.5.
        param_specs: specifications that replace the ones above.

    Shape:
        Output: (n, n).

    Raises:
        InputError: as in :class:`ExponentialMatrix`, or if ``nu`` is another number.

    Reference:
        Rasmussen and Williams, Gaussian Processes for Machine Learning (2006), eq. 4.17.

    >>> MaternMatrix(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), nu=1.5)(torch.zeros(2))
    tensor([[1.0000, 0.4834],
            [0.4834, 1.0000]])
    """

    def __init__(
        self, distance: Tensor, nu: float = 1.5, param_specs: Mapping[str, Any] | None = None
    ) -> None:
        self.correlation = MaternCorrelation(nu)
        super().__init__(distance, param_specs)
        self.nu = nu

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, nu={self.nu}"


class SphericalMatrix(DistanceMatrix):
    r"""Spherical covariance :math:`V_{ij} = \sigma^2 (1 - \tfrac32 r + \tfrac12 r^3)` for
    :math:`r = d_{ij}/\ell < 1`, zero beyond.

    =============== ============== =======
    parameter       transform      default
    =============== ============== =======
    ``sigma^2``     :math:`e^{2x}` 0
    ``lengthscale`` :math:`e^x`    0
    =============== ============== =======

    It is a covariance in up to three dimensions; ``lengthscale`` is the range.

    Args:
        distance: (n, n) distances, such as
            ``torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")``; or places on a line, (n,).
        param_specs: specifications that replace the ones above.

    Shape:
        Output: (n, n).

    Raises:
        InputError: as in :class:`ExponentialMatrix`.

    Reference:
        Cressie, Statistics for Spatial Data (1993), section 2.3.1.

    >>> SphericalMatrix(torch.tensor([[0.0, 0.5], [0.5, 0.0]]))(torch.zeros(2))
    tensor([[1.0000, 0.3125],
            [0.3125, 1.0000]])
    """

    correlation = SphericalCorrelation()


class KnownMatrix(Matrix):
    r"""A known matrix up to a factor, :math:`\sigma^2 K`: a kinship matrix, a kernel.

    =========== ============== =======
    parameter   transform      default
    =========== ============== =======
    ``sigma^2`` :math:`e^{2x}` 0
    =========== ============== =======

    Args:
        matrix: K, (n, n), symmetric.
        param_specs: specifications that replace the ones above.

    Shape:
        Output: (n, n).

    Raises:
        InputError: if ``matrix`` is not square, symmetric and finite.

    >>> KnownMatrix(torch.tensor([[1.0, 0.5], [0.5, 1.0]]))(torch.tensor([0.5]))
    tensor([[2.7183, 1.3591],
            [1.3591, 2.7183]])
    """

    matrix: Tensor

    def __init__(self, matrix: Tensor, param_specs: Mapping[str, Any] | None = None) -> None:
        check_symmetric("matrix", matrix)
        default = free_specs(["sigma^2"], trans=TransformExpPow2())
        super().__init__(tuple(matrix.shape), merge_specs(default, param_specs))
        self.register_data("matrix", matrix)

    def forward(self, free_params: FreeParams = None) -> Tensor:
        variance = self.build_params(free_params)
        return variance * self.matrix.to(variance)

    def manual_grad(self, free_params: FreeParams = None) -> tuple[Tensor | None, list[str]]:
        return self.free_grad(self.matrix.to(self.flat_params(free_params))[None], free_params)

    def manual_vjp(self, cotangent: Tensor, free_params: FreeParams = None) -> Tensor:
        self.check_cotangent(cotangent)
        pulled = (cotangent * self.matrix.to(cotangent)).sum().reshape(1)
        return self.free_vjp(pulled, free_params)

    def structure(self) -> list[Term]:
        variance = self.build_params().reshape(1, 1)
        known = ScaledCovariance(variance, Kernel(self.matrix))
        whole = Term(IdentityDesign(self.shape[0]), known)
        return [whole]

    def moment_start(self, variance: Tensor) -> bool:
        size = self.matrix.diagonal().to(variance).mean()
        return self.set_start(self.param_names[0], harmonic_mean(variance) / size)
