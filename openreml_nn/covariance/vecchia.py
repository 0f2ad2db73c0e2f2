"""Gaussian processes of many places, each conditional on its nearest neighbours."""

from __future__ import annotations

from collections.abc import Mapping
from math import log
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openreml_nn.covariance.correlation import Correlation
from openreml_nn.covariance.matrix import FreeParams, Matrix
from openreml_nn.covariance.neighbours import first_to_last, nearest, nearest_before
from openreml_nn.covariance.nodes import has_values
from openreml_nn.covariance.params import free_specs, merge_specs
from openreml_nn.covariance.regressions import Regressions
from openreml_nn.covariance.start import harmonic_mean
from openreml_nn.covariance.transform import TransformExp, TransformExpPow2
from openreml_nn.support.checks import check_constant, check_count, check_instance, found
from openreml_nn.support.errors import InputError
from openreml_nn.terms.design import IdentityDesign
from openreml_nn.terms.neighbours import NeighbourPrecision
from openreml_nn.terms.precision import PrecisionCovariance
from openreml_nn.terms.term import Term

__all__ = ["VecchiaMatrix"]

#: Places whose distances tell what is far.
_TYPICAL = 500
#: A start is halved at most so often.
_HALVED = 60
#: Neighbours of a coarser process, which are of use where there are at least twice as many.
_COARSE = 5


class VecchiaMatrix(Matrix):
    r"""The covariance of a Gaussian process of many places, each of which depends on those before it
    through its nearest neighbours alone.

    Its inverse is sparse, :math:`V^{-1} = (I - B)^\top D^{-1} (I - B) / \sigma^2`, with B and D the
    regressions of each place on its neighbours under the correlation :math:`c(d_{ij}/\ell)`. With
    n - 1 neighbours it is :math:`\sigma^2 c(d_{ij}/\ell)` itself. The places are ordered
    from coarse to fine: the first is the one nearest to their mean, and each next one is the
    farthest from those before it, so that the rows may come in any order.

    =============== ============== =======
    parameter       transform      default
    =============== ============== =======
    ``sigma^2``     :math:`e^{2x}` 0
    ``lengthscale`` :math:`e^x`    0
    =============== ============== =======

    Calling it forms the dense matrix, which is for small n. Regressions are computed in float64.

    Args:
        places: (n, s) coordinates, all different; records of one place share its level by a
            :class:`DummyMatrix`.
        correlation: such as ``MaternCorrelation(1.5)``.
        neighbours: how many, m; those before a place where these are fewer.
        param_specs: specifications that replace the ones above.

    Shape:
        Output: (n, n).

    Raises:
        TypeError: if ``places`` are no numbers, or ``correlation`` is no :class:`Correlation`.
        InputError: if a coordinate is not finite, or two places are the same.

    Reference:
        Vecchia, Journal of the Royal Statistical Society B 50 (1988) 297; Datta, Banerjee, Finley
        and Gelfand, JASA 111 (2016) 800; Guinness, Technometrics 60 (2018) 415, for the order.

    >>> from openreml_nn.covariance import ExponentialCorrelation
    >>> places = torch.tensor([[0.0, 0.0], [0.0, 1.0], [2.0, 0.0]])
    >>> VecchiaMatrix(places, ExponentialCorrelation(), neighbours=2)(torch.zeros(2))
    tensor([[1.0000, 0.3679, 0.1353],
            [0.3679, 1.0000, 0.1069],
            [0.1353, 0.1069, 1.0000]])
    """

    places: Tensor
    _neighbours: Tensor

    def __init__(
        self,
        places: Tensor,
        correlation: Correlation,
        neighbours: int = 15,
        param_specs: Mapping[str, Any] | None = None,
    ) -> None:
        _check_places(places)
        check_instance("correlation", correlation, Correlation, "such as `MaternCorrelation(1.5)`")
        m = check_count("neighbours", neighbours, 1)
        default = free_specs(["sigma^2"], trans=TransformExpPow2())
        default |= free_specs(["lengthscale"], trans=TransformExp(degree=0))
        n = len(places)
        super().__init__((n, n), merge_specs(default, param_specs))
        self.correlation, self.neighbours = correlation, m
        self.register_data("places", places)
        at = places.detach().cpu().double().numpy()
        self.order = first_to_last(at)
        near = nearest_before(at, self.order, min(m, n - 1))
        self.precision = NeighbourPrecision(self.order, near)
        self.register_data("_neighbours", torch.from_numpy(near).to(places.device))
        self._regressions: Regressions | None = None

    @property
    def regressions(self) -> Regressions:
        """The regressions of the places on those of them that come before."""
        known = self._regressions
        if known is None or known.places is not self.places:
            places, own = self.places, self.precision
            at = places.double()
            apart = torch.linalg.vector_norm(at[own.row] - at[own.column], dim=-1)
            data = places, places, self._neighbours, self.correlation
            known = Regressions(*data, own.pairs, apart)
            self._regressions = known
        return known

    def regressions_of(self, places: Tensor) -> Regressions:
        """The regressions of other places on the nearest of these.

        Args:
            places: (k, s).

        Raises:
            TypeError, InputError: if they are no finite numbers, or have other dimensions.
        """
        _check_coordinates(places)
        if places.shape[1] != self.places.shape[1]:
            raise InputError(
                f"`places` has shape {tuple(places.shape)}: expected (k, {self.places.shape[1]})"
            )
        one, other = (x.detach().cpu().double().numpy() for x in (places, self.places))
        near = torch.from_numpy(nearest(one, other, min(self.neighbours, len(other))))
        device = self.places.device
        return Regressions(places.to(device), self.places, near.to(device), self.correlation)

    @torch.no_grad()
    def regressed(self, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The nearest of these to other places (k, s), (k, m), their weights (k, m), and the part of the
        variance that is left beside them (k,), at the present parameters.

        Raises:
            TypeError, InputError: as :meth:`regressions_of`.
        """
        found = self.regressions_of(places)
        _, length = self.build_params().split(1)
        k, m = found.neighbours.shape
        left, weights = found.at(length.double().log()).split([k, k * m])
        weights = weights.reshape(k, m)
        # At a place of these, or so near that rounding leaves no variance, the effect is known.
        same = left.isnan()
        nearest = torch.zeros_like(weights)
        nearest[:, 0] = 1
        weights = torch.where(same[:, None], nearest, weights)
        left = torch.where(same, 0.0, left)
        return found.neighbours.clamp(min=0), weights, left.clamp(min=0)

    def _numbers(self, free_params: FreeParams = None) -> tuple[Tensor, Tensor]:
        """The variance, and what the inverse is made of."""
        variance, length = self.build_params(free_params).split(1)
        return variance, self.regressions.at(length.double().log()).to(variance)

    def forward(self, free_params: FreeParams = None) -> Tensor:
        variance, numbers = self._numbers(free_params)
        return variance * self.precision.covariance(numbers)

    def manual_grad(self, free_params: FreeParams = None) -> tuple[Tensor | None, list[str]]:
        variance, numbers = self._numbers(free_params)
        _, length = self.build_params(free_params).split(1)
        slopes = self.regressions.at(length.double().log(), 1).to(variance) / length
        by_length = self.precision.covariance_along(numbers, slopes)
        slices = torch.stack([self.precision.covariance(numbers), variance * by_length])
        return self.free_grad(slices, free_params)

    def structure(self) -> list[Term]:
        g = PrecisionCovariance(torch.cat(self._numbers()), self.precision)
        return [Term(IdentityDesign(self.shape[0]), g)]

    def moment_start(self, variance: Tensor) -> bool:
        self.start_reach(1 / 3)
        return self.set_start(self.param_names[0], harmonic_mean(variance))

    def start_reach(self, reach: float) -> bool:
        # The first places are spread as all are.
        some = self.places[torch.from_numpy(self.order[:_TYPICAL]).to(self.places.device)]
        apart = torch.pdist(some)
        if not apart.numel():
            return False
        name, start = self.param_names[1], self.correlation.reach * reach * apart.median()
        return self.set_start(name, start) and self.set_start(name, self._regular(start))

    def _regular(self, length: Tensor) -> Tensor:
        """A length at which each place has variance of its own: the given one, or so many halves.

        Smooth correlations of dense places reach so far that rounding leaves a place none beside
        its neighbours.
        """
        if not has_values(length):
            return length
        log_length = length.double().log().reshape(1)
        for _ in range(_HALVED):
            if bool(self.regressions.at(log_length)[: len(self.places)].isfinite().all()):
                break
            log_length = log_length - log(2)
        return log_length.exp()[0].to(length)

    def coarsen(self) -> bool:
        if self._neighbours.shape[1] < 2 * _COARSE:
            return False
        near = self._neighbours[:, :_COARSE].contiguous()
        self.neighbours, self._neighbours, self._regressions = _COARSE, near, None
        self.precision = NeighbourPrecision(self.order, near.cpu().numpy())
        return True

    def kinks(self) -> Mapping[str, Tensor]:
        if self.correlation.kink is None:
            return {}
        near, own = self.places[self._neighbours.clamp(min=0)], self.places[:, None]
        apart = torch.linalg.vector_norm(near - own, dim=-1).flatten()
        among = torch.linalg.vector_norm(near[:, :, None] - near[:, None], dim=-1).flatten()
        return {self.param_names[1]: self.correlation.kinks(torch.cat([apart, among]))}

    def ends(self) -> bool:
        return self.correlation.ends

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.correlation}, neighbours={self.neighbours}"


def _check_coordinates(places: Tensor) -> None:
    if not isinstance(places, Tensor) or not places.is_floating_point():
        got = places.dtype if isinstance(places, Tensor) else found(places)
        raise TypeError(f"`places` is {got}: expected a floating-point tensor")
    if places.dim() != 2 or not len(places) or not places.shape[1]:
        raise InputError(f"`places` has shape {tuple(places.shape)}: expected (n, s) coordinates")
    if places.is_meta:
        raise InputError("`places` is on the meta device: it has no values to find neighbours by")
    good = torch.isfinite(places).all(1)
    if not bool(good.all()):
        raise InputError(f"`places` is not finite in row {int((~good).nonzero()[0])}")


def _check_places(places: Tensor) -> None:
    _check_coordinates(places)
    check_constant("places", places)
    at = places.detach().cpu().numpy()
    order = np.lexsort(at.T)
    same = (at[order[1:]] == at[order[:-1]]).all(1)
    if same.any():
        i, j = sorted(order[int(same.argmax()) :][:2].tolist())
        raise InputError(
            f"`places` has the same place in rows {i} and {j}: expected distinct ones, whose level "
            "the records of a place share"
        )
