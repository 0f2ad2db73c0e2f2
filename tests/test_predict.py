"""Predictions for a table: variances against a dense formula, and by every way that there is."""

import copy
import json
import pickle

import numpy as np
import pandas as pd
import pytest
import torch

from openreml_nn import InputError, lmm
from openreml_nn.datasets import oats, sleepstudy
from openreml_nn.model.structures import linear_model


def table(n=90, seed=0):
    rng = np.random.default_rng(seed)
    t = pd.DataFrame({"x": rng.standard_normal(n), "w": rng.uniform(0.3, 3, n)})
    t["g"] = [f"g{i}" for i in np.arange(n) // 6]
    t["h"] = rng.integers(0, 5, n)
    t["time"] = np.arange(n) % 6
    t["g0"] = np.arange(n) // 6
    t["half"] = np.where(t["g0"] < 7, "a", "b")
    t["s"] = np.where(rng.random(n) < 0.4, "u", "v")
    b, c = 0.8 * rng.standard_normal((n // 6, 2)), 0.5 * rng.standard_normal(5)
    at = np.arange(n) // 6
    e = rng.standard_normal(n) * np.where(t["s"] == "u", 1.5, 0.7) / np.sqrt(t["w"])
    t["y"] = 2 + t["x"] + b[at, 0] + b[at, 1] * t["x"] + c[t["h"]] + 0.6 * e
    return t


ROOT = np.random.default_rng(5).normal(size=(15, 15))
NAMES = [f"g{i}" for i in reversed(range(15))]
KERNEL = pd.DataFrame(ROOT @ ROOT.T / 9 + np.eye(15), index=NAMES, columns=NAMES)
PEDIGREE = pd.DataFrame(
    {
        "animal": [f"g{i}" for i in range(15)],
        "sire": [None, None, *(f"g{i // 2}" for i in range(13))],
        "dam": [None, None, *(None if i < 6 else "g4" for i in range(13))],
    }
)

#: Formula, options, and the columns on which the variance of a residual depends.
MODELS = {
    "crossed": ("y ~ x + (x | g) + (1 | h)", {}, []),
    "ml": ("y ~ x + (x | g) + (1 | h)", {"method": "ml"}, []),
    "two terms of a factor": ("y ~ x + (x || g) + (1 | h)", {}, []),
    "nested": ("y ~ x + (1 | h/s)", {}, []),
    "one": ("y ~ x + s + (1 | g)", {}, []),
    "an offset": ("y ~ 1 + offset(2 * x) + (1 | g) + (1 | h)", {}, []),
    "weights": ("y ~ x + (x | g) + (1 | h)", {"weights": "w"}, []),
    "a known residual": ("y ~ x + (1 | g)", {"weights": "w", "residual_variance": 0.5}, []),
    "strata": ("y ~ x + (1 | g) + (1 | h)", {"residual": "diag(s)"}, ["s"]),
    "ar1": ("y ~ x + (1 | h)", {"residual": "ar1(time | g)"}, []),
    "cs within the factor": ("y ~ x + (x | g)", {"residual": "cs(g)"}, []),
    "us alone": ("y ~ x", {"residual": "us(time | g)"}, ["time"]),
    "no random effect": ("y ~ x * s", {}, []),
    "no coefficients": ("y ~ 0 + (x | g)", {}, []),
    "a kernel": ("y ~ x + (1 | vm(g, K)) + (1 | h)", {"kernels": {"K": KERNEL}}, []),
    "relatives": ("y ~ x + (1 | ped(g))", {"pedigree": PEDIGREE}, []),
    "a variance for each effect": ("y ~ x + diag(0 + s | g)", {}, []),
    "a spline": ("y ~ (1 | spline(x)) + (1 | g)", {}, []),
    "a field": ("y ~ x + (1 | h)", {"residual": "ar1(g0):ar1(time)"}, []),
    "a nugget": ("y ~ x + (1 | h)", {"residual": "ar1(time | g) + units"}, []),
    "strata of ar1": ("y ~ x + (1 | h)", {"residual": "diag(half):ar1(g0):ar1(time)"}, ["half"]),
    "a variance for each time": ("y ~ x + (1 | h)", {"residual": "hetar1(time | g)"}, ["time"]),
    "ar1 with weights": ("y ~ x", {"residual": "ar1(time | g)", "weights": "w"}, []),
    "matern": ("y ~ x + (1 | matern(h)) + (1 | g)", {}, []),
    "correlated with a power": ("y ~ x", {"residual": "exp(w):ar1(time | g)"}, ["w"]),
    "a power": ("y ~ x + (1 | g)", {"residual": "power(w)"}, ["w"]),
}


def fitted(name):
    formula, options, _ = MODELS[name]
    with np.errstate(all="ignore"):
        return lmm(formula, table(), **options, max_iterations=40)


def new_rows():
    """Pairs of levels that have no row in the data, and levels that are not known."""
    t = table(60, seed=3)
    t["g"] = [f"g{i % 15}" for i in range(60)]
    t.loc[:4, "g"] = "new"
    t.loc[3:9, "h"] = 77
    old = table()
    t["w"] = old["w"].sample(60, random_state=1).to_numpy()
    return t.drop(columns="y")


def kriging(result, new, columns):
    r"""Mean and variance of new observations with all of V written out.

    :math:`\operatorname{var}(z'b - c'V^{-1}y \dots)`: the error of the best linear unbiased
    predictor, with c the covariance of the new effects with y.
    """
    source, model = result.source, result.model
    with torch.no_grad():
        V = source.covariance()
        parts = list(source.covariance.operands.values())
        blocks = parts[: len(model.random)]
        R = sum(part() for part in parts[len(blocks) :]).diagonal()
        old = [p.operands["z"]() for p in blocks]
        G = [p.operands["g"]() for p in blocks]
    encoded = result.encoder.transform(new)
    n, X, X0 = len(encoded.X), source.X, encoded.X
    c, prior = X.new_zeros(len(X), n), X.new_zeros(n)
    for d, Z, g in zip(encoded.random, old, G, strict=True):
        q, k = len(d.levels), len(d.effects)
        hot = torch.nn.functional.one_hot(d.codes.clamp(min=0), q) * (d.codes >= 0)[:, None]
        z = (hot[:, :, None] * d.values[:, None, :]).flatten(1)
        c += Z @ g @ z.mT
        mean = torch.stack([g[i : i + k, i : i + k] for i in range(0, q * k, k)]).mean(0)
        block = torch.einsum("nk,kl,nl->n", d.values, mean, d.values)
        prior += torch.where(d.codes < 0, block, torch.einsum("ni,ij,nj->n", z, g, z))
    Vi = torch.linalg.inv(V)
    M = torch.linalg.inv(X.mT @ Vi @ X)
    b = M @ X.mT @ Vi @ source.y
    u = X0 - c.mT @ Vi @ X
    mean = X0 @ b + c.mT @ Vi @ (source.y - X @ b)
    variance = prior - (c * (Vi @ c)).sum(0) + ((u @ M) * u).sum(1)
    # That of a row of the data of the same stratum, position or covariate.
    weighted = result.encoder.weights is not None
    old = table().assign(R=R.numpy() * (table()["w"] if weighted else 1), one=0)
    by = old.groupby(columns or ["one"])["R"]
    assert (by.std().fillna(0) < 1e-12 * by.mean()).all()
    keys = [
        tuple(row) if len(columns) > 1 else row[0]
        for row in new.assign(one=0)[columns or ["one"]].to_numpy()
    ]
    own = torch.tensor(by.mean().loc[keys].to_numpy())
    own = own / torch.tensor(new["w"].to_numpy()) if weighted else own
    offset = 0 if encoded.offset is None else encoded.offset
    return mean + offset, variance + own, X0 @ b + offset


@pytest.mark.filterwarnings("ignore:.*levels that the fit did not see")
@pytest.mark.filterwarnings("ignore:the fit did not converge")
@pytest.mark.filterwarnings("ignore:the data cannot tell apart")
@pytest.mark.parametrize("name", MODELS)
def test_predictions_are_those_of_the_dense_formula(name):
    result, new = fitted(name), new_rows()
    found = result.predict(new)
    mean, variance, population = kriging(result, new, MODELS[name][2])
    for column, expected in (
        ("mean", mean),
        ("variance", variance),
        ("population_mean", population),
    ):
        own = torch.tensor(found[column].to_numpy())
        torch.testing.assert_close(own, expected, rtol=1e-8, atol=1e-8)
    half = 1.959963984540054 * np.sqrt(found["variance"])
    np.testing.assert_allclose(found["high"], found["mean"] + half, rtol=1e-12)
    np.testing.assert_allclose(found["low"], found["mean"] - half, rtol=1e-12)
    assert list(found) == ["mean", "variance", "population_mean", "low", "high"]


@pytest.mark.filterwarnings("ignore:.*levels that the fit did not see")
@pytest.mark.filterwarnings("ignore:the fit did not converge")
@pytest.mark.filterwarnings("ignore:the data cannot tell apart")
@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_the_rows_predicts_the_same_as_the_result(name):
    result, new = fitted(name), new_rows()
    expected = result.predict(new)
    encoded = result.encoder.fit(table())
    model = linear_model(encoded, result.method)
    model.load_state_dict(result.model.state_dict())
    batch = encoded.batch()
    value = -float(model.loss(batch).detach()) * result.rows
    assert value == pytest.approx(result.log_likelihood, rel=1e-12)
    model.update(batch)
    found = model.predict(result.encoder.transform(new).batch())
    for column, own in found._asdict().items():
        other = torch.tensor(expected[column].to_numpy())
        torch.testing.assert_close(own, other, rtol=1e-8, atol=1e-10)


def test_the_level_of_the_interval():
    result = fitted("one")
    narrow, wide = (result.predict(table(), level=p) for p in (0.5, 0.99))
    assert (narrow["high"] < wide["high"]).all()
    for level in (0, 1, 95):
        with pytest.raises(InputError, match="`level` is"):
            result.predict(table(), level=level)


def test_a_table_without_weights_or_strata_has_the_variance_of_weight_one_and_the_mean():
    weighted = fitted("weights")
    new = new_rows().query("g != 'new' and h != 77")
    plain = weighted.predict(new.drop(columns="w"))
    one = weighted.predict(new.assign(w=1.0))
    pd.testing.assert_frame_equal(plain, one)
    strata = fitted("strata")
    u, v, mean = (
        strata.predict(t)["variance"].to_numpy()
        for t in (new.assign(s="u"), new.assign(s="v"), new.drop(columns="s"))
    )
    np.testing.assert_allclose(mean, (u + v) / 2, rtol=1e-12)
    assert (u > v).all()


def test_rows_of_which_the_data_say_nothing_are_nan():
    t = table().assign(f=lambda t: t["s"] + (t["h"] > 2).map(str))
    t = t[t["f"] != "uTrue"]
    with pytest.warns(RuntimeWarning, match="rank deficient"):
        result = lmm("y ~ s * I(h > 2) + (1 | g)", t)
    found = result.predict(table())
    empty = (table()["s"] == "u") & (table()["h"] > 2)
    assert found["mean"].isna().tolist() == empty.tolist()


def test_a_result_keeps_its_predictions_when_its_covariance_is_moved():
    result = fitted("crossed")
    expected = result.predict(table())
    result = fitted("crossed")
    with torch.no_grad():
        for parameter in result.source.covariance.parameters():
            parameter.add_(1)
    pd.testing.assert_frame_equal(result.predict(table()), expected)


def test_a_result_that_was_pickled_or_copied_predicts():
    result = fitted("crossed")
    again = pickle.loads(pickle.dumps(result))  # before anything was predicted
    expected = result.predict(table())
    pd.testing.assert_frame_equal(again.predict(table()), expected)
    pd.testing.assert_frame_equal(copy.deepcopy(result).predict(table()), expected)


@pytest.mark.parametrize(
    ("formula", "residual"),
    [
        ("y ~ x * s + (1 | g)", None),
        ("y ~ x + (x:s | g)", None),
        ("y ~ x + (1 | spline(x))", None),
        ("y ~ x", "power(w)"),
        ("cbind(y, w) ~ x * s", None),
    ],
)
def test_a_table_without_rows_has_predictions_of_none(formula, residual):
    result = lmm(formula, table(), residual=residual)
    assert len(result.predict(table()[:0])) == 0


@pytest.mark.filterwarnings("ignore:.*levels that the fit did not see")
def test_variances_by_the_fitted_values_are_those_of_the_predictions():
    """At the fit's own rows the variance is that of a column which holds the fitted values."""
    rows = table()
    result = lmm("y ~ x + (1 | g)", rows, residual="exp(fitted)")
    same = lmm("y ~ x + (1 | g)", rows.assign(f=result.fitted.numpy()), residual="exp(f)")
    assert same.log_likelihood == pytest.approx(result.log_likelihood, abs=1e-8)
    assert result.iterations > same.iterations
    pd.testing.assert_frame_equal(
        result.predict(rows),
        same.predict(rows.assign(f=result.fitted.numpy())),
        rtol=1e-5,
        atol=1e-5,
    )
    new = new_rows()
    mean = result.predict(new)["mean"]
    expected = same.predict(new.assign(f=mean))
    pd.testing.assert_frame_equal(result.predict(new), expected, rtol=1e-5, atol=1e-5)
    moved = lmm("y ~ x + (1 | g)", rows.assign(y=1e3 * rows["y"]), residual="exp(fitted)")
    delta = [r.parameters[-1].value for r in (result, moved)]
    assert delta[1] == pytest.approx(delta[0] / 1e3, rel=1e-5)
    with pytest.raises(InputError, match="has a column 'fitted'"):
        lmm("y ~ x", rows.assign(fitted=1.0), residual="exp(fitted)")
    with pytest.raises(InputError, match="by the fitted values, which new rows move"):
        result.update(rows[:3])


def test_variances_by_a_covariate_take_no_matrix_of_the_rows():
    rows = table()
    result = lmm("y ~ x", rows, residual="power(w)")
    many = rows.iloc[np.arange(100_000) % len(rows)]
    found = result.predict(many)["variance"].to_numpy()
    np.testing.assert_allclose(found[: len(rows)], result.predict(rows)["variance"], rtol=1e-12)


def test_predictions_of_no_rows_and_of_what_is_no_table():
    result = fitted("one")
    assert list(result.predict(table()[:0])) == [
        "mean",
        "variance",
        "population_mean",
        "low",
        "high",
    ]
    with pytest.raises(TypeError, match="`table` is"):
        result.predict(3)
    with pytest.raises(InputError, match=r"file 'table\.csv' does not exist"):
        result.predict("table.csv")


def test_the_json_of_a_result_has_the_schema(tmp_path):
    result = lmm("yield ~ nitro + (1 | Block/Variety)", oats())
    result.to_json(tmp_path / "result.json")
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["schema"] == 1
    assert found["model"] == {"formula": "yield ~ nitro + (1 | Block/Variety)", "method": "reml"}
    assert found["data"] == {
        "rows": 72,
        "dropped_rows": 0,
        "fixed_effects": 2,
        "groups": {"Block": 6, "Block:Variety": 18},
    }
    assert found["fit"]["log_likelihood"] == result.log_likelihood
    assert found["fit"]["optimizer"] == "AIREML"
    assert found["fit"]["seconds"] > 0
    assert [term["group"] for term in found["random"]] == ["Block", "Block:Variety"]
    assert found["random"][0]["std_dev"] == result.components[0].std_dev.tolist()
    assert found["residual"]["variance"] == result.residual_variance
    assert found["residual"]["parameters"] == {"sigma^2": result.residual_variance}
    assert len(found["details"]["history"]) == found["fit"]["iterations"]


def test_slopes_predict_beyond_the_data():
    result = lmm("Reaction ~ Days + (Days | Subject)", sleepstudy())
    far = pd.DataFrame({"Days": [9.0, 30.0], "Subject": ["308", "308"]})
    found = result.predict(far)["variance"]
    assert found[1] > 3 * found[0]


@pytest.mark.parametrize("name", ["crossed", "weights", "strata", "a kernel", "a nugget"])
@pytest.mark.filterwarnings("ignore:.*levels that the fit did not see")
def test_units_of_the_response_and_the_order_of_rows_do_not_matter(name):
    formula, options, _ = MODELS[name]
    new = new_rows()
    expected = fitted(name).predict(new)
    moved = table().assign(y=lambda t: 1e3 * t["y"]).sample(frac=1, random_state=2)
    found = lmm(formula, moved, **options).predict(new.iloc[::-1]).iloc[::-1]
    assert found.index.equals(expected.index)
    for column in expected:
        scale = 1e6 if column == "variance" else 1e3
        np.testing.assert_allclose(found[column] / scale, expected[column], rtol=1e-5, atol=1e-6)
