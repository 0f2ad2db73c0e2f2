"""The examples run."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


#: The whole simulations take minutes.
SMALL = {
    "random_intercepts": ["-m", "rows=4000", "levels=50", "epochs=2", "seed=1,2"],
    "reml_bias": ["1"],
}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, tmp_path):
    if "gpytorch" in path.stem:
        pytest.importorskip("gpytorch")
    done = subprocess.run(
        [sys.executable, path, *SMALL.get(path.stem, [])],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
