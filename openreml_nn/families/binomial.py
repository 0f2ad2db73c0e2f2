"""Successes among trials."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from openreml_nn.families.drawing import below_and_at, drawn
from openreml_nn.families.family import Family, refuse_rows
from openreml_nn.families.special import log1mexp, log_ndtr, mills, xlogy_ratio
from openreml_nn.support.checks import check_choice
from openreml_nn.support.errors import InputError

__all__ = ["Binomial"]

Derivatives = tuple[Tensor, Tensor, Tensor]


class Binomial(Family):
    r""":math:`s \sim \mathrm{Bin}(s + f, p)`, :math:`g(p) = \eta`.

    The response is (n,) of 0 and 1, or (n, 2) of successes s and failures f; the binomial
    coefficient is part of the density. With weights it may be the proportions (n,) of successes, the
    weights being the trials.

    Args:
        link: ``"logit"``, ``"probit"`` or ``"cloglog"``, :math:`\eta = \log(-\log(1 - p))`.

    Raises:
        InputError: if the link is another.

    Reference:
        McCullagh and Nelder, Generalized Linear Models (1989), chapter 4.

    >>> Binomial().log_density(torch.tensor([1.0, 0.0]), torch.zeros(2))
    tensor([-0.6931, -0.6931])
    """

    name = "binomial"

    def __init__(self, link: str = "logit") -> None:
        super().__init__()
        check_choice("link", link, tuple(_LINKS))
        self.link = link

    def log_density(self, y: Tensor, eta: Tensor) -> Tensor:
        found = self.kernel(y, eta)
        return found if y.dim() == 1 else found + _log_coefficient(*_parts(y, eta))

    def kernel(self, y: Tensor, eta: Tensor) -> Tensor:
        if y.dim() == 1 and self.link != "cloglog":
            # Of one trial the density is the probability of what came about.
            return _LINKS[self.link].logs((2 * y.to(eta.dtype) - 1) * eta)[0]
        s, f = _parts(y, eta)
        yes, no = _LINKS[self.link].logs(eta)
        # A density without failures holds none of their logarithm, which may be infinite.
        return torch.where(s > 0, s * yes, 0 * eta) + torch.where(f > 0, f * no, 0 * eta)

    def derivatives(self, y: Tensor, eta: Tensor) -> Derivatives:
        if y.dim() == 1 and self.link != "cloglog":
            sign = 2 * y.to(eta.dtype) - 1
            first, second, third = _LINKS[self.link].slopes(sign * eta)
            return sign * first, second, sign * third
        s, f = _parts(y, eta)
        return _LINKS[self.link].derivatives(s, f, eta)

    def mean(self, eta: Tensor) -> Tensor:
        """The probability of a success."""
        return _LINKS[self.link].mean(eta)

    def variance(self, eta: Tensor) -> Tensor:
        """The variance of one trial."""
        p = self.mean(eta)
        return p * (1 - p)

    def deviance(self, y: Tensor, mean: Tensor) -> Tensor:
        s, f = _parts(y, mean)
        n = s + f
        return 2 * (xlogy_ratio(s, n * mean) + xlogy_ratio(f, n * (1 - mean)))

    def draw(self, y: Tensor, eta: Tensor, rng: np.random.Generator) -> Tensor:
        s, f = _parts(y, eta)
        found = drawn(rng.binomial, eta, (s + f).long(), self.mean(eta))
        return found if y.dim() == 1 else torch.stack([found, s + f - found], 1)

    def cumulative(self, y: Tensor, eta: Tensor) -> tuple[Tensor, Tensor]:
        s, f = _parts(y, eta)
        return below_and_at("binom", s, s + f, self.mean(eta))

    def check(self, y: Tensor, what: str = "`y`") -> None:
        if y.dim() == 1:
            expected = "0 or 1 of family 'binomial', the default of glmm()"
            if bool(((y >= 0) & (y <= 1)).all()):
                expected = "0 or 1; of proportions the trials are `weights`"
            refuse_rows(y, ~((y == 0) | (y == 1)), what, expected)
            return
        if y.dim() != 2 or y.shape[1] != 2:
            raise InputError(
                f"{what} has shape {tuple(y.shape)}: expected (n,) of 0 and 1, or (n, 2) of "
                "successes and failures"
            )
        whole = torch.isfinite(y) & (y >= 0) & (y == y.round())
        refuse_rows(y, ~whole, what, "whole numbers of successes and failures, 0 or more")
        refuse_rows(y, y.sum(1) == 0, what, "at least one trial")

    def with_weights(self, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor | None]:
        if y.dim() != 1 or not bool(((y > 0) & (y < 1)).any()):
            return y, weights
        expected = "with weights, which are trials, proportions between 0 and 1"
        refuse_rows(y, (y < 0) | (y > 1), "`y`", expected)
        dtype = torch.promote_types(y.dtype, weights.dtype)
        n = weights.to(dtype)
        refuse_rows(
            n, n != n.round(), "`weights`", "whole numbers, trials of the proportions in `y`"
        )
        product = y.to(dtype) * n
        s = product.round()
        # A proportion that was written with few digits is not of whole successes.
        slack = 1e-6 if dtype == torch.float64 else 1e-3
        wrong = (product - s).abs() > slack * n.clamp(min=1)
        expected = "whole successes, its product with the trials in `weights`"
        refuse_rows(product, wrong, "`y` times `weights`", expected)
        return torch.stack([s, n - s], 1), None

    def observed(self, y: Tensor) -> Tensor:
        return y if y.dim() == 1 else y[:, 0] / y.sum(1)

    def start(self, y: Tensor) -> Tensor:
        s, f = _parts(y, y)
        return _LINKS[self.link].link((s + 0.5) / (s + f + 1))


def _parts(y: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Successes and failures."""
    y = y.to(like.dtype)
    return (y, 1 - y) if y.dim() == 1 else (y[:, 0], y[:, 1])


def _log_coefficient(s: Tensor, f: Tensor) -> Tensor:
    """Logarithm of the binomial coefficient."""
    return torch.lgamma(s + f + 1) - torch.lgamma(s + 1) - torch.lgamma(f + 1)


class _Link:
    """How a probability follows from the linear predictor."""

    @staticmethod
    def logs(eta: Tensor) -> tuple[Tensor, Tensor]:
        r""":math:`\log p` and :math:`\log(1 - p)`."""
        raise NotImplementedError

    @staticmethod
    def slopes(eta: Tensor) -> Derivatives:
        r"""Derivatives of :math:`\log p`."""
        raise NotImplementedError

    @staticmethod
    def derivatives(s: Tensor, f: Tensor, eta: Tensor) -> Derivatives:
        r"""Derivatives of :math:`s \log p + f \log(1 - p)`."""
        raise NotImplementedError

    @staticmethod
    def mean(eta: Tensor) -> Tensor:
        """p."""
        raise NotImplementedError

    @staticmethod
    def link(p: Tensor) -> Tensor:
        """The linear predictor of p."""
        raise NotImplementedError


class _Logit(_Link):
    @staticmethod
    def logs(eta: Tensor) -> tuple[Tensor, Tensor]:
        return torch.nn.functional.logsigmoid(eta), torch.nn.functional.logsigmoid(-eta)

    @staticmethod
    def slopes(eta: Tensor) -> Derivatives:
        p, q = torch.sigmoid(eta), torch.sigmoid(-eta)
        second = -(p * q)
        return q, second, second * (q - p)

    @staticmethod
    def derivatives(s: Tensor, f: Tensor, eta: Tensor) -> Derivatives:
        p, q = torch.sigmoid(eta), torch.sigmoid(-eta)
        v = -(s + f) * p * q
        return s * q - f * p, v, v * (q - p)

    @staticmethod
    def mean(eta: Tensor) -> Tensor:
        return torch.sigmoid(eta)

    @staticmethod
    def link(p: Tensor) -> Tensor:
        return torch.logit(p)


class _Probit(_Link):
    @staticmethod
    def logs(eta: Tensor) -> tuple[Tensor, Tensor]:
        return log_ndtr(eta), log_ndtr(-eta)

    @staticmethod
    def slopes(eta: Tensor) -> Derivatives:
        return mills(eta)

    @staticmethod
    def derivatives(s: Tensor, f: Tensor, eta: Tensor) -> Derivatives:
        yes, no = mills(eta), mills(-eta)
        return s * yes[0] - f * no[0], s * yes[1] + f * no[1], s * yes[2] - f * no[2]

    @staticmethod
    def mean(eta: Tensor) -> Tensor:
        return torch.special.ndtr(eta)

    @staticmethod
    def link(p: Tensor) -> Tensor:
        return torch.special.ndtri(p)


class _Cloglog(_Link):
    r"""With :math:`m = e^\eta` the derivatives are those of :math:`q = m/(e^m - 1)`."""

    @staticmethod
    def logs(eta: Tensor) -> tuple[Tensor, Tensor]:
        m = eta.exp()
        tiny = eta < -20
        held = torch.where(tiny, 0 * eta, eta)
        return torch.where(tiny, eta - m / 2, log1mexp(held.exp())), -m

    @staticmethod
    def derivatives(s: Tensor, f: Tensor, eta: Tensor) -> Derivatives:
        m = eta.exp()
        small, zero = m < 0.05, torch.zeros_like(m)
        near, far = torch.where(small, m, zero), torch.where(small, zero + 1, m.clamp(max=700))
        w = near * near
        # q - 1 + m is a difference of near numbers where m is small: by the series there.
        q = torch.where(
            small, 1 - near / 2 + w / 12 - w * w / 720 + w**3 / 30240, far / torch.expm1(far)
        )
        k = torch.where(
            small, -near / 2 - w / 12 + w * w / 720 - w**3 / 30240, 1 - far - far / torch.expm1(far)
        )
        dq = q * k
        dk = -torch.where(small, near, far) - dq
        first, second, third = s * q, s * dq, s * (dq * k + q * dk)
        lost = torch.where(f > 0, f * m, zero)
        return first - lost, second - lost, third - lost

    @staticmethod
    def mean(eta: Tensor) -> Tensor:
        return -torch.expm1(-eta.exp())

    @staticmethod
    def link(p: Tensor) -> Tensor:
        return torch.log(-torch.log1p(-p))


_LINKS: dict[str, type[_Link]] = {"logit": _Logit, "probit": _Probit, "cloglog": _Cloglog}
