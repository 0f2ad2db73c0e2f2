"""A formula and a table: what may not matter, and levels that were not seen."""

import numpy as np
import pandas as pd
import pytest
import torch

from openreml_nn import InputError, lmm
from openreml_nn.datasets import oats, sleepstudy
from openreml_nn.table import Encoder

OPTIONS = {
    "one variance": ("Reaction ~ Days + (Days | Subject)", {}),
    "ar1": ("Reaction ~ Days", {"residual": "ar1(Days | Subject)"}),
    "us": ("Reaction ~ Days", {"residual": "us(Days | Subject)"}),
    "diag": ("Reaction ~ Days + (1 | Subject)", {"residual": "diag(Days)"}),
    "weights": ("Reaction ~ 1 + (1 | Subject)", {"weights": "w"}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_order_of_the_rows_does_not_matter(name):
    formula, options = OPTIONS[name]
    table = sleepstudy().assign(w=lambda t: 1 + t["Days"])
    if name == "us":
        table = table[table["Days"] < 4]
    one, other = (lmm(formula, t, **options) for t in (table, table.sample(frac=1, random_state=3)))
    assert other.log_likelihood == pytest.approx(one.log_likelihood, rel=1e-9)
    for a, b in zip(one.components, other.components, strict=True):
        assert a.effects == b.effects
        assert a.levels == b.levels
        torch.testing.assert_close(b.covariance, a.covariance, rtol=1e-4, atol=1e-4)


def test_positions_of_residuals_are_sorted_by_size():
    table = pd.DataFrame({"y": np.arange(6.0), "g": [1, 1, 1, 2, 2, 2], "t": [10, 9, 8, 9, 8, 10]})
    residual = Encoder("y ~ 1", residual="ar1(t | g)").fit(table).residual
    assert residual.positions == ("8", "9", "10")
    assert residual.cells.tolist() == [2, 1, 0, 4, 3, 5]


def test_a_combination_that_was_not_seen_is_no_level_though_its_parts_were():
    table = oats().query("not (Block == 'II' and Variety == 'Victory')")
    encoder = Encoder("yield ~ nitro + (1 | Block:Variety)")
    (design,) = encoder.fit(table).random
    assert "II:Victory" not in design.levels
    with pytest.warns(RuntimeWarning, match="of Block:Variety in 4 of 72 rows"):
        (found,) = encoder.transform(oats()).random
    new = (oats()["Block"] == "II") & (oats()["Variety"] == "Victory")
    assert new.sum() == 4
    assert set(found.codes[new.to_numpy(copy=True)].tolist()) == {-1}
    labels = (oats()["Block"] + ":" + oats()["Variety"])[~new].tolist()
    assert [found.levels[i] for i in found.codes if i >= 0] == labels


def test_a_result_predicts_what_it_fitted():
    for formula in (
        "Reaction ~ Days + (Days | Subject)",
        "log(Reaction) ~ Days + offset(Days / 9)",
    ):
        result = lmm(formula, sleepstudy())
        found = result.predict(sleepstudy().drop(columns="Reaction"))
        torch.testing.assert_close(torch.tensor(found["mean"].to_numpy()), result.fitted)


def test_predictions_of_levels_that_were_not_seen_are_those_of_the_population():
    result = lmm("Reaction ~ Days + (Days | Subject)", sleepstudy())
    table = sleepstudy().set_index(np.arange(180) + 1000)
    table.loc[1003, "Subject"] = "new"
    table.loc[1007, "Days"] = np.nan
    with pytest.warns(RuntimeWarning) as caught:
        found = result.predict(table)
    assert "1 of 180 rows left out" in str(caught[0].message)
    assert "of Subject in 1 of 179 rows" in str(caught[1].message)
    assert found.index.tolist() == [i for i in table.index if i != 1007]
    assert found.loc[1003, "mean"] == found.loc[1003, "population_mean"]
    b = result.fixed.estimate.numpy()
    np.testing.assert_allclose(found["population_mean"], b[0] + b[1] * table["Days"].dropna())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"REML": False}, TypeError, "lmm.. got an unexpected keyword argument 'REML'"),
        ({"weight": "Days"}, TypeError, "lmm.. got an unexpected keyword argument 'weight'"),
        ({"names": ["a", "b"]}, TypeError, "lmm.. got an unexpected keyword argument 'names'"),
        ({"method": "REML"}, InputError, "`method` is 'REML'"),
        ({"solver": "magic"}, InputError, "`solver` is 'magic'"),
        ({"residual_variance": 0.0}, InputError, "`residual_variance` is 0.0"),
        ({"residual_variance": "1"}, TypeError, "`residual_variance` is"),
        ({"residual_variance": 1, "residual": "cs(Subject)"}, InputError, "leave out `residual`"),
        ({"chunk_rows": 10}, InputError, "in memory already"),
        ({"categorical": ["Weeks"]}, InputError, "no column 'Weeks'"),
    ],
)
def test_words_that_are_wrong_are_refused_in_its_own_name(options, error, message):
    with pytest.raises(error, match=message):
        lmm("Reaction ~ Days + (1 | Subject)", sleepstudy(), **options)


@pytest.mark.parametrize("rows", [3, 1])
def test_a_known_residual_variance_is_held(rows):
    """The other variance at the optimum of its own likelihood, on a fine grid."""
    rng = np.random.default_rng(0)
    s2, g = rng.uniform(0.2, 2, 90), np.arange(90) // rows
    y = 3 + rng.standard_normal(90)[g] + np.sqrt(s2) * rng.standard_normal(90)
    table = pd.DataFrame({"y": y, "w": 1 / s2, "g": g})
    found = lmm("y ~ 1 + (1 | g)", table, weights="w", residual_variance=1)
    assert found.residual_variance == pytest.approx(1, rel=1e-12)
    assert [c.group for c in found.components] == ["g", "Residual"]

    def reml(v):
        V = v * (g[:, None] == g) + np.diag(s2)
        inverse, one = np.linalg.inv(V), np.ones(90)
        size = one @ inverse @ one
        e = y - one @ inverse @ y / size
        log = np.linalg.slogdet(V)[1] + np.log(size)
        return -0.5 * (89 * np.log(2 * np.pi) + log + e @ inverse @ e)

    variance = float(found.components[0].covariance)
    assert found.log_likelihood == pytest.approx(reml(variance), rel=1e-12)
    assert reml(variance) > max(reml(variance * 1.001), reml(variance / 1.001))
