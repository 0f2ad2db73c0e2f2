"""Trains a small model in some processes; the first one writes what came out."""

import torch
from lightning import Callback, Trainer
from torch import nn

from openreml_nn import MixedModel, RandomEffect
from openreml_nn.lightning import NeuralMixedModule


def train(processes, training, head, path):
    torch.set_default_dtype(torch.float64)
    generator = torch.Generator().manual_seed(0)
    n, q = 203, 12  # no multiple of the processes
    x = torch.randn(n, 2, generator=generator)
    codes = torch.randint(0, q, (n,), generator=generator)
    b = torch.randn(q, generator=generator)[codes]
    y = x[:, 0].sin() + b + 0.5 * torch.randn(n, generator=generator)
    torch.manual_seed(1)
    network = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1 if head == "ml" else 3))
    spread = nn.Linear(2, 1) if training == "full" and head == "ml" else None
    model = MixedModel(network, {"g": RandomEffect(q)}, residual=spread, head=head)
    module = NeuralMixedModule(
        model,
        {"x": x, "y": y, "groups": {"g": codes}},
        {"_target_": "torch.optim.SGD", "lr": 0.05},
        training,
        rows=64,
    )
    trainer = Trainer(
        max_epochs=3,
        accelerator="cpu",
        devices=processes,
        strategy="ddp_fork" if processes > 1 else "auto",
        callbacks=[Written(path)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module)


class Written(Callback):
    """Writes what came out where it is: gradients do not leave a process."""

    def __init__(self, path):
        self.path = path

    def on_fit_end(self, trainer, module):
        if trainer.is_global_zero:
            found = dict(module.model.state_dict())
            found["loss"] = trainer.callback_metrics["train_loss"]
            weights = module.model.mean.parameters()
            found["gradient"] = torch.cat([p.grad.flatten() for p in weights])
            torch.save(found, self.path)
