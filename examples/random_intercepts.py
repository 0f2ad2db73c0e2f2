"""A network with random intercepts beside the same network without, on simulated data.

The simulation of Simchoni and Rosset, Journal of Machine Learning Research 24 (2023), section
5.1: y = f(x) + b_g + e with x uniform on (-1, 1)^10, s = 1 + sum x, f = s cos s + 2 x_1 x_2. A call
runs one setting, or the grid over five seeds, and then prints a table:

    python examples/random_intercepts.py -m levels=100,1000,10000 variance=0.1,1,10 seed=1,2,3,4,5
"""

import logging
import time
import warnings
from pathlib import Path

import hydra
import pandas as pd
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from lightning import Trainer
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from openreml_nn import MixedModel, RandomEffect
from openreml_nn.lightning import MixedModule

DEFAULTS = OmegaConf.create(
    {
        "rows": 100_000,
        "levels": 1000,
        "variance": 1.0,
        "seed": 1,
        "epochs": 30,
        "lr": 0.006,
        "weight_decay": 0.1,
        "methods": ["random_effects", "ignored", "embedding", "one_hot"],
        "hydra": {"callbacks": {"table": {"_target_": "__main__.MeansOverSeeds"}}},
    }
)
hydra.core.config_store.ConfigStore.instance().store(name="defaults", node=DEFAULTS)


class MeansOverSeeds(Callback):
    """Prints the means over the seeds when a multirun ends."""

    def on_multirun_end(self, config: DictConfig, **kwargs: object) -> None:
        parts = Path(config.hydra.sweep.dir).glob("*/found.csv")
        found = pd.concat(map(pd.read_csv, sorted(parts, key=lambda part: int(part.parent.name))))
        found["off_b"] = (found.sigma2_b - found.variance) / found.sigma2_b_error
        found["off_e"] = (found.sigma2_e - 1) / found.sigma2_e_error
        names = {"sigma2_b_error": "error_b", "sigma2_e_error": "error_e"}
        names |= {"coverage_unseen": "unseen"}
        means = (
            found.groupby(["variance", "levels", "method"], sort=False).mean().rename(columns=names)
        )
        ours = means.xs("random_effects", level="method")
        test = means.test_mse.unstack(sort=False)
        test.insert(0, "floor", ours.noise_floor)
        parts = [
            "sigma2_b",
            "error_b",
            "off_b",
            "sigma2_e",
            "error_e",
            "off_e",
            "coverage",
            "unseen",
        ]
        tables = {
            "mean squared error of the rows for testing": test.round(4),
            "seconds": means.seconds.unstack(sort=False).round(1),
            "variance components, and coverage of 95% intervals": ours[parts].round(3),
        }
        for title, table in tables.items():
            print(
                title,
                table.rename_axis(columns=None).reset_index().to_string(index=False),
                sep="\n",
            )


def simulate(config: DictConfig) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The rows, and which of them are for training and for testing."""
    g = torch.Generator().manual_seed(config.seed)
    n = config.rows
    x = 2 * torch.rand(n, 10, generator=g) - 1
    s = 1 + x.sum(1)
    f = s * s.cos() + 2 * x[:, 0] * x[:, 1]
    weight = 1 + torch.poisson(torch.full((config.levels,), 3.0), generator=g)
    codes = torch.multinomial(weight, n, replacement=True, generator=g)
    b = config.variance**0.5 * torch.randn(config.levels, generator=g)
    y = f + b[codes] + torch.randn(n, generator=g)
    order = torch.randperm(n, generator=g)
    return {"x": x, "y": y, "codes": codes, "b": b}, order[: n * 4 // 5], order[n * 4 // 5 :]


def network(inputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in (100, 50, 25, 12):
        layers += [nn.Linear(inputs, width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, 1))


class WithGroup(nn.Module):
    """The network on x and an encoding of the group."""

    def __init__(self, levels: int, size: int) -> None:
        super().__init__()
        self.encoding = nn.Embedding(levels, size)
        self.network = network(10 + size)

    def forward(self, x: Tensor, codes: Tensor) -> Tensor:
        return self.network(torch.cat([x, self.encoding(codes)], 1))[:, 0]


class OneHot(nn.Module):
    """The network on x and the group's indicators: in the first layer, a vector for each level."""

    def __init__(self, levels: int) -> None:
        super().__init__()
        first, *rest = network(10)
        self.first, self.rest = first, nn.Sequential(*rest)
        self.of_level = nn.Embedding(levels, 100)
        nn.init.uniform_(self.of_level.weight, -((10 + levels) ** -0.5), (10 + levels) ** -0.5)

    def forward(self, x: Tensor, codes: Tensor) -> Tensor:
        return self.rest(self.first(x) + self.of_level(codes))[:, 0]


def optimizers(parameters, config: DictConfig, steps: int):
    optimizer = torch.optim.AdamW(parameters, config.lr, weight_decay=config.weight_decay)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=steps)
    return optimizer, scheduler


def plain(method: str, data, train: Tensor, test: Tensor, config: DictConfig) -> dict[str, float]:
    """The network alone, by mini-batches of least squares."""
    module = {
        "ignored": lambda: network(10),
        "embedding": lambda: WithGroup(config.levels, 10),
        "one_hot": lambda: OneHot(config.levels),
    }[method]()
    optimizer, scheduler = optimizers(module.parameters(), config, config.epochs)

    def predict(at: Tensor) -> Tensor:
        x, codes = data["x"][at], data["codes"][at]
        return module(x)[:, 0] if method == "ignored" else module(x, codes)

    for _ in range(config.epochs):
        for at in train[torch.randperm(len(train))].split(512):
            optimizer.zero_grad()
            nn.functional.mse_loss(predict(at), data["y"][at]).backward()
            optimizer.step()
        scheduler.step()
    with torch.no_grad():
        return {"test_mse": float(((predict(test) - data["y"][test]) ** 2).mean())}


def mixed(data, train: Tensor, test: Tensor, config: DictConfig) -> dict[str, float]:
    """The network with random intercepts."""
    rows = TensorDataset(data["x"][train], data["y"][train], data["codes"][train])
    model = MixedModel(network(10), {"g": RandomEffect(config.levels)})
    module = MixedModule(
        model,
        optimizer={
            "_target_": "torch.optim.AdamW",
            "lr": config.lr,
            "weight_decay": config.weight_decay,
        },
        scheduler={
            "_target_": "torch.optim.lr_scheduler.OneCycleLR",
            "max_lr": config.lr,
            "total_steps": config.epochs + 1,
        },
    )
    trainer = Trainer(
        max_epochs=config.epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    # A batch of rows is taken at once, which is far faster than row by row.
    order = BatchSampler(RandomSampler(rows), 512, drop_last=False)
    trainer.fit(module, DataLoader(rows, sampler=order, batch_size=None))
    codes = data["codes"][test]
    found = model.predict({"x": data["x"][test], "groups": {"g": codes}})
    error = (found.mean - data["y"][test]).abs()
    # The same rows, each in a level of its own that was not seen.
    unseen = model.predict({"x": data["x"][test], "groups": {"g": torch.full_like(codes, -1)}})
    own = data["y"][test] + config.variance**0.5 * torch.randn(len(test)) - data["b"][codes]
    off = (unseen.mean - own).abs()
    effect = model.random["g"]
    sigma2_b, sigma2_e = module.result.parameters
    return {
        "test_mse": float((error**2).mean()),
        "noise_floor": 1 + float(effect.variance[data["codes"][test], 0, 0].mean()),
        "sigma2_b": sigma2_b.value,
        "sigma2_b_error": sigma2_b.std_error,
        "sigma2_e": sigma2_e.value,
        "sigma2_e_error": sigma2_e.std_error,
        "coverage": float((error < 1.96 * found.variance.sqrt()).double().mean()),
        "coverage_unseen": float((off < 1.96 * unseen.variance.sqrt()).double().mean()),
    }


@hydra.main(version_base="1.3", config_path=None, config_name="defaults")
def main(config: DictConfig) -> None:
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    data, train, test = simulate(config)
    table = []
    for method in config.methods:
        torch.manual_seed(config.seed)
        start = time.perf_counter()
        if method == "random_effects":
            found = mixed(data, train, test, config)
        else:
            found = plain(method, data, train, test, config)
        found["seconds"] = time.perf_counter() - start
        numbers = "  ".join(f"{key} {value:.4f}" for key, value in found.items())
        setting = {key: config[key] for key in ("variance", "levels", "seed")}
        print(*(f"{key} {value}" for key, value in setting.items()), method, numbers, flush=True)
        table.append({**setting, "method": method, **found})
    output = Path(HydraConfig.get().runtime.output_dir)
    pd.DataFrame(table).to_csv(output / "found.csv", index=False)


if __name__ == "__main__":
    main()
