"""Whole fits beside their peers: ``python -m tests.benchmarks [name ...]``.

Each fit runs in a process of its own on one core, from the data frame to the estimates with standard
errors; seconds are those of the processor. Ours and the peers' take turns, so that a noisy machine
is noisy for both. The table is Markdown, with medians, and below it stand the peers that take less.
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import subprocess
from dataclasses import replace
from pathlib import Path

import torch

import openreml_nn
from tests.benchmarks.cases import CASES, Case
from tests.benchmarks.measure import MOST_SECONDS, Measured, available, measure, processor

#: Of the fits of one case the medians, or why there are none.
Found = dict[str, Measured | str]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], help="all by default")
    parser.add_argument("--runs", type=int, default=3, help="runs of each fit, in turn")
    options = parser.parse_args()
    print(
        f"{processor()}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"openreml_nn {openreml_nn.__version__} ({_commit()}), one core, CPU seconds, "
        f"median of {options.runs} {'run' if options.runs == 1 else 'runs'}\n"
    )
    print("| case | fit | seconds | of ours | peak MB | of it fitting | log-likelihood |")
    print("|---|---|---:|---:|---:|---:|---:|")
    found = {}
    for name in options.cases or CASES:
        found[name] = _fits(CASES[name], options.runs)
        for line in _lines(CASES[name], found[name]):
            print(line, flush=True)
    print()
    for what, of in (("fewer seconds", "seconds"), ("less memory", "peak_mb")):
        print(f"Peers with {what} than ours: {_losses(found, of) or 'none'}.")
    for note in dict.fromkeys(note for name in found for note in CASES[name].notes):
        print(note)
    nested = [found.get(f"nested-{n}", {}).get("ours") for n in (100_000, 1_000_000)]
    small, large = nested
    if isinstance(small, Measured) and isinstance(large, Measured):
        print(f"Cost exponent of nested levels: {math.log10(large.seconds / small.seconds):.2f}.")


def _commit() -> str:
    """The commit that is measured, with a + if files differ from it."""
    root = Path(__file__).parents[2]

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return (git("rev-parse", "--short", "HEAD") or "no commit") + ("+" if changed else "")


def _fits(case: Case, runs: int) -> Found:
    """Medians over the runs of each engine, in turn."""
    times: dict[str, list[Measured]] = {e: [] for e in case.engines if available(e)}
    failed: dict[str, str] = {e: "not installed" for e in case.engines if e not in times}
    for _ in range(min(runs, case.runs)):
        for engine in [engine for engine in times if engine not in failed]:
            try:
                times[engine].append(measure(case, engine))
            except (subprocess.TimeoutExpired, RuntimeError) as error:
                if engine.startswith("ours"):
                    raise
                is_late = isinstance(error, subprocess.TimeoutExpired)
                failed[engine] = f"over {MOST_SECONDS:.0f} s" if is_late else str(error)
    return {e: failed.get(e) or _median(times[e]) for e in case.engines}


def _median(runs: list[Measured]) -> Measured:
    names = ("seconds", "peak_mb", "grown_mb")
    medians = {name: statistics.median(getattr(m, name) for m in runs) for name in names}
    return replace(runs[0], **medians)


def _lines(case: Case, found: Found) -> list[str]:
    """A line of the table for each fit, the first of which says what the case is."""
    first = f"{case.name}: {case.what}"
    ours = found[case.engines[0]]
    assert isinstance(ours, Measured)
    lines = []
    for engine, m in found.items():
        if isinstance(m, str):
            cells = [engine, m, "", "", "", ""]
        else:
            cells = [
                " ".join(filter(None, [engine, m.version, "" if m.exact else "(approximate)"])),
                f"{m.seconds:.2f}",
                f"{m.seconds / ours.seconds:.1f}",
                f"{m.peak_mb:.0f}",
                f"{m.grown_mb:.0f}",
                "" if math.isnan(m.log_likelihood) else f"{m.log_likelihood:.4f}",
            ]
        lines.append(f"| {' | '.join([first, *cells])} |")
        first = ""
    return lines


def _losses(found: dict[str, Found], of: str) -> str:
    """The peers that take less than ours, with the share that they take."""
    losses = []
    for name, fits in found.items():
        ours = getattr(fits[CASES[name].engines[0]], of)
        for engine, m in fits.items():
            if isinstance(m, Measured) and not engine.startswith("ours"):
                share = getattr(m, of) / ours
                if share < 1:
                    losses.append(f"{engine} on {name} ({share:.2f} of ours)")
    return ", ".join(losses)


if __name__ == "__main__":
    main()
