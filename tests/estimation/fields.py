"""Simulated fields: one optimum in every unit, the best of random starts.

Run by hand: ``python -m tests.estimation.fields``. It prints a line for each data set and fails
if one ends lower than the best of its random starts, or otherwise in another unit. All 20 seeds
take about 8 minutes of CPU.
"""

from __future__ import annotations

import argparse
import math
import warnings
from time import process_time

import numpy as np
import torch
from torch import Tensor

from openreml_nn import fit_reml
from openreml_nn.covariance import Matrix, ScalarMatrix, Sum, ar1_field

ROWS, COLUMNS, GENOTYPES = 15, 10, 25
UNITS = (1e-3, 0.1, 1.0, 100.0, 3000.0)
#: Likelihoods that differ by less are the same optimum.
SAME = 1e-6


def field(seed: int, genotypes: bool) -> tuple[Tensor, Tensor]:
    """Response and model matrix of a field with a nugget, with other correlations for each seed."""
    rng = np.random.default_rng(seed)
    rho = (0.45, 0.9) if seed % 2 else rng.uniform(0.2, 0.97, 2)

    def ar(n: int, r: float) -> np.ndarray:
        return r ** abs(np.subtract.outer(np.arange(n), np.arange(n)))

    n = ROWS * COLUMNS
    root = np.linalg.cholesky(np.kron(ar(ROWS, rho[0]), ar(COLUMNS, rho[1])))
    y = 2.3 * root @ rng.standard_normal(n) + 1.1 * rng.standard_normal(n)
    if not genotypes:
        return torch.tensor(y), torch.ones(n, 1).double()
    variety = rng.permutation(np.tile(np.arange(GENOTYPES), n // GENOTYPES))
    y = y + rng.standard_normal(GENOTYPES)[variety]
    return torch.tensor(y), torch.tensor(np.eye(GENOTYPES)[variety])


def model() -> Matrix:
    """An autoregressive field and a nugget."""
    return Sum(field=ar1_field(ROWS, COLUMNS), units=ScalarMatrix(ROWS * COLUMNS)).double()


def at_random(V: Matrix, rng: np.random.Generator, size: float) -> Matrix:
    """The model at a random point: variances over two decades about a size."""
    for entry in V.parameter_entries().free:
        rho = "rho" in entry.name
        value = rng.uniform(-0.9, 0.99) if rho else size * 10 ** rng.uniform(-1, 1)
        with torch.no_grad():
            entry.tensor.copy_(entry.trans.inverse(torch.tensor([value]).double()))
    return V


def best_of_random(y: Tensor, X: Tensor, starts: int, seed: int) -> list[float]:
    """Log-likelihoods at the ends of fits from random points."""
    rng, found = np.random.default_rng(1000 + seed), []
    for _ in range(starts):
        V = at_random(model(), rng, float(y.var()))
        try:
            found.append(fit_reml(V, y, X, start="current").log_likelihood)
        except ValueError as error:
            print(f"      a random start was refused: {error}")
    return sorted(found, reverse=True)


def check(seed: int, genotypes: bool, starts: int) -> list[str]:
    """What is wrong with the fits of one data set; prints a line."""
    y, X = field(seed, genotypes)
    n, p = X.shape
    began, likelihoods, steps, wrong = process_time(), [], [], []
    for unit in UNITS:
        result = fit_reml(model(), unit * y, X)
        likelihoods.append(result.log_likelihood + (n - p) * math.log(unit))
        steps.append(sum(s.iterations for s in result.starts) + result.iterations)
        if not result.converged:
            wrong.append(f"unit {unit:g} did not converge: {result.score_norm:.2g}")
    took = (process_time() - began) / len(UNITS)
    found = best_of_random(y, X, starts, seed)
    spread, short = max(likelihoods) - min(likelihoods), found[0] - min(likelihoods)
    if spread > SAME:
        wrong.append(f"units differ by {spread:.3g}")
    if short > SAME:
        wrong.append(f"a random start ends {short:.3g} higher")
    values = {q.name: round(q.value, 3) for q in result.parameters}
    hit = sum(value > found[0] - 1e-3 for value in found)
    print(
        f"{seed:3d} {'genotypes' if genotypes else 'mean':9s} logL {likelihoods[2]:11.4f} "
        f"spread {spread:7.1e} random - ours {short:9.1e} ({hit} of {starts} there) "
        f"steps {max(steps):3d} {took:5.2f} s {list(values.values())}",
        *wrong,
        sep="\n      ",
        flush=True,
    )
    return wrong


def main() -> None:
    """Check each seed with and without genotypes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs=2, default=(0, 20), metavar=("FIRST", "END"))
    parser.add_argument("--starts", type=int, default=20)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    wrong = [
        text
        for seed in range(*args.seeds)
        for genotypes in (False, True)
        for text in check(seed, genotypes, args.starts)
    ]
    print(f"{len(wrong)} faults")
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
