"""Runs that are killed, and disks that are full or read-only."""

import errno
import json
import os
import sys
import time
import warnings

import pandas as pd
import pytest
import torch

from openreml_nn.program.main import main
from tests.forked import forked, started

NEURAL = ["experiment=neural_longitudinal", "trainer.enable_progress_bar=false", "model.width=8"]


def test_a_killed_run_leaves_no_half_file_and_is_resumed_to_the_same_end(tmp_path):
    options = [*NEURAL, "trainer.max_epochs=40", "callbacks.checkpoint.every_n_epochs=1"]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    process = started(lambda: main([*options, "hydra.run.dir=killed"]), tmp_path, [nowhere] * 2)
    os.close(nowhere)
    kept = tmp_path / "killed" / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 120
    while not kept.is_file() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    process.kill()
    process.join()
    assert not (tmp_path / "killed" / "result.json").exists()
    epoch = torch.load(kept, weights_only=True)["epoch"]
    assert epoch < 39
    for path in (tmp_path / "killed").rglob("*.csv"):
        pd.read_csv(path)

    def run(folder, *more):
        done = forked(lambda: main([*options, f"hydra.run.dir={folder}", *more]), tmp_path)
        assert done.returncode == 0, done.stderr
        return json.loads((tmp_path / folder / "result.json").read_text())

    resumed = run("resumed", f"resume={kept}")
    whole = run("whole")
    for part in ("fit", "validation"):
        for key, value in whole[part].items():
            if key not in ("seconds", "iterations", "score_norm") and isinstance(value, float):
                assert resumed[part][key] == pytest.approx(value, rel=1e-6), key
    weights = [
        torch.load(tmp_path / folder / "model.ckpt", weights_only=True)["state_dict"]
        for folder in ("resumed", "whole")
    ]
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_a_disk_that_does_not_take_files_is_one_line_and_status_2(
    tmp_path, monkeypatch, capsys, code
):
    def refuse(source, target):
        raise OSError(code, os.strerror(code), str(target))

    monkeypatch.setattr("openreml_nn.support.files.os.replace", refuse)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["openreml-nn"])
    with warnings.catch_warnings(), pytest.raises(SystemExit) as caught:
        main(["logger=none", "trainer.enable_progress_bar=false", "hydra.run.dir=run"])
    said = capsys.readouterr().err
    assert caught.value.code == 2
    assert said.startswith("error: cannot write ")
    assert os.strerror(code) in said
    assert said.count("\n") == 1
    assert not list(tmp_path.rglob("*.json"))


def test_a_checkpoint_to_resume_must_exist(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["openreml-nn"])
    with warnings.catch_warnings(), pytest.raises(SystemExit) as caught:
        main([*NEURAL, "logger=none", "resume=none.ckpt", "hydra.run.dir=run"])
    assert caught.value.code == 2
    assert "resume 'none.ckpt' does not exist" in capsys.readouterr().err
