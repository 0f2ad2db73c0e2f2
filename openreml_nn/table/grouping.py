"""Grouping factors of a formula: which levels a row has, and how these are related."""

from __future__ import annotations

from dataclasses import dataclass, replace

from openreml_nn.support.errors import InputError
from openreml_nn.table.structure import (
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
    is_call,
    is_operation,
    operands_of,
)

__all__ = ["Grouping", "groups_of"]


@dataclass(frozen=True)
class Grouping:
    """A grouping factor as it is said.

    Attributes:
        columns: the columns whose combinations are the levels, or the numeric ones of a kernel.
        relation: how the levels are related; None for independent ones.
        kernel: the name of the known matrix of ``vm``, or of the graph of ``car`` and ``icar``.
        bent: for ``spline``, whether each column is bent, or linear in the product with another.
        members: whether a row has a level by each of the columns, as ``mm(a, b)`` says, in place of
            their combination.
        weights: with ``members``, columns of what each level of a row counts; none for one.
    """

    columns: tuple[str, ...]
    relation: Structure | None = None
    kernel: str | None = None
    bent: tuple[bool, ...] = ()
    members: bool = False
    weights: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """What tells it from other groups: the formula's words for it."""
        names = [str(Name(name)) for name in self.columns]
        if self.members:
            weights = ", ".join(str(Name(name)) for name in self.weights)
            names = [f"mm({', '.join(names)}{f', weights = cbind({weights})' if weights else ''})"]
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
            columns = self.columns
            return f"mm({', '.join(columns)})" if self.members else ":".join(columns)
        return self.key  # beside which the group itself may have effects, as areas often have

    @property
    def operand(self) -> str:
        """A name for its operand in the covariance tree."""
        combined = self.relation is None and not self.members
        return (":" if combined else "_").join(self.columns)


def groups_of(node: Node, text: str) -> list[Grouping]:
    """``a/b`` gives a and a:b; ``a:b`` gives itself."""
    if is_operation(node, "("):
        return groups_of(operands_of(node)[0], text)
    if is_call(node, *RELATIONS) and isinstance(node, Call):
        return _related(node, text)
    if is_call(node, "mm") and isinstance(node, Call):
        return [_members(node, text)]
    if is_operation(node, "/"):
        left, right = operands_of(node)
        outer = groups_of(left, text)
        inner = groups_of(right, text)
        if not any(of.relation or of.members for of in (*outer, *inner)):
            return outer + [Grouping((*outer[-1].columns, *of.columns)) for of in inner]
    if _are_several(node):
        raise _of_several(node, text)
    if is_operation(node, "+"):
        raise InputError(f"formula {text!r}: write '(1 | a) + (1 | b)' for two grouping factors")
    found = columns_of(node)
    if found is None:
        raise InputError(
            f"formula {text!r}: grouping factor {str(node)!r}: expected a column, 'a:b', 'a/b', "
            f"mm(a, b), or one of {', '.join(f'{name}(…)' for name in RELATIONS)}"
        )
    return [Grouping(found)]


def _members(call: Call, text: str) -> Grouping:
    """``mm(a, b)``, whose rows have a level by each column."""
    nodes = [node for key, node in call.arguments if key is None]
    options = {key: node for key, node in call.arguments if key is not None}
    columns = [node.name for node in nodes if isinstance(node, Name) and node.name != "."]
    wrong = len(columns) < len(nodes) or len(set(columns)) < len(columns) or len(columns) < 2
    given, weights = options.pop("weights", None), []
    if isinstance(given, Call) and given.function == "cbind":
        weights = [node.name for _, node in given.arguments if isinstance(node, Name)]
    if wrong or options or (given is not None and len(weights) != len(columns)):
        raise InputError(
            f"formula {text!r}: {str(call)!r}: expected two or more distinct columns, and perhaps "
            "`weights = cbind(…)` with a numeric column for each"
        )
    return Grouping(tuple(columns), members=True, weights=tuple(weights))


def _are_several(node: Node) -> bool:
    """Whether it is a sum of related groups, such as ``ped(animal) + ped(dam)``."""
    while is_operation(node, "+"):
        node, last = operands_of(node)[0], operands_of(node)[-1]
        if is_call(last, *RELATIONS):
            return True
    return False


def _of_several(node: Node, text: str) -> InputError:
    return InputError(
        f"formula {text!r}: {str(node)!r} is no group: expected us({node}) for correlated effects, "
        "(1 | ped(mm(sire, dam))) for one effect that a row has by each column, or separate terms"
    )


def _related(call: Call, text: str) -> list[Grouping]:
    """A group whose levels are related; a spline of two columns gives several."""
    what, name = f"formula {text!r}", call.function
    positional = [node for key, node in call.arguments if key is None]
    if positional and is_call(positional[0], "mm") and name in ("ped", "vm", *GRAPHS):
        inner = positional[0]
        assert isinstance(inner, Call)
        of, column = _members(inner, text), Name("level")
        rest = tuple((None, node) for node in positional[1:])
        options = tuple(item for item in call.arguments if item[0] is not None)
        (alone,) = _related(Call(name, ((None, column), *rest, *options)), text)
        return [replace(alone, columns=of.columns, members=True, weights=of.weights)]
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
