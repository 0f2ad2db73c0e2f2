"""lme4's notation, taken apart."""

import re

import numpy as np
import pandas as pd
import pytest

from openreml_nn import InputError
from openreml_nn.table import Encoder, parse_formula


@pytest.mark.parametrize(
    ("text", "fixed", "random"),
    [
        ("y ~ x + (1 | g)", "x", [("1", "g")]),
        ("y ~ 1 + (1 | g)", "1", [("1", "g")]),
        ("y ~ (1 | g)", "1", [("1", "g")]),
        ("y ~ 0 + x + (x | g)", "0 + x", [("x", "g")]),
        ("y ~ x", "x", []),
        ("y ~ (1|a) + x*z + (0 + x|b)", "x * z", [("1", "a"), ("0 + x", "b")]),
        ("y ~ x + (1 | a/b)", "x", [("1", "a"), ("1", "a:b")]),
        ("y ~ x + (1 | a/b/c)", "x", [("1", "a"), ("1", "a:b"), ("1", "a:b:c")]),
        ("y ~ x + (1 | a:b)", "x", [("1", "a:b")]),
        ("y ~ x + (x || g)", "x", [("1", "g"), ("0 + x", "g")]),
        ("y ~ x + (0 + x || g)", "x", [("0 + x", "g")]),
        ("log(y) ~ I(x^2) + (1 | g)", "I(x^2)", [("1", "g")]),
        ("y ~ poly(x, 2) + (1 | `my group`)", "poly(x, 2)", [("1", "my group")]),
        ("y~x+(1|g)", "x", [("1", "g")]),
    ],
)
def test_formulas(text, fixed, random):
    found = parse_formula(text)
    assert str(found.fixed) == fixed
    assert [(str(part.effects), part.group) for part in found.random] == random


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   ",
        "y",
        "y ~",
        "~ x",
        "y ~ x ~ z",
        "y ~ x + (1 | g",
        "y ~ x + 1 | g)",
        "y ~ x + 1 | g",
        "y ~ x (1 | g)",
        "y ~ x + (1 | g) x",
        "y ~ x + (1 |)",
        "y ~ x + (| g)",
        "y ~ x + (1 | f(g))",
        "y ~ x + (1 | g + h)",
        "y ~ x + ((1 | g))",
        "y ~ x + + * (1 | g)",
        "y ~ x +* z + (1 | g)",
        None,
        3,
    ],
)
def test_what_does_not_parse_says_so_in_one_line(text):
    with pytest.raises(InputError) as caught:
        parse_formula(text)
    assert "formula" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "part",
    [
        "__import__('os').system('true')",
        "I(__import__('os'))",
        "eval('1')",
        "open('/etc/passwd')",
        "I((lambda: x)())",
        "I([x for x in x])",
        "np.load('x')",
        "exec('1')",
        "I(f'{x}')",
        "I(9**9**9)",
        "I(x if x else x)",
        "I(x := x)",
        "getattr(x, 'values')",
    ],
)
@pytest.mark.parametrize("where", ["{} ~ x + (1 | g)", "y ~ {} + (1 | g)", "y ~ x + ({} | g)"])
def test_formulas_run_no_code_that_is_not_allowed(part, where):
    with pytest.raises(InputError, match="formula"):
        parse_formula(where.format(part))


def test_columns_of_a_part():
    found = parse_formula(
        "y ~ log(x) + `a b` + I(`c d` * z) + C(f, contr.treatment('k')) + total.fruits:TRUE.x"
    )
    assert found.fixed.columns == ["x", "a b", "c d", "z", "f", "total.fruits", "TRUE.x"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("y ~ x + (1 | g", "'(' without ')'"),
        ("y ~ x + 1 | g)", "')' without '('"),
        ("y ~ x + log(x", "stands where ',' is expected"),
        ("y ~ x + (1 | Patient ID)", "a name with spaces stands in backticks, `Patient ID`"),
        ("y ~ body mass + x", "a name with spaces stands in backticks, `body mass`"),
        ("y ~ x + 1 | g", "a term of its own in parentheses"),
        ("y ~ x + (1 | g + h)", "for two grouping factors"),
        ("y ~ x + (. | g)", "fixed effects only"),
        ("y ~ x ? z", "'? z' is unexpected"),
        ("y ~ x + 3", "3 is no term, expected 0 or 1"),
        ("y ~ (x + z)^0.5", "expected a whole power"),
        ("y ~ x %o% z", "operator '%o%' is not allowed"),
        ("y ~ x + offset(z):x", "expected offset(x), a term alone"),
        ("y ~ cbind(x, z)", "'cbind()' is not allowed"),
    ],
)
def test_what_does_not_parse_is_told_where(text, message):
    with pytest.raises(InputError) as caught:
        parse_formula(text)
    assert message in str(caught.value)


LARGE = pd.DataFrame({"y": np.arange(20.0) ** 2, "x": np.linspace(1, 2, 20), "g": list("abcd") * 5})


@pytest.mark.parametrize(
    ("term", "message"),
    [
        ("poly(x, 10**9)", "`degree` is 10^9: expected a whole number from 1 to 50"),
        ("poly(x, 0 / 0)", "`degree` is 0/0: expected a whole number from 1 to 50"),
        ("bs(x, df = 1e9)", "`df` is 1e+09: expected a whole number from 1 to 500"),
        ("cut(x, 1e9)", "`breaks` is 1e+09: expected a whole number from 1 to 1000"),
        ("cut(x, 3, dig.lab = 1e9)", "`dig.lab` is 1e+09: expected a whole number from"),
        ("round(x, 1e300)", "`digits` is 1e+300: expected a whole number from -300 to 300"),
        ("round(x, 2.5)", "`digits` is 2.5: expected a whole number"),
        ("scale(x, scale = 0)", "the scale is zero"),
        ("I(x**1e308)", "is inf in row 2: expected a finite number"),
        ("I(9**9**9 * x)", "is inf in row 1: expected a finite number"),
        ("I(" * 70 + "x" + ")" * 70, "more than 60 levels of nesting"),
        ("x + " * 601 + "x", "more than 600 operators in a row"),
        ("I(" + "x + " * 601 + "x)", "more than 600 operators in a row"),
        ("*".join(f"v{i}" for i in range(12)), "has more than 2000 terms when multiplied out"),
        ("(" + "+".join("abcdefghijkl") + ")^6", "has more than 2000 terms"),
        (
            "factor(x):factor(y):factor(g)",
            "20 rows for 1601 fixed effects: more rows are needed; 'factor(x)' alone, a factor here, has 20 levels in 20 rows",
        ),
        ("C(g, contr.treatment(base = 1e300))", "base 1e+300: expected 1 to 4"),
        ("(1 | spline(x, y, segments = 200))", "has 40401 coefficients: expected at most 2000"),
    ],
)
def test_what_would_cost_too_much_is_refused_before_it_does(term, message):
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        Encoder(f"y ~ {term}").fit(LARGE)
    assert "\n" not in str(caught.value)


def test_long_sums_are_taken():
    assert len(parse_formula("y ~ " + " + ".join(f"x{i}" for i in range(590))).fixed.terms) == 591
