"""Runs that are killed, and disks that are full or read-only."""

import errno
import os
import sys
import warnings

import pytest

from openreml_nn.program.main import main
from tests.endurance import endure

pytestmark = pytest.mark.slow

NEURAL = ["experiment=neural_longitudinal", "trainer.enable_progress_bar=false", "model.width=8"]


def test_stopped_runs_leave_no_half_file_and_are_resumed_to_the_same_end(tmp_path):
    assert len(endure(tmp_path, 2, seed=1)) == 2  # python -m tests.endurance 40 does more


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
