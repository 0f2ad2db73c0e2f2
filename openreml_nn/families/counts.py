"""Counts."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
import torch
from torch import Tensor

from openreml_nn.covariance.params import free_specs
from openreml_nn.covariance.transform import TransformExp
from openreml_nn.families.drawing import below_and_at, drawn
from openreml_nn.families.family import Family, refuse_rows
from openreml_nn.families.special import log_rising, polygamma_rising, softplus, xlogy_ratio

__all__ = ["NegativeBinomial", "NegativeBinomial1", "Poisson"]


class _Count(Family):
    r"""A count with :math:`\log\mu = \eta`."""

    link = "log"

    def log_density(self, y: Tensor, eta: Tensor) -> Tensor:
        return self.kernel(y, eta) - torch.lgamma(y + 1)

    @abstractmethod
    def kernel(self, y: Tensor, eta: Tensor) -> Tensor: ...

    def mean(self, eta: Tensor) -> Tensor:
        return eta.exp()

    def deviance(self, y: Tensor, mean: Tensor) -> Tensor:
        return 2 * (xlogy_ratio(y, mean) - (y - mean))

    def check(self, y: Tensor, what: str = "`y`") -> None:
        super().check(y, what)
        refuse_rows(y, (y < 0) | (y != y.round()), what, "whole numbers of 0 or more")

    def start(self, y: Tensor) -> Tensor:
        return ((y + y.mean().clamp(min=0.1)) / 2).log()

    @staticmethod
    def _excess(y: Tensor) -> Tensor:
        r"""The variance of counts beyond that of a Poisson's, over :math:`\mu^2`, on average."""
        mean = y.mean().clamp(min=1e-8)
        spread = y.var() if len(y) > 1 else mean
        return ((spread - mean) / mean**2).clamp(min=0.05, max=20.0)


class Poisson(_Count):
    r"""Counts :math:`y \sim \mathrm{Poisson}(\mu)`, :math:`\log\mu = \eta`, of variance :math:`\mu`.

    Reference:
        McCullagh and Nelder, Generalized Linear Models (1989), chapter 6.

    >>> Poisson().log_density(torch.tensor([0.0, 1.0]), torch.zeros(2))
    tensor([-1., -1.])
    """

    name = "poisson"

    def kernel(self, y: Tensor, eta: Tensor) -> Tensor:
        return y * eta - eta.exp()

    def derivatives(self, y: Tensor, eta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mu = eta.exp()
        return y - mu, -mu, -mu

    def variance(self, eta: Tensor) -> Tensor:
        return eta.exp()

    def draw(self, y: Tensor, eta: Tensor, rng: np.random.Generator) -> Tensor:
        return drawn(rng.poisson, eta, eta.exp())

    def cumulative(self, y: Tensor, eta: Tensor) -> tuple[Tensor, Tensor]:
        return below_and_at("poisson", y, eta.exp())


class _NegativeBinomial(_Count):
    """What is drawn by SciPy's and NumPy's negative binomial."""

    def draw(self, y: Tensor, eta: Tensor, rng: np.random.Generator) -> Tensor:
        return drawn(rng.negative_binomial, eta, *self._size_and_share(eta))

    def cumulative(self, y: Tensor, eta: Tensor) -> tuple[Tensor, Tensor]:
        return below_and_at("nbinom", y, *self._size_and_share(eta))

    @abstractmethod
    def _size_and_share(self, eta: Tensor) -> tuple[Tensor, Tensor]:
        """As textbooks have it: successes, and the probability of one."""


class NegativeBinomial(_NegativeBinomial):
    r"""Counts of variance :math:`\mu + \mu^2/\theta`, :math:`\log\mu = \eta`.

    ========== ============= =========
    Parameter  Transform     Default
    ========== ============= =========
    theta      exp(x)        1
    ========== ============= =========

    It becomes the Poisson distribution as :math:`\theta \to \infty`.

    Reference:
        Hilbe, Negative Binomial Regression (2011), chapter 8 (NB2).
    """

    name = "negative_binomial"

    def __init__(self) -> None:
        super().__init__(free_specs(["theta"], 0.0, TransformExp(degree=0)))

    def kernel(self, y: Tensor, eta: Tensor) -> Tensor:
        theta = self.natural("theta", eta)
        more = softplus(eta - theta.log())  # log(1 + mu / theta)
        return log_rising(y, theta) - y * theta.log() + y * (eta - more) - theta * more

    def derivatives(self, y: Tensor, eta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        theta = self.natural("theta", eta)
        x = eta - theta.log()
        r, rest = torch.sigmoid(x), torch.sigmoid(-x)
        total = (y + theta) * r
        second = -total * rest
        # y (1 - r) - theta r keeps its digits where theta is large.
        return y * rest - theta * r, second, second * (rest - r)

    def variance(self, eta: Tensor) -> Tensor:
        mu = eta.exp()
        return mu + mu * mu / self.natural("theta", eta)

    def deviance(self, y: Tensor, mean: Tensor) -> Tensor:
        r"""At the family's own :math:`\theta`."""
        theta = self.natural("theta", mean)
        return 2 * (xlogy_ratio(y, mean) - xlogy_ratio(y + theta, mean + theta))

    def _size_and_share(self, eta: Tensor) -> tuple[Tensor, Tensor]:
        theta = self.natural("theta", eta)
        return theta.expand_as(eta), torch.sigmoid(theta.log() - eta)

    def start(self, y: Tensor) -> Tensor:
        self.set_start("theta", 2 / self._excess(y))
        return super().start(y)


class NegativeBinomial1(_NegativeBinomial):
    r"""Counts of variance :math:`\mu(1 + \varphi)`, :math:`\log\mu = \eta`.

    ========== ============= =========
    Parameter  Transform     Default
    ========== ============= =========
    phi        exp(x)        1
    ========== ============= =========

    Reference:
        Hilbe, Negative Binomial Regression (2011), chapter 10 (NB1).
    """

    name = "negative_binomial_1"

    def __init__(self) -> None:
        super().__init__(free_specs(["phi"], 0.0, TransformExp(degree=0)))

    def kernel(self, y: Tensor, eta: Tensor) -> Tensor:
        phi = self.natural("phi", eta)
        size = (eta - phi.log()).exp()
        tail = y * (phi.log() - phi.log1p()) - size * phi.log1p()
        return log_rising(y, size) + tail

    def derivatives(self, y: Tensor, eta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        phi = self.natural("phi", eta)
        size = (eta - phi.log()).exp()  # whose derivative is itself
        one, two, three = polygamma_rising(y, size)
        first, square = size * (one - phi.log1p()), size * size
        second = first + square * two
        return first, second, second + square * (2 * two + size * three)

    def variance(self, eta: Tensor) -> Tensor:
        return eta.exp() * (1 + self.natural("phi", eta))

    def _size_and_share(self, eta: Tensor) -> tuple[Tensor, Tensor]:
        phi = self.natural("phi", eta)
        return eta.exp() / phi, (1 / (1 + phi)).expand_as(eta)

    def start(self, y: Tensor) -> Tensor:
        self.set_start("phi", (self._excess(y) * y.mean() / 2).clamp(min=0.05))
        return super().start(y)
