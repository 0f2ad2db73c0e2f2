"""What the program says: whose fault it is, in one line, and names of users as they are written."""

import io
import warnings

import numpy as np
import pandas as pd
import pytest
import torch

from openreml_nn import InputError, NumericalError, lmm
from openreml_nn.program.outputs import summary, write_plots, write_record, write_tables
from openreml_nn.program.reporting import Stopped, configured, one_line, reported
from openreml_nn.report import caterpillar, write_report
from openreml_nn.report.plots import convergence
from openreml_nn.support.display import plain_console, visible
from tests.forked import program

EVIL = ["[/red]", "[bold]b[/bold]", ":smile:", "\x1b[31mred", "a\nb", "\u202eabc", "$x^2$", "<b>&"]


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (InputError("column\n 'x' \x1b[2J"), 2, "error: column 'x' \\x1b[2J\n"),
        (NumericalError("not positive definite"), 2, "error: not positive definite\n"),
        (MemoryError("8 GB"), 2, "error: out of memory; try this (8 GB)\n"),
        (torch.OutOfMemoryError("CUDA"), 2, "error: out of memory; try this (CUDA)\n"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 2,
         "error: out of memory; try this (DefaultCPUAllocator: can't allocate memory: you tried)\n"),
        (OSError(28, "No space left on device", "r/x.csv"), 2,
         "error: cannot write 'r/x.csv': No space left on device\n"),
        (Stopped(15), 143, "error: stopped by SIGTERM\n"),
        (Stopped(2), 130, "error: stopped by SIGINT\n"),
    ],
)  # fmt: skip
def test_the_exit_status_says_whose_fault_it_is(capsys, error, status, said):
    with pytest.raises(SystemExit) as caught, reported("try this"):
        raise error
    assert caught.value.code == status
    assert capsys.readouterr().err == said


def test_what_fails_while_a_stopped_run_is_cleaned_up_is_not_the_cause(capsys):
    def stopped():
        try:
            raise Stopped(15)
        finally:
            raise OSError("Writer is closed")

    with pytest.raises(SystemExit) as caught, reported():
        stopped()
    assert caught.value.code == 143
    assert capsys.readouterr().err == "error: stopped by SIGTERM\n"


@pytest.mark.parametrize("error", [ValueError("x"), TypeError("x"), KeyError("x"), OSError(5, "x")])
def test_a_fault_of_ours_stays_one(error):
    with pytest.raises(type(error)), reported():
        raise error


def test_out_of_memory_says_which_option_would_help(tmp_path, monkeypatch):
    (tmp_path / "t.csv").write_text("y,g\n1,a\n2,b\n3,a\n4,b\n5,a\n")
    options = ["data.path=t.csv", "model.formula=y ~ 1 + (1 | g)", "hydra.run.dir=r"]

    def full(*_, **__):
        raise MemoryError("no 28 GB")

    monkeypatch.setattr("openreml_nn.table.TableFile.read", full)
    done = program(*options, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        "error: out of memory; data.chunk_rows=100000 reads a file a part at a time (no 28 GB)\n"
    )
    monkeypatch.setattr("openreml_nn.model.stream.accumulate", full)
    done = program(*options, "data.chunk_rows=3", cwd=tmp_path)
    assert done.returncode == 2
    assert "a smaller data.chunk_rows than 3 holds" in done.stderr


def test_a_warning_is_one_line(capsys):
    with warnings.catch_warnings():
        configured()
        warnings.warn("level\n  '\x1b[31m'", RuntimeWarning, stacklevel=1)
    assert capsys.readouterr().err == "warning: level '\\x1b[31m'\n"


def test_control_characters_are_spelled_out():
    assert visible("a\x1b[0m\r\n\tb\x00\x9b\u2028\u202e\ud800") == (
        "a\\x1b[0m\\r\\n\\tb\\x00\\x9b\\u2028\\u202e\\ud800"
    )
    assert visible("Ångström 東京 [x] :y: é\u00a0") == "Ångström 東京 [x] :y: é\u00a0"
    assert one_line(" a \n b ") == "a b"


def test_a_console_reads_no_markup():
    stream = io.StringIO()
    plain_console(file=stream, width=80).print("[red]x[/] :smile: [/y]")
    assert stream.getvalue() == "[red]x[/] :smile: [/y]\n"


@pytest.fixture(scope="module")
def result():
    n = 96
    rng, i = np.random.default_rng(0), np.arange(n)
    table = pd.DataFrame(
        {
            "y": rng.standard_normal(n) + i % len(EVIL),
            "f": np.array([*EVIL[:3], "z"])[i // 8 % 4],
            "[red]g": np.array(EVIL)[i % len(EVIL)],
        }
    )
    return lmm("y ~ f + (1 | `[red]g`)", table)


def test_names_of_users_are_no_markup(result, tmp_path):
    text = summary(result)
    assert "[red]g" in text
    for name in ("f[bold]b[/bold]", "f[/red]"):
        assert name in text or name in " ".join(result.fixed.names)
    assert "\x1b" not in text
    run = tmp_path / "r"
    write_tables(result, run)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_plots(result, run)  # none is left out
    write_record(result, run, {})
    assert set(pd.read_csv(run / "blup.csv")["level"]) == set(EVIL)
    (run / ".hydra").mkdir()
    (run / ".hydra" / "overrides.yaml").write_text("- x=<script>alert(1)</script>\n")
    write_report(tmp_path, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<script>alert" not in page
    assert "[red]g" in page


def test_dollars_in_names_are_no_formulas(result):
    labels = caterpillar(result, "[red]g").axes[0].get_yticklabels()
    assert r"\$x^2\$" in {label.get_text() for label in labels}
    assert {label.get_text() for label in convergence(result).axes[1].get_legend().get_texts()} == {
        "[red]g/sigma^2", "residual/sigma^2"
    }  # fmt: skip


def test_the_program_shows_them_as_they_are(tmp_path):
    rng, i = np.random.default_rng(0), np.arange(40)
    levels = np.array(["[/red]", "=cmd|' /C calc'!A0", "@SUM(1+1)", "\x1b[31m"])[i % 4]
    table = pd.DataFrame({"y": rng.standard_normal(40), "f": levels, "g": i // 4})
    table.to_csv(tmp_path / "t.csv", index=False)
    done = program("data.path=t.csv", "model.formula=y ~ f + (1 | g)", "logger=none", "plots=false",
                   "hydra.run.dir='r[b]'", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    for shown in ("f[/red]", "f=cmd|' /C calc'!A0", "f@SUM(1+1)", "written to r[b]"):
        assert shown in done.stdout
    assert "\x1b" not in done.stdout


def test_files_of_a_run_are_safe_in_a_spreadsheet(tmp_path):
    rng, i = np.random.default_rng(0), np.arange(40)
    levels = np.array(["=cmd|' /C calc'!A0", "@SUM(1+1)", "ok", "-1+2"])[i % 4]
    write_tables(lmm("y ~ 1 + (1 | f)", pd.DataFrame({"y": rng.standard_normal(40), "f": levels})),
                 tmp_path)  # fmt: skip
    cells = pd.read_csv(tmp_path / "blup.csv")["level"]
    assert sorted(cells) == sorted("'" + level if level != "ok" else level for level in set(levels))
