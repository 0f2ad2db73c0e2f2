"""Responses over the whole line."""

from __future__ import annotations

from math import log, pi

import numpy as np
import torch
from torch import Tensor

from openreml_nn.covariance.params import free_specs
from openreml_nn.covariance.transform import TransformExp, TransformExpPow2
from openreml_nn.families.drawing import drawn, up_to
from openreml_nn.families.family import Family
from openreml_nn.families.special import log_rising

__all__ = ["Gaussian", "StudentT"]


class Gaussian(Family):
    r""":math:`y \sim N(\eta, \sigma^2)`.

    ========== ============= =========
    Parameter  Transform     Default
    ========== ============= =========
    sigma^2    exp(2x)       1
    ========== ============= =========

    >>> Gaussian().log_density(torch.tensor([1.0]), torch.tensor([1.0])).detach()
    tensor([-0.9189])
    """

    name = "gaussian"

    def __init__(self) -> None:
        super().__init__(free_specs(["sigma^2"], 0.0, TransformExpPow2()))

    def log_density(self, y: Tensor, eta: Tensor) -> Tensor:
        s = self.natural("sigma^2", eta)
        return -0.5 * (log(2 * pi) + s.log() + (y - eta) ** 2 / s)

    def derivatives(self, y: Tensor, eta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        s = self.natural("sigma^2", eta)
        return (y - eta) / s, (-1 / s).expand_as(eta), torch.zeros_like(eta)

    def mean(self, eta: Tensor) -> Tensor:
        return eta

    def variance(self, eta: Tensor) -> Tensor:
        return self.natural("sigma^2", eta).expand_as(eta)

    def deviance(self, y: Tensor, mean: Tensor) -> Tensor:
        return (y - mean) ** 2

    def draw(self, y: Tensor, eta: Tensor, rng: np.random.Generator) -> Tensor:
        return drawn(rng.normal, eta, eta, self.variance(eta).sqrt())

    def cumulative(self, y: Tensor, eta: Tensor) -> tuple[Tensor, Tensor]:
        return up_to("norm", y, eta, self.variance(eta).sqrt())

    def exact_predictor(self, y: Tensor) -> Tensor:
        return y

    def start(self, y: Tensor) -> Tensor:
        spread = y.var() if len(y) > 1 else y.new_ones(())
        self.set_start("sigma^2", torch.where(spread > 0, spread, torch.ones_like(spread)) / 2)
        return y.clone()


class StudentT(Family):
    r"""Student's t: :math:`(y - \eta)/\sigma \sim t_\nu`, for data with outliers.

    ========== ============= =========
    Parameter  Transform     Default
    ========== ============= =========
    sigma^2    exp(2x)       1
    nu         exp(x)        8
    ========== ============= =========

    The variance is :math:`\sigma^2\nu/(\nu - 2)`, infinite for :math:`\nu \le 2`.

    Reference:
        Lange, Little and Taylor, JASA 84 (1989) 881.
    """

    name = "student_t"

    def __init__(self) -> None:
        super().__init__(
            {
                **free_specs(["sigma^2"], 0.0, TransformExpPow2()),
                **free_specs(["nu"], log(8.0), TransformExp(degree=0)),
            }
        )

    def log_density(self, y: Tensor, eta: Tensor) -> Tensor:
        s, nu = self.natural("sigma^2", eta), self.natural("nu", eta)
        constant = log_rising(torch.full_like(nu, 0.5), nu / 2) - 0.5 * (nu * pi * s).log()
        return constant - (nu + 1) / 2 * torch.log1p((y - eta) ** 2 / (nu * s))

    def derivatives(self, y: Tensor, eta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        s, nu = self.natural("sigma^2", eta), self.natural("nu", eta)
        r, scale = y - eta, nu * s
        D = scale + r * r
        first = (nu + 1) * r / D
        second = -(nu + 1) * (scale - r * r) / D**2
        third = -2 * (nu + 1) * r * (3 * scale - r * r) / D**3
        return first, second, third

    def mean(self, eta: Tensor) -> Tensor:
        return eta

    def variance(self, eta: Tensor) -> Tensor:
        s, nu = self.natural("sigma^2", eta), self.natural("nu", eta)
        return torch.where(nu > 2, s * nu / (nu - 2), torch.inf).expand_as(eta)

    def deviance(self, y: Tensor, mean: Tensor) -> Tensor:
        r"""Twice the log-density lost, :math:`(\nu + 1)\log(1 + (y - \mu)^2/(\nu\sigma^2))`, in which
        outliers count as the family has it."""
        s, nu = self.natural("sigma^2", mean), self.natural("nu", mean)
        return (nu + 1) * torch.log1p((y - mean) ** 2 / (nu * s))

    def draw(self, y: Tensor, eta: Tensor, rng: np.random.Generator) -> Tensor:
        s, nu = self.natural("sigma^2", eta), self.natural("nu", eta)
        return eta + s.sqrt() * drawn(rng.standard_t, eta, nu.expand_as(eta))

    def cumulative(self, y: Tensor, eta: Tensor) -> tuple[Tensor, Tensor]:
        s, nu = self.natural("sigma^2", eta), self.natural("nu", eta)
        return up_to("t", y, nu.expand_as(eta), eta, s.sqrt().expand_as(eta))

    def exact_predictor(self, y: Tensor) -> Tensor:
        return y

    def start(self, y: Tensor) -> Tensor:
        middle = y.median()
        spread = (1.4826 * (y - middle).abs().median()) ** 2
        self.set_start("sigma^2", torch.where(spread > 0, spread, torch.ones_like(spread)) / 2)
        return y.clone()
