"""What a fit says where the data say nothing: shares, predictions, tables and profiles."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

from openreml_nn import InputError, glmm, lmm
from openreml_nn.inference import likelihood_ratio_test, profile, r2, scan, variance_shares
from openreml_nn.inference.constrained import Ascent, Natural
from openreml_nn.inference.refit import Refit


@pytest.fixture(scope="module")
def table():
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(12), 10)
    frame = pd.DataFrame({"x": rng.normal(size=120), "g": group, "h": group})
    frame["s"] = np.tile(["a", "b"], 60)
    frame["day"] = np.tile(np.arange(10), 12)
    frame["y"] = 1 + frame.x + rng.normal(size=12)[group] + rng.normal(size=120)
    return frame


def test_a_named_constant_keeps_its_name(table):
    result = lmm("y ~ sin(2 * pi * x) + I(x*pi) + (1 | g)", table)
    assert result.fixed.names == ("(Intercept)", "sin(2 * pi * x)", "I(x * pi)")
    plain = lmm("y ~ sin(2 * 3.141592653589793 * x) + x + (1 | g)", table)
    slope = float(result.fixed.estimate[2])
    assert slope * math.pi == pytest.approx(float(plain.fixed.estimate[2]), rel=1e-8)


def test_a_column_with_the_name_of_a_constant_is_not_mistaken_for_it(table, tmp_path):
    named = table.rename(columns={"x": "pi"})
    with pytest.raises(InputError, match=r"column 'pi'.*backticks"):
        lmm("y ~ s + I(2 * pi * day) + (1 | g)", named)
    with pytest.raises(InputError, match="`pi` in backticks for a column"):
        lmm("y ~ pi + (1 | g)", named)
    path = tmp_path / "table.csv"
    named.to_csv(path, index=False)
    with pytest.raises(InputError, match=r"column 'pi'.*backticks"):
        lmm("y ~ s + I(2 * pi * day) + (1 | g)", path, chunk_rows=50)
    found = lmm("y ~ `pi` + (1 | g)", named)
    assert found.log_likelihood == lmm("y ~ x + (1 | g)", table).log_likelihood
    assert found.fixed.names == ("(Intercept)", "pi")


@pytest.mark.filterwarnings("ignore:the data cannot tell apart")
def test_shares_that_cannot_be_told_apart_have_no_error(table):
    shares = variance_shares(lmm("y ~ x + (1 | g) + (1 | h)", table)).set_index("group")
    alone = variance_shares(lmm("y ~ x + (1 | g)", table)).set_index("group")
    assert shares.std_error[["g", "h"]].isna().all()
    # Their sum is known, and so is what it leaves.
    assert shares.std_error["Residual"] == pytest.approx(alone.std_error["Residual"], rel=1e-5)


@pytest.mark.filterwarnings("ignore:the fixed-effect model matrix")
def test_a_prediction_that_is_not_estimable_has_no_variance(table):
    frame = table.assign(late=np.where(table.day > 5, "yes", "no"))
    gap = (frame.late == "yes") & (frame.s == "a")
    result = lmm("y ~ s * late + (1 | g)", frame[~gap])
    found = result.predict(frame)
    assert found[gap].isna().all(axis=None)
    assert found[~gap].notna().all(axis=None)


def test_independent_effects_have_no_correlation_in_the_summary(table):
    assert "Corr" not in lmm("y ~ x + diag(0 + s | g)", table).summary()
    assert "Corr" not in lmm("y ~ x + (1 | g)", table, residual="diag(s)").summary()
    assert "Corr" in lmm("y ~ x + (x | g)", table).summary()


def test_the_nugget_has_one_name(table):
    result = lmm("y ~ x", table, residual="ar1(day | g) + units")
    assert {c.name: (c.group, c.effects) for c in result.components}["units"] == (
        "Residual",
        ("units",),
    )
    assert "Residual       units" in result.summary()


@pytest.mark.parametrize(
    ("effects", "residual"), [("", "ar1(day | g) + units"), (" + homcs(0 + s | g)", None)]
)
def test_without_the_variance_of_a_process_the_likelihood_is_that_of_independent_rows(
    table, effects, residual
):
    few = table[table.g < 6]
    result = lmm("y ~ x" + effects, few, residual=residual, method="ml")
    natural = Natural(Refit(result).objective(method="ml"))
    held = natural.held(0, 0, 0)
    found = Ascent(natural, natural.start).hold(held, 0.0)
    X = np.column_stack([np.ones(len(few)), few.x])
    e = few.y - X @ np.linalg.lstsq(X, few.y, rcond=None)[0]
    independent = -len(e) / 2 * (math.log(2 * math.pi * (e @ e) / len(e)) + 1)
    assert found == pytest.approx(independent, rel=1e-10)


def test_a_variance_of_several_is_held_at_zero(table):
    result = lmm("y ~ x + cs(0 + s | g)", table[table.g < 6], method="ml")
    natural = Natural(Refit(result).objective(method="ml"))
    held = natural.held(0, 0, 0)
    ascent = Ascent(natural, natural.start)
    for target in (0.1, 0.01, 0.0):
        found = ascent.hold(held, target)
    own = table.assign(b=(table.s == "b").astype(float))[table.g < 6]
    other = lmm("y ~ x + (0 + b | g)", own, method="ml")
    assert found == pytest.approx(other.log_likelihood, rel=1e-7)


def test_a_ratio_says_which_fit_has_a_family(table):
    fits = lmm("y ~ x + (1 | g)", table, method="ml"), glmm("y ~ x + (1 | g)", table, "gaussian")
    with pytest.raises(InputError, match=r"'gaussian' by lmm\(\) and `large` of 'gaussian':"):
        likelihood_ratio_test(*fits)


@pytest.mark.filterwarnings("error")
def test_markers_may_be_read_only(table):
    markers = np.random.default_rng(1).normal(size=(120, 2))
    result = lmm("y ~ x + (1 | g)", table)
    expected = scan(result, markers)
    markers.flags.writeable = False
    pd.testing.assert_frame_equal(scan(result, markers), expected)


@pytest.mark.parametrize("structure", ["ar1(time | g)", "cs(time | g)"])
def test_the_correlation_of_residuals_is_profiled_by_its_name(structure):
    rng = np.random.default_rng(4)
    table = pd.DataFrame({"g": np.repeat(np.arange(15), 3), "time": np.tile(np.arange(3), 15)})
    table["y"] = rng.standard_normal(45) + 0.7 * rng.standard_normal(15)[table["g"]]
    one = lmm("y ~ 1", table, residual=structure)
    found = profile(one, ["cor_1.0|Residual"], progress=False).intervals().iloc[0]
    whole = lmm("y ~ 1", table, residual=structure, method="ml")
    (rho,) = (p for p in whole.parameters if p.name.endswith("rho"))
    assert found["estimate"] == pytest.approx(rho.value, rel=1e-5)
    for end in ("low", "high"):
        held = lmm("y ~ 1", table, residual=structure, method="ml",
                   constraints={rho.name: found[end]})  # fmt: skip
        drop = 2 * (whole.log_likelihood - held.log_likelihood)
        assert drop == pytest.approx(1.959963984540054**2, rel=1e-4)
    by_default = [*(f"sd_{i}|Residual" for i in range(3)), "(Intercept)"]
    with pytest.raises(InputError, match="`names` has 'rho': expected some of ") as caught:
        profile(one, ["rho"], progress=False)
    assert str(caught.value).endswith(str(by_default))


def test_shares_of_a_spline_are_those_of_its_rows():
    rng = np.random.default_rng(2)
    table = pd.DataFrame({"x": np.tile(np.arange(12.0), 3)})
    table["y"] = np.sin(table["x"]) + 0.3 * rng.standard_normal(36)
    fit = lmm("y ~ x + (1 | spline(x))", table)
    term = Refit(fit).objective().terms()[0]
    with torch.no_grad():
        Z = term.design.dense(term.covariance.matrix)
        expected = float((Z * term.covariance.multiply(Z.mT).mT).sum(1).mean())
    found = variance_shares(fit)
    assert found["variance"][0] == pytest.approx(expected, rel=1e-10)
    assert found["variance"][0] > 0 and r2(fit).conditional > r2(fit).marginal
