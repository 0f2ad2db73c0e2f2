"""Neural mixed models against dense formulas, lme4's fits and themselves."""

import copy
import pickle

import pytest
import torch
from torch import nn

from openreml_nn import (
    InputError,
    MixedModel,
    RandomEffect,
    lmm,
    restricted_log_likelihood,
)
from openreml_nn.covariance import (
    AR1Matrix,
    DiagonalMatrix,
    KnownMatrix,
    ScalarMatrix,
    UnstructuredMatrix,
)
from openreml_nn.estimation.aireml import average_information_step
from openreml_nn.model.likelihoods import terms_of
from openreml_nn.model.random_effect import coded_effects
from openreml_nn.table import Encoder
from tests.estimation.test_reference import CATEGORICAL, ROWS, table_of
from tests.strategies import kinship


def network(out=1):
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, out)).double()


def batch(n=60, users=7, items=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=generator)
    user = torch.randint(0, users, (n,), generator=generator)
    item = torch.randint(0, items, (n,), generator=generator)
    b = (
        torch.randn(users, generator=generator)[user]
        + torch.randn(items, generator=generator)[item]
    )
    y = x.sum(1).sin() + b + 0.5 * torch.randn(n, generator=generator)
    return {"x": x, "y": y, "groups": {"user": user, "item": item}}


def crossed(head="ml", **options):
    torch.manual_seed(1)
    random = {"user": RandomEffect(7), "item": RandomEffect(4)}
    return MixedModel(network(1 if head == "ml" else 5), random, head=head, **options)


def dense(model, data):
    """The loss by the dense formula, with V from the tree as it stands."""
    output = model(data)
    loss, y, X = model.data(output, data)
    V = loss.covariance()
    return -restricted_log_likelihood(y, X, V, model.method) / len(y)


def gradients(model, value):
    model.zero_grad()
    value.backward()
    return [p.grad.clone() for p in model.parameters()]


def slopes():
    torch.manual_seed(1)
    effects = {"user": RandomEffect(7, effects=2, features=nn.Linear(3, 2).double())}
    return MixedModel(network(), effects)


def uneven():
    torch.manual_seed(1)
    spread = nn.Linear(3, 1).double()
    return MixedModel(network(), {"user": RandomEffect(7)}, residual=spread)


def related():
    torch.manual_seed(1)
    return MixedModel(network(), {"user": RandomEffect(7, KnownMatrix(kinship(7)).double())})


MODELS = {
    "ml": crossed,
    "gls": lambda: crossed("gls"),
    "learned slopes": slopes,
    "variance by a network": uneven,
    "kernel": related,
}


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_equal_the_dense_formula(name):
    model, data = MODELS[name](), batch()
    value, expected = model.loss(data), dense(model, data)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        gradients(model, model.loss(data)),
        gradients(model, dense(model, data)),
        rtol=1e-8,
        atol=1e-10,
    )


@pytest.mark.parametrize("head", ["ml", "gls"])
@pytest.mark.parametrize("rows", [1, 7, 100])
def test_the_gradient_in_parts_is_the_full_one(head, rows):
    model, data = crossed(head), batch()
    full = gradients(model, model.loss(data))
    model.zero_grad()
    value = model.backward_in_parts(data, rows)
    torch.testing.assert_close(value, model.loss(data))
    torch.testing.assert_close([p.grad for p in model.parameters()], full, rtol=1e-10, atol=1e-12)


def test_whole_groups_add_up_to_the_likelihood():
    data = batch()
    torch.manual_seed(1)
    model = MixedModel(network(), {"user": RandomEffect(7)})
    total = 0.0
    for level in range(7):
        rows = (data["groups"]["user"] == level).nonzero()[:, 0]
        part = {"x": data["x"][rows], "y": data["y"][rows]}
        part["groups"] = {"user": data["groups"]["user"][rows]}
        total = total + model.loss(part) * len(rows)
    torch.testing.assert_close(total / 60, model.loss(data))


def fit(model, data):
    objective = model.objective(data)
    for _ in range(100):
        step = average_information_step([objective], list(model.covariance_parameters()))
        if step.converged:
            return step
    raise AssertionError("not converged")


#: 73,000 rows say here what the others do.
REML_ROWS = [row for row in ROWS if row["method"] == "reml" and row["dataset"] != "insteval"]


@pytest.mark.parametrize(
    "row", REML_ROWS, ids=lambda row: f"{row['dataset']}-{row['formula'].split('~')[1]}"
)
def test_a_linear_mean_is_the_linear_mixed_model(row):
    formula, table = row["formula"], table_of(row["dataset"])
    categorical = CATEGORICAL.get(row["dataset"], [])
    expected = lmm(formula, table, categorical=categorical)
    encoded = Encoder(formula, categorical).fit(table)
    scale = float(encoded.y.std())
    random, data = {}, {"x": encoded.X, "y": encoded.y, "groups": {}, "values": {}}
    for d in encoded.random:
        k = len(d.effects)
        random[d.name] = RandomEffect(d.levels, effects=k)
        data["groups"][d.name] = d.codes
        data["values"][d.name] = d.values
    model = MixedModel(nn.Identity(), random, head="gls")
    for effect in random.values():
        effect.g.moment_start(torch.full((effect.g.shape[0],), scale**2 / 10))
    model.residual.moment_start(torch.full((1,), scale**2 / 2))
    step = fit(model, data)
    assert step.log_likelihood == pytest.approx(expected.log_likelihood, rel=1e-9)
    assert step.log_likelihood > row["log_likelihood"] - 1e-6 * abs(row["log_likelihood"])
    model.update(data)
    for effect in row["fixed"]:
        at = encoded.names.index(effect["name"])
        assert float(model.beta[at]) == pytest.approx(effect["estimate"], rel=1e-4, abs=1e-8)
    torch.testing.assert_close(model.beta, expected.fixed.estimate, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(
        model.beta_covariance, expected.fixed.covariance, rtol=1e-5, atol=1e-8
    )
    for effects in expected.random:
        torch.testing.assert_close(
            random[effects.name].blup, effects.values, rtol=1e-4, atol=1e-5 * scale
        )
    torch.testing.assert_close(
        model.predict(data).mean, expected.fitted, rtol=1e-6, atol=1e-5 * scale
    )


@pytest.mark.parametrize("head", ["ml", "gls"])
def test_predictions_for_known_and_unknown_levels_travel_with_the_state(head):
    model, data = crossed(head), batch()
    if head == "gls":
        with pytest.raises(ValueError, match="call update"):
            model.predict(data)
    model.update(data)
    unknown = torch.full((60,), -1)
    new = {"x": data["x"], "groups": {"user": data["groups"]["user"], "item": unknown}}
    known, partly = model.predict(data), model.predict(new)
    item = model.random["item"]
    gained = item.blup[data["groups"]["item"], 0]
    torch.testing.assert_close(known.mean - partly.mean, gained)
    torch.testing.assert_close(known.population_mean, partly.population_mean)
    assert bool((partly.variance > known.variance).all())
    other = copy.deepcopy(crossed(head))
    other.load_state_dict(model.state_dict())
    for one, two in zip(other.predict(data), known, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("name", ["ml", "gls", "learned slopes", "variance by a network"])
def test_rows_of_no_known_level_have_levels_of_their_own(name):
    """Their variance is that of the effects too, and nothing is learned of other rows from them."""
    model, data = MODELS[name](), batch()
    user = data["groups"]["user"].clone()
    user[::4] = -1
    data["groups"]["user"] = user
    own = user.clone()
    own[::4] = 7 + torch.arange(15)
    V = model.covariance(data)().detach()
    other = copy.deepcopy(model)
    effect = model.random["user"]
    other.random["user"] = RandomEffect(22, effects=effect.effects, features=effect.features)
    with torch.no_grad():
        for p, q in zip(other.random["user"].g.parameters(), effect.g.parameters(), strict=True):
            p.copy_(q)
    wide = {**data, "groups": {**data["groups"], "user": own}}
    torch.testing.assert_close(other.covariance(wide)().detach(), V)
    torch.testing.assert_close(other.loss(wide), model.loss(data))
    model.update(data)
    other.update(wide)
    torch.testing.assert_close(effect.blup, other.random["user"].blup[:7])
    torch.testing.assert_close(effect.variance, other.random["user"].variance[:7])
    new = {"x": data["x"], "groups": {**data["groups"], "user": user.abs()}}
    for found, expected in zip(model.predict(new), other.predict(new), strict=True):
        torch.testing.assert_close(found, expected)


def test_a_row_of_no_known_level_among_related_ones_is_refused():
    data = batch()
    data["groups"]["user"][3] = -1
    with pytest.raises(ValueError, match=r"group 'user' has the code -1.* levels are correlated"):
        related().loss(data)


RESIDUALS = {
    "ar1": lambda: AR1Matrix(3).double(),
    "strata": lambda: DiagonalMatrix(3).double(),
    "one": lambda: None,
    "a network": lambda: nn.Linear(3, 1).double(),
    "a sum": lambda: (ScalarMatrix(1) + ScalarMatrix(1)).double(),
}


@pytest.mark.parametrize("name", RESIDUALS)
@pytest.mark.parametrize("parts", [(), ("weights", "offset")])
def test_residuals_within_groups_weights_and_offsets_are_those_of_the_dense_formula(name, parts):
    torch.manual_seed(2)
    data = batch()
    cells = torch.arange(60)
    data |= {"residual": cells} if name in ("ar1", "strata") else {}
    given = {"weights": torch.rand(60) + 0.3, "offset": torch.randn(60)}
    data |= {key: given[key] for key in parts}
    model = MixedModel(network(4), {"user": RandomEffect(7)}, RESIDUALS[name](), "gls", method="ml")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape))
    residual = model.residual
    if name in ("ar1", "strata"):
        R = torch.block_diag(*[residual()] * 20)
    elif name == "a network":
        R = torch.diag(residual(data["x"])[:, 0].exp())
    else:
        R = residual().reshape(()) * torch.eye(60)
    if parts:
        half = given["weights"].rsqrt()
        R = half[:, None] * R * half
    Z = nn.functional.one_hot(data["groups"]["user"], 7).double()
    V = model.random["user"].prior().reshape(()) * (Z @ Z.mT) + R
    torch.testing.assert_close(model.covariance(data)(), V)
    y = data["y"] - given["offset"] if parts else data["y"]
    value = -restricted_log_likelihood(y, model(data), V, "ml") / 60
    torch.testing.assert_close(model.loss(data), value, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        gradients(model, model.loss(data)), gradients(model, value), rtol=1e-8, atol=1e-10
    )


@pytest.mark.parametrize("effects", [1, 2])
def test_a_few_rows_of_many_levels_have_the_dense_gradient(effects):
    torch.manual_seed(3)
    data = batch(20, 3000, 500)
    values = torch.stack([torch.ones(20), torch.randn(20)], 1)[:, :effects].double()
    random = {"user": RandomEffect(3000, effects=effects), "item": RandomEffect(500)}
    model = MixedModel(network(), random)
    data["values"] = {"user": values} if effects > 1 else {}
    loss, _, _ = model.data(model(data), data)
    assert loss(*model.data(model(data), data)[1:]).isfinite()
    assert loss.plan.solver == "dense"
    found = gradients(model, model.loss(data))
    # As if there were no other levels than those that the rows have.
    few = {}
    for name, codes in data["groups"].items():
        few[name], codes = (
            RandomEffect(20, effects=random[name].effects),
            codes.unique(return_inverse=True)[1],
        )
        data["groups"][name] = codes
    other = MixedModel(model.mean, few)
    torch.testing.assert_close(gradients(other, other.loss(data)), found, rtol=1e-9, atol=1e-12)


def test_a_loss_without_a_tree_is_that_of_the_tree():
    """Unknown levels, weights, several effects, effects that share a covariance, a kernel."""
    torch.manual_seed(0)
    data = batch(40)
    n = len(data["y"])
    data["groups"] |= {"far.off": torch.arange(n) % 6, "residual": torch.arange(n) % 3}
    data["groups"]["user"][::5] = -1
    data["weights"] = torch.rand(n).double() + 0.5
    values = torch.randn(n, 2).double()
    data["values"] = {"user": values, "item": values}
    random = {
        "user": RandomEffect(7, effects=2),
        "item": RandomEffect(4, ScalarMatrix(8).double(), effects=2),
        "far.off": RandomEffect(6, KnownMatrix(kinship(6)).double()),
        "residual": RandomEffect(3, ScalarMatrix(3).double() + ScalarMatrix(3).double()),
    }
    random["far.off"].g.requires_grad_(False)
    for solver in ("auto", "dense", "blocked"):
        model = MixedModel(network(), random, solver=solver)
        tree = model.covariance(data)
        coded = coded_effects(model.effects(), data, n)
        terms = terms_of(model.effects(), model.residual, data, coded, n, torch.float64)
        for one, other in zip(terms, tree.terms(), strict=True):
            assert (one.form, one.known) == (other.form, other.known)
        own = [p for p in model.parameters() if p.requires_grad]
        found = torch.autograd.grad(model.loss(data), own)
        loss, y, X = model.data(model(data), data)
        torch.testing.assert_close(found, torch.autograd.grad(loss(y, X), own))


def test_methods_follow_heads():
    assert crossed("gls").method == "reml"
    assert crossed().method == "ml"
    assert crossed("gls", method="ml").method == "ml"
    with pytest.raises(ValueError, match="`method` is 'reml' with head 'ml': expected 'ml'"):
        crossed(method="reml")
    with pytest.raises(ValueError, match="`method` is 'REML'"):
        crossed("gls", method="REML")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": torch.zeros(60)}, r"`batch\['weights'\]` is 0 in row 0: expected above 0"),
        ({"weights": torch.ones(59)}, r"`batch\['weights'\]` is .*: expected a floating-point"),
        (
            {"offset": torch.full((60,), torch.nan)},
            r"`batch\['offset'\]` is nan in row 0: expected finite",
        ),
        ({"residual": torch.zeros(60).long()}, r"the cell 0 in 60 rows: expected another one"),
        ({"residual": -torch.ones(60).long()}, r"is -1 in row 0: expected the row's cell"),
        ({}, "`batch` has no 'residual'"),
    ],
)
def test_parts_of_a_batch_that_are_wrong_are_named(change, message):
    data = {**batch(), "residual": torch.arange(60), **change}
    if not change:
        del data["residual"]
    model = MixedModel(network(), {"user": RandomEffect(7)}, AR1Matrix(3).double())
    with pytest.raises(ValueError, match=message):
        model.loss(data)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_trained_after_a_validation(name):
    model, data = MODELS[name](), batch()
    expected = gradients(model, model.loss(data))
    assert all(gradient.any() for gradient in expected)
    with torch.no_grad():
        model.loss(data)
    torch.testing.assert_close(gradients(model, model.loss(data)), expected)


def test_the_same_rows_in_other_tensors_are_prepared_once_and_changed_ones_anew():
    from unittest import mock

    from openreml_nn.likelihood.system.crossproducts import Pattern

    model, data = crossed(solver="blocked"), batch()
    with mock.patch.object(Pattern, "of", wraps=Pattern.of) as prepared:
        model.loss(data)
        model.loss(copy.deepcopy(data))
        assert prepared.call_count == 1
        data["groups"]["user"][0] = (data["groups"]["user"][0] + 1) % 7  # in place
        changed = model.loss(data)
        assert prepared.call_count == 2
    torch.testing.assert_close(changed, dense(model, data))
    model.residual = ScalarMatrix(1).double()
    torch.testing.assert_close(model.loss(data), dense(model, data))
    assert pickle.loads(pickle.dumps(model)).loss(data) == model.loss(data)


def test_a_network_in_single_precision_and_a_likelihood_in_double():
    data = batch()
    model = crossed()
    exact = model.loss(data)
    model.mean.float()
    data["x"] = data["x"].float()
    narrow = model.loss(data)
    assert narrow.dtype == torch.float64
    torch.testing.assert_close(narrow, exact, rtol=1e-5, atol=1e-6)
    narrow.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.mean.parameters())


def test_the_structure_of_the_groups_is_prepared_once():
    from unittest import mock

    from openreml_nn.likelihood.system.crossproducts import Pattern

    model, data = crossed(solver="blocked"), batch()
    with mock.patch.object(Pattern, "of", wraps=Pattern.of) as prepared:
        for _ in range(3):
            model.zero_grad()
            model.loss(data).backward()
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(0.01)
    assert prepared.call_count == 1


def test_blups_are_told_by_level_and_effect():
    effects = RandomEffect(["a", "b", "c"], effects=["(Intercept)", "dose"])
    model = MixedModel(network(), {"user": effects, "item": RandomEffect(2)})
    effects.blup += torch.arange(6.0).reshape(3, 2)
    table = model.blups()
    assert table["level"].tolist() == ["a", "a", "b", "b", "c", "c", 0, 1]
    assert table["effect"].tolist() == ["(Intercept)", "dose"] * 3 + ["(Intercept)"] * 2
    assert table["blup"].tolist() == [0, 1, 2, 3, 4, 5, 0, 0]


def wrong(**changes):
    data = batch()
    return {**data, **changes}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": {"user": torch.zeros(60).long()}}, "has no group 'item'"),
        ({"groups": {"user": torch.full((60,), 7), "item": torch.zeros(60).long()}}, "the code 7"),
        ({"groups": {"user": torch.zeros(60), "item": torch.zeros(60).long()}}, "60 integers"),
        ({"y": torch.zeros(60, 1)}, r"y\[:, 0\]"),
        ({"y": torch.zeros(59)}, r"expected \(60,\)"),
        ({"x": torch.full((60, 3), float("nan")).double()}, "not finite"),
        ({"x": torch.zeros(0, 3).double(), "y": torch.zeros(0)}, "the batch is empty"),
    ],
)
def test_errors_say_what_to_do(change, message):
    with pytest.raises(ValueError, match=message):
        crossed().loss(wrong(**change))


def test_errors_of_construction():
    with pytest.raises(ValueError, match="`head` is 'map'"):
        crossed("map")
    with pytest.raises(ValueError, match="`random` is empty"):
        MixedModel(network(), {})
    with pytest.raises(ValueError, match="`covariance` is \\(3, 3\\)"):
        RandomEffect(5, UnstructuredMatrix(3), effects=2)
    with pytest.raises(ValueError, match="a name is ''"):
        MixedModel(network(), {"": RandomEffect(5)})
    model = MixedModel(network(2), {"user": RandomEffect(7), "item": RandomEffect(4)})
    with pytest.raises(ValueError, match="with head 'gls'"):
        model.loss(batch())
    model = MixedModel(network(), {"user": RandomEffect(7, effects=2)})
    with pytest.raises(ValueError, match="has 2 effects"):
        model.loss(batch())


@pytest.mark.parametrize("call", ["loss", "update", "predict"])
def test_a_covariance_put_in_the_place_of_another_has_its_shape(call):
    model = crossed()
    model.random["user"].g = ScalarMatrix(5).double()
    with pytest.raises(InputError, match=r"`g` of 'user' is \(5, 5\): expected \(7, 7\)"):
        getattr(model, call)(batch())


# ---------------------------------------------------------------------- predictive variances


def unknown(data):
    """The same rows with levels that were not seen."""
    groups = {name: torch.full_like(codes, -1) for name, codes in data["groups"].items()}
    return {**data, "groups": groups}


@pytest.mark.parametrize("name", MODELS)
def test_the_variance_for_unknown_levels_is_that_of_v_and_of_the_coefficients(name):
    model, data = MODELS[name](), batch()
    model.update(data)
    loss, _, X = model.data(model(data), data)
    V = loss.covariance().detach()
    expected = V.diagonal().clone()
    if name == "gls":
        X = X.detach()
        spread = torch.linalg.inv(X.mT @ torch.linalg.solve(V, X))
        expected += torch.einsum("np,pq,nq->n", X, spread, X)
        assert float(expected.sum()) > 1.02 * float(V.diagonal().sum())
    if name == "kernel":
        # The level's own place on the diagonal of the kernel is not known.
        expected += model.random["user"].prior()[0, 0] - (expected - model.residual()[0, 0])
    torch.testing.assert_close(model.predict(unknown(data)).variance, expected.detach())


@pytest.mark.parametrize("name", [name for name in MODELS if name != "gls"])
def test_the_variance_for_known_levels_is_that_given_the_data(name):
    """With the mean known, V - V' inverse(V) V' of a new observation of the same rows."""
    model, data = MODELS[name](), batch()
    model.update(data)
    loss, _, _ = model.data(model(data), data)
    terms = [term.detach() for term in loss.covariance.terms()]
    V = loss.covariance().detach()
    found = model.predict(data).variance
    R = terms[-1].dense()
    if len(terms) == 2:  # effects of different factors count as independent
        Z = V - R
        expected = (Z - Z @ torch.linalg.solve(V, Z) + R).diagonal()
        torch.testing.assert_close(found, expected)
    assert bool((found > R.diagonal()).all())
    assert bool((found < V.diagonal()).all())


@pytest.mark.parametrize("effects", [1, 2])
def test_the_prior_of_related_levels_is_the_mean_of_their_own_blocks(effects):
    half = torch.randn(5 * effects, 7)
    K = half @ half.mT
    prior = RandomEffect(5, KnownMatrix(K).double(), effects=effects).prior().detach()
    blocks = [K[i : i + effects, i : i + effects] for i in range(0, len(K), effects)]
    torch.testing.assert_close(prior, torch.stack(blocks).mean(0))
    assert float((blocks[0] - prior).abs().max()) > 0.1


def test_an_unknown_level_adds_nothing_to_the_mean():
    model, data = slopes(), batch()
    model.update(data)
    model.random["user"].blup += 3.0
    found = model.predict(unknown(data))
    torch.testing.assert_close(found.mean, found.population_mean, rtol=0, atol=0)


def test_an_aliased_feature_has_no_coefficient():
    torch.manual_seed(1)
    data = batch()
    wide = {**data, "x": torch.cat([data["x"][:, :1], data["x"]], 1)}
    narrow = MixedModel(nn.Identity(), {"user": RandomEffect(7)}, head="gls")
    model = MixedModel(nn.Identity(), {"user": RandomEffect(7)}, head="gls")
    narrow.update({**data, "groups": {"user": data["groups"]["user"]}})
    with pytest.warns(RuntimeWarning, match="rank deficient"):
        model.update(wide)
    torch.testing.assert_close(model.beta[[0, 2, 3]], narrow.beta)
    assert float(model.beta[1]) == 0
    assert not bool(model.beta_covariance[1].any())
    one, other = narrow.predict(data), model.predict(wide)
    torch.testing.assert_close(list(other), list(one))


def test_dropout_is_the_same_in_both_passes_of_the_parts():
    """Else the gradient would be that of another network than the loss."""
    data = batch()
    torch.manual_seed(1)
    mean = nn.Sequential(nn.Dropout(0.5), network())
    model = MixedModel(mean, {"user": RandomEffect(7)})
    torch.manual_seed(2)
    value = model.backward_in_parts(data, 60)
    found = [p.grad.clone() for p in model.parameters()]
    torch.manual_seed(2)
    full = model.loss(data)
    torch.testing.assert_close(full.detach(), value)
    torch.testing.assert_close(found, gradients(model, full))


def careless(**changes):
    given = batch()
    given.update(changes)
    return {key: value for key, value in given.items() if value is not None}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda: careless(x=None), "`batch` has no 'x': expected it beside"),
        (lambda: careless(y=None), "`batch` has no 'y'"),
        (lambda: careless(groups=None), "`batch` has no 'groups'"),
        (lambda: [batch()], r"`batch` is \[.*: expected a dict with 'x', 'y' and 'groups'"),
        (lambda: careless(x=batch()["x"].numpy()), "`batch\\['x'\\]` is a ndarray .* expected a tensor"),
        (lambda: careless(x=batch()["x"].float()), "`mean` fails for batch\\['x'\\], a torch.float32"),
        (lambda: careless(y=batch()["y"].numpy()), "`y` is a ndarray .* expected a floating-point tensor"),
        (lambda: careless(y=batch()["y"].long()), "`y` is a torch.int64 .* expected a floating-point"),
        (lambda: careless(groups=torch.arange(60)), "batch\\['groups'\\]` is a torch.int64 .* expected a dict"),
        (lambda: careless(groups={"user": [0] * 60}), "batch\\['groups'\\]\\['user'\\]` is .* 60 integers"),
        (lambda: careless(values=[1.0]), "batch\\['values'\\]` is \\[1.0\\]: expected a dict"),
        (lambda: careless(x=torch.zeros(60, 3, device="meta")), "on meta, which holds no values"),
    ],
)  # fmt: skip
def test_a_careless_batch_is_refused_by_name(data, message):
    with pytest.raises((TypeError, ValueError), match=message):
        crossed().loss(data())


def test_careless_random_effects_are_refused_by_name():
    mean = nn.Linear(3, 1)
    for random, message in [
        ([RandomEffect(4)], "`random` is .*: expected a dict by names"),
        ({"g": 4}, "`random\\['g'\\]` is 4: expected a RandomEffect"),
    ]:
        with pytest.raises(TypeError, match=message):
            MixedModel(mean, random)
    for levels in ("abc", torch.zeros(5), 0, -1, True, 2.5, [], ["a", "a"]):
        with pytest.raises((TypeError, ValueError), match=r"`levels` is .*: expected"):
            RandomEffect(levels)
    with pytest.raises(TypeError, match="`mean` is 'network': expected a network"):
        MixedModel("network", {"g": RandomEffect(4)})
