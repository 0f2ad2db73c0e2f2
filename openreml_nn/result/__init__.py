"""What a fit found: a value with tables, a summary, predictions and JSON."""

from openreml_nn.result.result import (
    Component,
    Estimate,
    FixedEffects,
    Label,
    Record,
    Result,
    Source,
    Start,
)
from openreml_nn.result.tables import blup_table, fixed_table, variance_table

__all__ = [
    "Component",
    "Estimate",
    "FixedEffects",
    "Label",
    "Record",
    "Result",
    "Source",
    "Start",
    "blup_table",
    "fixed_table",
    "variance_table",
]
