"""What is held, bounded or tied of covariance parameters: as the same tree by hand, and by every way."""

import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
from lightning import Trainer

from openreml_nn import InputError, fit_reml, glmm, lmm
from openreml_nn.covariance import AR1Matrix
from openreml_nn.datasets import sleepstudy
from openreml_nn.inference import anova, bootstrap, coefficients, likelihood_ratio_test, profile
from openreml_nn.lightning import MixedModelDataModule, MixedModule
from openreml_nn.model.constraints import constrain, start_at
from openreml_nn.model.structures import linear_model
from openreml_nn.support.names import shortened
from openreml_nn.table import Encoder
from tests.forked import program

TWO = "Reaction ~ Days + (1 | Subject) + (0 + Days | Subject)"
SLEEP = sleepstudy().assign(half=lambda t: t["Days"] // 2)
QUICK = {
    "max_epochs": 60, "accelerator": "cpu", "logger": False, "enable_checkpointing": False,
    "enable_progress_bar": False, "enable_model_summary": False,
}  # fmt: skip


def values(result):
    return {p.name: p.value for p in result.parameters}


@pytest.mark.parametrize("method", ["reml", "ml"])
@pytest.mark.parametrize(
    ("formula", "residual", "name", "full", "value"),
    [
        (TWO, None, "Subject/sigma^2", "Subject/g/sigma^2", 400.0),
        (TWO, None, "Subject_1/g/sigma^2", "Subject_1/g/sigma^2", 0.0),
        (TWO, None, "residual/sigma^2", "residual/sigma^2", 700.0),
        ("Reaction ~ Days + (Days | Subject)", None, "Subject/L_1_0", "Subject/g/effects/L_1_0", 0.0),
        ("Reaction ~ Days", "ar1(Days | Subject)", "residual/rho", "residual/g/matrix/rho", 0.5),
        (
            "Reaction ~ Days + ar1(0 + half | Subject)", None, "Subject/rho",
            "Subject/g/effects/rho", 0.9,
        ),
        ("Reaction ~ 1 + (1 | Subject)", "exp(Days)", "residual/delta", "residual/delta", 0.1),
    ],
)  # fmt: skip
def test_a_held_parameter_is_one_that_is_fixed_in_the_tree(
    formula, residual, name, full, value, method
):
    found = lmm(
        formula, SLEEP, residual=residual, constraints={name: value}, method=method, solver="dense"
    )
    encoded = Encoder(formula, residual=residual).fit(SLEEP)
    V = linear_model(encoded, method).covariance(encoded.batch())
    V.fix(full, value, natural=True)
    expected = fit_reml(V, encoded.y, encoded.X, method=method, solver="dense")
    assert found.log_likelihood == pytest.approx(expected.log_likelihood, abs=1e-7)
    assert found.num_params == expected.num_params == V.num_free_params
    assert found.aic == pytest.approx(expected.aic, abs=1e-6)
    assert values(found)[full] == pytest.approx(value, abs=1e-12)
    held = next(p for p in found.parameters if p.name == full)
    assert held.fixed
    assert f"{full} held at {value:g}" in found.summary()
    assert found.constraints == {full: value}


def test_the_profile_likelihood_at_a_value_is_that_of_the_constrained_fit():
    free = lmm(TWO, SLEEP, method="ml")
    table = profile(free, ["sd_(Intercept)|Subject"], progress=False).intervals()
    bound = float(table["high"].iloc[0]) ** 2
    held = lmm(TWO, SLEEP, method="ml", constraints={"Subject/sigma^2": bound})
    drop = free.log_likelihood - held.log_likelihood
    assert drop == pytest.approx(3.841458820694124 / 2, abs=1e-3)
    test = likelihood_ratio_test(held, free)
    assert test.df == 1
    assert test.statistic == pytest.approx(2 * drop, abs=1e-8)


def test_a_profile_does_not_leave_the_bounds_of_a_fit_in_silence():
    for bounds in ((None, 400.0), (100.0, 3000.0)):
        found = lmm(TWO, SLEEP, constraints={"Subject/sigma^2": bounds})
        with pytest.raises(InputError, match=r"`result` has the bounds .* of 'Subject/g/sigma"):
            profile(found, progress=False)


def test_inference_where_every_variance_is_held():
    all_held = {"Subject/sigma^2": 300.0, "residual/sigma^2": 900.0}
    found = lmm("Reaction ~ Days + (1 | Subject)", SLEEP, constraints=all_held)
    days = coefficients(found).set_index("name").loc["Days"]
    assert days["df"] == np.inf
    (p,) = anova(found)["p"]
    assert p == pytest.approx(days["p"], rel=1e-6)
    table = profile(found, progress=False).intervals().set_index("name").loc["Days"]
    # The likelihood is a parabola, of which the ends are Wald's.
    assert [table["low"], table["high"]] == pytest.approx([days["low"], days["high"]], rel=1e-5)
    samples = bootstrap(found, 200, seed=1, progress=False).samples
    assert samples["Days"].std() == pytest.approx(days["std_error"], rel=0.2)


def test_kenward_and_roger_know_what_is_held():
    """A variance that is held at 0 is a term that is not there, and no other one is estimated."""
    zero = lmm(TWO, SLEEP, constraints={"Subject/sigma^2": 0.0})
    none = lmm("Reaction ~ Days + (0 + Days | Subject)", SLEEP)
    found, expected = (coefficients(r, ddf="kenward-roger") for r in (zero, none))
    columns = ["estimate", "std_error", "df"]
    np.testing.assert_allclose(found[columns], expected[columns], rtol=1e-6)
    held = lmm(TWO, SLEEP, constraints={"residual/sigma^2": 650.0})
    known = lmm(TWO, SLEEP, residual_variance=650.0)
    found, expected = (coefficients(r, ddf="kenward-roger") for r in (held, known))
    np.testing.assert_allclose(found[columns], expected[columns], rtol=1e-6)
    assert (found["df"] > 17).all()
    alone = lmm("Reaction ~ Days", SLEEP, residual_variance=650.0)
    with pytest.raises(InputError, match="no variance of the model is estimated"):
        coefficients(alone, ddf="kenward-roger")
    for limit in ((None, 400.0), "Subject_1/sigma^2"):
        other = lmm(TWO, SLEEP, constraints={"Subject/sigma^2": limit})
        with pytest.raises(InputError, match="has the constraint"):
            coefficients(other, ddf="kenward-roger")


@pytest.mark.parametrize(
    ("ends", "end"),
    [
        ((100.0, 300.0), 300.0), ((None, 300.0), 300.0), ([700, 900], 700.0), ((700, None), 700.0),
        ((100.0, 900.0), None), ((0, 900.0), None), ((0.0, float("inf")), None),
    ],
)  # fmt: skip
def test_a_bounded_parameter_is_free_within_its_bounds_and_at_an_end_else(ends, end):
    found = lmm(TWO, SLEEP, constraints={"Subject/sigma^2": ends})
    name = "Subject/g/sigma^2"
    expected = lmm(TWO, SLEEP, constraints=None if end is None else {name: end})
    assert found.converged
    assert found.log_likelihood == pytest.approx(expected.log_likelihood, abs=1e-8)
    assert values(found) == pytest.approx(values(expected), rel=1e-4)
    assert found.num_params == 3
    assert found.boundary == (() if end is None else (name,))


def test_bounds_of_a_variance_function_and_of_a_correlation():
    for residual, name, ends in (
        ("exp(Days)", "residual/delta", (-0.02, 0.01)),
        ("ar1(Days | Subject)", "residual/rho", (-0.5, 0.3)),
    ):
        formula = "Reaction ~ Days + (1 | Subject)"
        found = lmm(formula, SLEEP, residual=residual, constraints={name: ends})
        held = lmm(formula, SLEEP, residual=residual, constraints={name: ends[1]})
        assert found.log_likelihood == pytest.approx(held.log_likelihood, abs=1e-7)
        again = lmm(formula, SLEEP, residual=residual, constraints={name: (-0.9, 0.9)})
        free = lmm(formula, SLEEP, residual=residual)
        assert again.log_likelihood == pytest.approx(free.log_likelihood, abs=1e-7)


@pytest.mark.parametrize("method", ["reml", "ml"])
def test_tied_parameters_are_one(method):
    """Two variances that are equal are the one of independent effects of one variance."""
    found = lmm(TWO, SLEEP, method=method, constraints={"Subject/sigma^2": "Subject_1/sigma^2"})
    expected = lmm("Reaction ~ Days + idv(Days | Subject)", SLEEP, method=method)
    assert found.log_likelihood == pytest.approx(expected.log_likelihood, abs=1e-7)
    assert found.num_params == expected.num_params == 2
    one, two, _ = found.parameters
    assert one.value == two.value
    assert one.std_error == two.std_error > 0
    assert "Subject/g/sigma^2 tied to Subject_1/g/sigma^2" in found.summary()
    assert not profile(found, ["sigma"], progress=False).intervals()["low"].isna().any()


@pytest.mark.parametrize("structure", ["ar1", "homcs"])
def test_a_correlation_may_be_held_at_one(structure):
    # Effects of one variance that are wholly correlated are one effect.
    rng = np.random.default_rng(3)
    g, f = np.repeat(np.arange(15), 6), np.tile(np.repeat(np.arange(3), 2), 15)
    y = 2 * rng.normal(size=15)[g] + rng.normal(size=90)
    table = pd.DataFrame({"g": g.astype(str), "f": [f"f{i}" for i in f], "y": y})
    one = lmm("y ~ f + (1 | g)", table)
    both = lmm(f"y ~ f + {structure}(0 + f | g)", table, constraints={"g/g/effects/rho": 1.0})
    assert both.constraints == {"g/g/effects/rho": 1.0}
    np.testing.assert_allclose(both.log_likelihood, one.log_likelihood, rtol=1e-8)
    np.testing.assert_allclose(both.residual_variance, one.residual_variance, rtol=1e-5)
    np.testing.assert_allclose(
        both.random[0].values.numpy(), one.random[0].values.numpy() @ np.ones((1, 3)), atol=1e-5
    )


def test_ties_chain_and_may_be_held_or_bounded():
    three = TWO + " + (1 | Days)"
    ties = {"Subject/sigma^2": "Subject_1/sigma^2", "Days/sigma^2": "Subject/sigma^2"}
    at = lmm(three, SLEEP, constraints={**ties, "Subject_1/sigma^2": 50.0})
    names = ["Subject/g/sigma^2", "Subject_1/g/sigma^2", "Days/g/sigma^2"]
    assert [values(at)[name] for name in names] == pytest.approx([50.0] * 3, rel=1e-12)
    assert at.num_params == 1
    each = lmm(three, SLEEP, constraints=dict.fromkeys(names, 50.0))
    assert at.log_likelihood == pytest.approx(each.log_likelihood, abs=1e-9)
    low = lmm(three, SLEEP, constraints={**ties, "Subject_1/sigma^2": (45.0, 50.0)})
    assert low.log_likelihood >= at.log_likelihood - 1e-9
    assert {values(low)[name] for name in names} == {values(low)[names[0]]}


def test_starts_move_nothing_but_where_a_fit_begins():
    formula = "Reaction ~ Days + (Days | Subject)"
    free = lmm(formula, SLEEP)
    found = lmm(formula, SLEEP, starts={"Subject/L_0_0": 20.0, "residual/sigma^2": 600.0})
    assert found.log_likelihood == pytest.approx(free.log_likelihood, abs=1e-7)
    near = {p.name: p.value for p in lmm(TWO, SLEEP).parameters}
    again = lmm(TWO, SLEEP, starts=near)
    assert again.iterations < lmm(TWO, SLEEP).iterations
    encoded = Encoder(TWO).fit(SLEEP)
    model = linear_model(encoded)
    start_at(model, model.covariance(encoded.batch()).entries(), {"Subject/sigma^2": 7.0})
    assert float(model.random["Subject"].g()[0, 0].detach()) == pytest.approx(7.0)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("x", TypeError, "`starts` of 'Subject/g/sigma^2' is 'x': expected one number"),
        (3.0, InputError, "is 3 on the natural scale: expected a value within (100, 200)"),
    ],
)
def test_a_start_at_fault_is_named(value, error, message):
    bounds = {"Subject/sigma^2": (100.0, 200.0)}
    with pytest.raises(error, match=re.escape(message)):
        lmm(TWO, SLEEP, constraints=bounds, starts={"Subject/sigma^2": value})


@pytest.mark.parametrize("method", ["ml", "reml"])
def test_a_generalised_model_starts_where_it_is_told(method):
    table = SLEEP.assign(slow=SLEEP["Reaction"] > 300)
    formula = "slow ~ Days + (1 | Subject) + (0 + Days | Subject)"
    free = glmm(formula, table, method=method)
    near = {name: value for name, value in values(free).items() if value > 0}
    again = glmm(formula, table, method=method, starts=near)
    assert again.log_likelihood == pytest.approx(free.log_likelihood, abs=1e-6)
    assert again.iterations < free.iterations
    zero = glmm(
        "slow ~ Days + (1 | Subject)", table, method=method, starts={"Subject/sigma^2": 0.0}
    )
    one = glmm("slow ~ Days + (1 | Subject)", table, method=method)
    assert zero.log_likelihood == pytest.approx(one.log_likelihood, abs=1e-6)
    with pytest.raises(
        InputError, match="`starts` names 'a/sigma\\^2': expected one of Subject/g/s"
    ):
        glmm(formula, table, starts={"a/sigma^2": 1.0})


def test_a_family_in_the_module_starts_where_it_is_told():
    """The fit of all but the network sets starts of its own, which must not undo the user's."""
    table = SLEEP.assign(slow=SLEEP["Reaction"] > 300)
    formula = "slow ~ Days + (1 | Subject)"
    near = values(glmm(formula, table))
    steps = []
    for starts in (None, near):
        module = MixedModule(formula, family="binomial", starts=starts)
        Trainer(**QUICK).fit(
            module, datamodule=MixedModelDataModule(table, formula, family="binomial")
        )
        steps.append(module.result.iterations)
    assert steps[1] < steps[0]


def test_a_generalised_model_takes_constraints():
    table = SLEEP.assign(slow=SLEEP["Reaction"] > 300)
    formula = "slow ~ Days + (1 | Subject) + (0 + Days | Subject)"
    held = glmm(formula, table, family="binomial", constraints={"Subject/sigma^2": 2.0})
    upper = glmm(formula, table, family="binomial", constraints={"Subject/sigma^2": (0.5, 2.0)})
    assert held.num_params == 1
    assert upper.log_likelihood == pytest.approx(held.log_likelihood, abs=1e-6)
    ties = {"Subject/sigma^2": "Subject_1/sigma^2"}
    tied = glmm(formula, table, family="binomial", constraints=ties)
    idv = glmm("slow ~ Days + idv(Days | Subject)", table, family="binomial")
    assert tied.log_likelihood == pytest.approx(idv.log_likelihood, abs=1e-6)
    assert [p.fixed for p in tied.parameters] == [False, False]


def test_the_module_and_the_program_constrain_as_lmm_does(tmp_path):
    constraints = {"Subject/sigma^2": (700.0, 900.0), "Subject_1/sigma^2": 30.0}
    fit = lmm(TWO, SLEEP, constraints=constraints)
    starts = {"residual/sigma^2": 500.0}
    module = MixedModule(TWO, constraints=constraints, starts=starts)
    trainer = Trainer(**QUICK)
    trainer.fit(module, MixedModelDataModule(SLEEP, TWO))
    assert module.result.log_likelihood == pytest.approx(fit.log_likelihood, abs=1e-7)
    assert module.result.constraints == fit.constraints
    trainer.save_checkpoint(tmp_path / "model.ckpt", weights_only=False)
    loaded = MixedModule.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    np.testing.assert_allclose(loaded.predict(SLEEP), fit.predict(SLEEP), rtol=1e-5)
    assert loaded.model.random["Subject_1"].g.fixed_param_names == ["sigma^2"]
    done = program(
        "logger=none", "plots=false", "trainer.enable_progress_bar=false", "hydra.run.dir=r",
        f"model.formula={TWO}", "model.constraints.Subject/sigma^2=[700,900]",
        "model.constraints.Subject_1/sigma^2=30", "model.starts.residual/sigma^2=500",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "r" / "result.json").read_text())
    assert record["fit"]["log_likelihood"] == pytest.approx(fit.log_likelihood, abs=1e-7)
    assert record["model"]["constraints"]["Subject_1/g/sigma^2"] == 30
    assert "Subject/sigma^2:" in (tmp_path / "r" / "config.yaml").read_text()
    tied = program(
        "logger=none", "plots=false", "trainer.enable_progress_bar=false", "hydra.run.dir=t",
        f"model.formula={TWO}", "model.constraints.Subject/sigma^2=Subject_1/sigma^2", cwd=tmp_path,
    )  # fmt: skip
    assert "Subject/g/sigma^2 tied to Subject_1/g/sigma^2" in tied.stdout
    wrong = program(f"model.formula={TWO}", "model.constraints.Subject/rho=1", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "expected one of Subject/g/sigma^2, Subject_1/g/sigma^2" in wrong.stderr


@pytest.mark.parametrize(
    ("constraints", "error", "message"),
    [
        (
            {"Subject/rho": 1},
            InputError,
            "expected one of Subject/g/sigma^2, Subject_1/g/sigma^2, re",
        ),
        ({"sigma^2": 1}, InputError, "`constraints` names 'sigma^2': expected one of"),
        ({"Subject/sigma^2": "q/sigma^2"}, InputError, "`constraints` names 'q/sigma^2'"),
        (
            {"Subject/sigma^2": -1.0},
            InputError,
            "`constraints` of 'Subject/g/sigma^2' is -1 on the natural scale: expected a value "
            "within (0, inf)",
        ),
        (
            {"Subject/sigma^2": float("nan")},
            InputError,
            "`constraints` of 'Subject/g/sigma^2' is nan: expected a finite number",
        ),
        ({"Subject/sigma^2": (2, 1)}, InputError, "expected low < high, within (0, inf)"),
        ({"Subject/sigma^2": (-1, 1)}, InputError, "expected low < high, within (0, inf)"),
        ({"Subject/sigma^2": (1, 2, 3)}, InputError, "expected a pair (low, high)"),
        ({"Subject/sigma^2": ("a", 3)}, InputError, "expected a pair (low, high)"),
        ({"Subject/sigma^2": "Subject/g/sigma^2"}, InputError, "to itself"),
        (
            {"Subject/sigma^2": 1.0, "Subject/g/sigma^2": 2.0},
            InputError,
            "`constraints` names a parameter twice",
        ),
        ({"Subject/sigma^2": True}, TypeError, "expected a number, a pair (low, high) or the name"),
        ({"Subject/sigma^2": None}, TypeError, "expected a number, a pair (low, high) or the name"),
        ([1.0], TypeError, "expected a dict by names"),
    ],
)
def test_what_is_no_constraint_is_refused_in_one_line(constraints, error, message):
    with pytest.raises(error, match=re.escape(message)) as caught:
        lmm(TWO, SLEEP, constraints=constraints)
    assert "\n" not in str(caught.value)


def test_parameters_of_other_ranges_are_not_tied_and_names_are_not_guessed():
    formula = "Reaction ~ ar1(0 + half | Subject) + (1 | Subject)"
    with pytest.raises(InputError, match="of another range"):
        lmm(formula, SLEEP, constraints={"Subject/rho": "Subject_1/sigma^2"})
    field = {"residual": "diag(Days)"}
    with pytest.raises(InputError, match="residual/g/matrix/sigma"):
        lmm("Reaction ~ 1", SLEEP, constraints={"residual/sigma^2": 1.0}, **field)
    with pytest.raises(InputError, match="which the model holds already"):
        lmm("Reaction ~ 1 + (1 | Subject)", SLEEP, residual_variance=900.0,
            constraints={"residual/sigma^2": 1.0})  # fmt: skip
    with pytest.raises(InputError, match="`constraints` is not for chunks"):
        lmm(TWO, "no.csv", constraints={"Subject/sigma^2": 1.0}, chunk_rows=10)


def test_a_tree_of_ones_own_is_constrained_by_the_same_function():
    V = AR1Matrix(4).double()
    assert constrain(V, V.entries(), {}) == {}
    full = constrain(torch.nn.ModuleList([V]), V.entries(), {"rho": (0.2, 0.6)})
    assert full == {"rho": (0.2, 0.6)}
    with torch.no_grad():
        V.get_parameter("rho").fill_(-50.0)
    assert float(V.build_params()[1].detach()) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("formula", "residual"),
    [
        ("Reaction ~ Days", "ar1(Days | Subject)"),
        ("Reaction ~ Days", "hetar1(half | Subject:odd)"),
        ("Reaction ~ Days", "power(Weight):ar1(Days | Subject)"),
        ("Reaction ~ Days", "id(Subject):ar1(half):ar1(odd)"),
        ("Reaction ~ Days", "ar1(Days | Subject) + units"),
        ("Reaction ~ Days + ar1(0 + half | Subject)", None),
        ("Reaction ~ Days + fa(0 + part | Subject)", None),
    ],
)
def test_names_of_a_summary_are_those_that_constraints_take(formula, residual):
    rows = SLEEP.assign(odd=SLEEP["Days"] % 2, Weight=1 + SLEEP["Days"])
    rows["part"] = "p" + (rows["Days"] // 4).astype(str)
    free = lmm(formula, rows, residual=residual)
    lines = free.summary().split("Structures\n")[1].split("Rows 1")[0].splitlines()[3:]
    shown = {line.split()[0]: line.split()[1] for line in lines if "/" in line}
    assert shown
    if "units" in str(residual):
        both = {n: values_of(free)[n] for n in shown}
        with pytest.raises(InputError, match="all parameters of 'residual' are held beside errors"):
            lmm(formula, rows, residual=residual, constraints=both)
        del shown["residual/sigma^2"]
    held = lmm(formula, rows, residual=residual, constraints={n: values_of(free)[n] for n in shown})
    assert held.num_params == free.num_params - len(shown)
    for name, estimate in shown.items():
        assert values_of(held)[name] == pytest.approx(float(estimate), rel=1e-3)


def values_of(result):
    names = shortened(p.name for p in result.parameters)
    return {names[p.name]: p.value for p in result.parameters}


def test_the_residual_of_a_field_is_told_with_each_correlation(tmp_path):
    rows = SLEEP.assign(place=SLEEP["Subject"].astype("category").cat.codes)
    found = lmm("Reaction ~ 1", rows, residual="ar1(place):ar1(Days)")
    found.to_json(tmp_path / "result.json")
    told = json.loads((tmp_path / "result.json").read_text())["residual"]["parameters"]
    own = values(found)
    assert told == {
        "sigma^2": own["residual/g/matrix/place/sigma^2"],
        "place/rho": own["residual/g/matrix/place/rho"],
        "Days/rho": own["residual/g/matrix/Days/rho"],
    }
    held = lmm(
        "Reaction ~ 1", rows, residual="ar1(place):ar1(Days)", constraints={"residual/sigma^2": 900}
    )
    assert values(held)["residual/g/matrix/place/sigma^2"] == pytest.approx(900)


COUNTS = pd.DataFrame(
    {
        "g": np.repeat(np.arange(20), 10), "x": np.linspace(-1, 1, 200),
        "c": np.random.default_rng(4).negative_binomial(2, 0.4, 200),
        "o": np.random.default_rng(5).integers(0, 4, 200),
    }
)  # fmt: skip


@pytest.mark.parametrize(
    ("response", "family", "name"),
    [
        ("c", "negative_binomial", "theta"),
        ("c", "negative_binomial_1", "phi"),
        ("c + 0.5", "gamma", "phi"),
        ("c", "gaussian", "sigma^2"),
        ("o", "ordinal", "1|2"),
        ("o", "ordinal", "gap_2"),
    ],
)
def test_a_parameter_of_a_family_is_held_bounded_and_started(response, family, name):
    def fit(**options):
        return glmm(f"I({response}) ~ x + (1 | g)" if "+" in response else f"{response} ~ x + (1 | g)",
                    COUNTS, family=family, **options)  # fmt: skip

    def own(result):
        found = {e.name: e.value for e in result.family_parameters}
        return found | ({"gap_2": found["2|3"] - found["1|2"]} if family == "ordinal" else {})

    free = fit()
    value = own(free)[name]
    held = fit(constraints={name: value})
    assert held.log_likelihood == pytest.approx(free.log_likelihood, abs=1e-7)
    assert held.num_params == free.num_params - 1
    away = fit(constraints={name: value + 0.2})
    assert own(away)[name] == pytest.approx(value + 0.2, abs=1e-12)
    assert away.log_likelihood < free.log_likelihood - 1e-4
    assert "held at" in away.summary()
    if "|" not in name:
        bounded = fit(constraints={name: (value + 0.2, value + 5)})
        assert bounded.log_likelihood == pytest.approx(away.log_likelihood, abs=1e-4)
    started = fit(starts={name: value + 0.3})
    assert started.log_likelihood == pytest.approx(free.log_likelihood, abs=1e-6)


def test_thresholds_are_held_together_tied_and_refused():
    fits = [
        glmm("o ~ x + (1 | g)", COUNTS, family="ordinal", constraints=c)
        for c in ({"1|2": -1.0, "2|3": 0.25}, {"gap_2": "gap_3"})
    ]
    edges = [[e.value for e in fit.family_parameters] for fit in fits]
    assert edges[0][:2] == pytest.approx([-1.0, 0.25], abs=1e-12)
    assert np.diff(edges[1])[0] == pytest.approx(np.diff(edges[1])[1], rel=1e-12)
    for constraints, message in (
        ({"2|3": 0.5}, "expected a number beside one for each before it, or gap_2"),
        ({"1|2": 0.5, "2|3": 0.5}, "'gap_2' is 0 on the natural scale"),
        ({"gap_2": "g/sigma^2"}, "one of which is of the family"),
        ({"theta": 1.0}, "names 'theta': expected one of g/g/sigma^2, threshold_1"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            glmm("o ~ x + (1 | g)", COUNTS, family="ordinal", constraints=constraints)
    with pytest.raises(InputError, match="a coefficient"):
        glmm(
            "c ~ x + (1 | g)", COUNTS, family="poisson", zi="~ 1", constraints={"zi (Intercept)": 0}
        )
