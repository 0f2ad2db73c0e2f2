"""Mixed models as scikit-learn's estimators."""

import pickle
import re

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

pytest.importorskip("sklearn")

from sklearn import config_context
from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, GroupKFold, KFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from openreml_nn import InputError, glmm, lmm
from openreml_nn.estimators import MixedClassifier, MixedRegressor


@parametrize_with_checks([MixedRegressor(), MixedClassifier()])
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


@pytest.fixture(scope="module")
def table():
    rng = np.random.default_rng(3)
    n = 240
    user = rng.integers(0, 12, n)
    x = rng.standard_normal((n, 2))
    b = 1.5 * rng.standard_normal((12, 2))
    y = 1 + x @ [0.5, -1.0] + b[user, 0] + 0.5 * b[user, 1] * x[:, 0] + rng.standard_normal(n)
    labels = np.array([f"u{i:02d}" for i in range(12)])
    return pd.DataFrame({"one": x[:, 0], "two of it": x[:, 1], "user": labels[user], "y": y})


NUMBERS = ["one", "two of it"]


def test_the_fit_is_that_of_lmm(table):
    model = MixedRegressor(groups="user").fit(table[[*NUMBERS, "user"]], table.y)
    own = lmm("y ~ one + `two of it` + (1 | user)", table)
    assert model.result_.log_likelihood == own.log_likelihood
    found = own.predict(table)
    mean, std = model.predict(table[[*NUMBERS, "user"]], return_std=True)
    np.testing.assert_array_equal(mean, found["mean"])
    np.testing.assert_array_equal(std, np.sqrt(found["variance"]))
    slopes = MixedRegressor(formula="one + `two of it` + (one | user)", method="ml")
    slopes.fit(table.drop(columns="y"), table.y)
    own = lmm("y ~ one + `two of it` + (one | user)", table, method="ml")
    assert slopes.result_.log_likelihood == own.log_likelihood


def test_every_way_to_hand_over_groups_is_the_same(table):
    frame, array = table[[*NUMBERS, "user"]], table[[*NUMBERS, "user"]].to_numpy(object)
    X, user = table[NUMBERS].to_numpy(), table.user
    ways = {
        "column": (MixedRegressor(groups=["user"]), frame, None),
        "position": (MixedRegressor(groups=2), array, None),
        "vector": (MixedRegressor(), X, user.to_numpy()),
        "list": (MixedRegressor(), X.tolist(), user.tolist()),
        "series": (MixedRegressor(), table[NUMBERS], user),
        "frame": (MixedRegressor(), table[NUMBERS], table[["user"]].set_axis(range(100, 340))),
        "formula": (MixedRegressor(formula="x0 + x1 + (1 | group)"), X, user.to_numpy()),
    }
    first = None
    for name, (model, own, groups) in ways.items():
        mean, std = model.fit(own, table.y, groups=groups).predict(own, groups, return_std=True)
        first = first or (mean, std)
        np.testing.assert_allclose(mean, first[0], rtol=1e-10, err_msg=name)
        np.testing.assert_allclose(std, first[1], rtol=1e-10, err_msg=name)


def test_levels_that_are_not_known_have_the_population(table):
    X, user = table[NUMBERS].to_numpy(), table.user.to_numpy(object)
    model = MixedRegressor().fit(X, table.y, groups=user)
    with pytest.warns(RuntimeWarning, match="levels that the fit did not see"):
        mean, std = model.predict(X[:3], ["never", None, np.nan], return_std=True)
    with pytest.warns(RuntimeWarning, match="levels that the fit did not see"):
        left_out = model.predict(X[:3], return_std=True)
    np.testing.assert_array_equal(mean, left_out[0])
    np.testing.assert_array_equal(std, left_out[1])
    own = model.result_.predict(pd.DataFrame(X[:3], columns=["x0", "x1"]).assign(group=user[:3]))
    np.testing.assert_array_equal(mean, own["population_mean"])
    assert (std > np.sqrt(own["variance"]) + 0.1).all()


def test_two_factors_beside_X_and_among_its_columns(table):
    item = np.arange(240) % 7
    both = np.stack([table.user.factorize()[0], item], 1)
    X = table[NUMBERS].to_numpy()
    beside = MixedRegressor().fit(X, table.y, groups=both)
    within = MixedRegressor(groups=[0, 3]).fit(
        np.column_stack([both[:, 0], X, both[:, 1]]), table.y
    )
    assert beside.result_.log_likelihood == pytest.approx(within.result_.log_likelihood, 1e-12)
    assert [part.name for part in beside.result_.random] == ["group0", "group1"]


def test_cross_validation_searches_and_pipelines(table):
    X, y = table[[*NUMBERS, "user"]], table.y
    model = MixedRegressor(groups="user")
    known = cross_val_score(model, X, y, cv=KFold(4, shuffle=True, random_state=0))
    with pytest.warns(RuntimeWarning, match="did not see"):
        unseen = cross_val_score(model, X, y, groups=X.user, cv=GroupKFold(4))
    assert known.mean() > 0.6 > unseen.mean()
    search = GridSearchCV(MixedRegressor(), {"groups": [None, "user"]}, error_score=np.nan, cv=3)
    search.fit(X.assign(user=X.user.str[1:].astype(int)), y)
    assert search.best_params_ == {"groups": "user"}
    scaled = ColumnTransformer([("z", StandardScaler(), NUMBERS)], remainder="passthrough")
    scaled.set_output(transform="pandas")
    pipeline = make_pipeline(scaled, MixedRegressor(groups="remainder__user")).fit(X, y)
    np.testing.assert_allclose(pipeline.predict(X), model.fit(X, y).predict(X), rtol=1e-9)


def test_groups_are_routed_as_metadata(table):
    X, y, user = table[NUMBERS].to_numpy(), table.y.to_numpy(), table.user.to_numpy()
    folds = KFold(4, shuffle=True, random_state=0)
    with config_context(enable_metadata_routing=True):
        model = MixedRegressor().set_fit_request(groups=True).set_score_request(groups=True)
        routed = cross_val_score(model, X, y, params={"groups": user}, cv=folds)
    columns = MixedRegressor(groups="user")
    own = cross_val_score(columns, table[[*NUMBERS, "user"]], table.y, cv=folds)
    np.testing.assert_allclose(routed, own, rtol=1e-9)


def test_weights_divide_the_residual_variance(table):
    w = np.linspace(0.5, 2.0, 240)
    model = MixedRegressor(groups="user").fit(table[[*NUMBERS, "user"]], table.y, weights=w)
    own = lmm("y ~ one + `two of it` + (1 | user)", table.assign(w=w), weights="w")
    assert model.result_.log_likelihood == own.log_likelihood


def test_a_response_without_error_is_fitted_exactly():
    X = np.random.default_rng(0).standard_normal((20, 2))
    mean, std = MixedRegressor().fit(X, 3 + X[:, 0]).predict(X, return_std=True)
    np.testing.assert_allclose(mean, 3 + X[:, 0], rtol=1e-12)
    assert (std < 1e-14).all()
    np.testing.assert_array_equal(MixedRegressor().fit(X, np.zeros(20)).predict(X), 0)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e9])
def test_a_constant_response_has_no_variance_to_estimate(table, value):
    y, network = np.full(len(table), value), {"_target_": "torch.nn.LazyLinear", "out_features": 2}
    for options in ({}, {"network": network, "epochs": 1}):
        with pytest.raises(InputError, match="there is no variance to estimate"):
            MixedRegressor("user", **options).fit(table[[*NUMBERS, "user"]], y)


def test_refusals_name_the_argument(table):
    X, y = table[[*NUMBERS, "user"]], table.y
    for model, groups, words in (
        (MixedRegressor(groups="nobody"), None, "`groups` has 'nobody'"),
        (MixedRegressor(groups=7), None, "`groups` has 7"),
        (MixedRegressor(groups=True), None, "`groups` has True"),
        (MixedRegressor(formula="y ~ one"), None, "`formula` is 'y ~ one'"),
        (MixedRegressor("user", formula="one"), None, "`groups` beside `formula`"),
        (MixedRegressor(epochs=3), None, "`epochs` is 3 without a network"),
        (MixedRegressor("user"), X.user, "'user' stands twice"),
        (MixedRegressor("user"), np.zeros((240, 1, 1)), "`groups` has the shape"),
        (MixedRegressor("user"), np.zeros(7), "`groups` has 7 rows but X has 240"),
        (MixedRegressor("user"), np.full(240, np.nan), "misses the level of 'group' in row 1"),
        (MixedClassifier("user", C=-1.0), None, "`C` is -1"),
        (MixedClassifier(formula="one + (1 | user)", C=1.0), None, "`C` is for the columns"),
    ):
        with pytest.raises(InputError, match=re.escape(words)):
            model.fit(X, y > 0 if isinstance(model, MixedClassifier) else y, groups=groups)
    model = MixedRegressor("user").fit(X, y)
    with pytest.raises(InputError, match="`groups` is given but the fit had none"):
        model.predict(X, groups=X.user)
    with pytest.raises(InputError, match="expected \\(240,\\)"):
        model.fit(X, y, weights=np.ones(3))
    beside = MixedRegressor().fit(X[NUMBERS], y, groups=X.user)
    with pytest.raises(InputError, match=r"expected \['user'\]"):
        beside.predict(X[NUMBERS], groups=X.user.to_numpy())


def test_the_classifiers_coefficients_are_those_of_the_same_penalty(table):
    X, y = table[NUMBERS].to_numpy(), np.where(table.y > 1, "yes", "no")
    for C in (0.01, 1.0, 100.0):
        model = MixedClassifier(C=C).fit(X, y)
        own = LogisticRegression(C=C, tol=1e-12, max_iter=10_000).fit(X, y)
        slopes = model.result_.random[0].values.numpy().ravel()
        np.testing.assert_allclose(slopes, own.coef_[0], rtol=1e-6)
        np.testing.assert_allclose(model.result_.fixed.estimate[0], own.intercept_[0], rtol=1e-5)
    assert list(model.classes_) == ["no", "yes"]


def test_the_classifiers_fit_is_that_of_glmm(table):
    X, y = table[[*NUMBERS, "user"]], table.y > 1
    own = glmm("z ~ one + `two of it` + (1 | user)", table.assign(z=y), family="binomial")
    free = MixedClassifier(groups="user", C=np.inf).fit(X, y)
    said = MixedClassifier(formula="one + `two of it` + (1 | user)").fit(X, y)
    for model in (free, said):
        assert model.result_.log_likelihood == own.log_likelihood
        p = model.predict_proba(X)
        np.testing.assert_array_equal(p[:, 1], own.predict(table)["mean"])
        np.testing.assert_array_equal(model.predict(X), p[:, 1] > 0.5)
    wide = MixedClassifier(groups="user", C=1e8).fit(X, y).predict_proba(X)[:, 1]
    formula = "z ~ one + `two of it` + (1 | user)"
    own = glmm(formula, table.assign(z=y), family="binomial", method="reml")
    np.testing.assert_allclose(wide, own.predict(table)["mean"], atol=1e-5)
    assert free.score(X, y) > MixedClassifier().fit(X[NUMBERS], y).score(X[NUMBERS], y)


def network():
    return nn.Sequential(nn.LazyLinear(8), nn.Tanh())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_network_is_trained_the_same_from_the_same_seed(table):
    X, y = table[[*NUMBERS, "user"]], table.y
    adam = {"_target_": "torch.optim.Adam", "lr": 0.02}
    model = MixedRegressor(
        "user", network=network(), optimizer=adam, epochs=20, rows=60, random_state=1
    )
    state = torch.get_rng_state()
    first = model.fit(X, y).predict(X)
    assert bool((torch.get_rng_state() == state).all())
    again, other = clone(model), clone(model).set_params(random_state=2)
    np.testing.assert_array_equal(again.fit(X, y).predict(X), first)
    assert np.abs(other.fit(X, y).predict(X) - first).max() > 1e-6
    assert model.score(X, y) > 0.6
    saved = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(saved.predict(X), first)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_network_classifies(table):
    X, y = table[[*NUMBERS, "user"]], table.y > 1
    adam = {"_target_": "torch.optim.Adam", "lr": 0.05}
    model = MixedClassifier("user", network=network(), optimizer=adam, epochs=60, random_state=1)
    assert model.fit(X, y).score(X, y) > 0.8
