"""Correlated rows whose variances are a function of a covariate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from openreml_nn.covariance.matrix import Matrix
from openreml_nn.covariance.operator import Operator
from openreml_nn.covariance.start import give_to_one
from openreml_nn.support.errors import InputError
from openreml_nn.terms.blocks import BlockCovariance
from openreml_nn.terms.covariance import DiagonalCovariance, RepeatedCovariance
from openreml_nn.terms.design import IdentityDesign, IndexedDesign
from openreml_nn.terms.products import precise, rescaled
from openreml_nn.terms.series import LONG
from openreml_nn.terms.term import Term, has_own_columns, whole_term

__all__ = ["Heteroscedastic"]


class Heteroscedastic(Operator):
    r"""A covariance with its rows and columns scaled, :math:`V = S^{1/2} M S^{1/2}`.

    With a correlation matrix for M the variances are those of S. Rows that M has in independent
    groups stay so.

    Args:
        variance: S, a Matrix or tensor (n, n) of which the diagonal counts, such as a
            :class:`VarianceFunction`.
        matrix: M, a Matrix or a tensor (n, n).

    Shape:
        Output: (n, n).

    Raises:
        InputError: if the shapes do not fit.

    Reference:
        Pinheiro and Bates, Mixed-Effects Models in S and S-PLUS (2000), eq. 5.8.

    >>> from openreml_nn.covariance import EquicorrelationMatrix, VarianceFunction
    >>> V = Heteroscedastic(
    ...     variance=VarianceFunction(torch.tensor([1.0, 4.0])), matrix=EquicorrelationMatrix(2)
    ... )
    >>> V.param_names
    ['variance/sigma^2', 'variance/delta', 'matrix/rho']
    >>> V(torch.tensor([0.0, 0.5, 0.0]))
    tensor([[1., 0.],
            [0., 4.]])
    """

    least_operands = most_operands = 2

    def _ordered(self, operands: dict[str, Any]) -> dict[str, Any]:
        names = ("variance", "matrix")
        return {n: operands[n] for n in names} if set(operands) == set(names) else operands

    def infer_shape(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        variance, matrix = shapes
        if len(set(matrix)) != 1 or variance != matrix:
            raise InputError(
                f"`variance` is {variance} and `matrix` {matrix}: Heteroscedastic needs both (n, n)"
            )
        return matrix

    def combine(self, *values: Tensor) -> Tensor:
        S, M = values
        s = _roots(S)
        return s[..., :, None] * M * s[..., None, :]

    def combine_vjp(self, cotangent: Tensor, *values: Tensor) -> list[Tensor]:
        S, M = values
        s = _roots(S)
        slope = ((cotangent * M) @ s + (cotangent * M).mT @ s) / (2 * s)
        return [torch.diag_embed(slope), s[:, None] * cotangent * s]

    def combine_jvp(self, index: int, tangent: Tensor, *values: Tensor) -> Tensor:
        S, M = values
        s = _roots(S)
        if index == 1:
            return s[:, None] * tangent * s
        t = tangent.diagonal(dim1=-2, dim2=-1) / (2 * s)
        return (t[..., :, None] * s + s[:, None] * t[..., None, :]) * M

    def structure(self) -> list[Term]:
        S, M = self.operands.values()
        found = M.terms() if isinstance(M, Matrix) else []
        if len(found) != 1:
            return [whole_term(self())]
        (term,) = found
        g = term.covariance
        is_indexed = isinstance(term.design, IndexedDesign) and has_own_columns(term.design)
        known = isinstance(g, RepeatedCovariance | DiagonalCovariance) or (
            term.design.shape[1] > LONG and precise(g) is not None
        )
        if not known or not (is_indexed or isinstance(term.design, IdentityDesign)):
            return [whole_term(self())]
        variances = _rows(S) if isinstance(S, Matrix) else S.diagonal().to(g.matrix)
        cells = variances
        if isinstance(term.design, IndexedDesign):
            # A column without a row has the mean, which tables show.
            cells = variances.mean().expand(term.design.shape[1])
            cells = cells.index_copy(0, term.design.codes, variances)
        if isinstance(g, DiagonalCovariance):
            return [Term(term.design, DiagonalCovariance(g.matrix * cells))]
        if g.is_scalar:
            return [Term(term.design, DiagonalCovariance(g.matrix.reshape(1) * cells))]
        by_precision = rescaled(g, cells.sqrt())
        if by_precision is not None:
            return [Term(term.design, by_precision)]
        s = cells.sqrt().unflatten(0, (-1, len(g.matrix)))  # (groups, k)
        return [Term(term.design, BlockCovariance(s[:, :, None] * g.matrix * s[:, None, :]))]

    def moment_start(self, variance: Tensor) -> bool:
        return give_to_one(list(self.operands.values()), [variance, variance])


def _roots(S: Tensor) -> Tensor:
    """Square roots of the diagonal."""
    return S.diagonal(dim1=-2, dim2=-1).sqrt()


def _rows(S: Matrix) -> Tensor:
    """The variances of the rows, of which (n, n) need not be formed."""
    term, *others = S.terms()
    is_diagonal = isinstance(term.covariance, DiagonalCovariance)
    if is_diagonal and isinstance(term.design, IdentityDesign) and not others:
        return term.covariance.matrix
    return S().diagonal()
