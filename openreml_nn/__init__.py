"""Linear mixed models as PyTorch modules."""

from openreml_nn import covariance, datasets
from openreml_nn.errors import InputError
from openreml_nn.estimation import AIREML, REMLResult, fit_reml
from openreml_nn.likelihood import REMLLoss, restricted_log_likelihood
from openreml_nn.linear import lmm
from openreml_nn.model import MixedModel, RandomEffect
from openreml_nn.stream import fit_stream

__version__ = "0.1.0"

__all__ = [
    "AIREML",
    "InputError",
    "MixedModel",
    "REMLLoss",
    "REMLResult",
    "RandomEffect",
    "covariance",
    "datasets",
    "fit_reml",
    "fit_stream",
    "lmm",
    "restricted_log_likelihood",
]
