"""Standard errors of functions of estimated coordinates, where they have them."""

from __future__ import annotations

from math import nan

import torch
from torch import Tensor

from openreml_nn.estimation.curvature import FLAT
from openreml_nn.support.solving import inverted
from openreml_nn.support.spectrum import decomposed

__all__ = ["Spread"]

#: A direction is known so well, where the data say nothing along it.
_ROUNDING = 1e-4


class Spread:
    """The covariance of coordinates by their information.

    Args:
        information: (m, m).
        has_silence: whether the data may say nothing about a combination of the coordinates.
        at_boundary: (m,) which coordinates are at a boundary; none by default.

    Attributes:
        covariance: (m, m), NaN for coordinates at a boundary or without information.
        silent: (m, d) directions about which the data say nothing.
    """

    def __init__(
        self, information: Tensor, has_silence: bool, at_boundary: Tensor | None = None
    ) -> None:
        inner = information.diagonal() != 0
        if at_boundary is not None:
            inner = inner & ~at_boundary
        inner = inner.nonzero()[:, 0]
        part = information[inner][:, inner]
        scale = part.diagonal().abs().sqrt()
        scale = torch.where(scale > 0, scale, 1)
        part = part / (scale[:, None] * scale)
        silent = part.new_zeros(len(inner), 0)
        what = "the information of the covariance parameters"
        if has_silence:
            values, vectors = decomposed(part, what)
            silent = vectors[:, values < FLAT * values.max()]
            silent = torch.where(silent.abs() > _ROUNDING, silent, 0)
        rtol = FLAT if silent.shape[1] else None
        inverse = inverted(part, what, pseudo=True, rtol=rtol)
        self.covariance = torch.full_like(information, nan)
        self.covariance[inner[:, None], inner] = inverse / (scale[:, None] * scale)
        self.silent = information.new_zeros(len(information), silent.shape[1])
        self.silent[inner] = silent / scale[:, None]

    def errors(self, J: Tensor) -> Tensor:
        """Standard errors of functions by their Jacobian, coordinates first.

        NaN for a function of a coordinate that has none, and for one that moves along a direction
        about which the data say nothing.
        """
        known = torch.where(self.covariance.isnan(), 0, self.covariance)
        error = torch.einsum("i...,ij,j...->...", J, known, J).clamp(min=0).sqrt()
        lost = (J[self.covariance.diagonal().isnan()] != 0).any(0)
        if self.silent.shape[1]:
            moved, most = (
                torch.einsum("i...,id->d...", x, s)
                for x, s in ((J, self.silent), (J.abs(), self.silent.abs()))
            )
            lost |= (moved.abs() > _ROUNDING * most).any(0)
        return torch.where(lost, nan, error)
