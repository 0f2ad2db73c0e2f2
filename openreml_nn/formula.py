"""Formulas in the notation of lme4: ``score ~ x + (1 + x | school) + (1 | lea)``.

The parts in parentheses with a bar are split off here; all else is left to
formulaic, whose factors are checked against a list of allowed functions
before anything is evaluated.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass

import formulaic
from formulaic.parser.types.factor import Factor

from openreml_nn.errors import InputError

__all__ = [
    "MixedFormula",
    "RandomPart",
    "ResidualPart",
    "columns_of",
    "parse_formula",
    "parse_residual",
]

#: Functions that a formula may call.
FUNCTIONS = frozenset({
    "I", "C", "factor", "log", "log2", "log10", "log1p", "exp", "sqrt", "abs", "sin", "cos", "tan",
    "poly", "bs", "cs", "cc", "cr", "center", "scale", "standardize",
})  # fmt: skip
#: Names of contrasts, for the second argument of ``C``.
CONTRASTS = frozenset(
    ["Treatment", "Sum", "Helmert", "Poly", "Diff", "treatment", "sum", "helmert", "poly", "diff"]
)

_ALLOWED_NODES = (
    ast.Expression, ast.Load, ast.Constant, ast.Call, ast.keyword, ast.BinOp, ast.UnaryOp,
    ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Pow, ast.Mod, ast.FloorDiv, ast.USub, ast.UAdd,
    ast.Compare, ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.List, ast.Tuple,
)  # fmt: skip
_BACKTICKED = re.compile(r"`([^`]*)`")
_CODE = re.compile(r"[\w.]+|`[^`]+`")


@dataclass(frozen=True)
class RandomPart:
    """One ``(effects | group)``.

    Attributes:
        effects: formula of the effects, such as ``1 + Days``.
        factors: the columns whose combinations are the levels.
    """

    effects: str
    factors: tuple[str, ...]

    @property
    def group(self) -> str:
        """The grouping factor as written, ``batch:cask`` for a combination."""
        return ":".join(self.factors)


@dataclass(frozen=True)
class ResidualPart:
    """A structure of the residuals within groups of rows.

    Attributes:
        kind: ``ar1``, ``cs``, ``us`` or ``diag``.
        position: column of the position within a group; None is the order of the rows.
        group: the columns whose combinations are the groups; with ``diag``, the strata.
    """

    kind: str
    position: str | None
    group: tuple[str, ...]

    @property
    def columns(self) -> list[str]:
        """The columns that it uses."""
        return [*self.group, *([self.position] if self.position else [])]


@dataclass(frozen=True)
class MixedFormula:
    """A formula taken apart.

    Attributes:
        text: as written.
        response: formula of the response.
        fixed: formula of the fixed effects.
        random: random effects, ``a/b`` and ``||`` already expanded.
    """

    text: str
    response: str
    fixed: str
    random: tuple[RandomPart, ...]


def parse_formula(text: str) -> MixedFormula:
    """Take a formula apart.

    ``(x | a/b)`` is ``(x | a) + (x | a:b)``; ``(1 + x || g)`` is
    ``(1 | g) + (0 + x | g)``; ``^`` is a power.

    Raises:
        InputError: if it does not parse, or calls a function that is not allowed.

    >>> parse_formula("y ~ x + (1 | a/b)").random
    (RandomPart(effects='1', factors=('a',)), RandomPart(effects='1', factors=('a', 'b')))
    """
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"formula {text!r}: expected text such as 'y ~ x + (1 | group)'")
    sides = _split(text, "~", text)
    if len(sides) != 2 or not sides[0].strip() or not sides[1].strip():
        raise InputError(f"formula {text!r}: expected one '~' with a response before it")
    response, right = (side.strip() for side in sides)
    bars = _bars(right, text)
    fixed = right
    random: list[RandomPart] = []
    for start, end in reversed(bars):
        fixed = _without(fixed, start, end, text)
    for start, end in bars:
        random += _random_parts(right[start + 1 : end - 1], text)
    fixed = _powers(fixed.strip()) or "1"
    check_formula(response, text)
    check_formula(fixed, text)
    return MixedFormula(text.strip(), response, fixed, tuple(random))


_RESIDUAL = re.compile(r"\s*(\w+)\s*\(([^()|]*)(?:\|([^()|]*))?\)\s*")


def parse_residual(text: str) -> ResidualPart:
    """Take the structure of the residuals apart.

    ``ar1(time | subject)``, ``cs(subject)`` and ``us(time | subject)`` correlate
    the rows of a subject; ``diag(sex)`` has a variance for each stratum.

    Raises:
        InputError: if it does not parse.

    >>> parse_residual("ar1(age | Subject)")
    ResidualPart(kind='ar1', position='age', group=('Subject',))
    """
    found = _RESIDUAL.fullmatch(text)
    if not found or found[1] not in ("ar1", "cs", "us", "diag"):
        raise InputError(
            f"residual {text!r}: expected 'ar1(time | group)', 'cs(group)', 'us(time | group)' "
            "or 'diag(stratum)'"
        )
    position, group = (found[2].strip(), found[3]) if found[3] is not None else ("", found[2])
    factors = tuple(factor.strip().strip("`") for factor in group.split(":"))
    if not all(factors) or (found[3] is not None and not position):
        raise InputError(f"residual {text!r}: a column is missing")
    if found[1] == "diag" and position:
        raise InputError(f"residual {text!r}: 'diag' takes a stratum only")
    return ResidualPart(found[1], position.strip("`") or None, factors)


def check_formula(part: str, text: str) -> list[Factor]:
    """The factors of a part without bars, each checked against the allowed functions."""
    try:
        parsed = formulaic.Formula(part)
    except Exception as error:
        raise InputError(f"formula {text!r}: {_first_line(error)}") from None
    if not isinstance(parsed, formulaic.SimpleFormula):
        raise InputError(f"formula {text!r}: {part!r} has several parts, expected one")
    factors = [factor for term in parsed for factor in term.factors]
    for factor in factors:
        if factor.eval_method is Factor.EvalMethod.PYTHON:
            _check_expression(factor.expr, text)
    return factors


def columns_of(part: str, text: str) -> list[str]:
    """Names of the columns that a part without bars uses."""
    found: list[str] = []
    for factor in check_formula(part, text):
        if factor.eval_method is Factor.EvalMethod.LOOKUP:
            found.append(factor.expr)
        elif factor.eval_method is Factor.EvalMethod.PYTHON:
            tree = _expression(factor.expr, text)
            called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
            names = [n for n in ast.walk(tree) if isinstance(n, ast.Name) and id(n) not in called]
            quoted = _quoted(factor.expr)
            found += [quoted.get(n.id, n.id) for n in names if n.id not in CONTRASTS | {"contr"}]
    return list(dict.fromkeys(found))


def _quoted(code: str) -> dict[str, str]:
    """Python names that stand for the backticked names of some code."""
    return {f"_backticked_{i}": name for i, name in enumerate(_BACKTICKED.findall(code))}


def _expression(code: str, text: str) -> ast.Expression:
    for placeholder, name in _quoted(code).items():
        code = code.replace(f"`{name}`", placeholder, 1)
    try:
        return ast.parse(code, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise InputError(f"formula {text!r}: {code!r} is not an expression") from None


def _check_expression(code: str, text: str) -> None:
    allowed = ", ".join(sorted(FUNCTIONS))
    for node in ast.walk(_expression(code, text)):
        if isinstance(node, ast.Attribute):
            known = isinstance(node.value, ast.Name) and node.value.id == "contr"
            if known and node.attr in CONTRASTS:
                continue
        elif isinstance(node, ast.Call):
            direct = isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS
            contrast = isinstance(node.func, ast.Attribute)
            if direct or contrast or getattr(node.func, "id", "") in CONTRASTS:
                continue
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
            # 9**9**9 would run for ever.
            if any(isinstance(n, ast.Name) for n in ast.walk(node.left)):
                continue
        elif isinstance(node, ast.Name):
            if not node.id.startswith("__"):
                continue
        elif isinstance(node, _ALLOWED_NODES):
            continue
        raise InputError(f"formula {text!r}: {code!r} is not allowed; functions are {allowed}")


def _bars(right: str, text: str) -> list[tuple[int, int]]:
    """Where the parentheses with a bar stand: (start, end) of each, parentheses included."""
    found, depth, start, bar = [], 0, 0, False
    for i, char, quoted in _characters(right):
        if quoted:
            continue
        if char == "(":
            if depth == 0:
                start, bar = i, False
            depth += 1
        elif char == ")":
            depth -= 1
            if depth < 0:
                raise InputError(f"formula {text!r}: ')' without '('")
            if depth == 0 and bar:
                found.append((start, i + 1))
        elif char == "|":
            if depth == 0:
                raise InputError(
                    f"formula {text!r}: a random effect needs parentheses, '(1 | group)'"
                )
            bar = bar or depth == 1
            if depth > 1:
                raise InputError(f"formula {text!r}: a bar within nested parentheses")
    if depth:
        raise InputError(f"formula {text!r}: '(' without ')'")
    return found


def _without(right: str, start: int, end: int, text: str) -> str:
    """Remove a random part together with the '+' that joins it."""
    before, after = right[:start].rstrip(), right[end:].lstrip()
    if after and after[0] not in "+-":
        raise InputError(f"formula {text!r}: expected '+' after {right[start:end]!r}")
    if before.endswith("+"):
        return f"{before[:-1].rstrip()} {after}".strip()
    if before:
        raise InputError(f"formula {text!r}: expected '+' before {right[start:end]!r}")
    return after[1:].lstrip() if after.startswith("+") else after


def _random_parts(inner: str, text: str) -> list[RandomPart]:
    sides = _split(inner, "|", text)
    independent = len(sides) == 3 and not sides[1]
    if independent:
        sides = [sides[0], sides[2]]
    if len(sides) != 2 or not sides[0].strip() or not sides[1].strip():
        raise InputError(f"formula {text!r}: expected '(effects | group)', got '({inner})'")
    effects = _powers(sides[0].strip())
    check_formula(effects, text)
    each = [effects]
    if independent:
        terms = [str(term) for term in formulaic.Formula(effects)]
        each = ["1" if term == "1" else f"0 + {term}" for term in terms]
    return [RandomPart(e, group) for group in _groups(sides[1], text) for e in each]


def _groups(group: str, text: str) -> list[tuple[str, ...]]:
    """``a/b`` gives a and a:b; ``a:b`` gives itself."""
    found: list[tuple[str, ...]] = []
    for level in _split(group, "/", text):
        names = [name.strip() for name in _split(level, ":", text)]
        for name in names:
            if not _CODE.fullmatch(name):
                raise InputError(
                    f"formula {text!r}: grouping factor {group.strip()!r}: "
                    "expected a column, 'a:b' or 'a/b'"
                )
        found.append((*(found[-1] if found else ()), *(name.strip("`") for name in names)))
    return found


def _characters(text: str) -> list[tuple[int, str, bool]]:
    """Each character with its position and whether it stands in quotes."""
    found, quote = [], ""
    for i, char in enumerate(text):
        quoted = bool(quote)
        if quote:
            quote = "" if char == quote else quote
        elif char in "`'\"":
            quote, quoted = char, True
        found.append((i, char, quoted))
    return found


def _split(text: str, separator: str, whole: str) -> list[str]:
    """Split at a character outside of quotes and parentheses."""
    pieces, depth, last = [], 0, 0
    for i, char, quoted in _characters(text):
        if quoted:
            continue
        depth += (char in "([{") - (char in ")]}")
        if char == separator and depth == 0:
            pieces.append(text[last:i])
            last = i + 1
    return [*pieces, text[last:]]


def _powers(text: str) -> str:
    """R's ``^`` as Python's ``**``."""
    return "".join(
        "**" if char == "^" and not quoted else char for _, char, quoted in _characters(text)
    )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
