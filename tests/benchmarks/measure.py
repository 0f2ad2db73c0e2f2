"""Run one fit in a process of its own and read what it cost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.benchmarks.cases import Case

__all__ = ["Measured", "available", "measure"]

#: One core for everybody.
ONE_CORE = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

OURS = """
import json, resource, sys, time
path, formula, factors = sys.argv[1], sys.argv[2], sys.argv[3].split(",")
import torch
from openreml_nn import lmm
from openreml_nn.data import read_table
torch.set_num_threads(1)
table = read_table(path)
fixed = [f for f in factors if f in formula.split("(1")[0]]
start = time.perf_counter()
result = lmm(formula, table, categorical=fixed)
print(json.dumps({"seconds": time.perf_counter() - start,
                  "log_likelihood": result.log_likelihood,
                  "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
"""

LME4 = """
a <- commandArgs(TRUE)
suppressMessages(library(lme4))
d <- read.csv(a[1])
for (f in strsplit(a[3], ",")[[1]]) d[[f]] <- factor(d[[f]])
start <- proc.time()[["elapsed"]]
m <- lmer(as.formula(a[2]), d)
v <- vcov(m)
seconds <- proc.time()[["elapsed"]] - start
peak <- as.numeric(sub("\\\\D*(\\\\d+).*", "\\\\1", grep("VmHWM", readLines("/proc/self/status"), value = TRUE)))
cat(sprintf('{"seconds": %.3f, "log_likelihood": %.6f, "peak_mb": %.0f, "version": "%s"}\\n',
            seconds, logLik(m), peak / 1024, packageVersion("lme4")))
"""


@dataclass(frozen=True)
class Measured:
    """Seconds from data frame to estimates, peak memory of the process, log-likelihood, and the
    version of a peer."""

    seconds: float
    peak_mb: float
    log_likelihood: float
    version: str = ""


@cache
def available(engine: str) -> bool:
    """Whether a peer is installed."""
    if engine == "ours":
        return True
    if shutil.which("Rscript") is None:
        return False
    return (
        subprocess.run(["Rscript", "-e", f"library({engine})"], capture_output=True).returncode == 0
    )


def measure(case: Case, engine: str) -> Measured:
    """Fit a case once."""
    start = [sys.executable, "-c", OURS] if engine == "ours" else ["Rscript", "-e", LME4]
    done = subprocess.run(
        [*start, str(case.table), case.formula, ",".join(case.factors)],
        env={**os.environ, **ONE_CORE},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{engine} on {case.name}: {done.stderr.strip()[-500:]}")
    return Measured(**json.loads(done.stdout.strip().splitlines()[-1]))
