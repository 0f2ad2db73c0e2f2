"""Estimation of covariance parameters, and what a fit found."""

from openreml_nn.estimation.aireml import AIREML
from openreml_nn.estimation.fit import fit_reml, moment_start
from openreml_nn.estimation.gls import (
    blue,
    blup,
    loglik,
    marginal_predict,
    marginal_residual,
    predict,
    residual,
)
from openreml_nn.result.result import Component, Estimate, Result

__all__ = [
    "AIREML",
    "Component",
    "Estimate",
    "Result",
    "blue",
    "blup",
    "fit_reml",
    "loglik",
    "marginal_predict",
    "marginal_residual",
    "moment_start",
    "predict",
    "residual",
]
