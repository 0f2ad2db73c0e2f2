"""The Python of the README runs as it stands, and so does its output."""

import re
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_python_blocks_run(capsys):
    namespace = {}
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
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
