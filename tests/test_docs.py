"""The Python of the README and of the documentation runs as it stands."""

import re
from pathlib import Path

import pytest

from openreml_nn import covariance

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda page: page.name)
def test_python_blocks_run(page):
    namespace = {}
    for block in blocks(page):
        exec(compile(block, page.name, "exec"), namespace)
    assert "torch" in namespace


def test_every_public_matrix_has_a_page_and_a_picture():
    listed = (ROOT / "docs" / "covariance.md").read_text(encoding="utf-8")
    drawn = (ROOT / "docs" / "gallery.py").read_text(encoding="utf-8")
    for name in covariance.__all__:
        assert re.search(rf"\b{name}\b", listed), name
        if name not in ("Matrix", "Operator", "Pedigree", "transform"):
            assert f'"{name}"' in drawn, name


def test_output_of_the_readme(capsys):
    namespace = {}
    for block in blocks(ROOT / "README.md"):
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
