"""Formulas in the notation of lme4: ``score ~ x + (1 + x | school) + (1 | lea)``, as terms."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from openreml_nn.support.errors import InputError
from openreml_nn.table.functions import FUNCTIONS, STATEFUL
from openreml_nn.table.syntax import (
    Call,
    Name,
    Node,
    Number,
    Operation,
    Text,
    names_in,
    parse,
    plain,
    walk,
)

__all__ = [
    "MixedFormula",
    "Part",
    "RandomPart",
    "ResidualPart",
    "parse_formula",
    "parse_residual",
]

#: A formula that multiplies out to more terms than this is refused before it is.
MOST_TERMS = 2000

#: A term is the product of its variables; the one without variables is the intercept.
Term = tuple[Node, ...]


@dataclass(frozen=True)
class Part:
    """A sum of terms, such as the fixed effects or the effects of a group.

    Attributes:
        node: the sum as it was parsed.
        formula: the formula that messages show.
        others: the columns that ``.`` stands for.
    """

    node: Node
    formula: str
    others: tuple[str, ...] = ()

    def __str__(self) -> str:
        return str(self.node)

    @cached_property
    def terms(self) -> tuple[Term, ...]:
        """The terms by degree, the intercept first where there is one."""
        found = _sum(self, self.node, {frozenset(): ()})
        kept = [t for t in found.values() if not any(_is_call(v, "offset") for v in t)]
        return tuple(sorted(kept, key=len))

    @cached_property
    def offsets(self) -> tuple[Node, ...]:
        """What stands in ``offset(…)``."""
        found = []
        for term in _sum(self, self.node, {}).values():
            if any(_is_call(variable, "offset") for variable in term):
                call = term[0]
                if len(term) > 1 or not isinstance(call, Call) or len(call.arguments) != 1:
                    raise InputError(f"formula {self.formula!r}: expected offset(x), a term alone")
                found.append(call.arguments[0][1])
        return tuple(found)

    @property
    def has_intercept(self) -> bool:
        """Whether there is an intercept."""
        return () in self.terms

    @cached_property
    def variables(self) -> tuple[Node, ...]:
        """The distinct variables of all terms, and those of offsets."""
        found = {str(v): v for term in self.terms for v in term}
        return (*found.values(), *self.offsets)

    @property
    def columns(self) -> list[str]:
        """The columns that it uses."""
        return names_in(*self.variables)

    def of(self, others: Sequence[str]) -> Part:
        """The same where ``.`` stands for these columns."""
        return Part(self.node, self.formula, tuple(others)) if self.is_open else self

    @property
    def is_open(self) -> bool:
        """Whether ``.`` stands in it."""
        return "." in names_in(self.node)


@dataclass(frozen=True)
class RandomPart:
    """One ``(effects | group)``.

    Attributes:
        effects: the effects, such as ``1 + Days``.
        factors: the columns whose combinations are the levels.
    """

    effects: Part
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
        response: the left side.
        fixed: the fixed effects.
        random: random effects, ``a/b`` and ``||`` already expanded.
    """

    text: str
    response: Node
    fixed: Part
    random: tuple[RandomPart, ...]

    @property
    def stateful(self) -> list[str]:
        """Calls whose value in a row depends on all rows, such as ``scale(x)``."""
        parts = [self.fixed.node, *(part.effects.node for part in self.random), self.response]
        calls = (
            n for p in parts for n in walk(p) if isinstance(n, Call) and n.function in STATEFUL
        )
        return [str(call) for call in calls]


def parse_formula(text: str) -> MixedFormula:
    """Take a formula apart.

    ``(x | a/b)`` is ``(x | a) + (x | a:b)``; ``(1 + x || g)`` is ``(1 | g) + (0 + x | g)``; ``.``
    is every column that the formula does not name elsewhere.

    Raises:
        InputError: if it does not parse, or calls a function that is not allowed.

    >>> [part.group for part in parse_formula("y ~ x + (1 | a/b)").random]
    ['a', 'a:b']
    """
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"formula {text!r}: expected text such as 'y ~ x + (1 | group)'")
    tree = parse(text, text)
    if not _is(tree, "~") or len(_operands(tree)) != 2:
        raise InputError(f"formula {text!r}: expected one '~' with a response before it")
    response, right = _operands(tree)
    for node in walk(tree):
        _check(node, text)
    if any(_is(node, "~") for node in (*walk(response), *walk(right))):
        raise InputError(f"formula {text!r}: expected one '~' with a response before it")
    if any(_is(n, "|", "||", ":") or _is_call(n, "offset") for n in walk(response)):
        raise InputError(f"formula {text!r}: expected a response before '~', such as log(y)")
    if not names_in(response):
        raise InputError(f"formula {text!r}: the response {str(response)!r} has no column")
    if "." in names_in(response):
        raise InputError(f"formula {text!r}: '.' stands for columns on the right side only")
    rest, bars = _bars(right, text)
    fixed = Part(Number(1.0) if rest is None else rest, text)
    random = [part for bar in bars for part in _random_parts(bar, text)]
    for part in (fixed, *(r.effects for r in random)):
        if not part.is_open:
            _ = part.terms, part.offsets  # what they raise is raised here
    return MixedFormula(text.strip(), response, fixed, tuple(random))


def parse_residual(text: str) -> ResidualPart:
    """Take the structure of the residuals apart.

    ``ar1(time | subject)``, ``cs(subject)`` and ``us(time | subject)`` correlate the rows of a
    subject; ``diag(sex)`` has a variance for each stratum.

    Raises:
        InputError: if it does not parse.

    >>> parse_residual("ar1(age | Subject)")
    ResidualPart(kind='ar1', position='age', group=('Subject',))
    """
    expected = (
        f"residual {text!r}: expected 'ar1(time | group)', 'cs(group)', 'us(time | group)' or "
        "'diag(stratum)'"
    )
    if not isinstance(text, str):
        raise InputError(expected)
    found = _RESIDUAL.fullmatch(text)
    if not found:
        raise InputError(expected)
    if not found[2].strip() or found[2].rstrip().endswith(("|", ":")):
        raise InputError(f"residual {text!r}: a column is missing")
    try:
        inner = parse(found[2], text)
    except InputError:
        raise InputError(expected) from None
    position, group = _operands(inner) if _is(inner, "|") else (None, inner)
    factors = _interaction(group)
    if factors is None or not (position is None or isinstance(position, Name)):
        raise InputError(expected)
    if found[1] == "diag" and position is not None:
        raise InputError(f"residual {text!r}: 'diag' takes a stratum only")
    return ResidualPart(found[1], None if position is None else position.name, factors)


_RESIDUAL = re.compile(r"\s*(ar1|cs|us|diag)\s*\((.*)\)\s*", re.DOTALL)


def _is(node: Node, *operators: str) -> bool:
    return isinstance(node, Operation) and node.operator in operators


def _is_call(node: Node, function: str) -> bool:
    return isinstance(node, Call) and node.function == function


def _operands(node: Node) -> tuple[Node, ...]:
    assert isinstance(node, Operation)
    return node.operands


def _check(node: Node, text: str) -> None:
    if isinstance(node, Call) and node.function not in FUNCTIONS:
        allowed = ", ".join(sorted(FUNCTIONS))
        raise InputError(
            f"formula {text!r}: {node.function + '()'!r} is not allowed; functions are {allowed}"
        )


# ---------------------------------------------------------------------- random effects


def _bars(node: Node, text: str) -> tuple[Node | None, list[Operation]]:
    """What is left of a sum without its random parts, and these."""
    if _is(node, "("):
        inner = _operands(node)[0]
        if _is(inner, "|", "||"):
            assert isinstance(inner, Operation)
            return None, [inner]
    if _is(node, "+", "-") and len(_operands(node)) == 2:
        assert isinstance(node, Operation)
        left, right = node.operands
        rest, bars = _bars(left, text)
        if node.operator == "+":
            other, more = _bars(right, text)
            if other is None:
                return rest, bars + more
            joined = other if rest is None else Operation("+", (rest, other))
            return joined, bars + more
        _refuse_bars(right, text)
        signed = (right,) if rest is None else (rest, right)
        return Operation("-", signed), bars
    _refuse_bars(node, text)
    return node, []


def _refuse_bars(node: Node, text: str) -> None:
    if any(_is(part, "|", "||") for part in walk(node)):
        raise InputError(
            f"formula {text!r}: a random effect is a term of its own in parentheses, '+ (1 | group)'"
        )


def _random_parts(bar: Operation, text: str) -> list[RandomPart]:
    effects, group = bar.operands
    for side in (effects, group):
        _refuse_bars(side, text)
    part = Part(effects, text)
    if part.is_open:
        raise InputError(f"formula {text!r}: '.' stands for columns of the fixed effects only")
    if part.offsets:
        raise InputError(f"formula {text!r}: offset() is a term of the fixed effects")
    each = [part]
    if bar.operator == "||":
        each = [_alone(term, text) for term in part.terms]
    return [RandomPart(e, factors) for factors in _groups(group, text) for e in each]


def _alone(term: Term, text: str) -> Part:
    """One term without the intercept, or the intercept."""
    if not term:
        return Part(Number(1.0), text)
    product = term[0]
    for variable in term[1:]:
        product = Operation(":", (product, variable))
    return Part(Operation("+", (Number(0.0), product)), text)


def _groups(node: Node, text: str) -> list[tuple[str, ...]]:
    """``a/b`` gives a and a:b; ``a:b`` gives itself."""
    if _is(node, "("):
        return _groups(_operands(node)[0], text)
    if _is(node, "/"):
        left, right = _operands(node)
        outer = _groups(left, text)
        return outer + [(*outer[-1], *inner) for inner in _groups(right, text)]
    if _is(node, "+"):
        raise InputError(f"formula {text!r}: write '(1 | a) + (1 | b)' for two grouping factors")
    found = _interaction(node)
    if found is None:
        raise InputError(
            f"formula {text!r}: grouping factor {str(node)!r}: expected a column, 'a:b' or 'a/b'"
        )
    return [found]


def _interaction(node: Node) -> tuple[str, ...] | None:
    """The columns of ``a:b``; None for anything else."""
    if isinstance(node, Name) and node.name != ".":
        return (node.name,)
    if _is(node, ":"):
        sides = [_interaction(side) for side in _operands(node)]
        if None not in sides:
            return tuple(name for side in sides if side for name in side)
    return None


# ---------------------------------------------------------------------- the algebra of terms

_Terms = dict[frozenset[str], Term]


def _sum(part: Part, node: Node, start: _Terms) -> _Terms:
    """The terms of a sum, added to or taken from those at the start."""
    found = dict(start)
    for sign, summand in _summands(node, 1):
        if isinstance(summand, Number):
            if summand.value not in (0.0, 1.0):
                raise InputError(f"formula {part.formula!r}: {summand} is no term, expected 0 or 1")
            keep = (summand.value == 1.0) == (sign > 0)
            new: _Terms = {frozenset(): ()}
        else:
            keep, new = sign > 0, _product(part, summand)
        if keep:
            found = _bounded(part, found | {k: found.get(k, t) for k, t in new.items()})
        else:
            found = {k: t for k, t in found.items() if k not in new}
    return found


def _summands(node: Node, sign: int) -> list[tuple[int, Node]]:
    if _is(node, "("):
        return _summands(_operands(node)[0], sign)
    if _is(node, "+", "-"):
        assert isinstance(node, Operation)
        *left, right = node.operands
        found = _summands(left[0], sign) if left else []
        return found + _summands(right, sign if node.operator == "+" else -sign)
    return [(sign, node)]


def _product(part: Part, node: Node) -> _Terms:
    """The terms of what stands between the signs of a sum."""
    node = plain(node)
    if _is(node, "+", "-"):
        return _sum(part, node, {})
    if _is(node, "*", ":", "%in%", "/") and isinstance(node, Operation):
        left, right = (_product(part, side) for side in node.operands)
        if node.operator == "/":
            # b within a: each of b together with all of a.
            whole = [v for term in left.values() for v in term]
            return _bounded(part, left | _crossed(part, _term(whole), right))
        crossed = _crossed(part, left, right)
        return _bounded(part, left | right | crossed) if node.operator == "*" else crossed
    if _is(node, "^") and isinstance(node, Operation):
        base, power = _product(part, node.operands[0]), plain(node.operands[1])
        if not isinstance(power, Number) or power.value not in range(1, 100):
            raise InputError(f"formula {part.formula!r}: {str(node)!r}: expected a whole power")
        found = base
        for _ in range(int(power.value) - 1):
            found = _bounded(part, found | _crossed(part, found, base))
        return found
    if isinstance(node, Name) and node.name == ".":
        return {k: t for name in part.others for k, t in _term([Name(name)]).items()}
    if isinstance(node, Number | Text) or not names_in(node):
        raise InputError(f"formula {part.formula!r}: {str(node)!r} is no term: it has no column")
    return _term([node])


def _term(variables: Sequence[Node]) -> _Terms:
    distinct = {str(variable): variable for variable in variables}
    return {frozenset(distinct): tuple(distinct.values())}


def _crossed(part: Part, left: _Terms, right: _Terms) -> _Terms:
    if len(left) * len(right) > MOST_TERMS**2:
        _bounded(part, {frozenset([str(i)]): () for i in range(MOST_TERMS + 1)})
    found: _Terms = {}
    for a in left.values():
        for b in right.values():
            for key, term in _term([*a, *b]).items():
                found.setdefault(key, term)
        _bounded(part, found)
    return found


def _bounded(part: Part, terms: _Terms) -> _Terms:
    if len(terms) > MOST_TERMS:
        raise InputError(
            f"formula {part.formula[:200]!r} has more than {MOST_TERMS} terms when multiplied out"
        )
    return terms
