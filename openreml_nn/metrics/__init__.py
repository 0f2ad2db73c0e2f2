"""Metrics of mixed models, as functions and as torchmetrics modules.

Metrics of predictions take the mean and the variance of each row, such as
:meth:`MixedModel.predict` yields, and the target, those of responses that are not Gaussian the mean
and the target; metrics of a model take its variance components.
A function computes a metric of one set of numbers; the module of the same name adds up the sums
that the function is made of, so that batches, and processes, may be of any size. In a
``MetricCollection`` arguments are passed by name, and each metric takes those that it knows.
"""

from openreml_nn.metrics.components import (
    BLUPReliability,
    IntraclassCorrelation,
    NarrowSenseHeritability,
    blup_reliability,
    intraclass_correlation,
    narrow_sense_heritability,
)
from openreml_nn.metrics.explained import ConditionalR2, MarginalR2, conditional_r2, marginal_r2
from openreml_nn.metrics.families import (
    AUC,
    BrierScore,
    CalibrationCurve,
    CalibrationError,
    LogLoss,
    MeanDeviance,
    auc,
    brier_score,
    calibration_curve,
    calibration_error,
    log_loss,
    mean_deviance,
)
from openreml_nn.metrics.predictions import (
    GaussianNegativeLogDensity,
    IntervalCoverage,
    IntervalWidth,
    gaussian_negative_log_density,
    interval_coverage,
    interval_width,
)
from openreml_nn.metrics.restricted import RestrictedLogLikelihood

__all__ = [
    "AUC",
    "BLUPReliability",
    "BrierScore",
    "CalibrationCurve",
    "CalibrationError",
    "ConditionalR2",
    "GaussianNegativeLogDensity",
    "IntervalCoverage",
    "IntervalWidth",
    "IntraclassCorrelation",
    "LogLoss",
    "MarginalR2",
    "MeanDeviance",
    "NarrowSenseHeritability",
    "RestrictedLogLikelihood",
    "auc",
    "blup_reliability",
    "brier_score",
    "calibration_curve",
    "calibration_error",
    "conditional_r2",
    "gaussian_negative_log_density",
    "interval_coverage",
    "interval_width",
    "intraclass_correlation",
    "log_loss",
    "marginal_r2",
    "mean_deviance",
    "narrow_sense_heritability",
]
