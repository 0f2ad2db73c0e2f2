"""The algebra of formulas: sums of terms, each the product of its variables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from openreml_nn.support.errors import InputError
from openreml_nn.table.syntax import (
    Call,
    Name,
    Node,
    Number,
    Operation,
    Text,
    is_call,
    is_operation,
    names_in,
    operands_of,
    plain,
)

__all__ = ["MOST_TERMS", "Part", "Term"]

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
        by: a factor at each level of which the terms stand anew, in place of the intercept too.
    """

    node: Node
    formula: str = field(compare=False)
    others: tuple[str, ...] = ()
    by: Name | None = None

    def __str__(self) -> str:
        if self.by is None:
            return str(self.node)
        return " + ".join(["0", *(":".join(map(str, term)) for term in self.terms)])

    @cached_property
    def terms(self) -> tuple[Term, ...]:
        """The terms by degree, the intercept first where there is one."""
        found = _sum(self, self.node, {frozenset(): ()})
        kept = [t for t in found.values() if not any(is_call(v, "offset") for v in t)]
        by = () if self.by is None else (self.by,)
        return tuple((*by, *term) for term in sorted(kept, key=len))

    @cached_property
    def offsets(self) -> tuple[Node, ...]:
        """What stands in ``offset(…)``."""
        found = []
        for term in _sum(self, self.node, {}).values():
            if any(is_call(variable, "offset") for variable in term):
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
        """The part of a formula in which ``.`` stands for these columns."""
        return replace(self, others=tuple(others)) if self.is_open else self

    @property
    def is_open(self) -> bool:
        """Whether ``.`` stands in it."""
        return "." in names_in(self.node)


_Terms = dict[frozenset[str], Term]


def _sum(part: Part, node: Node, start: _Terms) -> _Terms:
    """The terms of a sum, added to or taken from those at the start."""
    found = dict(start)
    for sign, summand in _summands(node, 1):
        if isinstance(summand, Number):
            if summand.value not in (0.0, 1.0):
                of = "" if summand.name is None else f", and `{summand}` in backticks for a column"
                raise InputError(
                    f"formula {part.formula!r}: {summand} is no term, expected 0 or 1{of}"
                )
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
    if is_operation(node, "("):
        return _summands(operands_of(node)[0], sign)
    if is_operation(node, "+", "-"):
        assert isinstance(node, Operation)
        *left, right = node.operands
        found = _summands(left[0], sign) if left else []
        return found + _summands(right, sign if node.operator == "+" else -sign)
    return [(sign, node)]


def _product(part: Part, node: Node) -> _Terms:
    """The terms of what stands between the signs of a sum."""
    node = plain(node)
    if is_operation(node, "+", "-"):
        return _sum(part, node, {})
    if is_operation(node, "*", ":", "%in%", "/") and isinstance(node, Operation):
        left, right = (_product(part, side) for side in node.operands)
        if node.operator == "/":
            # b within a: each of b together with all of a.
            whole = [v for term in left.values() for v in term]
            return _bounded(part, left | _crossed(part, _term(whole), right))
        crossed = _crossed(part, left, right)
        return _bounded(part, left | right | crossed) if node.operator == "*" else crossed
    if is_operation(node, "^") and isinstance(node, Operation):
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
