"""Products of matrices, and what is made of one matrix: transpose, Gram matrix, inverse."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from openreml_nn.covariance.operator import Operator
from openreml_nn.covariance.start import give_to_one

__all__ = ["Gram", "HadamardProduct", "Inverse", "Product", "Transpose"]


class Product(Operator):
    r"""Matrix product :math:`V = A_0 A_1 \cdots`.

    Args:
        *args: two operands or more; or a dict of them, or keyword arguments.

    Shape:
        Operands (n₀, n₁), (n₁, n₂), …; output (n₀, last).

    Raises:
        ValueError: if neighbours do not fit.

    >>> from openreml_nn.covariance import LowerTriangularMatrix
    >>> V = Product(LowerTriangularMatrix(2, 2), torch.eye(2))
    >>> V(torch.tensor([1.0, 2.0, 3.0]))
    tensor([[1., 0.],
            [2., 3.]])
    """

    least_operands = 2

    def _infer_shape(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        for i, (a, b) in enumerate(pairwise(shapes)):
            if a[1] != b[0]:
                raise ValueError(
                    f"operand {i} has {a[1]} columns but operand {i + 1} has {b[0]} rows: "
                    "Product needs as many"
                )
        return shapes[0][0], shapes[-1][1]

    def combine(self, operands: Sequence[Tensor]) -> Tensor:
        return reduce(torch.matmul, operands)

    def combine_vjp(self, cotangent: Tensor, operands: Sequence[Tensor]) -> list[Tensor]:
        # The cotangent of A_i is L' C R' with L and R the products to its left and right.
        right = [cotangent]
        for operand in reversed(operands[1:]):
            right.append(right[-1] @ operand.mT)
        pulled = []
        left: Tensor | None = None
        for operand, part in zip(operands, reversed(right), strict=True):
            pulled.append(part if left is None else left.mT @ part)
            left = operand if left is None else left @ operand
        return pulled

    def combine_jvp(self, index: int, tangent: Tensor, operands: Sequence[Tensor]) -> Tensor:
        return reduce(torch.matmul, [*operands[:index], tangent, *operands[index + 1 :]])


class HadamardProduct(Operator):
    r"""Entrywise product :math:`V = A_0 \odot A_1 \odot \cdots`.

    Args:
        *args: two operands or more; or a dict of them, or keyword arguments.

    Shape:
        Operands and output: (n, m).

    Raises:
        ValueError: if the shapes differ.

    >>> from openreml_nn.covariance import EqualEntryMatrix
    >>> HadamardProduct(EqualEntryMatrix(2), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))(
    ...     torch.tensor([0.0])
    ... )
    tensor([[1., 2.],
            [3., 4.]])
    """

    least_operands = 2

    def _infer_shape(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        if len(set(shapes)) != 1:
            raise ValueError(f"operands have shapes {list(shapes)}: HadamardProduct needs one")
        return shapes[0]

    def combine(self, operands: Sequence[Tensor]) -> Tensor:
        return reduce(torch.mul, operands)

    def combine_vjp(self, cotangent: Tensor, operands: Sequence[Tensor]) -> list[Tensor]:
        # No division by an operand, which may have zeros.
        return [self.combine_jvp(i, cotangent, operands) for i in range(len(operands))]

    def combine_jvp(self, index: int, tangent: Tensor, operands: Sequence[Tensor]) -> Tensor:
        return reduce(torch.mul, [*operands[:index], tangent, *operands[index + 1 :]])

    def moment_start(self, variance: Tensor) -> bool:
        operands = list(self.operands.values())
        known = [operand for operand in operands if isinstance(operand, Tensor)]
        # What the known operands multiply the variance by.
        size = reduce(
            torch.mul, [t.diagonal().to(variance) for t in known], torch.ones_like(variance)
        )
        share = variance / torch.where(size > 0, size, 1)
        return give_to_one(operands, [share] * len(operands))


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

    def _infer_shape(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        return shapes[0][1], shapes[0][0]

    def combine(self, operands: Sequence[Tensor]) -> Tensor:
        return operands[0].mT

    def combine_vjp(self, cotangent: Tensor, operands: Sequence[Tensor]) -> list[Tensor]:
        return [cotangent.mT]

    def combine_jvp(self, index: int, tangent: Tensor, operands: Sequence[Tensor]) -> Tensor:
        return tangent.mT


class Gram(Operator):
    r"""Gram matrix :math:`V = X^\top X` (``"xtx"``) or :math:`V = X X^\top` (``"xxt"``).

    Args:
        *args: one operand X; or a dict of it, or a keyword argument.
        gram_type: ``"xtx"`` or ``"xxt"``.

    Shape:
        Operand (n, m); output (m, m) for ``"xtx"``, (n, n) for ``"xxt"``.

    Raises:
        ValueError: if ``gram_type`` is something else.

    >>> from openreml_nn.covariance import LowerTriangularMatrix
    >>> Gram(LowerTriangularMatrix(2, 2), gram_type="xxt")(torch.tensor([1.0, 2.0, 3.0]))
    tensor([[ 1.,  2.],
            [ 2., 13.]])
    """

    most_operands = 1

    def __init__(self, *args: Any, gram_type: str = "xtx", **kwargs: Any) -> None:
        if gram_type not in ("xtx", "xxt"):
            raise ValueError(f"`gram_type` is {gram_type!r}: expected 'xtx' or 'xxt'")
        self.gram_type = gram_type
        super().__init__(*args, **kwargs)

    def _left(self, x: Tensor) -> Tensor:
        """X of :math:`X X^\\top`, whichever way it is written."""
        return x if self.gram_type == "xxt" else x.mT

    def _infer_shape(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        size = shapes[0][0] if self.gram_type == "xxt" else shapes[0][1]
        return size, size

    def combine(self, operands: Sequence[Tensor]) -> Tensor:
        left = self._left(operands[0])
        return left @ left.mT

    def combine_vjp(self, cotangent: Tensor, operands: Sequence[Tensor]) -> list[Tensor]:
        return [self._left((cotangent + cotangent.mT) @ self._left(operands[0]))]

    def combine_jvp(self, index: int, tangent: Tensor, operands: Sequence[Tensor]) -> Tensor:
        half = self._left(tangent) @ self._left(operands[0]).mT
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
        ValueError: if the operand is not square; by calling it, if it is not
            symmetric and positive definite.

    >>> from openreml_nn.covariance import ScalarMatrix
    >>> Inverse(ScalarMatrix(2))(torch.tensor([0.5]))
    tensor([[0.3679, 0.0000],
            [0.0000, 0.3679]])
    """

    most_operands = 1

    def _infer_shape(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        if shapes[0][0] != shapes[0][1]:
            raise ValueError(f"the operand has shape {shapes[0]}: Inverse needs a square one")
        return shapes[0]

    def combine(self, operands: Sequence[Tensor]) -> Tensor:
        (a,) = operands
        factor, info = torch.linalg.cholesky_ex(a)
        if not torch._C._functorch.is_functorch_wrapped_tensor(a):
            if not torch.allclose(a, a.mT):
                raise ValueError("the operand of Inverse is not symmetric")
            if int(info):
                raise ValueError("the operand of Inverse is not positive definite")
        eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
        half = torch.linalg.solve_triangular(factor, eye, upper=False)
        return half.mT @ half

    def combine_vjp(self, cotangent: Tensor, operands: Sequence[Tensor]) -> list[Tensor]:
        inverse = self.combine(operands)
        return [-(inverse @ cotangent @ inverse)]

    def combine_jvp(self, index: int, tangent: Tensor, operands: Sequence[Tensor]) -> Tensor:
        inverse = self.combine(operands)
        return -(inverse @ tangent @ inverse)
