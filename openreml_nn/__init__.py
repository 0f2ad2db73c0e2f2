"""Linear mixed models as PyTorch modules."""

from openreml_nn import covariance, datasets, families
from openreml_nn.estimation import (
    AIREML,
    Result,
    blue,
    blup,
    fit_reml,
    loglik,
    marginal_predict,
    marginal_residual,
    predict,
    residual,
)
from openreml_nn.likelihood import LaplaceLoss, REMLLoss, restricted_log_likelihood
from openreml_nn.model import MixedModel, RandomEffect
from openreml_nn.model.generalised import glmm
from openreml_nn.model.linear import lmm
from openreml_nn.model.stream import fit_stream
from openreml_nn.support.errors import InputError, NumericalError

__version__ = "0.1.0"

__all__ = [
    "AIREML",
    "InputError",
    "LaplaceLoss",
    "MixedModel",
    "NumericalError",
    "REMLLoss",
    "RandomEffect",
    "Result",
    "blue",
    "blup",
    "covariance",
    "datasets",
    "families",
    "fit_reml",
    "fit_stream",
    "glmm",
    "lmm",
    "loglik",
    "marginal_predict",
    "marginal_residual",
    "predict",
    "residual",
    "restricted_log_likelihood",
]
