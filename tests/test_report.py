"""Tables, plots and files of a result."""

import json

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from openreml_nn import datasets, lmm
from openreml_nn.report import (
    Run,
    blup_table,
    caterpillar,
    convergence,
    fixed_table,
    residuals,
    variance_table,
    write_run,
)

FORMULA = "Reaction ~ Days + (Days | Subject)"


@pytest.fixture(scope="module")
def result():
    return lmm(FORMULA, datasets.sleepstudy())


def test_tables(result):
    fixed = fixed_table(result).set_index("name")
    assert fixed.loc["Days", "estimate"] == pytest.approx(10.467286, rel=1e-7)
    variance = variance_table(result).fillna({"effect2": ""})
    named = variance.set_index(["group", "effect1", "effect2"])
    assert named.loc[("Subject", "(Intercept)", ""), "std_dev"] == pytest.approx(24.7406, rel=1e-3)
    assert named.loc[("Subject", "(Intercept)", "Days"), "correlation"] == pytest.approx(
        0.06555, rel=1e-2
    )
    assert named.loc[("Residual", "", ""), "covariance"] == pytest.approx(654.94, rel=1e-4)
    blups = blup_table(result)
    assert len(blups) == 36
    first = blups[(blups["level"] == "308") & (blups["effect"] == "Days")].iloc[0]
    assert first["blup"] == pytest.approx(9.199, rel=1e-3)
    assert first["std_error"] > 0


def test_plots_draw_what_they_claim(result):
    figure = caterpillar(result, "Subject")
    assert isinstance(figure, Figure)
    assert [axis.get_title() for axis in figure.axes] == ["(Intercept)", "Days"]
    drawn = figure.axes[0].lines[0].get_xdata()
    blups = blup_table(result)
    expected = blups[blups["effect"] == "(Intercept)"]["blup"]
    np.testing.assert_allclose(np.sort(drawn), np.sort(expected))
    path = convergence(result).axes[0].lines[0].get_ydata()
    assert path[-1] == result.log_likelihood
    points = residuals(result).axes[0].lines[0]
    np.testing.assert_allclose(points.get_ydata(), result.residuals.numpy())
    with pytest.raises(ValueError, match="expected one of"):
        caterpillar(result, "Nobody")


def test_run_directory(result, tmp_path):
    run = Run(result, FORMULA, dropped_rows=0, optimizer="AIREML", seconds=0.5)
    write_run(run, tmp_path / "run")
    files = {str(p.relative_to(tmp_path / "run")) for p in (tmp_path / "run").rglob("*.*")}
    assert files == {
        "result.json",
        "summary.txt",
        "fixed.csv",
        "variance.csv",
        "blup.csv",
        "plots/blup_Subject.png",
        "plots/convergence.png",
        "plots/residuals.png",
    }
    record = json.loads((tmp_path / "run" / "result.json").read_text())
    assert record["schema"] == 1
    assert record["model"] == {"formula": FORMULA, "method": "reml"}
    assert record["data"] == {
        "rows": 180,
        "dropped_rows": 0,
        "fixed_effects": 2,
        "groups": {"Subject": 18},
    }
    assert record["fit"]["log_likelihood"] == result.log_likelihood
    assert record["fit"]["converged"] is True
    assert record["fit"]["singular"] is False
    assert [f["name"] for f in record["fixed"]] == ["(Intercept)", "Days"]
    (random,) = record["random"]
    assert random["group"] == "Subject"
    assert random["effects"] == ["(Intercept)", "Days"]
    assert random["levels"] == 18
    np.testing.assert_allclose(random["covariance"], result.components[0].covariance.numpy())
    assert record["residual"]["variance"] == result.residual_variance
    assert record["residual"]["parameters"] == {"sigma^2": result.residual_variance}
    assert (tmp_path / "run" / "summary.txt").read_text() == result.summary(FORMULA)
    assert len(pd.read_csv(tmp_path / "run" / "blup.csv")) == 36


def test_independent_effects_of_one_factor_are_entries_of_their_own(tmp_path):
    result = lmm("Reaction ~ Days + (Days || Subject)", datasets.sleepstudy())
    record = Run(result, "f", 0, "AIREML", 0.1).record()
    assert [(r["group"], r["effects"]) for r in record["random"]] == [
        ("Subject", ["(Intercept)"]),
        ("Subject", ["Days"]),
    ]
    assert record["data"]["groups"] == {"Subject": 18}
    assert len(caterpillar(result, "Subject").axes) == 2


def test_the_summary_is_laid_out_like_lme4s(result):
    text = result.summary(FORMULA)
    parts = ["REML criterion 1743.6283", "Random effects", "Residual", "Fixed effects", "t value"]
    at = [text.index(part) for part in parts]
    assert at == sorted(at)
