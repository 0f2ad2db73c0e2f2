"""What one node of a tree is, and how it is evaluated."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

from openreml_nn.support.errors import InputError

if TYPE_CHECKING:
    from openreml_nn.covariance.matrix import Matrix

__all__ = [
    "Kind",
    "check_result",
    "differentiated",
    "functorch",
    "has_values",
    "hooked",
    "is_able",
    "is_opaque",
    "kind_of",
    "leaf_value",
    "lent",
]


def hooked(node: Matrix) -> bool:
    """Whether calling the node does more than its formula: hooks, or ``compile()``."""
    return bool(
        node._forward_hooks
        or node._forward_pre_hooks
        or node._backward_hooks
        or node._backward_pre_hooks
        or node._compiled_call_impl is not None
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def has_values(tensor: Tensor) -> bool:
    """Whether its numbers can be looked at: not while tracing, nor where one would wait for a
    device."""
    return (
        tensor.device.type == "cpu"
        and type(tensor) in (Tensor, torch.nn.Parameter)
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        and not torch.compiler.is_compiling()
    )


def differentiated(*values: Tensor) -> bool:
    """Whether anything records what is done to ``values``."""
    return (
        forward_ad._current_level >= 0
        or (torch.is_grad_enabled() and any(v.requires_grad for v in values))
        or any(torch._C._functorch.is_functorch_wrapped_tensor(v) for v in values)
    )


class Kind(NamedTuple):
    """What a class of nodes says of itself.

    Attributes:
        operator: whether it has operands.
        opaque: whether it is evaluated by calling it: it has a ``__call__``, or as
            an operator a ``forward``, of its own.
        ours: whether its formula is of this package: it reads parameters by
            ``build_params`` only, and what it yields need not be checked.
        closed: whether it has derivatives in closed form (of a leaf, an instance says).
    """

    operator: bool
    opaque: bool
    ours: bool
    closed: bool


#: What was found of each class.
_KINDS: dict[type[Matrix], Kind] = {}


def kind_of(node: Matrix) -> Kind:
    cls = type(node)
    return _KINDS.get(cls) or _KINDS.setdefault(cls, _found_kind(cls))


def _found_kind(cls: type[Matrix]) -> Kind:
    from openreml_nn.covariance.matrix import Matrix
    from openreml_nn.covariance.operator import Operator

    formula = cls.combine if issubclass(cls, Operator) else cls.forward
    # A function that exec() made has no module.
    ours = (formula.__module__ or "").partition(".")[0] == __name__.partition(".")[0]
    opaque = cls.__call__ is not Matrix.__call__
    if issubclass(cls, Operator):
        opaque = opaque or cls.forward is not Operator.forward
        parts = (cls.combine_vjp, cls.combine_jvp)
        closed = Operator.combine_vjp not in parts and Operator.combine_jvp not in parts
        return Kind(True, opaque, ours, closed)
    return Kind(False, opaque, ours, True)


def functorch() -> bool:
    """Whether a ``torch.func`` transform runs."""
    return torch._C._are_functorch_transforms_active()


def is_opaque(node: Matrix) -> bool:
    """Whether the node is evaluated by calling it as a module."""
    return kind_of(node).opaque or "forward" in node.__dict__ or hooked(node)


def is_able(node: Matrix) -> bool:
    """Whether the node's own derivative is to be its closed form."""
    if node.grad_mode not in ("default", "manual", "auto"):
        raise InputError(
            f"`grad_mode` is {node.grad_mode!r}: expected 'default', 'manual' or 'auto'"
        )
    kind = kind_of(node)
    able = kind.closed if kind.operator else node.has_closed_form()
    return able and node.grad_mode != "auto" and not _foreign(node)


def check_result(node: Matrix, value: Any) -> None:
    """Raise unless a user's formula yields a matrix of the node's shape.

    Raises:
        TypeError: if it is no tensor.
        InputError: if it has another shape.
    """
    name = node._get_name()
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} yields a {type(value).__name__}: expected a tensor")
    expected = "a matrix" if node.known_shape is None else f"{node.known_shape}"
    if value.dim() != 2 or (
        node.known_shape is not None and tuple(value.shape) != node.known_shape
    ):
        raise InputError(f"{name} yields {tuple(value.shape)}: expected {expected}")


def leaf_value(node: Matrix, part: Tensor | None) -> Tensor:
    if kind_of(node).ours:
        return node.forward(part)
    values = node.free_values() if part is None else part
    with lent(node, values):
        value = node.forward(values)
    check_result(node, value)
    return value


@contextmanager
def lent(node: Matrix, values: Tensor) -> Iterator[None]:
    """Let a user's formula find ``values`` where else it finds its parameters."""
    before, given = node._parameters, node.stand_in
    names = node.arrangement().free
    try:
        if names:
            node.__dict__["_parameters"] = {**before, **dict(zip(names, values.split(1)))}
        if given is not None:
            node.__dict__["stand_in"] = given._replace(untransformed=values)
        yield
    finally:
        node.__dict__["_parameters"], node.__dict__["stand_in"] = before, given


def _foreign(node: Matrix) -> bool:
    """Whether a derivative by another tensor than the node's free parameters is wanted."""
    trans = node.own_trans
    for store in (node._parameters, node._buffers):
        if not store:
            continue
        free = store is node._parameters
        for name, tensor in store.items():
            if tensor is not None and not (free and name in trans) and _followed(tensor):
                return True
    if not node._modules or kind_of(node).operator:
        return False
    own: Iterable[Tensor] = (
        tensor
        for module in node._modules.values()
        if module is not None
        for tensor in (*module.parameters(), *module.buffers())
    )
    return any(_followed(tensor) for tensor in own)


def _followed(tensor: Tensor) -> bool:
    """Whether a derivative by this very tensor is recorded."""
    if tensor.requires_grad and torch.is_grad_enabled():
        return True
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return True
    if forward_ad._current_level < 0 or tensor.layout != torch.strided:
        return False
    return forward_ad.unpack_dual(tensor).tangent is not None
