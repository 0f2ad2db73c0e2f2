"""The restricted likelihood: dense, or in the space of the random effects."""

from openreml_nn.likelihood.laplace import LaplaceLoss
from openreml_nn.likelihood.laplace_evaluation import LaplaceEvaluation
from openreml_nn.likelihood.loss import REMLLoss
from openreml_nn.likelihood.plan import Auto, Plan
from openreml_nn.likelihood.problem import Cost, Evaluation
from openreml_nn.likelihood.solver import Solver
from openreml_nn.likelihood.solvers import Blocked, Dense, Grid, Krylov, Sparse, Spectral
from openreml_nn.likelihood.solvers.dense import restricted_log_likelihood
from openreml_nn.support.errors import NotPositiveDefiniteError

__all__ = [
    "Auto",
    "Blocked",
    "Cost",
    "Dense",
    "Evaluation",
    "Grid",
    "Krylov",
    "LaplaceEvaluation",
    "LaplaceLoss",
    "NotPositiveDefiniteError",
    "Plan",
    "REMLLoss",
    "Solver",
    "Sparse",
    "Spectral",
    "restricted_log_likelihood",
]
