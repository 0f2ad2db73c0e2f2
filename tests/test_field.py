"""Analyses of field trials that were published with ASReml."""

import json

import numpy as np
import pandas as pd
import pytest

from openreml_nn import lmm
from openreml_nn.datasets import slatehall
from openreml_nn.inference import heritability
from tests.forked import program

FIELD = {"residual": "ar1(row):ar1(col) + units"}


def values(result):
    return {p.name.rpartition("matrix/")[2]: (p.value, p.std_error) for p in result.parameters}


def test_wheat_of_the_nebraska_nursery():
    """Butler et al., ASReml-R: 48.7 (7.155), 0.4375 (0.0806) and 0.6555 (0.05638); the data are
    nlme's Wheat2. The 18 plots that lack a yield are left out."""
    table = pd.read_csv("tests/reference/wheat2.csv")
    assert len(table) == 224
    found = values(lmm("yield ~ gen", table, residual="ar1(row):ar1(col)"))
    assert found["row/sigma^2"] == pytest.approx((48.71, 7.155), rel=1e-3)
    assert found["row/rho"] == pytest.approx((0.4375, 0.0806), abs=2e-4)
    assert found["col/rho"] == pytest.approx((0.6555, 0.05638), abs=2e-4)


def test_slate_hall_with_random_rows_and_columns():
    """Model 4 of Gilmour, Cullis and Verbyla (1997), by ASReml (agridat, gilmour.slatehall)."""
    result = lmm(
        "yield ~ gen + row + (1 | factor(row)) + (1 | factor(col))", slatehall(),
        residual="ar1(col):ar1(row)",
    )  # fmt: skip
    found = values(result)
    assert found["row/g/sigma^2"] == pytest.approx((20290, 10260), rel=1e-3)
    assert found["col/g/sigma^2"] == pytest.approx((2519, 1959), rel=1e-3)
    assert found["col/sigma^2"] == pytest.approx((23950, 4616), rel=1e-3)
    assert found["col/rho"] == pytest.approx((0.439, 0.113), abs=5e-4)
    assert found["row/rho"] == pytest.approx((0.125, 0.117), abs=5e-4)
    slope = dict(zip(result.fixed.names, result.fixed.estimate.tolist(), strict=True))["row"]
    assert slope == pytest.approx(31.72252, abs=5e-4)


def test_genotypes_a_field_a_nugget_and_cullis_heritability_in_one_call_and_one_line(tmp_path):
    table = slatehall()
    result = lmm("yield ~ 1 + (1 | gen)", table, **FIELD)
    found = {p.name: p.value for p in result.parameters}
    gen, nugget = found["gen/g/sigma^2"], found["units/sigma^2"]
    sigma, (*_, row, _, column) = found["residual/g/matrix/row/sigma^2"], [
        value for name, value in found.items() if name.startswith("residual")
    ]  # fmt: skip
    Z = pd.get_dummies(table["gen"]).to_numpy(float)
    apart = {c: np.abs(np.subtract.outer(*[table[c].to_numpy()] * 2)) for c in ("row", "col")}
    V = sigma * row ** apart["row"] * column ** apart["col"]
    V = V + nugget * np.eye(150) + gen * Z @ Z.T
    inverse, one = np.linalg.inv(V), np.ones((150, 1))
    P = inverse - inverse @ one @ one.T @ inverse / inverse.sum()
    errors = gen * np.eye(25) - gen**2 * Z.T @ P @ Z
    differences = np.add.outer(*[np.diag(errors)] * 2) - 2 * errors
    mean = differences[~np.eye(25, dtype=bool)].mean()
    h2 = heritability(result, method="cullis")
    assert float(h2) == pytest.approx(1 - mean / (2 * gen), abs=1e-8)
    done = program(
        "experiment=field_trial", "logger=none", "plots=false", "trainer.enable_progress_bar=false",
        "hydra.run.dir=r", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"cullis {float(h2):.4f}" in done.stdout
    written = pd.read_csv(tmp_path / "r" / "heritability.csv").set_index("method")["estimate"]
    assert written["cullis"] == pytest.approx(float(h2), abs=1e-5)
    record = json.loads((tmp_path / "r" / "result.json").read_text())
    assert record["fit"]["log_likelihood"] == pytest.approx(result.log_likelihood, abs=1e-6)
    wrong = program("experiment=field_trial", "heritability=row", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "heritability is 'row': expected one of ['gen']" in wrong.stderr
