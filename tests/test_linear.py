"""A formula and a table: what may not matter, and levels that were not seen."""

import pickle

import numpy as np
import pandas as pd
import pytest
import torch

from openreml_nn import InputError, REMLLoss, fit_reml, lmm
from openreml_nn.datasets import oats, sleepstudy
from openreml_nn.model.structures import linear_model
from openreml_nn.support.display import show_share
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


@pytest.mark.parametrize("shift", [0.0, 1e2, 1e5])
@pytest.mark.parametrize("method", ["reml", "ml"])
@pytest.mark.parametrize("chunk_rows", [None, 50])
def test_slopes_on_covariates_far_from_zero_are_those_of_near_ones(
    tmp_path, shift, method, chunk_rows
):
    """The likelihood, predictions and variances of slopes are the same; intercepts move along."""
    near, far = sleepstudy(), sleepstudy().assign(Days=lambda t: t["Days"] + shift)
    path = tmp_path / "far.parquet"
    far.to_parquet(path)
    formula = "Reaction ~ Days + (Days | Subject)"
    expected = lmm(formula, near, method=method)
    found = lmm(formula, path if chunk_rows else far, method=method, chunk_rows=chunk_rows)
    assert found.converged
    assert not found.indistinct
    assert found.log_likelihood == pytest.approx(expected.log_likelihood, rel=1e-10)
    one, other = found.predict(far), expected.predict(near)
    for column in one:
        np.testing.assert_allclose(one[column], other[column], rtol=1e-7)
    (a, _), (b, _) = found.components, expected.components
    assert float(a.covariance[1, 1]) == pytest.approx(float(b.covariance[1, 1]), rel=1e-6)
    assert float(a.std_error[1, 1]) == pytest.approx(float(b.std_error[1, 1]), rel=1e-5)
    # Of the user's scale: the variance at 0 is that of the line far outside of the data.
    C = torch.tensor([[1.0, -shift], [0.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(a.covariance, C @ b.covariance @ C.mT, rtol=1e-5, atol=1e-3)
    L = torch.zeros(2, 2, dtype=torch.float64)
    for parameter in found.parameters[:3]:
        i, j = map(int, parameter.name.split("_")[1:])
        L[i, j] = parameter.value
        assert found.history[-1].parameters[parameter.name] == pytest.approx(
            parameter.value, rel=1e-6
        )
    torch.testing.assert_close(L @ L.mT, a.covariance, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        found.random[0].values, expected.random[0].values @ C.mT, rtol=1e-6, atol=1e-6
    )


def test_what_is_estimated_in_another_basis_has_the_standard_errors_of_the_users():
    """Those at a shift at which both ways converge, found by either."""
    table = sleepstudy().assign(Days=lambda t: t["Days"] + 60)
    encoded = (encoder := Encoder("Reaction ~ Days + (Days | Subject)")).fit(table)
    plain = fit_reml(
        linear_model(encoded).covariance(encoded.batch()),
        encoded.y,
        encoded.X,
        names=encoded.names,
    )
    found = lmm(encoder.formula.text, table)
    assert found.model.random["Subject"].basis[0, 1] != 0
    for one, other in zip(found.parameters, plain.parameters, strict=True):
        assert one.name == other.name
        assert one.value == pytest.approx(other.value, rel=1e-6)
        assert one.std_error == pytest.approx(other.std_error, rel=1e-5)
        assert one.untransformed == pytest.approx(other.untransformed, rel=1e-6)
        assert one.untransformed_std_error == pytest.approx(other.untransformed_std_error, rel=1e-5)
    for one, other in zip(found.random, plain.random, strict=True):
        torch.testing.assert_close(one.values, other.values, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(one.variances, other.variances, rtol=1e-6, atol=1e-6)
    value = REMLLoss(found.source.covariance, reduction="sum")(encoded.y, encoded.X)
    assert -float(value.detach()) == pytest.approx(found.log_likelihood, rel=1e-12)


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
        ({"progress": False}, InputError, "`progress` is False without `chunk_rows`"),
        ({"progress": 1, "chunk_rows": 10}, TypeError, "`progress` is"),
        ({"categorical": ["Weeks"]}, InputError, "no column 'Weeks'"),
    ],
)
def test_words_that_are_wrong_are_refused_in_its_own_name(options, error, message):
    with pytest.raises(error, match=message):
        lmm("Reaction ~ Days + (1 | Subject)", sleepstudy(), **options)


@pytest.mark.parametrize("solver", ["auto", "sparse"])
def test_long_factors_say_how_far_they_are(solver, capfd):
    names = [f"a{i}" for i in range(600)]
    parents = {"sire": [None] * 20 + [names[i % 10] for i in range(580)]}
    parents["dam"] = [None] * 20 + [names[10 + i % 7] for i in range(580)]
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"animal": names, "y": rng.normal(size=600), "pen": np.arange(600) % 97})
    result = lmm(
        "y ~ 1 + (1 | ped(animal)) + (1 | pen)", table, progress=True, solver=solver,
        pedigree=table[["animal"]].assign(**parents),
        constraints={"animal/sigma^2": 1.0, "pen/sigma^2": 1.0}, residual_variance=1.0,
    )  # fmt: skip
    assert result.plan.choice.progress is show_share
    assert "% done" not in capfd.readouterr().err  # it took no seconds
    assert pickle.loads(pickle.dumps(result)).log_likelihood == result.log_likelihood
    show_share("factor", 0.25)
    assert capfd.readouterr().err == "factor: 25% done\n"


@pytest.mark.parametrize("progress", [None, True, False])
def test_chunks_show_how_far_they_are(tmp_path, capfd, monkeypatch, progress):
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, to rich of any version
    path = tmp_path / "a[" / "b].csv"  # which in a bar's own language would end "b"
    path.parent.mkdir()
    sleepstudy().to_csv(path, index=False)
    lmm("Reaction ~ Days + (1 | Subject)", path, chunk_rows=50, progress=progress)
    shown = capfd.readouterr()
    assert ("reading" in shown.err) == (progress is not False)
    assert shown.out == ""


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


def test_a_known_residual_variance_takes_a_response_without_error():
    table = pd.DataFrame({"x": np.arange(9.0) ** 2, "y": 3 + np.arange(9.0) ** 2})
    with pytest.raises(InputError, match="fit `y` exactly"):
        lmm("y ~ x", table)
    found = lmm("y ~ x", table, residual_variance=0.25)
    assert found.fixed.estimate.tolist() == pytest.approx([3, 1], rel=1e-12)
    X = np.stack([np.ones(9), table.x], 1)
    np.testing.assert_allclose(found.fixed.covariance, 0.25 * np.linalg.inv(X.T @ X), rtol=1e-10)
