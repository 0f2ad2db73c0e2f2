"""The Python of the README and of the documentation runs as it stands."""

import ast
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from openreml_nn import covariance
from openreml_nn.table.functions import FUNCTIONS
from openreml_nn.table.structure import EFFECTS, RELATIONS, VARIANCES
from tests import peers
from tests.forked import served

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page):
    """Blocks of Python, each with what stands right below it as its output."""
    text = page.read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```(?:\n\n```text\n(.*?)\n```)?", text, re.DOTALL)


NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d*)?(?:e[-+]?\d+)?")
#: Lines with estimates of a network that is trained in single precision; all else is exact.
LOOSE = {"tour.md": r"\+-|coverage of", "ratings.md": r"\+-|coverage of|held out: mean|^[01]  "}


def assert_same(printed, shown, page):
    """The same words, whole numbers that are equal, and others to the last digit that is shown;
    within 5% in the lines of :data:`LOOSE`."""
    found, expected = (re.sub(r"score norm \S+", "", t).splitlines() for t in (printed, shown))
    found = [line for line in found if line.strip()]
    expected = [line for line in expected if line.strip()]
    assert len(found) == len(expected), printed
    for one, other in zip(found, expected, strict=True):
        assert NUMBER.sub("#", one).split() == NUMBER.sub("#", other).split(), printed
        loose = re.search(LOOSE.get(page.name, "$."), other)
        for number, digits in zip(NUMBER.findall(one), NUMBER.findall(other), strict=True):
            exponent = Decimal(digits).as_tuple().exponent
            last = 10.0**exponent if exponent < 0 else 0.0
            room = max(1.01 * last, (0.05 if loose else 1e-9) * abs(float(digits)))
            assert abs(float(number) - float(digits)) <= room, f"{one!r}, shown as {other!r}"


@pytest.mark.parametrize(
    ("printed", "shown", "page"),
    [
        ("p 9.5e-04", "p 4.0e-10", "inference.md"),
        ("p 3.965e-10", "p 3.961e-10", "inference.md"),
        ("dept 0.00785", "dept 0.00695", "ratings.md"),
        ("s 0.112", "s 0.107", "ratings.md"),
        ("REML criterion 1743.6285", "REML criterion 1743.6283", "tour.md"),
        ("converged in 5 iterations", "converged in 4 iterations", "tour.md"),
        ("user 0.50 +- 0.02", "user 0.47 +- 0.02", "tour.md"),
        ("low 1", "high 1", "tour.md"),
        ("one\ntwo", "one", "tour.md"),
    ],
)
def test_what_differs_is_seen(printed, shown, page):
    with pytest.raises(AssertionError):
        assert_same(printed, shown, Path(page))


def test_what_rounding_and_training_leave_is_allowed():
    assert_same("p 3.962e-10  1.5", "p 3.961e-10 1.5", Path("inference.md"))
    assert_same("user 0.48 +- 0.02", "user 0.47 +- 0.02", Path("tour.md"))


@pytest.mark.filterwarnings("ignore:.*levels that the fit did not see")
@pytest.mark.filterwarnings("ignore:.*rows have no response")
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda page: page.name)
def test_python_blocks_run_and_print_what_is_shown(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    # As a reader has it.
    torch.set_default_dtype(torch.float32)
    namespace, everything = {}, ""
    if page.stem == "estimators":
        pytest.importorskip("sklearn")
    for block, shown in blocks(page):
        exec(compile(block, page.name, "exec"), namespace)
        printed = capsys.readouterr().out
        everything += printed
        if shown:
            assert_same(printed, shown, page)
    assert len(namespace) > 1  # beside the builtins
    if page.name == "README.md":
        assert "REML criterion 1743.6283" in everything
        assert "solver   blocked" in everything


@pytest.mark.parametrize("page", [p for p in PAGES if peers.shown(p)], ids=lambda page: page.name)
def test_what_another_program_is_said_to_print_is_recorded(page):
    printed = peers.recorded(page)
    assert [line for line in peers.shown(page) if line not in printed] == []


MAKER = importlib.util.spec_from_file_location("notebooks", ROOT / "docs" / "notebooks.py")
notebooks = importlib.util.module_from_spec(MAKER)
MAKER.loader.exec_module(notebooks)
TUTORIALS = notebooks.tutorials(ROOT / "docs")


def test_five_tutorials_offer_a_notebook():
    assert [page.stem for page in TUTORIALS] == [
        "breeding",
        "families",
        "neural",
        "ratings",
        "tour",
    ]


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.name)
def test_a_notebook_has_the_code_of_its_page_with_the_output_shown(page):
    cells = [c for c in notebooks.notebook(page)["cells"] if c["cell_type"] == "code"]
    output = ["".join(o["text"] for o in cell["outputs"]).rstrip("\n") for cell in cells]
    assert [(c["source"] + "\n", o) for c, o in zip(cells, output, strict=True)] == blocks(page)


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.name)
def test_the_text_of_a_notebook_is_what_jupyter_reads(page):
    cells = [c for c in notebooks.notebook(page)["cells"] if c["cell_type"] == "markdown"]
    text = "\n".join(cell["source"] for cell in cells)
    assert not re.search(r"^```\{|\{[\w:]+\}`|^:::", text, re.MULTILINE)
    assert [link for link in re.findall(r"\]\(([^)]*)\)", text) if "://" not in link] == []
    prose = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ .*$", prose, re.MULTILINE)
    assert [h for h in headings if h not in text] in ([], ["## Reference"])


def test_notebooks_are_files_of_jupyters_format(tmp_path):
    pages = [*TUTORIALS, tmp_path / "page.md"]
    pages[-1].write_text(
        "# A\n\n{download}`b <_generated/notebooks/page.ipynb>`\n\n```python\n1\n```\n"
    )
    notebooks.write_notebooks(ROOT / "docs", tmp_path / "notebooks")
    notebooks.write_notebooks(tmp_path, tmp_path / "notebooks")
    required = {
        "markdown": {"id", "cell_type", "metadata", "source"},
        "code": {"id", "cell_type", "metadata", "source", "outputs", "execution_count"},
    }
    for page in pages:
        text = (tmp_path / "notebooks" / f"{page.stem}.ipynb").read_text(encoding="utf-8")
        found = json.loads(text)
        assert set(found) == {"nbformat", "nbformat_minor", "metadata", "cells"}
        assert (found["nbformat"], found["nbformat_minor"]) == (4, 5)
        names = [cell["id"] for cell in found["cells"]]
        assert len(set(names)) == len(names) > 1
        for cell in found["cells"]:
            assert re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", cell["id"])
            assert set(cell) == required[cell["cell_type"]]
            for output in cell.get("outputs", []):
                assert set(output) == {"output_type", "name", "text"}
                assert (output["output_type"], output["name"]) == ("stream", "stdout")


def shell(page):
    """Lines of the shell, but for those that set the project up."""
    found = re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    return "".join(block for block in found if not re.search(r"^make |\.venv", block, re.MULTILINE))


#: The program in forks of this process, without plots, and with networks that are trained for as
#: long as it takes to see that they are, or to a checkpoint. The run of two processes is that of
#: ``tests/test_app.py``, which takes it from its page.
PROGRAM = """
openreml-nn() {{
    case "$*" in
        *devices=*) ;;
        *resume=*) {program} "$@" plots=false trainer.max_epochs=3;;
        *hydra.run.dir=crossed*)
            {program} "$@" plots=false trainer.max_epochs=2 callbacks.checkpoint.every_n_epochs=1;;
        *experiment=neural*) {program} "$@" plots=false trainer.max_epochs=2;;
        predict*|report*|-sc*) {program} "$@";;
        *) {program} "$@" plots=false;;
    esac
}}
"""


@pytest.mark.parametrize("page", [p for p in PAGES if shell(p)], ids=lambda page: page.name)
def test_shell_blocks_run(page, tmp_path):
    rng = np.random.default_rng(1)
    n = 400
    table = pd.DataFrame({name: rng.uniform(0, 1, n) for name in ("dose", "x", "gcsecnt")})
    for name in ("clinic", "school", "lea", "g", "user", "item"):
        table[name] = rng.integers(1, 21, n)
    table["subject"], table["time"] = np.arange(n) // 8, np.arange(n) % 8
    table["year"] = 2020 + table["time"] // 2
    table["y"] = 5 + 2 * table["x"] + rng.standard_normal((21, n))[table["user"], 0]
    table["y"] += rng.standard_normal(n)
    table["score"] = table["y"]
    for name in ("trial", "table", "new", "ratings"):
        table.to_csv(tmp_path / f"{name}.csv", index=False)
    for name in ("table", "large"):
        table.to_parquet(tmp_path / f"{name}.parquet")
    scripts = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with served(tmp_path) as program:
        done = subprocess.run(
            ["bash", "-euc", PROGRAM.format(program=program) + shell(page)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=900,
            env={**os.environ, "PATH": scripts},
        )
    assert done.returncode == 0, done.stderr
    assert "written to" in done.stdout


def test_the_pages_link_to_each_other():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        if page.stem != "index":
            assert re.search(rf"^{page.stem}$", index, re.MULTILINE), page.name


def broken_links(page):
    """Links of a page whose file does not exist, or has no heading of that name."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        target = page.parent / path if path else page
        if not target.exists():
            broken.append(link)
        elif anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", name.lower()).replace(" ", "-") for name in headings]
            broken += [] if anchor in slugs else [link]
    return broken


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"], ids=lambda page: page.name
)
def test_links_lead_to_a_file_and_a_heading(page):
    assert broken_links(page) == []


def test_a_link_that_leads_nowhere_is_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Here\n\n[a](#here) [b](#there) [c](none.md) [d](https://example.org)\n")
    assert broken_links(page) == ["#there", "none.md"]


def test_every_public_matrix_has_a_page_and_a_picture():
    listed = (ROOT / "docs" / "covariance.md").read_text(encoding="utf-8")
    drawn = (ROOT / "docs" / "gallery.py").read_text(encoding="utf-8")
    for name in covariance.__all__:
        assert re.search(rf"\b{name}\b", listed), name
        bases = ("Matrix", "Operator", "simple_param_specs", "transform")
        no_matrix = ("_relationship", "Correlation")
        about_levels = ("Pedigree", "Relationship", "marker_codes", "marker_effects")
        if name not in (*bases, *about_levels) and not name.endswith(no_matrix):
            assert f'"{name}"' in drawn, name


def test_every_public_name_is_in_the_reference():
    pages = [page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md")]
    listed, whole = set(), set()
    for block in re.findall(r"```\{eval-rst\}\n(.*?)```", "\n".join(pages), re.DOTALL):
        listed |= set(re.findall(r"\.\. auto[a-z]+:: (?:[\w.]*\.)?(\w+)", block))
        listed |= set(re.findall(r"^   (\w+)$", block, re.MULTILINE))
        whole |= set(re.findall(r"\.\. automodule:: (\S+)", block))
    rooms = ("", ".covariance", ".datasets", ".estimators", ".families", ".inference", ".lightning")
    rooms += (".likelihood", ".metrics", ".model", ".report", ".result", ".table")
    missing = []
    for room in rooms:
        if room == ".estimators" and importlib.util.find_spec("sklearn") is None:
            continue
        module = importlib.import_module(f"openreml_nn{room}")
        for name in module.__all__ if module.__name__ not in whole else ():
            value = getattr(module, name)
            if callable(value) and name not in listed:
                missing.append(f"{module.__name__}.{name}")
    assert missing == []


def test_every_function_and_structure_of_a_formula_is_on_its_page():
    page = (ROOT / "docs" / "tables.md").read_text(encoding="utf-8")
    code = " ".join(re.findall(r"`+([^`]+)`+", page))
    for name in (*FUNCTIONS, *EFFECTS, *RELATIONS, *VARIANCES):
        assert re.search(rf"(?<![\w.]){re.escape(name)}(?![\w.])", code), name


def test_every_model_of_the_gallery_has_its_picture():
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    sections = [s for s in re.split(r"^## ", page, flags=re.MULTILINE) if "V = Sum(" in s]
    assert len(sections) > 10
    for section in sections:
        name = section.splitlines()[0].lower().replace(" ", "-")
        assert f"```{{figure}} _generated/models/{name}.png" in section, name


def test_the_summary_shown_is_the_programs():
    from openreml_nn import lmm
    from openreml_nn.datasets import sleepstudy

    formula = "Reaction ~ Days + (Days | Subject)"
    lines = lmm(formula, sleepstudy()).summary(formula).splitlines()
    # The last line tells the score norm, which is rounding.
    for line in lines[:-2]:
        assert line.rstrip() in README


def formulas(text):
    """What a page or a docstring has for LaTeX: roles, blocks that are set off, dollars in pages."""
    found = re.findall(r"(?::math:|\{math\})`([^`]*)`", text)
    found += re.findall(r"```\{math\}\n(.*?)```|\$\$(.*?)\$\$", text, re.DOTALL)
    found += re.findall(r"^( *)\.\. math::(.*\n(?:\1 +.*\n|\n)*)", text + "\n", re.MULTILINE)
    return ["".join(parts) for parts in found]


def wrong_in(formula):
    """What LaTeX would not take as it was meant; empty where nothing is."""
    if re.search(r"[\x00-\x09\x0b-\x1f]", formula):
        return "a backslash and a letter were read as a control character"
    if re.search(r"\\\\[A-Za-z]", formula):
        return "two backslashes end the line, and the letters after them are letters"
    depth = 0
    for brace in re.findall(r"(?<!\\)[{}]", formula):
        depth += 1 if brace == "{" else -1
        if depth < 0:
            break
    if depth:
        return "braces do not match"
    if len(re.findall(r"\\left\b", formula)) != len(re.findall(r"\\right\b", formula)):
        return "\\left without \\right"
    return ""


@pytest.mark.parametrize(
    "formula", ["Z^\\\\top", "\thetaZ", "x_{i", "}{", "\\left( x", "\x0crac{1}{2}"]
)
def test_a_formula_that_latex_does_not_take_is_seen(formula):
    assert wrong_in(formulas(f":math:`{formula}`")[0])
    assert wrong_in(formulas(f"Text {{math}}`{formula}` text")[0])
    assert wrong_in(formulas(f"Text\n\n.. math:: a\n    {formula}\n\nText")[0])


def test_a_formula_as_it_should_be_is_taken():
    assert not wrong_in(r"\tfrac12\left[\log|V| + y^\top P y\right], \{a\} \\ b")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_formulas_of_pages_are_as_latex_takes_them(page):
    for formula in formulas(page.read_text(encoding="utf-8")):
        assert not wrong_in(formula), formula


def test_formulas_of_docstrings_are_as_latex_takes_them():
    seen = 0
    for path in (ROOT / "openreml_nn").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                for formula in formulas(ast.get_docstring(node) or ""):
                    assert not wrong_in(formula), f"{path}: {formula!r}"
                    seen += 1
    assert seen > 300
