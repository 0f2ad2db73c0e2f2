"""Formulas in the notation of lme4: ``score ~ x + (1 + x | school) + (1 | lea)``, as terms."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from openreml_nn.support.errors import InputError
from openreml_nn.table.algebra import Part, Term
from openreml_nn.table.functions import FUNCTIONS, STATEFUL
from openreml_nn.table.grouping import Grouping, groups_of
from openreml_nn.table.structure import (
    EFFECTS,
    ORDERED,
    RELATIONS,
    Structure,
    structure_of,
)
from openreml_nn.table.syntax import (
    Call,
    Node,
    Number,
    Operation,
    is_call,
    is_operation,
    names_in,
    operands_of,
    parse,
    walk,
)
from openreml_nn.table.traits import Traits, by_trait, effects_by_trait, traits_of

__all__ = ["MixedFormula", "RandomPart", "parse_formula"]


@dataclass(frozen=True)
class RandomPart:
    """One ``(effects | group)``, or ``S(effects | group)`` with a structure S.

    Attributes:
        effects: the effects, such as ``1 + Days``; where a row has several levels, by each of the
            columns of the group the same, or effects of its own.
        grouping: the grouping factor.
        structure: the covariance among the effects of a level.
    """

    effects: Part | tuple[Part, ...]
    grouping: Grouping
    structure: Structure = field(default_factory=lambda: Structure("us"))

    @property
    def parts(self) -> tuple[Part, ...]:
        """The effects, of each column of the group where these have their own."""
        return self.effects if isinstance(self.effects, tuple) else (self.effects,)

    @property
    def factors(self) -> tuple[str, ...]:
        """The columns of the group."""
        return self.grouping.columns

    @property
    def group(self) -> str:
        """The grouping factor as results name it, ``batch:cask`` for a combination, ``animal + dam`` where
        a level has effects by each of these."""
        return " + ".join(self.factors) if isinstance(self.effects, tuple) else str(self.grouping)

    def __str__(self) -> str:
        if isinstance(self.effects, tuple):
            alone = (replace(self.grouping, columns=(c,), members=False) for c in self.factors)
            each = zip(self.effects, alone, strict=True)
            inner = [" + ".join(f"({part} | {of.key})" for part, of in each), *self.structure.said]
            return f"{self.structure.name}({', '.join(inner)})"
        if self.structure.name == "us":
            return f"({self.effects} | {self.grouping.key})"
        inner = [f"{self.effects} | {self.grouping.key}", *self.structure.said]
        return f"{self.structure.name}({', '.join(inner)})"


@dataclass(frozen=True)
class MixedFormula:
    """A formula taken apart; two are equal if they say the same, however they are spaced.

    Attributes:
        text: as written.
        response: the left side.
        fixed: the fixed effects.
        random: random effects, ``a/b`` and ``||`` already expanded.
        traits: the responses of ``cbind(y1, y2)`` by their names; none for a single one.
    """

    text: str = field(compare=False)
    response: Node
    fixed: Part
    random: tuple[RandomPart, ...]
    traits: Traits = ()

    @property
    def stateful(self) -> list[str]:
        """Calls whose value in a row depends on all rows, such as ``scale(x)``."""
        random = (part.node for random in self.random for part in random.parts)
        parts = [self.fixed.node, *random, self.response]
        calls = (
            n for p in parts for n in walk(p) if isinstance(n, Call) and n.function in STATEFUL
        )
        return [str(call) for call in calls]


def parse_formula(text: str) -> MixedFormula:
    """Take a formula apart.

    ``(x | a/b)`` is ``(x | a) + (x | a:b)``; ``(1 + x || g)`` is ``(1 | g) + (0 + x | g)``; ``.``
    is every column that the formula does not name elsewhere. With ``cbind(y1, y2)`` before ``~``
    effects that do not name ``trait`` are one for each of the responses. A row has a level by each of
    the columns in ``(1 | mm(a, b))``, and in ``us((1 | a) + (1 | b))`` with an effect of its own by
    each; ``us(ped(a) + ped(b))`` is short for ``us((1 | ped(a)) + (1 | ped(b)))``.

    Raises:
        InputError: if it does not parse, or calls a function that is not allowed.

    >>> [part.group for part in parse_formula("y ~ x + (1 | a/b)").random]
    ['a', 'a:b']
    """
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"formula {text!r}: expected text such as 'y ~ x + (1 | group)'")
    tree = parse(text, text)
    if not is_operation(tree, "~") or len(operands_of(tree)) != 2:
        raise InputError(f"formula {text!r}: expected one '~' with a response before it")
    response, right = operands_of(tree)
    if any(is_operation(node, "~") for node in (*walk(response), *walk(right))):
        raise InputError(f"formula {text!r}: expected one '~' with a response before it")
    rest, bars = _bars(right, text)
    fixed = Part(Number(1.0) if rest is None else rest, text)
    random = [part for bar in bars for part in _random_parts(bar, text)]
    traits = traits_of(response, text)
    responses = [node for _, node in traits] if traits else [response]
    own = [part for r in random for part in r.parts]
    for part in (*(Part(r, text) for r in responses), fixed, *own):
        for node in walk(part.node):
            _check(node, text)
    if traits:
        fixed = by_trait(fixed)
        random = [_by_trait(part, text) for part in random]
    if any(is_operation(n, "|", "||", ":") or is_call(n, "offset") for n in walk(response)):
        raise InputError(f"formula {text!r}: expected a response before '~', such as log(y)")
    if not names_in(response):
        raise InputError(f"formula {text!r}: the response {str(response)!r} has no column")
    if "." in names_in(response):
        raise InputError(f"formula {text!r}: '.' stands for columns on the right side only")
    for part in (fixed, *(part for r in random for part in r.parts)):
        if not part.is_open:
            _ = part.terms, part.offsets  # what they raise is raised here
    return MixedFormula(text.strip(), response, fixed, tuple(random), traits)


def _by_trait(part: RandomPart, text: str) -> RandomPart:
    if part.grouping.bent:
        raise InputError(
            f"formula {text!r}: {part} beside cbind() is not supported: expected a table with a row "
            "for each response"
        )
    if isinstance(part.effects, tuple):
        return replace(part, effects=tuple(map(effects_by_trait, part.effects)))
    return replace(part, effects=effects_by_trait(part.effects))


def _check(node: Node, text: str) -> None:
    if isinstance(node, Call) and node.function not in FUNCTIONS:
        if node.function == "str" and node.arguments:
            raise InputError(
                f"formula {text!r}: str() is no structure: expected us({node.arguments[0][1]}) for "
                "effects of one relation, correlated between its columns"
            )
        if node.function in (*EFFECTS, *RELATIONS):
            raise InputError(
                f"formula {text!r}: {str(node)!r} has no place here: expected a structure of "
                f"effects as a term of its own, such as {EFFECTS[0]}(1 + x | group), and a relation "
                "of levels as its group, such as (1 | ped(animal))"
            )
        allowed = ", ".join(sorted(FUNCTIONS))
        raise InputError(
            f"formula {text!r}: {node.function + '()'!r} is not allowed; functions are {allowed}"
        )


# ---------------------------------------------------------------------- random effects


@dataclass(frozen=True)
class _Bar:
    """``effects | group``, or ``effects || group``, with the structure around it; or a sum of such."""

    node: Operation
    call: Call | None = None


def _bars(node: Node, text: str) -> tuple[Node | None, list[_Bar]]:
    """What is left of a sum without its random parts, and these."""
    if is_operation(node, "("):
        inner = operands_of(node)[0]
        if is_operation(inner, "|", "||"):
            assert isinstance(inner, Operation)
            return None, [_Bar(inner)]
    if isinstance(node, Call) and node.arguments:
        inner = node.arguments[0][1]
        if is_operation(inner, "|", "||") or (node.function in EFFECTS and _joined(inner)):
            assert isinstance(inner, Operation)
            return None, [_Bar(inner, node)]
    if is_operation(node, "+", "-") and len(operands_of(node)) == 2:
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


def _joined(node: Node) -> list[tuple[Node, Node]]:
    """Effects and group of each operand of a sum of random parts, such as ``ped(animal) + ped(dam)``;
    none for anything else."""
    if not is_operation(node, "+") or len(operands_of(node)) != 2:
        return []
    first, last = operands_of(node)
    found = _joined(first)
    for side in (last,) if found else (first, last):
        inner = operands_of(side)[0] if is_operation(side, "(") else side
        if is_operation(inner, "|"):
            effects, group = operands_of(inner)
            found.append((effects, group))
        elif is_call(inner, *RELATIONS):
            found.append((Number(1.0), inner))
        else:
            return []
    return found


def _refuse_bars(node: Node, text: str) -> None:
    if any(is_operation(part, "|", "||") for part in walk(node)):
        raise InputError(
            f"formula {text!r}: a random effect is a term of its own in parentheses, '+ (1 | group)'"
        )


def _random_parts(bar: _Bar, text: str) -> list[RandomPart]:
    if bar.node.operator == "+":
        return [_joined_part(bar, text)]
    effects, group = bar.node.operands
    for side in (effects, group):
        _refuse_bars(side, text)
    part = Part(effects, text)
    if part.is_open:
        raise InputError(f"formula {text!r}: '.' stands for columns of the fixed effects only")
    structure = _structure(bar, text)
    groups = groups_of(group, text)
    if structure is None and bar.node.operator == "||":
        each = [_alone(term, text) for term in part.terms]
        return [RandomPart(e, of) for of in groups for e in each]
    structure = Structure("us") if structure is None else structure
    found = [RandomPart(part, of, structure) for of in groups]
    for random in found:
        if random.grouping.bent and (str(part.node) != "1" or structure.name != "us"):
            raise InputError(
                f"formula {text!r}: {random} is not supported: expected (1 | {group}), with one "
                "variance for the coefficients of a spline"
            )
    if part.offsets:
        raise InputError(f"formula {text!r}: offset() is a term of the fixed effects")
    return found


def _joined_part(bar: _Bar, text: str) -> RandomPart:
    """Effects of the levels by each of some columns, with a covariance among them all."""
    structure = _structure(bar, text)
    assert bar.call is not None and structure is not None
    if structure.name in ORDERED:
        raise InputError(
            f"formula {text!r}: {str(bar.call)!r} has effects in no order: expected us(…), diag(…) or fa(…)"
        )
    parts, groups = [], []
    for effects, group in _joined(bar.node):
        for side in (effects, group):
            _refuse_bars(side, text)
        parts.append(Part(effects, text))
        (*others, of) = groups_of(group, text)
        if others or len(of.columns) > 1 or of.members or of.bent:
            raise InputError(
                f"formula {text!r}: {str(group)!r} in {str(bar.call)!r}: expected one column, or "
                "one relation of a column, such as ped(dam)"
            )
        groups.append(of)
    columns = tuple(of.columns[0] for of in groups)
    first = groups[0]
    if any(replace(of, columns=first.columns) != first for of in groups):
        raise InputError(
            f"formula {text!r}: {str(bar.call)!r} is of different relations: expected the same of "
            "each, whose levels are shared"
        )
    if len(set(columns)) < len(columns):
        raise InputError(f"formula {text!r}: {str(bar.call)!r}: expected distinct columns")
    if any(part.is_open for part in parts) or any(part.offsets for part in parts):
        raise InputError(
            f"formula {text!r}: {str(bar.call)!r}: '.' and offset() are of the fixed effects only"
        )
    return RandomPart(tuple(parts), replace(first, columns=columns, members=True), structure)


def _structure(bar: _Bar, text: str) -> Structure | None:
    """The structure among effects, None where none is said."""
    if bar.call is None:
        return None
    if bar.call.function not in EFFECTS:
        raise InputError(
            f"formula {text!r}: {bar.call.function}() is no structure of effects: expected one of "
            f"{', '.join(EFFECTS)}"
        )
    if bar.node.operator == "||":
        raise InputError(f"formula {text!r}: {bar.call.function}() takes effects | group")
    return structure_of(bar.call, f"formula {text!r}", 1)


def _alone(term: Term, text: str) -> Part:
    """One term without the intercept, or the intercept."""
    if not term:
        return Part(Number(1.0), text)
    product = term[0]
    for variable in term[1:]:
        product = Operation(":", (product, variable))
    return Part(Operation("+", (Number(0.0), product)), text)
