"""The covariance algebra beside torch_openreml and plain autograd: ``python -m tests.benchmarks.algebra``.

torch_openreml imports on Python 3.12 and later; where it cannot be had the
table says so.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from openreml_nn import covariance as ours

N, Q = 2000, 100


def _peer() -> Any:
    """torch_openreml's covariance module, or None."""
    if importlib.util.find_spec("torch_openreml") is None:
        return None
    try:
        from torch_openreml import covariance
    except ImportError:
        return None
    return covariance


# ---------------------------------------------------------------------- a one-hot design


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


class _Peak:
    """Largest resident memory within the block, above that at its start."""

    def __enter__(self) -> _Peak:
        gc.collect()
        self.start = self.most = _resident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.0005):
            self.most = max(self.most, _resident())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.bytes = max(self.most, _resident()) - self.start


def propagation(engine: str) -> None:
    """Forward and backward of Z G Z' with a one-hot Z, in this process; prints what it cost."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    labels = [str(i % Q) for i in range(N)]
    module = _peer() if engine == "torch_openreml" else ours
    g = module.DiagonalMatrix(Q)
    if engine == "plain autograd":
        V: Any = ours.CovariancePropagation(z=ours.DummyMatrix(labels)(), g=g.double())
        V.grad_mode = "auto"
    else:
        V = module.CovariancePropagation(z=module.DummyMatrix(labels), g=g)
    theta = torch.zeros(Q, requires_grad=engine != "torch_openreml")
    weight = torch.randn(N, N)
    if engine != "torch_openreml":
        _backward(V, theta, weight)  # warm up
    with _Peak() as peak:
        start = time.perf_counter()
        made = V(theta)
        forward = time.perf_counter() - start
        start = time.perf_counter()
        if engine == "torch_openreml":
            jacobian, _ = V.grad(theta)
            gradient = torch.tensordot(jacobian, weight, 2)
        else:
            (gradient,) = torch.autograd.grad(made, theta, weight)
        backward = time.perf_counter() - start
    print(forward, backward, peak.bytes / (8 * N * N), float(gradient.sum()))


def _backward(V: Any, theta: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(V(theta), theta, weight)[0]


def _propagation_table(runs: int, peer: Any) -> Table:
    engines = ["ours", "plain autograd", *(["torch_openreml"] if peer else [])]
    found: dict[str, list[list[float]]] = {engine: [] for engine in engines}
    for _ in range(runs):
        for engine in engines:
            done = subprocess.run(
                [sys.executable, "-m", "tests.benchmarks.algebra", "--engine", engine],
                capture_output=True,
                text=True,
                check=True,
            )
            found[engine].append([float(x) for x in done.stdout.split()])
    table = Table(
        title=f"CovariancePropagation, one-hot Z ({N}, {Q}), DiagonalMatrix, float64, one core",
        title_justify="left",
    )
    for column in ("", "forward s", "backward s", "of ours", "peak / n x n"):
        table.add_column(column, justify="right" if column else "left")
    middle = {e: [statistics.median(x) for x in zip(*rows)] for e, rows in found.items()}
    for engine, (forward, backward, peak, _) in middle.items():
        ratio = backward / middle["ours"][1]
        table.add_row(engine, f"{forward:.4f}", f"{backward:.5f}", f"{ratio:,.0f}", f"{peak:.1f}")
    if peer is None:
        table.add_row("torch_openreml", "not to be had on this Python", "", "", "")
    return table


# ---------------------------------------------------------------------- every class of the peer

SIZE = 60
CLASSES: dict[str, Callable[[Any], Any]] = {
    "IdentityMatrix": lambda m: m.IdentityMatrix(SIZE),
    "ScalarMatrix": lambda m: m.ScalarMatrix(SIZE),
    "DiagonalMatrix": lambda m: m.DiagonalMatrix(SIZE),
    "EqualEntryMatrix": lambda m: m.EqualEntryMatrix(SIZE),
    "EquicorrelationMatrix": lambda m: m.EquicorrelationMatrix(SIZE),
    "CompoundSymmetricMatrix": lambda m: m.CompoundSymmetricMatrix(SIZE),
    "AR1Matrix": lambda m: m.AR1Matrix(SIZE),
    "UnconstrainedMatrix": lambda m: m.UnconstrainedMatrix(SIZE),
    "LowerTriangularMatrix": lambda m: m.LowerTriangularMatrix(SIZE, SIZE),
    "Sum": lambda m: m.Sum(m.DiagonalMatrix(SIZE), m.ScalarMatrix(SIZE)),
    "BlockDiagonal": lambda m: m.BlockDiagonal(m.DiagonalMatrix(SIZE), m.AR1Matrix(SIZE)),
    "KroneckerProduct": lambda m: m.KroneckerProduct(m.AR1Matrix(8), m.DiagonalMatrix(8)),
    "HadamardProduct": lambda m: m.HadamardProduct(
        m.DiagonalMatrix(SIZE), m.CompoundSymmetricMatrix(SIZE)
    ),
    "Product": lambda m: m.Product(m.DiagonalMatrix(SIZE), m.AR1Matrix(SIZE)),
    "Transpose": lambda m: m.Transpose(m.LowerTriangularMatrix(SIZE, SIZE)),
    "Gram": lambda m: m.Gram(m.LowerTriangularMatrix(SIZE, SIZE)),
    "Inverse": lambda m: m.Inverse(m.DiagonalMatrix(SIZE)),
    "Augment": lambda m: m.Augment(m.DiagonalMatrix(SIZE), m.AR1Matrix(SIZE)),
    "Stack": lambda m: m.Stack(m.DiagonalMatrix(SIZE), m.AR1Matrix(SIZE)),
}


def _time(function: Callable[[], Any], least: float = 0.02) -> float:
    """Seconds a call, the fastest of a few batches of calls."""
    function()
    count, best = 1, float("inf")
    for _ in range(6):
        start = time.perf_counter()
        for _ in range(count):
            function()
        spent = time.perf_counter() - start
        best = min(best, spent / count)
        if spent < least:
            count = max(count + 1, int(count * least / max(spent, 1e-9)))
    return best


def _ratios(mine: Any, other: Any) -> list[float]:
    """How many times as long the peer's matrix takes: value, Jacobian, gradient of a scalar."""
    count = mine.num_free_params
    # A new point for every call: neither shall answer from a cache.
    points = iter(torch.rand(count) for _ in range(10**9))
    weight = torch.randn(mine.shape)
    pairs: list[tuple[Callable[[], Any], Callable[[], Any]]] = [
        (lambda: mine(next(points)), lambda: other(next(points)))
    ]
    if count:
        pairs += [
            (lambda: mine.grad(next(points)), lambda: other.grad(next(points))),
            (
                lambda: mine.manual_vjp(weight, next(points)),
                lambda: torch.tensordot(other.grad(next(points))[0], weight, 2),
            ),
        ]
    with torch.no_grad():
        return [_time(theirs) / _time(our) for our, theirs in pairs]


def _classes_table(peer: Any) -> Table:
    table = Table(
        title=f"Every class of torch_openreml at size {SIZE}: how many times as long it takes",
        title_justify="left",
    )
    for column in ("", "value", "Jacobian", "gradient of a scalar"):
        table.add_column(column, justify="right" if column else "left")
    for name, make in CLASSES.items():
        table.add_row(name, *(f"{ratio:.1f}" for ratio in _ratios(make(ours), make(peer))))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.algebra")
    parser.add_argument("--engine", help="run one engine in this process and print its figures")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    if options.engine:
        propagation(options.engine)
        return
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    peer = _peer()
    console = Console(width=100)
    console.print(_propagation_table(options.runs, peer))
    if peer is not None:
        console.print(_classes_table(peer))


if __name__ == "__main__":
    main()
