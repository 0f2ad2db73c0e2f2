"""Run one fit in a process of its own and read what it cost."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.benchmarks.cases import Case

__all__ = ["Measured", "available", "measure"]

#: One core for everybody.
ONE_CORE = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

# Each reads the table from a Parquet or CSV file first: the time is from the data frame on.
OURS = """
import json, resource, sys, time
path, formula, factors = sys.argv[1], sys.argv[2], sys.argv[3].split(",")
import pandas, torch
from openreml_nn import lmm
torch.set_num_threads(1)
table = pandas.read_parquet(path)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
fixed = [f for f in factors if f in formula.split("(1")[0]]
start = time.perf_counter()
result = lmm(formula, table, categorical=fixed)
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"seconds": seconds, "log_likelihood": result.log_likelihood,
                  "peak_mb": peak / 1024, "grown_mb": (peak - before) / 1024}))
"""

MIXEDLM = """
import json, resource, sys, time
path, formula, factors = sys.argv[1], sys.argv[2], sys.argv[3].split(",")
import mixedlm, pandas
table = pandas.read_parquet(path)
for f in factors:
    table[f] = table[f].astype(str).astype("category")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
result = mixedlm.lmer(formula, table, REML=True)
value = result.logLik()
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"seconds": seconds, "log_likelihood": float(getattr(value, "value", value)),
                  "peak_mb": peak / 1024, "grown_mb": (peak - before) / 1024,
                  "version": mixedlm.__version__}))
"""

LME4 = """
a <- commandArgs(TRUE)
suppressMessages(library(lme4))
memory <- function() as.numeric(sub("\\\\D*(\\\\d+).*", "\\\\1",
                                    grep("VmHWM", readLines("/proc/self/status"), value = TRUE)))
d <- read.csv(sub("parquet$", "csv", a[1]))
for (f in strsplit(a[3], ",")[[1]]) d[[f]] <- factor(d[[f]])
before <- memory()
start <- proc.time()[["elapsed"]]
m <- lmer(as.formula(a[2]), d)
v <- vcov(m)
seconds <- proc.time()[["elapsed"]] - start
cat(sprintf('{"seconds": %.3f, "log_likelihood": %.6f, "peak_mb": %.0f, "grown_mb": %.0f, "version": "%s"}\\n',
            seconds, logLik(m), memory() / 1024, (memory() - before) / 1024, packageVersion("lme4")))
"""


@dataclass(frozen=True)
class Measured:
    """What a fit cost.

    Attributes:
        seconds: from data frame to estimates with standard errors.
        peak_mb: peak memory of the process.
        grown_mb: how much of it came after the table was read.
        log_likelihood: restricted log-likelihood.
        version: of a peer.
    """

    seconds: float
    peak_mb: float
    grown_mb: float
    log_likelihood: float
    version: str = ""


@cache
def available(engine: str) -> bool:
    """Whether a peer is installed."""
    if engine == "lme4":
        if shutil.which("Rscript") is None:
            return False
        done = subprocess.run(["Rscript", "-e", "library(lme4)"], capture_output=True)
        return done.returncode == 0
    return engine == "ours" or importlib.util.find_spec(engine) is not None


@cache
def _stored(case: Case) -> Path:
    """The case's table as a Parquet and a CSV file."""
    folder = Path(tempfile.mkdtemp(prefix="openreml_nn_"))
    table = case.table()
    table.to_parquet(folder / "table.parquet")
    if "lme4" in case.engines:
        table.to_csv(folder / "table.csv", index=False)
    return folder / "table.parquet"


def _on_one_core() -> None:
    # Not every library listens to the variables.
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def measure(case: Case, engine: str) -> Measured:
    """Fit a case once."""
    start = {
        "ours": [sys.executable, "-c", OURS],
        "mixedlm": [sys.executable, "-c", MIXEDLM],
        "lme4": ["Rscript", "-e", LME4],
    }[engine]
    done = subprocess.run(
        [*start, str(_stored(case)), case.formula, ",".join(case.factors)],
        env={**os.environ, **ONE_CORE},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        preexec_fn=_on_one_core,
    )
    if done.returncode:
        raise RuntimeError(f"{engine} on {case.name}: {done.stderr.strip()[-500:]}")
    return Measured(**json.loads(done.stdout.strip().splitlines()[-1]))
