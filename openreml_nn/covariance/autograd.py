"""The one custom autograd function: closed-form gradients wired into backprop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from openreml_nn.covariance.matrix import Matrix

__all__ = ["ClosedForm"]


class ClosedForm(torch.autograd.Function):
    r"""Build :math:`V(\theta)` without recording; pull cotangents back in closed form.

    Forward evaluates the matrix with no graph. Backward maps the cotangent
    :math:`\bar V` to :math:`\bar\theta_i = \langle \bar V, \partial V/\partial\theta_i\rangle`
    by :meth:`Matrix.pull_back`; forward mode maps a tangent by
    :meth:`Matrix.push_forward`. Both are ordinary tensor expressions of what
    they are given, so that double backward and ``torch.func`` transforms
    differentiate through them.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Matrix, free_params: Tensor) -> Tensor:
        # Forward mode refuses a view, such as a transpose, as the output of a custom function.
        return matrix.forward(free_params).contiguous()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Matrix, Tensor], output: Tensor) -> None:
        matrix, free_params = inputs
        ctx.matrix = matrix
        ctx.save_for_backward(free_params)
        ctx.save_for_forward(free_params)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[None, Tensor]:
        (free_params,) = ctx.saved_tensors
        return None, ctx.matrix.pull_back(cotangent, free_params)

    @staticmethod
    def jvp(ctx: Any, _: None, tangent: Tensor) -> Tensor:
        (free_params,) = ctx.saved_tensors
        return ctx.matrix.push_forward(tangent, free_params)
