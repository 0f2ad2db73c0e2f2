"""What a fit leaves behind: tables, plots and the files of a run."""

from openreml_nn.report.html import write_report
from openreml_nn.report.plots import (
    caterpillar,
    convergence,
    covariance_map,
    residuals,
    semivariogram,
    shares,
    zeta,
)
from openreml_nn.report.run import Run, write_plots, write_run, write_tables
from openreml_nn.result.tables import blup_table, fixed_table, variance_table

__all__ = [
    "Run",
    "blup_table",
    "caterpillar",
    "convergence",
    "covariance_map",
    "fixed_table",
    "residuals",
    "semivariogram",
    "shares",
    "variance_table",
    "write_plots",
    "write_report",
    "write_run",
    "write_tables",
    "zeta",
]
