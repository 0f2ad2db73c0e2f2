"""Tests of the terms of one fit, against lmerTest's tables and their own definitions."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from openreml_nn import InputError, datasets, fit_reml, glmm, lmm
from openreml_nn.covariance import ScalarMatrix
from openreml_nn.inference import anova, wald_test

FILE = Path(__file__).parents[1] / "reference" / "types.json"
REFERENCE = json.loads(FILE.read_text(encoding="utf-8"))
OATS = datasets.oats().assign(dose=lambda t: "d" + t["nitro"].astype(str))
OATS["w"] = np.resize(["p", "q", "q", "p", "q"], 72)
OATS = OATS.drop(index=[i - 1 for i in (1, 5, 9, 20, 33, 50, 51)])
LOST = [*range(1, 9), *range(15, 20), 33, 47, *range(101, 105)]
SLEEP = datasets.sleepstudy().drop(index=[i - 1 for i in LOST])
SLEEP["late"] = np.where(SLEEP["Days"] > 5, "late", "early")
FORMULAS = {
    "slopes": "yield ~ nitro * Variety + (1 | Block/Variety)",
    "doses": "yield ~ dose * Variety + (1 | Block/Variety)",
    "three": "yield ~ dose * Variety * w + (1 | Block)",
    "additive": "yield ~ nitro + Variety + (1 | Block)",
    "poly": "Reaction ~ poly(Days, 2) + late + (1 | Subject)",
}


@cache
def fitted(formula):
    return lmm(formula, SLEEP if formula.startswith("Reaction") else OATS)


@pytest.mark.parametrize("kind", [1, 2, 3])
@pytest.mark.parametrize("name", FORMULAS)
def test_tables_of_all_types_equal_lmertest(name, kind):
    found = anova(fitted(FORMULAS[name]), type=kind)
    expected = pd.DataFrame(REFERENCE["tables"][name]["I" * kind])
    assert found["name"].tolist() == expected["name"].tolist()
    assert found["num_df"].tolist() == expected["num_df"].tolist()
    # lme4's estimates are those of its optimizer's tolerance.
    np.testing.assert_allclose(found["statistic"], expected["F"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["den_df"], expected["den_df"], rtol=1e-4)
    np.testing.assert_allclose(found["p"], expected["p"], rtol=1e-4)


def test_a_table_by_kenward_and_roger_equals_lmertest():
    found = anova(fitted(FORMULAS["slopes"]), ddf="kenward-roger")
    expected = pd.DataFrame(REFERENCE["kenward_roger"])
    np.testing.assert_allclose(found["statistic"], expected["F"], rtol=1e-5)
    np.testing.assert_allclose(found["den_df"], expected["den_df"], rtol=1e-5)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("dose * Variety * w", "C(dose, contr.sum) * C(Variety, contr.helmert) * w"),
        ("dose * Variety * w", "w * Variety * dose"),
        ("dose * Variety * w", "(dose + Variety + w)^2 + Variety:w:dose"),
        ("nitro * Variety", "I(10 * nitro) * Variety"),
    ],
)
@pytest.mark.parametrize("kind", [2, 3])
def test_coding_order_and_units_do_not_matter(one, other, kind):
    # Satterthwaite's joint degrees of freedom depend on the coding, Kenward and Roger's do not.
    first, second = (
        anova(fitted(f"yield ~ {x} + (1 | Block)"), type=kind, ddf="kenward-roger")
        for x in (one, other)
    )

    def by_term(table):
        plain = table["name"].str.replace(
            r"C\((\w+), [\w.]+\)|I\(10 \* (\w+)\)", r"\1\2", regex=True
        )
        return table.assign(name=[":".join(sorted(n.split(":"))) for n in plain]).set_index("name")

    second = by_term(second).loc[by_term(first).index]
    for column in ("statistic", "den_df"):
        np.testing.assert_allclose(by_term(first)[column], second[column], rtol=1e-6)


def test_the_last_term_is_the_same_by_all_types():
    result = fitted(FORMULAS["three"])
    last = [anova(result, type=kind).iloc[-1] for kind in (1, 2, 3)]
    assert last[0]["statistic"] == pytest.approx(last[2]["statistic"], rel=1e-8)
    assert last[1]["statistic"] == pytest.approx(last[2]["statistic"], rel=1e-8)
    names = [n for n in result.fixed.names if n.count(":") == 2]
    assert wald_test(result, names).statistic == pytest.approx(last[0]["statistic"], rel=1e-8)


def test_levels_within_levels_and_no_intercept():
    nested = anova(fitted("yield ~ Variety / w + (1 | Block)"))
    assert nested["name"].tolist() == ["Variety", "Variety:w"]
    assert nested["num_df"].tolist() == [2, 3]
    crossed = anova(fitted("yield ~ Variety * w + (1 | Block)"))
    assert nested["statistic"][0] == pytest.approx(crossed["statistic"][0], rel=1e-7)
    result = fitted("yield ~ 0 + Variety + (1 | Block)")
    test = wald_test(result, result.fixed.names)
    for kind in (1, 2, 3):
        found = anova(result, type=kind).iloc[0]
        assert found["num_df"] == 3
        assert found["statistic"] == pytest.approx(test.statistic, rel=1e-8)


def test_empty_cells_have_no_type_three_but_the_others():
    table = OATS[~((OATS["dose"] == "d0.2") & (OATS["Variety"] == "Victory"))]
    with pytest.warns(RuntimeWarning, match="rank deficient"):
        result = lmm("yield ~ dose * Variety + (1 | Block)", table)
    with pytest.raises(InputError, match=r"`type` is 3, .*'dosed0.2:VarietyVictory' was dropped"):
        anova(result)
    for kind in (1, 2):
        assert anova(result, type=kind)["num_df"].tolist() == [3, 2, 5]


def test_options_that_have_no_effect_are_refused():
    one = fitted(FORMULAS["additive"])
    y, X = torch.randn(20).double(), torch.ones(20, 1).double()
    plain = fit_reml(ScalarMatrix(20).double(), y, X)
    for call, message in (
        (lambda: anova(), "`results` is empty: expected a fit"),
        (lambda: anova(one, refit=True), "`refit` is for several fits"),
        (lambda: anova(one, one, type=3), "`type` is for one fit"),
        (lambda: anova(one, one, ddf="asymptotic"), "`ddf` is for one fit"),
        (lambda: anova(one, type=4), "`type` is 4: expected 1, 2 or 3"),
        (lambda: anova(one, ddf="exact"), "`ddf` is 'exact'"),
        (lambda: anova(plain), "`result` has no formula"),
    ):
        with pytest.raises(InputError, match=message):
            call()
    with pytest.raises(TypeError, match="`type` is 'III'"):
        anova(one, type="III")


def test_terms_are_called_as_their_coefficients_are():
    n = 40
    x, z = torch.linspace(-1, 1, n).numpy(), np.arange(n) * 7 % 11
    own = {"my x": x, "z": z, "my x:z": np.arange(n) * 5 % 13, "g": np.arange(n) % 8}
    table = pd.DataFrame({"y": np.arange(n) * 3 % 17, **own})
    result = lmm("y ~ `my x` * log(z + 1) + (1 | g)", table)
    names = [name for name in result.fixed.names if name != "(Intercept)"]
    assert names == ["my x", "log(z + 1)", "my x:log(z + 1)"]
    for kind in (1, 2, 3):
        assert anova(result, type=kind)["name"].tolist() == names
    alike = lmm("y ~ `my x` * z + `my x:z` + (1 | g)", table)
    assert set(anova(alike)["name"]) == {"my x", "z", "`my x`:z", "`my x:z`"}


def test_a_fit_of_an_intercept_has_no_term_to_test():
    assert len(anova(fitted("yield ~ 1 + (1 | Block)"))) == 0


@pytest.mark.parametrize("kind", [1, 2, 3])
def test_thresholds_stand_for_the_intercept_of_an_ordinal_response(kind):
    rng = np.random.default_rng(2)
    table = pd.DataFrame({"x": rng.normal(size=90), "f": np.tile(list("abc"), 30)})
    table["g"] = np.repeat(np.arange(15), 6)
    table["y"] = np.digitize(table["x"] + rng.logistic(size=90), [-1.0, 0.5])
    found = []
    for names in ({}, {"a": "z"}):
        other = table.assign(f=table["f"].replace(names))
        fit = glmm("y ~ x * f + (1 | g)", other, family="ordinal")
        found.append(anova(fit, type=kind).set_index("name")["statistic"])
    # Which level is the first is no part of the hypotheses.
    np.testing.assert_allclose(found[0], found[1], rtol=1e-3, atol=1e-4)
    assert list(found[0].index) == ["x", "f", "x:f"]
