r"""Functions that densities share, with all their digits where a plain formula loses them."""

from __future__ import annotations

from math import log, pi, sqrt
from typing import Any

import torch
from torch import Tensor

__all__ = ["log1mexp", "log_ndtr", "log_rising", "mills", "softplus", "xlogy_ratio"]

#: From here on Stirling's series has all digits of float64.
_LARGE = 50.0


def softplus(x: Tensor) -> Tensor:
    r""":math:`\log(1 + e^x)`, to full precision at both ends."""
    return torch.logaddexp(x, torch.zeros_like(x))


def log1mexp(x: Tensor) -> Tensor:
    r""":math:`\log(1 - e^{-x})` for x > 0.

    Reference:
        Mächler, Accurately computing log(1 - exp(-|a|)) (2012), R package Rmpfr.
    """
    small = x < log(2)
    near = torch.where(small, x, 1.0)
    far = torch.where(small, 1.0, x)
    return torch.where(small, (-torch.expm1(-near)).log(), torch.log1p(-torch.exp(-far)))


def log_rising(y: Tensor, s: Tensor) -> Tensor:
    r""":math:`\log\Gamma(s + y) - \log\Gamma(s)` for y ≥ 0 and s > 0, also for large s.

    There it is a difference of large numbers, and the terms of Stirling's series
    are subtracted one by one instead. It is differentiable in s and in y.
    """
    y, s = torch.broadcast_tensors(y, s)
    large = s > _LARGE
    plain = torch.where(large, torch.ones_like(s), s)
    direct = torch.lgamma(plain + y) - torch.lgamma(plain)
    big = torch.where(large, s, torch.full_like(s, _LARGE))
    top = big + y
    rest = (top - 0.5) * torch.log1p(y / big) - y + y * big.log()
    return torch.where(large, rest + _stirling(top) - _stirling(big), direct)


def xlogy_ratio(y: Tensor, mean: Tensor) -> Tensor:
    r""":math:`y\log(y/\mu)`, 0 where y is."""
    return torch.xlogy(y, y) - torch.xlogy(y, mean)


def _stirling(z: Tensor) -> Tensor:
    """What is left of the log-gamma function after its leading terms."""
    w = 1 / (z * z)
    return (1 / 12 - w * (1 / 360 - w * (1 / 1260 - w / 1680))) / z


def log_ndtr(x: Tensor) -> Tensor:
    r""":math:`\log\Phi(x)`, differentiable as often as wanted."""
    return _LogNdtr.apply(x, 0)


def mills(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""The first three derivatives of :math:`\log\Phi(x)`.

    With :math:`r = \varphi(x)/\Phi(x)` these are r, :math:`-r(x + r)` and
    :math:`r((x + r)(x + 2r) - 1)`, far to the left by series in 1/x.
    """
    far = x < -_LARGE
    near = torch.where(far, torch.zeros_like(x), x)
    r = sqrt(2 / pi) / torch.special.erfcx(-near / sqrt(2))
    d = near + r
    z = torch.where(far, -x, torch.full_like(x, _LARGE))
    w = 1 / (z * z)
    first = z + (1 - w * (2 - w * (10 - 74 * w))) / z
    second = -1 + w * (1 - w * (6 - w * (50 - 518 * w)))
    third = w / z * (2 - w * (24 - w * (300 - 4144 * w)))
    return (
        torch.where(far, first, r),
        torch.where(far, second, -r * d),
        torch.where(far, third, r * (d * (d + r) - 1)),
    )


class _LogNdtr(torch.autograd.Function):
    """A derivative of log Φ, by :func:`mills`: torch's own divides by what underflows.

    It is that of ``order``: 0 is log Φ itself, 1 its slope φ/Φ, the inverse Mills ratio, 2 the
    slope of that.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, order: int) -> Tensor:
        return mills(x)[order - 1] if order else torch.special.log_ndtr(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        x, ctx.order = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        if ctx.order < 2:
            return cotangent * _LogNdtr.apply(x, ctx.order + 1), None
        r, slope, bend = mills(x)
        # Beyond the third derivative plain operations would do; far to the left it vanishes.
        return cotangent * (bend if not x.requires_grad else -2 * r * slope - r - x * slope), None
