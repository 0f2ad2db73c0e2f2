"""Chunks of rows, and processes that share them, against all rows at once."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from openreml_nn import InputError, datasets, fit_stream, lmm
from openreml_nn.stream import accumulate


def table(n=400, seed=0):
    rng = np.random.default_rng(seed)
    user, item, site = rng.integers(0, 30, n), rng.integers(0, 12, n), rng.integers(0, 4, n)
    x = rng.standard_normal(n) * 100 + 1e4
    b = rng.standard_normal(30)[user] + rng.standard_normal(12)[item]
    y = 5 + 0.01 * x + b + 0.5 * rng.standard_normal(n)
    return pd.DataFrame(
        {"y": y, "x": x, "user": [f"u{i}" for i in user], "item": item, "site": site, "f": site % 3}
    )


FORMULAS = [
    "y ~ x + (1 | user) + (1 | item)",
    "y ~ x + (1 + x | user) + (1 | item)",
    "y ~ x + (1 | site/item)",
    "y ~ x * f + (x || user)",
    "y ~ x + I(2 * x) + (1 | item)",
]


def same(found, expected, tolerance=1e-8):
    assert found.log_likelihood == pytest.approx(expected.log_likelihood, rel=tolerance)
    assert found.fixed.names == expected.fixed.names
    torch.testing.assert_close(found.fixed.estimate, expected.fixed.estimate, rtol=1e-5, atol=1e-7)
    for one, other in zip(found.components, expected.components, strict=True):
        assert one.group == other.group
        assert one.levels == other.levels
        torch.testing.assert_close(one.covariance, other.covariance, rtol=1e-5, atol=1e-8)
    for one, other in zip(found.random, expected.random, strict=True):
        torch.testing.assert_close(one.values, other.values, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(one.variances, other.variances, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:the fixed-effect model matrix is rank deficient")
@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("chunk_rows", [7, 150, 1000])
@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_chunks_give_the_fit_of_all_rows(tmp_path, formula, chunk_rows, suffix):
    data = table()
    path = tmp_path / f"table.{suffix}"
    data.to_parquet(path) if suffix == "parquet" else data.to_csv(path, index=False)
    options = {"categorical": ["f"]}
    found = fit_stream(formula, path, chunk_rows=chunk_rows, progress=False, **options)
    same(found, lmm(formula, data, **options))
    assert found.rows == len(data)
    assert not len(found.fitted)
    assert "chunks of rows" in str(found.plan)


def test_statistics_do_not_depend_on_the_chunks(tmp_path):
    path = tmp_path / "table.parquet"
    table().to_parquet(path)
    one, other = (accumulate(FORMULAS[0], path, rows, progress=False) for rows in (9, 1000))
    torch.testing.assert_close(one.statistics.products.ff, other.statistics.products.ff)
    for pair, cells in one.statistics.cells.items():
        torch.testing.assert_close(cells, other.statistics.cells[pair])
        torch.testing.assert_close(
            one.statistics.products.zz[pair], other.statistics.products.zz[pair]
        )


def test_rows_that_miss_a_value_are_counted_once(tmp_path):
    data = table()
    data.loc[[3, 77, 300], "x"] = np.nan
    data.loc[0:9, "user"] = None  # a whole chunk
    path = tmp_path / "table.parquet"
    data.to_parquet(path)
    with pytest.warns(RuntimeWarning, match="12 of 400 rows left out") as caught:
        found = fit_stream(FORMULAS[0], path, chunk_rows=10, progress=False)
    assert len(caught) == 1
    with pytest.warns(RuntimeWarning, match="12 of 400 rows"):
        same(found, lmm(FORMULAS[0], data))


@pytest.mark.parametrize(
    ("formula", "message"),
    [
        ("y ~ scale(x) + (1 | user)", "needs all rows at once"),
        ("y ~ missing + (1 | user)", "no column 'missing'"),
        ("y ~ x + (1 | one)", "has one level"),
        ("y ~ x + (1 | own)", "cannot be told from the residual"),
        ("user ~ x + (1 | item)", "response"),
    ],
)
def test_errors_are_those_of_the_input(tmp_path, formula, message):
    data = table().assign(one="a", own=np.arange(400))
    path = tmp_path / "table.parquet"
    data.to_parquet(path)
    with pytest.raises(InputError, match=message):
        fit_stream(formula, path, chunk_rows=50, progress=False)


def test_files_that_are_none(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        fit_stream("y ~ 1", tmp_path / "none.parquet")
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1")
    with pytest.raises(InputError, match="cannot be read"):
        fit_stream("y ~ 1", broken)
    with pytest.raises(InputError, match="`chunk_rows` is 0"):
        fit_stream("y ~ 1", datasets.table_path("oats"), chunk_rows=0)


RANK = """
import sys, torch, torch.distributed as dist
from openreml_nn import fit_stream
rank, size, store, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
result = fit_stream(sys.argv[5], path, chunk_rows=50, progress=False)
print(repr(result.log_likelihood), repr(result.fixed.estimate.tolist()), flush=True)
dist.destroy_process_group()
"""


def test_processes_share_the_chunks_and_agree(tmp_path):
    path = tmp_path / "table.parquet"
    table().to_parquet(path)
    command = [sys.executable, "-c", RANK]
    started = [
        subprocess.Popen(
            [*command, str(rank), "2", str(tmp_path / "store"), str(path), FORMULAS[1]],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        for rank in range(2)
    ]
    printed = [process.communicate(timeout=120)[0] for process in started]
    assert printed[0] == printed[1]
    value, _ = printed[0].split(" ", 1)
    expected = lmm(FORMULAS[1], table())
    assert float(value) == pytest.approx(expected.log_likelihood, rel=1e-9)
