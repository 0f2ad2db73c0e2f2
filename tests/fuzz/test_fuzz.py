"""Formulas, files and options that nobody would write: each ends with a result or an InputError.

A short run is part of the tests; a long one looks for new counterexamples:

    HYPOTHESIS_PROFILE=fuzz python -m pytest tests/fuzz -q
"""

import contextlib
import io
import math
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from openreml_nn import InputError, lmm
from openreml_nn.program.main import main
from openreml_nn.table import parse_formula, parse_residual, read_table

pytestmark = pytest.mark.fuzz

RNG = np.random.default_rng(0)
TABLE = pd.DataFrame(
    {
        "y": RNG.standard_normal(24),
        "x": RNG.standard_normal(24),
        "z": RNG.integers(0, 3, 24),
        "g": np.arange(24) % 6,
        "h": [f"h{i // 8}" for i in range(24)],
    }
)
# A fault of ours must not hide among the examples that Hypothesis calls slow.
relaxed = settings(suppress_health_check=list(HealthCheck))
#: Of runs of the whole program.
fewer = settings(relaxed, max_examples=settings.default.max_examples // 4)

tokens = st.sampled_from(
    ["y", "x", "z", "g", "h", "1", "0", "-1", "~", "+", "-", "*", ":", "/", "|", "||", "(", ")", "^2",
     "**2", "log(x)", "I(x**2)", "C(z)", "poly(x, 2)", "scale(x)", "bs(x, 3)", "`x`", "'a'", ",", "[",
     "]", "{", "}", "%in%", ".", "==", "__import__('os')", "exec('1')", "x.__class__", "lambda: 0",
     "open('f')", "9**9**9", "\\", "\n", "é", "\x00", " "]
)  # fmt: skip
formulas = st.one_of(
    st.lists(tokens, max_size=14).map(" ".join),
    st.lists(tokens, max_size=10).map(lambda parts: "y ~ x + (1 | g) " + " ".join(parts)),
    st.text(max_size=40),
)


@relaxed
@given(formulas)
@example("y ~ (1 | g) + __import__('os').system('true')")
@example("y ~ x + (" * 200)
def test_formulas(text):
    with contextlib.suppress(InputError):
        parse_formula(text)
    with contextlib.suppress(InputError):
        parse_residual(text)


@relaxed
@given(formulas)
def test_fits_of_formulas(text):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            result = lmm(text, TABLE, max_iterations=30)
        except ValueError:  # an InputError, or a V that is not positive definite
            return
    assert math.isfinite(result.log_likelihood)


@pytest.mark.parametrize(
    "code",
    [
        "__import__('os').system('touch {0}')",
        "I(__import__('os').system('touch {0}'))",
        "open('{0}', 'w')",
        "I((lambda: open('{0}', 'w'))())",
        'exec(\'open("{0}", "w")\')',
        "x.__class__.__mro__",
        "C(x, contr.__class__)",
        "[open('{0}', 'w') for i in x]",
        "log(open('{0}', 'w'))",
        "I(x if open('{0}', 'w') else x)",
        "np.fromfile('{0}')",
    ],
)
def test_no_formula_runs_code(code, tmp_path):
    made = tmp_path / "made"
    for text in (f"y ~ {code} + (1 | g)", f"y ~ x + ({code} | g)", f"{code} ~ x + (1 | g)"):
        with pytest.raises(InputError):
            lmm(text.replace("{0}", str(made)), TABLE)
    assert not made.exists()


@relaxed
@given(
    st.one_of(
        st.binary(max_size=200),
        st.text(alphabet="yxg,;\t\n\r\"' 0123456789.eE+-naNinf\x00é", max_size=200).map(str.encode),
        st.lists(st.sampled_from(["1", "2.5", "", "a", "NA", "inf", "1e400", '"']), max_size=60).map(
            lambda cells: ("y,x,g\n" + "\n".join(
                ",".join(cells[i : i + 3]) for i in range(0, len(cells), 3)
            )).encode()
        ),
    )
)  # fmt: skip
@example(b"")
@example(b"y,x,g\n")
@example(b"\xff\xfe\x00")
@example(b"y,y,y\n1,2,3\n")
@example(b"g,y,x\n\x00,\x00,\x00,0")
def test_bytes_of_a_table(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("fuzz") / "table.csv"
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            table = read_table(path)
            result = lmm("y ~ x + (1 | g)", table, max_iterations=30)
        except ValueError:
            return
    assert math.isfinite(result.log_likelihood)


keys = st.sampled_from(
    ["seed", "data", "data.path", "data.formula", "data.categorical", "data.chunk_rows", "model",
     "model.formula", "model.method", "model.solver", "model.residual", "model.weights", "optimizer",
     "optimizer.tolerance", "optimizer._target_", "trainer.max_epochs", "trainer._target_",
     "trainer.accelerator", "logger", "callbacks", "callbacks.stop.tolerance", "profile", "resume",
     "data.validation", "data.split", "no.such.key", "experiment", "hydra.job.chdir", ""]
)  # fmt: skip
values = st.one_of(
    st.sampled_from(
        ["1", "-1", "0", "1e9", "abc", "null", "[1", "{a: b}", "[]", "reml", "ml", "oats", "neural",
         "none", "os.system", "builtins.eval", "lightning.Trainer", "nan", "true", "'", '"', "${x}",
         "${oc.env:HOME}", "..", "/", "y ~ x", "cs(Subject)", "random", "unseen", "0.5"]
    ),
    st.text(max_size=12),
)  # fmt: skip


@fewer
@given(st.lists(st.tuples(st.sampled_from(["", "+", "++", "~"]), keys, values), max_size=3))
@example([("", "data.path", "${oc.env:HOME}")])
@example([("+", "", "abc")])
@example([("", "resume", "1")])
@example([("~", "optimizer._target_", "null")])
@example([("", "data.categorical", "1")])
@example([("+", "callbacks", "{a: b}")])
@example([("", "logger", "[1]")])
def test_options(tmp_path_factory, given_options):
    """The exit status is 0 or 2, with one line on stderr, and nothing else."""
    options = [f"{prefix}{key}={value}" for prefix, key, value in given_options]
    # What reads a terminal or another process's folder is not for here.
    assume(not any("accelerator" in o or "hydra" in o for o in options))
    folder = tmp_path_factory.mktemp("fuzz")
    quick = ["logger=none", "trainer.max_epochs=3", "trainer.enable_progress_bar=false"]
    before = sys.argv
    said = io.StringIO()
    status = 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        stack.enter_context(contextlib.redirect_stderr(said))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.chdir(folder))
        sys.argv = ["openreml-nn"]
        try:
            main([*quick, *options, "hydra.run.dir=run"])
        except SystemExit as stopped:
            status = stopped.code
        finally:
            sys.argv = before
    lines = [line for line in said.getvalue().splitlines() if not line.startswith("warning: ")]
    assert status in (0, None, 2), said.getvalue()
    if status == 2:
        assert len(lines) == 1, said.getvalue()
        assert lines[0].startswith("error: ")
