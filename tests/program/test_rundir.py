"""A run's directory is one run: locked, rid of what was there, and complete where it has a result."""

import json
import os
import signal
import time

import pandas as pd
import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from openreml_nn import InputError
from openreml_nn.program.main import main
from openreml_nn.program.rundir import RunDirectory, without_environment
from openreml_nn.support.files import is_temporary
from tests.forked import CONTEXT, program, started

pytestmark = pytest.mark.slow

QUICK = ["logger=none", "trainer.enable_progress_bar=false", "hydra.run.dir=r"]
CONFIG = OmegaConf.create({"a": 1})


@pytest.fixture
def hydra(monkeypatch):
    whole = OmegaConf.create({"overrides": {"task": ["a=1"]}, "job": {"name": "x"}})
    monkeypatch.setattr(HydraConfig, "get", lambda: whole)


def wait_for(path):
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.01)


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_what_an_earlier_run_left_goes_and_what_is_the_users_stays(tmp_path, hydra):
    left = ["result.json", "fixed.csv", "profile.csv", "plots/blup_a.png", "logs/csv/metrics.csv",
            "checkpoints/last.ckpt", ".hydra/overrides.yaml", ".fixed.123.csv", ".model.7.ckpt"]  # fmt: skip
    mine = ["mine.txt", "notes/fixed.csv", ".gitignore", ".env.1", "plots.txt"]
    for name in [*left, *mine[:-2], "plots.txt"]:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text("x")
    (tmp_path / ".env.1").mkdir()
    with RunDirectory(tmp_path) as directory:
        assert (tmp_path / "result.json").exists()  # nothing is touched before the run begins
        directory.begin(CONFIG)
    kept = {"mine.txt", "notes/fixed.csv", ".gitignore", "plots.txt"}
    options = {"config.yaml", ".hydra/config.yaml", ".hydra/hydra.yaml", ".hydra/overrides.yaml"}
    assert files(tmp_path) == kept | options
    assert (tmp_path / ".hydra" / "overrides.yaml").read_text() == "- a=1\n"


def test_the_checkpoint_that_a_run_goes_on_from_stays(tmp_path, hydra):
    (tmp_path / "checkpoints").mkdir()
    for name in ("last.ckpt", "old.ckpt"):
        (tmp_path / "checkpoints" / name).write_text("x")
    with RunDirectory(tmp_path) as directory:
        directory.begin(CONFIG, str(tmp_path / "notes" / ".." / "checkpoints" / "last.ckpt"))
    assert os.listdir(tmp_path / "checkpoints") == ["last.ckpt"]


def test_a_link_to_a_folder_is_taken_away_and_not_what_is_in_it(tmp_path, hydra):
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.png").write_text("x")
    run = tmp_path / "r"
    run.mkdir()
    (run / "plots").symlink_to(other)
    with RunDirectory(run) as directory:
        directory.begin(CONFIG)
    assert (other / "a.png").exists()
    assert not (run / "plots").is_symlink()


def test_two_at_once(tmp_path):
    folder = tmp_path / "r"
    with RunDirectory(folder):
        with pytest.raises(InputError, match="is in use by another run"), RunDirectory(folder):
            pass
        assert folder.is_dir()
    with RunDirectory(folder):
        pass


def test_a_killed_process_holds_no_lock(tmp_path):
    def hold():
        with RunDirectory(tmp_path / "r"):
            (tmp_path / "held").write_text("")
            time.sleep(60)

    process = CONTEXT.Process(target=hold)
    process.start()
    wait_for(tmp_path / "held")
    with pytest.raises(InputError, match="in use"), RunDirectory(tmp_path / "r"):
        pass
    process.kill()
    process.join()
    with RunDirectory(tmp_path / "r"):
        pass


def test_a_run_that_fails_leaves_nothing_but_what_was_there(tmp_path):
    new, old = tmp_path / "new", tmp_path / "old"
    old.mkdir()
    (old / "mine.txt").write_text("x")
    for folder in (new, old):
        with pytest.raises(InputError), RunDirectory(folder):
            raise InputError("x")
    assert not new.exists()
    assert files(old) == {"mine.txt"}

    # What a run can go on from is worth more than an empty folder.
    def fails_late():
        with RunDirectory(new):
            (new / "checkpoints").mkdir()
            (new / "checkpoints" / "last.ckpt").write_text("x")
            raise InputError("x")

    with pytest.raises(InputError):
        fails_late()
    assert files(new) == {"checkpoints/last.ckpt"}


def test_other_processes_of_a_run_leave_its_directory_alone(tmp_path):
    (tmp_path / "result.json").write_text("x")
    with RunDirectory(tmp_path), RunDirectory(tmp_path, writes=False) as other:
        other.begin(CONFIG)
    assert files(tmp_path) == {"result.json"}


def test_values_from_the_environment_are_not_written(tmp_path, monkeypatch):
    monkeypatch.setenv("PASSWORD", "s3cret")
    config = OmegaConf.create(
        {
            "direct": "${oc.env:PASSWORD}",
            "inside": "sqlite://me:${ oc.env:PASSWORD}@host",
            "indirect": "${direct}",
            "decoded": "${oc.decode:${oc.env:PASSWORD}}",
            "section": {"x": "${..direct}", "y": 3, "z": "${.y}", "": "${section.y}"},
            "whole": "${section}",
            "list": [1, "${direct}"],
            "plain": {"a.b": "${section.y}", "missing": "???", "none": None, "empty": {}},
            "itself": {"a": "${plain}"},
        }
    )
    found = without_environment(config)
    text = OmegaConf.to_yaml(found)
    assert "s3cret" not in text
    assert found["section"]["z"] == 3
    assert found["direct"] == "${oc.env:PASSWORD}"
    assert found["indirect"] == "${direct}"
    assert found["plain"] == {"a.b": 3, "missing": "???", "none": None, "empty": {}}
    assert found["whole"] == "${section}"
    # What was kept is read again.
    assert OmegaConf.create(text).section.x == "s3cret"


def test_no_file_of_a_run_holds_a_value_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "s3cret")
    option = "+hydra.job.env_set.COPY=${oc.env:SECRET}"
    done = program(*QUICK, "plots=false", option, "data.comment=${oc.env:SECRET}", "data.path=t.csv",
                   "model.formula=y ~ x", cwd=write_line(tmp_path))  # fmt: skip
    assert done.returncode == 0, done.stderr
    for path in (tmp_path / "r").rglob("*"):
        assert path.is_dir() or b"s3cret" not in path.read_bytes(), path
    assert "${oc.env:SECRET}" in (tmp_path / "r" / "config.yaml").read_text()


def write_line(folder):
    rows = "".join(f"{i * 1.5 + (i % 3)},{i}\n" for i in range(9))
    (folder / "t.csv").write_text(f"y,x\n{rows}")
    return folder


def test_temporary_files_are_known_by_their_names(tmp_path):
    for name, expected in ((".fixed.12.csv", True), (".a.b.12.ckpt", True), (".gitignore", False),
                           ("fixed.12.csv", False), (".hydra.yaml", False), (".x.12", True)):  # fmt: skip
        (tmp_path / name).write_text("")
        assert is_temporary(tmp_path / name) == expected, name


# ---------------------------------------------------------------------- whole runs


def test_the_result_comes_last(tmp_path):
    (tmp_path / "r" / "plots").mkdir(parents=True)
    (tmp_path / "r" / "plots" / "blup_Nobody.png").write_text("x")
    (tmp_path / "r" / "result.json").write_text("{}")
    formula = "diameter ~ 1 + (1 | plate)"
    options = ["data=penicillin", f"model.formula={formula}", "profile=true"]
    done = program(*QUICK, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "r"
    assert pd.read_csv(run / "profile.csv")["name"].tolist()[-1] == "(Intercept)"
    assert {"plots/blup_plate.png", "plots/profile.png", "profile.csv"} <= files(run)
    assert "plots/blup_Nobody.png" not in files(run)
    result = (run / "result.json").stat().st_mtime_ns
    assert all(path.stat().st_mtime_ns <= result for path in run.rglob("*") if path.is_file())
    assert not any(is_temporary(path) for path in run.rglob("*"))


def test_a_result_never_stands_alone(tmp_path):
    nowhere = os.open(os.devnull, os.O_WRONLY)
    process = started(lambda: main(QUICK), tmp_path, [nowhere] * 2)
    wait_for(tmp_path / "r/result.json")
    there = files(tmp_path / "r")
    process.join(60)
    os.close(nowhere)
    assert process.exitcode == 0
    assert {"model.ckpt", "fixed.csv", "summary.txt", "plots/convergence.png"} <= there


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_with_its_status_and_one_line(tmp_path, number):
    options = ["experiment=neural_longitudinal", "model.width=4", "trainer.max_epochs=4000", *QUICK]
    options += ["callbacks.checkpoint.every_n_epochs=1"]
    errors = os.open(tmp_path / "stderr", os.O_WRONLY | os.O_CREAT)
    process = started(lambda: main(options), tmp_path, [os.dup(errors), errors])
    wait_for(tmp_path / "r/checkpoints/last.ckpt")
    os.kill(process.pid, number)
    process.join(60)
    os.close(errors)
    assert process.exitcode == 128 + number
    said = (tmp_path / "stderr").read_text()
    assert said == f"error: stopped by {number.name}\n"
    assert not (tmp_path / "r" / "result.json").exists()
    assert (tmp_path / "r" / "checkpoints" / "last.ckpt").exists()
    assert not any(is_temporary(path) for path in (tmp_path / "r").rglob("*"))


def test_a_second_run_into_the_folder_of_one_that_lasts(tmp_path):
    options = ["experiment=neural_longitudinal", "model.width=4", "trainer.max_epochs=4000", *QUICK]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    process = started(lambda: main(options), tmp_path, [nowhere] * 2)
    wait_for(tmp_path / "r/.hydra/overrides.yaml")
    before = (tmp_path / "r/.hydra/overrides.yaml").read_text()
    done = program(*QUICK, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "is in use by another run" in done.stderr
    assert (tmp_path / "r/.hydra/overrides.yaml").read_text() == before
    process.kill()
    process.join()
    os.close(nowhere)
    assert program(*QUICK, "plots=false", cwd=tmp_path).returncode == 0
    assert json.loads((tmp_path / "r" / "result.json").read_text())["data"]["rows"] == 180
