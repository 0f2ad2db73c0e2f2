"""Whole fits beside their peers: ``python -m tests.benchmarks [name ...]``.

Each fit runs in a process of its own on one core, from reading the table to
the estimates with standard errors. Ours and the peers' take turns, so that a
noisy machine is noisy for both; the table shows medians and their ratio.
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import subprocess
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from tests.benchmarks.cases import CASES, Case
from tests.benchmarks.measure import MOST_SECONDS, Measured, available, measure


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], help="all by default")
    parser.add_argument("--runs", type=int, default=3, help="runs of each fit, in turn")
    options = parser.parse_args()
    console = Console(width=110)
    console.print(
        f"{_processor()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, one core each, median of {options.runs} runs"
    )
    for name in options.cases or CASES:
        console.print(_table(CASES[name], options.runs))
    if not options.cases or {"nested-100000", "nested-1000000"} <= set(options.cases):
        nested = [measure(CASES[f"nested-{n}"], "ours").seconds for n in (100_000, 1_000_000)]
        console.print(f"cost exponent of nested levels: {math.log10(nested[1] / nested[0]):.2f}")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def _table(case: Case, runs: int) -> Table:
    engines = [engine for engine in case.engines if available(engine)]
    found: dict[str, list[Measured]] = {engine: [] for engine in engines}
    failed: dict[str, str] = {}
    for _ in range(min(runs, case.runs)):
        for engine in [engine for engine in engines if engine not in failed]:
            try:
                found[engine].append(measure(case, engine))
            except subprocess.TimeoutExpired:
                if engine.startswith("ours"):
                    raise
                failed[engine] = f"over {MOST_SECONDS:.0f} s"
            except RuntimeError as error:
                if engine.startswith("ours"):
                    raise
                failed[engine] = str(error)
    table = Table(title=f"{case.name}: {case.what}", title_justify="left")
    for column in ("", "seconds", "of ours", "peak MB", "of it fitting", "log-likelihood"):
        table.add_column(column, justify="right" if column else "left")
    ours = statistics.median(m.seconds for m in found[engines[0]])
    for engine, measured in found.items():
        if engine in failed:
            table.add_row(engine, failed[engine], "", "", "", "")
            continue
        version = f" {measured[0].version}" if measured[0].version else ""
        seconds = statistics.median(m.seconds for m in measured)
        memory = statistics.median(m.peak_mb for m in measured)
        table.add_row(
            engine + version,
            f"{seconds:.2f}",
            f"{seconds / ours:.1f}",
            f"{memory:.0f}",
            f"{statistics.median(m.grown_mb for m in measured):.0f}",
            f"{measured[0].log_likelihood:.4f}",
        )
    for engine in case.engines:
        if engine not in engines:
            table.add_row(engine, "not installed", "", "", "", "")
    return table


if __name__ == "__main__":
    main()
