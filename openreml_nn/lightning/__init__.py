"""Training the restricted likelihood in Lightning."""

from openreml_nn.lightning.callbacks import ProgressBar, StopWhenConverged
from openreml_nn.lightning.data import MixedModelDataModule
from openreml_nn.lightning.module import MixedModelModule
from openreml_nn.lightning.neural import NeuralMixedModule

__all__ = [
    "MixedModelDataModule",
    "MixedModelModule",
    "NeuralMixedModule",
    "ProgressBar",
    "StopWhenConverged",
]
