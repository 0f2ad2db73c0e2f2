"""Products of matrices, and what is made of one matrix: transpose, Gram matrix, inverse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from openreml_nn.covariance.matrix import Matrix, written
from openreml_nn.covariance.nodes import has_values
from openreml_nn.covariance.operator import Operator
from openreml_nn.covariance.start import give_to_one
from openreml_nn.support.checks import found
from openreml_nn.support.errors import InputError, NotPositiveDefiniteError
from openreml_nn.terms.term import Term

__all__ = ["Gram", "HadamardProduct", "Inverse", "Product", "Transpose"]


@written("@")
class Product(Operator):
    r"""Matrix product :math:`V = A_0 A_1 \cdots`.

    Args:
        *args: two operands or more; or a dict of them, or keyword arguments.

    Shape:
        Operands (n₀, n₁), (n₁, n₂), …; output (n₀, last).

    Raises:
        InputError: if neighbours do not fit.

    >>> from openreml_nn.covariance import LowerTriangularMatrix
    >>> V = Product(LowerTriangularMatrix(2, 2), torch.eye(2))
    >>> V(torch.tensor([1.0, 2.0, 3.0]))
    tensor([[1., 0.],
            [2., 3.]])
    """

    least_operands = 2

    def infer_shape(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        for i, (a, b) in enumerate(pairwise(shapes)):
            if a[1] != b[0]:
                raise InputError(
                    f"operand {i} has {a[1]} columns but operand {i + 1} has {b[0]} rows: "
                    "Product needs as many"
                )
        return shapes[0][0], shapes[-1][1]

    def combine(self, *values: Tensor) -> Tensor:
        return reduce(torch.matmul, values)

    def combine_vjp(self, cotangent: Tensor, *values: Tensor) -> list[Tensor]:
        # The cotangent of A_i is L' C R' with L and R the products to its left and right.
        right = [cotangent]
        for value in reversed(values[1:]):
            right.append(right[-1] @ value.mT)
        pulled = []
        left: Tensor | None = None
        for value, part in zip(values, reversed(right), strict=True):
            pulled.append(part if left is None else left.mT @ part)
            left = value if left is None else left @ value
        return pulled

    def combine_jvp(self, index: int, tangent: Tensor, *values: Tensor) -> Tensor:
        return reduce(torch.matmul, [*values[:index], tangent, *values[index + 1 :]])


@written("*")
class HadamardProduct(Operator):
    r"""Entrywise product :math:`V = A_0 \odot A_1 \odot \cdots`.

    Args:
        *args: two operands or more; or a dict of them, or keyword arguments.

    A tensor of shape (1,), or of no dimension, is a factor of every entry:
    ``2.0 * V`` and ``V * 2.0`` are such products.

    Shape:
        Operands and output: (n, m).

    Raises:
        InputError: if the shapes differ.

    >>> from openreml_nn.covariance import EqualEntryMatrix
    >>> HadamardProduct(EqualEntryMatrix(2), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))(
    ...     torch.tensor([0.0])
    ... )
    tensor([[1., 2.],
            [3., 4.]])
    """

    least_operands = 2

    def infer_shape(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        whole = {shape for shape in shapes if len(shape) == 2}
        if len(whole) != 1:
            raise InputError(f"operands have shapes {list(shapes)}: HadamardProduct needs one")
        return whole.pop()

    def _check_operand(self, name: str, operand: Any) -> None:
        if isinstance(operand, Tensor) and operand.shape in ((), (1,)):
            operand = operand.reshape(1, 1)
        super()._check_operand(name, operand)

    def combine(self, *values: Tensor) -> Tensor:
        return reduce(torch.mul, values)

    def structure(self) -> list[Term]:
        # A matrix times numbers has the structure of the matrix.
        (name, matrix), *others = sorted(
            self.operands.items(), key=lambda item: len(item[1].shape), reverse=True
        )
        if not isinstance(matrix, Matrix) or any(len(other.shape) == 2 for _, other in others):
            return super().structure()
        scale = reduce(
            torch.mul, [other.reshape(1) for _, other in others if isinstance(other, Tensor)]
        )
        return [_scaled(term.within(name), scale) for term in matrix.terms()]

    def combine_vjp(self, cotangent: Tensor, *values: Tensor) -> list[Tensor]:
        # No division by an operand, which may have zeros.
        return [self.combine_jvp(i, cotangent, *values) for i in range(len(values))]

    def combine_jvp(self, index: int, tangent: Tensor, *values: Tensor) -> Tensor:
        return reduce(torch.mul, [*values[:index], tangent, *values[index + 1 :]])

    def moment_start(self, variance: Tensor) -> bool:
        operands = list(self.operands.values())
        known = [operand for operand in operands if isinstance(operand, Tensor)]
        # What the known operands multiply the variance by.
        size = reduce(
            torch.mul, [_diagonal(t).to(variance) for t in known], torch.ones_like(variance)
        )
        share = variance / torch.where(size > 0, size, 1)
        return give_to_one(operands, [share] * len(operands))


@written(".T")
class Transpose(Operator):
    r"""Transpose :math:`V = A^\top`.

    Args:
        *args: one operand; or a dict of it, or a keyword argument.

    Shape:
        Operand (n, m); output (m, n).

    >>> from openreml_nn.covariance import LowerTriangularMatrix
    >>> Transpose(LowerTriangularMatrix(2, 2))(torch.tensor([1.0, 2.0, 3.0]))
    tensor([[1., 2.],
            [0., 3.]])
    """

    most_operands = 1
    linear = True

    def infer_shape(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        return shapes[0][1], shapes[0][0]

    def combine(self, *values: Tensor) -> Tensor:
        return values[0].mT

    def combine_vjp(self, cotangent: Tensor, *values: Tensor) -> list[Tensor]:
        return [cotangent.mT]

    def combine_jvp(self, index: int, tangent: Tensor, *values: Tensor) -> Tensor:
        return tangent.mT


class Gram(Operator):
    r"""Gram matrix :math:`V = X^\top X` (``"xtx"``) or :math:`V = X X^\top` (``"xxt"``).

    Args:
        *args: one operand X; or a dict of it, or a keyword argument.
        gram_type: ``"xtx"`` or ``"xxt"``.

    Shape:
        Operand (n, m); output (m, m) for ``"xtx"``, (n, n) for ``"xxt"``.

    Raises:
        InputError: if ``gram_type`` is something else.

    >>> from openreml_nn.covariance import LowerTriangularMatrix
    >>> Gram(LowerTriangularMatrix(2, 2), gram_type="xxt")(torch.tensor([1.0, 2.0, 3.0]))
    tensor([[ 1.,  2.],
            [ 2., 13.]])
    """

    most_operands = 1

    def __init__(self, *args: Any, gram_type: str = "xtx", **kwargs: Any) -> None:
        if not isinstance(gram_type, str) or gram_type not in ("xtx", "xxt"):
            raise InputError(f"`gram_type` is {found(gram_type)}: expected 'xtx' or 'xxt'")
        self.gram_type = gram_type
        super().__init__(*args, **kwargs)

    def _left(self, x: Tensor) -> Tensor:
        """X of :math:`X X^\\top`, whichever way it is written."""
        return x if self.gram_type == "xxt" else x.mT

    def infer_shape(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        size = shapes[0][0] if self.gram_type == "xxt" else shapes[0][1]
        return size, size

    def combine(self, *values: Tensor) -> Tensor:
        left = self._left(values[0])
        return left @ left.mT

    def combine_vjp(self, cotangent: Tensor, *values: Tensor) -> list[Tensor]:
        return [self._left((cotangent + cotangent.mT) @ self._left(values[0]))]

    def combine_jvp(self, index: int, tangent: Tensor, *values: Tensor) -> Tensor:
        half = self._left(tangent) @ self._left(values[0]).mT
        return half + half.mT

    @property
    def repr_dict(self) -> dict[str, Any]:
        return {"operands": self.operands, "gram_type": self.gram_type}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, gram_type={self.gram_type!r}"


class Inverse(Operator):
    r"""Inverse :math:`V = A^{-1}` of a positive-definite matrix, by its Cholesky factor.

    Args:
        *args: one operand; or a dict of it, or a keyword argument.

    Shape:
        Operand and output: (n, n).

    Raises:
        InputError: if the operand is not square; by calling it, if it is not symmetric.
        NotPositiveDefiniteError: by calling it, if the operand is not positive definite. On an
            accelerator, and while tracing, the result is NaN instead, so that no evaluation
            waits for the device.

    >>> from openreml_nn.covariance import ScalarMatrix
    >>> Inverse(ScalarMatrix(2))(torch.tensor([0.5]))
    tensor([[0.3679, 0.0000],
            [0.0000, 0.3679]])
    """

    most_operands = 1

    def infer_shape(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        if shapes[0][0] != shapes[0][1]:
            raise InputError(f"the operand has shape {shapes[0]}: Inverse needs a square one")
        return shapes[0]

    def combine(self, *values: Tensor) -> Tensor:
        (a,) = values
        factor, info = torch.linalg.cholesky_ex(a)
        symmetric = ((a - a.mT).abs() <= 1e-8 + 1e-5 * a.abs()).all()
        eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
        half = torch.linalg.solve_triangular(factor, eye, upper=False)
        if has_values(a):
            if not bool(symmetric):
                raise InputError("the operand of Inverse is not symmetric")
            if int(info):
                raise NotPositiveDefiniteError("the operand of Inverse is not positive definite")
            return half.mT @ half
        # On a device, or while tracing, nobody waits for the answer: what is no inverse is NaN.
        return torch.where(symmetric & (info == 0), half.mT @ half, torch.nan)

    def combine_vjp(self, cotangent: Tensor, *values: Tensor) -> list[Tensor]:
        inverse = self.combine(*values)
        return [-(inverse @ cotangent @ inverse)]

    def combine_jvp(self, index: int, tangent: Tensor, *values: Tensor) -> Tensor:
        inverse = self.combine(*values)
        return -(inverse @ tangent @ inverse)


def _scaled(term: Term, scale: Tensor) -> Term:
    """The term of a multiple of its covariance."""
    covariance = term.covariance
    return replace(term, covariance=covariance.times(scale.to(covariance.matrix)))


def _diagonal(operand: Tensor) -> Tensor:
    """The diagonal of a tensor that is an operand; of a number, the number."""
    return operand.reshape(1) if operand.numel() == 1 else operand.diagonal()
