"""Simulated tables of the benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch

__all__ = [
    "binary",
    "choices",
    "chunked",
    "contraception",
    "crossed",
    "field",
    "insteval",
    "kernel",
    "kinship",
    "nested",
    "parents",
    "pedigree",
    "places",
    "responses",
    "slopes",
]


def insteval(path: Path) -> None:
    """73,421 ratings of lectures: the table of lme4."""
    pd.read_csv(Path(__file__).parents[1] / "reference" / "insteval.csv.gz").to_parquet(path)


def slopes(path: Path, n: int = 1_000_000, subjects: int = 100_000) -> None:
    """Correlated random intercepts and slopes of many subjects, five covariates."""
    rng = np.random.default_rng(0)
    g = np.sort(rng.integers(0, subjects, n))
    x = rng.standard_normal((n, 5))
    L = np.linalg.cholesky(np.array([[1.0, 0.3], [0.3, 0.5]]))
    b = rng.standard_normal((subjects, 2)) @ L.T
    y = 1 + x @ np.arange(1, 6) / 5 + b[g, 0] + b[g, 1] * x[:, 0] + rng.standard_normal(n)
    pd.DataFrame({"y": y, **{f"x{i}": x[:, i] for i in range(5)}, "g": g}).to_parquet(path)


def crossed(path: Path, n: int, users: int, items: int) -> None:
    """Ratings by users of items, both with popularities that fall like Zipf's."""
    rng = np.random.default_rng(0)

    def draw(levels: int, power: float) -> np.ndarray:
        p = np.arange(1, levels + 1) ** -power
        return rng.choice(levels, n, p=p / p.sum())

    user, item = draw(users, 0.5), draw(items, 0.7)
    x = rng.standard_normal(n)
    effects = rng.standard_normal(users)[user] + 0.7 * rng.standard_normal(items)[item]
    y = 1 + 0.5 * x + effects + rng.standard_normal(n)
    pd.DataFrame({"y": y, "x": x, "user": user, "item": item}).to_parquet(path)


def binary(path: Path, table: Callable[[Path], None], column: str, above: float) -> None:
    """Another table with ``b``, whether a column is above a number."""
    table(path)
    found = pd.read_parquet(path)
    found.assign(b=(found[column] > above).astype(int)).to_parquet(path)


def responses(path: Path, n: int, counts: bool = False) -> None:
    """Binary responses or counts of ten rows a group, with one covariate."""
    rng = np.random.default_rng(1)
    g, x = rng.integers(0, n // 10, n), rng.normal(size=n)
    eta = -0.3 + 0.5 * x + rng.normal(size=n // 10)[g]
    y = rng.poisson(np.exp(eta)) if counts else rng.binomial(1, 1 / (1 + np.exp(-eta)))
    pd.DataFrame({"y": y, "x": x, "g": g}).to_parquet(path)


def choices(path: Path, n: int = 200_000, users: int = 20_000, items: int = 2_000) -> None:
    """Binary responses of users to items."""
    rng = np.random.default_rng(1)
    user, item = rng.integers(0, users, n), rng.integers(0, items, n)
    x = rng.normal(size=n)
    effects = rng.normal(size=users)[user] + 0.7 * rng.normal(size=items)[item]
    y = rng.binomial(1, 1 / (1 + np.exp(0.3 - 0.5 * x - effects)))
    pd.DataFrame({"y": y, "x": x, "user": user, "item": item}).to_parquet(path)


def contraception(path: Path) -> None:
    """1,934 women of 60 districts, of R's mlmRev."""
    table = pd.read_csv(Path(__file__).parents[1] / "reference" / "glmm" / "contraception.csv")
    table.to_parquet(path)


def nested(path: Path, n: int) -> None:
    """Four nested levels: ten rows in each of the finest, then 5, 10 and 10 within the next."""
    rng = np.random.default_rng(0)
    d = np.sort(rng.integers(0, n // 10, n))
    c = d // 5
    b = c // 10
    a = b // 10
    x = rng.standard_normal(n)
    y = 1 + 0.5 * x + rng.standard_normal(n)
    for scale, level in ((0.3, a), (0.5, b), (0.7, c), (1.0, d)):
        y += scale * rng.standard_normal(level.max() + 1)[level]
    pd.DataFrame({"y": y, "x": x, "a": a, "b": b, "c": c, "d": d}).to_parquet(path)


def field(q: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Places in a square, each with about ten rows, and their effects with a Matérn covariance: the
    coordinates (q, 2), and of each row its place, a covariate and the response."""
    rng = np.random.default_rng(1)
    at = rng.uniform(0, q**0.5, (q, 2))
    # Waves whose numbers have the kernel's spectrum, a t distribution of 3 degrees of freedom.
    waves = rng.standard_normal((2, 1000)) / np.sqrt(rng.chisquare(3, 1000) / 3) / 5
    effects = np.cos(at @ waves + rng.uniform(0, 2 * np.pi, 1000)).sum(1) * (2 / 1000) ** 0.5
    codes, x = rng.integers(q, size=10 * q), rng.standard_normal(10 * q)
    return at, codes, x, effects[codes] + rng.standard_normal(10 * q)


def places(path: Path, q: int) -> None:
    """The rows of :func:`field` with the coordinates of their places."""
    at, codes, x, y = field(q)
    east, north = at[codes].T
    pd.DataFrame({"y": y, "x": x, "east": east, "north": north}).to_parquet(path)


def kinship(n: int) -> torch.Tensor:
    """A relationship matrix of n individuals by n + 50 markers."""
    generator = torch.Generator().manual_seed(1)
    markers = torch.randn(n, n + 50, generator=generator, dtype=torch.float64)
    return markers @ markers.mT / (n + 50)


def kernel(path: Path, n: int) -> None:
    """A response with the covariance K + I."""
    rng = np.random.default_rng(0)
    root = torch.linalg.cholesky(kinship(n)).numpy()
    y = 1 + root @ rng.standard_normal(n) + rng.standard_normal(n)
    pd.DataFrame({"y": y}).to_parquet(path)


def parents(n: int, share: int = 50) -> tuple[list[str], list[str | None], list[str | None]]:
    """Animals of ten generations, each by one of a few sires, one in so many animals, and one of
    many dams before."""
    rng = np.random.default_rng(1)
    size = n // 10
    names = [f"a{i}" for i in range(n)]
    sires: list[str | None] = [None] * n
    dams: list[str | None] = [None] * n
    for i in range(size, n):
        base = (i // size - 1) * size
        sires[i] = names[base + rng.integers(0, max(2, size // share))]
        dams[i] = names[base + rng.integers(size // share, size)]
    return names, sires, dams


def pedigree(path: Path, n: int) -> None:
    """A record of each animal, heritability one third."""
    rng = np.random.default_rng(0)
    names, sires, dams = parents(n)
    place = {name: i for i, name in enumerate(names)}
    value = np.zeros(n)
    for i, (sire, dam) in enumerate(zip(sires, dams, strict=True)):
        known = sire is not None and dam is not None
        mean = (value[place[sire]] + value[place[dam]]) / 2 if known else 0.0
        value[i] = mean + rng.standard_normal() * (0.5 if known else 0.5**0.5)
    pd.DataFrame({"y": value + rng.standard_normal(n)}).to_parquet(path)


def chunked(path: Path, n: int, users: int = 2_000, items: int = 200) -> None:
    """Random slopes of users, crossed with items, written part by part."""
    rng = np.random.default_rng(0)
    b, slope, c = (rng.standard_normal(size) for size in (users, users, items))
    writer = None
    for start in range(0, n, 1_000_000):
        m = min(1_000_000, n - start)
        user, item = rng.integers(0, users, m), rng.integers(0, items, m)
        x = rng.standard_normal(m)
        y = 1 + 0.5 * x + b[user] + 0.3 * slope[user] * x + 0.5 * c[item] + rng.standard_normal(m)
        part = pa.table({"y": y, "x": x, "user": user, "item": item})
        writer = writer or pq.ParquetWriter(path, part.schema)
        writer.write_table(part, row_group_size=250_000)
    if writer is not None:
        writer.close()
