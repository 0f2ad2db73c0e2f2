"""Positive responses, and positive ones with zeros."""

from __future__ import annotations

from math import log, pi

import numpy as np
import torch
from torch import Tensor

from openreml_nn.covariance.params import free_specs
from openreml_nn.covariance.transform import (
    TransformChain,
    TransformExp,
    TransformScaleShift,
    TransformSigmoid,
)
from openreml_nn.families.drawing import distribution, drawn, up_to
from openreml_nn.families.family import Family, refuse_rows
from openreml_nn.families.special import exp_rest, log_gamma_rest
from openreml_nn.support.checks import check_choice
from openreml_nn.support.errors import InputError

__all__ = ["Gamma", "Tweedie"]


class Gamma(Family):
    r"""A gamma distribution of mean :math:`\mu = e^\eta` and variance :math:`\varphi\mu^2`.

    ========== ============= =========
    Parameter  Transform     Default
    ========== ============= =========
    phi        exp(x)        1
    ========== ============= =========

    Args:
        link: ``"log"``.

    Raises:
        InputError: if the link is another.

    Reference:
        McCullagh and Nelder, Generalized Linear Models (1989), chapter 8; its shape is
        :math:`1/\varphi`.
    """

    name = "gamma"
    link = "log"

    def __init__(self, link: str = "log") -> None:
        check_choice("link", link, ("log",))
        super().__init__(free_specs(["phi"], 0.0, TransformExp(degree=0)))

    def log_density(self, y: Tensor, eta: Tensor) -> Tensor:
        a = 1 / self.natural("phi", eta)
        z = y.log() - eta
        # By Stirling's formula, as a log a - a and log Γ(a) cancel where the shape is large.
        spread = (a.log() - log(2 * pi)) / 2
        return spread - log_gamma_rest(a) - a * exp_rest(z) - y.log()

    def derivatives(self, y: Tensor, eta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a = 1 / self.natural("phi", eta)
        z = y.log() - eta
        ratio = a * z.exp()
        return a * torch.expm1(z), -ratio, ratio

    def mean(self, eta: Tensor) -> Tensor:
        return eta.exp()

    def variance(self, eta: Tensor) -> Tensor:
        return self.natural("phi", eta) * (2 * eta).exp()

    def deviance(self, y: Tensor, mean: Tensor) -> Tensor:
        ratio = y / mean
        return 2 * (ratio - 1 - ratio.log())

    def draw(self, y: Tensor, eta: Tensor, rng: np.random.Generator) -> Tensor:
        phi = self.natural("phi", eta)
        found = drawn(rng.gamma, eta, (1 / phi).expand_as(eta), phi * eta.exp())
        return found.clamp(min=torch.finfo(found.dtype).tiny)  # 0 is the nearest number to some

    def cumulative(self, y: Tensor, eta: Tensor) -> tuple[Tensor, Tensor]:
        phi = self.natural("phi", eta)
        none = torch.zeros_like(eta)
        return up_to("gamma", y, (1 / phi).expand_as(eta), none, phi * eta.exp())

    def check(self, y: Tensor, what: str = "`y`") -> None:
        super().check(y, what)
        refuse_rows(y, y <= 0, what, "positive numbers")

    def exact_predictor(self, y: Tensor) -> Tensor:
        return y.log()

    def start(self, y: Tensor) -> Tensor:
        spread = y.log().var() if len(y) > 1 else y.new_ones(())
        self.set_start("phi", (spread / 2).clamp(min=1e-6))
        return y.log()


class Tweedie(Family):
    r"""A Poisson number of gamma amounts: mean :math:`\mu = e^\eta`, variance
    :math:`\varphi\mu^p`, 1 < p < 2, and exact zeros.

    ========== ============= =========
    Parameter  Transform     Default
    ========== ============= =========
    phi        exp(x)        1
    p          1 + sigmoid   1.5
    ========== ============= =========

    Reference:
        Dunn and Smyth, Statistics and Computing 15 (2005) 267, whose series is summed.
    """

    name = "tweedie"
    link = "log"

    #: Terms of the series more than these e-folds below the largest are rounding.
    _REACH = 40.0
    #: Terms of the series that are held at most.
    _MOST = 2**26

    def __init__(self) -> None:
        between = TransformChain([TransformSigmoid(), TransformScaleShift(1.0, 1.0)])
        super().__init__(
            {
                **free_specs(["phi"], 0.0, TransformExp(degree=0)),
                **free_specs(["p"], 0.0, between),
            }
        )

    def log_density(self, y: Tensor, eta: Tensor) -> Tensor:
        phi, p = self.natural("phi", eta), self.natural("p", eta)
        kernel = ((2 - p) * eta).exp() / (2 - p)
        tilt = y * ((1 - p) * eta).exp() / (1 - p)
        positive = y > 0
        safe = torch.where(positive, y, torch.ones_like(y))
        series = torch.where(positive, self._series(safe, phi, p), 0 * y)
        return (tilt - kernel) / phi + series

    def derivatives(self, y: Tensor, eta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        phi, p = self.natural("phi", eta), self.natural("p", eta)
        up, down = ((2 - p) * eta).exp() / phi, y * ((1 - p) * eta).exp() / phi
        a, b = 2 - p, 1 - p
        return down - up, b * down - a * up, b * b * down - a * a * up

    def mean(self, eta: Tensor) -> Tensor:
        return eta.exp()

    def variance(self, eta: Tensor) -> Tensor:
        return self.natural("phi", eta) * (self.natural("p", eta) * eta).exp()

    def deviance(self, y: Tensor, mean: Tensor) -> Tensor:
        r"""At the family's own p."""
        p = self.natural("p", mean)
        a, b = 1 - p, 2 - p
        return 2 * (y**b / (a * b) - y * mean**a / a + mean**b / b)

    def draw(self, y: Tensor, eta: Tensor, rng: np.random.Generator) -> Tensor:
        rate, shape, scale = self._amounts(eta)
        count = drawn(rng.poisson, eta, rate)
        return drawn(rng.gamma, eta, count * shape, scale)  # no amount adds up to 0

    def cumulative(self, y: Tensor, eta: Tensor) -> tuple[Tensor, Tensor]:
        rate, shape, scale = (x.numpy(force=True) for x in self._amounts(eta))
        at = y.numpy(force=True)
        total, counts, amounts = np.exp(-rate), distribution("poisson"), distribution("gamma")
        for count in range(1, int(counts.isf(1e-16, rate.max())) + 2):
            own = amounts.cdf(at, count * shape, scale=scale)
            total = total + counts.pmf(count, rate) * own
        found = torch.from_numpy(np.minimum(total, 1.0)).to(eta)
        return torch.where(y == 0, torch.zeros_like(found), found), found

    def _amounts(self, eta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The mean number of amounts, and the shape and the scale of each."""
        phi, p = self.natural("phi", eta), self.natural("p", eta)
        rate = ((2 - p) * eta).exp() / (phi * (2 - p))
        return rate, ((2 - p) / (p - 1)).expand_as(eta), phi * (p - 1) * ((p - 1) * eta).exp()

    def check(self, y: Tensor, what: str = "`y`") -> None:
        super().check(y, what)
        refuse_rows(y, y < 0, what, "numbers of 0 or more")

    def exact_predictor(self, y: Tensor) -> Tensor:
        return y.log()

    def start(self, y: Tensor) -> Tensor:
        mean = y.mean().clamp(min=1e-8)
        spread = y.var() if len(y) > 1 else mean
        self.set_start("phi", (spread / mean**1.5 / 2).clamp(min=1e-6))
        return ((y + mean) / 2).log()

    def _series(self, y: Tensor, phi: Tensor, p: Tensor) -> Tensor:
        r"""The logarithm of :math:`y^{-1}\sum_{j \ge 1} W_j`, of the terms that count."""
        shape = (2 - p) / (p - 1)  # of the gamma amounts
        with torch.no_grad():
            middle = y.double() ** (2 - p.double()) / (phi.double() * (2 - p.double()))
            # About its middle the series falls as a normal curve of this width, or faster.
            width = (2 * self._REACH * middle / (1 + shape.double())).sqrt() + self._REACH
            first = (middle - width).floor().clamp(min=1)
            count = int((middle + width).ceil().sub(first).max()) + 1
            if count * len(y) > self._MOST:
                raise InputError(
                    f"the Tweedie density of {len(y)} rows takes a series of {count} terms each: "
                    "`phi` is too small beside the responses"
                )
        j = first.to(y)[:, None] + torch.arange(count, dtype=y.dtype, device=y.device)
        scale = shape * (y.log() - (p - 1).log()) - (1 + shape) * phi.log() - (2 - p).log()
        terms = j * scale[:, None] - torch.lgamma(j + 1) - torch.lgamma(j * shape)
        return torch.logsumexp(terms, 1) - y.log()
