"""Known kernels: ``python -m tests.benchmarks.kernels [n ...]``, on one core, 2,000 rows by default.

One kernel is compared with a single eigendecomposition of it, and an
iteration with two kernels with a Cholesky factor and an inverse.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from openreml_nn import Result, fit_reml
from openreml_nn.covariance import KnownMatrix, ScalarMatrix, Sum


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _kernel(n: int, seed: int) -> Tensor:
    """A relationship matrix of n individuals by n + 50 markers."""
    markers = torch.randn(n, n + 50, generator=torch.Generator().manual_seed(seed))
    return markers @ markers.mT / (n + 50)


def _fit(kernels: list[Tensor]) -> tuple[float, Result]:
    n = len(kernels[0])
    generator = torch.Generator().manual_seed(9)
    y = torch.randn(n, generator=generator)
    for kernel in kernels:
        y = y + torch.linalg.cholesky(kernel) @ torch.randn(n, generator=generator)
    parts = {f"kernel_{i}": KnownMatrix(kernel) for i, kernel in enumerate(kernels)}
    V = Sum({**parts, "residual": ScalarMatrix(n)}).double()
    start = time.perf_counter()
    result = fit_reml(V, y, torch.ones(n, 1))
    return time.perf_counter() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.kernels")
    parser.add_argument("sizes", nargs="*", type=int, default=[2000])
    sizes = parser.parse_args().sizes
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    table = Table(title="Known kernels, float64, one core", title_justify="left")
    for column in ("", "seconds", "yardstick", "seconds of it", "ratio"):
        table.add_column(column, justify="left" if column in ("", "yardstick") else "right")
    for n in sizes:
        one, two = _kernel(n, 1), _kernel(n, 2)
        seconds, _ = _fit([one])
        yardstick = _seconds(lambda one=one: torch.linalg.eigh(one))
        row = (f"one kernel, n = {n:,}: fit", seconds, "eigendecomposition", yardstick)
        table.add_row(row[0], f"{row[1]:.2f}", row[2], f"{row[3]:.2f}", f"{row[1] / row[3]:.2f}")
        seconds, result = _fit([one, two])
        each = seconds / result.iterations
        factor = torch.linalg.cholesky(one)
        yardstick = _seconds(lambda one=one: torch.linalg.cholesky(one))
        yardstick += _seconds(lambda factor=factor: torch.cholesky_inverse(factor))
        row = (f"two kernels, n = {n:,}: iteration", each, "Cholesky and inverse", yardstick)
        table.add_row(row[0], f"{row[1]:.2f}", row[2], f"{row[3]:.2f}", f"{row[1] / row[3]:.2f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
