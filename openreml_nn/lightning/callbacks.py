"""Lightning callbacks."""

from __future__ import annotations

from typing import Any

from lightning import Callback, LightningModule, Trainer

from openreml_nn.lightning.module import MixedModelModule

__all__ = ["StopWhenConverged"]


class StopWhenConverged(Callback):
    """Stop when the parameters are close to the optimum, whatever the optimizer.

    Closeness is the score norm, the distance to the optimum in standard
    errors of the parameters. It does not depend on units or learning rates.

    Args:
        tolerance: score norm that counts as converged.
        every_n_epochs: how often it is looked at. A look costs about as much
            as an AI-REML step.
    """

    def __init__(self, tolerance: float = 1e-4, every_n_epochs: int = 1) -> None:
        if not tolerance > 0 or every_n_epochs < 1:
            raise ValueError(
                f"`tolerance` is {tolerance} and `every_n_epochs` {every_n_epochs}: "
                "expected positive numbers"
            )
        self.tolerance = tolerance
        self.every_n_epochs = every_n_epochs

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (trainer.current_epoch + 1) % self.every_n_epochs:
            return
        assert isinstance(pl_module, MixedModelModule)
        norm = pl_module.score_norm()
        pl_module.log("score_norm", norm, prog_bar=True)
        if norm < self.tolerance:
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        return {}
