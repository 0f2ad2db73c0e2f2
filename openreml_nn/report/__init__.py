"""What a fit leaves behind: tables, plots and the files of a run."""

from openreml_nn.estimation.tables import blup_table, fixed_table, variance_table
from openreml_nn.report.plots import caterpillar, convergence, residuals
from openreml_nn.report.run import Run, write_run

__all__ = [
    "Run",
    "blup_table",
    "caterpillar",
    "convergence",
    "fixed_table",
    "residuals",
    "variance_table",
    "write_run",
]
