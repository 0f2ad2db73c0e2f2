"""Values of expressions: R's functions, numbers of every storage, the left side."""

from decimal import Decimal

import numpy as np
import pandas as pd
import pytest
import torch

from openreml_nn import InputError, lmm
from openreml_nn.table import Encoder, parse_formula, read_table
from openreml_nn.table.bases import contrast_matrix

RNG = np.random.default_rng(0)
N = 60
TABLE = pd.DataFrame(
    {
        "y": RNG.normal(size=N),
        "x": RNG.normal(size=N) + 3,
        "z": RNG.uniform(1, 2, N),
        "f": np.array(list("abc"))[np.arange(N) % 3],
        "h": np.array(list("uv"))[np.arange(N) // 3 % 2],
        "k": np.arange(N) % 4 + 1,
        "b": np.arange(N) % 4 > 1,
        "total.fruits": RNG.poisson(9, N) + 1,
        "my x": RNG.normal(size=N),
        "g": np.arange(N) % 6,
    }
)


def column(text, table=TABLE):
    """The only column of a part."""
    return Encoder(f"y ~ 0 + {text}").fit(table).X[:, 0].numpy()


def names(part, table=TABLE, **options):
    return Encoder(f"y ~ {part}", **options).fit(table).names


x, z = TABLE["x"].to_numpy(), TABLE["z"].to_numpy()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("log(x)", np.log(x)),
        ("log(x, 2)", np.log2(x)),
        ("log(x, base = 10)", np.log10(x)),
        ("I(x^2)", x**2),
        ("I(x**2)", x**2),
        ("I(-x^2 + 2 * z / 4)", -(x**2) + z / 2),
        ("I(2^-1 * x)", x / 2),
        ("I(x %% 2)", x % 2),
        ("I(x %/% 2)", x // 2),
        ("pmax(x, 2 * z, 1)", np.maximum(np.maximum(x, 2 * z), 1)),
        ("pmin(x, z)", np.minimum(x, z)),
        ("ifelse(x > 3 & f == 'a', x, 0)", np.where((x > 3) & (TABLE["f"] == "a"), x, 0)),
        ("ifelse(!(f %in% c('a', 'b')), 1, z)", np.where(TABLE["f"] == "c", 1, z)),
        ("scale(x)", (x - x.mean()) / x.std(ddof=1)),
        ("scale(x, scale = FALSE)", x - x.mean()),
        ("scale(x, center = FALSE)", x / np.sqrt(x @ x / (N - 1))),
        ("center(x)", x - x.mean()),
        ("round(x, 1)", np.round(x, 1)),
        ("log(total.fruits)", np.log(TABLE["total.fruits"])),
        ("log(`total.fruits`)", np.log(TABLE["total.fruits"])),
        ("I(`my x` + x)", TABLE["my x"] + x),
        ("as.numeric(b)", TABLE["b"].astype(float)),
        ("as.numeric(x > 3)", (x > 3).astype(float)),
        ("x:z", x * z),
        *(
            (f"as.numeric(b == {true})", TABLE["b"].astype(float))
            for true in ("TRUE", "'True'", "'TRUE'")
        ),
        ("as.numeric(b %in% c('true'))", TABLE["b"].astype(float)),
    ],
)
def test_functions_have_the_values_of_r(text, expected):
    np.testing.assert_allclose(column(text), expected, rtol=1e-14)


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("f * x", ["(Intercept)", "fb", "fc", "x", "fb:x", "fc:x"]),
        ("0 + f", ["fa", "fb", "fc"]),
        ("0 + f + h", ["fa", "fb", "fc", "hv"]),
        ("f / h", ["(Intercept)", "fb", "fc", "fa:hv", "fb:hv", "fc:hv"]),
        ("x:f", ["(Intercept)", "x:fa", "x:fb", "x:fc"]),
        ("x + x:f", ["(Intercept)", "x", "x:fb", "x:fc"]),
        ("f + h + f:h", ["(Intercept)", "fb", "fc", "hv", "fb:hv", "fc:hv"]),
        ("(x + z + h)^2 - x:z", ["(Intercept)", "x", "z", "hv", "x:hv", "z:hv"]),
        ("x:z + x", ["(Intercept)", "x", "x:z"]),
        ("x + x^2 - 1", ["x"]),
        ("C(k)", ["(Intercept)", "C(k)2", "C(k)3", "C(k)4"]),
        ("factor(k) + b", ["(Intercept)", "factor(k)2", "factor(k)3", "factor(k)4", "bTRUE"]),
        ("C(f, contr.sum)", ["(Intercept)", "C(f, contr.sum)1", "C(f, contr.sum)2"]),
        ("C(f, contr.poly)", ["(Intercept)", "C(f, contr.poly).L", "C(f, contr.poly).Q"]),
        (
            "C(f, contr.treatment('b'))",
            ["(Intercept)", 'C(f, contr.treatment("b"))a', 'C(f, contr.treatment("b"))c'],
        ),
        ("relevel(f, ref = 'c')", ["(Intercept)", *(f'relevel(f, ref = "c"){v}' for v in "ab")]),
        ("cut(k, c(0, 2, 4))", ["(Intercept)", "cut(k, c(0, 2, 4))(2,4]"]),
        ("cut(k, 3)", ["(Intercept)", "cut(k, 3)(2,3]", "cut(k, 3)(3,4]"]),
        ("poly(x, 2)", ["(Intercept)", "poly(x, 2)1", "poly(x, 2)2"]),
        ("I(x > 3)", ["(Intercept)", "I(x > 3)TRUE"]),
        ("factor(b)", ["(Intercept)", "factor(b)TRUE"]),
        ("relevel(b, 'True')", ["(Intercept)", 'relevel(b, "True")FALSE']),
        ("I(x**2)", ["(Intercept)", "I(x^2)"]),
        ("x %% 2 + I(k%/%2)", ["(Intercept)", "x%%2", "I(k%/%2)"]),
        ("I(x / 100000)", ["(Intercept)", "I(x/1e+05)"]),
        ("I(x * .0001)", ["(Intercept)", "I(x * 1e-04)"]),
        ("I(x + 10000 - 0.025)", ["(Intercept)", "I(x + 10000 - 0.025)"]),
    ],
)
def test_columns_are_those_of_r(part, expected):
    assert list(names(part)) == expected


TEN = pd.DataFrame({"y": 1.0, "x": np.arange(10.0), "f": list("aabbccabca")})


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("cut(x, c(0, 2, 5, 9), include.lowest = TRUE)", {"[0,2]": 3, "(2,5]": 3, "(5,9]": 4}),
        (
            "cut(x, c(9, 0, 5, 2), right = FALSE, include.lowest = TRUE)",
            {"[0,2)": 2, "[2,5)": 3, "[5,9]": 5},
        ),
        ("cut(x, 3)", {"(-0.009,3]": 4, "(3,6]": 3, "(6,9.01]": 3}),
        ("cut(x, 3, right = FALSE)", {"[-0.009,3)": 3, "[3,6)": 3, "[6,9.01)": 4}),
        ("cut(x, 2, dig.lab = 5)", {"(-0.009,4.5]": 5, "(4.5,9.009]": 5}),
        ("cut(x, 2, labels = c('low', 'high'))", {"low": 5, "high": 5}),
        ("ifelse(x > 6, 'late', 'early')", {"early": 7, "late": 3}),
        ("ifelse(x > 6, 'late', f)", {"a": 3, "b": 2, "c": 2, "late": 3}),
        ("ifelse(x > 6, f, 'early')", {"a": 1, "b": 1, "c": 1, "early": 7}),
        ("factor(f, levels = c('c', 'a', 'b'))", {"c": 3, "a": 4, "b": 3}),
        ("relevel(ifelse(x > 6, 'late', 'early'), 'late')", {"late": 3, "early": 7}),
    ],
)
def test_levels_and_their_rows_are_those_of_r(part, expected):
    written = names(f"0 + {part}", TEN)
    counts = Encoder(f"y ~ 0 + {part}").fit(TEN).X.sum(0).tolist()
    assert counts == list(expected.values())
    for name, level in zip(written, expected, strict=True):
        assert name.endswith(level)


def test_powers_and_contrasts_by_name_are_those_of_r():
    powers = Encoder("y ~ 0 + poly(x, 3, raw = TRUE)").fit(TEN).X
    np.testing.assert_allclose(powers, np.arange(10.0)[:, None] ** [1, 2, 3])
    by_name, called = (Encoder(f"y ~ C(f, {c})").fit(TEN).X for c in ("'contr.sum'", "contr.sum"))
    assert torch.equal(by_name, called)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("cut(x, 1)", "formula .*cut.*`breaks` is 1: expected 2 or more"),
        ("cut(x, c(1, 1))", "`breaks` must be two or more distinct numbers"),
        ("cut(x, 3, labels = c('a', 'b'))", "2 `labels` for 3 intervals"),
        ("cut(y, 3)", "has one level"),
        ("factor(f, levels = c('a', 'a'))", "`levels` has one twice"),
        ("C(f, contr.none)", r"'contr.none\(\)' is not allowed"),
        ("C(f, contr.sum(base = 1))", "only contr.treatment takes an option"),
        ("C(f, contr.treatment('z'))", "base 'z' is no level"),
        ("ns(x, degree = 2)", "natural splines are cubic"),
        ("bs(y, 4)", "all values are equal"),
        ("bs(x, 2)", "`df` is too small for this degree"),
        ("log(poly(x, 2))", "has 2 columns: expected one"),
        ("log('a')", "is no term: it has no column"),
        ("I(x + 'a')", "is no number"),
        ("log(ifelse(x > 1, f, 'a'))", "has labels: expected numbers"),
        ("scale(y)", "the scale is zero"),
    ],
)
def test_what_functions_cannot_take_is_said(part, message):
    with pytest.raises(InputError, match=message):
        Encoder(f"y ~ {part}").fit(TEN)


def test_an_interaction_without_its_margins_is_coded_as_in_r():
    encoded = Encoder("y ~ f:h").fit(TABLE)
    assert encoded.names == ("(Intercept)", *(f"f{a}:h{b}" for b in "uv" for a in "abc"))
    assert encoded.X[:, 1:].sum(1).tolist() == [1.0] * N


def test_a_dot_is_every_column_that_is_not_named_elsewhere():
    table = TABLE[["y", "x", "f", "z", "g", "b"]]
    encoder = Encoder("log(y + 9) ~ . - z + (0 + b | g)")
    assert encoder.fit(table).names == ("(Intercept)", "x", "fb", "fc")
    assert encoder.transform(table.drop(columns=["y", "z"])).names == encoder.fit(table).names
    with pytest.raises(InputError, match="right side only"):
        parse_formula(". ~ x")


def test_contrasts_are_those_of_r():
    root = 0.5**0.5
    expected = {
        "contr.sum": [[1, 0], [0, 1], [-1, -1]],
        "contr.helmert": [[-1, -1], [1, -1], [0, 2]],
        "contr.poly": [[-root, 6**-0.5], [0, -2 * 6**-0.5], [root, 6**-0.5]],
        "contr.sdif": [[-2 / 3, -1 / 3], [1 / 3, -1 / 3], [1 / 3, 2 / 3]],
    }
    for name, matrix in expected.items():
        np.testing.assert_allclose(contrast_matrix("abc", (name, {}))[0], matrix, atol=1e-15)


HEIGHT = pd.DataFrame({"y": RNG.normal(size=15), "height": np.arange(58.0, 73)})


def test_splines_are_those_of_r():
    """The second row of R's bs and ns of women$height with df = 5."""
    b = Encoder("y ~ 0 + bs(height, df = 5)").fit(HEIGHT).X
    expected = torch.tensor([4.534439e-01, 5.986395e-02, 1.639942e-03, 0, 0]).double()
    expected[1] = 5.985787e-02
    torch.testing.assert_close(b[1], expected, rtol=1e-6, atol=1e-8)
    n = Encoder("y ~ 0 + ns(height, df = 5)").fit(HEIGHT).X
    expected = [7.592323e-03, 0, -8.670223e-02, 2.601067e-01, -1.734045e-01]
    torch.testing.assert_close(n[1], torch.tensor(expected).double(), rtol=1e-6, atol=1e-8)


DAYS = pd.DataFrame({"y": RNG.normal(size=6), "day": [4.0, 38, 72, 106, 310, 200]})


def test_legendre_polynomials_are_the_normalised_ones():
    """At three days of milk between 4 and 310: Masuda, Introduction to BLUPF90 (2019), example 9.1."""
    expected = [[0.7071, -1.2247, 1.5811, -1.8708, 2.1213], [0.7071, -0.9526, 0.6442, -0.0180, -0.6205],
                [0.7071, -0.6804, -0.0586, 0.7571, -0.7757]]  # fmt: skip
    whole = Encoder("y ~ 0 + legendre(day, 4, intercept = TRUE)").fit(DAYS)
    assert whole.names[0] == "legendre(day, 4, intercept = TRUE)0"
    # The source's polynomials have coefficients of four digits.
    np.testing.assert_allclose(whole.X[:3], expected, atol=5e-4)
    np.testing.assert_allclose(
        Encoder("y ~ 1 + legendre(day, 4, low = 4, high = 310)").fit(DAYS.iloc[[*range(5), 5, 1]]).X[:, 1:],
        whole.X[[*range(6), 1], 1:], atol=1e-15,
    )  # fmt: skip
    t, weight = np.polynomial.legendre.leggauss(8)  # integrals of products are exact
    square = Encoder("y ~ 0 + legendre(t, 5, -1, 1, intercept = TRUE)").fit(
        pd.DataFrame({"y": t, "t": t})
    ).X  # fmt: skip
    square = square.numpy()
    np.testing.assert_allclose(square.T @ (weight[:, None] * square), np.eye(6), atol=1e-14)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("legendre(day, 0)", "`degree` is 0: expected a whole number"),
        ("legendre(day, 2, low = 5, high = 5)", "`low` is 5 and `high` 5: expected low < high"),
        ("legendre(day, 2, low = 'a')", "`low` is 'a': expected a number"),
        ("legendre(day, 2, high = 1 / 0)", "`high` is inf: expected a number"),
    ],
)
def test_wrong_ends_of_legendre_polynomials_are_named(text, match):
    with pytest.raises(InputError, match=match):
        Encoder(f"y ~ {text}").fit(DAYS)


@pytest.mark.parametrize(
    "text", ["ns(height, 4)", "bs(height, df = 6)", "poly(height, 3)", "legendre(height, 3)"]
)
def test_bases_go_on_beyond_the_table_of_the_fit(text):
    """By what was learned: rows alone give what they gave among others, also outside of the range."""
    encoder = Encoder(f"y ~ {text}")
    first = encoder.fit(HEIGHT)
    alone = encoder.transform(HEIGHT.iloc[[4]])
    torch.testing.assert_close(alone.X, first.X[[4]], rtol=1e-12, atol=1e-13)
    order = 2 if text.startswith("ns") else 4
    for end, row in ((72.0, -1), (58.0, 0)):
        steps = np.arange(5.0) if row else -np.arange(5.0)
        outside = encoder.transform(pd.DataFrame({"height": end + steps})).X
        assert torch.diff(outside, order, dim=0).abs().max() < 1e-8
        at = pd.DataFrame({"height": end + np.array([-1e-6, 0, 1e-6])})
        near = encoder.transform(at).X
        torch.testing.assert_close(near[1], first.X[row])
        # The slope is the same on both sides.
        assert torch.diff(near, 2, dim=0).abs().max() < 1e-9


def test_polynomials_of_uneven_values_are_orthonormal():
    height = np.array([1.0, 2, 4, 8, 16, 32])
    found = Encoder("y ~ poly(h, 4)").fit(pd.DataFrame({"y": height, "h": height})).X
    expected = torch.eye(5)
    expected[0, 0] = 6
    torch.testing.assert_close(found.mT @ found, expected.to(found), rtol=0, atol=1e-12)


def test_states_are_of_the_fit():
    encoder = Encoder("y ~ scale(x) + cut(z, 3) + ns(x, 3)")
    whole = encoder.fit(TABLE).X
    for rows in ([5], [1, 59, 30]):
        torch.testing.assert_close(encoder.transform(TABLE.iloc[rows]).X, whole[rows])


# ---------------------------------------------------------------------- numbers

STORED = {
    "int8": lambda v: v.astype("int8"),
    "uint8": lambda v: v.astype("uint8"),
    "float32": lambda v: v.astype("float32"),
    "Int16": lambda v: v.astype("Int16"),
    "decimal": lambda v: pd.Series([Decimal(int(i)) for i in v], dtype=object),
    "object": lambda v: v.astype(object),
    "mixed": lambda v: pd.Series([Decimal(int(i)) if i % 2 else float(i) for i in v], dtype=object),
    "arrow": lambda v: v.astype("int64[pyarrow]"),
}


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize(
    "formula",
    ["y ~ I(k^2) + (1 | g)", "y ~ k:w + (1 | g)", "I(k^3) ~ x + (1 | g)", "y ~ (0 + k:w | g)"],
)
def test_numbers_are_float64_before_anything_is_computed(stored, formula):
    table = TABLE.assign(k=np.arange(N) % 50 + 60, w=np.arange(N) % 49 + 70)
    narrow = table.assign(k=STORED[stored](table["k"]), w=STORED[stored](table["w"]))
    wide = table.astype({"k": float, "w": float})
    found, expected = (Encoder(formula).fit(t) for t in (narrow, wide))
    assert found.names == expected.names
    torch.testing.assert_close(found.X, expected.X)
    torch.testing.assert_close(found.y, expected.y)
    torch.testing.assert_close(found.random[0].values, expected.random[0].values)


@pytest.mark.parametrize(
    ("left", "expected"),
    [
        ("y - z", TABLE["y"] - z),
        ("y^2", TABLE["y"] ** 2),
        ("y / 2", TABLE["y"] / 2),
        ("log(x) - log(z)", np.log(x) - np.log(z)),
        ("-y", -TABLE["y"]),
        ("I(y * 2)", TABLE["y"] * 2),
        ("y - 1", TABLE["y"] - 1),
        ("`my x` + `total.fruits`", TABLE["my x"] + TABLE["total.fruits"]),
        ("b", TABLE["b"].astype(float)),
    ],
)
def test_arithmetic_on_the_left_is_arithmetic(left, expected):
    np.testing.assert_allclose(Encoder(f"{left} ~ x").fit(TABLE).y, expected, rtol=1e-14)


def test_an_offset_is_a_known_part_of_the_mean():
    with_offset = lmm("y ~ x + offset(2 * z) + (1 | g)", TABLE)
    without = lmm("I(y - 2 * z) ~ x + (1 | g)", TABLE)
    assert with_offset.log_likelihood == pytest.approx(without.log_likelihood, rel=1e-12)
    torch.testing.assert_close(with_offset.residuals, without.residuals)
    torch.testing.assert_close(with_offset.fitted, without.fitted + 2 * torch.tensor(z))


@pytest.mark.parametrize("formula", ["y ~ t", "y ~ x + (0 + t | g)", "y ~ C(t)", "y ~ 1 + (1 | t)"])
@pytest.mark.parametrize("categorical", [(), ("t",)])
def test_dates_are_the_same_from_csv_and_from_parquet(tmp_path, formula, categorical):
    table = TABLE.assign(t=pd.Timestamp("2024-01-01") + pd.to_timedelta(np.arange(N) % 3, unit="D"))
    table.to_csv(tmp_path / "t.csv", index=False)
    table.to_parquet(tmp_path / "t.parquet")
    found = []
    for name in ("t.csv", "t.parquet"):
        try:
            encoded = Encoder(formula, categorical).fit(read_table(tmp_path / name))
            found.append(
                [encoded.X.tolist(), [(r.levels, r.values.tolist()) for r in encoded.random]]
            )
        except InputError as error:
            found.append(str(error))
    assert found[0] == found[1]
    is_refused = isinstance(found[0], str)
    assert is_refused == (not categorical and formula in ("y ~ t", "y ~ x + (0 + t | g)"))


def test_text_that_is_not_all_dates_is_a_factor():
    for other in ("2024-13-01", "2024-01-01b", "unknown", "20240101"):
        assert (
            len(Encoder("y ~ t").fit(TABLE.assign(t=["2024-01-01", other] * (N // 2))).names) == 2
        )


SPOILED = [f"{v:.3f}" for v in x]


@pytest.mark.parametrize(
    ("formula", "table", "message"),
    [
        ("y ~ x", TABLE.assign(x=[*SPOILED[:8], "?", *SPOILED[9:]]), r"found '\?' in row 9 among"),
        ("y ~ k", TABLE.assign(k=np.where(np.arange(N) == 3, ".", "1")), r"found '\.' in row 4"),
        ("y ~ I(f^2)", TABLE, "'f' is not numeric: found 'a' in row 1"),
        ("y ~ t", TABLE.assign(t=pd.Timestamp("2024-01-01")), "'t' holds dates"),
        ("y ~ t", TABLE.assign(t=["2024-01-01", "2024-12-31"] * (N // 2)), "'t' holds dates"),
        ("y ~ t", TABLE.assign(t="2024-01-01 12:30:00+01:00"), "'t' holds dates"),
        ("y ~ t", TABLE.assign(t=pd.Timedelta("1D")), "'t' holds dates, times or durations"),
        ("t ~ x", TABLE.assign(t=pd.Timestamp("2024-01-01")), "the response 't' is not numeric"),
        ("y ~ t", TABLE.assign(t=[[1]] * N), "'t' holds a list in each row"),
        ("y ~ t", TABLE.assign(t=[{"a": 1}] * N), "'t' holds a dict in each row"),
        ("y ~ 1 + (1 | t)", TABLE.assign(t=[[1]] * N), "'t' holds lists"),
        ("y ~ t", TABLE.assign(t=1j), "complex"),
        ("y ~ x", pd.concat([TABLE, TABLE[["x"]]], axis=1), "2 columns 'x'"),
        ("y ~ 1 + (1 | g)", pd.concat([TABLE, TABLE[["g"]]], axis=1), "2 columns 'g'"),
        ("y ~ 1", pd.concat([TABLE, TABLE[["y"]]], axis=1), "2 columns 'y'"),
        ("f ~ x", TABLE, "response 'f' is not numeric: found 'a' in row 1"),
        ("y ~ x", TABLE.assign(y=TABLE["y"] * 1e200), "of at most 1e150"),
        ("y ~ x", TABLE.assign(y=TABLE["y"] * 1e-200), "cannot square: use other units"),
        ("y ~ x", TABLE.assign(x=TABLE["x"] * 1e180), "'x' is .* of at most 1e150"),
        ("y ~ poly(x, 51)", TABLE, "from 1 to 50"),
        ("y ~ poly(k, 4)", TABLE, "less than the distinct values"),
        ("y ~ poly(x, dgree = 2)", TABLE, "unexpected keyword"),
        ("y ~ relevel(f, 'zz')", TABLE, "'zz' is no level of it"),
        ("y ~ bs(x, knots = c(-9, 99))", TABLE, "must be between"),
        ("y ~ f > 'a'", TABLE, "labels have no order"),
        ("y ~ I(9^9^9)", TABLE, "no column"),
        ("y ~ (" + " + ".join(f"I(x + {i})" for i in range(60)) + ")^9", TABLE, "2000 terms"),
        ("y ~ " + "(" * 100 + "x" + ")" * 100, TABLE, "levels of nesting"),
        ("y ~ x" + " + x" * 9000, TABLE, "characters"),
    ],
)
def test_faults_of_values_are_named(formula, table, message):
    with pytest.raises(InputError, match=message) as caught:
        Encoder(formula).fit(table)
    assert "\n" not in str(caught.value)


def test_a_text_column_that_is_told_to_be_a_factor_is_one():
    table = TABLE.assign(x=[*["1", "2", "?"] * 20])
    with pytest.raises(InputError, match=r"found '\?' in row 3 among numbers"):
        Encoder("y ~ x").fit(table)
    assert names("x", table, categorical=["x"]) == ("(Intercept)", "x2", "x?")
    assert names("x", table.astype({"x": "category"})) == ("(Intercept)", "x2", "x?")
    assert Encoder("y ~ 1 + (1 | x)").fit(table).random[0].levels == ("1", "2", "?")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([f"{i}.01.2026" for i in range(1, 13)], "column 't' holds dates"),
        ([f"1/{i}/26" for i in range(1, 13)], "column 't' holds dates"),
        (
            [f"{i}.01.26" for i in range(1, 12)] + ["?"],
            "dates, times or durations, such as '1.01.26'",
        ),
        ([f"2026-01-{i}" for i in range(10, 21)] + ["later"], "'t' holds dates, times or"),
        (
            [f"17,{i}" for i in range(11)] + ["18"],
            "text of numbers, such as '17,0' in row 1 beside '18': exp",
        ),
        ([f" 17,{i}" for i in range(12)], "text of numbers, such as ' 17,0' in row 1: expected"),
        (
            [f"1.7{i:02d},5" for i in range(12)],
            "text of numbers, such as '1.700,5' in row 1: expected",
        ),
        ([f"1,{i:03d},000" for i in range(12)], "text of numbers, such as '1,000,000' in row 1: "),
        ([f"{i}.5" for i in range(11)] + ["3,5"], "such as '3,5' in row 12 beside '0.5': expected"),
        ([f"{i}.5" for i in range(12)], "text of numbers, such as '0.5': expected"),
        ([f"17,{i}" for i in range(11)] + ["k.A."], "found 'k.A.' in row 12 among numbers"),
    ],
)
def test_text_that_is_no_factor_is_refused_among_the_effects(values, message):
    table = pd.DataFrame({"t": np.array(values * 2, dtype=object), "y": np.arange(24.0) % 7})
    with pytest.raises(InputError, match=message):
        Encoder("y ~ t").fit(table)
    for rows in (1, 5):  # in chunks that have too few values to tell
        encoder = Encoder("y ~ t")
        with pytest.raises(InputError, match=message):
            encoder.survey(table[i : i + rows] for i in range(0, len(table), rows))
    # As labels of a grouping factor, or where a factor is asked for, they are as they are.
    assert len(Encoder("y ~ 1 + (1 | t)").fit(table).random[0].levels) == 12
    assert len(names("factor(t)", table)) == len(names("t", table, categorical=["t"])) == 12


@pytest.mark.parametrize(
    "labels",
    [
        *(["1,2", "2,3"], ["1/2", "3/4"], ["1-2-3", "a"], ["10.1", "b"]),
        *(["1.0.10", "1.0.11"], ["13.13.13", "1.1.10"], ["2026-13-01", "2026-14-01"]),
    ],
)
def test_labels_with_marks_of_numbers_stay_labels(labels):
    table = pd.DataFrame({"t": np.array(labels * 6, dtype=object), "y": np.arange(12.0) % 5})
    assert len(names("t", table)) == 2


def test_dummies_are_indicators_of_levels():
    table = pd.DataFrame({"y": np.arange(6.0), "f": list("abcabc"), "g": list("uuvvww")})
    encoder = Encoder('y ~ 1 + (0 + dummy(f, "b") | g)')
    assert encoder.fit(table).random[0].values[:, 0].tolist() == [0, 1, 0, 0, 1, 0]
    assert encoder.transform(table.iloc[:1]).random[0].values.tolist() == [[0.0]]
    both = Encoder('y ~ 0 + dummy(f, c("a", "c"))').fit(table)
    assert both.X.tolist()[:3] == [[1, 0], [0, 0], [0, 1]]
    with pytest.raises(InputError, match="'z' is no level: expected one of"):
        Encoder('y ~ dummy(f, "z")').fit(table)
