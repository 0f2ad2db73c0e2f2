r"""Evaluation of a tree of matrices, and its derivatives in closed form.

A :class:`Tree` is one walk of a matrix and its operands, made anew for each
evaluation: what it finds is what the modules are now. Its nodes stand in an
order in which operands come before the operators that use them, each once, so
that an evaluation, a pull-back and a push-forward are each one pass over them,
in whatever depth they stand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from openreml_nn.covariance.autograd import ClosedForm
from openreml_nn.covariance.nodes import (
    TreeNode,
    check_result,
    is_able,
    is_opaque,
    kind_of,
    leaf_value,
    of_user,
)
from openreml_nn.covariance.parametrized import FreeParams, Given

__all__ = ["Leaf", "Tree"]


class _Operator(Protocol):
    """What a tree asks of a node with operands; ``Operator`` documents it."""

    linear: bool

    def checked_operands(self) -> Sequence[TreeNode | Tensor]: ...

    def formed_operands(self) -> list[bool]: ...

    def combine(self, *values: Tensor) -> Tensor: ...

    def combine_vjp(self, cotangent: Tensor, *values: Tensor) -> Sequence[Tensor | None]: ...

    def combine_jvp(self, index: int, tangent: Tensor, *values: Tensor) -> Tensor: ...


def _operator(node: TreeNode) -> _Operator:
    return cast("_Operator", node)


class Tree:
    """The nodes of a matrix as they are now.

    Args:
        root: the matrix.
        derivatives: whether it is asked which nodes have closed forms.

    Attributes:
        nodes: operands before operators, the root last.
        operands: for each operator its operands, positions of nodes or tensors;
            None for a node that is evaluated as a whole.
        leaves: positions of the nodes with free parameters of their own.
        able: for each node, whether its own derivative is a closed form.
        closed: for each node, whether that holds for it and for all below it.
        formed: for each operator which operands' values it needs.
        opaque: for each node, whether it is evaluated by calling it as a module.
        natural: what stands in for a leaf's parameters, where that is natural values.
    """

    def __init__(self, root: TreeNode, derivatives: bool = True) -> None:
        self.root = root
        self.nodes: list[TreeNode] = []
        self.operands: list[list[int | Tensor] | None] = []
        self.formed: list[list[bool]] = []
        self.leaves: list[int] = []
        self.able: list[bool] = []
        self.closed: list[bool] = []
        self.opaque: list[bool] = []
        self.natural: Given | None = None
        place: dict[int, int] = {}
        stack: list[tuple[TreeNode, list[Any] | None]] = [(root, None)]
        while stack:
            node, below = stack.pop()
            if id(node) in place:
                continue
            opaque = below is None and is_opaque(node)
            if below is None and not opaque and kind_of(node).operator:
                below = list(_operator(node).checked_operands())
                stack.append((node, below))
                for operand in reversed(below):
                    if not isinstance(operand, Tensor) and id(operand) not in place:
                        stack.append((operand, None))
                continue
            found = None
            if below is not None:
                found = [o if isinstance(o, Tensor) else place[id(o)] for o in below]
            elif not opaque:
                if node.arrangement().free:
                    self.leaves.append(len(self.nodes))
                if node.stand_in is not None and node.stand_in.natural:
                    self.natural = node.stand_in
            able = derivatives and not opaque and is_able(node)
            closed = able and all(self.closed[i] for i in found or () if isinstance(i, int))
            place[id(node)] = len(self.nodes)
            self.nodes.append(node)
            self.operands.append(found)
            self.formed.append([] if found is None else _operator(node).formed_operands())
            self.able.append(able)
            self.closed.append(closed)
            self.opaque.append(opaque)

    # ------------------------------------------------------------------ values

    def parts(self, free_params: FreeParams) -> list[Tensor]:
        """The free parameters leaf by leaf, in one precision."""
        own = [self.nodes[i] for i in self.leaves]
        if free_params is None:
            parts = [node.free_values() for node in own]
            if len({part.dtype for part in parts}) > 1:
                widest = torch.cat([part[:1] for part in parts]).dtype
                parts = [part.to(widest) for part in parts]
            return parts
        values = self.root.flat_params(free_params)
        if len(own) == 1:
            return [values]
        return list(values.split([len(node.arrangement().free) for node in own])) if own else []

    def value(self, parts: Sequence[Tensor | None], like: Tensor, closing: bool = False) -> Tensor:
        """The root's value.

        Args:
            parts: free parameters, leaf by leaf; None where natural values are given.
            like: no parameters, in the precision and on the device of the evaluation.
            closing: whether each largest part of the tree that has a closed form is
                evaluated with it, so that only what is above is recorded.
        """
        last = len(self.nodes) - 1
        return self._values({last}, parts, like, closing)[last]

    def _values(
        self,
        wanted: set[int],
        parts: Sequence[Tensor | None],
        like: Tensor,
        closing: bool = False,
    ) -> dict[int, Tensor]:
        """Values of nodes, and of those on which they depend."""
        own = dict(zip(self.leaves, parts, strict=True))
        ends = self.closed if closing else [False] * len(self.nodes)
        needed = set(wanted)
        for i in range(len(self.nodes) - 1, -1, -1):
            if i in needed and self.operands[i] is not None and not ends[i]:
                needed.update(self._formed(i))
        values: dict[int, Tensor] = {}
        for i, node in enumerate(self.nodes):
            if i not in needed:
                continue
            if ends[i]:
                values[i] = self._closed_value(i, own, like)
            elif self.operands[i] is not None:
                operator = _operator(node)
                with of_user(node, like):
                    values[i] = operator.combine(*self._arguments(i, values, like))
                if not kind_of(node).ours:
                    check_result(node, values[i])
            elif self.opaque[i]:
                values[i] = self._called(node, like)
            else:
                values[i] = leaf_value(node, own.get(i, like))
        return values

    def _formed(self, i: int) -> list[int]:
        """Operands of the i-th node whose values it needs."""
        below = self.operands[i]
        assert below is not None
        return [o for o, used in zip(below, self.formed[i]) if used and isinstance(o, int)]

    def _arguments(self, i: int, values: dict[int, Tensor], like: Tensor) -> list[Any]:
        """What the i-th node's formulas take: its operands' values, None for one not formed."""
        below = self.operands[i]
        assert below is not None
        return [
            (values.get(o) if used else None) if isinstance(o, int) else o.to(like)
            for o, used in zip(below, self.formed[i])
        ]

    @staticmethod
    def _called(node: TreeNode, like: Tensor) -> Tensor:
        value = node()
        if value.dtype != like.dtype and not node.num_free_params:
            value = value.to(like)
        return value

    def _closed_value(self, i: int, own: dict[int, Any], like: Tensor) -> Tensor:
        if i == len(self.nodes) - 1:
            part, parts = self, list(own.values())
        elif self.operands[i] is None and i in own:
            return ClosedForm.of(Leaf(self.nodes[i]), [own[i]])
        else:
            part = Tree(self.nodes[i])
            mine = {id(self.nodes[j]): values for j, values in own.items()}
            parts = [mine[id(part.nodes[j])] for j in part.leaves]
        if not parts:
            return part.value(parts, like)
        return ClosedForm.of(part, parts)

    # ------------------------------------------------------------------ derivatives

    def _inner_values(self, parts: Sequence[Tensor], like: Tensor) -> dict[int, Tensor]:
        """Values that the closed forms of the operators need."""
        wanted: set[int] = set()
        for i, able in enumerate(self.able):
            if able and self.operands[i] is not None and not _operator(self.nodes[i]).linear:
                wanted.update(self._formed(i))
        return self._values(wanted, parts, like) if wanted else {}

    def pull_back(self, cotangent: Tensor, parts: Sequence[Tensor]) -> list[Tensor]:
        r"""From the root's cotangent :math:`\bar V` to that of each leaf's free parameters."""
        like = parts[0][:0] if parts else cotangent.new_empty(0)
        values = self._inner_values(parts, like)
        own = dict(zip(self.leaves, parts, strict=True))
        found: dict[int, Tensor] = {}
        bars: dict[int, Tensor] = {len(self.nodes) - 1: cotangent}
        moving = self._moving()
        for i in range(len(self.nodes) - 1, -1, -1):
            bar = bars.pop(i, None)
            if bar is None:
                continue
            below, node = self.operands[i], self.nodes[i]
            if not self.able[i]:
                for j, pulled in self._recorded_pull(i, bar, own).items():
                    found[j] = found[j] + pulled if j in found else pulled
            elif below is None:
                with of_user(node, own[i]):
                    pulled = node.manual_vjp(bar, own[i])
                found[i] = found[i] + pulled if i in found else pulled
            else:
                operator = _operator(node)
                with of_user(node, like):
                    parts_of = operator.combine_vjp(bar, *self._arguments(i, values, like))
                for o, part in zip(below, parts_of, strict=True):
                    if isinstance(o, int) and part is not None and moving[o]:
                        bars[o] = bars[o] + part if o in bars else part
        return [found[i] if i in found else torch.zeros_like(own[i]) for i in self.leaves]

    def push_forward(self, tangents: Sequence[Tensor | None], parts: Sequence[Tensor]) -> Tensor:
        r"""The root's derivative along tangents of the leaves' free parameters."""
        like = parts[0][:0]
        values = self._inner_values(parts, like)
        own = dict(zip(self.leaves, zip(parts, tangents, strict=True), strict=True))
        moved: dict[int, Tensor] = {}
        for i, node in enumerate(self.nodes):
            below = self.operands[i]
            if below is None:
                part, tangent = own.get(i, (None, None))
                if part is not None and tangent is not None:
                    with of_user(node, part):
                        moved[i] = node.push_forward(tangent, part)
                continue
            operator = _operator(node)
            arguments = self._arguments(i, values, like)
            for k, o in enumerate(below):
                if isinstance(o, int) and o in moved:
                    with of_user(node, like):
                        part = operator.combine_jvp(k, moved[o], *arguments)
                    moved[i] = moved[i] + part if i in moved else part
        last = len(self.nodes) - 1
        if last not in moved:
            return parts[0].new_zeros(self.root.shape)
        return moved[last]

    def jacobian(self, parts: Sequence[Tensor]) -> dict[int, Tensor]:
        """For each leaf, the derivatives of the root by its free parameters, (k, n, m)."""
        like = parts[0][:0]
        values = self._inner_values(parts, like)
        own = dict(zip(self.leaves, parts, strict=True))
        found: list[dict[int, Tensor]] = []
        for i, node in enumerate(self.nodes):
            below = self.operands[i]
            mine: dict[int, Tensor] = {}
            if not self.able[i]:
                mine = self._recorded_jacobian(i, own)
            elif below is None:
                with of_user(node, like):
                    slices, _ = node.grad(own[i]) if i in own else (None, [])
                if slices is not None:
                    mine[i] = slices
            else:
                operator = _operator(node)
                arguments = self._arguments(i, values, like)
                for k, o in enumerate(below):
                    if not isinstance(o, int) or not found[o]:
                        continue
                    sizes = [len(part) for part in found[o].values()]
                    with of_user(node, like):
                        tangents = torch.cat(list(found[o].values()))
                        moved = operator.combine_jvp(k, tangents, *arguments)
                    for j, part in zip(found[o], moved.split(sizes), strict=True):
                        mine[j] = mine[j] + part if j in mine else part
            found.append(mine)
        return found[-1]

    def _moving(self) -> list[bool]:
        """Whether there are free parameters at or below each node."""
        leaves = set(self.leaves)
        moving: list[bool] = []
        for i, below in enumerate(self.operands):
            if below is None:
                moving.append(i in leaves)
            else:
                moving.append(any(moving[o] for o in below if isinstance(o, int)))
        return moving

    def _function(self, i: int, own: dict[int, Tensor]) -> tuple[Any, list[int], list[Tensor]]:
        """The i-th node as a recorded function of its leaves' parameters, which leaves, values."""
        node = self.nodes[i]
        part = Tree(node, derivatives=False)
        mine = {id(self.nodes[j]): j for j in own}
        leaves = [mine[id(part.nodes[j])] for j in part.leaves]

        def value(*parts: Tensor) -> Tensor:
            return part.value(parts, parts[0].detach()[:0])

        return value, leaves, [own[j] for j in leaves]

    def _recorded_pull(self, i: int, bar: Tensor, own: dict[int, Tensor]) -> dict[int, Tensor]:
        value, leaves, parts = self._function(i, own)
        if not parts:
            return {}
        _, pull, *_ = torch.func.vjp(value, *parts)
        return dict(zip(leaves, pull(bar), strict=True))

    def _recorded_jacobian(self, i: int, own: dict[int, Tensor]) -> dict[int, Tensor]:
        value, leaves, parts = self._function(i, own)
        if not parts:
            return {}
        slices = torch.func.jacrev(value, argnums=tuple(range(len(parts))))(*parts)
        return {j: part.movedim(-1, 0) for j, part in zip(leaves, slices, strict=True)}


class Leaf:
    """A leaf alone: what :class:`ClosedForm` needs of a :class:`Tree`."""

    __slots__ = ("node",)

    def __init__(self, node: TreeNode) -> None:
        self.node = node

    def value(self, parts: Sequence[Tensor], like: Tensor) -> Tensor:
        """The value of the leaf at its free parameters."""
        return leaf_value(self.node, parts[0])

    def pull_back(self, cotangent: Tensor, parts: Sequence[Tensor]) -> list[Tensor]:
        """From its cotangent to that of its free parameters."""
        with of_user(self.node, parts[0]):
            return [self.node.manual_vjp(cotangent, parts[0])]

    def push_forward(self, tangents: Sequence[Tensor | None], parts: Sequence[Tensor]) -> Tensor:
        """The derivative of the leaf along a tangent of its free parameters."""
        tangent = tangents[0]
        assert tangent is not None
        with of_user(self.node, parts[0]):
            return self.node.push_forward(tangent, parts[0])
