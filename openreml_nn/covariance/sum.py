"""Sums of matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from openreml_nn.covariance.design import IdentityDesign
from openreml_nn.covariance.matrix import FreeParams, Matrix
from openreml_nn.covariance.operator import Operator
from openreml_nn.covariance.terms import DenseCovariance, Term

__all__ = ["Sum"]


class Sum(Operator):
    r"""Sum :math:`V = A_0 + A_1 + \dots` of matrices of one shape.

    Args:
        *args: operands; or a dict of them, or keyword arguments.

    Shape:
        Operands and output: (n, m).

    Raises:
        ValueError: if the shapes differ (nothing is broadcast).

    >>> from openreml_nn.covariance import IdentityMatrix, ScalarMatrix
    >>> V = Sum(group=ScalarMatrix(2), residual=IdentityMatrix(2))
    >>> V.param_names
    ['group/sigma^2']
    >>> V().detach()
    tensor([[2., 0.],
            [0., 2.]])
    """

    def _infer_shape(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        if len(set(shapes)) != 1:
            raise ValueError(f"operands have shapes {list(shapes)}: Sum needs one shape")
        return shapes[0]

    def combine(self, operands: Sequence[Tensor]) -> Tensor:
        total = operands[0]
        for operand in operands[1:]:
            total = total + operand
        return total

    def combine_vjp(self, cotangent: Tensor, operands: Sequence[Tensor]) -> list[Tensor]:
        return [cotangent] * len(operands)

    def combine_jvp(self, index: int, tangent: Tensor, operands: Sequence[Tensor]) -> Tensor:
        return tangent

    def terms(self, rows: Tensor | None = None, free_params: FreeParams = None) -> list[Term]:
        found: list[Term] = []
        for name, operand in self._typed_operands(free_params).items():
            if isinstance(operand, Matrix):
                parts = operand.terms(rows, self._sub(name, free_params))
                if not any(p.requires_grad for p in operand.parameters()):
                    parts = [replace(term, known=True) for term in parts]
            else:
                design = IdentityDesign(operand.shape[0])
                parts = [Term(design, DenseCovariance(operand), known=True).take(rows)]
            found += [term.within(name) for term in parts]
        return found

    def moment_start(self, variance: Tensor) -> bool:
        matrices = [operand for operand in self.operands.values() if isinstance(operand, Matrix)]
        took = [operand.moment_start(variance) is not False for operand in matrices]
        return any(took)
