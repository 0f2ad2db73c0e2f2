"""Bias of variance components with many features: head "gls" beside head "ml".

y = sin(x_1) + x_2 + b_g + e with both variances 1, 400 rows, 40 groups; the features are 100 tanh
units of random weights, of which the last layer makes the mean. Prints means over the seeds and
their standard errors:

    python examples/reml_bias.py [seeds] [epochs]
"""

import logging
import sys
import warnings

import pandas as pd
import torch
from lightning import Trainer
from torch import nn
from torch.utils.data import DataLoader

from openreml_nn import MixedModel, RandomEffect
from openreml_nn.lightning import MixedModule

SEEDS = int(sys.argv[1]) if len(sys.argv) > 1 else 50
EPOCHS = int(sys.argv[2]) if len(sys.argv) > 2 else 40


class Features(nn.Module):
    """A constant, and tanh units whose weights stay as they are."""

    def __init__(self, inputs: int, units: int) -> None:
        super().__init__()
        self.layer = nn.Linear(inputs, units).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.ones_like(x[:, :1]), self.layer(x).tanh()], 1)


def fit(head: str, seed: int) -> list[float]:
    """Variances of the groups and of the residual."""
    torch.manual_seed(seed)
    n, q, units = 400, 40, 100
    x, group = torch.randn(n, 5), torch.randint(0, q, (n,))
    y = x[:, 0].sin() + x[:, 1] + torch.randn(q)[group] + torch.randn(n)
    mean: nn.Module = Features(5, units)
    if head == "ml":
        mean = nn.Sequential(mean, nn.Linear(units + 1, 1, bias=False))
    model = MixedModel(mean, {"g": RandomEffect(q)}, head=head)
    lbfgs = {"_target_": "torch.optim.LBFGS", "max_iter": 20, "line_search_fn": "strong_wolfe"}
    data = {"x": x, "y": y, "groups": {"g": group}}
    module = MixedModule(model, lbfgs, "full")
    Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, DataLoader([data], batch_size=None))
    return [estimate.value for estimate in module.result.parameters]


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_default_dtype(torch.float64)
    table = []
    for head in ("ml", "gls"):
        found = torch.tensor([fit(head, seed) for seed in range(1, SEEDS + 1)])
        mean, error = found.mean(0).tolist(), (found.std(0) / SEEDS**0.5).tolist()
        named = zip(("groups", "residual"), mean, error, strict=True)
        table.append({"head": head} | {name: f"{m:.3f} +- {e:.3f}" for name, m, e in named})
    print(pd.DataFrame(table).to_string(index=False))


if __name__ == "__main__":
    main()
