"""A result with rows that came later: as all rows say at the parameters of the fit."""

import copy
import json
import pickle
import warnings

import numpy as np
import pandas as pd
import pytest
import torch

from openreml_nn import InputError, glmm, lmm
from openreml_nn.lightning import MixedModule
from openreml_nn.model.structures import linear_model
from openreml_nn.table import TableFile, read_table
from tests.test_predict import KERNEL, table

#: Formula and options; the first 66 rows have 11 of 15 levels of g.
MODELS = {
    "one": ("y ~ x + s + (1 | g)", {}),
    "ml": ("y ~ x + (1 | g) + (1 | h)", {"method": "ml"}),
    "crossed slopes": ("y ~ x + (x | g) + (1 | h)", {}),
    "two terms": ("y ~ x + (x || g) + (1 | h)", {}),
    "nested": ("y ~ x + (1 | h/s)", {}),
    "interaction": ("y ~ x + (1 | g) + (1 | g:s)", {}),
    "weights": ("y ~ x + (x | g) + (1 | h)", {"weights": "w"}),
    "known residual": ("y ~ x + (1 | g)", {"weights": "w", "residual_variance": 0.5}),
    "strata": ("y ~ x + (1 | g) + (1 | h)", {"residual": "diag(s)"}),
    "power": ("y ~ x + (1 | g)", {"residual": "power(w)"}),
    "power by strata": ("y ~ x + (1 | g)", {"residual": "diag(s):power(w)"}),
    "offset": ("y ~ 1 + offset(2 * x) + (1 | g) + (1 | h)", {}),
    "no coefficients": ("y ~ 0 + (x | g)", {}),
    "no random effect": ("y ~ x * s", {}),
    "kernel": ("y ~ x + (1 | vm(g, K)) + (1 | h)", {"kernels": {"K": KERNEL}}),
    "spline": ("y ~ (1 | spline(x)) + (1 | g)", {}),
    "effects of a factor": ("y ~ x + diag(0 + s | g)", {}),
}


def rows():
    t = table()
    t.loc[t.index % 7 == 3, "h"] = 9
    t.loc[t.index[:66][t["h"][:66] == 9], "h"] = 0  # a level of h that comes later
    t["x"] = t["x"].clip(t["x"][:66].min(), t["x"][:66].max())
    # The knots of a spline are of the range of the rows of the fit.
    t.loc[66, "x"], t.loc[67, "x"] = t["x"][:66].min(), t["x"][:66].max()
    return t


def at_the_parameters(result, encoded):
    """The model of all rows, with the parameters of a result."""
    model = linear_model(encoded, result.method)
    kept, state = dict(result.model.named_parameters()), result.model.state_dict()
    for name, parameter in model.named_parameters():
        parameter.data.copy_(kept[name] if name in kept else state[name])
    for name, effect in model.effects().items():
        effect.basis = result.model.effects()[name].basis
    return model


@pytest.mark.filterwarnings("ignore:the fit did not converge")
@pytest.mark.filterwarnings("ignore:the data cannot tell apart")
@pytest.mark.parametrize("name", MODELS)
def test_an_updated_result_is_that_of_all_rows_at_the_same_parameters(name):
    t, (formula, options) = rows(), MODELS[name]
    result = lmm(formula, t[:66], **options)
    found = result.update(t[66:])
    encoder = lmm(formula, t, max_iterations=1, **options).encoder
    encoded = encoder.fit(t)
    model = at_the_parameters(result, encoded)
    batch = encoded.batch()
    model.update(batch)
    order = {d.name: d.levels for d in encoded.random}
    for effect in found.random:
        levels = next(c.levels for c in found.components if c.name.split("/")[0] == effect.name)
        assert sorted(levels) == sorted(order[effect.name])
        at = [order[effect.name].index(level) for level in levels]
        values, variances = model.effects()[effect.name].known()
        torch.testing.assert_close(effect.values, values[at], rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(effect.variances, variances[at], rtol=1e-8, atol=1e-9)
    columns = list(found.fixed.columns)
    torch.testing.assert_close(found.fixed.estimate, model.beta[columns], rtol=1e-8, atol=1e-9)
    covariance = model.beta_covariance[columns][:, columns]
    torch.testing.assert_close(found.fixed.covariance, covariance, rtol=1e-8, atol=1e-9)
    assert found.rows == 90
    likelihood = -float(model.loss(batch).detach()) * 90
    assert found.log_likelihood == pytest.approx(likelihood, rel=1e-9)
    expected = model.predict(encoder.transform(t).batch())
    for column, value in zip(("mean", "variance", "population_mean"), expected, strict=True):
        np.testing.assert_allclose(found.predict(t)[column], value, rtol=1e-8, atol=1e-9)
    assert found.parameters == result.parameters


@pytest.mark.filterwarnings("ignore:the fit did not converge")
def test_a_result_of_chunks_is_updated_alike(tmp_path):
    t = rows()
    formula = "y ~ x + (x | g) + (1 | h)"
    t[:66].to_csv(tmp_path / "t.csv", index=False)
    chunks = lmm(formula, tmp_path / "t.csv", chunk_rows=20)
    found = chunks.update(t[66:])
    encoded = lmm(formula, t, max_iterations=1).encoder.fit(t)
    model = at_the_parameters(chunks, encoded)
    model.update(encoded.batch())
    prediction = model.predict(encoded.batch())
    np.testing.assert_allclose(found.predict(t)["mean"], prediction.mean, rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(found.predict(t)["variance"], prediction.variance, rtol=1e-8)


def test_the_order_and_the_parts_of_the_new_rows_do_not_matter():
    t = rows()
    result = lmm("y ~ x + (1 | g) + (1 | h/s)", t[:66])
    one = result.update(t[66:])
    two = result.update(t[66:78]).update(t[78:])
    three = result.update(t[66:].sample(frac=1, random_state=1))
    for other in (two, three):
        pd.testing.assert_frame_equal(one.predict(t), other.predict(t), rtol=1e-9)
        assert other.log_likelihood == pytest.approx(one.log_likelihood, rel=1e-10)
    assert (one.rows, two.rows) == (90, 90)
    # The result itself is as it was, and so is its encoder.
    with pytest.warns(RuntimeWarning, match="levels that the fit did not see"):
        again = result.predict(t)
    assert not np.allclose(again["variance"], one.predict(t)["variance"])


def test_an_updated_result_is_saved_and_goes_on(tmp_path):
    t = rows()
    result = lmm("y ~ x + (1 | g) + (1 | h/s)", t[:66]).update(t[66:])
    assert MixedModule.of(result).predict(t).equals(result.predict(t))
    result.to_json(tmp_path / "result.json")
    assert json.loads((tmp_path / "result.json").read_text())["data"]["groups"]["g"] == 15
    assert "90" in result.summary()
    copied = pickle.loads(pickle.dumps(result))
    pd.testing.assert_frame_equal(copied.update(t[:9]).predict(t), result.update(t[:9]).predict(t))


def test_rows_that_cannot_be_added():
    t = rows()
    result = lmm("y ~ x + s + (1 | g)", t[:66])
    with pytest.raises(InputError, match="'y'"):
        result.update(t[66:].drop(columns="y"))
    with pytest.raises(InputError, match=r"'s'.*'w'"):
        result.update(t[66:].assign(s="w"))
    with pytest.raises(TypeError, match=r"`table` is .*: expected a data frame"):
        result.update(t[66:].to_numpy())
    with pytest.raises(InputError, match="`residual` is correlated between rows"):
        lmm("y ~ x + (1 | h)", t[:66], residual="ar1(time | g)").update(t[66:])
    related = lmm("y ~ x + (1 | vm(g, K))", t[:66], kernels={"K": KERNEL})
    with pytest.raises(InputError, match=r"new levels, but its levels are correlated"):
        related.update(t[66:].assign(g="new"))


FAMILIES = {
    "counts": ("c ~ x + (1 | g) + (1 | h)", "poisson", {}),
    "slopes": ("c ~ x + (x | g) + offset(x / 2)", "negative_binomial", {}),
    "labels": ("s ~ x + (1 | g)", "binomial", {"quadrature": 5}),
    "reml": ("s ~ x + (1 | h/half)", "binomial", {"method": "reml", "link": "probit"}),
    "kernel": ("c ~ x + (1 | vm(g, K))", "poisson", {"kernels": {"K": KERNEL}}),
    "weights": ("c ~ x + (1 | g)", "poisson", {"weights": "w"}),
    "proportions": ("share ~ x + (1 | g)", "binomial", {"weights": "trials"}),
    "aliased": ("c ~ x + z + (1 | g)", "poisson", {}),
}


def of_counts():
    t = rows()
    rng = np.random.default_rng(1)
    t["c"] = rng.poisson(np.exp(0.3 * (t["y"] - 2)))
    t["trials"], t["z"] = t["c"] + 2.0, 2 * t["x"]
    t["share"] = t["c"] / t["trials"]
    return t


@pytest.mark.filterwarnings("ignore:the fit did not converge")
@pytest.mark.filterwarnings("ignore:the data cannot tell apart")
@pytest.mark.filterwarnings("ignore:.*rank deficient")
@pytest.mark.parametrize("name", FAMILIES)
def test_with_a_family_it_is_that_of_all_rows_at_the_same_parameters(name):
    t, (formula, family, options) = of_counts(), FAMILIES[name]
    result = glmm(formula, t[:66], family=family, max_iterations=8, **options)
    found = result.update(t[66:])
    whole = glmm(formula, t, family=family, max_iterations=1, **options)
    model = copy.deepcopy(whole.model)
    kept = dict(result.model.named_parameters())
    for key, parameter in model.named_parameters():
        parameter.data.copy_(kept[key])
    encoded = whole.encoder.fit(
        t.assign(s=(t["s"] == "v").astype(float)) if "s ~" in formula else t
    )
    batch, columns = encoded.batch(), list(whole.fixed.columns)
    if name == "proportions":
        batch["y"], batch["weights"] = t["share"].to_numpy(), t["trials"].to_numpy()
        batch = {**batch, **{k: torch.tensor(batch[k]) for k in ("y", "weights")}}
    if name == "aliased":  # of the columns that are kept
        model.mean, batch["x"] = torch.nn.Identity(), batch["x"][:, columns]
    model.update(batch)
    coefficients = model.beta if name == "aliased" else model.beta[columns]
    torch.testing.assert_close(found.fixed.estimate, coefficients, rtol=1e-7, atol=1e-8)
    likelihood = -float(model.loss(batch).detach()) * 90
    assert found.log_likelihood == pytest.approx(likelihood, rel=1e-9)
    assert (found.rows, found.parameters) == (90, result.parameters)
    found_means = found.predict(t)
    expected = model.predict(batch)
    for column, value in zip(("mean", "variance", "population_mean"), expected, strict=True):
        np.testing.assert_allclose(found_means[column], value, rtol=1e-6, atol=1e-8)
    parts = result.update(t[66:78]).update(t[78:])
    for other in (result.update(t[66:].iloc[::-1]), parts):
        pd.testing.assert_frame_equal(other.predict(t), found_means, rtol=1e-7)


@pytest.mark.filterwarnings("ignore:the fit did not converge")
def test_an_ordinal_result_takes_up_rows():
    t = of_counts().assign(o=lambda t: t["c"].clip(upper=2))
    result = glmm("o ~ x + (1 | h)", t[:66], family="ordinal", max_iterations=3)
    one = result.update(t[66:])
    two = pickle.loads(pickle.dumps(result)).update(t[66:70]).update(t[70:])
    assert one.rows == two.rows == 90
    assert two.log_likelihood == pytest.approx(one.log_likelihood, rel=1e-10)
    assert one.fixed.names == ("x",)
    seen, batch = one.model.seen, one.encoder.transform(t).batch()
    value = one.model.marginal(batch["x"], batch)[0](seen.y, seen.known, seen.X[:, 1:])
    assert one.log_likelihood == pytest.approx(-value.item(), rel=1e-10)


def test_families_of_which_no_rows_are_added():
    t = of_counts()
    t["o"], t["m"] = t["c"].clip(upper=2), 4 - t["c"].clip(upper=3)
    for formula, options, why in (
        ("c ~ x + (1 | h)", {"family": "poisson", "zi": "~ 1"}, "with a zero part"),
        ("cbind(o, m) ~ x + (1 | h)", {"family": "binomial"}, "of cbind"),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = glmm(formula, t[:66], max_iterations=3, **options)
        with pytest.raises(InputError, match=f"of the family '.*', {why}"):
            result.update(t[66:])
    slow = glmm("s ~ x + (1 | h)", t[:66], family="binomial")
    with pytest.raises(InputError, match="the response 's' is 'w': expected one of"):
        slow.update(t[66:].assign(s="w"))


def test_rows_with_missing_values_are_left_out_and_counted():
    t = rows()
    result = lmm("y ~ x + (1 | g)", t[:66])
    later = t[66:].copy()
    later.loc[later.index[:3], "y"] = np.nan
    with pytest.warns(RuntimeWarning, match="3 of 24 rows left out"):
        found = result.update(later)
    assert (found.rows, found.dropped_rows) == (87, 3)
    pd.testing.assert_frame_equal(found.predict(t[:66]), result.update(t[69:]).predict(t[:66]))


def test_files_are_read_as_that_of_the_fit(tmp_path):
    t = rows()
    first, later = tmp_path / "first.csv", tmp_path / "later.csv"
    for path, part in ((first, t[:66]), (later, t[66:])):
        part.to_csv(path, sep=";", decimal=",", index=False)
    options = {"separator": ";", "decimal": ","}
    result = lmm("y ~ x + (x | g) + (1 | h)", TableFile(first, **options))
    updated = result.update(str(later))
    pd.testing.assert_frame_equal(
        updated.predict(later), updated.predict(read_table(later, **options))
    )
    torch.testing.assert_close(
        updated.fixed.estimate,
        result.update(read_table(later, **options)).fixed.estimate,
        rtol=0,
        atol=0,
    )
    # What is read otherwise says so itself, and Parquet takes no options of text.
    t[66:].to_parquet(tmp_path / "later.parquet")
    t[66:].to_csv(tmp_path / "plain.csv", index=False)
    others = [tmp_path / "later.parquet", TableFile(tmp_path / "plain.csv")]
    for other in others:
        found = updated.predict(other)
        assert len(found) == len(t) - 66
        np.testing.assert_allclose(found["mean"], updated.predict(later)["mean"], rtol=1e-12)


def test_messages_name_the_file_of_the_new_rows(tmp_path):
    t = rows()
    t.to_csv(tmp_path / "fit.csv", index=False)
    t.drop(columns="x").to_csv(tmp_path / "new.csv", index=False)
    result = lmm("y ~ x + (1 | g)", tmp_path / "fit.csv")
    for call in (result.predict, result.update):
        with pytest.raises(InputError, match=r"new\.csv.*'x'"):
            call(tmp_path / "new.csv")
        with pytest.raises(TypeError, match="`table` is 3: expected a data frame, or the path"):
            call(3)


def test_errors_name_the_rows_of_the_new_table():
    table = pd.DataFrame({"k": [*range(6)] * 4, "n": 9.0, "x": [1.0, 2, 4] * 8, "g": [*"abcd"] * 6})
    result = glmm("k ~ x + (1 | g)", table, family="poisson")
    new = table.head(4).astype({"k": float})
    new.loc[0, "x"], new.loc[2, "k"] = float("nan"), -1
    with (
        pytest.warns(RuntimeWarning, match="1 of 4 rows"),
        pytest.raises(InputError, match=r"^the table: 'k' is -1 in row 3: expected"),
    ):
        result.update(new)
    with pytest.raises(InputError, match="'k' is -1 in row 'c': expected"):
        result.update(new.assign(x=1.0).set_axis([*"abcd"]))
    shares = table.assign(k=table["k"] / 9)
    of_trials = glmm("k ~ x + (1 | g)", shares, family="binomial", weights="n")
    with pytest.raises(InputError, match=r"^the table: 'k' times 'n' is 4\.5 in row 3: expected"):
        of_trials.update(shares.head(4).assign(k=[0, 0, 0.5, 0]))
