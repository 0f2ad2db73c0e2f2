"""Continuous proportions."""

from __future__ import annotations

from math import log, pi

import numpy as np
import torch
from torch import Tensor

from openreml_nn.covariance.params import free_specs
from openreml_nn.covariance.transform import TransformExp
from openreml_nn.families.drawing import drawn, up_to
from openreml_nn.families.family import Family, refuse_rows
from openreml_nn.families.special import (
    bernoulli_divergence,
    digamma_rest,
    log_gamma_rest,
    softplus,
    trigamma_tetragamma,
    xlogy_ratio,
)
from openreml_nn.support.checks import check_choice

__all__ = ["Beta"]


class Beta(Family):
    r"""A beta distribution of mean :math:`\mu`, :math:`\mathrm{logit}\,\mu = \eta`, and variance
    :math:`\mu(1 - \mu)/(1 + \varphi)`.

    ========== ============= =========
    Parameter  Transform     Default
    ========== ============= =========
    phi        exp(x)        10
    ========== ============= =========

    Args:
        link: ``"logit"``.

    Raises:
        InputError: if the link is another.

    Reference:
        Ferrari and Cribari-Neto, Journal of Applied Statistics 31 (2004) 799.
    """

    name = "beta"
    link = "logit"

    def __init__(self, link: str = "logit") -> None:
        check_choice("link", link, ("logit",))
        super().__init__(free_specs(["phi"], log(10.0), TransformExp(degree=0)))

    def log_density(self, y: Tensor, eta: Tensor) -> Tensor:
        # Stirling's formula in place of the gamma functions leaves the divergence of the mean from the
        # response and small terms, which keep their digits however large the precision is.
        phi = self.natural("phi", eta)
        a, b = self._shapes(eta)
        kernel = -phi * bernoulli_divergence(eta, y.logit())
        spread = (phi.log() - softplus(eta) - softplus(-eta) - log(2 * pi)) / 2
        rest = log_gamma_rest(phi) - log_gamma_rest(a) - log_gamma_rest(b)
        return kernel + spread + rest - y.log() - torch.log1p(-y)

    def derivatives(self, y: Tensor, eta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        phi = self.natural("phi", eta)
        p, q = torch.sigmoid(eta), torch.sigmoid(-eta)
        a, b, v = phi * p, phi * q, p * q
        # Derivatives in the mean, and then of the mean by the chain rule.
        c1 = phi * (y.logit() - eta + digamma_rest(b) - digamma_rest(a))
        (a1, a2), (b1, b2) = trigamma_tetragamma(a), trigamma_tetragamma(b)
        c2 = -(phi**2) * (a1 + b1)
        c3 = -(phi**3) * (a2 - b2)
        bend, twist = v * (q - p), v * (1 - 6 * v)
        return c1 * v, c2 * v * v + c1 * bend, c3 * v**3 + 3 * c2 * v * bend + c1 * twist

    def mean(self, eta: Tensor) -> Tensor:
        return torch.sigmoid(eta)

    def variance(self, eta: Tensor) -> Tensor:
        return torch.sigmoid(eta) * torch.sigmoid(-eta) / (1 + self.natural("phi", eta))

    def deviance(self, y: Tensor, mean: Tensor) -> Tensor:
        return 2 * (xlogy_ratio(y, mean) + xlogy_ratio(1 - y, 1 - mean))

    def draw(self, y: Tensor, eta: Tensor, rng: np.random.Generator) -> Tensor:
        found = drawn(rng.beta, eta, *self._shapes(eta))
        # Of a small precision the nearest number to a draw may be 0 or 1 itself.
        tiny = torch.finfo(found.dtype)
        return found.clamp(tiny.tiny, 1 - tiny.eps / 2)

    def cumulative(self, y: Tensor, eta: Tensor) -> tuple[Tensor, Tensor]:
        return up_to("beta", y, *self._shapes(eta))

    def _shapes(self, eta: Tensor) -> tuple[Tensor, Tensor]:
        phi = self.natural("phi", eta)
        return phi * torch.sigmoid(eta), phi * torch.sigmoid(-eta)

    def check(self, y: Tensor, what: str = "`y`") -> None:
        super().check(y, what)
        refuse_rows(y, (y <= 0) | (y >= 1), what, "numbers between 0 and 1, both excluded")

    def exact_predictor(self, y: Tensor) -> Tensor:
        return y.logit()

    def start(self, y: Tensor) -> Tensor:
        mean = y.mean()
        spread = y.var() if len(y) > 1 else mean * (1 - mean) / 2
        self.set_start("phi", (2 * mean * (1 - mean) / spread.clamp(min=1e-8)).clamp(1.0, 1e4))
        return torch.logit(y)
