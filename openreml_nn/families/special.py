r"""Functions that densities share, with all their digits where a plain formula loses them."""

from __future__ import annotations

from math import log, pi, sqrt
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "bernoulli_divergence",
    "digamma_rest",
    "exp_rest",
    "log1mexp",
    "log_gamma",
    "log_gamma_rest",
    "log_ndtr",
    "log_rising",
    "mills",
    "polygamma_rising",
    "softplus",
    "trigamma_tetragamma",
    "xlogy_ratio",
]

#: From here on Stirling's series has all digits of float64.
_LARGE = 50.0
#: Up to here a Taylor series of few terms has them.
_SMALL = 0.01
#: The series of the trigamma function has all digits of float64 from here on,
_SHIFT = 9
#: by these Bernoulli numbers, of even index from 2 on.
_BERNOULLI = 1 / 6, -1 / 30, 1 / 42, -1 / 30, 5 / 66, -691 / 2730, 7 / 6, -3617 / 510


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


def log_gamma(z: Tensor) -> Tensor:
    r""":math:`\log\Gamma(z)` for z > 0, of which the second derivative has all its digits too."""
    return _LogGamma.apply(z, 0)


def log_rising(y: Tensor, s: Tensor) -> Tensor:
    r""":math:`\log\Gamma(s + y) - \log\Gamma(s)` for y ≥ 0 and s > 0, also for large s.

    There it is a difference of large numbers, and the terms of Stirling's series
    are subtracted one by one instead. It is differentiable in s and in y.
    """
    y, s = torch.broadcast_tensors(y, s)
    large = s > _LARGE
    plain = torch.where(large, torch.ones_like(s), s)
    direct = log_gamma(plain + y) - log_gamma(plain)
    big = torch.where(large, s, torch.full_like(s, _LARGE))
    top = big + y
    rest = (top - 0.5) * torch.log1p(y / big) - y + y * big.log()
    return torch.where(large, rest + _stirling(top) - _stirling(big), direct)


def log_gamma_rest(z: Tensor) -> Tensor:
    r""":math:`\log\Gamma(z) - (z - \tfrac12)\log z + z - \tfrac12\log 2\pi` for z > 0, what Stirling's
    formula leaves: 1/(12 z) and less where z is large.

    Reference:
        NIST Digital Library of Mathematical Functions, 5.11.1.
    """
    near, far = _apart(z)
    direct = log_gamma(near) - (near - 0.5) * near.log() + near - 0.5 * log(2 * pi)
    return torch.where(z > _LARGE, _stirling(far), direct)


def digamma_rest(z: Tensor) -> Tensor:
    r""":math:`\psi(z) - \log z` for z > 0, which is -1/(2 z) and less where z is large.

    Reference:
        NIST Digital Library of Mathematical Functions, 5.11.2.
    """
    near, far = _apart(z)
    return torch.where(z > _LARGE, _stirling_slope(far), _LogGamma.apply(near, 1) - near.log())


def polygamma_rising(y: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r""":math:`\psi^{(k)}(s + y) - \psi^{(k)}(s)` for k = 0, 1, 2: the derivatives of :func:`log_rising`
    in s, also for large s."""
    y, s = torch.broadcast_tensors(y, s)
    near, far = _apart(s)
    top, large = far + y, s > _LARGE
    w, v = 1 / (top * top), 1 / (far * far)
    leading = (
        torch.log1p(y / far),
        -y / (top * far),
        y * (top + far) * w * v,
    )
    above, below = ((_LogGamma.apply(x, 1), *trigamma_tetragamma(x)) for x in (near + y, near))
    found = []
    for order, first in enumerate(leading):
        series = first + _stirling_slope(top, order) - _stirling_slope(far, order)
        direct = above[order] - below[order]
        found.append(torch.where(large, series, direct))
    return found[0], found[1], found[2]


def trigamma_tetragamma(z: Tensor) -> tuple[Tensor, Tensor]:
    r""":math:`\psi'(z)` and :math:`\psi''(z)` for z > 0 with all their digits; torch's have nine of the first, and
    take several times as long for the second.

    Reference:
        NIST Digital Library of Mathematical Functions, 5.15.5 and 5.15.8.
    """
    return _TrigammaTetragamma.apply(z)


def exp_rest(x: Tensor) -> Tensor:
    r""":math:`e^x - 1 - x`, with its digits where x is small."""
    small = x.abs() < _SMALL
    near = torch.where(small, x, 0.0)
    total = near / 5040 + 1 / 720
    for k in (120, 24, 6, 2):
        total = total * near + 1 / k
    return torch.where(small, near * near * total, torch.expm1(x) - x)


def bernoulli_divergence(eta: Tensor, other: Tensor) -> Tensor:
    r""":math:`p\log(p/r) + (1 - p)\log((1 - p)/(1 - r))` of the probabilities of two logits, the first
    :math:`\eta`, with its digits where they are nearly equal.

    With d their difference and :math:`t = \log(1 + p(e^d - 1))` it is t - pd, which for small d is
    :math:`p(e^d - 1 - d) - (e^t - 1 - t)`. It is the same for the other outcome, so that p ≤ 1/2 here.
    """
    sign = torch.where(eta > 0, -1.0, 1.0)
    eta, other = eta * sign, other * sign
    d, p = other - eta, torch.sigmoid(eta)
    near = d.clamp(max=1.0)
    t = torch.log1p(p * torch.expm1(near))
    far = softplus(other) - softplus(eta) - p * d
    return torch.where(d < 1, p * exp_rest(near) - exp_rest(t), far)


def xlogy_ratio(y: Tensor, mean: Tensor) -> Tensor:
    r""":math:`y\log(y/\mu)`, 0 where y is."""
    return torch.xlogy(y, y) - torch.xlogy(y, mean)


def _apart(z: Tensor) -> tuple[Tensor, Tensor]:
    """z where it is small, and where it is large, each with a harmless number elsewhere."""
    large = z > _LARGE
    return torch.where(large, 1.0, z), torch.where(large, z, _LARGE)


def _stirling(z: Tensor) -> Tensor:
    """What is left of the log-gamma function after its leading terms."""
    w = 1 / (z * z)
    return (1 / 12 - w * (1 / 360 - w * (1 / 1260 - w / 1680))) / z


def _stirling_slope(z: Tensor, order: int = 0) -> Tensor:
    """What is left of the digamma function, or of its first or second derivative, after its leading
    term: log z, 1/z or -1/z²."""
    w = 1 / (z * z)
    if order == 0:
        return -0.5 / z - w * (1 / 12 - w * (1 / 120 - w * (1 / 252 - w / 240)))
    if order == 1:
        return w * (0.5 + (1 / 6 - w * (1 / 30 - w * (1 / 42 - w / 30))) / z)
    return -w * (1 / z + w * (0.5 - w * (1 / 6 - w * (1 / 6 - w * 0.3))))


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


class _LogGamma(torch.autograd.Function):
    """The log-gamma function (``order`` 0) and its slope (1), whose own is by :func:`trigamma_tetragamma`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, order: int) -> Tensor:
        return torch.digamma(z) if order else torch.lgamma(z)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        z, ctx.order = inputs
        ctx.save_for_backward(z)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:
        (z,) = ctx.saved_tensors
        return cotangent * (trigamma_tetragamma(z)[0] if ctx.order else _LogGamma.apply(z, 1)), None


class _TrigammaTetragamma(torch.autograd.Function):
    """The first and the second derivative of the digamma function, by :func:`trigamma_tetragamma`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor) -> tuple[Tensor, Tensor]:
        # Recurrence to where the series holds; in place, as memory is all that it takes.
        x, one, two = z.clone(), torch.zeros_like(z), torch.zeros_like(z)
        for _ in range(_SHIFT):
            r = x.reciprocal()
            s = r * r
            one += s
            two += s.mul_(r)
            x += 1
        v = x.reciprocal_()
        w = v * v
        rest, slope = (torch.zeros_like(w) for _ in range(2))
        for k in range(len(_BERNOULLI), 0, -1):
            rest.mul_(w).add_(_BERNOULLI[k - 1])
            slope.mul_(w).add_(_BERNOULLI[k - 1] * (2 * k + 1))
        one += v + w / 2 + rest.mul_(w).mul_(v)
        two.mul_(-2).sub_(w + w * v + slope.mul_(w).mul_(w))
        return one, two

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, of_one: Tensor, of_two: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        return of_one * trigamma_tetragamma(z)[1] + of_two * torch.polygamma(3, z)
