"""Fits by the program equal those by other ways."""

import json

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm

from openreml_nn import datasets, glmm, lmm
from openreml_nn.inference import heritability
from openreml_nn.lightning import MixedModelDataModule
from tests.endurance import check_same, finished
from tests.forked import program

pytestmark = pytest.mark.slow

FORMULA = "Reaction ~ Days + (Days | Subject)"
QUICK = ["logger=none", "plots=false", "trainer.enable_progress_bar=false", "hydra.run.dir=r"]


def fitted(folder, *options):
    done = program(*QUICK, *options, cwd=folder)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "r" / "result.json").read_text()), done.stdout


@pytest.mark.parametrize("options", [[], ["optimizer=lbfgs"]])
def test_rows_held_out_of_a_linear_model_are_predicted_as_its_result_does(tmp_path, options):
    record, shown = fitted(tmp_path, "data.validation=0.25", "data.split=group", "seed=3", *options)
    assert "held out: mse" in shown
    table = datasets.sleepstudy()
    data = MixedModelDataModule(table, FORMULA, validation=0.25, split="group", seed=3)
    data.setup()
    kept = table.index.isin(data.table.index)
    assert record["data"]["rows"] == kept.sum()
    found = lmm(FORMULA, table[kept]).predict(table[~kept])
    error = table["Reaction"][~kept] - found["mean"]
    density = -norm.logpdf(error, scale=np.sqrt(found["variance"])).mean()
    covered = (error.abs() <= norm.ppf(0.975) * np.sqrt(found["variance"])).mean()
    expected = {"val_mse": (error**2).mean(), "val_negative_log_density": density,
                "val_coverage": covered}  # fmt: skip
    assert record["validation"] == pytest.approx(expected, rel=1e-4)


def test_chunks_and_memory_give_one_result(tmp_path):
    table = datasets.sleepstudy().assign(w=lambda t: 1.0 + t["Days"] % 3)
    table.to_csv(tmp_path / "t.csv", index=False)
    options = ["data.path=t.csv", f"model.formula={FORMULA}", "model.weights=w", "model.method=ml"]
    whole, _ = fitted(tmp_path, *options)
    tables = [pd.read_csv(tmp_path / "r" / "blup.csv")]
    chunks, _ = fitted(tmp_path, *options, "data.chunk_rows=50")
    tables.append(pd.read_csv(tmp_path / "r" / "blup.csv"))
    pd.testing.assert_frame_equal(*tables, rtol=1e-4)
    assert whole["data"] == chunks["data"]
    assert whole["model"] == chunks["model"] == {"formula": FORMULA, "method": "ml"}
    assert chunks["fit"]["solver"] == "blocked"
    assert chunks["fit"]["log_likelihood"] == pytest.approx(
        whole["fit"]["log_likelihood"], rel=1e-9
    )
    expected = lmm(FORMULA, table, weights="w", method="ml").log_likelihood
    assert whole["fit"]["log_likelihood"] == pytest.approx(expected, rel=1e-9)


def test_a_run_that_had_ended_is_resumed_to_the_same_end(tmp_path):
    short = "trainer.max_epochs=3"
    whole = finished(tmp_path, "r", short)
    again = finished(tmp_path, "r", short, "resume=r/checkpoints/last.ckpt")
    check_same(again, whole, "resumed after its end")


def test_what_stops_ai_reml_is_its_own(tmp_path):
    done = program(*QUICK, "callbacks.stop.tolerance=0.1", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "StopWhenConverged(tolerance=0.1) has no effect on AI-REML" in done.stderr
    assert "optimizer.tolerance" in done.stderr


@pytest.mark.parametrize(
    ("option", "end"),
    [
        ("trainer.max_epochs=3", "standard errors; raise trainer.max_epochs\n"),
        ("callbacks.stop.tolerance=0.5", "standard errors\n"),
    ],
)
def test_more_epochs_are_advised_where_the_fit_ran_out_of_them(tmp_path, option, end):
    done = program(*QUICK, "optimizer=adam", option, cwd=tmp_path)
    assert done.returncode == 0
    assert done.stderr.startswith("warning: not converged after ")
    assert done.stderr.endswith(end)


def test_a_heritability_that_there_is_not_does_not_cost_the_fit(tmp_path):
    done = program(*QUICK, "heritability=Subject", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stderr.startswith("warning: heritability is left out: InputError: `group` is 'Sub")
    assert (tmp_path / "r" / "result.json").exists()


def test_heritability_of_a_response_of_a_family_is_a_share_on_the_scale_of_its_link(tmp_path):
    table = datasets.sleepstudy().assign(slow=lambda t: (t["Reaction"] > 300).astype(int))
    table.to_csv(tmp_path / "t.csv", index=False)
    formula = "slow ~ Days + (1 | Subject)"
    options = ["data.path=t.csv", f"model.formula={formula}", "model.family=binomial"]
    fitted(tmp_path, *options, "heritability=Subject")
    (row,) = pd.read_csv(tmp_path / "r" / "heritability.csv").to_dict("records")
    result = glmm(formula, table, family="binomial")
    assert row["method"] == "plain"
    assert row["estimate"] == pytest.approx(heritability(result).estimate, rel=1e-6)
