"""The grammar of formulas, which is R's: one tree for sums of terms and for what stands in them.

Precedence from high to low: calls, ``^`` (also written ``**``), signs, ``:``, ``%in%`` and its kind,
``* /``, ``+ -``, comparisons, ``!``, ``&``, ``|`` and ``||``, ``~``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import pi
from typing import Any, TypeAlias

from openreml_nn.support.errors import InputError

__all__ = [
    "Call",
    "Name",
    "Node",
    "Number",
    "Operation",
    "Text",
    "bare",
    "is_call",
    "is_operation",
    "names_in",
    "operands_of",
    "parse",
    "plain",
    "walk",
]

#: Limits that no formula of a person meets; text beyond them is refused before it costs anything.
LONGEST, DEEPEST, MOST_OPERATORS = 20_000, 60, 600


@dataclass(frozen=True)
class Name:
    """A column, as the table spells it."""

    name: str

    def __str__(self) -> str:
        return self.name if _SYNTACTIC.fullmatch(self.name) else f"`{self.name}`"


def bare(name: str) -> str:
    """The name of a column without the backticks in which a formula may have it.

    >>> bare("`plot no.`"), bare("plot")
    ('plot no.', 'plot')
    """
    quoted = len(name) > 2 and name[0] == name[-1] == "`" and "`" not in name[1:-1]
    return name[1:-1] if quoted else name


@dataclass(frozen=True)
class Number:
    """A constant, with the name by which a formula may have it."""

    value: float
    name: str | None = None

    def __str__(self) -> str:
        if self.name is not None:
            return self.name
        if isinstance(self.value, bool):
            return str(self.value).upper()
        mantissa, exponent = f"{self.value:.14e}".split("e")
        power = f"{mantissa.rstrip('0').rstrip('.')}e{exponent}"
        plain = f"{self.value:.15g}"
        return power if len(power) < len(plain) else plain  # R's rule: 1e+05, but 10000


@dataclass(frozen=True)
class Text:
    """A string."""

    value: str

    def __str__(self) -> str:
        return '"' + self.value.replace("\\", "\\\\").replace('"', '\\"') + '"'


@dataclass(frozen=True)
class Call:
    """A function's name with its arguments; the names of arguments are None where not given."""

    function: str
    arguments: tuple[tuple[str | None, Node], ...]

    def __str__(self) -> str:
        if self.function.startswith("contr.") and not self.arguments:
            return self.function
        shown = (f"{key} = {node}" if key else str(node) for key, node in self.arguments)
        return f"{self.function}({', '.join(shown)})"


@dataclass(frozen=True)
class Operation:
    """An operator with one or two operands; ``(`` are parentheses."""

    operator: str
    operands: tuple[Node, ...]

    def __str__(self) -> str:
        if self.operator == "(":
            return f"({self.operands[0]})"
        if len(self.operands) == 1:
            return f"{self.operator}{self.operands[0]}"
        gap = "" if self.operator in _TIGHT else " "
        return f"{self.operands[0]}{gap}{self.operator}{gap}{self.operands[1]}"


Node: TypeAlias = Name | Number | Text | Call | Operation

_SYNTACTIC = re.compile(r"(?:[^\W\d]|\.(?!\d))[\w.]*")
_TOKEN = re.compile(
    r"\s*(?:"
    r"(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?L?)"
    r"|(?P<name>(?:[^\W\d]|\.(?!\d))[\w.]*)"
    r"|`(?P<quoted>[^`]+)`"
    r"|(?P<text>\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*')"
    r"|(?P<operator>%[^%\s]*%|\*\*|\|\||&&|[=!<>]=|[-+*/^:~|&!<>=(),\[\]])"
    r")"
)
_POWER = {
    "~": 1, "|": 2, "||": 2, "&": 3, "&&": 3,
    "==": 5, "!=": 5, "<": 5, "<=": 5, ">": 5, ">=": 5,
    "+": 6, "-": 6, "*": 7, "/": 7, ":": 9, "^": 11,
}  # fmt: skip
_NOT, _SIGN, _SPECIAL = 4, 10, 8
_CONSTANTS = {"TRUE": True, "FALSE": False, "True": True, "False": False}
_NAMED = {"pi": pi}
#: Operators beside which R writes no blanks.
_TIGHT = ("^", ":", "/", "%%", "%/%")
_SPECIALS = ("%%", "%/%", "%in%")


def parse(text: str, whole: str) -> Node:
    """The tree of a formula.

    Args:
        text: what is parsed.
        whole: the formula that messages show.

    Raises:
        InputError: if it does not parse, or is too long or too deep.
    """
    if len(text) > LONGEST:
        raise InputError(f"formula of {len(text)} characters: expected at most {LONGEST}")
    return _Parser(text, whole).whole()


def walk(node: Node) -> Iterator[Node]:
    """The node and all below it, from left to right."""
    yield node
    if isinstance(node, Call):
        for _, argument in node.arguments:
            yield from walk(argument)
    elif isinstance(node, Operation):
        for operand in node.operands:
            yield from walk(operand)


def names_in(*nodes: Node) -> list[str]:
    """The columns that nodes use, each once, in order of appearance."""
    found = (part.name for node in nodes for part in walk(node) if isinstance(part, Name))
    return list(dict.fromkeys(found))


def is_operation(node: Node, *operators: str) -> bool:
    """Whether the node is one of these operators."""
    return isinstance(node, Operation) and node.operator in operators


def is_call(node: Node, *functions: str) -> bool:
    """Whether the node calls one of these functions."""
    return isinstance(node, Call) and node.function in functions


def operands_of(node: Node) -> tuple[Node, ...]:
    """The operands of an operation."""
    assert isinstance(node, Operation)
    return node.operands


class _Parser:
    """Precedence climbing over the tokens of a text."""

    def __init__(self, text: str, whole: str) -> None:
        self._whole = whole
        self._tokens = list(self._split(text))
        self._at = 0
        self._depth = 0

    def whole(self) -> Node:
        node = self._expression(0)
        if self._is(")"):
            raise self._error("')' without '('")
        if self._kind() != "end":
            raise self._error(f"{self._shown()} is unexpected{self._hint()}")
        return node

    def _split(self, text: str) -> Iterator[tuple[str, str]]:
        at = 0
        while at < len(text.rstrip()):
            found = _TOKEN.match(text, at)
            if not found:
                raise self._error(f"{text[at:].strip()[:20]!r} is unexpected")
            kind = str(found.lastgroup)
            yield kind, found[kind]
            at = found.end()
        yield "end", ""

    def _error(self, what: str) -> InputError:
        return InputError(f"formula {self._whole!r}: {what}")

    def _kind(self) -> str:
        return self._tokens[self._at][0]

    def _shown(self) -> str:
        kind, text = self._tokens[self._at]
        return "its end" if kind == "end" else repr(text)

    def _hint(self) -> str:
        """How a name with spaces is written, where two names follow each other."""
        (kind, left), (other, right) = self._tokens[self._at - 1 : self._at + 1]
        if kind == other == "name":
            return f"; a name with spaces stands in backticks, `{left} {right}`"
        return ""

    def _next(self) -> tuple[str, str]:
        self._at += 1
        return self._tokens[self._at - 1]

    def _is(self, *operators: str) -> bool:
        kind, text = self._tokens[self._at]
        return kind == "operator" and text in operators

    def _take(self, operator: str) -> None:
        if operator == ")" and self._kind() == "end":
            raise self._error("'(' without ')'")
        if not self._is(operator):
            raise self._error(
                f"{self._shown()} stands where {operator!r} is expected{self._hint()}"
            )
        self._at += 1

    def _expression(self, least: int) -> Node:
        self._depth += 1
        if self._depth > DEEPEST:
            raise self._error(f"more than {DEEPEST} levels of nesting")
        left = self._prefix()
        count = 0
        while self._kind() == "operator":
            operator = self._tokens[self._at][1]
            operator = "^" if operator == "**" else operator
            power = _SPECIAL if operator.startswith("%") else _POWER.get(operator, -1)
            if power < 0 or power < least:
                break
            if operator.startswith("%") and operator not in _SPECIALS:
                raise self._error(f"operator {operator!r} is not allowed")
            self._at += 1
            count += 1
            if count > MOST_OPERATORS:
                raise self._error(f"more than {MOST_OPERATORS} operators in a row")
            # A power binds to the right, and a sign may follow it.
            right = self._expression(_SIGN if operator == "^" else power + 1)
            left = Operation(operator, (left, right))
        self._depth -= 1
        return left

    def _prefix(self) -> Node:
        shown = self._shown()
        kind, text = self._next()
        if kind == "number":
            return Number(float(text.rstrip("L")))
        if kind == "text":
            return Text(re.sub(r"\\(.)", r"\1", text[1:-1]))
        if kind == "quoted":
            return Name(text)
        if kind == "name":
            if self._is("("):
                self._at += 1
                return Call(text, self._arguments(")"))
            if text in _CONSTANTS:
                return Number(_CONSTANTS[text])
            if text in _NAMED:
                return Number(_NAMED[text], text)
            return Call(text, ()) if text.startswith("contr.") else Name(text)
        if text in ("-", "+"):
            return Operation(text, (self._expression(_SIGN),))
        if text == "!":
            return Operation("!", (self._expression(_NOT),))
        if text == "(":
            node = self._expression(0)
            self._take(")")
            return Operation("(", (node,))
        if text == "[":
            return Call("c", self._arguments("]"))
        raise self._error(f"{shown} is unexpected")

    def _arguments(self, end: str) -> tuple[tuple[str | None, Node], ...]:
        found: list[tuple[str | None, Node]] = []
        while not self._is(end):
            if found:
                self._take(",")
            key = None
            if self._kind() == "name" and self._tokens[self._at + 1] == ("operator", "="):
                key = self._next()[1]
                self._at += 1
            found.append((key, self._expression(0)))
        self._take(end)
        return tuple(found)


def plain(node: Node) -> Any:
    """The node without parentheses around it."""
    while isinstance(node, Operation) and node.operator == "(":
        node = node.operands[0]
    return node
