"""Relatives, fields, places and crossed factors by the sparse solver, and what fits none:
``python -m tests.benchmarks.sparse [name ...]``.

Each row runs in a process of its own on one core. Seconds are those of the processor: of a
factorisation with its selected inverse, and of a whole fit from tensors (or from a table in a file)
to estimates with standard errors and predictions. What numba compiles once on a machine is compiled
before.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from openreml_nn import REMLLoss, Result, fit_reml, glmm, lmm
from openreml_nn.covariance import (
    CovariancePropagation,
    DummyMatrix,
    IdentityMatrix,
    KnownInverseMatrix,
    KroneckerProduct,
    MaternCorrelation,
    Pedigree,
    ScalarMatrix,
    Sum,
    UnstructuredMatrix,
    VecchiaMatrix,
    ar1_field,
)
from openreml_nn.likelihood import Sparse
from openreml_nn.likelihood.solvers.sparse import SparseProblem
from tests.benchmarks.cases import CASES
from tests.benchmarks.measure import ONE_CORE
from tests.benchmarks.tables import field


@dataclass(frozen=True)
class Row:
    """What one benchmark took.

    Attributes:
        name: which.
        pedigree: seconds for the inverse of the relationship matrix, or for neighbours; 0 where there
            is none.
        evaluation: seconds of one factorisation with its selected inverse, 0 where not measured.
        fit: seconds of a whole fit.
        steps: of the fit.
        solver: the fit's.
        log_likelihood: at its end.
        peak_mb: memory of the process.
    """

    name: str
    pedigree: float
    evaluation: float
    fit: float
    steps: int
    solver: str
    log_likelihood: float
    peak_mb: float


def relatives(
    n: int, fixed: int, traits: int, share: int = 50
) -> tuple[Sum, torch.Tensor, torch.Tensor, float]:
    """A pedigree of ten generations, one in so many animals a sire; each has a record of each trait."""
    rng = np.random.default_rng(1)
    size = n // 10
    parents = np.full((n, 2), -1)
    for i in range(size, n):
        base = (i // size - 1) * size
        parents[i] = base + rng.integers(max(2, size // share)), base + rng.integers(size)
    u = rng.standard_normal((n, traits))
    for i in range(size, n):
        u[i] = u[parents[i]].mean(0) + u[i] / 2**0.5
    names = [f"a{i}" for i in range(n)]
    sires, dams = ([None if p < 0 else names[p] for p in side] for side in parents.T)
    start = time.process_time()
    found = Pedigree.of(names, sires, dams)
    taken = time.process_time() - start
    records = np.repeat(np.arange(n), traits)
    trait = np.tile(np.arange(traits), n)
    values = None if traits == 1 else torch.eye(traits, dtype=torch.float64)[trait]
    z = found.design([names[i] for i in records])
    if values is not None:
        codes = z.codes
        z = type(z).from_codes(codes, n, values)
    K = KnownInverseMatrix(found.inverse)
    if traits > 1:
        K.fix("sigma^2", 0.0)
    g = K if traits == 1 else KroneckerProduct(K, UnstructuredMatrix(traits))
    rows = n * traits
    R = (
        ScalarMatrix(n)
        if traits == 1
        else KroneckerProduct(IdentityMatrix(n), UnstructuredMatrix(traits))
    )
    y = 0.7 * u[records, trait] + rng.standard_normal(rows)
    X = torch.zeros(rows, fixed * traits, dtype=torch.float64)
    X[torch.arange(rows), torch.from_numpy(rng.integers(fixed, size=rows) * traits + trait)] = 1
    V = Sum(animal=CovariancePropagation(z, g), residual=R).double()
    return V, torch.from_numpy(y), X, taken


RELATIVES = {
    "pedigree-4641": (4_641, 166, 1),
    "pedigree-20000": (20_000, 1, 1),
    "pedigree-100000": (100_000, 1, 1),
    "wide-20000": (20_000, 1, 1, 10),
    "wide-50000": (50_000, 1, 1, 10),
    "wide-100000": (100_000, 1, 1, 10),
    "two-traits-20000": (20_000, 1, 2),
}
FIELDS = {"field-100x200": (100, 200), "field-300x400": (300, 400)}
PLACES = {"places-2000": 2_000, "places-10000": 10_000}
TABLES = ("insteval", "crossed", "ratings")
#: Levels of each of two factors, ten binary responses for each.
BINARY = {"binary-3000": 3_000, "binary-30000": 30_000}
NAMES = (*RELATIVES, *FIELDS, *PLACES, *TABLES, *BINARY)


def of_relatives(name: str) -> Row:
    V, y, X, taken = relatives(*RELATIVES[name])
    evaluation = _evaluation(V, y, X)
    start = time.process_time()
    result = fit_reml(V, y, X)
    return _row(name, taken, evaluation, time.process_time() - start, result)


def of_field(name: str) -> Row:
    """AR(1) by AR(1) and a nugget, of a field of plots of which one in twenty is missing."""
    rows, columns = FIELDS[name]
    rng = np.random.default_rng(1)
    sides = [np.linalg.cholesky(rho ** _lags(n)) for n, rho in ((rows, 0.8), (columns, 0.6))]
    plots = sides[0] @ rng.standard_normal((rows, columns)) @ sides[1].T
    kept = np.sort(rng.permutation(rows * columns)[: rows * columns * 19 // 20])
    y = torch.from_numpy(plots.reshape(-1)[kept] + 0.7 * rng.standard_normal(len(kept)))
    z = DummyMatrix.from_codes(torch.from_numpy(kept), rows * columns)
    V = Sum(
        field=CovariancePropagation(z, ar1_field(rows, columns)), nugget=ScalarMatrix(len(kept))
    ).double()
    X = torch.ones(len(kept), 1, dtype=torch.float64)
    evaluation = _evaluation(V, y, X)
    start = time.process_time()
    result = fit_reml(V, y, X)
    return _row(name, 0.0, evaluation, time.process_time() - start, result)


def of_places(name: str) -> Row:
    """A Matérn kernel of places in a square, each with 20 neighbours and about ten rows."""
    q = PLACES[name]
    at, codes, x, response = field(q)
    X = torch.from_numpy(np.stack([np.ones(10 * q), x], 1))
    y = torch.from_numpy(response)
    z = DummyMatrix.from_codes(torch.from_numpy(codes), q)
    start = time.process_time()
    K = VecchiaMatrix(torch.from_numpy(at), MaternCorrelation(1.5), neighbours=20)
    V = Sum(place=CovariancePropagation(z, K), residual=ScalarMatrix(10 * q)).double()
    found = time.process_time() - start
    evaluation = _evaluation(V, y, X)
    start = time.process_time()
    result = fit_reml(V, y, X)
    return _row(name, found, evaluation, time.process_time() - start, result)


def of_binary(name: str) -> Row:
    """Users and items that meet at random, of which a factor fills up."""
    q = BINARY[name]
    rng = np.random.default_rng(0)
    user, item = rng.integers(q, size=(2, 10 * q))
    x, users, items = rng.standard_normal(10 * q), rng.standard_normal(q), rng.standard_normal(q)
    eta = 0.5 * x - 0.5 + 0.8 * users[user] + 0.6 * items[item]
    y = (rng.random(10 * q) < 1 / (1 + np.exp(-eta))).astype(int)
    table = pd.DataFrame({"y": y, "x": x, "user": user, "item": item})
    start = time.process_time()
    result = glmm("y ~ x + (1 | user) + (1 | item)", table, family="binomial")
    return _row(name, 0.0, 0.0, time.process_time() - start, result)


def _lags(n: int) -> np.ndarray:
    return np.abs(np.subtract.outer(np.arange(n), np.arange(n)))


def of_table(name: str) -> Row:
    case = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.parquet"
        case.write(path)
        start = time.process_time()
        result = lmm(case.formula, path, categorical=case.factors)
        fit = time.process_time() - start
        return _row(name, 0.0, 0.0, fit, result)


def _evaluation(V: Sum, y: torch.Tensor, X: torch.Tensor) -> float:
    objective = REMLLoss(V, solver=Sparse()).objective(y, X)
    problem = objective.problem
    assert isinstance(problem, SparseProblem)
    start = time.process_time()
    objective.evaluate().scores()
    return time.process_time() - start


def _row(name: str, taken: float, evaluation: float, fit: float, result: Result) -> Row:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    steps, solver = result.iterations, result.plan.solver
    return Row(name, taken, evaluation, fit, steps, solver, result.log_likelihood, peak)


def run(name: str) -> None:
    """One row, in this process."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    V, y, X, _ = relatives(200, 2, 2)
    fit_reml(V, y, X, solver="sparse")  # all is compiled, or read from where it is kept
    kinds = (
        (RELATIVES, of_relatives),
        (FIELDS, of_field),
        (PLACES, of_places),
        (BINARY, of_binary),
    )
    of = next((of for names, of in kinds if name in names), of_table)
    found = of(name)
    print(json.dumps(asdict(found)))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.sparse", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*NAMES, []], help="all by default")
    parser.add_argument("--here", action="store_true", help="one row, in this process, as JSON")
    options = parser.parse_args()
    if options.here:
        run(options.names[0])
        return
    print(f"{'':18} pedigree  evaluation      fit  steps  solver     log-likelihood  peak MB")
    for name in options.names or NAMES:
        done = subprocess.run(
            [sys.executable, "-m", "tests.benchmarks.sparse", name, "--here"],
            env={**os.environ, **ONE_CORE},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            print(f"{name:18} failed: {done.stderr.strip().splitlines()[-1]}")
            continue
        row = Row(**json.loads(done.stdout.strip().splitlines()[-1]))
        print(
            f"{name:18} {row.pedigree:7.2f}s {row.evaluation:10.3f}s {row.fit:7.2f}s {row.steps:6} "
            f" {row.solver:9} {row.log_likelihood:15.4f} {row.peak_mb:8.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
