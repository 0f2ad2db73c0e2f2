"""Training mixed models in Lightning."""

from openreml_nn.lightning.batches import WholeGroups
from openreml_nn.lightning.callbacks import (
    ExportBLUPs,
    ProgressBar,
    StopWhenConverged,
    TraceVariances,
    UpdateBLUPs,
)
from openreml_nn.lightning.data import MixedModelDataModule
from openreml_nn.lightning.loggers import WholeCSVLogger, WholeTensorBoardLogger
from openreml_nn.lightning.module import MixedModule
from openreml_nn.lightning.ways import Way

__all__ = [
    "ExportBLUPs",
    "MixedModelDataModule",
    "MixedModule",
    "ProgressBar",
    "StopWhenConverged",
    "TraceVariances",
    "UpdateBLUPs",
    "Way",
    "WholeCSVLogger",
    "WholeGroups",
    "WholeTensorBoardLogger",
]
