"""Mixed models: a mean, linear or a network, with random effects."""

from openreml_nn.model.mixed_model import HEADS, MixedModel, Prediction, RandomEffect, take

__all__ = ["HEADS", "MixedModel", "Prediction", "RandomEffect", "take"]
