"""Plant each fault in a copy of the tree and run the tests that should notice.

python -m tests.faults                  all of them, exit status 1 if one survives
python -m tests.faults --only weights   those with a word in their name or file
python -m tests.faults --jobs 4
python -m tests.faults --list           run no test, but say which texts have moved
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

from tests.faults.every import FAULTS, outdated
from tests.faults.fault import ROOT, Fault

#: What a run of the tests needs of the tree.
COPIED = ("openreml_nn", "tests", "configs", "docs", "examples", "README.md", "pyproject.toml")
#: What most tests import: once here, in place of once for each fault.
SHARED = [
    "torch",
    "pandas",
    "scipy.stats",
    "hydra",
    "hypothesis",
    "lightning",
    "matplotlib",
    "pytest",
]
MOST_SECONDS = 300
#: Of pytest; and of tests that take longer than that, which tells nothing.
PASSED, FAILED, LATE = 0, 1, 124
WORDS = {PASSED: "SURVIVED", FAILED: "noticed", LATE: "TOO LATE"}


class Outcome(NamedTuple):
    """Status of pytest, the end of its output, and seconds."""

    status: int
    output: str
    seconds: float


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--only", default="", help="a word of the names or files")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--list", action="store_true", help="run no tests")
    options = parser.parse_args(arguments)
    chosen = [f for f in FAULTS if options.only in f.name or options.only in f.file]
    if not chosen:
        print(f"no fault has {options.only!r} in its name or file", file=sys.stderr)
        return 2
    if moved := outdated(chosen):
        print("\n".join(moved), file=sys.stderr)
        return 2
    if options.list:
        print("\n".join(f"{fault.file}: {fault.name}" for fault in chosen))
        return 0
    for name in SHARED:
        importlib.import_module(name)
    # A test that fails anyway notices nothing.
    clean = [fault._replace(new=fault.old) for fault in {f.tests: f for f in chosen}.values()]
    for fault, found in outcomes(clean, options.jobs):
        if found.status != PASSED:
            print(f"without a fault, {fault.tests} ends with {found.status}\n{found.output}")
            return 2
    print(f"{len(clean)} selections of tests pass without a fault", flush=True)
    survivors = 0
    for fault, found in outcomes(chosen, options.jobs):
        word = WORDS.get(found.status, f"STATUS {found.status}")
        print(f"{word:<10}{found.seconds:4.0f} s  {fault.file}: {fault.name}", flush=True)
        if found.status != FAILED:
            survivors += 1
            print("" if found.status == PASSED else found.output, end="")
    print(f"{len(chosen) - survivors} of {len(chosen)} noticed")
    return int(survivors > 0)


def outcomes(faults: Sequence[Fault], jobs: int) -> Iterator[tuple[Fault, Outcome]]:
    """What the tests say of each fault, as they end, ``jobs`` at a time."""
    # Forked, so that what is imported here need not be again.
    context = multiprocessing.get_context("fork")
    waiting = list(reversed(faults))
    running: list[tuple[Fault, Path, BaseProcess, float]] = []
    while waiting or running:
        while waiting and len(running) < jobs:
            fault = waiting.pop()
            folder = Path(tempfile.mkdtemp(prefix="fault_"))
            process = context.Process(target=_test, args=(fault, folder))
            process.start()
            running.append((fault, folder, process, time.perf_counter()))
        for entry in list(running):
            fault, folder, process, start = entry
            process.join(0.1)
            seconds = time.perf_counter() - start
            late = process.is_alive() and seconds > MOST_SECONDS
            if late and process.pid is not None:
                os.killpg(process.pid, signal.SIGKILL)
                process.join()
            if process.is_alive():
                continue
            output = (folder / "output").read_text(encoding="utf-8", errors="replace")
            status = LATE if late else int(process.exitcode or 0)
            shutil.rmtree(folder, ignore_errors=True)
            running.remove(entry)
            yield fault, Outcome(status, "\n".join(output.splitlines()[-15:]) + "\n", seconds)


def _test(fault: Fault, folder: Path) -> None:
    """Run pytest in a copy of the tree with the fault; exits with its status."""
    import pytest

    os.setsid()
    output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(output, stream)
    ignored = shutil.ignore_patterns("__pycache__", "_build")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, folder / name)
    (folder / fault.file).write_text(fault.planted(folder), encoding="utf-8")
    os.chdir(folder)
    os.environ["PYTHONPATH"] = str(folder)
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(folder))
    for name in [n for n in sys.modules if n.split(".")[0] in ("tests", "openreml_nn")]:
        del sys.modules[name]
    sys.exit(pytest.main(["-q", "-x", "--tb=short", *shlex.split(fault.tests)]))


if __name__ == "__main__":
    sys.exit(main())
