"""Simulated tables of the benchmarks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

__all__ = ["crossed", "insteval", "nested", "slopes"]


def insteval() -> pd.DataFrame:
    """73,421 ratings of lectures: the table of lme4."""
    return pd.read_csv(Path(__file__).parents[1] / "reference" / "insteval.csv.gz")


def slopes(n: int = 1_000_000, subjects: int = 100_000) -> pd.DataFrame:
    """Correlated random intercepts and slopes of many subjects, five covariates."""
    rng = np.random.default_rng(0)
    g = np.sort(rng.integers(0, subjects, n))
    x = rng.standard_normal((n, 5))
    L = np.linalg.cholesky(np.array([[1.0, 0.3], [0.3, 0.5]]))
    b = rng.standard_normal((subjects, 2)) @ L.T
    y = 1 + x @ np.arange(1, 6) / 5 + b[g, 0] + b[g, 1] * x[:, 0] + rng.standard_normal(n)
    return pd.DataFrame({"y": y, **{f"x{i}": x[:, i] for i in range(5)}, "g": g})


def crossed(n: int = 200_000, users: int = 20_000, items: int = 2_000) -> pd.DataFrame:
    """Ratings by users of items, both with popularities that fall like Zipf's."""
    rng = np.random.default_rng(0)

    def draw(levels: int, power: float) -> np.ndarray:
        p = np.arange(1, levels + 1) ** -power
        return rng.choice(levels, n, p=p / p.sum())

    user, item = draw(users, 0.5), draw(items, 0.7)
    x = rng.standard_normal(n)
    effects = rng.standard_normal(users)[user] + 0.7 * rng.standard_normal(items)[item]
    y = 1 + 0.5 * x + effects + rng.standard_normal(n)
    return pd.DataFrame({"y": y, "x": x, "user": user, "item": item})


def nested(n: int) -> pd.DataFrame:
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
    return pd.DataFrame({"y": y, "x": x, "a": a, "b": b, "c": c, "d": d})
