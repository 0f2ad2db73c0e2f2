"""Mixed models: a mean, linear or a network, with random effects."""

from openreml_nn.model.batch import take
from openreml_nn.model.export import exported
from openreml_nn.model.mixed_model import HEADS, MixedModel
from openreml_nn.model.random_effect import RandomEffect
from openreml_nn.model.residual import ResidualStructure
from openreml_nn.result.prediction import Prediction

__all__ = [
    "HEADS",
    "MixedModel",
    "Prediction",
    "RandomEffect",
    "ResidualStructure",
    "exported",
    "take",
]
