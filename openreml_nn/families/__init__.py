"""Responses: the distribution of a response given its linear predictor."""

from openreml_nn.families.binomial import Binomial
from openreml_nn.families.counts import NegativeBinomial, NegativeBinomial1, Poisson
from openreml_nn.families.family import Family
from openreml_nn.families.gaussian import Gaussian, StudentT
from openreml_nn.families.named import FAMILIES, LINKS, named_family
from openreml_nn.families.ordinal import Ordinal
from openreml_nn.families.positive import Gamma, Tweedie
from openreml_nn.families.proportion import Beta
from openreml_nn.families.zeros import ZeroInflated

__all__ = [
    "FAMILIES",
    "LINKS",
    "Beta",
    "Binomial",
    "Family",
    "Gamma",
    "Gaussian",
    "NegativeBinomial",
    "NegativeBinomial1",
    "Ordinal",
    "Poisson",
    "StudentT",
    "Tweedie",
    "ZeroInflated",
    "named_family",
]
