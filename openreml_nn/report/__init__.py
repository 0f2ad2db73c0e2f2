"""Plots of a fit, and one page for many runs."""

from openreml_nn.report.html import write_report
from openreml_nn.report.plots import (
    calibration,
    caterpillar,
    convergence,
    covariance_map,
    residuals,
    semivariogram,
    shares,
    zeta,
)
from openreml_nn.report.points import residual_table
from openreml_nn.result.tables import blup_table, fixed_table, variance_table

__all__ = [
    "blup_table",
    "calibration",
    "caterpillar",
    "convergence",
    "covariance_map",
    "fixed_table",
    "residual_table",
    "residuals",
    "semivariogram",
    "shares",
    "variance_table",
    "write_report",
    "zeta",
]
