"""Gaussian processes of many places, each conditional on its nearest neighbours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import log
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openreml_nn.covariance.correlation import Correlation
from openreml_nn.covariance.matrix import FreeParams, Matrix
from openreml_nn.covariance.neighbours import first_to_last, nearest, nearest_before
from openreml_nn.covariance.nodes import functorch, has_values
from openreml_nn.covariance.params import free_specs, merge_specs
from openreml_nn.covariance.start import harmonic_mean
from openreml_nn.covariance.transform import TransformExp, TransformExpPow2
from openreml_nn.support.checks import check_constant, check_count, check_instance, found
from openreml_nn.support.errors import InputError
from openreml_nn.terms.design import IdentityDesign
from openreml_nn.terms.precision import NeighbourPrecision, PrecisionCovariance
from openreml_nn.terms.term import Term

__all__ = ["Regressions", "VecchiaMatrix"]

#: Places whose regressions are computed at once, so that what is held is in the processor's cache.
_AT_ONCE = 256
#: Places whose distances tell what is far.
_TYPICAL = 500
#: A start is halved at most so often.
_HALVED = 60


@dataclass(frozen=True)
class Regressions:
    r"""The regressions of places on neighbours, as they depend on the logarithm of the length.

    With C the correlations among the neighbours of a place and c those with it, its weights are
    :math:`b = C^{-1} c` and its variance beside them is :math:`d = 1 - c^\top b`.

    Args:
        places: (k, s) the places.
        others: (q, s) those among which the neighbours are.
        neighbours: (k, m) the neighbours of each; -1 past the last.
        correlation: what it is.
    """

    places: Tensor
    others: Tensor
    neighbours: Tensor
    correlation: Correlation
    #: The last length without a graph, and what was computed there: plain numbers.
    _kept: dict[float, list[Tensor]] = field(default_factory=dict, repr=False, compare=False)

    def at(self, log_length: Tensor, order: int = 0) -> Tensor:
        """d (k,) and then the weights (k, m), row by row, or their first or second derivatives.

        They are differentiable up to the second derivative. Where rounding leaves no variance, d is
        NaN.
        """
        if functorch():
            # Forward mode within forward mode forgets what a custom function has saved.
            return self.computed(log_length, order)[order]
        return _Regressed.apply(log_length, self, order)

    def derivative(self, log_length: Tensor, order: int) -> Tensor:
        """What :meth:`at` returns, or its first or second derivative."""
        if not has_values(log_length):
            return self.computed(log_length, order)[order]
        with torch.inference_mode(False), torch.no_grad():
            key = float(log_length)
            known = self._kept.get(key, [])
            if order >= len(known):
                # Who asks for one derivative of a fit asks for the other next.
                known = self.computed(log_length, 2 if order else 0)
                self._kept.clear()
                self._kept[key] = known
            return known[order].clone()

    def computed(self, log_length: Tensor, order: int) -> list[Tensor]:
        """The regressions with their derivatives up to an order."""
        parts = [
            self._part(log_length, order, slice(i, i + _AT_ONCE))
            for i in range(0, len(self.places), _AT_ONCE)
        ]
        found = []
        for each in zip(*parts, strict=True):
            d, B = (torch.cat(part) for part in zip(*each, strict=True))
            found.append(torch.cat([d, B.reshape(-1)]))
        return found

    def _part(self, log_length: Tensor, order: int, rows: slice) -> list[tuple[Tensor, Tensor]]:
        """d and the weights of some places, with their derivatives."""
        at, own = self.neighbours[rows], self.places[rows].double()
        missing, k, m = at < 0, *at.shape
        if not m:
            zero = own.new_zeros(k) + 0 * log_length
            return [(zero + (i == 0), own.new_zeros(k, 0)) for i in range(order + 1)]
        near = self.others[at.clamp(min=0)].double()  # (k, m, s)
        length = log_length.exp()
        is_full = has_values(at) and not bool(missing.any())
        apart = missing[:, :, None] | missing[:, None, :]
        kinds = (self.correlation.value, self.correlation.slope, self.correlation.bend)

        # A length near zero would make distances infinite; there correlations are zero long before.
        r = (torch.linalg.vector_norm(near - own[:, None], dim=-1) / length).clamp(max=1e4)
        c = [f(r) for f in kinds[: order + 1]]
        r = torch.linalg.vector_norm(near[:, :, None] - near[:, None], dim=-1) / length
        r = r.clamp(max=1e4)
        C = [f(r) for f in kinds[: order + 1]]
        if not is_full:
            c = [x.masked_fill(missing, 0.0) for x in c]
            C = [x.masked_fill(apart, 0.0) for x in C]
            C[0] = C[0] + torch.diag_embed(missing.to(C[0]))
        factor, info = torch.linalg.cholesky_ex(C[0])

        def solved(x: Tensor) -> Tensor:
            return torch.cholesky_solve(x[..., None], factor)[..., 0]

        def times(A: Tensor, x: Tensor) -> Tensor:
            return (A @ x[..., None])[..., 0]

        b = solved(c[0])
        d = 1 - (c[0] * b).sum(-1)
        d = torch.where((info == 0) & (d > torch.finfo(d.dtype).eps), d, torch.nan)
        found = [(d, b)]
        if order > 0:
            # C b = c and its derivatives; of d the terms with those of b fall out.
            b1 = solved(c[1] - times(C[1], b))
            found.append(((times(C[1], b) * b - 2 * c[1] * b).sum(-1), b1))
        if order > 1:
            b2 = solved(c[2] - 2 * times(C[1], b1) - times(C[2], b))
            bent = times(C[2], b) * b + 2 * times(C[1], b) * b1 - 2 * c[2] * b - 2 * c[1] * b1
            found.append((bent.sum(-1), b2))
        return found


class _Regressed(torch.autograd.Function):
    """Regressions as one operation of autograd: what it keeps is the length alone."""

    @staticmethod
    def forward(log_length: Tensor, regressions: Regressions, order: int) -> Tensor:
        return regressions.derivative(log_length, order)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        log_length, ctx.regressions, ctx.order = inputs
        ctx.save_for_backward(log_length)
        ctx.save_for_forward(log_length)

    @staticmethod
    def _following(ctx: Any) -> int:
        if ctx.order == 2:
            raise NotImplementedError("neighbours have no third derivative by the length")
        return int(ctx.order) + 1

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        (log_length,) = ctx.saved_tensors
        slope = _Regressed.apply(log_length, ctx.regressions, _Regressed._following(ctx))
        return (cotangent * slope).sum().reshape(1), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        (log_length,) = ctx.saved_tensors
        order = _Regressed._following(ctx)
        return tangent * ctx.regressions.computed(log_length, order)[order]


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
            places = self.places
            known = Regressions(places, places, self._neighbours, self.correlation)
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

    def kinks(self) -> Mapping[str, Tensor]:
        if self.correlation.kink is None:
            return {}
        near, own = self.places[self._neighbours.clamp(min=0)], self.places[:, None]
        apart = torch.linalg.vector_norm(near - own, dim=-1).flatten()
        among = torch.linalg.vector_norm(near[:, :, None] - near[:, None], dim=-1).flatten()
        return {self.param_names[1]: self.correlation.kinks(torch.cat([apart, among]))}

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
