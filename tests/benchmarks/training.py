"""Training beside dense algebra and the network alone: ``python -m tests.benchmarks.training``.

A loss of a batch of 100 rows with its gradients beside ten lines of dense algebra, and an epoch of a
mixed model beside that of the network alone. Both of a pair run in this process, in turn, on one core;
seconds are those of the processor, and the table has medians.
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

from openreml_nn import MixedModel, RandomEffect
from openreml_nn.lightning import MixedModule
from openreml_nn.model import take

# ---------------------------------------------------------------------- a batch of 100 rows


def dense_loss(model: MixedModel, batch: dict[str, Any]) -> Tensor:
    """The loss of intercepts and slopes as one writes it."""
    y, n = batch["y"], len(batch["y"])
    e = y - model.mean(batch["x"])[:, 0]
    V = torch.eye(n, dtype=y.dtype) * model.residual()[0, 0]
    for name, codes in batch["groups"].items():
        g, z = model.random[name].g, batch.get("values", {}).get(name)
        G = (
            (2 * g.get_parameter("sigma^2")).exp()
            if z is None
            else z @ g.operands["effects"]() @ z.T
        )
        V = V + G * (codes[:, None] == codes)
    L = torch.linalg.cholesky(V)
    white = torch.linalg.solve_triangular(L, e[:, None], upper=False)
    return (n * math.log(2 * math.pi) + (white**2).sum()) / 2 / n + L.diagonal().log().sum() / n


def small(case: str, n: int = 100) -> tuple[MixedModel, list[dict[str, Any]]]:
    """A model, and batches of n rows."""
    effects = {
        "one factor of 20 levels": {"a": RandomEffect(20)},
        "two crossed factors": {"a": RandomEffect(20), "b": RandomEffect(10)},
        "slopes of 20 levels": {"a": RandomEffect(20, effects=2)},
        "one factor of 1,000 levels": {"a": RandomEffect(1000)},
    }[case]
    mean = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 1)).double()
    batches = []
    for _ in range(20):
        x = torch.randn(n, 3, dtype=torch.float64)
        groups = {name: torch.randint(0, e.levels, (n,)) for name, e in effects.items()}
        values = {"a": torch.stack([torch.ones_like(x[:, 0]), x[:, 0]], 1)}
        batch = {"x": x, "y": torch.randn(n, dtype=x.dtype), "groups": groups}
        batches.append(batch | ({"values": values} if effects["a"].effects == 2 else {}))
    return MixedModel(mean, effects), batches


def _seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def _gradients(loss: Callable[..., Tensor], model: MixedModel, batch: dict[str, Any]) -> None:
    model.zero_grad()
    loss(model, batch).backward()


def batches_table(runs: int) -> Table:
    table = Table(title="Loss and gradients of 100 rows, milliseconds", title_justify="left")
    for column in ("", "ours", "dense", "ratio"):
        table.add_column(column, justify="right" if column else "left")
    for case in (
        "one factor of 20 levels",
        "one factor of 1,000 levels",
        "two crossed factors",
        "slopes of 20 levels",
    ):
        model, batches = small(case)
        torch.testing.assert_close(model.loss(batches[0]), dense_loss(model, batches[0]))
        ours, dense = [], []
        for i in range(runs):
            batch = batches[i % len(batches)]
            ours.append(_seconds(partial(_gradients, MixedModel.loss, model, batch)))
            dense.append(_seconds(partial(_gradients, dense_loss, model, batch)))
        a, b = (1e3 * statistics.median(x[runs // 10 :]) for x in (ours, dense))
        table.add_row(case, f"{a:.2f}", f"{b:.2f}", f"{a / b:.2f}")
    return table


# ---------------------------------------------------------------------- an epoch


class Rows(Dataset[dict[str, Any]]):
    """Some rows at a time."""

    def __init__(self, batch: dict[str, Any]) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return len(self.batch["y"])

    def __getitem__(self, rows: list[int]) -> dict[str, Any]:
        found: dict[str, Any] = take(self.batch, torch.tensor(rows))
        return found


class Alone(LightningModule):
    """The network that ignores the groups."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss = ((self.network(batch["x"])[:, 0] - batch["y"]) ** 2).mean()
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters())


class Clock(Callback):
    """Seconds of each epoch, the sums and the step of the covariance at its end included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.start = time.process_time()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds.append(time.process_time() - self.start)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)
    )


def rows(n: int, levels: int) -> dict[str, Any]:
    """A response with a random intercept of as many levels."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 10, generator=generator)
    codes = torch.randint(0, levels, (n,), generator=generator)
    b = torch.randn(levels, generator=generator)[codes]
    y = x[:, 0].sin() + b + torch.randn(n, generator=generator)
    return {"x": x, "y": y, "groups": {"g": codes}}


def epochs(module: LightningModule, data: dict[str, Any], count: int) -> list[float]:
    """Seconds of each epoch but the last, which ends the fit."""
    order = BatchSampler(RandomSampler(Rows(data)), 1024, drop_last=False)
    clock = Clock()
    trainer = Trainer(
        max_epochs=count + 1,
        accelerator="cpu",
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(Rows(data), sampler=order, batch_size=None))
    return clock.seconds[:-1]


def epochs_table(n: int, levels: int, runs: int) -> Table:
    data = rows(n, levels)
    alone, mixed = [], []
    for _ in range(runs):
        alone += epochs(Alone(network()), data, 2)
        mixed += epochs(MixedModule(MixedModel(network(), {"g": RandomEffect(levels)})), data, 2)
    a, b = statistics.median(mixed), statistics.median(alone)
    title = f"An epoch of {n:,} rows, {levels:,} levels, batches of 1,024, seconds"
    table = Table(title=title, title_justify="left")
    for column in ("mixed model", "network alone", "ratio"):
        table.add_column(column, justify="right")
    table.add_row(f"{a:.2f}", f"{b:.2f}", f"{a / b:.2f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.training")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--levels", type=int, default=100_000)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--losses", type=int, default=500, help="losses of each kind")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    console = Console(width=100)
    console.print(batches_table(options.losses))
    console.print(epochs_table(options.rows, options.levels, options.runs))


if __name__ == "__main__":
    main()
