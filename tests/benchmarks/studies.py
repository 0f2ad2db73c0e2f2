"""Data of the comparisons of networks, simulated ones and InstEval.

The simulations are those of Simchoni and Rosset, Journal of Machine Learning Research 24 (2023), section
5: y = f(x) + z'b + e with x uniform on (-1, 1)^10, s = 1 + sum x, f = s cos s + 2 x_1 x_2 and residual
variance 1, in 100,000 rows of which a fifth is for testing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from openreml_nn import MixedModel, RandomEffect
from openreml_nn.covariance import (
    GaussianCorrelation,
    GaussianMatrix,
    Matrix,
    ScalarMatrix,
    UnstructuredMatrix,
    VecchiaMatrix,
)

__all__ = ["STUDIES", "Data", "network"]

ROWS = 100_000


@dataclass(frozen=True)
class Data:
    """Rows for training and for testing, and what made them.

    Attributes:
        x: (n, p) what networks and trees see.
        y: (n,) responses.
        groups: (n,) level of each grouping factor.
        levels: how many each has.
        train, test: places of the rows.
        random: makes the random effects, to be estimated.
        values: (n, k) of random slopes.
        mean: (n,) the true mean without random effects; None for data that were not simulated.
        truth: (k, k) the true covariance of the effects of each factor's levels.
        roots: (q, r) a root of the true covariance of a factor's levels, in place of it.
        slopes: (n, k) true values of the effects, where they are to be learned.
        places: (q, 2) of the levels of a spatial factor.
        epochs: of the networks.
    """

    x: Tensor
    y: Tensor
    groups: dict[str, Tensor]
    levels: dict[str, int]
    train: Tensor
    test: Tensor
    random: Callable[[], dict[str, RandomEffect]]
    values: dict[str, Tensor] = field(default_factory=dict)
    mean: Tensor | None = None
    truth: dict[str, Tensor] = field(default_factory=dict)
    roots: dict[str, Tensor] = field(default_factory=dict)
    slopes: dict[str, Tensor] = field(default_factory=dict)
    places: Tensor | None = None
    epochs: int = 30

    def batch(self, at: Tensor) -> dict[str, object]:
        """Some rows, as a mixed model takes them."""
        found: dict[str, object] = {"x": self.x[at], "y": self.y[at]}
        found["groups"] = {name: codes[at] for name, codes in self.groups.items()}
        if self.values:
            found["values"] = {name: values[at] for name, values in self.values.items()}
        return found

    def oracle(self) -> float:
        """Test error of the predictor that knows the mean function and the covariances."""
        assert self.mean is not None
        if self.roots:
            return self._rooted()
        values = {name: v.double() for name, v in {**self.values, **self.slopes}.items()}
        random = {}
        for name, covariance in self.truth.items():
            k = values[name].shape[1] if name in values else 1
            among: Matrix = ScalarMatrix(self.levels[name]).double()
            if k > 1:
                among = UnstructuredMatrix(k).double()
                root = torch.linalg.cholesky(covariance)
                for i in range(k):
                    for j in range(i + 1):
                        among.set_value(f"L_{i}_{j}", float(root[i, j]), natural=True)
            else:
                among.set_value("sigma^2", float(covariance), natural=True)
            random[name] = RandomEffect(self.levels[name], among, k)
        model = MixedModel(nn.Identity(), random)

        def rows(at: Tensor) -> dict[str, object]:
            found = self.batch(at) | {"x": self.mean[at].double(), "y": self.y[at].double()}
            return found | {"values": {name: v[at] for name, v in values.items()}}

        model.update(rows(self.train))
        return float(((model.predict(rows(self.test)).mean - self.y[self.test]) ** 2).mean())

    def _rooted(self) -> float:
        """The same for one factor whose effects are L u with u ~ N(0, I): u has the expectation
        (I + L' N L)^-1 L' s with the numbers and the sums of the residuals of each level."""
        assert self.mean is not None
        ((name, root),) = self.roots.items()
        codes, residual = self.groups[name], (self.y - self.mean).double()
        at, zero = codes[self.train], root.new_zeros(len(root))
        number = zero.index_add(0, at, torch.ones(len(at), dtype=torch.float64))
        total = zero.index_add(0, at, residual[self.train])
        system = root.mT @ (number[:, None] * root) + torch.eye(root.shape[1], dtype=torch.float64)
        u = torch.cholesky_solve((root.mT @ total)[:, None], torch.linalg.cholesky(system))
        error = (root @ u)[:, 0][codes[self.test]] - residual[self.test]
        return float((error**2).mean())


def network(inputs: int, outputs: int = 1) -> nn.Sequential:
    """The network of all methods that have one."""
    layers: list[nn.Module] = []
    for width in (100, 50, 25, 12):
        layers += [nn.Linear(inputs, width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


def _rows(g: torch.Generator, n: int) -> tuple[Tensor, Tensor]:
    x = 2 * torch.rand(n, 10, generator=g) - 1
    s = 1 + x.sum(1)
    return x, s * s.cos() + 2 * x[:, 0] * x[:, 1]


def _codes(g: torch.Generator, n: int, levels: int) -> Tensor:
    """Levels of unequal sizes."""
    weight = 1 + torch.poisson(torch.full((levels,), 3.0), generator=g)
    return torch.multinomial(weight, n, replacement=True, generator=g)


def _split(g: torch.Generator, n: int) -> tuple[Tensor, Tensor]:
    order = torch.randperm(n, generator=g)
    return order[: n * 4 // 5], order[n * 4 // 5 :]


def crossed(seed: int, n: int = ROWS, variances: tuple[float, ...] = (0.5, 0.5, 0.5)) -> Data:
    """Three crossed factors of 1,000, 2,000 and 3,000 levels."""
    g = torch.Generator().manual_seed(seed)
    x, f = _rows(g, n)
    levels = {name: q * n // ROWS for name, q in (("a", 1000), ("b", 2000), ("c", 3000))}
    groups = {name: _codes(g, n, q) for name, q in levels.items()}
    y = f + torch.randn(n, generator=g)
    truth = {}
    for variance, (name, codes) in zip(variances, groups.items(), strict=True):
        y = y + variance**0.5 * torch.randn(levels[name], generator=g)[codes]
        truth[name] = torch.tensor([[variance]], dtype=torch.float64)

    def random() -> dict[str, RandomEffect]:
        return {name: RandomEffect(q) for name, q in levels.items()}

    return Data(x, y, groups, levels, *_split(g, n), random, mean=f, truth=truth)


def longitudinal(seed: int, n: int = ROWS, future: bool = False, variance: float = 0.3) -> Data:
    """A random intercept and random slopes of t and t^2, ten rows of each subject; the rows for testing
    are drawn at random, or are the last fifth of the times."""
    g = torch.Generator().manual_seed(seed)
    q = n // 10
    x, f = _rows(g, n)
    codes = _codes(g, n, q)
    t = torch.rand(n, generator=g)
    z = torch.stack([torch.ones(n), t, t * t], 1)
    covariance = variance * torch.eye(3, dtype=torch.float64)
    covariance[0, 1] = covariance[1, 0] = 0.3 * variance
    root = torch.linalg.cholesky(covariance).float()
    b = torch.randn(q, 3, generator=g) @ root.mT
    f = f + t
    y = f + (z * b[codes]).sum(1) + torch.randn(n, generator=g)
    train, test = _split(g, n)
    if future:
        order = t.argsort()
        train, test = order[: n * 4 // 5], order[n * 4 // 5 :]
    names = ("(Intercept)", "t", "t^2")
    return Data(
        torch.cat([x, t[:, None]], 1),
        y,
        {"subject": codes},
        {"subject": q},
        train,
        test,
        lambda: {"subject": RandomEffect(q, effects=names)},
        values={"subject": z},
        mean=f,
        truth={"subject": covariance},
    )


def spatial(seed: int, n: int = ROWS, q: int = 100, variance: float = 1.0) -> Data:
    """Places in a square of 20 x 20, with a Gaussian covariance of length scale 1; more than 1,000 of them
    are estimated by 20 nearest neighbours."""
    g = torch.Generator().manual_seed(seed)
    x, f = _rows(g, n)
    codes = _codes(g, n, q)
    places = 20 * torch.rand(q, 2, generator=g, dtype=torch.float64) - 10
    root = variance**0.5 * _root(places)
    b = root @ torch.randn(root.shape[1], generator=g, dtype=torch.float64)
    y = f + b[codes].float() + torch.randn(n, generator=g)

    def random() -> dict[str, RandomEffect]:
        if q > 1000:
            near: Matrix = VecchiaMatrix(places, GaussianCorrelation(), neighbours=20)
            return {"place": RandomEffect(q, near)}
        return {"place": RandomEffect(q, GaussianMatrix(_distances(places, places)))}

    return Data(
        x,
        y,
        {"place": codes},
        {"place": q},
        *_split(g, n),
        random,
        mean=f,
        roots={"place": root},
        places=places,
    )


def _distances(one: Tensor, other: Tensor) -> Tensor:
    return torch.cdist(one, other, compute_mode="donot_use_mm_for_euclid_dist")


def _root(places: Tensor) -> Tensor:
    """(q, r) a root of the Gaussian covariance with length scale 1: the pivoted Cholesky factor, until no
    place has more than 1e-9 of its variance left."""
    q = len(places)
    left, columns = torch.ones(q, dtype=torch.float64), torch.zeros(q, q, dtype=torch.float64)
    for r in range(q):
        pivot = int(left.argmax())
        if float(left[pivot]) < 1e-9:
            return columns[:, :r].clone()
        column = torch.exp(-(_distances(places, places[pivot : pivot + 1])[:, 0] ** 2) / 2)
        column -= columns[:, :r] @ columns[pivot, :r]
        columns[:, r] = column / left[pivot].sqrt()
        left -= columns[:, r] ** 2
    return columns


def features(seed: int, n: int = ROWS, q: int = 1000) -> Data:
    """Random slopes of a level in two features, tanh(x W) of a W that is to be learned."""
    g = torch.Generator().manual_seed(seed)
    x, f = _rows(g, n)
    codes = _codes(g, n, q)
    z = torch.tanh(x @ torch.randn(10, 2, generator=g))
    y = f + (z * torch.randn(q, 2, generator=g)[codes]).sum(1) + torch.randn(n, generator=g)

    def random() -> dict[str, RandomEffect]:
        learned = nn.Sequential(nn.Linear(10, 2), nn.Tanh())
        return {"g": RandomEffect(q, effects=2, features=learned)}

    return Data(
        x,
        y,
        {"g": codes},
        {"g": q},
        *_split(g, n),
        random,
        mean=f,
        truth={"g": torch.eye(2, dtype=torch.float64)},
        slopes={"g": z},
    )


def insteval(seed: int, n: int = 0, slopes: bool = False) -> Data:
    """Ratings of lectures by students, whose effects are of students and lecturers; with slopes also one
    of service of each lecturer, and effects of departments with it and without. The fold ``seed`` of
    five is for testing."""
    path = Path(__file__).parents[1] / "reference" / "insteval.csv.gz"
    table = pd.read_csv(path)
    if n:
        table = table.head(n)
    order = np.random.default_rng(0).permutation(len(table))
    folds = np.array_split(order, 5)
    test = folds[(seed - 1) % 5]
    train = np.setdiff1d(order, test)
    columns = [
        pd.get_dummies(table[c]).to_numpy() for c in ("studage", "lectage", "service", "dept")
    ]
    x = torch.tensor(np.concatenate(columns, 1), dtype=torch.float32)
    table["dept:service"] = 2 * table["dept"] + table["service"]
    groups, levels = {}, {}
    for name in ("s", "d", "dept:service") if slopes else ("s", "d"):
        codes, labels = pd.factorize(table[name])
        groups[name], levels[name] = torch.as_tensor(codes), len(labels)
    y, service = (torch.tensor(table[c].to_numpy(), dtype=torch.float32) for c in ("y", "service"))
    values = {"d": torch.stack([torch.ones_like(service), service], 1)} if slopes else {}

    def random() -> dict[str, RandomEffect]:
        return {name: RandomEffect(q, effects=1 + (name in values)) for name, q in levels.items()}

    parts = torch.as_tensor(train), torch.as_tensor(test)
    return Data(x, y, groups, levels, *parts, random, values=values)


#: Each study by its name on the command line.
STUDIES: Mapping[str, Callable[..., Data]] = {
    "crossed": crossed,
    "longitudinal": longitudinal,
    "future": partial(longitudinal, future=True),
    "spatial-100": spatial,
    "spatial-1000": partial(spatial, q=1000),
    "spatial-10000": partial(spatial, q=10_000),
    "features": features,
    "insteval": insteval,
    "insteval-slopes": partial(insteval, slopes=True),
}
