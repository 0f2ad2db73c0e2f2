"""What the marginal likelihood says of some data at given parameters."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from openreml_nn.likelihood.effects import RandomEffects
from openreml_nn.terms.term import Term

__all__ = ["LaplaceEvaluation"]


@dataclass(frozen=True)
class LaplaceEvaluation:
    """The likelihood of some data at given parameters.

    Attributes:
        log_likelihood: the marginal log-likelihood, a scalar tensor.
        coefficients: (p,) coefficients of X; none without X.
        coefficient_covariance: (p, p) their covariance at these parameters.
        predictor: (n,) the linear predictor at the mode.
        residual: independent errors of the rows with the information of the responses there: what
            a linear mixed model of the same modes and variances has for its residual.
        random: modes of the random effects of each term with their conditional variances, the
            coefficients of X held.
        error: Monte Carlo standard error of the log-likelihood; 0 where it is computed.
    """

    log_likelihood: Tensor
    coefficients: Tensor
    coefficient_covariance: Tensor
    predictor: Tensor
    residual: Term
    random: tuple[RandomEffects, ...]
    error: float = 0.0
