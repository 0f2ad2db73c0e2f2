"""The examples run."""

import runpy
import sys
from pathlib import Path

import pytest

from tests.forked import forked

pytestmark = pytest.mark.slow

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


#: The whole simulations take minutes.
SMALL = {
    "random_intercepts": ["-m", "rows=4000", "levels=50", "epochs=2", "seed=1,2"],
    "reml_bias": ["1", "3"],
    "optuna_search": ["2"],
    "ray_train": ["2"],
}
#: What an example needs that is not installed with the package.
NEEDS = {"gpytorch_kernel": "gpytorch", "optuna_search": "optuna", "ray_train": "ray"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, tmp_path):
    if path.stem in NEEDS:
        pytest.importorskip(NEEDS[path.stem])

    def example():
        sys.argv = [str(path), *SMALL.get(path.stem, [])]
        runpy.run_path(str(path), run_name="__main__")

    done = forked(example, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
