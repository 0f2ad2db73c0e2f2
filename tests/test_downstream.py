"""What a user writes runs, and has the types that it says (which mypy checks)."""

import tomllib
from pathlib import Path

import pytest
import torch

from tests import downstream

ROOT = Path(__file__).parents[1]


def test_what_a_user_writes_runs():
    assert downstream.tables().log_likelihood == pytest.approx(-875.9697, abs=1e-4)
    assert downstream.trees().converged
    assert torch.isfinite(downstream.networks().mean).all()
    assert len(downstream.mistakes()) == 2


def test_mypy_reads_it():
    options = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypy"]
    assert "tests/downstream.py" in options["files"]
    assert options["strict"]
    assert (ROOT / "openreml_nn" / "py.typed").is_file()
