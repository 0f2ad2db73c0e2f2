"""Warnings point to the line of the user that called."""

import ast
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import openreml_nn
from openreml_nn import REMLLoss, glmm, lmm
from openreml_nn.covariance import CovariancePropagation, DummyMatrix, ScalarMatrix, Sum
from openreml_nn.datasets import sleepstudy

HOME = Path(openreml_nn.__file__).parent


def test_one_place_warns():
    calls = []
    for path in HOME.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "warnings.warn":
                calls.append(path.relative_to(HOME).as_posix())
    assert calls == ["support/warning.py"]


def counts():
    rng = np.random.default_rng(0)
    return pd.DataFrame({"y": rng.poisson(2, 60), "x": rng.normal(size=60), "g": np.arange(60) % 6})


def incomplete():
    table = sleepstudy()
    table.loc[3, "Days"] = np.nan
    return table


def trained():
    effect = CovariancePropagation(z=DummyMatrix(["a", "a", "b", "b"]), g=ScalarMatrix(2))
    loss = REMLLoss(Sum(g=effect, residual=ScalarMatrix(4))).double()
    x = torch.ones(4, 1, dtype=torch.float64)
    return torch.nn.Sequential(loss)[0](torch.arange(4.0).double(), torch.cat([x, x], 1))


WARNED = {
    "no convergence": lambda: glmm("y ~ x + (1 | g)", counts(), "poisson", max_iterations=1),
    "no convergence, linear": lambda: lmm(
        "Reaction ~ Days + (Days | Subject)", sleepstudy(), max_iterations=1
    ),
    "rows left out": lambda: lmm("Reaction ~ Days + (1 | Subject)", incomplete()),
    "rows left out, a family": lambda: glmm(
        "y ~ x + (1 | g)", counts().assign(x=lambda t: t.x.where(t.x < 1)), "poisson"
    ),
    "a column twice": lambda: glmm(
        "y ~ x + z + (1 | g)", counts().assign(z=lambda t: 2 * t.x), "poisson"
    ),
    "a column twice, a module": trained,
}


@pytest.mark.parametrize("name", WARNED)
def test_a_warning_points_to_the_call(name):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        WARNED[name]()
    own = [w for w in found if issubclass(w.category, RuntimeWarning)]
    assert own
    assert {w.filename for w in own} == {__file__}
