"""A call of a matrix: by its formula, by closed forms, or as the module that it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from openreml_nn.covariance.autograd import ClosedForm
from openreml_nn.covariance.nodes import (
    TreeNode,
    differentiated,
    functorch,
    is_able,
    kind_of,
    leaf_value,
    user_value,
)
from openreml_nn.covariance.parametrized import FreeParams, Recorded
from openreml_nn.covariance.tree import Leaf, Tree

__all__ = ["called", "evaluate"]


def evaluate(root: TreeNode, free_params: FreeParams = None, plain: bool = False) -> Tensor:
    """The value of a matrix, with closed-form gradients where there are some.

    Args:
        root: a matrix that is not opaque.
        free_params: see :meth:`Matrix.forward`.
        plain: whether plain autograd records all.
    """
    if isinstance(free_params, Recorded):
        with root.given(free_params):
            return evaluate(root, None, True)
    recording = torch.is_grad_enabled() or functorch() or forward_ad._current_level >= 0
    # A graph of operations, which compiling and tracing make, has no custom function in it.
    recorded = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    closing = recording and not plain and not recorded
    if not kind_of(root).operator:
        return _evaluated_leaf(root, free_params, closing)
    tree = Tree(root, closing)
    if free_params is not None and any(tree.opaque):
        with root.given(root.flat_params(free_params)):
            return evaluate(root, None, plain)
    if tree.natural is not None:
        return tree.value([None] * len(tree.leaves), tree.natural.values[:0])
    parts = tree.parts(free_params)
    if isinstance(free_params, Tensor):
        like = free_params.detach()[:0]
    else:
        like = parts[0].detach()[:0] if parts else root.flat_params(free_params)
    closing = closing and differentiated(*parts) and not _nested_forward()
    return tree.value(parts, like, closing)


def _evaluated_leaf(node: TreeNode, free_params: FreeParams, closing: bool) -> Tensor:
    given = node.stand_in
    if given is not None and given.natural and free_params is None:
        return leaf_value(node, None)
    values = node.free_values() if free_params is None else node.flat_params(free_params)
    closing = closing and values.numel() > 0 and differentiated(values) and is_able(node)
    if closing and not _nested_forward():
        return ClosedForm.of(Leaf(node), [values])
    return leaf_value(node, values)


def called(node: TreeNode, free_params: FreeParams, call: Any) -> Tensor:
    """The value of an opaque node by ``call``, which is that of ``nn.Module``."""
    if free_params is not None:
        flat = free_params if isinstance(free_params, Recorded) else node.flat_params(free_params)
        with node.given(flat):
            if isinstance(free_params, Recorded):
                return called(node, None, call)
            return call(free_params)
    if node.stand_in is None or kind_of(node).operator:
        return call()
    return user_value(node, node.free_values(), call)


def _nested_forward() -> bool:
    """Whether forward mode runs within forward mode, which torch's custom functions do not see."""
    stack = (torch._C._functorch.get_interpreter_stack() or ()) if functorch() else ()
    jvp = torch._C._functorch.TransformType.Jvp
    return sum(level.key() == jvp for level in stack) > 1
