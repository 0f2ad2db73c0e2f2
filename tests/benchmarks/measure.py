"""Run one fit in a process of its own and read what it cost."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pandas as pd

from tests.benchmarks.cases import Case
from tests.benchmarks.engines import SCRIPTS

__all__ = ["MOST_SECONDS", "Measured", "available", "measure", "processor"]

#: One core for everybody.
ONE_CORE = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


#: A peer that takes longer is not waited for.
MOST_SECONDS = 240.0


@dataclass(frozen=True)
class Measured:
    """What a fit cost.

    Attributes:
        seconds: of the CPU, from data frame to estimates with standard errors.
        peak_mb: peak memory of the process.
        grown_mb: how much of it came after the table was read.
        log_likelihood: restricted log-likelihood.
        version: of a peer.
        exact: whether the log-likelihood is exact.
    """

    seconds: float
    peak_mb: float
    grown_mb: float
    log_likelihood: float
    version: str = ""
    exact: bool = True


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


@cache
def available(engine: str) -> bool:
    """Whether a peer is installed."""
    if engine.startswith("lme4"):
        if shutil.which("Rscript") is None:
            return False
        done = subprocess.run(["Rscript", "-e", "library(lme4)"], capture_output=True)
        return done.returncode == 0
    name = engine.split(",")[0]
    return name == "ours" or importlib.util.find_spec(name) is not None


@cache
def _stored(case: Case) -> Path:
    """The case's table as a Parquet file, and as CSV for R."""
    folder = Path(tempfile.mkdtemp(prefix="openreml_nn_"))
    path = folder / "table.parquet"
    case.write(path)
    if any(engine.startswith("lme4") for engine in case.engines):
        pd.read_parquet(path).to_csv(folder / "table.csv", index=False)
    return path


def _on_one_core() -> None:
    # Not every library listens to the variables.
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def measure(case: Case, engine: str) -> Measured:
    """Fit a case once."""
    interpreter = ["Rscript", "-e"] if engine.startswith("lme4") else [sys.executable, "-c"]
    start = [*interpreter, SCRIPTS[engine]]
    done = subprocess.run(
        [*start, str(_stored(case)), case.formula, ",".join(case.factors)],
        env={**os.environ, **ONE_CORE},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        preexec_fn=_on_one_core,
        timeout=MOST_SECONDS,
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise RuntimeError(reason[:70])
    return Measured(**json.loads(done.stdout.strip().splitlines()[-1]))
