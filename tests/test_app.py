"""The console program, each call as typed in a shell."""

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
from hydra.experimental.callback import Callback

from openreml_nn import datasets, lmm
from openreml_nn.lightning import MixedModule
from openreml_nn.program.main import main
from tests.forked import forked

pytestmark = pytest.mark.slow

PROGRAM = [sys.executable, "-c", "from openreml_nn.program.main import main; main()"]
#: Without what takes longer than a fit.
QUICK = ["logger=none", "plots=false"]


def call(*arguments, cwd):
    """The program in a fork of this process."""
    return forked(lambda: main(arguments), cwd)


def runs(folder):
    return sorted(path.parent for path in Path(folder).rglob("result.json"))


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    code = (
        f"{PROGRAM[-1]}; import gc, sys; print(*sys.modules, file=open('imported', 'w')); "
        "print(gc.isenabled(), gc.get_freeze_count(), file=open('collector', 'w'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=300
    )
    return folder, done


def test_without_arguments_it_fits_sleepstudy(demo):
    folder, done = demo
    assert done.returncode == 0, done.stderr
    assert "Reaction ~ Days + (Days | Subject)" in done.stdout
    (run,) = runs(folder)
    record = json.loads((run / "result.json").read_text())
    assert record["fit"]["log_likelihood"] == pytest.approx(-871.814135979976, rel=1e-9)
    assert record["fit"]["optimizer"] == "AIREML"
    assert record["fit"]["seconds"] > 0
    names = {p.name for p in run.iterdir()}
    assert {"summary.txt", "fixed.csv", "variance.csv", "blup.csv", "model.ckpt"} <= names
    assert {"config.yaml", "plots", "logs"} <= names
    assert "formula: Reaction ~ Days" in (run / "config.yaml").read_text()
    assert "${" not in (run / "config.yaml").read_text()
    assert list((run / "logs" / "tensorboard").glob("events.*"))


def test_without_a_network_nothing_is_imported_that_takes_longer_than_the_fit(demo):
    imported = (demo[0] / "imported").read_text().split()
    assert "openreml_nn.program.fit" in imported
    late = ["lightning", "torchmetrics", "torch._dynamo", "numba", "scipy.stats", "jinja2",
            "matplotlib.pyplot"]  # fmt: skip
    assert [name for name in late if name in imported] == []


def test_the_garbage_collector_works_after_the_start_and_leaves_the_modules_aside(demo):
    is_enabled, aside = (demo[0] / "collector").read_text().split()
    assert is_enabled == "True"
    assert int(aside) > 100_000


def test_a_fit_of_100_000_levels_ends_with_all_its_files(tmp_path):
    rng = np.random.default_rng(0)
    levels = 100_000
    g = np.arange(2 * levels) % levels
    y = rng.standard_normal(levels)[g] + rng.standard_normal(len(g))
    pd.DataFrame({"y": y, "g": g}).to_csv(tmp_path / "t.csv", index=False)
    options = ["logger=none", "trainer.enable_progress_bar=false", "hydra.run.dir=r"]
    done = call("data.path=t.csv", "model.formula=y ~ 1 + (1 | g)", *options, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    record = json.loads((tmp_path / "r" / "result.json").read_text())
    assert record["data"]["groups"] == {"g": levels}
    assert record["fit"]["converged"]
    assert record["random"][0]["covariance"][0][0] == pytest.approx(1, rel=0.05)
    assert record["residual"]["variance"] == pytest.approx(1, rel=0.05)
    assert sum(1 for _ in (tmp_path / "r" / "blup.csv").open()) == levels + 1
    assert (tmp_path / "r" / "model.ckpt").is_file()
    drawn = {path.stem for path in (tmp_path / "r" / "plots").iterdir()}
    assert drawn == {"blup_g", "convergence", "covariance", "residuals", "shares"}


def test_a_checkpoint_predicts_for_another_table(demo):
    folder, _ = demo
    (run,) = runs(folder)
    pd.DataFrame({"Days": [0, 5], "Subject": ["308", "new"]}).to_csv(
        folder / "new.csv", index=False
    )
    done = call(
        "predict", f"checkpoint={run}/model.ckpt", "data.path=new.csv", "hydra.run.dir=p",
        cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = pd.read_csv(folder / "p" / "predictions.csv")
    assert found["mean"].iloc[0] == pytest.approx(251.405105 + 2.258565, rel=1e-6)
    assert found["mean"].iloc[1] == found["population_mean"].iloc[1]
    for arguments, message in [
        (["checkpoint=none.ckpt", "data.path=new.csv"], "checkpoint 'none.ckpt' does not exist"),
        (["checkpoint=new.csv", "data.path=new.csv"], "cannot be loaded"),
        (["data.path=new.csv"], "checkpoint"),
    ]:
        failed = call("predict", *arguments, cwd=folder)
        assert failed.returncode == 2
        assert message in failed.stderr
        assert failed.stderr.count("\n") == 1


def test_a_table_and_a_formula_as_typed_in_a_shell(tmp_path):
    table = datasets.penicillin().sample(frac=1, random_state=1)
    table.loc[table.index[:3], "diameter"] = np.nan
    table.to_csv(tmp_path / "my table (1).csv.gz", index=False)
    done = call(
        "data.path=my table (1).csv.gz",
        "model.formula=log(diameter) ~ 1 + (1 | plate) + (1|sample)",
        "hydra.run.dir=run",
        *QUICK,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "3 of 144 rows left out" in done.stderr
    record = json.loads((tmp_path / "run" / "result.json").read_text())
    assert record["data"]["dropped_rows"] == 3
    assert record["data"]["rows"] == 141
    assert record["data"]["groups"] == {"plate": 24, "sample": 6}


def test_chunks_of_rows_and_their_checkpoint(demo, tmp_path):
    done = call("data.chunk_rows=50", "hydra.run.dir=run", *QUICK, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (whole,) = runs(demo[0])
    found, expected = (
        json.loads((folder / "result.json").read_text()) for folder in (tmp_path / "run", whole)
    )
    assert found["fit"]["log_likelihood"] == pytest.approx(expected["fit"]["log_likelihood"])
    assert found["data"] == expected["data"]
    one, other = (pd.read_csv(folder / "blup.csv") for folder in (tmp_path / "run", whole))
    pd.testing.assert_frame_equal(one, other, rtol=1e-5)
    table = pd.DataFrame({"Days": [0, 5], "Subject": ["308", "new"]})
    table.to_csv(tmp_path / "new.csv", index=False)
    done = call(
        "predict", "checkpoint=run/model.ckpt", "data.path=new.csv", "hydra.run.dir=p", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    predicted = pd.read_csv(tmp_path / "p" / "predictions.csv")
    assert predicted["mean"].iloc[0] == pytest.approx(251.405105 + 2.258565, rel=1e-5)


def test_residuals_within_groups_as_typed_in_a_shell(tmp_path):
    done = call(
        "model.formula=Reaction ~ Days",
        "model.residual=ar1(Days | Subject)",
        "hydra.run.dir=run",
        *QUICK,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "run" / "result.json").read_text())
    assert set(record["residual"]["parameters"]) == {"sigma^2", "rho"}
    assert record["residual"]["parameters"]["sigma^2"] == record["residual"]["variance"]
    assert 0.5 < record["residual"]["parameters"]["rho"] < 1
    assert record["random"] == []
    done = call(
        "predict", "checkpoint=run/model.ckpt",
        f"data.path={datasets.table_path('sleepstudy')}", "hydra.run.dir=p", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_sweep_goes_on_after_a_run_that_fails(tmp_path):
    arguments = ["data=pastes", "logger=none", "hydra.sweep.dir=s"]
    done = call("-m", "seed=1,2", "model.method=m,ml", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    message = "`method` is 'm': expected 'reml' or 'ml'"
    assert done.stderr.count(message) == 2 and "error: 2 of 4 runs failed" in done.stderr
    assert "Traceback" not in done.stderr
    records = [json.loads((run / "result.json").read_text()) for run in runs(tmp_path)]
    assert [r["model"]["method"] for r in records] == ["ml", "ml"]
    assert records[0]["fit"]["log_likelihood"] == records[1]["fit"]["log_likelihood"]
    table = pd.read_csv(tmp_path / "s" / "sweep.csv")
    assert table["run"].tolist() == [0, 1, 2, 3]
    assert table["model.method"].tolist() == ["m", "ml", "m", "ml"]
    assert table["error"].str.contains(message, regex=False).tolist() == [True, False] * 2
    assert table["aic"].isna().tolist() == [True, False] * 2
    assert f"best run by aic: {Path('s', '1')}" in done.stdout
    # What is right now takes the place of what has failed.
    done = call("-m", "seed=1", "model.method=ml", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "error" not in pd.read_csv(tmp_path / "s" / "sweep.csv")


class Returned(Callback):
    """Tells what a job returns, which is what a sweep minimises."""

    def on_job_end(self, config, job_return, **options):
        Path("returned").write_text(str(job_return.return_value))


def test_a_sweep_minimises_the_deviance(tmp_path):
    target = f"+hydra.callbacks.returned._target_={__name__}.Returned"
    done = call(target, *QUICK, "hydra.run.dir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "run" / "result.json").read_text())
    assert float((tmp_path / "returned").read_text()) == record["fit"]["deviance"]
    assert record["fit"]["deviance"] == -2 * record["fit"]["log_likelihood"]


def test_the_seed_chooses_the_rows_that_are_held_out(tmp_path):
    found = []
    for seed in (1, 2, 1):
        options = [f"seed={seed}", "data.validation=0.25", *QUICK, "hydra.run.dir=run"]
        done = call(*options, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        record = json.loads((tmp_path / "run" / "result.json").read_text())
        assert record["data"]["rows"] == 135
        found.append(record["fit"]["log_likelihood"])
    assert found[0] == found[2] != found[1]


@pytest.mark.parametrize(
    "arguments",
    [
        ["experiment=gradient_descent"],
        ["experiment=split_plot", "logger=none"],
        ["optimizer=lbfgs", "data=john_alpha"],
    ],
)
def test_experiments_and_optimizers(tmp_path, arguments):
    done = call(*arguments, "plots=false", "hydra.run.dir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["fit"]["converged"]


@pytest.mark.parametrize("name", ["crossed", "longitudinal", "spatial"])
def test_networks_with_random_effects(tmp_path, name):
    options = ["trainer.max_epochs=2", "model.width=4"]
    options += ["plots=false"] if name == "crossed" else []
    done = call(f"experiment=neural_{name}", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "held out: mse" in done.stdout
    (run,) = runs(tmp_path)
    record = json.loads((run / "result.json").read_text())
    assert record["fit"]["optimizer"] == "Adam"
    assert record["fit"]["converged"] is True
    assert set(record["validation"]) == {"val_mse", "val_negative_log_density", "val_coverage"}
    assert (run / "trace.csv").is_file()
    assert (run / "plots" / "semivariogram.png").is_file() == (name == "spatial")
    table = {"crossed": datasets.ratings, "longitudinal": datasets.growth}.get(
        name, datasets.field
    )()
    table.head(9).to_csv(tmp_path / "new.csv", index=False)
    done = call("predict", f"checkpoint={run}/model.ckpt", "data.path=new.csv", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.rglob("predictions.csv")
    columns = ["row", "mean", "variance", "population_mean", "low", "high"]
    assert list(pd.read_csv(path).columns) == columns


@pytest.mark.parametrize(
    ("name", "metrics"),
    [
        ("binary", {"deviance", "log_loss", "auc", "brier", "calibration_error"}),
        ("counts", {"deviance"}),
    ],
)
def test_networks_of_responses_that_are_not_gaussian(tmp_path, name, metrics):
    simulate = datasets.purchases if name == "binary" else datasets.visits
    options = [f"experiment=neural_{name}", "trainer.max_epochs=1"]
    done = call(*options, "model.width=4", "logger=none", "hydra.run.dir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "run" / "result.json").read_text())
    assert record["model"]["family"] == ("binomial" if name == "binary" else "poisson")
    assert record["fit"]["converged"] is True
    every = {"mse", "negative_log_density"} | metrics
    assert set(record["validation"]) == {f"val_{metric}" for metric in every}
    plots = {path.stem for path in (tmp_path / "run" / "plots").iterdir()}
    assert {"residuals", "convergence"} <= plots and ("calibration" in plots) == (name == "binary")
    module = MixedModule.load_from_checkpoint(tmp_path / "run" / "model.ckpt", weights_only=True)
    found = module.predict(simulate(50, 100, seed=2))
    assert bool((found["mean"] > 0).all()) and len(found) == 50


@pytest.mark.parametrize(
    ("training", "residual"),
    [
        ("alternating", ["model.residual={_target_: torch.nn.LazyLinear, out_features: 3}"]),
        (
            "full",
            ["+model.residual._target_=torch.nn.LazyLinear", "+model.residual.out_features=3"],
        ),
    ],
)
def test_a_network_for_the_residual_is_an_option_as_typed_in_a_shell(tmp_path, training, residual):
    table = datasets.growth(20).rename(columns={"height": "y", "age": "x", "child": "g"})
    table.to_csv(tmp_path / "t.csv", index=False)
    options = ["experiment=neural", "data.path=t.csv", "model.formula=y ~ x + (1 | g)"]
    options += [
        "trainer.max_epochs=1",
        f"model.training={training}",
        "model.width=4",
        *QUICK,
    ]
    done = call(*options, *residual, "hydra.run.dir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    module = MixedModule.load_from_checkpoint(tmp_path / "run" / "model.ckpt", weights_only=True)
    assert module.predict(table)["variance"].nunique() > 20  # each row has a residual of its own


def test_a_sweep_of_a_network_has_a_table_and_a_best_run(tmp_path):
    done = call(
        "-m", "experiment=neural_longitudinal", "trainer.max_epochs=2", "optimizer.lr=0.01",
        "model.head=ml,gls", "trainer.enable_progress_bar=false", *QUICK, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.rglob("sweep.csv")
    table = pd.read_csv(path)
    assert table["run"].tolist() == [0, 1]
    assert table["model.head"].tolist() == ["ml", "gls"]
    best = table["run"][table["val_negative_log_density"].idxmin()]
    shown = [line for line in done.stdout.splitlines() if line.startswith("best run by")]
    assert shown[0].endswith(f"/{best}")


def test_two_processes_write_once_what_one_does(tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "howto.md").read_text(encoding="utf-8")
    (shown,) = re.findall("^openreml-nn (.*devices=2.*)$", page, re.MULTILINE)
    quick = ["trainer.max_epochs=2", "model.width=4", *QUICK]
    options = [part for part in shown.split() if "devices" not in part and "strategy" not in part]
    # The second process starts the program anew, from its file.
    program = tmp_path / "program.py"
    program.write_text(PROGRAM[-1])

    def first():
        sys.argv[0], sys.modules["__main__"] = str(program), ModuleType("__main__")
        os.environ["OMP_NUM_THREADS"] = "1"
        main([*shown.split(), *quick, "hydra.run.dir=two"])

    two = forked(first, tmp_path)
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("Fixed effects") + two.stdout.count("Random effects") == 1
    call(*options, *quick, "hydra.run.dir=one", cwd=tmp_path)
    found = [json.loads((tmp_path / d / "result.json").read_text()) for d in ("one", "two")]
    # The network is in single precision.
    one, other = (record["fit"]["log_likelihood"] for record in found)
    assert one == pytest.approx(other, rel=1e-5)


def test_a_singular_fit_is_a_result(tmp_path):
    source = Path(__file__).parent / "reference" / "dyestuff2.csv"
    done = call(
        f"data.path={source}", "model.formula=Yield ~ 1 + (1 | Batch)", "hydra.run.dir=run",
        *QUICK, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "run" / "result.json").read_text())
    assert record["fit"]["singular"] is True
    assert record["fit"]["converged"] is True
    assert record["random"][0]["covariance"] == [[0.0]]
    assert "singular fit" in done.stdout


def test_rank_deficient_columns_are_named(tmp_path):
    datasets.sleepstudy().assign(Twice=lambda t: 2 * t["Days"]).to_csv(tmp_path / "t.csv")
    formula = "Reaction ~ Days + Twice + (1 | Subject)"
    done = call("data.path=t.csv", f"model.formula={formula}", *QUICK, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "rank deficient: dropped Twice" in done.stderr


def write_tables(folder):
    n = 40
    rng = np.random.default_rng(0)
    good = pd.DataFrame(
        {
            "y": rng.normal(size=n),
            "x": rng.normal(size=n),
            "g": np.repeat(list("abcdefgh"), 5),
            "each": [f"l{i}" for i in range(n)],
        }
    )
    good.to_csv(folder / "good.csv", index=False)
    good.assign(g="a").to_csv(folder / "one.csv", index=False)
    good.assign(y=np.nan).to_csv(folder / "missing.csv", index=False)
    good.assign(x=[np.inf] + [1.0] * (n - 1)).to_csv(folder / "infinite.csv", index=False)
    good.assign(y=1.0).to_csv(folder / "constant.csv", index=False)
    (folder / "empty.csv").write_text("")


MODEL = "model.formula=y ~ x + (1 | g)"
FAULTS = {
    "missing file": (["data.path=none.csv", MODEL], "'none.csv' does not exist"),
    "unknown column": (["data.path=good.csv", "model.formula=y ~ z + (1 | g)"], "no column 'z'"),
    "one level": (["data.path=one.csv", MODEL], "'g' has one level"),
    "no formula": (["data.path=good.csv"], "model.formula is not given"),
    "formula": (["data.path=good.csv", "model.formula=y ~ x + (1 | g"], "'(' without ')'"),
    "text": (["data.path=good.csv", "model.formula=g ~ x + (1 | g)"], "'g' is not numeric"),
    "all missing": (["data.path=missing.csv", MODEL], "every row has a missing value"),
    "n <= p": (["data.path=good.csv", "model.formula=y ~ each + (1 | g)"], "40 rows for 40 fixed"),
    "infinite": (["data.path=infinite.csv", MODEL], "'x' is inf in row 1"),
    "constant": (["data.path=constant.csv", MODEL], "fit `y` exactly"),
    "empty": (["data.path=empty.csv", MODEL], "cannot be read"),
    "code": (
        ["data.path=good.csv", "model.formula=y ~ I(__import__('os')) + (1 | g)"],
        "is not allowed",
    ),
    "method": (["model.method=map"], "`method` is 'map'"),
    "residual": (["model.residual=magic(x | g)"], "magic() is unknown"),
    "chunks": (["data.chunk_rows=many"], "data.chunk_rows is 'many'"),
    "chunks and residual": (
        ["data.chunk_rows=9", "model.residual=cs(Subject)"],
        "no effect with data.chunk_rows=9: model.residual",
    ),
    "solver": (["model.solver=magic"], "`solver` is 'magic'"),
    "solver without its kernel": (["model.solver=spectral"], "the spectral solver needs one known"),
    "solver without its field": (["model.solver=grid"], "the grid solver needs one Kronecker"),
    "solver and residual": (
        ["model.solver=krylov", "model.residual=ar1(Days | Subject)"],
        "the krylov solver needs residuals of one variance",
    ),
    "data set": (["data.name=iris"], "'iris'"),
    "optimizer of a network": (
        ["model=neural", "data=growth"],
        "needs another, such as torch.optim.Adam",
    ),
    "callbacks of a network": (
        ["model=neural", "optimizer=adam"],
        "StopWhenConverged looks at the covariance",
    ),
    "training": (
        ["experiment=neural_spatial", "model.training=magic"],
        "`training` is 'magic'",
    ),
    "head and training": (
        ["experiment=neural_spatial", "model.training=groups", "model.head=gls"],
        "training='full' or 'parts'",
    ),
    "layer": (
        ["experiment=neural_spatial", "model.network._target_=torch.load"],
        "'torch.load', which is not a class",
    ),
    "head": (["experiment=neural_spatial", "model.head=map"], "`head` is 'map'"),
    "epochs": (["trainer.max_epochs=0"], "trainer.max_epochs is 0"),
    "share": (["data.validation=abc"], "data.validation is 'abc': expected a number"),
    "rows": (["experiment=neural_spatial", "model.rows=1.5"], "model.rows is 1.5"),
    "scheduler": (["experiment=neural_spatial", "model.scheduler=1"], "expected a config"),
    "split": (["experiment=neural_spatial", "data.split=even"], "`split` is 'even'"),
    "kernel": (
        ["experiment=neural_spatial", "model.kernels.plot.columns=[east, north]"],
        "a covariance by distance stands in the formula, such as (1 | matern(east, north))",
    ),
    "group": (["optimizer=magic"], "optimizer/magic"),
    "key": (["data.pth=x"], "data.pth"),
    "override": (["seed=[1"], "seed"),
    "seed": (["seed=abc"], "seed is 'abc'"),
    "target": (["trainer._target_=os.system"], "os.system"),
    "trainer": (["trainer.max_epochs=abc"], "trainer"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_input_is_one_line_and_status_2(tmp_path, monkeypatch, capsys, fault):
    write_tables(tmp_path)
    arguments, message = FAULTS[fault]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["openreml-nn"])
    with warnings.catch_warnings(), pytest.raises(SystemExit) as caught:
        main([*arguments, "hydra.run.dir=run"])
    said = capsys.readouterr().err
    assert caught.value.code == 2
    assert message in said
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_an_existing_directory_survives_a_fault(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("kept")
    done = call("model.method=map", "hydra.run.dir=run", cwd=tmp_path)
    assert done.returncode == 2
    assert (tmp_path / "run" / "mine.txt").read_text() == "kept"


def test_help_says_what_to_type_and_lists_the_groups(tmp_path):
    done = call("--help", cwd=tmp_path)
    assert done.returncode == 0
    for group in ("data", "optimizer", "experiment"):
        assert f"{group}:" in done.stdout
    assert 'model.formula="y ~ x + (1 | group)"' in done.stdout
    for part in ("predict", "report"):
        said = call(part, "--help", cwd=tmp_path).stdout
        assert f"openreml-nn {part}" in said
    assert "complete" in call("-sc", "install=bash", cwd=tmp_path).stdout


def test_a_pipe_that_closes_is_no_error(tmp_path):
    line = f"{sys.executable} -c '{PROGRAM[-1]}' --help | head -1"
    done = subprocess.run(
        ["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert "fits linear and generalised mixed models" in done.stdout
    assert "Traceback" not in done.stderr


def test_runs_are_gathered_into_a_page(tmp_path):
    call("-m", "model.method=reml,ml", *QUICK, "hydra.sweep.dir=many", cwd=tmp_path)
    done = call("report", "path=many", "output=page (1).html", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "report of 2 runs" in done.stdout
    assert (tmp_path / "page (1).html").is_file()
    assert not (tmp_path / ".hydra").exists()
    done = call("report", "path=none", cwd=tmp_path)
    assert done.returncode == 2
    assert "'none' has no run" in done.stderr


@pytest.mark.parametrize("kind", ["pedigree", "kernel"])
def test_relations_of_levels_come_from_files(kind, tmp_path):
    rng = np.random.default_rng(0)
    names = [f"a{i}" for i in range(12)]
    table = pd.DataFrame({"animal": rng.choice(names, 60), "y": rng.normal(size=60)})
    table.to_csv(tmp_path / "t.csv", index=False)
    parents = {"animal": names, "sire": [None] * 4 + names[:8], "dam": [None] * 6 + names[:6]}
    pd.DataFrame(parents).to_csv(tmp_path / "p.csv", index=False)
    kernel = pd.DataFrame(np.eye(12) + 0.3 * (np.arange(12) % 2), names, names)
    kernel = (kernel + kernel.T) / 2
    kernel.to_csv(tmp_path / "k.csv")
    formula, key, options = {
        "pedigree": ("y ~ (1 | ped(animal))", "pedigree=p.csv", {"pedigree": tmp_path / "p.csv"}),
        "kernel": ("y ~ (1 | vm(animal, K))", "kernels.K=k.csv", {"kernels": {"K": kernel}}),
    }[kind]
    typed = ["data.path=t.csv", f"model.formula={formula}", f"model.{key}"]
    done = call(*typed, *QUICK, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((runs(tmp_path)[0] / "result.json").read_text())
    assert found["random"][0]["group"] == "animal"
    expected = lmm(formula, table, **options).log_likelihood
    assert found["fit"]["log_likelihood"] == pytest.approx(expected, abs=1e-6)
