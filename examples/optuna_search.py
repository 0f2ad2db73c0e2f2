"""Optuna looks for the width and the learning rate of a network with random effects.

The search maximises the log density of rows held out, which depends on the variances too; a trial
that falls behind is stopped after an epoch. The best one is trained again with its values.

    pip install optuna
    python examples/optuna_search.py [trials]
"""

import logging
import sys
import warnings

import optuna
from lightning import Callback, Trainer, seed_everything
from torch import nn

from openreml_nn.datasets import ratings
from openreml_nn.lightning import MixedModelDataModule, MixedModule

FORMULA = "rating ~ x1 + x2 + x3 + x4 + (1 | user) + (1 | item)"
METRIC = "val_negative_log_density"


class Prune(Callback):
    """Tells a trial how far it is, and ends it when it is told to."""

    def __init__(self, trial: optuna.Trial) -> None:
        self.trial = trial

    def on_validation_end(self, trainer: Trainer, module: MixedModule) -> None:
        self.trial.report(float(trainer.callback_metrics[METRIC]), trainer.current_epoch)
        if self.trial.should_prune():
            raise optuna.TrialPruned


def trained(width: int, lr: float, callbacks: list[Callback]) -> tuple[MixedModule, Trainer]:
    seed_everything(1, verbose=False)
    table = ratings(rows=3000, users=200, items=50)
    module = MixedModule(
        FORMULA,
        {"_target_": "torch.optim.Adam", "lr": lr},
        network=nn.Sequential(nn.LazyLinear(width), nn.Tanh()),
        rows=256,
    )
    trainer = Trainer(
        max_epochs=8,
        callbacks=callbacks,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, MixedModelDataModule(table, FORMULA, validation=0.2, split="group"))
    return module, trainer


def objective(trial: optuna.Trial) -> float:
    width = trial.suggest_int("width", 4, 64, log=True)
    lr = trial.suggest_float("lr", 1e-3, 1e-1, log=True)
    _, trainer = trained(width, lr, [Prune(trial)])
    return float(trainer.callback_metrics[METRIC])


if __name__ == "__main__":
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        sampler=optuna.samplers.TPESampler(seed=1),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=2),
    )
    study.optimize(objective, n_trials=int(sys.argv[1]) if len(sys.argv) > 1 else 12)
    print(study.trials_dataframe(attrs=("number", "value", "params", "state")).to_string())
    module, trainer = trained(**study.best_params, callbacks=[])
    print(study.best_params, float(trainer.callback_metrics[METRIC]))
    print(module.result.summary(FORMULA))
