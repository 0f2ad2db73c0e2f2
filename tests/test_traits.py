"""``cbind(y1, y2) ~ …``: several responses of a row are rows of their own, and no more than that."""

import json
import pickle
import re
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from lightning import Trainer

from openreml_nn import InputError, glmm, lmm, restricted_log_likelihood
from openreml_nn.covariance import Pedigree
from openreml_nn.inference import emmeans
from openreml_nn.lightning import MixedModelDataModule, MixedModule
from openreml_nn.table import Encoder, parse_formula
from tests.forked import program

ANIMALS = [f"a{i}" for i in range(30)]
PEDIGREE = pd.DataFrame(
    {
        "animal": ANIMALS,
        "sire": [None] * 6 + [f"a{i % 3}" for i in range(24)],
        "dam": [None] * 6 + [f"a{3 + i % 5}" for i in range(24)],
    }
)


def made(seed=2, n=90):
    rng = np.random.default_rng(seed)
    table = pd.DataFrame({"x": rng.normal(size=n), "f": rng.choice(list("abc"), n)})
    table["animal"] = np.array(ANIMALS)[rng.integers(0, 30, n)]
    own = rng.normal(size=(30, 2)) @ np.array([[1.0, 0.0], [0.5, 0.8]]).T
    error = rng.normal(size=(n, 2)) @ np.array([[1.0, 0.0], [0.3, 1.2]]).T
    y = own[table["animal"].str[1:].astype(int)] + error + table[["x"]].to_numpy() * [0.5, -1]
    table["weight"], table["height"] = y[:, 0] + 3, y[:, 1]
    return table


WHOLE = made()
TABLE = WHOLE.copy()
TABLE.loc[::7, "height"] = np.nan
TABLE.loc[3::14, "weight"] = np.nan


def long(table=TABLE):
    kept = table.rename_axis("row").reset_index()
    found = kept.melt(["row", "x", "f", "animal"], ["weight", "height"], "t", "y").dropna()
    # Levels in the order of the responses, which is not that of the alphabet.
    return found.assign(t=pd.Categorical(found["t"], ["weight", "height"])).reset_index(drop=True)


TWO_WAYS = {
    "x": ("cbind(weight, height) ~ x", None, "y ~ 0 + t + t:x", "us(t | row)"),
    "factor": (
        "cbind(weight, height) ~ x * f + us(trait | animal)", None,
        "y ~ 0 + t + t:x + t:f + t:x:f + us(0 + t | animal)", "us(t | row)",
    ),
    "group": (
        "cbind(weight, height) ~ x + (1 | animal)", None,
        "y ~ 0 + t + t:x + us(0 + t | animal)", "us(t | row)",
    ),
    "diag": (
        "cbind(weight, height) ~ x + diag(trait | animal)", "diag(trait)",
        "y ~ 0 + t + t:x + diag(0 + t | animal)", "diag(t)",
    ),
    "pedigree": (
        "cbind(weight, height) ~ 1 + us(trait | ped(animal))", "us(trait | unit)",
        "y ~ 0 + t + us(0 + t | ped(animal))", "us(t | row)",
    ),
    "common": (
        "cbind(weight, height) ~ trait + x + (1 + trait | animal)", None,
        "y ~ t + x + (1 + t | animal)", "us(t | row)",
    ),
    "slopes": (
        "cbind(weight, height) ~ 0 + x + diag(0 + x | animal)", None,
        "y ~ 0 + t:x + diag(0 + t:x | animal)", "us(t | row)",
    ),
    "all": (
        "cbind(weight, height) ~ . - animal - f", None, "y ~ 0 + t + t:x", "us(t | row)",
    ),
    "offset": (
        "cbind(weight, height) ~ f + offset(x / 2)", None,
        "y ~ 0 + t + t:f + offset(x / 2)", "us(t | row)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("method", ["reml", "ml"])
@pytest.mark.parametrize("name", TWO_WAYS)
def test_responses_of_a_row_are_rows_of_a_long_table(name, method):
    formula, residual, by_hand, own = TWO_WAYS[name]
    options = {"pedigree": PEDIGREE} if "ped(" in formula else {}
    stack = long()
    found = lmm(formula, TABLE, residual=residual, method=method, **options)
    expected = lmm(by_hand, stack, residual=own, method=method, **options)
    assert found.log_likelihood == pytest.approx(expected.log_likelihood, abs=1e-7)
    assert found.rows == expected.rows == len(stack)
    names = [re.sub(r"\bt(?=weight|height)", "trait", n) for n in expected.fixed.names]
    assert list(found.fixed.names) == names
    torch.testing.assert_close(found.fixed.estimate, expected.fixed.estimate, rtol=1e-5, atol=1e-6)
    for one, other in zip(found.components, expected.components, strict=True):
        torch.testing.assert_close(one.covariance, other.covariance, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["reml", "ml"])
def test_the_likelihood_is_that_of_the_dense_covariance(method):
    found = lmm(
        "cbind(weight, height) ~ x + us(trait | ped(animal))", TABLE, pedigree=PEDIGREE,
        method=method,
    )  # fmt: skip
    G, R = (c.covariance.numpy() for c in found.components)
    stack = long()
    pedigree = Pedigree.of(*(PEDIGREE[c].tolist() for c in PEDIGREE))
    A = pd.DataFrame(torch.linalg.inv(pedigree.inverse.to_dense()).numpy(), *[pedigree.names] * 2)
    t, row = stack["t"].cat.codes.to_numpy(), stack["row"].to_numpy()
    V = G[np.ix_(t, t)] * A.loc[stack["animal"], stack["animal"]].to_numpy()
    V = V + R[np.ix_(t, t)] * (row[:, None] == row)
    X = np.stack([t == 0, t == 1, (t == 0) * stack["x"], (t == 1) * stack["x"]], 1).astype(float)
    y, X, V = torch.tensor(stack["y"].to_numpy()), torch.tensor(X), torch.tensor(V)
    expected = float(restricted_log_likelihood(y, X, V))
    if method == "ml":
        rest = y - X @ found.fixed.estimate
        expected = float(torch.distributions.MultivariateNormal(y * 0, V).log_prob(rest))
    assert found.log_likelihood == pytest.approx(expected, abs=1e-8)


def test_without_random_effects_it_is_the_multivariate_regression():
    """Each response has the coefficients of its own regression, the errors their covariance."""
    found = lmm("cbind(weight, height) ~ x + f", WHOLE, method="ml")
    X = Encoder("weight ~ x + f").fit(WHOLE).X.numpy()
    Y = WHOLE[["weight", "height"]].to_numpy()
    B = np.linalg.lstsq(X, Y, rcond=None)[0]
    S = (Y - X @ B).T @ (Y - X @ B) / len(Y)
    expected = -len(Y) / 2 * (2 * np.log(2 * np.pi) + np.log(np.linalg.det(S)) + 2)
    assert found.log_likelihood == pytest.approx(expected, abs=1e-8)
    np.testing.assert_allclose(found.fixed.estimate, B.reshape(-1), rtol=1e-7)
    np.testing.assert_allclose(found.components[-1].covariance, S, rtol=1e-5)


def test_weights_of_calves_before_and_after_weaning():
    """Mrode, Linear Models for the Prediction of Animal Breeding Values (2014), example 5.1: two
    traits of five calves, their covariances known, by the mixed-model equations."""
    calves = pd.DataFrame({"animal": list("45678"), "sex": list("MFFMM")})
    calves["wwg"], calves["pwg"] = [4.5, 2.9, 3.9, 3.5, 5.0], [6.8, 5.0, 6.8, 6.0, 7.5]
    pedigree = pd.DataFrame({"animal": list("12345678")})
    pedigree["sire"] = [None, None, None, "1", "3", "1", "4", "3"]
    pedigree["dam"] = [None, None, None, None, "2", "2", "5", "6"]
    known = {"animal": [[20.0, 18.0], [18.0, 40.0]], "residual": [[40.0, 11.0], [11.0, 30.0]]}
    constraints = {
        f"{name}/L_{i}_{j}": np.linalg.cholesky(matrix)[i, j]
        for name, matrix in known.items()
        for i, j in ((0, 0), (1, 0), (1, 1))
    }
    found = lmm(
        "cbind(wwg, pwg) ~ sex - 1 + us(trait | ped(animal))", calves, pedigree=pedigree,
        constraints=constraints,
    )  # fmt: skip
    assert found.num_params == 0
    fixed = dict(zip(found.fixed.names, found.fixed.estimate.tolist(), strict=True))
    assert fixed == pytest.approx(
        {
            "traitwwg:sexM": 4.361, "traitwwg:sexF": 3.397,
            "traitpwg:sexM": 6.800, "traitpwg:sexF": 5.880,
        },
        abs=5e-4,
    )  # fmt: skip
    wwg = [0.151, -0.015, -0.078, -0.010, -0.270, 0.276, -0.316, 0.244]
    pwg = [0.280, -0.008, -0.170, -0.013, -0.478, 0.517, -0.479, 0.392]
    np.testing.assert_allclose(found.random[0].values, np.stack([wwg, pwg], 1), atol=5e-4)
    assert pickle.loads(pickle.dumps(found)).log_likelihood == found.log_likelihood


def test_predictions_have_a_row_for_each_response():
    found = lmm("cbind(weight, height) ~ x + us(trait | animal)", TABLE)
    rows = pd.DataFrame({"x": [0.0, 1.0], "animal": ["a7", "a8"]}, index=["p", "q"])
    table = found.predict(rows)
    assert table.index.tolist() == ["p", "p", "q", "q"]
    assert table["trait"].tolist() == ["weight", "height"] * 2
    by_hand = lmm("y ~ 0 + t + t:x + us(0 + t | animal)", long(), residual="us(t | row)")
    stack = rows.loc[rows.index.repeat(2)].assign(t=["weight", "height"] * 2)
    expected = by_hand.predict(stack)
    np.testing.assert_allclose(table.drop(columns="trait"), expected, rtol=1e-4)
    means = emmeans(found, ["trait"]).table
    assert means["name"].tolist() == ["weight", "height"]


def test_rows_without_any_response_are_left_out_with_a_word():
    table = TABLE.assign(height=TABLE["height"].where(TABLE.index > 1), weight=TABLE["weight"])
    table.loc[:1, "weight"] = np.nan
    table.loc[5, "x"] = np.nan
    with pytest.warns(RuntimeWarning) as told:
        found = lmm("cbind(weight, log(exp(height))) ~ x", table)
    assert {str(w.message) for w in told} == {
        "the table: 2 of 90 rows left out, which have no response",
        "the table: 2 of 157 rows left out, which miss a value: the first 'x' in row 6",
    }
    assert found.dropped_rows == 3
    assert found.fixed.names[1] == "traitlog(exp(height))"


def test_the_module_and_the_program_fit_and_predict_as_lmm_does(tmp_path):
    formula = "cbind(weight, height) ~ x + us(trait | animal)"
    fit = lmm(formula, TABLE)
    module, data = MixedModule(formula), MixedModelDataModule(TABLE, formula)
    Trainer(
        max_epochs=60, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    ).fit(module, data)  # fmt: skip
    assert module.result.log_likelihood == pytest.approx(fit.log_likelihood, abs=1e-7)
    TABLE.to_csv(tmp_path / "t.csv", index=False)
    quick = ["logger=none", "plots=false", "trainer.enable_progress_bar=false", "hydra.run.dir=r"]
    done = program(*quick, "data.path=t.csv", f"model.formula={formula}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "r" / "result.json").read_text())
    assert record["fit"]["log_likelihood"] == pytest.approx(fit.log_likelihood, abs=1e-7)
    assert record["random"][0]["effects"] == ["traitweight", "traitheight"]
    done = program(
        "predict", "data.path=t.csv", "checkpoint=r/model.ckpt", "hydra.run.dir=p", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    found = pd.read_csv(tmp_path / "p" / "predictions.csv")
    expected = fit.predict(TABLE)
    assert found["trait"].tolist() == expected["trait"].tolist()
    np.testing.assert_allclose(found["mean"], expected["mean"], rtol=1e-5)


@pytest.mark.parametrize(
    ("formula", "options", "message"),
    [
        ("cbind(y) ~ x", {}, "cbind() holds 'y': expected two or more different responses"),
        ("cbind(y, y) ~ x", {}, "cbind() holds 'y', 'y': expected two or more"),
        ("cbind(y, 1) ~ x", {}, "the response '1' has no column"),
        ("cbind(y, trait) ~ x", {}, "the response 'trait' uses 'trait', which cbind() makes"),
        ("cbind(y, z) ~ x", {"table": "trait"}, "has a column 'trait', which cbind() makes"),
        ("cbind(y, z) ~ x", {"table": "unit"}, "has a column 'unit', which cbind() makes"),
        ("cbind(y, z) ~ (1 | spline(x))", {}, "beside cbind() is not supported"),
        (
            "cbind(y, z) ~ x",
            {"residual_variance": 1.0},
            "`residual_variance` is of residuals of one",
        ),
        ("cbind(y, w) ~ x", {}, "has no column 'w'"),
        ("cbind(y, f) ~ x", {}, "is not numeric"),
        ("log(cbind(y, z)) ~ x", {}, "'cbind()' is not allowed"),
        ("cbind(y, z) ~ x", {"empty": "z"}, "no complete row has the response 'z'"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(formula, options, message):
    options = dict(options)
    table = WHOLE.rename(columns={"weight": "y", "height": "z"})
    if "table" in options:
        table = table.assign(**{options.pop("table"): 1.0})
    if "empty" in options:
        table = table.assign(**{options.pop("empty"): np.nan})
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        lmm(formula, table, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("response", "of", "names"),
    [
        ("cbind(weight, later)", lambda t: t["weight"] + 5, "'weight', 'later'"),
        ("cbind(later, weight)", lambda t: 1e-3 * (7 - 2 * t["weight"]), "'later', 'weight'"),
        ("cbind(weight, height, later)", lambda t: t["weight"] - 3 * t["x"], "'weight', 'later'"),
        (
            "cbind(weight, height, later)",
            lambda t: t["weight"] + t["height"],
            "'weight', 'height', 'later'",
        ),
    ],
)
def test_responses_that_the_others_tell_are_refused_at_once(response, of, names):
    table = made()
    table["later"] = of(table)
    with pytest.raises(InputError, match=f"the responses {names} have a combination"):
        lmm(f"{response} ~ x + (1 | animal)", table)
    # Where something is left the covariance is regular.
    table.loc[3, "later"] += 1e-3 * table["later"].std()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert lmm(f"{response} ~ x + (1 | animal)", table, max_iterations=1).iterations == 1


def test_a_response_that_differs_where_no_coefficient_says_so_is_fitted():
    # All fixed effects are shared, so that the difference of the means is one of the residuals.
    table = made(n=60)
    table["later"] = table["weight"] + 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = lmm("cbind(weight, later) ~ 0 + trait:x + (1 | f)", table, max_iterations=1)
    assert found.rows == 120


def test_no_more_rows_are_no_change():
    fit = lmm("cbind(weight, height) ~ x", WHOLE, residual="diag(trait)")
    again = fit.update(WHOLE.iloc[:0])
    assert again.rows == fit.rows
    assert again.log_likelihood == pytest.approx(fit.log_likelihood, abs=1e-9)


def test_chunks_are_refused(tmp_path):
    WHOLE.to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(InputError, match=r"cbind\(\) is not for a table in chunks"):
        lmm("cbind(weight, height) ~ x", tmp_path / "t.csv", chunk_rows=20)


def test_formulas_say_their_responses():
    formula = parse_formula("cbind(a, b = log(y2)) ~ x + offset(w) + (1 | g)")
    assert [name for name, _ in formula.traits] == ["a", "b"]
    assert str(formula.fixed) == "0 + trait + trait:x"
    assert str(formula.random[0]) == "(0 + trait | g)"


def test_several_responses_are_not_for_chunks_splines_or_more_rows(tmp_path):
    """Each is refused in a line of its own, for what it is."""
    rng = np.random.default_rng(0)
    rows = pd.DataFrame(rng.standard_normal((60, 3)), columns=["a", "b", "x"]).assign(
        g=np.arange(60) % 6
    )
    rows.to_csv(tmp_path / "rows.csv", index=False)
    formula = "cbind(a, b) ~ x + (1 | g)"
    fit = lmm(formula, rows[:50])
    refused = {
        "takes up no further rows: fit all": lambda: fit.update(rows[50:]),
        "is not for a table in chunks": lambda: lmm(formula, tmp_path / "rows.csv", chunk_rows=20),
        "beside cbind() is not supported": lambda: lmm("cbind(a, b) ~ x + (1 | spline(x))", rows),
        "is for family 'binomial'": lambda: glmm(formula, rows, family="poisson"),
    }
    for message, call in refused.items():
        with pytest.raises(InputError, match=re.escape(message)):
            call()
    # A basis in the fixed effects is that of each response alone.
    both = lmm("cbind(a, b) ~ bs(x, df = 4) + diag(0 + trait | g)", rows, residual="diag(trait)")
    alone = [lmm(f"{name} ~ bs(x, df = 4) + (1 | g)", rows) for name in "ab"]
    assert both.log_likelihood == pytest.approx(sum(a.log_likelihood for a in alone), abs=1e-7)
