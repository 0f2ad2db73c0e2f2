"""How cost grows: ``python -m tests.benchmarks.growth [name ...]``.

Each curve has one quantity grow and all else stay. Each size runs on one core in a process of its own, a fork of
this one, which has imported the library and compiled what numba compiles. Seconds are those of the
processor: of preparing the data, of one evaluation (the likelihood, its gradient, the average
information and the curvature of a step) and of a whole fit where that takes seconds. Memory is how
far preparing and evaluating take the process above what it held with the data. The exponent is the
slope of log seconds by log size over the three largest sizes; that of memory likewise.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numba
import numpy as np
import scipy
import torch
from torch import Tensor

from openreml_nn import REMLLoss, fit_reml
from openreml_nn.covariance import (
    CovariancePropagation,
    DummyMatrix,
    IdentityMatrix,
    KnownInverseMatrix,
    KroneckerProduct,
    MaternCorrelation,
    Matrix,
    Pedigree,
    ScalarMatrix,
    Sum,
    UnstructuredMatrix,
    VecchiaMatrix,
)
from openreml_nn.estimation.curvature import Curvature
from tests.benchmarks.communication import communication
from tests.benchmarks.measure import processor
from tests.benchmarks.tables import parents

#: A fit is measured where an evaluation takes no longer.
SECONDS_FOR_A_FIT = 0.3

Model = tuple[Matrix, Tensor, Tensor]  # V, y, X


@dataclass(frozen=True)
class Curve:
    """One quantity that grows.

    Attributes:
        what: what grows, and what stays.
        make: covariance, response and model matrix of a size.
        sizes: ascending.
        solver: the exact one that ``"auto"`` takes for most of them.
    """

    what: str
    make: Callable[[int], Model]
    sizes: tuple[int, ...]
    solver: str


@dataclass(frozen=True)
class Cost:
    """What one size took.

    Attributes:
        prepare: CPU seconds from tensors to cross-products, or to a factor's symbolic pattern.
        evaluation: CPU seconds of the likelihood with gradient and information.
        fit: CPU seconds of a whole fit, NaN where it was not measured.
        steps: of the fit.
        peak_mb: memory above that of the data.
    """

    prepare: float
    evaluation: float
    fit: float
    steps: int
    peak_mb: float


# ---------------------------------------------------------------------- models


def grouped(rows: int, levels: int, effects: int = 1) -> Model:
    """Rows spread evenly over the levels of one factor, each with correlated effects."""
    rng = np.random.default_rng(0)
    codes = torch.arange(rows) % levels
    values = torch.from_numpy(rng.standard_normal((rows, effects)))
    values[:, 0] = 1
    b = torch.from_numpy(rng.standard_normal((levels, effects)))
    z = DummyMatrix.from_codes(codes, levels, None if effects == 1 else values)
    g = (
        ScalarMatrix(levels)
        if effects == 1
        else KroneckerProduct(IdentityMatrix(levels), UnstructuredMatrix(effects))
    )
    X = torch.stack([torch.ones(rows), torch.linspace(-1, 1, rows)], 1).double()
    y = (values * b[codes]).sum(1) + torch.from_numpy(rng.standard_normal(rows))
    V = Sum(g=CovariancePropagation(z=z, g=g), residual=ScalarMatrix(rows)).double()
    return V, y, X


def crossed(items: int) -> Model:
    """Ten times as many users as items, and 20 rows a user, all pairs equally likely."""
    rng = np.random.default_rng(0)
    users, rows = 10 * items, 200 * items
    sides = {"user": (torch.arange(rows) % users, users)}
    sides["item"] = (torch.from_numpy(rng.integers(items, size=rows)), items)
    y, terms = torch.from_numpy(rng.standard_normal(rows)), {}
    for name, (codes, levels) in sides.items():
        y = y + torch.from_numpy(rng.standard_normal(levels))[codes]
        z = DummyMatrix.from_codes(codes, levels)
        terms[name] = CovariancePropagation(z=z, g=ScalarMatrix(levels))
    X = torch.ones(rows, 1, dtype=torch.float64)
    return Sum(**terms, residual=ScalarMatrix(rows)).double(), y, X


def relatives(n: int, share: int = 50) -> Model:
    """Animals of ten generations, a record each; one in so many is a sire."""
    names, sires, dams = parents(n, share)
    found = Pedigree.of(names, sires, dams)
    z, g = found.design(names), KnownInverseMatrix(found.inverse)
    V = Sum(animal=CovariancePropagation(z=z, g=g), residual=ScalarMatrix(n)).double()
    rng = np.random.default_rng(0)
    y = torch.from_numpy(rng.standard_normal(n) + 0.5 * rng.standard_normal(10).repeat(n // 10))
    return V, y, torch.ones(n, 1, dtype=torch.float64)


def places(n: int) -> Model:
    """Places in a square whose side grows with the square root of n, ten neighbours each."""
    rng = np.random.default_rng(0)
    at = rng.uniform(0, n**0.5 / 3, (n, 2))
    y = torch.from_numpy(np.sin(at).sum(1) + 0.5 * rng.standard_normal(n))
    g = VecchiaMatrix(torch.from_numpy(at), MaternCorrelation(1.5), neighbours=10)
    z = DummyMatrix.from_codes(torch.arange(n), n)
    V = Sum(field=CovariancePropagation(z=z, g=g), residual=ScalarMatrix(n)).double()
    return V, y, torch.ones(n, 1, dtype=torch.float64)


def responses(t: int, units: int = 10_000, levels: int = 500) -> Model:
    """The tree of ``cbind(...) ~ us(trait | g)``: responses correlated between and within levels."""
    rng = np.random.default_rng(0)
    unit = np.arange(units).repeat(t)
    trait = np.tile(np.arange(t), units)
    codes = unit % levels
    b = rng.standard_normal((levels, t))
    y = torch.from_numpy(b[codes, trait] + rng.standard_normal(units * t))
    values = torch.eye(t, dtype=torch.float64)[trait]
    z = DummyMatrix.from_codes(torch.from_numpy(codes), levels, values)
    g = KroneckerProduct(IdentityMatrix(levels), UnstructuredMatrix(t))
    residual = KroneckerProduct(IdentityMatrix(units), UnstructuredMatrix(t))
    return Sum(g=CovariancePropagation(z=z, g=g), residual=residual).double(), y, values


CURVES = {
    "rows": Curve(
        "rows, of 1,000 levels",
        lambda n: grouped(n, 1_000),
        (30_000, 100_000, 300_000, 1_000_000, 3_000_000),
        "blocked",
    ),
    "levels": Curve(
        "levels of one factor, of 1,000,000 rows",
        lambda q: grouped(1_000_000, q),
        (3_000, 10_000, 30_000, 100_000, 300_000),
        "blocked",
    ),
    "effects": Curve(
        "correlated effects a level, of 100,000 rows and 5,000 levels",
        lambda k: grouped(100_000, 5_000, k),
        (1, 2, 4, 8, 12),
        "blocked",
    ),
    "crossed": Curve(
        "items, crossed with ten times as many users, 20 rows a user",
        crossed,
        (250, 500, 1_000, 2_000, 3_000),
        "blocked",
    ),
    "relatives": Curve(
        "animals of a pedigree of ten generations, a record each",
        relatives,
        (4_000, 8_000, 16_000, 32_000, 64_000),
        "sparse",
    ),
    "wide": Curve(
        "animals of such a pedigree with one in ten a sire in place of one in fifty",
        lambda n: relatives(n, 10),
        (4_000, 8_000, 16_000, 32_000, 64_000),
        "sparse",
    ),
    "places": Curve(
        "places, each with ten neighbours, a record each",
        places,
        (500, 1_000, 2_000, 4_000, 8_000),
        "sparse",
    ),
    "responses": Curve(
        "responses a row, of 10,000 rows and 500 levels",
        responses,
        (1, 2, 3, 4, 6),
        "blocked",
    ),
}

# ---------------------------------------------------------------------- measuring


def cost(curve: Curve, size: int) -> Cost:
    """What one size takes, in this process."""
    V, y, X = curve.make(size)
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    start = time.process_time()
    objective = REMLLoss(V, solver=curve.solver).objective(y, X)
    prepare = time.process_time() - start
    taken: list[float] = []
    while len(taken) < 3 and sum(taken) < 0.5:
        with torch.no_grad():
            for parameter in V.parameters():
                parameter += 0.01  # an evaluation at the same parameters would be the last one
        start = time.process_time()
        Curvature([objective])
        taken.append(time.process_time() - start)
    peak, evaluation = _memory("VmHWM") - before, min(taken)
    if evaluation > SECONDS_FOR_A_FIT:
        return Cost(prepare, evaluation, float("nan"), 0, peak)
    start = time.process_time()
    result = fit_reml(V, y, X, solver=curve.solver)
    return Cost(prepare, evaluation, time.process_time() - start, result.iterations, peak)


def _memory(which: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(which)) / 1024


def _answer(curve: Curve, size: int, into: Connection) -> None:
    into.send(json.dumps(asdict(cost(curve, size))))


def in_a_fork(curve: Curve, size: int) -> Cost:
    """What one size takes, in a process of its own.

    Raises:
        RuntimeError: if the process fails.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(curve, size, theirs))
    process.start()
    theirs.close()
    try:
        return Cost(**json.loads(ours.recv()))
    except EOFError:
        raise RuntimeError(f"{curve.what}: the process of size {size:,} failed") from None
    finally:
        process.join()


def exponent(sizes: Sequence[int], found: Sequence[float]) -> float:
    """The slope of log found by log size over the three largest sizes."""
    return float(np.polyfit(np.log(sizes[-3:]), np.log(np.maximum(found[-3:], 1e-9)), 1)[0])


def printed(name: str, curve: Curve) -> None:
    """Measure a curve and print its table, line by line."""
    print(f"\n{name}: {curve.what} ({curve.solver})")
    print(
        f"{'size':>10} {'prepare s':>10} {'evaluation s':>13} {'fit s':>8} {'steps':>6} {'MB':>7}"
    )
    costs = []
    for size in curve.sizes:
        c = in_a_fork(curve, size)
        costs.append(c)
        fit = f"{c.fit:8.2f} {c.steps:6}" if c.steps else f"{'':15}"
        print(
            f"{size:10,} {c.prepare:10.3f} {c.evaluation:13.4f} {fit} {c.peak_mb:7.1f}", flush=True
        )
    slopes = [
        exponent(curve.sizes, [getattr(c, of) for c in costs])
        for of in ("prepare", "evaluation", "peak_mb")
    ]
    print(f"{'exponent':>10} {slopes[0]:10.2f} {slopes[1]:13.2f} {'':15} {slopes[2]:7.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.growth", description=__doc__)
    parser.add_argument(
        "names", nargs="*", choices=[*CURVES, "communication", []], help="all by default"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    print(
        f"{processor()}, one core, CPU seconds\nPython {platform.python_version()}, "
        f"torch {torch.__version__}, numpy {np.__version__}, scipy {scipy.__version__}, "
        f"numba {numba.__version__}"
    )
    for make in (relatives, places):
        V, y, X = make(100)
        fit_reml(V, y, X, solver="sparse")  # all is compiled, or read from where it is kept
    for name in options.names or [*CURVES, "communication"]:
        if name == "communication":
            communication()
        else:
            printed(name, CURVES[name])


if __name__ == "__main__":
    main()
