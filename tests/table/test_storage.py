"""Whatever a data frame stores its columns as, and however it is arranged, the numbers are the same."""

import enum
import uuid
from decimal import Decimal

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from openreml_nn import InputError, fit_stream, lmm
from openreml_nn.inference import anova, coefficients, emmeans, influence, profile
from openreml_nn.inference.refit import matrix_entries
from openreml_nn.table import read_table, write_table

N = 120
FORMULA = "y ~ x + f + k + b + (1 | g)"
RNG = np.random.default_rng(1)
TABLE = pd.DataFrame(
    {
        "x": RNG.normal(size=N),
        "g": [f"g{i:02d}" for i in np.arange(N) % 12],
        "f": np.array(list("abc"))[np.arange(N) % 3],
        "k": np.arange(N) % 7,
        "b": RNG.random(N) > 0.5,
    }
)
TABLE["y"] = TABLE["x"] + RNG.normal(size=12)[np.arange(N) % 12] + 0.5 * RNG.normal(size=N)
FIT = lmm(FORMULA, TABLE)
PREDICTED = FIT.predict(TABLE)


def arrow(column, kind):
    return pd.Series(pd.arrays.ArrowExtensionArray(pa.chunked_array([pa.array(column, kind)])))


def with_columns(**made):
    return TABLE.assign(**{name: make(TABLE[name]) for name, make in made.items()})


STORED = {
    "columns in another order": lambda: TABLE[TABLE.columns[::-1]],
    "categories": lambda: TABLE.astype({"f": "category", "g": "category"}),
    "ordered categories": lambda: with_columns(f=lambda v: pd.Categorical(v, ordered=True)),
    "categories that are not used": lambda: with_columns(
        f=lambda v: pd.Categorical(v, list("abczq")),
        g=lambda v: pd.Categorical(v, [*sorted(set(v)), "other"]),
    ),
    "nullable": lambda: TABLE.convert_dtypes(),
    "arrow": lambda: TABLE.convert_dtypes(dtype_backend="pyarrow"),
    "arrow dictionaries": lambda: with_columns(
        **dict.fromkeys(("f", "g"), lambda v: arrow(pa.array(v).dictionary_encode(), None))
    ),
    "large strings": lambda: with_columns(g=lambda v: arrow(v, pa.large_string())),
    "bytes": lambda: with_columns(g=lambda v: [item.encode() for item in v]),
    "arrow decimals": lambda: with_columns(
        k=lambda v: arrow([Decimal(int(i)) for i in v], pa.decimal128(20, 0))
    ),
    "half precision": lambda: with_columns(k=lambda v: v.astype("float16")),
    "sparse": lambda: with_columns(k=pd.arrays.SparseArray, b=pd.arrays.SparseArray),
    "objects": lambda: TABLE.astype(object),
    "true and false in text": lambda: with_columns(b=lambda v: v.map({True: "T", False: "F"})),
    "identifiers": lambda: with_columns(g=lambda v: [uuid.UUID(int=int(i[1:])) for i in v]),
    "periods": lambda: with_columns(
        f=lambda v: pd.PeriodIndex(["2020-01", "2020-02", "2020-03"] * 40, freq="M")
    ),
    "members of an enumeration": lambda: with_columns(
        f=lambda v: [enum.Enum("Kind", "a b c")[item] for item in v]
    ),
    "an index of several columns": lambda: TABLE.set_index(["g", "k"], drop=False),
    "an index of one value": lambda: TABLE.set_index(np.zeros(N, dtype=int)),
    "an index named like a column": lambda: TABLE.set_index("g", drop=False),
}


@pytest.mark.parametrize("stored", STORED)
def test_fit_and_predictions_do_not_depend_on_the_storage(stored):
    table = STORED[stored]()
    found = lmm(FORMULA, table)
    assert found.log_likelihood == pytest.approx(FIT.log_likelihood, abs=1e-9)
    np.testing.assert_allclose(found.fixed.estimate, FIT.fixed.estimate, rtol=1e-9)
    predicted = found.predict(table)
    assert predicted.index.equals(table.index)
    np.testing.assert_allclose(predicted, PREDICTED, rtol=1e-9)
    if stored not in (
        "true and false in text",
        "identifiers",
        "periods",
        "members of an enumeration",
    ):  # other labels
        np.testing.assert_allclose(FIT.predict(table), PREDICTED, rtol=1e-9)


LEVELS = ["a:b", "a=b", "a\nb", "a\r\nb", "a\tb", "a\0b", "  ", "[red]x", "'", '"', "`", "a,b"]
LEVELS += ["a|b", "nan", "None", "inf", "1e5", "01", "True", "=1+1", "\x1b[31m", "💩", "x" * 500]


@pytest.mark.parametrize("i", range(0, len(LEVELS), 3))
def test_a_level_may_be_spelled_in_any_way(tmp_path, i):
    """All levels of a factor of the fixed effects, and as many of a grouping factor."""
    spelled = [LEVELS[(i + j) % len(LEVELS)] for j in range(3)]
    names = dict(zip([*"abc", "g03", "g07", "g09"], spelled * 2, strict=True))
    table = TABLE.assign(f=TABLE["f"].replace(names), g=TABLE["g"].replace(names))
    write_table(table, tmp_path / "t.csv")
    assert read_table(tmp_path / "t.csv")["g"].tolist() == table["g"].tolist()
    chunks = fit_stream(FORMULA, tmp_path / "t.csv", chunk_rows=50, progress=False)
    for found in (lmm(FORMULA, table), chunks):
        assert found.log_likelihood == pytest.approx(FIT.log_likelihood, abs=1e-8)
        assert set(spelled) < set(found.components[0].levels)
        np.testing.assert_allclose(found.predict(table)["mean"], PREDICTED["mean"], rtol=1e-6)


NAMES = ["log", "C", "factor", "units", "residual", "Residual", "cs", "ar1", "I", "T", "NA", "1"]
NAMES += ["(Intercept)", "mean", "level", "index", "x:y", "a|b", "a~b", "a\nb", " lead", "..", "é"]


@pytest.mark.parametrize("i", range(len(NAMES)))
def test_a_column_may_have_any_name(i):
    """Each name is that of a factor of levels, of a covariate and of a factor in turn."""
    formula, names = FORMULA, {column: NAMES[i - j] for j, column in enumerate("gxf")}
    for column, name in names.items():
        formula = formula.replace(f" {column} ", f" `{name}` ").replace(
            f" {column})", f" `{name}`)"
        )
    table = TABLE.rename(columns=names)
    found = lmm(formula, table)
    assert found.log_likelihood == pytest.approx(FIT.log_likelihood, abs=1e-9)
    np.testing.assert_allclose(found.predict(table), PREDICTED, rtol=1e-9)


@pytest.mark.parametrize("written", ["total.fruits", "`total.fruits`"])
@pytest.mark.parametrize("formula", ["log({}) ~ x + (1 | g)", "y ~ log({}) + ({} | g)"])
def test_names_with_dots_work_in_functions(formula, written):
    table = TABLE.assign(**{"total.fruits": 1.0 + TABLE["k"], "fruits": 1.0 + TABLE["k"]})
    found = lmm(formula.replace("{}", written), table)
    expected = lmm(formula.replace("{}", "fruits"), table)
    assert found.log_likelihood == pytest.approx(expected.log_likelihood, abs=1e-9)
    np.testing.assert_allclose(found.predict(table), expected.predict(table), rtol=1e-9)


def test_a_group_may_have_the_name_of_the_residual():
    table = TABLE.rename(columns={"g": "Residual"})
    found = lmm(FORMULA.replace("g)", "Residual)"), table)
    assert [c.group for c in found.components] == ["Residual", "Residual"]
    assert [c.is_residual for c in found.components] == [False, True]
    assert found.groups == {"Residual": 12}
    assert found.residual_variance == pytest.approx(FIT.residual_variance, rel=1e-9)
    record = found.to_dict()
    assert [(c["group"], c["levels"]) for c in record["random"]] == [("Residual", 12)]
    assert record["residual"] == FIT.to_dict()["residual"]
    cases, own = influence(found, by="Residual"), influence(FIT, by="g")
    np.testing.assert_allclose(
        cases.select_dtypes("number"), own.select_dtypes("number"), rtol=1e-6, atol=1e-9
    )


def test_weights_and_categorical_columns_may_stand_in_backticks():
    table = TABLE.assign(**{"my weight": 1 + TABLE["k"], "dose level": TABLE["k"]})
    options = {"weights": "my weight", "categorical": ["dose level"]}
    expected = lmm("y ~ x + `dose level` + (1 | g)", table, **options)
    quoted = {"weights": "`my weight`", "categorical": ["`dose level`"]}
    found = lmm("y ~ x + `dose level` + (1 | g)", table, **quoted)
    assert len(found.fixed.names) == 8
    assert found.log_likelihood == expected.log_likelihood
    means = emmeans(found, "`dose level`").table
    assert means["estimate"].tolist() == emmeans(expected, "dose level").table["estimate"].tolist()


def test_two_effects_of_one_name_are_told_apart_by_a_number():
    """Level b of f and the column fb have the same name in R."""
    table = TABLE.assign(fb=TABLE["x"], z=TABLE["x"])
    found, expected = (lmm(f"y ~ f + {name} + (1 | g)", table) for name in ("fb", "z"))
    assert found.fixed.names == ("(Intercept)", "fb", "fc", "fb.1")
    np.testing.assert_allclose(found.fixed.estimate, expected.fixed.estimate, rtol=1e-9)
    assert coefficients(found)["name"].tolist() == list(found.fixed.names)
    assert anova(found)["name"].tolist() == ["f", "fb"]
    (low, high), own = (
        profile(found, names=["fb.1"]).intervals()[["low", "high"]].iloc[0],
        coefficients(expected).set_index("name").loc["z"],
    )
    assert low < own["estimate"] < high
    assert (low, high) == pytest.approx((own["low"], own["high"]), rel=0.02)


def test_two_terms_of_one_group_are_told_apart_by_a_number():
    """The permanent environment of an animal beside its breeding value, from one column."""
    names = sorted(set(TABLE["g"]))
    kinship = pd.DataFrame(np.eye(12) + 0.3 * (np.arange(12)[:, None] // 4 == np.arange(12) // 4),
                           names, names)  # fmt: skip
    found = lmm("y ~ x + (1 | vm(g, K)) + (1 | g)", TABLE, kernels={"K": kinship})
    assert list(matrix_entries(found)) == ["sd_(Intercept)|g", "sd_(Intercept)|g.1", "sigma"]
    assert [entry[0] for entry in matrix_entries(found).values()] == [0, 1, 2]


def test_names_of_columns_that_are_no_text_are_pointed_out():
    with pytest.raises(InputError, match=r"no column '0'.*; the name 0 is a int: expected text"):
        lmm("y ~ `0` + (1 | g)", TABLE.rename(columns={"k": 0}))
    with pytest.raises(InputError, match=r"the name \('a', 'x'\) is a tuple: expected text"):
        lmm(FORMULA, TABLE.set_axis(pd.MultiIndex.from_product([["a"], TABLE.columns]), axis=1))
