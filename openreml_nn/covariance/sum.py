"""Sums of matrices."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from openreml_nn.covariance.matrix import Matrix, written
from openreml_nn.covariance.operator import Operator
from openreml_nn.covariance.owner import tensors_of
from openreml_nn.support.errors import InputError
from openreml_nn.terms.term import Term

__all__ = ["Sum", "summands"]


def summands(name: str, operand: Matrix | Tensor, terms: Sequence[Term]) -> list[Term]:
    """The terms of an operand as those of a :class:`Sum` in which it has a name."""
    if isinstance(operand, Tensor):
        moves = operand.requires_grad
    else:
        moves = any(p.requires_grad for p in tensors_of(operand, "_parameters"))
    return [term.within(name, known=not moves) for term in terms]


@written("+")
class Sum(Operator):
    r"""Sum :math:`V = A_0 + A_1 + \dots` of matrices of one shape.

    Args:
        *args: operands; or a dict of them, or keyword arguments.

    Shape:
        Operands and output: (n, m).

    Raises:
        InputError: if the shapes differ (nothing is broadcast).

    >>> from openreml_nn.covariance import IdentityMatrix, ScalarMatrix
    >>> V = Sum(group=ScalarMatrix(2), residual=IdentityMatrix(2))
    >>> V.param_names
    ['group/sigma^2']
    >>> V().detach()
    tensor([[2., 0.],
            [0., 2.]])
    """

    linear = True

    def infer_shape(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        if len(set(shapes)) != 1:
            raise InputError(f"operands have shapes {list(shapes)}: Sum needs one shape")
        return shapes[0]

    def combine(self, *values: Tensor) -> Tensor:
        total = values[0]
        for value in values[1:]:
            total = total + value
        return total

    def combine_vjp(self, cotangent: Tensor, *values: Tensor) -> list[Tensor]:
        return [cotangent] * len(values)

    def combine_jvp(self, index: int, tangent: Tensor, *values: Tensor) -> Tensor:
        return tangent

    def structure(self) -> list[Term]:
        found: list[Term] = []
        operands = self.operands
        for name, parts in self.lowered().items():
            found += summands(name, operands[name], parts)
        return found

    def moment_start(self, variance: Tensor) -> bool:
        matrices = [operand for operand in self.operands.values() if isinstance(operand, Matrix)]
        took = [operand.moment_start(variance) is not False for operand in matrices]
        return any(took)
