"""The CPU beside a CUDA device: ``python -m tests.benchmarks.devices [case ...]``.

Each computation runs on the CPU with all its threads and then on the device, in float64 and in float32, in
this process; seconds are those of the clock, the device's work included, the median of some calls after a
first one, in which kernels are loaded. Data are where the computation is, but for the epoch, of which batches come from the
memory of the CPU as a DataLoader has them. Without a CUDA device the command says so.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from lightning import Trainer
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from openreml_nn import MixedModel, RandomEffect, REMLLoss, fit_reml
from openreml_nn.covariance import (
    CovariancePropagation,
    DummyMatrix,
    GaussianMatrix,
    IdentityMatrix,
    KnownMatrix,
    KroneckerProduct,
    Matrix,
    ScalarMatrix,
    Sum,
    UnstructuredMatrix,
)
from openreml_nn.families import Binomial
from openreml_nn.lightning import MixedModule
from openreml_nn.likelihood import LaplaceLoss
from tests.benchmarks.measure import processor
from tests.benchmarks.training import Rows

#: What one computation is, given a device and a dtype: something to call again and again.
Make = Callable[[str, torch.dtype], Callable[[], object]]
ROWS, LEVELS, ITEMS = 1_000_000, 100_000, 10_000


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _codes(levels: int, seed: int) -> Tensor:
    return torch.randint(0, levels, (ROWS,), generator=torch.Generator().manual_seed(seed))


def _step(loss: nn.Module, *data: Tensor) -> None:
    """The loss and its gradient at parameters that have moved since the last call."""
    loss.zero_grad()
    with torch.no_grad():
        for p in loss.parameters():
            p.add_(0.01)
    loss(*data).backward()


def _losses(V: Matrix, y: Tensor, X: Tensor, solver: str) -> Make:
    """A restricted likelihood with its gradient."""

    def make(device: str, dtype: torch.dtype) -> Callable[[], object]:
        loss = REMLLoss(V.to(device, dtype), solver=solver)
        data = y.to(device, dtype), X.to(device, dtype)

        return lambda: _step(loss, *data)

    return make


def dense(n: int) -> Make:
    kernels = {}
    for i in range(2):
        markers = _normal(n, 1000, seed=i)
        kernels[f"kernel_{i}"] = KnownMatrix(markers @ markers.mT / 1000)
    V = Sum({**kernels, "residual": ScalarMatrix(n)})
    return _losses(V, _normal(n, seed=8), torch.ones(n, 1), "dense")


def places(n: int) -> Make:
    at = _normal(n, 2, seed=3)
    V = Sum(
        field=GaussianMatrix(torch.cdist(at, at, compute_mode="donot_use_mm_for_euclid_dist") / 3),
        nugget=ScalarMatrix(n),
    )
    return _losses(V, _normal(n, seed=8), torch.ones(n, 1), "dense")


def _grouped() -> tuple[Matrix, Tensor, Tensor]:
    x, g = _normal(ROWS, seed=1), _codes(LEVELS, 2)
    X = torch.stack([torch.ones(ROWS), x], 1)
    V = Sum(
        g=CovariancePropagation(
            z=DummyMatrix.from_codes(g, LEVELS, X),
            g=KroneckerProduct(IdentityMatrix(LEVELS), UnstructuredMatrix(2)),
        ),
        residual=ScalarMatrix(ROWS),
    )
    y = 1 + x + _normal(LEVELS, seed=4)[g] + _normal(LEVELS, seed=5)[g] * x + _normal(ROWS, seed=6)
    return V, y, X


def fit(device: str, dtype: torch.dtype) -> Callable[[], object]:
    V, y, X = _grouped()
    V, y, X = V.to(device, dtype), y.to(device, dtype), X.to(device, dtype)
    return lambda: fit_reml(V, y, X)


def binary(device: str, dtype: torch.dtype) -> Callable[[], object]:
    g, eta = _codes(LEVELS, 2), _normal(ROWS, seed=1)
    V = CovariancePropagation(z=DummyMatrix.from_codes(g, LEVELS), g=ScalarMatrix(LEVELS))
    y = (eta + _normal(LEVELS, seed=4)[g] > _normal(ROWS, seed=6)).to(device, dtype)
    loss, eta = LaplaceLoss(V, Binomial()).to(device, dtype), eta.to(device, dtype)
    return lambda: _step(loss, y, eta)


def crossed(device: str, dtype: torch.dtype) -> Callable[[], object]:
    user, item = _codes(LEVELS, 2), _codes(ITEMS, 3)
    V = Sum(
        user=CovariancePropagation(z=DummyMatrix.from_codes(user, LEVELS), g=ScalarMatrix(LEVELS)),
        item=CovariancePropagation(z=DummyMatrix.from_codes(item, ITEMS), g=ScalarMatrix(ITEMS)),
        residual=ScalarMatrix(ROWS),
    )
    y = _normal(LEVELS, seed=4)[user] + _normal(ITEMS, seed=5)[item] + _normal(ROWS, seed=6)
    return _losses(V, y, torch.ones(ROWS, 1), "krylov")(device, dtype)


def epoch(width: int) -> Make:
    def make(device: str, dtype: torch.dtype) -> Callable[[], object]:
        x, g = _normal(ROWS, 10, seed=1), _codes(LEVELS, 2)
        y = x[:, 0] + _normal(LEVELS, seed=4)[g] + _normal(ROWS, seed=6)
        rows = Rows({"x": x.to(dtype), "y": y.to(dtype), "groups": {"g": g}})
        layers = [nn.Linear(10, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
        mean = nn.Sequential(*layers, nn.Linear(width, 1)).to(dtype)
        module = MixedModule(MixedModel(mean, {"g": RandomEffect(LEVELS)}))
        batches = BatchSampler(RandomSampler(range(ROWS)), 10_000, False)
        loader = DataLoader(rows, sampler=batches, batch_size=None)

        def step() -> None:
            trainer = Trainer(
                accelerator="gpu" if device == "cuda" else "cpu",
                devices=1,
                max_epochs=1,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            trainer.fit(module, loader)

        return step

    return make


#: What is computed, by name: in words, and how to make it.
CASES: dict[str, tuple[str, Callable[[], Make]]] = {
    "dense-2000": ("likelihood and gradient, dense, n = 2,000", lambda: dense(2000)),
    "dense-5000": ("likelihood and gradient, dense, n = 5,000", lambda: dense(5000)),
    "dense-10000": ("likelihood and gradient, dense, n = 10,000", lambda: dense(10_000)),
    "places-5000": ("likelihood and gradient, Gaussian kernel of 5,000 places", lambda: places(5000)),
    "fit": ("fit, slopes of 100,000 levels, 1,000,000 rows (blocked)", lambda: fit),
    "binary": ("Laplace and gradient, 100,000 levels, 1,000,000 rows", lambda: binary),
    "crossed": ("likelihood and gradient, 100,000 x 10,000 levels, 1,000,000 rows (krylov)", lambda: crossed),
    "epoch-64": ("epoch of 1,000,000 rows, a network of 64 units a layer", lambda: epoch(64)),
    "epoch-512": ("epoch of 1,000,000 rows, a network of 512 units a layer", lambda: epoch(512)),
}  # fmt: skip


def _seconds(step: Callable[[], object], device: str, most: float = 3.0) -> float:
    """The median of seven calls after a first, or of fewer if they take so many seconds."""
    found: list[float] = []
    while len(found) < 2 or (len(found) < 8 and sum(found) < most):
        start = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return statistics.median(found[1:])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.devices")
    parser.add_argument("cases", nargs="*", choices=[[], *CASES], default=[], metavar="case")
    chosen = parser.parse_args().cases or list(CASES)
    if not torch.cuda.is_available():
        print("This torch sees no CUDA device: there is nothing to compare the CPU with.")
        return
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    threads, card = torch.get_num_threads(), torch.cuda.get_device_name()
    print(f"{processor()}, {threads} threads, beside {card}, torch {torch.__version__}, seconds\n")
    print("| computation | dtype | CPU | GPU | CPU / GPU |\n|---|---|---:|---:|---:|")
    for name in chosen:
        words, make = CASES[name]
        for dtype in (torch.float64, torch.float32):
            torch.set_default_dtype(dtype)
            given, times = make(), []
            for device in ("cpu", "cuda"):
                try:
                    times.append(_seconds(given(device, dtype), device))
                except ArithmeticError as error:  # what this precision cannot do
                    print(f"{name} {dtype} {device}: {error}")
                    times.append(float("nan"))
            cpu, gpu = times
            print(
                f"| {words} | {str(dtype)[6:]} | {cpu:.3f} | {gpu:.3f} | {cpu / gpu:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
