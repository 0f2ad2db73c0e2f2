"""Simulated data sets of `tests/estimation/test_simulated.py`, and lme4's log-likelihoods of them.

`python -m tests.reference.simulate` fits them all with Rscript and lme4 and
writes `simulated.json`: for each setting 40 restricted log-likelihoods, the best that its
optimizers find (each stops short of the boundary now and then).
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

SETS = 40
RATIOS = (0.0, 0.01, 0.1, 1.0, 100.0)
SETTINGS = {f"intercept {ratio}": (ratio, False) for ratio in RATIOS} | {
    f"slope {ratio}": (ratio, True) for ratio in RATIOS
}
FORMULAS = {False: "y ~ x + (1 | g)", True: "y ~ x + (x | g)"}


def simulate(ratio: float, slopes: bool, seed: int) -> pd.DataFrame:
    """200 rows of 20 groups; the variance of the random effects is ``ratio`` that of the residual."""
    rng = np.random.default_rng([seed, int(slopes), round(1000 * ratio)])
    g = rng.integers(0, 20, 200)
    x = rng.uniform(-1, 1, 200)
    b = np.sqrt(ratio) * rng.standard_normal((20, 2))
    b[:, 1] = 0.3 * b[:, 0] + 0.8 * b[:, 1]
    y = 1 + 0.5 * x + b[g, 0] + slopes * b[g, 1] * x + rng.standard_normal(200)
    return pd.DataFrame({"y": y, "x": x, "g": g})


SCRIPT = """
suppressMessages(library(lme4))
control <- function(optimizer, ...) lmerControl(
  optimizer = optimizer, calc.derivs = FALSE, check.conv.singular = "ignore", optCtrl = list(...))
controls <- list(control("nloptwrap", xtol_abs = 1e-12, ftol_abs = 1e-13, maxeval = 1e5),
                 control("bobyqa", rhoend = 1e-10, maxfun = 1e5),
                 control("Nelder_Mead", XtolRel = 1e-12, FtolAbs = 1e-13, maxfun = 1e5))
d <- read.csv("%s")
for (s in split(d, d$set)) {
  best <- max(sapply(controls, function(control) logLik(lmer(%s, s, control = control))))
  cat(sprintf("%%.12g\\n", best))
}
"""


def main() -> None:
    found = {}
    for name, (ratio, slopes) in SETTINGS.items():
        with tempfile.TemporaryDirectory() as folder:
            sets = [simulate(ratio, slopes, i).assign(set=i) for i in range(SETS)]
            path = Path(folder) / "sets.csv"
            pd.concat(sets).to_csv(path, index=False, float_format="%.17g")
            script = SCRIPT % (path, FORMULAS[slopes])
            done = subprocess.run(
                ["Rscript", "-e", script], check=True, capture_output=True, text=True
            )
        found[name] = [float(line) for line in done.stdout.split()]
        assert len(found[name]) == SETS
    Path(__file__).with_name("simulated.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
