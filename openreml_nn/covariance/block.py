"""Matrices put together from blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from openreml_nn.covariance.matrix import Matrix
from openreml_nn.covariance.operator import Operator
from openreml_nn.support.errors import InputError
from openreml_nn.terms.base import Covariance
from openreml_nn.terms.covariance import DiagonalCovariance
from openreml_nn.terms.design import Design, IdentityDesign, IndexedDesign
from openreml_nn.terms.direct_sum import DirectSumCovariance
from openreml_nn.terms.products import precise
from openreml_nn.terms.series import LONG
from openreml_nn.terms.term import Term

__all__ = ["Augment", "BlockDiagonal", "Stack"]


class _Blocks(Operator):
    """Operands at their places in a larger matrix of zeros."""

    linear = True

    def _corners(self, shapes: Sequence[tuple[int, ...]]) -> list[tuple[int, int]]:
        """Row and column of the upper left entry of each operand."""
        raise NotImplementedError

    def combine_vjp(self, cotangent: Tensor, *values: Tensor) -> list[Tensor]:
        corners = self._corners(self.operand_shapes)
        return [
            cotangent[i : i + n, j : j + m]
            for (i, j), (n, m) in zip(corners, self.operand_shapes, strict=True)
        ]

    def combine_jvp(self, index: int, tangent: Tensor, *values: Tensor) -> Tensor:
        i, j = self._corners(self.operand_shapes)[index]
        rows, columns = self.shape
        n, m = self.operand_shapes[index]
        return torch.nn.functional.pad(tangent, (j, columns - j - m, i, rows - i - n))


class BlockDiagonal(_Blocks):
    r"""Block-diagonal matrix :math:`V = \mathrm{diag}(A_0, A_1, \dots)`.

    Args:
        *args: operands; or a dict of them, or keyword arguments.

    Shape:
        Operands (nᵢ, mᵢ); output (∑ nᵢ, ∑ mᵢ).

    >>> from openreml_nn.covariance import EqualEntryMatrix, ScalarMatrix
    >>> BlockDiagonal(EqualEntryMatrix(2), ScalarMatrix(1))(torch.tensor([0.0, 0.5]))
    tensor([[1.0000, 1.0000, 0.0000],
            [1.0000, 1.0000, 0.0000],
            [0.0000, 0.0000, 2.7183]])
    """

    def infer_shape(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        return sum(s[0] for s in shapes), sum(s[1] for s in shapes)

    def _corners(self, shapes: Sequence[tuple[int, ...]]) -> list[tuple[int, int]]:
        corners = [(0, 0)]
        for n, m in shapes[:-1]:
            corners.append((corners[-1][0] + n, corners[-1][1] + m))
        return corners

    def combine(self, *values: Tensor) -> Tensor:
        return torch.block_diag(*values)

    def structure(self) -> list[Term]:
        found = list(self.lowered().values())
        designs = [each[0].design for each in found if len(each) == 1]
        joined = _joined(designs, self.no_values().device) if len(designs) == len(found) else None
        if joined is None:
            return super().structure()
        parts = [each[0].covariance for each in found]
        sizes = [design.shape[1] for design in designs]
        if not all(part.is_diagonal for part in parts):
            g: Covariance = DirectSumCovariance.of(parts, sizes)
            if not g.is_chained and sum(sizes) > LONG:
                g = precise(g) or g
            return [Term(joined, g)]
        pairs = zip(parts, sizes, strict=True)
        variances = torch.cat([_variances(part, size) for part, size in pairs])
        return [Term(joined, DiagonalCovariance(variances))]

    def moment_start(self, variance: Tensor) -> bool:
        parts = variance.split([operand.shape[0] for operand in self.operands.values()])
        took = [
            operand.moment_start(part) is not False
            for operand, part in zip(self.operands.values(), parts, strict=True)
            if isinstance(operand, Matrix)
        ]
        return any(took)


def _indexed(design: Design, device: torch.device) -> Design:
    if not isinstance(design, IdentityDesign):
        return design
    return design.take(torch.arange(design.shape[0], device=device))


def _joined(designs: Sequence[Design], device: torch.device) -> Design | None:
    """The designs of blocks as one; None where one of them has several effects a level."""
    if all(isinstance(design, IdentityDesign) for design in designs):
        return IdentityDesign(sum(design.shape[0] for design in designs))
    codes, values, levels = [], [], 0
    for design in designs:
        own = _indexed(design, device)
        if not isinstance(own, IndexedDesign) or own.effects > 1:
            return None
        codes.append(own.codes + levels)
        values.append(own.values)
        levels += own.levels
    if all(value is None for value in values):
        return IndexedDesign(torch.cat(codes), None, levels, absent=False)
    like = next(value for value in values if value is not None)
    every = [
        like.new_ones(len(code), 1) if value is None else value.to(like)
        for code, value in zip(codes, values, strict=True)
    ]
    return IndexedDesign(torch.cat(codes), torch.cat(every), levels, absent=False)


def _variances(g: Covariance, size: int) -> Tensor:
    """The diagonal of a covariance that is diagonal, (size,)."""
    if g.is_scalar:
        return g.matrix.reshape(1).expand(size)
    return g.matrix if isinstance(g, DiagonalCovariance) else g.whole(size).diagonal()


class Augment(_Blocks):
    r"""Operands side by side, :math:`V = [A_0 \mid A_1 \mid \cdots]`.

    Args:
        *args: operands; or a dict of them, or keyword arguments.

    Shape:
        Operands (n, mᵢ); output (n, ∑ mᵢ).

    Raises:
        InputError: if the numbers of rows differ.

    >>> from openreml_nn.covariance import EqualEntryMatrix
    >>> Augment(EqualEntryMatrix(1, 2), torch.zeros(1, 1))(torch.tensor([0.0]))
    tensor([[1., 1., 0.]])
    """

    def infer_shape(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        if len({s[0] for s in shapes}) != 1:
            raise InputError(f"operands have shapes {list(shapes)}: Augment needs as many rows")
        return shapes[0][0], sum(s[1] for s in shapes)

    def _corners(self, shapes: Sequence[tuple[int, ...]]) -> list[tuple[int, int]]:
        return [(0, sum(s[1] for s in shapes[:i])) for i in range(len(shapes))]

    def combine(self, *values: Tensor) -> Tensor:
        return torch.cat(values, 1)


class Stack(_Blocks):
    r"""Operands on top of each other.

    Args:
        *args: operands; or a dict of them, or keyword arguments.

    Shape:
        Operands (nᵢ, m); output (∑ nᵢ, m).

    Raises:
        InputError: if the numbers of columns differ.

    >>> from openreml_nn.covariance import EqualEntryMatrix
    >>> Stack(EqualEntryMatrix(1, 2), torch.zeros(1, 2))(torch.tensor([0.0]))
    tensor([[1., 1.],
            [0., 0.]])
    """

    def infer_shape(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        if len({s[1] for s in shapes}) != 1:
            raise InputError(f"operands have shapes {list(shapes)}: Stack needs as many columns")
        return sum(s[0] for s in shapes), shapes[0][1]

    def _corners(self, shapes: Sequence[tuple[int, ...]]) -> list[tuple[int, int]]:
        return [(sum(s[0] for s in shapes[:i]), 0) for i in range(len(shapes))]

    def combine(self, *values: Tensor) -> Tensor:
        return torch.cat(values, 0)
