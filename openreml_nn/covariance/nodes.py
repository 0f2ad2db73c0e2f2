"""What one node of a tree is, and how it is evaluated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

from openreml_nn.covariance.owner import tensors_of
from openreml_nn.covariance.parametrized import FreeParams, Parametrized
from openreml_nn.support.errors import InputError

__all__ = [
    "Kind",
    "TreeNode",
    "check_result",
    "differentiated",
    "functorch",
    "has_values",
    "hooked",
    "is_able",
    "is_opaque",
    "is_ours",
    "kind_of",
    "leaf_value",
    "of_user",
    "user_value",
]


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


class TreeNode(Parametrized):
    """What a tree asks of each of its nodes; :class:`openreml_nn.covariance.Matrix` documents it.

    Attributes:
        grad_mode: ``"default"``, ``"manual"`` or ``"auto"``.
        known_shape: the shape, or None where only an evaluation tells.
    """

    grad_mode: str
    known_shape: tuple[int, ...] | None

    @classmethod
    def node_kind(cls) -> Kind:
        """What the class says of itself."""
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix."""
        raise NotImplementedError

    def forward(self, free_params: FreeParams = None) -> Tensor:
        """The matrix, recorded by plain autograd."""
        raise NotImplementedError

    def has_closed_form(self) -> bool:
        """Whether calling it has the gradient in closed form."""
        raise NotImplementedError

    def grad(self, free_params: FreeParams = None) -> tuple[Tensor | None, list[str]]:
        """The Jacobian, and the names of its slices."""
        raise NotImplementedError

    def manual_vjp(self, cotangent: Tensor, free_params: FreeParams = None) -> Tensor:
        """From the matrix's cotangent to that of its free parameters."""
        raise NotImplementedError

    def push_forward(self, tangent: Tensor, free_params: Tensor) -> Tensor:
        """The derivative along a tangent of the free parameters."""
        raise NotImplementedError

    def moment_start(self, variance: Tensor) -> bool:
        """Set a start with that variance; whether there is a free scale."""
        raise NotImplementedError


def hooked(node: TreeNode) -> bool:
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


#: What was found of each class.
_KINDS: dict[type[TreeNode], Kind] = {}


def kind_of(node: TreeNode) -> Kind:
    cls = type(node)
    return _KINDS.get(cls) or _KINDS.setdefault(cls, cls.node_kind())


def is_ours(formula: Any) -> bool:
    """Whether a formula is written in this package."""
    # A function that exec() made has no module.
    return (formula.__module__ or "").partition(".")[0] == __name__.partition(".")[0]


def functorch() -> bool:
    """Whether a ``torch.func`` transform runs."""
    return torch._C._are_functorch_transforms_active()


def is_opaque(node: TreeNode) -> bool:
    """Whether the node is evaluated by calling it as a module."""
    return kind_of(node).opaque or "forward" in node.__dict__ or hooked(node)


def is_able(node: TreeNode) -> bool:
    """Whether the node's own derivative is to be its closed form."""
    if node.grad_mode not in ("default", "manual", "auto"):
        raise InputError(
            f"`grad_mode` is {node.grad_mode!r}: expected 'default', 'manual' or 'auto'"
        )
    kind = kind_of(node)
    able = kind.closed if kind.operator else node.has_closed_form()
    return able and node.grad_mode != "auto" and not _foreign(node)


def check_result(node: TreeNode, value: Any) -> None:
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


def leaf_value(node: TreeNode, part: Tensor | None) -> Tensor:
    if kind_of(node).ours:
        return node.forward(part)
    value = user_value(node, node.free_values() if part is None else part, node.forward)
    check_result(node, value)
    return value


def user_value(node: TreeNode, values: Tensor, call: Callable[[Tensor], Any]) -> Any:
    """What a user's formula makes of free parameters, as wide as these.

    A formula with networks runs in their precision, and what it yields is widened.
    """
    own = values
    if node._modules and not kind_of(node).operator:
        networks = [child for child in node.children() if not isinstance(child, Parametrized)]
        tensors = (t for child in networks for t in tensors_of(child, "_parameters"))
        own = values.to(next((t.dtype for t in tensors if t.is_floating_point()), values.dtype))
    with lent(node, own):
        value = call(own)
    return _widened(value, values) if isinstance(value, Tensor) else value


@contextmanager
def lent(node: TreeNode, values: Tensor) -> Iterator[None]:
    """Let a user's formula find ``values`` where else it finds its parameters, and its other tensors
    as wide as these: it may multiply the two."""
    parameters, buffers, given = node._parameters, node._buffers, node.stand_in
    free = dict(zip(node.arrangement().free, values.split(1), strict=False))
    try:
        for store, own in (("_parameters", parameters), ("_buffers", buffers)):
            wide = {name: free.get(name, _widened(t, values)) for name, t in own.items()}
            if any(wide[name] is not t for name, t in own.items()):
                node.__dict__[store] = wide
        if given is not None:
            node.__dict__["stand_in"] = given._replace(untransformed=values)
        yield
    finally:
        node.__dict__["_parameters"], node.__dict__["_buffers"] = parameters, buffers
        node.__dict__["stand_in"] = given


def of_user(node: TreeNode, values: Tensor) -> AbstractContextManager[None]:
    """Where a closed form runs: that of a user finds the tensors of its node as :func:`lent` has them."""
    return nullcontext() if kind_of(node).ours else lent(node, values)


def _widened(tensor: Any, like: Tensor) -> Any:
    """A tensor of floating-point numbers as wide as another, or wider."""
    if tensor is None or tensor.dtype == like.dtype or not tensor.is_floating_point():
        return tensor
    return tensor.to(torch.promote_types(tensor.dtype, like.dtype))


def _foreign(node: TreeNode) -> bool:
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
