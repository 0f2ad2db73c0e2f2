r"""Matrices of distances, which may be those of places on a line.

A correlation :math:`e^{-\lambda d}` of places on a line is that of a Markov process: each place depends
on those before it through the last alone, and the inverse is tridiagonal in their order.

Reference:
    Rue and Held, Gaussian Markov Random Fields (2005), section 1.1; Doob, Annals of Mathematics 43
    (1942) 351, for the process.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from openreml_nn.covariance.matrix import Matrix
from openreml_nn.support.checks import check_constant, check_symmetric
from openreml_nn.support.errors import InputError
from openreml_nn.terms.covariance import DenseCovariance
from openreml_nn.terms.design import IdentityDesign
from openreml_nn.terms.precision import PrecisionCovariance
from openreml_nn.terms.series import LONG, DecayPrecision
from openreml_nn.terms.term import Term

__all__ = ["SpacedMatrix", "check_distance", "distances", "shortest"]

#: Stretches of a line, of so many places as are few, whose distances tell what is far.
_STRETCHES = 8


def distances(places: Tensor, others: Tensor) -> Tensor:
    """Euclidean distances (n, m) between places (n, s) and others (m, s), without the digits that
    products of large coordinates would lose."""
    return torch.cdist(places, others, compute_mode="donot_use_mm_for_euclid_dist")


class SpacedMatrix(Matrix):
    """A covariance of rows at distances.

    Args:
        distance: (n, n) distances, or n places on a line, (n,), all different; those far from zero are held
            as what they are beyond one of them.
        param_specs: see :class:`Matrix`.
    """

    distance: Tensor

    def __init__(self, distance: Tensor, param_specs: Mapping[str, Any]) -> None:
        super().__init__((len(distance), len(distance)), param_specs)
        self._origin = _origin_of(distance)
        self.register_data("distance", distance - self._origin if self._origin else distance)
        self._series: tuple[Tensor, Tensor] | None = None
        self._known: tuple[Tensor, DecayPrecision] | None = None

    @property
    def is_markov(self) -> bool:
        r"""Whether the correlation is :math:`e^{-\lambda d}`."""
        return True

    def rate(self) -> Tensor:
        r"""The rate λ of a correlation :math:`e^{-\lambda d}`, (1,)."""
        raise NotImplementedError

    def apart(self) -> Tensor:
        """Distances, (n, n)."""
        if self.distance.dim() == 2:
            return self.distance
        at = self.distance if self._series is None else self.distance[self._series[1]]
        return (at[:, None] - at).abs()

    def together(self, values: Tensor) -> Tensor:
        """Values (…, n, n), zero between rows of different series."""
        if self._series is None:
            return values
        series = self._series[0]
        return values * (series[:, None] == series)

    def spread(self) -> Tensor:
        """Distances above zero, in no order; of many places on a line those within some stretches, whose
        length does not grow with the line's."""
        if self.distance.dim() == 2:
            return self.distance[self.distance > 0]
        places = self.distance.sort().values
        if len(places) <= LONG:
            return torch.pdist(places[:, None])
        stretches = places[: len(places) // LONG * LONG].unflatten(0, (-1, LONG))
        some = stretches[:: -(-len(stretches) // _STRETCHES)]
        return torch.cat([torch.pdist(stretch[:, None]) for stretch in some])

    def at(self, series: Tensor, positions: Tensor) -> Self:
        """The process at some of its places in independent series, with the parameters of this matrix.

        Args:
            series: (n,) which series.
            positions: (n,) which of the places, each once in a series.

        Raises:
            InputError: if the places are known by their distances.
        """
        self._check_has_places()
        made = copy.copy(self)
        made.known_shape = (len(series), len(series))
        made._series, made._known = (series, positions), None
        return made

    def line(self) -> DecayPrecision:
        """The precision of places on a line.

        Raises:
            InputError: if the places are known by their distances.
        """
        self._check_has_places()
        if self._known is None or self._known[0] is not self.distance:
            places, series = self.distance.double(), None
            if self._series is not None:
                places, series = places[self._series[1]], self._series[0].cpu().numpy()
            self._known = self.distance, DecayPrecision(places.cpu().numpy(), series)
        return self._known[1]

    def _check_has_places(self) -> None:
        if self.distance.dim() == 2:
            raise InputError(
                f"`distance` is {tuple(self.distance.shape)} distances: expected places on a line, (n,)"
            )

    def is_chain(self) -> bool:
        """Whether the inverse is tridiagonal, in some order of the rows."""
        return self.distance.dim() == 1 and self.is_markov

    def structure(self) -> list[Term]:
        n = self.shape[0]
        if not self.is_chain():
            return super().structure()
        if n > LONG or self._series is not None:
            x = torch.cat([self.build_params()[:1], self.rate()])
            return [Term(IdentityDesign(n), PrecisionCovariance(x, self.line()))]
        ordered = not self.distance.is_meta and bool((self.distance.diff() > 0).all())
        return [Term(IdentityDesign(n), DenseCovariance(self(), chained=ordered))]

    def variances(self) -> Tensor:
        return self.build_params()[:1].expand(self.shape[0])

    @torch.no_grad()
    def regressed(self, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The nearest of these on both sides of other places (k, 1), (k, 2), their weights (k, 2), and
        the part of the variance that is left beside them (k,), at the present parameters.

        Raises:
            InputError: if the places are known by their distances.
        """
        self._check_has_places()
        places = places - self._origin
        rate, own = self.rate(), self.distance.to(places)
        known, order = own.sort()
        at = places[:, 0].contiguous()
        right = torch.searchsorted(known, at)
        sides = torch.stack([right - 1, right], 1)
        outside = (sides < 0) | (sides >= len(known))
        sides = sides.clamp(0, len(known) - 1)
        # Beyond either end there is no place on one side, as far as can be.
        since = rate.to(places) * (at[:, None] - known[sides]).abs()
        phi = torch.where(outside, 0.0, torch.exp(-since))
        d = torch.where(outside, 1.0, -torch.expm1(-2 * since))
        both = d[:, 0] + d[:, 1] - d[:, 0] * d[:, 1]  # 1 - phi_1^2 phi_2^2
        weights = phi * d.flip(1) / both[:, None]
        same = d == 0
        weights = torch.where(same.any(1, keepdim=True), same.to(weights), weights)
        left = torch.where(same.any(1), 0.0, d[:, 0] * d[:, 1] / both)
        return order[sides], weights, left


def _origin_of(distance: Tensor) -> float:
    """What is taken off places on a line: as dates in seconds, those that are further from zero than from
    each other would not differ in a type of fewer digits. Nothing is rounded by it."""
    if distance.dim() == 2 or distance.is_meta:
        return 0.0
    low, high = float(distance.min()), float(distance.max())
    nearest = low if low > 0 else high
    return nearest if low * high > 0 and abs(nearest) > high - low else 0.0


def shortest(distance: Tensor) -> float:
    """The shortest distance above zero of (n, n) distances or (n,) places; 1 where there is none."""
    apart = distance[distance > 0] if distance.dim() == 2 else distance.sort().values.diff()
    return float(apart.min()) if apart.numel() else 1.0


def check_distance(distance: Tensor, expected: str) -> None:
    """Refuse what is neither distances nor places on a line, see :class:`SpacedMatrix`.

    Args:
        distance: (n, n) or (n,).
        expected: what a distance is, in messages.

    Raises:
        TypeError: if it is no floating-point tensor.
        InputError: if it has another shape, is not finite, has a negative distance or one place twice.
    """
    if isinstance(distance, Tensor) and distance.is_floating_point() and distance.dim() == 1:
        _check_line(distance)
        return
    check_symmetric("distance", distance)
    if bool((distance < 0).any()) or bool((distance.diagonal() != 0).any()):
        raise InputError(
            f"`distance` has a negative entry or one on the diagonal that is not zero: expected {expected}"
        )


def _check_line(places: Tensor) -> None:
    if not len(places):
        raise InputError("`distance` has shape (0,): it is empty")
    check_constant("distance", places)
    if places.is_meta:
        return
    if not bool(torch.isfinite(places).all()):
        raise InputError("`distance` has an entry that is not finite")
    known, order = places.sort()
    same = known.diff() == 0
    if bool(same.any()):
        first = int(same.long().argmax())
        i, j = sorted(order[first : first + 2].tolist())
        raise InputError(
            f"`distance` has the same place in rows {i} and {j}: expected distinct places on a line, or "
            "(n, n) distances"
        )
