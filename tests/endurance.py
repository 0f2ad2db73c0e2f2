"""Kill runs of the program at random moments, and go on from what they left.

    python -m tests.endurance 40 0

stops 40 runs, at moments drawn with the seed 0. Half of the moments are drawn from the whole length of a run, half are just after a file has
appeared, while others are written. Every second run is killed (SIGKILL), the others are stopped
(SIGTERM). What a run leaves is whole, and what goes on from it ends as a run that nobody stopped.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import matplotlib.image
import pandas as pd
import torch
from omegaconf import OmegaConf

from openreml_nn.program.main import main
from openreml_nn.support.files import is_temporary
from tests.forked import program, started

OPTIONS = [
    "experiment=neural_longitudinal", "trainer.enable_progress_bar=false", "model.width=4",
    "trainer.max_epochs=8", "callbacks.checkpoint.every_n_epochs=1",
]  # fmt: skip
#: After these something else is being written.
MARKS = ["config.yaml", "checkpoints/last.ckpt", "trace.csv", "model.ckpt", "fixed.csv", "blup.csv",
         "summary.txt", "plots/convergence.png", "plots/shares.png"]  # fmt: skip
READ = {
    ".json": lambda path: json.loads(path.read_text()),
    ".csv": pd.read_csv,
    ".ckpt": lambda path: torch.load(path, weights_only=True),
    ".png": matplotlib.image.imread,
    ".yaml": OmegaConf.load,
}


def whole_run(folder: Path) -> tuple[dict[str, Any], float]:
    """The numbers of a run that nobody stops, in ``folder / "whole"``, and its length."""
    start = time.monotonic()
    return finished(folder, "whole"), time.monotonic() - start


def finished(folder: Path, name: str, *more: str) -> dict[str, Any]:
    """The numbers of a run that is let end: likelihood, metrics and weights."""
    done = program(*OPTIONS, f"hydra.run.dir={name}", *more, cwd=folder)
    assert done.returncode == 0, done.stderr
    run = folder / name
    assert not any(is_temporary(path) for path in run.rglob("*"))
    record = json.loads((run / "result.json").read_text())
    state = torch.load(run / "model.ckpt", weights_only=True)["state_dict"]
    return {
        "log_likelihood": record["fit"]["log_likelihood"],
        "validation": record["validation"],
        "files": {str(p.relative_to(run)) for p in run.rglob("*") if not _is_event(p)},
        "state": state,
    }


def _is_event(path: Path) -> bool:
    """Whether it is a file of TensorBoard's, which has the time in its name."""
    return path.name.startswith("events.")


def stopped_run(folder: Path, name: str, number: int, length: float, rng: random.Random) -> str:
    """Start a run, stop it at a random moment, and look at what it left; says when that was."""
    run, nowhere = folder / name, os.open(os.devnull, os.O_WRONLY)
    process = started(lambda: main([*OPTIONS, f"hydra.run.dir={name}"]), folder, [nowhere] * 2)
    mark = rng.choice([None, rng.choice(MARKS)])
    if mark is None:
        process.join(rng.uniform(0, length))
    else:
        while process.is_alive() and not (run / mark).exists():
            time.sleep(0.001)
        process.join(rng.choice([0.0, rng.uniform(0, 0.05)]))
    moment = f"{signal.Signals(number).name} " + (f"after {mark}" if mark else "at a random moment")
    if process.is_alive():
        os.kill(process.pid or 0, number)
    process.join()
    os.close(nowhere)
    expected = {signal.SIGKILL: -9, signal.SIGTERM: 143}[signal.Signals(number)]
    # A signal before the program has begun, or when all is done, is the interpreter's.
    assert process.exitcode in (0, expected, -number), (moment, process.exitcode)
    check_whole(run, moment, number == signal.SIGKILL)
    return moment


def check_whole(run: Path, moment: str, may_have_temporaries: bool) -> None:
    """Each file reads, and a result is not alone."""
    for path in run.rglob("*"):
        if is_temporary(path):
            assert may_have_temporaries, (moment, path)
        elif path.suffix in READ:
            try:
                READ[path.suffix](path)
            except Exception as error:
                raise AssertionError(f"{moment}: {path.name} is not whole: {error}") from error
    if (run / "result.json").exists():
        missing = [name for name in MARKS if not (run / name).exists()]
        assert not missing, (moment, missing)


def resumed_run(folder: Path, name: str) -> dict[str, Any]:
    """The numbers of a run that goes on, in the same folder, from what a stopped one left."""
    kept = folder / name / "checkpoints" / "last.ckpt"
    return finished(
        folder, name, *([f"resume={name}/checkpoints/last.ckpt"] if kept.exists() else [])
    )


def check_same(found: dict[str, Any], whole: dict[str, Any], moment: str) -> None:
    """Two runs have ended at the same place."""
    assert found["files"] == whole["files"], (moment, found["files"] ^ whole["files"])
    numbers = [
        {"log_likelihood": run["log_likelihood"], **run["validation"]} for run in (found, whole)
    ]
    for key, value in numbers[1].items():
        assert abs(numbers[0][key] - value) <= 1e-6 * abs(value), (moment, key, numbers)
    torch.testing.assert_close(found["state"], whole["state"], rtol=1e-5, atol=1e-6)


def endure(folder: Path, count: int, seed: int = 0) -> list[str]:
    """Stop and resume as many runs; returns the moments."""
    whole, length = whole_run(folder)
    rng, moments = random.Random(seed), []
    for i in range(count):
        number = (signal.SIGKILL, signal.SIGTERM)[i % 2]
        moments.append(stopped_run(folder, str(i), number, length, rng))
        check_same(resumed_run(folder, str(i)), whole, moments[-1])
        print(f"{i + 1} of {count}: {moments[-1]}: whole, and resumed to the same end", flush=True)
    return moments


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        endure(Path(place), *(map(int, sys.argv[1:3]) if len(sys.argv) > 1 else [40]))
