"""Networks with random effects for binary responses and counts, beside embeddings of the levels:
``python -m tests.benchmarks.responses --levels 100 1000 10000 --seeds 1 2``.

Rows are simulated by :func:`openreml_nn.datasets.purchases` and :func:`openreml_nn.datasets.visits`, ten a level and
at least 20,000, of which a fifth is held out. ``loss`` is the mean negative log of the predictive density there: of a
binary response its log loss. ``oracle`` knows the mean and the variance, and integrates over the exact posterior
of each level's effect on a grid. ``sigma^2`` has its standard error; its last column is the distance from the
truth in standard errors.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from openreml_nn import MixedModel, RandomEffect, datasets
from openreml_nn.families import Binomial, Family, Poisson
from openreml_nn.model.generalised import fit_family

STEPS, RATE = 300, 0.03
EPOCHS, BATCH, SIZE = 30, 512, 10


@dataclass(frozen=True)
class Study:
    """Simulated rows, and what made them."""

    family: Family
    x: Tensor
    y: Tensor
    level: Tensor
    levels: int
    mean: Tensor
    variance: float
    train: Tensor
    test: Tensor

    def batch(self, at: Tensor) -> dict[str, object]:
        """Some rows."""
        return {"x": self.x[at], "y": self.y[at], "groups": {"g": self.level[at]}}

    def oracle(self) -> float:
        """The loss by the truth and the exact posteriors."""
        at = torch.linspace(-6, 6, 121, dtype=torch.float64)
        prior = -(at**2) / 2
        effects = at * self.variance**0.5

        def densities(rows: Tensor) -> Tensor:
            y = self.y[rows, None].expand(-1, len(at)).reshape(-1)
            eta = (self.mean[rows, None] + effects).reshape(-1)
            return self.family.log_density(y, eta).reshape(len(rows), -1)

        posterior = prior.repeat(self.levels, 1).index_add_(
            0, self.level[self.train], densities(self.train)
        )
        weights = posterior.log_softmax(1)[self.level[self.test]]
        return -float((weights + densities(self.test)).logsumexp(1).mean())


def study(kind: str, levels: int, seed: int) -> Study:
    """Rows of a kind."""
    rows = max(20_000, 10 * levels)
    simulate = datasets.purchases if kind == "binary" else datasets.visits
    table = simulate(rows, levels, seed)
    names = list(table.columns[1:-1])
    x = torch.tensor(table[names].to_numpy())
    if kind == "binary":
        mean, variance = (2 * x[:, 0]).sin() + 2 * x[:, 1] * x[:, 2] - 0.5, 0.8
    else:
        mean, variance = 0.5 + 0.6 * (2 * x[:, 0]).sin() + x[:, 1] * x[:, 2], 0.3
    order = torch.from_numpy(np.random.default_rng(seed).permutation(rows))
    y, level = (torch.tensor(table.iloc[:, j].to_numpy()) for j in (0, -1))
    family = Binomial() if kind == "binary" else Poisson()
    parts = order[rows // 5 :], order[: rows // 5]
    return Study(family, x, y.double(), level.long(), levels, mean, variance, *parts)


def network(inputs: int) -> nn.Sequential:
    """The network of both methods."""
    return nn.Sequential(
        nn.Linear(inputs, 32), nn.Tanh(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 1)
    ).double()


def random_effects(data: Study) -> tuple[float, float, float]:
    """The loss of a network with random effects; the variance and its standard error."""
    mean = network(data.x.shape[1])
    model = MixedModel(mean, {"g": RandomEffect(data.levels)}, family=data.family).double()
    batch = data.batch(data.train)
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model.loss(batch).backward()
        optimizer.step()
        schedule.step()
    # The network has learned by Laplace's approximation, of which the variance is biased where a
    # level has few binary rows.
    points = 5 if data.family.name == "binomial" else 1
    effect = {"g": RandomEffect(data.levels)}
    model = MixedModel(mean, effect, family=data.family, quadrature=points).double()
    (variance,) = fit_family(model, batch).parameters
    model.update(batch)
    loss = -float(model.log_density(data.batch(data.test)).mean())
    return loss, variance.value, variance.std_error


def embedding(data: Study) -> float:
    """The loss of a network on x and ten learned numbers of each level."""
    embedded = nn.Embedding(data.levels, SIZE).double()
    mean = network(data.x.shape[1] + SIZE)
    parameters = [*embedded.parameters(), *mean.parameters()]
    optimizer = torch.optim.AdamW(parameters, 0.006, weight_decay=0.1)

    def losses(at: Tensor) -> Tensor:
        eta = mean(torch.cat([data.x[at], embedded(data.level[at])], 1))[:, 0]
        return -data.family.log_density(data.y[at], eta).mean()

    for _ in range(EPOCHS):
        for at in data.train[torch.randperm(len(data.train))].split(BATCH):
            optimizer.zero_grad()
            losses(at).backward()
            optimizer.step()
    with torch.no_grad():
        return float(losses(data.test))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.responses", description=__doc__
    )
    parser.add_argument("--kinds", nargs="*", default=["binary", "counts"])
    parser.add_argument("--levels", nargs="*", type=int, default=[100, 1000, 10_000])
    parser.add_argument("--seeds", nargs="*", type=int, default=[1, 2])
    options = parser.parse_args()
    titles = ("oracle", "random effects", "embedding", "sigma^2", "errors off", "seconds")
    print(f"{'':24}" + "".join(f"{title:>17}" for title in titles))
    for kind in options.kinds:
        for levels in options.levels:
            for seed in options.seeds:
                torch.manual_seed(seed)
                data, began = study(kind, levels, seed), time.process_time()
                loss, variance, error = random_effects(data)
                seconds = time.process_time() - began
                cells = [f"{value:.4f}" for value in (data.oracle(), loss, embedding(data))]
                cells.append(f"{variance:.3f} +- {error:.3f}")
                cells += [f"{(variance - data.variance) / error:+.1f}", f"{seconds:.0f}"]
                name = f"{kind}, {levels:,} levels, {seed}"
                print(f"{name:24}" + "".join(f"{cell:>17}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
