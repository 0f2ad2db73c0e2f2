"""Without a network a model is fitted without a trainer, to the same end."""

import json

import pandas as pd
import pytest
import torch
from pandas.testing import assert_frame_equal

from openreml_nn import datasets, glmm, lmm
from openreml_nn.lightning import MixedModule
from openreml_nn.model.checkpoint import checkpoint_of
from openreml_nn.program.direct import needs_trainer
from openreml_nn.program.options import Options
from tests.forked import program
from tests.program.test_options import composed

pytestmark = pytest.mark.slow

QUICK = ["trainer.enable_progress_bar=false"]
#: By this a run is one of Lightning's.
TRAINER = "trainer.log_every_n_steps=2"


def run(folder, name, *options):
    done = program(*QUICK, *options, f"hydra.run.dir={name}", cwd=folder)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / name / "result.json").read_text()), done


def numbers_of(record, prefix=""):
    """The values of a record by where they stand."""
    if isinstance(record, dict | list):
        items = record.items() if isinstance(record, dict) else enumerate(record)
        parts = [numbers_of(value, f"{prefix}/{key}") for key, value in items]
        return {key: value for part in parts for key, value in part.items()}
    return {prefix: record}


def table(folder):
    found = datasets.sleepstudy().assign(
        slow=lambda t: (t["Reaction"] > 300).astype(int),
        w=lambda t: 1.0 + t["Days"] % 3,
        east=lambda t: t.index % 6 + 0.0,
        north=lambda t: t.index // 6 % 6 + 0.0,
    )
    found.to_csv(folder / "t.csv", index=False)
    return found


@pytest.mark.parametrize(
    "options",
    [
        ["model.formula=Reaction ~ Days + (Days | Subject)", "model.weights=w"],
        ["model.formula=Reaction ~ offset(w) + (1 | Subject)", "model.method=ml"],
        ["model.formula=Reaction ~ Days", "model.residual=ar1(Days | Subject)"],
        ["model.formula=slow ~ Days + (1 | Subject)", "model.family=binomial"],
    ],
)
def test_the_run_is_that_of_a_trainer(tmp_path, options):
    rows = table(tmp_path)
    # What is drawn is the same where the model is of one kind.
    is_drawn = "model.method=ml" not in options and "model.weights=w" not in options
    options = ["data.path=t.csv", f"plots={is_drawn}", *options]
    found, done = run(tmp_path, "a", *options)
    expected, other = run(tmp_path, "b", *options, TRAINER)
    for record in (found, expected):
        # The trainer's last epoch looks once more.
        for name in ("iterations", "seconds", "score_norm"):
            del record["fit"][name]
        del record["details"]
    one, two = (numbers_of(record) for record in (found, expected))
    assert one.keys() == two.keys()
    assert {k: v for k, v in one.items() if not isinstance(v, float)} == {
        k: v for k, v in two.items() if not isinstance(v, float)
    }
    for key, value in one.items():
        if isinstance(value, float):
            assert value == pytest.approx(two[key], rel=1e-4, abs=1e-6), key
    assert found["fit"]["log_likelihood"] == pytest.approx(expected["fit"]["log_likelihood"])
    assert done.stderr == other.stderr
    kept = {p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*")}
    same = {p.relative_to(tmp_path / "b") for p in (tmp_path / "b").rglob("*")}
    assert {p for p in kept if "events" not in p.name} == {
        p for p in same if "events" not in p.name
    }
    logs = [pd.read_csv(tmp_path / name / "logs/csv/metrics.csv") for name in "ab"]
    assert list(logs[0]) == list(logs[1])
    last = [log[["log_likelihood"]].iloc[[-1]].reset_index(drop=True) for log in logs]
    assert_frame_equal(*last, rtol=1e-5)
    states = [
        torch.load(tmp_path / name / "model.ckpt", weights_only=True)["state_dict"] for name in "ab"
    ]
    assert {k: v.shape for k, v in states[0].items()} == {k: v.shape for k, v in states[1].items()}
    modules = [
        MixedModule.load_from_checkpoint(tmp_path / name / "model.ckpt", weights_only=True)
        for name in "ab"
    ]
    assert_frame_equal(*(module.predict(rows.tail(30)) for module in modules), rtol=1e-4)


def test_a_spatial_model_has_its_semivariogram_and_the_likelihood_of_lmm(tmp_path):
    rows, formula = table(tmp_path), "Reaction ~ (1 | exponential(east, north))"
    options = ["data.path=t.csv", f"model.formula={formula}", "logger=none"]
    found, done = run(tmp_path, "r", *options)
    assert done.stderr == ""
    assert (tmp_path / "r" / "plots" / "semivariogram.png").is_file()
    expected = lmm(formula, rows)
    assert expected.singular == ("exponential(east, north)",) and found["fit"]["singular"]
    assert found["fit"]["log_likelihood"] == pytest.approx(expected.log_likelihood, rel=1e-9)


def test_a_trainer_goes_on_from_its_checkpoint(tmp_path):
    plain = ["logger=none", "plots=false"]
    for name, options in {"a": [], "c": ["data.chunk_rows=50"]}.items():
        whole, _ = run(tmp_path, name, *plain, *options)
        again, _ = run(tmp_path, "b", *plain, f"resume={name}/model.ckpt")
        assert again["fit"]["converged"] and again["fit"]["iterations"] <= 2
        one, two = (record["fit"]["log_likelihood"] for record in (whole, again))
        assert one == pytest.approx(two, rel=1e-9)


@pytest.mark.parametrize(
    ("option", "is_one"),
    [
        ("seed=2", False),
        ("model.solver=dense", False),
        ("logger=none", False),
        ("plots=false", False),
        ("trainer.max_epochs=7", True),
        ("optimizer.tolerance=1e-3", True),
        ("model.training=full", True),
        ("~callbacks.progress", True),
        ("+callbacks.trace={_target_: openreml_nn.lightning.TraceVariances, path: t.csv}", True),
        ("logger.csv.name=other", True),
        ("data.validation=0.2", True),
    ],
)
def test_what_is_a_trainers_is_left_to_one(option, is_one):
    # The program alone knows the folder of its run.
    folders = ["logger.csv.save_dir=.", "logger.tensorboard.save_dir=."]
    given = composed(option, *(folders if option != "logger=none" else []))
    assert needs_trainer(Options(given, composed(*folders))) == is_one


@pytest.mark.parametrize(("option", "is_one"), [("seed=2", False), ("trainer.max_epochs=7", True)])
def test_a_trainers_checkpoint_has_its_loops(tmp_path, option, is_one):
    run(tmp_path, "r", option, "plots=false")
    kept = torch.load(tmp_path / "r" / "model.ckpt", weights_only=True)
    assert ("loops" in kept) == is_one


def test_a_checkpoint_of_a_result_predicts_as_it_does(tmp_path):
    rows = table(tmp_path)
    fits = {
        "Reaction ~ Days + (Days | Subject)": (lmm, {}),
        "slow ~ Days + (1 | Subject)": (glmm, {"family": "binomial"}),
    }
    for formula, (fit, options) in fits.items():
        result = fit(formula, rows, **options)
        torch.save(checkpoint_of(result, options), tmp_path / "m.ckpt")
        module = MixedModule.load_from_checkpoint(tmp_path / "m.ckpt", weights_only=True)
        assert_frame_equal(module.predict(rows), result.predict(rows))
