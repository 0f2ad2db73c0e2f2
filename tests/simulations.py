"""Bias and coverage of generalised mixed models: ``python -m tests.simulations``.

For each setting 50 tables are drawn and fitted, by Laplace's approximation and by quadrature. What
is printed: the mean estimate of the variance with its Monte Carlo standard error, and how often
the 95 % intervals, estimate ± 1.96 standard errors, hold the true coefficients.
"""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import torch

from openreml_nn import glmm

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


def main() -> None:
    torch.set_num_threads(1)
    print(f"{SEEDS} tables each, true variance {VARIANCE:g}")
    for name, family, groups, rows in SETTINGS:
        for quadrature in (1, 15):
            found = simulate(family, groups, rows, quadrature)
            way = "Laplace" if quadrature == 1 else "quadrature"
            print(
                f"{name:26s} {way:10s} variance {found['variance']:.3f} +- {found['error']:.3f}  "
                f"coverage {' '.join(f'{100 * c:.0f} %' for c in found['coverage'])}"
            )


if __name__ == "__main__":
    main()
