"""Tables and formulas as tensors, and back to names."""

import re

import numpy as np
import pandas as pd
import pytest
import torch

from openreml_nn import InputError, datasets, lmm
from openreml_nn.model.structures import linear_model
from openreml_nn.table import Encoder, Learned

TABLE = pd.DataFrame(
    {
        "y": [1.0, 2.0, 3.0, 5.0, 4.0, 7.0],
        "x": [0.0, 1.0, 2.0, 3.0, 4.0, 6.0],
        "f": ["u", "v", "w", "u", "v", "w"],
        "k": [1, 2, 1, 2, 1, 2],
        "g": ["b", "b", "a", "a", "c", "c"],
        "h": [10, 9, 10, 9, 10, 9],
    }
)


def encode(formula, table=TABLE, **options):
    return Encoder(formula, **options).fit(table)


def test_names_are_those_of_r():
    found = encode("y ~ x + f + (1 | g)").names
    assert found == ("(Intercept)", "x", "fv", "fw")
    table = pd.concat([TABLE] * 2)
    assert encode("y ~ x * f + (1 | g)", table).names[-2:] == ("x:fv", "x:fw")


def test_numbers_are_factors_when_told():
    assert encode("y ~ k + (1 | g)").names == ("(Intercept)", "k")
    assert encode("y ~ k + (1 | g)", categorical=["k"]).names == ("(Intercept)", "k2")
    assert encode("y ~ C(k) + (1 | g)").X.shape == (6, 2)


@pytest.mark.parametrize(
    "column",
    [
        TABLE["f"],
        pd.Categorical(TABLE["f"]),
        pd.array(TABLE["f"], dtype="string"),
        [True, False, True, True, False, True],
    ],
)
def test_categorical_columns_are_detected(column):
    assert len(encode("y ~ f + (1 | g)", TABLE.assign(f=column)).names) >= 2


def test_groups_are_sorted_and_numbers_by_size():
    g, h = encode("y ~ x + (1 | g) + (1 | h)").random
    assert g.levels == ("a", "b", "c")
    assert g.codes.tolist() == [1, 1, 0, 0, 2, 2]
    assert h.levels == ("9", "10")
    assert h.codes.tolist() == [1, 0, 1, 0, 1, 0]


def test_only_observed_combinations_are_levels():
    (part,) = encode("y ~ x + (1 | g:f)", pd.concat([TABLE] * 2)).random
    assert part.levels == ("a:u", "a:w", "b:u", "b:v", "c:v", "c:w")
    table = pd.DataFrame(
        {"y": range(6), "a": ["p:q", "p", "p:q", "p", "p", "p:q"], "b": list("rsrssr")}
    ).replace({"b": {"s": "q:s"}})
    (part,) = encode("y ~ 1 + (1 | a:b)", table).random
    assert len(set(part.levels)) == 2


def test_unused_levels_of_a_categorical_are_not_levels():
    table = TABLE.assign(g=pd.Categorical(TABLE["g"], categories=list("zcba")))
    (part,) = encode("y ~ x + (1 | g)", table).random
    assert part.levels == ("c", "b", "a")


def test_random_slopes_and_independent_effects():
    one, two = encode("y ~ x + (x || h)", pd.concat([TABLE] * 2)).random
    assert (one.name, one.effects, two.name, two.effects) == ("h", ("(Intercept)",), "h_1", ("x",))
    (both,) = encode("y ~ x + (1 + x | h)").random
    assert both.effects == ("(Intercept)", "x")
    assert both.values.tolist() == [[1.0, x] for x in TABLE["x"]]


def test_rows_with_missing_values_are_dropped_with_a_count():
    table = TABLE.astype({"h": float})
    table.loc[1, "y"] = np.nan
    table.loc[4, "g"] = None
    table["unused"] = np.nan
    with pytest.warns(RuntimeWarning, match="2 of 6 rows left out"):
        found = encode("y ~ x + (1 | h)", table.assign(h=table["h"].where(table["g"].notna())))
    assert found.dropped_rows == 2
    assert found.rows.tolist() == [0, 2, 3, 5]
    assert found.random[0].levels == ("9", "10")


@pytest.mark.parametrize(
    ("formula", "table", "match"),
    [
        ("y ~ z + (1 | g)", TABLE, "no column 'z'"),
        ("y ~ x + (1 | z)", TABLE, "no column 'z'"),
        ("z ~ x + (1 | g)", TABLE, "no column 'z'"),
        ("f ~ x + (1 | g)", TABLE, "'f' is not numeric: found 'u' in row 1"),
        ("y ~ x + (1 | g)", TABLE.assign(g="a"), "one level"),
        ("y ~ f + (1 | g)", TABLE.assign(f="a"), "'f' has one level"),
        ("y ~ x + (1 | g)", TABLE.assign(y=np.nan), "every row has a missing value"),
        ("y ~ x + (1 | g)", TABLE.assign(x=[1, 2, np.inf, 4, 5, 6.0]), "inf in row 3"),
        ("log(x) ~ 1 + (1 | g)", TABLE, "-inf in row 1"),
        ("y ~ poly(x, 5) + (1 | g)", TABLE, "6 rows for 6 fixed effects"),
        ("y ~ 1 + (x | g)", TABLE, "cannot be told from the residual"),
        ("y ~ f(x) + (1 | g)", TABLE, "not allowed"),
        ("y ~ x.__class__ + (1 | g)", TABLE, "no column 'x.__class__'"),
        ("y ~ I(x.__class__.__bases__) + (1 | g)", TABLE, "no column 'x.__class__.__bases__'"),
    ],
)
def test_faults_of_the_input_are_named(formula, table, match):
    with pytest.raises(InputError, match=match) as caught:
        encode(formula, table)
    assert "\n" not in str(caught.value)


def test_another_table_is_encoded_with_what_was_learned():
    encoder = Encoder("y ~ scale(x) + f + (1 | g)")
    first = encoder.fit(TABLE)
    again = encoder.transform(TABLE)
    torch.testing.assert_close(again.X, first.X)
    with pytest.warns(RuntimeWarning, match="of g in 1 of 1 rows"):
        new = encoder.transform(TABLE.iloc[[3]].drop(columns="y").assign(g="new"))
    torch.testing.assert_close(new.X, first.X[[3]])
    assert new.y is None
    assert new.random[0].codes.tolist() == [-1]
    with pytest.raises(InputError, match="has the level 'zz'"):
        encoder.transform(TABLE.assign(f="zz"))


def test_what_was_learned_is_plain(tmp_path):
    encoder = Encoder("y ~ poly(x, 2) + (x | h)")
    encoder.fit(TABLE)
    torch.save(encoder.learned.to_dict(), tmp_path / "state.pt")
    other = Encoder("y ~ poly(x, 2) + (x | h)")
    other.learned = Learned.from_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    torch.testing.assert_close(other.transform(TABLE).X, encoder.transform(TABLE).X)


@pytest.mark.parametrize("name", datasets.FORMULAS)
def test_bundled_data_sets(name):
    table = getattr(datasets, name)()
    found = encode(datasets.FORMULAS[name], table)
    assert len(found.y) == len(table)
    assert found.dropped_rows == 0
    with pytest.raises(ValueError, match="`name` is 'nothing'"):
        datasets.table_path("nothing")


REPEATED = pd.DataFrame(
    {
        "y": [1.0, 2.0, 4.0, 3.0, 5.0, 7.0],
        "g": ["a", "a", "a", "b", "b", "c"],
        "t": [1, 2, 3, 1, 3, 2],
        "s": ["u", "v", "u", "v", "u", "v"],
        "w": [1.0, 2.0, 0.5, 1.0, 4.0, 1.0],
    }
)


def test_residuals_within_groups():
    found = encode("y ~ 1", REPEATED, residual="ar1(t | g)")
    V = linear_model(found).covariance(found.batch())(
        torch.tensor([0.0, torch.log(torch.tensor(3.0))])
    )  # rho 0.5
    assert found.residual.positions == ("1", "2", "3")
    torch.testing.assert_close(V[0], torch.tensor([1, 0.5, 0.25, 0, 0, 0]))
    torch.testing.assert_close(V[3], torch.tensor([0, 0, 0, 1, 0.25, 0]))
    by_order = encode("y ~ 1", REPEATED, residual="cs(g)")
    assert by_order.residual.positions == ("1", "2", "3")


def test_residual_variance_by_stratum_and_by_weight():
    strata = encode("y ~ 1", REPEATED, residual="diag(s)")
    assert strata.residual.positions == ("u", "v")
    V = linear_model(strata).covariance(strata.batch())(torch.log(torch.tensor([1.0, 2.0])))
    torch.testing.assert_close(V, torch.diag(torch.tensor([1.0, 4, 1, 4, 1, 4])))
    cells = encode("y ~ 1", REPEATED, residual="diag(s:g)")
    assert cells.residual.positions == ("u:a", "u:b", "v:a", "v:b", "v:c")
    weights = encode("y ~ 1", REPEATED, weights="w")
    expected = torch.diag(1 / torch.tensor(REPEATED["w"].to_numpy()))
    torch.testing.assert_close(
        linear_model(weights).covariance(weights.batch())(torch.zeros(1)), expected
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"residual": "garch(t | g)"}, "garch() is unknown: expected one of us(…), cs(…)"),
        ({"residual": "ar1(t | )"}, "a column is missing"),
        ({"residual": "diag(g:t)"}, "'g:t' has 6 levels in 6 rows: no variance can"),
        ({"residual": "diag(t | g)"}, "takes a stratum only"),
        ({"residual": "ar1(missing | g)"}, "no column 'missing'"),
        ({"residual": "us(s | g)"}, "row 3 has the position 'u' of 's'"),
        (
            {"residual": "diag(g):homcs(s)"},
            "homcs() is over the levels of 's', each once in a stratum",
        ),
        ({"residual": "ar1(s | g)"}, "column 's' is not numeric: found 'u' in row 1"),
        ({"residual": "cs(t:g)"}, "one level in each group"),
        ({"weights": "g"}, "the weight 'g' is not numeric: found 'a' in row 1"),
    ],
)
def test_errors_of_residuals(options, message):
    with pytest.raises(InputError, match=re.escape(message)):
        encode("y ~ 1", REPEATED, **options)


def ar1_loglik(lags, y, rho):
    """Of the rows of a group, sigma^2 and the mean at their maxima."""
    n, times = y.shape
    inverse = np.linalg.inv(rho**lags)
    one = np.ones(times)
    e = y - (y @ inverse @ one).sum() / (n * one @ inverse @ one)
    s2 = np.einsum("gi,ij,gj->", e, inverse, e) / y.size
    size = n * np.linalg.slogdet(rho**lags)[1]
    return -0.5 * (y.size * (np.log(2 * np.pi * s2) + 1) + size)


@pytest.mark.parametrize("stored", ["int64", "float64", "category", "Int8", "object", "str"])
def test_lags_of_ar1_are_differences_of_times(stored):
    times, rng = np.array([0, 1, 2, 4, 7, 12]), np.random.default_rng(5)
    lags = np.abs(np.subtract.outer(times, times))
    y = rng.normal(size=(40, 6)) @ np.linalg.cholesky(4 * 0.8**lags).T
    t = pd.DataFrame({"y": y.ravel(), "t": np.tile(times, 40), "g": np.repeat(range(40), 6)})
    found = lmm("y ~ 1", t.astype({"t": stored}), residual="ar1(t | g)", method="ml")
    best = max(ar1_loglik(lags, y, rho) for rho in np.linspace(0.7, 0.9, 2001))
    assert found.log_likelihood == pytest.approx(best, abs=1e-6)
    moved = lmm("y ~ 1", t.assign(t=7 * t["t"] + 1900), residual="ar1(t | g)", method="ml")
    assert moved.log_likelihood == pytest.approx(found.log_likelihood, rel=1e-10)
    assert moved.parameters[-1].value == pytest.approx(found.parameters[-1].value, rel=1e-6)


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([0, 1, 2.5, 0, 1, 2], "'t' is 2.5 in row 3: expected whole numbers"),
        (list("abcabc"), "found 'a' in row 1"),
        (pd.to_timedelta([1, 2, 3, 1, 2, 3], unit="D"), "holds dates or durations"),
        (
            [0, 3000001, 6000000, 0, 3000001, 6000000],
            "spans 6000000 lags: expected at most 1000000",
        ),
    ],
)
def test_times_that_have_no_whole_lags_are_refused(times, message):
    table = pd.DataFrame({"y": np.arange(6.0) ** 2, "t": times, "g": list("aaabbb")})
    with pytest.raises(InputError, match=message):
        encode("y ~ 1", table, residual="ar1(t | g)")
