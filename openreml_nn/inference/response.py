"""Estimates of the linear predictor on the scale of the response."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from openreml_nn.families import Family, NegativeBinomial, NegativeBinomial1, Poisson
from openreml_nn.inference.refit import family_of
from openreml_nn.result import Result
from openreml_nn.support.errors import InputError

__all__ = ["Response", "family_at"]


def family_at(result: Result) -> Family:
    """The family of a fit, at its estimates.

    Raises:
        InputError: if the response is Gaussian, or its model was not kept.
        TypeError: if it is no result.
    """
    if family_of(result) is None:
        raise InputError(
            "`result` is of a linear mixed model: expected a fit by glmm(), with a family"
        )
    family = None if result.model is None else result.model.family
    if family is None:
        raise InputError("`result` has no model: expected a fit by glmm()")
    assert isinstance(family, Family)
    return family


@dataclass(frozen=True)
class Response:
    r"""The scale :math:`\mu = g^{-1}(\eta)` of a family's response."""

    family: Family

    @classmethod
    def of(cls, result: Result) -> Response:
        """That of a fit.

        Raises:
            InputError: if it has no such scale.
        """
        if family_of(result) is None:
            raise InputError(
                "`scale` is 'response' and the response Gaussian, whose scales are one: expected 'link'"
            )
        family = family_at(result).base
        if family.name == "ordinal":
            raise InputError(
                "`scale` is 'response' and the response ordinal, which has a probability for each "
                "category and no mean: expected 'link'"
            )
        if type(family).mean is Family.mean:
            raise InputError(
                f"`scale` is 'response' and {type(family).__name__} has no mean(): expected 'link'"
            )
        return cls(family)

    @property
    def quantity(self) -> str:
        """What a mean is, as emmeans names it."""
        if self.family.name == "binomial":
            return "prob"
        is_count = isinstance(self.family, Poisson | NegativeBinomial | NegativeBinomial1)
        return "rate" if is_count else "response"

    @property
    def has_ratios(self) -> bool:
        """Whether a difference of linear predictors is the logarithm of a ratio."""
        return self.family.link in ("log", "logit")

    def means(self, table: pd.DataFrame) -> pd.DataFrame:
        """Estimates with intervals, back-transformed; errors by the delta method."""
        eta = torch.tensor(table["estimate"].to_numpy(), dtype=torch.float64, requires_grad=True)
        with torch.enable_grad():
            mean = self.family.mean(eta)
            (slope,) = torch.autograd.grad(mean.sum(), eta)
        return table.assign(
            estimate=mean.numpy(force=True),
            std_error=table["std_error"] * slope.abs().numpy(force=True),
            low=self._at(table["low"]),
            high=self._at(table["high"]),
        )

    def ratios(self, table: pd.DataFrame) -> pd.DataFrame:
        """Differences as ratios, or odds ratios."""
        ratio = np.exp(table["estimate"])
        return table.assign(
            estimate=ratio,
            std_error=table["std_error"] * ratio,
            low=np.exp(table["low"]),
            high=np.exp(table["high"]),
        )

    def _at(self, values: pd.Series) -> np.ndarray:
        with torch.no_grad():
            found: Tensor = self.family.mean(torch.tensor(values.to_numpy(), dtype=torch.float64))
        return found.numpy(force=True)
