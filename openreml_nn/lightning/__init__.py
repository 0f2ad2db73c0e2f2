"""Training the restricted likelihood in Lightning."""

from openreml_nn.lightning.callbacks import (
    ExportBLUPs,
    ProgressBar,
    StopWhenConverged,
    TraceVariances,
)
from openreml_nn.lightning.data import MixedModelDataModule
from openreml_nn.lightning.module import MixedModelModule
from openreml_nn.lightning.neural import NeuralMixedModule
from openreml_nn.lightning.tabular import TabularMixedModule

__all__ = [
    "ExportBLUPs",
    "MixedModelDataModule",
    "MixedModelModule",
    "NeuralMixedModule",
    "ProgressBar",
    "StopWhenConverged",
    "TabularMixedModule",
    "TraceVariances",
]
