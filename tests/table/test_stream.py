"""Chunks of rows, and processes that share them, against all rows at once."""

from decimal import Decimal

import numpy as np
import pandas as pd
import pytest
import torch

from openreml_nn import InputError, datasets, fit_stream, lmm
from openreml_nn.model.stream import accumulate
from tests.forked import ranks


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


def test_solvers_of_sums_agree_and_the_plan_takes_the_cheaper(tmp_path):
    path, formula = tmp_path / "table.parquet", "y ~ x + (1 | user) + (1 | item)"
    table().to_parquet(path)
    blocked, sparse, auto = (
        fit_stream(formula, path, chunk_rows=150, progress=False, solver=solver)
        for solver in ("blocked", "sparse", "auto")
    )
    same(sparse, blocked)
    assert (blocked.plan.solver, sparse.plan.solver) == ("blocked", "sparse")
    # Of levels that hardly meet the equations are sparse.
    n = 2000
    codes = {"user": np.arange(n) // 2, "item": (np.arange(n) + 1) // 2}
    pd.DataFrame({"y": np.sin(np.arange(n)), **codes}).to_parquet(path)
    sums = accumulate("y ~ 1 + (1 | user) + (1 | item)", path, progress=False)
    with pytest.warns(RuntimeWarning, match="did not converge"):
        chained = sums.fit(max_iterations=1)
    assert (auto.plan.solver, chained.plan.solver) == ("blocked", "sparse")


@pytest.mark.filterwarnings("ignore:the fixed-effect model matrix is rank deficient")
@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize(
    ("chunk_rows", "suffix"), [(7, "parquet"), (150, "csv"), (1000, "parquet")]
)
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


def awkward(seed):
    """A table of many storages, with missing values, and levels that come late."""
    rng = np.random.default_rng(seed)
    n = 300
    k = np.sort(rng.integers(0, 20, n))
    x, b = rng.normal(size=n), rng.random(n) > 0.5
    y = rng.normal(size=20)[k] + 0.5 * x + rng.normal(size=n)
    table = pd.DataFrame({"y": y, "x": x, "k": k, "b": b, "w": rng.integers(1, 9, n)})
    table["zip"] = [f"{i:03d}" if i < 15 else f"x{i:03d}" for i in k]  # a number in early chunks
    table["id"] = pd.array(2**53 + k, dtype="Int64")
    table["s"] = k // 5 + 1  # sorted: a chunk has one or two of the four levels
    table["f"] = np.array(["N/A", "None", "c"])[rng.integers(0, 3, n)]
    table["day"] = pd.Timestamp("2024-01-01") + pd.to_timedelta(k, unit="D")
    table["cat"] = pd.Categorical.from_codes(19 - k, [f"c{i}" for i in rng.permutation(20)])
    table["half"] = pd.array(rng.integers(0, 5, n), dtype="Int16")
    table["price"] = [Decimal(int(v)) / 4 for v in table["w"]]
    rows = rng.permutation(n)[:30]
    for i, name in enumerate(["y", "x", "id", "zip", "f", "half"]):
        table[name] = table[name].mask(table.index.isin(rows[5 * i : 5 * i + 5]))
    return table


AWKWARD = [
    "y ~ x + (1 | zip)",
    "y ~ C(s) * x + (1 | id)",
    "y ~ f + b + price + (1 | b:k)",
    "y ~ half + I(w^3) + (x || day)",
    "log(y + 20) ~ cut(w, c(0, 3, 6, 9)) + (0 + b | cat)",
    "I(y / 2) ~ factor(half) + relevel(f, ref = 'c') + offset(x / 3) + (1 | s/zip)",
    "y ~ I(x > 0) + w:half + (1 | k)",
    "y ~ x + dummy(s, c(2, 4)) + (0 + dummy(f, 'c') | k)",
    "y ~ . - day - cat - id - zip - s + (1 | k)",
]


@pytest.mark.filterwarnings("ignore:.*rows left out")
@pytest.mark.filterwarnings("ignore:the fixed-effect model matrix is rank deficient")
@pytest.mark.parametrize(
    ("formula", "suffix"),
    [(formula, suffix) for suffix in ("parquet", "csv") for formula in AWKWARD]
    + [(AWKWARD[0], "txt")],
)
def test_chunks_are_encoded_as_the_whole_is(tmp_path, formula, suffix):
    data = awkward(len(formula))
    path = tmp_path / f"table.{suffix}"
    if suffix == "parquet":
        data.to_parquet(path)
    else:
        data.to_csv(path, index=False, sep="," if suffix == "csv" else "\t")
    expected = lmm(formula, path)
    for chunk_rows in (23, 170):
        found = fit_stream(formula, path, chunk_rows=chunk_rows, progress=False)
        same(found, expected)


KINDS = {
    "int8": lambda v: v.astype("int8"),
    "uint64": lambda v: v.astype("uint64") + 2**63,
    "Int64": lambda v: v.astype("Int64") + 2**53,
    "float32": lambda v: (v / 10).astype("float32"),
    "float64": lambda v: v / 3,
    "decimal": lambda v: pd.Series([Decimal(int(i)) / 4 for i in v], index=v.index),
    "bool": lambda v: v % 2 == 0,
    "boolean": lambda v: (v % 2 == 0).astype("boolean"),
    "text": lambda v: "l" + v.astype(str),
    "digits": lambda v: v.map("{:02d}".format),
    "late text": lambda v: v.astype(str).where(v < 6, "x"),
    "category": lambda v: pd.Categorical("c" + v.astype(str), [f"c{i}" for i in range(9, -1, -1)]),
    "dates": lambda v: pd.Timestamp("2024-01-01") + pd.to_timedelta(v, unit="D"),
}
NUMERIC = ("int8", "float32", "float64", "decimal")


@pytest.mark.filterwarnings("ignore:.*rows left out")
@pytest.mark.parametrize("is_missing", [False, True], ids=["complete", "missing"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_storage_is_the_same_in_chunks_and_in_memory(tmp_path, kind, is_missing):
    """Sorted by it, so that levels come late and every chunk has a few of them."""
    rng = np.random.default_rng(7)
    n = 160
    code = pd.Series(np.sort(rng.integers(0, 8, n)))
    data = pd.DataFrame(
        {"v": KINDS[kind](code), "x": rng.normal(size=n), "g": rng.integers(0, 5, n)}
    )
    data["y"] = data["x"] + rng.normal(size=8)[code] + rng.normal(size=n)
    if is_missing:
        gone = rng.permutation(n)[:12]
        whole = data["v"].convert_dtypes() if kind in ("int8", "uint64", "bool") else data["v"]
        data["v"] = whole.mask(data.index.isin(gone))
    formulas = ["y ~ x + factor(v) + (1 | g)", "y ~ x + (1 | v)"]
    formulas += ["y ~ x * v + (1 | g)", "y ~ I(v^2) + (0 + v | g)"] if kind in NUMERIC else []
    data.to_parquet(tmp_path / "t.parquet")
    data.to_csv(tmp_path / "t.csv", index=False)
    for formula in formulas:
        memory = lmm(formula, data)
        for name in ("t.parquet", "t.csv"):
            found = fit_stream(formula, tmp_path / name, chunk_rows=47, progress=False)
            assert found.log_likelihood == pytest.approx(memory.log_likelihood, rel=1e-9)
            if kind == "category" and name == "t.csv":  # text has no order of its own
                same(found, lmm(formula, tmp_path / name))
            else:
                same(found, memory)
        # The file that says the least of its columns, read whole.
        read = lmm(formula, tmp_path / "t.csv").log_likelihood
        assert read == pytest.approx(memory.log_likelihood, rel=1e-9)


OPTIONS = [
    ("y ~ x + (1 | user) + (1 | item)", {"weights": "w"}),
    ("y ~ x + (x | item) + (1 | user)", {"weights": "w", "method": "ml"}),
    ("y ~ x + (1 | own)", {"weights": "w", "residual_variance": 0.3}),
    ("y ~ f + offset(x / 100) + (1 | user) + (1 | item)", {"residual_variance": 0.2}),
    ("y ~ x + offset(w) + (x || site)", {"weights": "w", "categorical": ["f"]}),
    ("y ~ x * f", {"weights": "w"}),
]


@pytest.mark.parametrize(("formula", "options"), OPTIONS)
@pytest.mark.parametrize("chunk_rows", [37, 1000])
def test_options_mean_the_same_in_chunks_and_so_do_predictions(
    tmp_path, formula, options, chunk_rows
):
    rng = np.random.default_rng(4)
    data = table().assign(w=rng.uniform(0.2, 3, 400).round(3), own=np.arange(400))
    path = tmp_path / "table.parquet"
    data.to_parquet(path)
    found = lmm(formula, path, chunk_rows=chunk_rows, **options)
    expected = lmm(formula, data, **options)
    same(found, expected)
    assert found.residual_variance == pytest.approx(expected.residual_variance, rel=1e-5)
    new = data.assign(w=rng.uniform(0.2, 3, 400))
    one, other = found.predict(new), expected.predict(new)
    for column in one:
        np.testing.assert_allclose(one[column], other[column], rtol=1e-5)
    assert found.formula == formula
    assert found.source is None


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


@pytest.mark.filterwarnings("ignore:.*rows left out")
@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_rows_of_chunks_are_counted_as_those_of_the_file(tmp_path, suffix):
    table = pd.DataFrame({"y": np.arange(20.0) % 7, "x": np.arange(20.0) % 5, "g": [*"abcd"] * 5})
    table.loc[3, "y"], table.loc[17, "x"] = np.nan, np.inf
    path = tmp_path / f"t.{suffix}"
    table.to_csv(path, index=False) if suffix == "csv" else table.to_parquet(path)
    for rows in (None, 6):
        with pytest.raises(InputError, match="'x' is inf in row 18"):
            lmm("y ~ x + (1 | g)", path, chunk_rows=rows)


def test_files_that_are_none(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        fit_stream("y ~ 1", tmp_path / "none.parquet")
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1")
    with pytest.raises(InputError, match="cannot be read"):
        fit_stream("y ~ 1", broken)
    with pytest.raises(InputError, match="`chunk_rows` is 0"):
        fit_stream("y ~ 1", datasets.table_path("oats"), chunk_rows=0)
    with pytest.raises(InputError, match="`max_iterations` is 0: expected a whole number, 1 or"):
        fit_stream("yield ~ nitro", datasets.table_path("oats"), max_iterations=0)
    for method in ("ML", "nonsense", None):
        with pytest.raises(InputError, match="`method` is"):
            fit_stream("yield ~ nitro", datasets.table_path("oats"), method=method)
    path = datasets.table_path("oats")
    with pytest.raises(InputError, match=r"`residual` is 'cs\(Block\)', which needs all rows"):
        lmm("yield ~ nitro", path, chunk_rows=9, residual="cs(Block)")
    with pytest.raises(
        InputError, match=r"`solver` is 'dense': expected 'auto', 'blocked' or 'sparse'"
    ):
        lmm("yield ~ nitro", path, chunk_rows=9, solver="dense")
    with pytest.raises(InputError, match="`residual_variance` is -1"):
        fit_stream("yield ~ nitro", path, residual_variance=-1)
    with pytest.raises(InputError, match="in memory already"):
        lmm("yield ~ nitro", datasets.oats(), chunk_rows=9)


def on_two_processes(tmp_path, path, formula):
    """The log-likelihood and estimates of each process, or what is wrong."""

    def fitted():
        try:
            result = fit_stream(formula, path, chunk_rows=50, progress=False)
        except InputError as error:
            return str(error)
        return [result.log_likelihood, result.fixed.estimate.tolist()]

    return ranks(fitted, 2, tmp_path)


def test_processes_share_the_chunks_and_agree(tmp_path):
    path = tmp_path / "table.parquet"
    table().to_parquet(path)
    one, other = on_two_processes(tmp_path, path, FORMULAS[1])
    assert one == other
    expected = lmm(FORMULAS[1], table())
    assert one[0] == pytest.approx(expected.log_likelihood, rel=1e-9)


def test_a_process_without_a_chunk_takes_part(tmp_path):
    path = tmp_path / "table.csv"
    data = table(48)
    data.to_csv(path, index=False)
    one, other = on_two_processes(tmp_path, path, "y ~ x + (1 | item)")
    assert one == other
    expected = lmm("y ~ x + (1 | item)", data)
    assert one[0] == pytest.approx(expected.log_likelihood, rel=1e-9)


def test_the_error_of_one_process_ends_all(tmp_path):
    path = tmp_path / "table.parquet"
    data = table()
    data.loc[120, "x"] = np.inf  # in the third chunk, which is the first process's
    data.to_parquet(path)
    for error in on_two_processes(tmp_path, path, "y ~ x + (1 | item)"):
        assert "'x' is inf in row" in error


@pytest.mark.parametrize("method", ["ML", "REML", "nonsense", None, 1])
def test_a_method_that_does_not_exist_is_refused_before_the_file_is_read(method):
    with pytest.raises(ValueError, match=r"`method` is .*: expected 'reml' or 'ml'"):
        fit_stream("y ~ 1 + (1 | g)", "none.csv", method=method)
