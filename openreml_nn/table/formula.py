"""Formulas in the notation of lme4: ``score ~ x + (1 + x | school) + (1 | lea)``, as terms."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from openreml_nn.support.errors import InputError
from openreml_nn.table.algebra import Part, Term
from openreml_nn.table.functions import FUNCTIONS, STATEFUL
from openreml_nn.table.structure import (
    EFFECTS,
    GRAPHS,
    RELATIONS,
    WALKS,
    Structure,
    check_dimensions,
    columns_of,
    structure_of,
)
from openreml_nn.table.syntax import (
    Call,
    Name,
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

__all__ = ["Grouping", "MixedFormula", "RandomPart", "parse_formula"]


@dataclass(frozen=True)
class Grouping:
    """A grouping factor as it is said.

    Attributes:
        columns: the columns whose combinations are the levels, or the numeric ones of a kernel.
        relation: how the levels are related; None for independent ones.
        kernel: the name of the known matrix of ``vm``, or of the graph of ``car`` and ``icar``.
        bent: for ``spline``, whether each column is bent, or linear in the product with another.
    """

    columns: tuple[str, ...]
    relation: Structure | None = None
    kernel: str | None = None
    bent: tuple[bool, ...] = ()

    @property
    def key(self) -> str:
        """What tells it from other groups: the formula's words for it."""
        names = [str(Name(name)) for name in self.columns]
        if self.relation is None:
            return ":".join(names)
        if self.bent:
            pairs = zip(names, self.bent, strict=True)
            return ":".join(f"spline({name})" if bent else name for name, bent in pairs)
        kernel = [str(Name(self.kernel))] if self.kernel else []
        return f"{self.relation.name}({', '.join([*names, *kernel, *self.relation.said])})"

    def __str__(self) -> str:
        """The factor as results name it: ``animal`` for ``ped(animal)``."""
        if self.relation is None or self.relation.name in ("ped", "vm"):
            return ":".join(self.columns)
        return self.key  # beside which the group itself may have effects, as areas often have

    @property
    def operand(self) -> str:
        """A name for its operand in the covariance tree."""
        return ":".join(self.columns) if self.relation is None else "_".join(self.columns)


@dataclass(frozen=True)
class RandomPart:
    """One ``(effects | group)``, or ``S(effects | group)`` with a structure S.

    Attributes:
        effects: the effects, such as ``1 + Days``.
        grouping: the grouping factor.
        structure: the covariance among the effects of a level.
    """

    effects: Part
    grouping: Grouping
    structure: Structure = field(default_factory=lambda: Structure("us"))

    @property
    def factors(self) -> tuple[str, ...]:
        """The columns of the group."""
        return self.grouping.columns

    @property
    def group(self) -> str:
        """The grouping factor as results name it, ``batch:cask`` for a combination."""
        return str(self.grouping)

    def __str__(self) -> str:
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
        parts = [self.fixed.node, *(part.effects.node for part in self.random), self.response]
        calls = (
            n for p in parts for n in walk(p) if isinstance(n, Call) and n.function in STATEFUL
        )
        return [str(call) for call in calls]


def parse_formula(text: str) -> MixedFormula:
    """Take a formula apart.

    ``(x | a/b)`` is ``(x | a) + (x | a:b)``; ``(1 + x || g)`` is ``(1 | g) + (0 + x | g)``; ``.``
    is every column that the formula does not name elsewhere. With ``cbind(y1, y2)`` before ``~``
    effects that do not name ``trait`` are one for each of the responses.

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
    for part in (*(Part(r, text) for r in responses), fixed, *(r.effects for r in random)):
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
    for part in (fixed, *(r.effects for r in random)):
        if not part.is_open:
            _ = part.terms, part.offsets  # what they raise is raised here
    return MixedFormula(text.strip(), response, fixed, tuple(random), traits)


def _by_trait(part: RandomPart, text: str) -> RandomPart:
    if part.grouping.bent:
        raise InputError(
            f"formula {text!r}: {part} beside cbind() is not supported: expected a table with a row "
            "for each response"
        )
    return replace(part, effects=effects_by_trait(part.effects))


def _check(node: Node, text: str) -> None:
    if isinstance(node, Call) and node.function not in FUNCTIONS:
        if node.function in EFFECTS and any(_are_several(inner) for _, inner in node.arguments):
            raise _of_several(node, text)
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
    """``effects | group``, or ``effects || group``, with the structure around it."""

    node: Operation
    call: Call | None = None


def _bars(node: Node, text: str) -> tuple[Node | None, list[_Bar]]:
    """What is left of a sum without its random parts, and these."""
    if is_operation(node, "("):
        inner = operands_of(node)[0]
        if is_operation(inner, "|", "||"):
            assert isinstance(inner, Operation)
            return None, [_Bar(inner)]
    if isinstance(node, Call) and node.arguments and is_operation(node.arguments[0][1], "|", "||"):
        inner = node.arguments[0][1]
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


def _refuse_bars(node: Node, text: str) -> None:
    if any(is_operation(part, "|", "||") for part in walk(node)):
        raise InputError(
            f"formula {text!r}: a random effect is a term of its own in parentheses, '+ (1 | group)'"
        )


def _random_parts(bar: _Bar, text: str) -> list[RandomPart]:
    effects, group = bar.node.operands
    for side in (effects, group):
        _refuse_bars(side, text)
    part = Part(effects, text)
    if part.is_open:
        raise InputError(f"formula {text!r}: '.' stands for columns of the fixed effects only")
    structure = _structure(bar, text)
    groups = _groups(group, text)
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


def _groups(node: Node, text: str) -> list[Grouping]:
    """``a/b`` gives a and a:b; ``a:b`` gives itself."""
    if is_operation(node, "("):
        return _groups(operands_of(node)[0], text)
    if is_call(node, *RELATIONS) and isinstance(node, Call):
        return _related(node, text)
    if is_operation(node, "/"):
        left, right = operands_of(node)
        outer = _groups(left, text)
        inner = _groups(right, text)
        if not any(of.relation for of in (*outer, *inner)):
            return outer + [Grouping((*outer[-1].columns, *of.columns)) for of in inner]
    if _are_several(node):
        raise _of_several(node, text)
    if is_operation(node, "+"):
        raise InputError(f"formula {text!r}: write '(1 | a) + (1 | b)' for two grouping factors")
    found = columns_of(node)
    if found is None:
        raise InputError(
            f"formula {text!r}: grouping factor {str(node)!r}: expected a column, 'a:b', 'a/b', or "
            f"one of {', '.join(f'{name}(…)' for name in RELATIONS)}"
        )
    return [Grouping(found)]


def _are_several(node: Node) -> bool:
    """Whether it is a sum of related groups, such as ``ped(animal) + ped(dam)``."""
    while is_operation(node, "+"):
        node, last = operands_of(node)[0], operands_of(node)[-1]
        if is_call(last, *RELATIONS):
            return True
    return False


def _of_several(node: Node, text: str) -> InputError:
    return InputError(
        f"formula {text!r}: {str(node)!r} has several levels a row, which no formula says: expected "
        "separate terms, such as (1 | ped(animal)) + (1 | ped(dam)), or for correlated or shared "
        "effects a tree with MembershipMatrix"
    )


def _related(call: Call, text: str) -> list[Grouping]:
    """A group whose levels are related; a spline of two columns gives several."""
    what, name = f"formula {text!r}", call.function
    positional = [node for key, node in call.arguments if key is None]
    columns = [node.name for node in positional if isinstance(node, Name) and node.name != "."]
    if len(columns) < len(positional) or not columns or len(set(columns)) < len(columns):
        raise InputError(f"{what}: {str(call)!r}: expected distinct columns, then options by name")
    count = len(columns)
    if name in ("ped", *WALKS):
        count = 1
    elif name in ("vm", *GRAPHS):
        count = 2
    check_dimensions(name, len(columns), what)
    if name == "spline" and len(columns) > 2:
        raise InputError(f"{what}: {str(call)!r} has {len(columns)} columns: expected one or two")
    if len(columns) != count:
        wanted = {"ped": "ped(animal)", "vm": "vm(level, K), K a name in `kernels`"}
        wanted |= {walk: f"{walk}(time)" for walk in WALKS}
        wanted |= {graph: f"{graph}(area, W), W a name in `kernels`" for graph in GRAPHS}
        raise InputError(f"{what}: {str(call)!r}: expected {wanted[name]}")
    options = tuple(item for item in call.arguments if item[0] is not None)
    relation = structure_of(Call(name, options), what, 0)
    if name in ("vm", *GRAPHS):
        return [Grouping((columns[0],), relation, columns[1])]
    if name != "spline":
        return [Grouping(tuple(columns), relation)]
    found = [Grouping((column,), relation, bent=(True,)) for column in columns]
    if len(columns) == 2:
        for bent in ((True, False), (False, True), (True, True)):
            found.append(Grouping(tuple(columns), relation, bent=bent))
    return found
