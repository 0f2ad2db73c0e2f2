"""Bias and coverage of estimates: ``python -m tests.simulations [families] [networks]``.

Families: for each setting 50 tables are drawn and fitted, by Laplace's approximation and by
quadrature. What is printed: the mean estimate of the variance with its Monte Carlo standard error,
and how often the 95 % intervals, estimate ± 1.96 standard errors, hold the true coefficients.

Networks: for each setting 20 tables are drawn, and a network is trained on them from batches of 256
rows. What is printed: the mean of each component with its Monte Carlo standard error, and that of
the fit by maximum likelihood that knows the mean function, of the same tables.
"""

from __future__ import annotations

import argparse
import logging
import warnings

import numpy as np
import pandas as pd
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from openreml_nn import MixedModel, RandomEffect, fit_reml, glmm
from openreml_nn.lightning import MixedModule

SEEDS = 50
VARIANCE, COEFFICIENTS = 1.0, np.array([-0.3, 0.5])
#: Name, family, groups, rows of a group.
SETTINGS = [
    ("counts, 10 rows a level", "poisson", 200, 10),
    ("binary, 40 rows a level", "binomial", 100, 40),
    ("binary, 3 rows a level", "binomial", 300, 3),
]


def draw(family: str, groups: int, rows: int, seed: int) -> pd.DataFrame:
    """A table with the columns y, x and g."""
    rng = np.random.default_rng(seed)
    g, x = np.repeat(np.arange(groups), rows), rng.normal(size=groups * rows)
    eta = COEFFICIENTS[0] + COEFFICIENTS[1] * x
    eta += VARIANCE**0.5 * rng.normal(size=groups)[g]
    y = (
        rng.poisson(np.exp(eta))
        if family == "poisson"
        else rng.random(len(g)) < 1 / (1 + np.exp(-eta))
    )
    return pd.DataFrame({"y": y.astype(int), "x": x, "g": g})


def simulate(family: str, groups: int, rows: int, quadrature: int, seeds: int = SEEDS) -> dict:
    """Mean of the variance, its Monte Carlo standard error, and coverage of both coefficients."""
    variances, held = [], []
    for seed in range(seeds):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            found = glmm(
                "y ~ x + (1 | g)",
                draw(family, groups, rows, seed),
                family=family,
                quadrature=quadrature,
            )
        variances.append(float(found.components[0].covariance))
        z = (found.fixed.estimate.numpy() - COEFFICIENTS) / found.fixed.std_error.numpy()
        held.append(np.abs(z) < 1.96)
    own = np.array(variances)
    return {
        "variance": own.mean(),
        "error": own.std(ddof=1) / seeds**0.5,
        "coverage": np.mean(held, 0),
    }


NETWORKS, EPOCHS, ROWS, LEVELS = 20, 40, 4000, {"a": 100, "b": 60}
#: Of each setting the covariances of the effects of the levels.
COVARIANCES = {
    "intercepts": {"a": [[1.0]]},
    "slopes": {"a": [[1.0, 0.4], [0.4, 0.8]]},
    "crossed": {"a": [[1.0]], "b": [[0.49]]},
}


def draw_rows(setting: str, seed: int) -> tuple[dict[str, object], Tensor]:
    """A batch of all rows, in which the residual variance is 1, and the mean of each."""
    rng = np.random.default_rng(seed)
    x, slope = rng.uniform(-2, 2, (ROWS, 2)), rng.uniform(-1, 1, ROWS)
    mean = np.sin(2 * x[:, 0]) + x[:, 1] ** 2 / 2
    y, groups, values = mean + rng.normal(size=ROWS), {}, {}
    for name, covariance in COVARIANCES[setting].items():
        k, codes = len(covariance), rng.integers(LEVELS[name], size=ROWS)
        effects = rng.multivariate_normal(np.zeros(k), covariance, LEVELS[name])
        z = np.stack([np.ones(ROWS), slope][:k], 1)
        y = y + (z * effects[codes]).sum(1)
        groups[name], values[name] = torch.tensor(codes), torch.tensor(z).float()
    x, y, mean = (torch.tensor(v).float() for v in (x, y, mean))
    return {"x": x, "y": y, "groups": groups, "values": values}, mean


def effects_of(setting: str) -> dict[str, RandomEffect]:
    return {
        name: RandomEffect(LEVELS[name], effects=len(covariance))
        for name, covariance in COVARIANCES[setting].items()
    }


def components(model: MixedModel) -> dict[str, float]:
    """The covariances of a model by name."""
    found = {"residual": float(model.residual())}
    for name, effect in model.random.items():
        prior = effect.prior()
        places = torch.tril_indices(*prior.shape).T.tolist()
        found |= {f"{name}[{i},{j}]": float(prior[i, j]) for i, j in places}
    return found


def trained(setting: str, batch: dict[str, object], seed: int) -> dict[str, float]:
    """The components that a network ends with."""
    torch.manual_seed(seed)
    mean = nn.Sequential(
        nn.Linear(2, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 1)
    )
    model = MixedModel(mean, effects_of(setting))
    cycle = {"_target_": "torch.optim.lr_scheduler.OneCycleLR", "max_lr": 0.01}
    module = MixedModule(
        model,
        {"_target_": "torch.optim.Adam", "lr": 0.01},
        scheduler=cycle | {"total_steps": EPOCHS + 1},
    )
    names, values = list(batch["groups"]), batch["values"].values()
    rows = TensorDataset(batch["x"], batch["y"], *batch["groups"].values(), *values)

    def collate(chosen: list[tuple[Tensor, ...]]) -> dict[str, object]:
        x, y, *parts = (torch.stack(part) for part in zip(*chosen))
        codes, z = (dict(zip(names, p)) for p in (parts[: len(names)], parts[len(names) :]))
        return {"x": x, "y": y, "groups": codes, "values": z}

    trainer = Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(rows, 256, shuffle=True, collate_fn=collate))
    return components(model)


def with_known_mean(setting: str, batch: dict[str, object], mean: Tensor) -> dict[str, float]:
    """The components that maximise the likelihood of what the mean function leaves."""
    model = MixedModel(nn.Identity(), effects_of(setting)).double()
    values = {name: z.double() for name, z in batch["values"].items()}
    rest = (batch["y"] - mean).double()
    rows = batch | {"x": torch.zeros(ROWS, 1).double(), "y": rest, "values": values}
    fit_reml(model.covariance(rows), rest, torch.zeros(ROWS, 0).double(), method="ml")
    return components(model)


def networks() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print(f"{NETWORKS} tables each, residual variance 1, {COVARIANCES}")
    for setting in COVARIANCES:
        found, known = [], []
        for seed in range(NETWORKS):
            batch, mean = draw_rows(setting, seed)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about the loader's workers
                found.append(trained(setting, batch, seed))
            known.append(with_known_mean(setting, batch, mean))
        ours, best = pd.DataFrame(found), pd.DataFrame(known)
        for name in ours:
            print(
                f"{setting:10s} {name:9s} network {ours[name].mean():.4f} "
                f"+- {ours[name].sem():.4f}  mean known {best[name].mean():.4f}"
            )


def families() -> None:
    print(f"{SEEDS} tables each, true variance {VARIANCE:g}")
    for name, family, groups, rows in SETTINGS:
        for quadrature in (1, 15):
            found = simulate(family, groups, rows, quadrature)
            way = "Laplace" if quadrature == 1 else "quadrature"
            print(
                f"{name:26s} {way:10s} variance {found['variance']:.3f} +- {found['error']:.3f}  "
                f"coverage {' '.join(f'{100 * c:.0f} %' for c in found['coverage'])}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.simulations", description=__doc__)
    kinds = {"families": families, "networks": networks}
    parser.add_argument("kinds", nargs="*", choices=[*kinds, []], help="all by default")
    torch.set_num_threads(1)
    for kind in parser.parse_args().kinds or kinds:
        kinds[kind]()


if __name__ == "__main__":
    main()
