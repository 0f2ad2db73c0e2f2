"""What processes tell each other when they share the rows of one fit, and how long that takes.

Sums by level are all that leaves a process. For a factor of q levels with k effects and r columns,
those of X and y, these are :math:`q (8 k^2 + 8 k r + 16)` bytes: its cross-products, those with
the columns, and the numbers of the two levels. Each pair of levels of two factors that meets in a row adds
:math:`8 k_1 k_2 + 16`.
"""

from __future__ import annotations

import math
import multiprocessing
import pickle
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from openreml_nn.likelihood.system.crossproducts import Statistics
from openreml_nn.terms.design import IndexedDesign

__all__ = ["Design", "communication", "gather_seconds", "ring_seconds"]

#: What is assumed of the network: bytes a second (10 Gbit/s) and seconds a message.
BANDWIDTH, LATENCY = 1.25e9, 50e-6


@dataclass(frozen=True)
class Design:
    """A model on paper: rows spread evenly and independently over the levels.

    Attributes:
        what: in words.
        levels: of each factor.
        effects: a level of each factor.
        columns: of X, and y.
    """

    what: str
    levels: tuple[int, ...]
    effects: tuple[int, ...]
    columns: int

    def bytes(self, rows: float) -> float:
        """Of the sums of so many rows."""
        total, r = 8.0 * self.columns**2, self.columns
        for i, (q, k) in enumerate(zip(self.levels, self.effects, strict=True)):
            met = _met(q, rows)
            total += met * (8 * k * k + 16) + q * 8 * k * r
            for other, m in zip(self.levels[:i], self.effects[:i], strict=True):
                total += _met(other * q, rows) * (8 * k * m + 16)
        return total


def _met(cells: int, rows: float) -> float:
    """How many of so many cells have a row, on average."""
    return cells * -math.expm1(-rows / cells)


DESIGNS = (
    Design("slopes of 1,000,000 subjects, five covariates", (1_000_000,), (2,), 7),
    Design("slopes of 10,000 users, crossed with 1,000 items", (10_000, 1_000), (2, 1), 3),
    Design("1,000,000 users, crossed with 10,000 items", (1_000_000, 10_000), (1, 1), 3),
)


def ring_seconds(size: float, processes: int) -> float:
    """An all-reduce in a ring: each process sends every byte about twice, whatever their number."""
    steps = 2 * (processes - 1)
    return steps * (size / processes / BANDWIDTH + LATENCY)


def gather_seconds(size: float, processes: int) -> float:
    """An all-gather: each process receives what all the others have."""
    return (processes - 1) * (size / BANDWIDTH + LATENCY)


# ---------------------------------------------------------------------- two processes

_ROWS, _TRIED = 200_000, Design("", (2_000, 200), (2, 1), 3)


def _sums(first: int, last: int) -> Statistics:
    generator = torch.Generator().manual_seed(0)
    codes = [torch.randint(q, (_ROWS,), generator=generator) for q in _TRIED.levels]
    x = torch.randn(_ROWS, 1, generator=generator, dtype=torch.float64)
    f = torch.cat([torch.ones_like(x), x, torch.randn(_ROWS, 1, generator=generator).double()], 1)
    rows = slice(first, last)
    values: Sequence[Any] = (f[rows, :2], None)
    designs = [
        IndexedDesign(c[rows], v, q) for c, v, q in zip(codes, values, _TRIED.levels, strict=True)
    ]
    return Statistics.of(designs, f[rows])


def _process(rank: int, meeting: str, into: Any) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    start = time.process_time()
    own = _sums(rank * _ROWS // 2, (rank + 1) * _ROWS // 2)
    summed = time.process_time() - start
    found: list[Any] = [None, None]
    start = time.process_time()
    distributed.all_gather_object(found, own)
    gathered = time.process_time() - start
    start = time.process_time()
    total = found[0] + found[1]
    joined = time.process_time() - start
    buffer = torch.zeros(int(_TRIED.bytes(_ROWS / 2)) // 8, dtype=torch.float64)
    start = time.process_time()
    distributed.all_reduce(buffer)
    reduced = time.process_time() - start
    if rank == 0:
        away = _apart(total, _sums(0, _ROWS))
        into.send((len(pickle.dumps(own)), summed, gathered, joined, reduced, away))
    distributed.barrier()
    distributed.destroy_process_group()


def _apart(one: Statistics, two: Statistics) -> float:
    """How far the cross-products of two are apart, relative to the largest."""
    pairs = [(one.products.ff, two.products.ff)]
    pairs += list(zip(one.products.zf, two.products.zf, strict=True))
    pairs += [(one.products.zz[key], two.products.zz[key]) for key in two.products.zz]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def communication() -> None:
    """Print what two processes exchanged, and what 10⁹ rows would take over many."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{Path(folder) / 'meeting'}"
        started = [context.Process(target=_process, args=(r, meeting, theirs)) for r in (0, 1)]
        for process in started:
            process.start()
        theirs.close()
        sent, summed, gathered, joined, reduced, away = ours.recv()
        for process in started:
            process.join()
    row = summed / (_ROWS / 2)
    byte = joined / (2 * sent)
    print(
        f"\ncommunication: two processes (gloo), {_ROWS:,} rows, slopes of {_TRIED.levels[0]:,} "
        f"levels crossed with {_TRIED.levels[1]:,}\n"
        f"each sent {sent / 1e6:.2f} MB (by the formula {_TRIED.bytes(_ROWS / 2) / 1e6:.2f}); "
        f"the sum is that of one process to {away:.0e}\n"
        f"CPU seconds: sums {summed:.3f} ({row * 1e9:.0f} ns a row), all-gather {gathered:.3f}, "
        f"joining {joined:.3f} ({byte * 1e9:.1f} ns a byte), all-reduce of as many bytes {reduced:.3f}\n\n"
        f"10^9 rows on paper, {BANDWIDTH / 1e9:.2f} GB/s and {LATENCY * 1e6:.0f} us a message"
    )
    print(
        f"{'processes':>10} {'sums s':>8} {'MB sent':>9} {'all-reduce s':>13} "
        f"{'all-gather s':>13} {'joining s':>10} {'GB held':>8}"
    )
    for design in DESIGNS:
        print(design.what)
        for processes in (1, 10, 100, 1_000):
            size = design.bytes(1e9 / processes)
            ring = ring_seconds(design.bytes(1e9), processes)
            print(
                f"{processes:10,} {row * 1e9 / processes:8.1f} {size / 1e6:9.1f} {ring:13.2f} "
                f"{gather_seconds(size, processes):13.2f} "
                f"{(processes - 1) * size * byte:10.1f} {processes * size / 1e9:8.1f}"
            )
