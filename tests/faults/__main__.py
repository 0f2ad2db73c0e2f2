"""Plant each fault in a copy of the tree and run the tests that should notice.

python -m tests.faults                  all of them, exit status 1 if one survives
python -m tests.faults --only weights   those with a word in their name
python -m tests.faults --jobs 4
python -m tests.faults --list           names, and which texts have moved
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.faults.every import FAULTS
from tests.faults.fault import ROOT, Fault

#: What a run of the tests needs of the tree.
COPIED = ("openreml_nn", "tests", "configs", "docs", "examples", "README.md", "pyproject.toml")
#: A fault that makes the tests run on for ever is noticed, too.
MOST_SECONDS = 600
PASSED, FAILED = 0, 1


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--only", default="", help="a word of the names")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--list", action="store_true", help="run no tests")
    options = parser.parse_args(arguments)
    chosen = [fault for fault in FAULTS if options.only in fault.name]
    if not chosen:
        print(f"no fault has {options.only!r} in its name", file=sys.stderr)
        return 2
    if moved := outdated(chosen):
        print("\n".join(moved), file=sys.stderr)
        return 2
    if options.list:
        print("\n".join(f"{fault.file}: {fault.name}" for fault in chosen))
        return 0
    # A test that fails anyway notices nothing.
    selections = sorted({fault.tests for fault in chosen})
    with ThreadPoolExecutor(options.jobs) as pool:
        for selection, (status, output, _) in zip(
            selections, pool.map(lambda s: run(None, s), selections), strict=True
        ):
            if status != PASSED:
                print(f"without a fault, {selection} ends with {status}\n{output}")
                return 2
        print(f"{len(selections)} selections of tests pass without a fault", flush=True)
        survivors = []
        for fault, (status, output, seconds) in zip(
            chosen, pool.map(lambda f: run(f, f.tests), chosen), strict=True
        ):
            word = {FAILED: "noticed", PASSED: "SURVIVED"}.get(status, f"STATUS {status}")
            print(f"{word:<10}{seconds:4.0f} s  {fault.name}", flush=True)
            if status != FAILED:
                survivors.append(fault)
                print("" if status == PASSED else output, end="")
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} noticed")
    return int(bool(survivors))


def outdated(faults: Sequence[Fault], root: Path = ROOT) -> list[str]:
    """A line for each fault whose text has moved."""
    found = []
    for fault in faults:
        try:
            fault.planted(root)
        except ValueError as error:
            found.append(str(error))
    return found


def run(fault: Fault | None, tests: str) -> tuple[int, str, float]:
    """Status of pytest, the end of its output, and seconds, in a copy of the tree."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="fault_") as folder:
        copy = Path(folder)
        for name in COPIED:
            if (ROOT / name).is_dir():
                ignored = shutil.ignore_patterns("__pycache__", "_build")
                shutil.copytree(ROOT / name, copy / name, ignore=ignored)
            else:
                shutil.copy(ROOT / name, copy / name)
        if fault is not None:
            (copy / fault.file).write_text(fault.planted(copy), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=no", *shlex.split(tests)]
        own = {"PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        try:
            done = subprocess.run(
                command,
                cwd=copy,
                env={**os.environ, **own},
                capture_output=True,
                text=True,
                timeout=MOST_SECONDS,
            )
            status, output = done.returncode, done.stdout + done.stderr
        except subprocess.TimeoutExpired:
            status, output = FAILED, "timed out"
    return status, "\n".join(output.splitlines()[-15:]) + "\n", time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
