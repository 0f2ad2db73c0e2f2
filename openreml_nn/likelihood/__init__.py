"""The restricted likelihood: dense, or in the space of the random effects."""

from openreml_nn.likelihood.laplace import LaplaceEvaluation, LaplaceLoss
from openreml_nn.likelihood.loss import REMLLoss
from openreml_nn.likelihood.plan import Plan
from openreml_nn.likelihood.problem import Evaluation, NotPositiveDefiniteError
from openreml_nn.likelihood.solvers.dense import restricted_log_likelihood

__all__ = [
    "Evaluation",
    "LaplaceEvaluation",
    "LaplaceLoss",
    "NotPositiveDefiniteError",
    "Plan",
    "REMLLoss",
    "restricted_log_likelihood",
]
