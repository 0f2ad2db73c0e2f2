"""The Python of the README and of the documentation runs as it stands."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from openreml_nn import covariance

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page):
    """Blocks of Python, each with what stands right below it as its output."""
    text = page.read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```(?:\n\n```text\n(.*?)\n```)?", text, re.DOTALL)


#: How far numbers may be off, where a network is trained in single precision; else the last digit.
LOOSE = {"tour.md": 0.05, "ratings.md": 0.05}


def assert_same(printed, shown, page):
    """The same words, and numbers to the last digit that is shown."""
    tolerance = LOOSE.get(page.name, 1e-3)
    found, expected = (re.sub(r"score norm \S+", "", text).split() for text in (printed, shown))
    assert len(found) == len(expected), printed
    for one, other in zip(found, expected, strict=True):
        try:
            number = float(other.strip("{},()"))
        except ValueError:
            assert one == other, printed
            continue
        assert float(one.strip("{},()")) == pytest.approx(
            number, rel=tolerance, abs=1e-3, nan_ok=True
        ), printed


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda page: page.name)
def test_python_blocks_run_and_print_what_is_shown(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    # As a reader has it.
    torch.set_default_dtype(torch.float32)
    namespace = {}
    for block, shown in blocks(page):
        exec(compile(block, page.name, "exec"), namespace)
        printed = capsys.readouterr().out
        if shown:
            assert_same(printed, shown, page)
    assert "torch" in namespace


def test_shell_lines_of_the_tour_run(tmp_path):
    page = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    rng = np.random.default_rng(1)
    table = pd.DataFrame({"dose": rng.uniform(0, 1, 200), "clinic": rng.integers(1, 21, 200)})
    table["score"] = 5 + 2 * table["dose"] + rng.standard_normal(200)
    table.to_csv(tmp_path / "trial.csv", index=False)
    program = f'{sys.executable} -c "from openreml_nn.app import main; main()"'
    done = subprocess.run(
        ["bash", "-euc", f'openreml-nn() {{ {program} "$@"; }}\n{script}'],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "trial.html").is_file()


def test_the_pages_link_to_each_other():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        if page.stem != "index":
            assert re.search(rf"^{page.stem}$", index, re.MULTILINE), page.name


def test_every_public_matrix_has_a_page_and_a_picture():
    listed = (ROOT / "docs" / "covariance.md").read_text(encoding="utf-8")
    drawn = (ROOT / "docs" / "gallery.py").read_text(encoding="utf-8")
    for name in covariance.__all__:
        assert re.search(rf"\b{name}\b", listed), name
        if name not in ("Matrix", "Operator", "Pedigree", "transform"):
            assert f'"{name}"' in drawn, name


def test_output_of_the_readme(capsys):
    namespace = {}
    for block, _ in blocks(ROOT / "README.md"):
        exec(compile(block, "README.md", "exec"), namespace)
    shown = capsys.readouterr().out
    assert "REML criterion 1743.6283" in shown
    assert "solver   blocked" in shown


def test_the_summary_shown_is_the_programs():
    from openreml_nn import lmm
    from openreml_nn.datasets import sleepstudy

    formula = "Reaction ~ Days + (Days | Subject)"
    lines = lmm(formula, sleepstudy()).summary(formula).splitlines()
    # The last line tells the score norm, which is rounding.
    for line in lines[:-2]:
        assert line.rstrip() in README
