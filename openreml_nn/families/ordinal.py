"""Ordered categories."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openreml_nn.covariance.params import free_specs
from openreml_nn.covariance.transform import TransformExp
from openreml_nn.families.drawing import drawn
from openreml_nn.families.family import Family, refuse_rows
from openreml_nn.families.special import log1mexp, log_ndtr, softplus
from openreml_nn.support.checks import check_choice, check_count
from openreml_nn.support.errors import InputError

__all__ = ["Ordinal"]


class Ordinal(Family):
    r"""Ordered categories by a cumulative link: :math:`P(y \le j) = F(\tau_j - \eta)`.

    The response is a category, 0 to ``levels`` − 1. The linear predictor has no intercept: the
    thresholds take its place.

    ============= ================================== =============
    Parameter     Transform                          Default
    ============= ================================== =============
    threshold_1   x, the first threshold             0
    gap_j         exp(x), threshold j less the one   1
                  before it
    ============= ================================== =============

    Args:
        levels: number of categories, two or more.
        link: ``"logit"`` (proportional odds) or ``"probit"``.

    Raises:
        TypeError, InputError: if ``levels`` is no such number or the link is another.

    Reference:
        McCullagh, JRSS B 42 (1980) 109.

    >>> Ordinal(3).thresholds
    tensor([0., 1.])
    """

    name = "ordinal"

    def __init__(self, levels: int, link: str = "logit") -> None:
        count = check_count("levels", levels, 2)
        check_choice("link", link, ("logit", "probit"))
        gaps = [f"gap_{j}" for j in range(2, count)]
        super().__init__(
            {
                **free_specs(["threshold_1"], 0.0),
                **free_specs(gaps, 0.0, TransformExp(degree=0)),
            }
        )
        self.levels = count
        self.link = link

    @property
    def thresholds(self) -> Tensor:
        """The thresholds, ascending, (levels − 1,)."""
        with torch.no_grad():
            return self.ordered(self.stored("threshold_1"))

    def ordered(self, like: Tensor) -> Tensor:
        """The thresholds as a differentiable function of the parameters, (levels − 1,)."""
        return torch.cat([self.natural(name, like) for name in self.own_trans]).cumsum(0)

    def log_density(self, y: Tensor, eta: Tensor) -> Tensor:
        low, high = self._ends(y, eta)
        first, last = torch.isinf(low), torch.isinf(high)
        a, b = torch.where(first, 0 * low, low), torch.where(last, 0 * high, high)
        width = torch.where(first | last, torch.ones_like(a), b - a)
        a, b = torch.where(first, 0 * eta, a - eta), torch.where(last, 0 * eta, b - eta)
        if self.link == "logit":
            below = torch.where(last, 0 * eta, -softplus(-b))
            above = torch.where(first, 0 * eta, -softplus(a))
            return below + above + torch.where(first | last, 0 * eta, log1mexp(width))
        # Both ends in the lower tail, where the difference keeps its digits.
        mirrored = a + b > 0
        lower, upper = torch.where(mirrored, -b, a), torch.where(mirrored, -a, b)
        inner = log_ndtr(upper) + log1mexp(
            torch.where(first | last, torch.ones_like(a), log_ndtr(upper) - log_ndtr(lower))
        )
        return torch.where(first, log_ndtr(b), torch.where(last, log_ndtr(-a), inner))

    def derivatives(self, y: Tensor, eta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.link != "logit":
            return super().derivatives(y, eta)
        low, high = self._ends(y, eta)
        a, b = torch.sigmoid(low - eta), torch.sigmoid(high - eta)
        one_a, one_b = torch.sigmoid(eta - low), torch.sigmoid(eta - high)
        v, w = a * one_a, b * one_b
        return a - one_b, -v - w, v * (one_a - a) + w * (one_b - b)

    def probabilities(self, eta: Tensor) -> Tensor:
        """The probability of each category, (..., n, levels)."""
        edges = self.ordered(eta) - eta[..., None]
        below = torch.sigmoid(edges) if self.link == "logit" else torch.special.ndtr(edges)
        ends = torch.zeros_like(below[..., :1]), torch.ones_like(below[..., :1])
        return torch.cat([ends[0], below, ends[1]], -1).diff(dim=-1)

    def mean(self, eta: Tensor) -> Tensor:
        """The mean of the category's number."""
        return self.probabilities(eta) @ torch.arange(self.levels).to(eta)

    def variance(self, eta: Tensor) -> Tensor:
        number = torch.arange(self.levels).to(eta)
        p = self.probabilities(eta)
        return p @ number**2 - (p @ number) ** 2

    def deviance(self, y: Tensor, mean: Tensor) -> Tensor:
        r""":math:`-2\log p(y \mid \eta)` at the linear predictor of which the mean is that of the
        category's number, which rises with it."""
        with torch.no_grad():
            edges = self.ordered(mean)
            low, high = (mean.new_full(mean.shape, float(e)) for e in (edges[0], edges[-1]))
            low, high = low - 40, high + 40
            for _ in range(80):
                middle = (low + high) / 2
                below = self.mean(middle) < mean
                low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return -2 * self.log_density(y, (low + high) / 2)

    def draw(self, y: Tensor, eta: Tensor, rng: np.random.Generator) -> Tensor:
        at = drawn(rng.random, eta, len(eta))
        return (at[:, None] > self.probabilities(eta).cumsum(1)[:, :-1]).sum(1).to(eta)

    def cumulative(self, y: Tensor, eta: Tensor) -> tuple[Tensor, Tensor]:
        edges = torch.cat([torch.zeros_like(eta)[:, None], self.probabilities(eta).cumsum(1)], 1)
        at = y.long()[:, None]
        return edges.gather(1, at)[:, 0], edges.gather(1, at + 1)[:, 0].clamp(max=1)

    def check(self, y: Tensor, what: str = "`y`") -> None:
        super().check(y, what)
        last = self.levels - 1
        refuse_rows(y, (y < 0) | (y > last) | (y != y.round()), what, f"a category, 0 to {last}")

    def start(self, y: Tensor) -> Tensor:
        counts = torch.bincount(y.long(), minlength=self.levels).to(y) + 0.5
        edges = torch.logit((counts.cumsum(0) / counts.sum())[:-1])
        self.set_start("threshold_1", edges[0])
        for j, gap in enumerate(edges.diff(), 2):
            self.set_start(f"gap_{j}", gap)
        return torch.zeros_like(y)

    def quantities(self, like: Tensor) -> dict[str, Tensor]:
        """The thresholds, named as in R by the categories at their sides, from 1."""
        return {f"{j}|{j + 1}": edge for j, edge in enumerate(self.ordered(like).split(1), 1)}

    def by_parameters(self, given: Mapping[str, Any], option: str) -> dict[str, Any]:
        """The first threshold is a parameter, and another one by its distance from the one before."""
        found, before = dict(given), None
        for j in range(1, self.levels):
            name = f"{j}|{j + 1}"
            value = found.pop(name, None)
            if value is None:
                before = None
                continue
            if j == 1:
                found["threshold_1"] = value
            elif isinstance(value, Real) and isinstance(before, Real):
                found[f"gap_{j}"] = float(value) - float(before)
            else:
                raise InputError(
                    f"`{option}` has {value!r} for the threshold {name!r}: expected a number beside one "
                    f"for each before it, or gap_{j}, how far it is above the one before"
                )
            before = value
        return found

    def _ends(self, y: Tensor, eta: Tensor) -> tuple[Tensor, Tensor]:
        """The thresholds at both sides of each response, infinite at the ends."""
        edges = self.ordered(eta)
        far = edges.new_full((1,), torch.inf)
        whole = torch.cat([-far, edges, far])
        return whole[y.long()], whole[y.long() + 1]
