"""Propagation of a covariance through a design."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from openreml_nn.covariance.dummy import DummyMatrix
from openreml_nn.covariance.identity import DiagonalMatrix
from openreml_nn.covariance.matrix import Matrix
from openreml_nn.covariance.membership import MembershipMatrix
from openreml_nn.covariance.nodes import is_opaque
from openreml_nn.covariance.operator import Operator
from openreml_nn.covariance.start import harmonic_mean
from openreml_nn.support.errors import InputError
from openreml_nn.terms.covariance import DenseCovariance
from openreml_nn.terms.design import DenseDesign, Design, IdentityDesign
from openreml_nn.terms.products import rescaled
from openreml_nn.terms.series import LONG
from openreml_nn.terms.term import Term, propagate, whole_term

__all__ = ["CovariancePropagation", "propagated"]

#: A sum of more columns than these stays one of its terms: as one matrix it would lose their
#: structure.
_MOST_COLUMNS = 256


class CovariancePropagation(Operator):
    r"""Covariance of :math:`Z b` for :math:`b \sim N(0, G)`: :math:`V = Z G Z^\top`.

    The pull-back of a cotangent :math:`\bar V` is

    .. math::
        \bar G = Z^\top \bar V Z, \qquad \bar Z = (\bar V + \bar V^\top) Z G
        \quad (G \text{ symmetric}).

    With a :class:`DummyMatrix` for Z all products are gathers and
    scatter-adds: :math:`V_{ij} = G_{c(i) c(j)}`.

    Args:
        z: the design, a Matrix or a tensor (n, q).
        g: the covariance, a Matrix or a tensor (q, q).

    Shape:
        Output: (n, n).

    Raises:
        InputError: if the shapes do not fit.

    Reference:
        Searle, Casella and McCulloch, Variance Components (1992), eq. 6.2.

    >>> from openreml_nn.covariance import DiagonalMatrix, DummyMatrix
    >>> V = CovariancePropagation(z=DummyMatrix(["a", "b", "a"]), g=DiagonalMatrix(2))
    >>> V.param_names
    ['g/sigma^2_0', 'g/sigma^2_1']
    >>> V(torch.tensor([0.0, 0.5]))
    tensor([[1.0000, 0.0000, 1.0000],
            [0.0000, 2.7183, 0.0000],
            [1.0000, 0.0000, 1.0000]])
    """

    least_operands = most_operands = 2

    def _ordered(self, operands: dict[str, Any]) -> dict[str, Any]:
        # By keyword they may come in either order.
        return {n: operands[n] for n in ("z", "g")} if set(operands) == {"z", "g"} else operands

    def infer_shape(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        (n, q), g = shapes
        if g != (q, q):
            raise InputError(
                f"`z` has {q} columns but `g` is {g[0]} x {g[1]}: "
                "CovariancePropagation needs Z (n, q) and G (q, q)"
            )
        return n, n

    def formed_operands(self) -> list[bool]:
        return [self._one_hot() is None, True]

    def _one_hot(self) -> DummyMatrix | MembershipMatrix | None:
        """Z where it is known by level codes and need not be formed."""
        z = self._modules.get(next(iter(self.operand_keys.values())))
        if not isinstance(z, DummyMatrix | MembershipMatrix) or is_opaque(z):
            return None
        forwards = DummyMatrix.forward, MembershipMatrix.forward
        return z if type(z).forward in forwards else None

    def _design(self, z: Tensor | None) -> Design:
        if z is not None:
            return DenseDesign(z)
        one_hot = self._one_hot()
        assert one_hot is not None
        return one_hot.design

    def combine(self, *values: Any) -> Tensor:
        """The result from Z and G; None for a Z that is known by its level codes."""
        z, g = values
        return _sandwich(self._design(z), g)

    def combine_vjp(self, cotangent: Tensor, *values: Any) -> list[Tensor | None]:
        z, g = values
        design = self._design(z)
        g_bar = design.t_matmul(design.t_matmul(cotangent).mT).mT
        first = next(iter(self.operands.values()))
        if z is None or not isinstance(first, Matrix) or not first.num_free_params:
            return [None, g_bar]
        z_bar = cotangent @ (z @ g.mT) + cotangent.mT @ (z @ g)
        return [z_bar, g_bar]

    def combine_jvp(self, index: int, tangent: Tensor, *values: Any) -> Tensor:
        z, g = values
        if index == 1:
            return _sandwich(self._design(z), tangent)
        return tangent @ g @ z.mT + z @ g @ tangent.mT

    def structure(self) -> list[Term]:
        z, g = self.operands.values()
        if isinstance(z, DiagonalMatrix):
            # A scale for each row and column is part of the covariance, not a design.
            return [self._scaled(z, g)]
        one_hot = self._one_hot()
        design = DenseDesign(self.build_design()) if one_hot is None else one_hot.design
        if isinstance(g, Matrix):
            return propagated(design, g)
        return [propagate(design, whole_term(g.to(self.no_values())))]

    def _scaled(self, z: DiagonalMatrix, g: Any) -> Term:
        """The term where Z is a scale for each row and column."""
        found = g.terms() if isinstance(g, Matrix) else []
        if len(found) == 1 and isinstance(found[0].design, IdentityDesign):
            inner, n = found[0].covariance, self.shape[0]
            if n > LONG:
                by_precision = rescaled(inner, z.build_params())
                if by_precision is not None:
                    return Term(IdentityDesign(n), by_precision)
            elif inner.is_chained and inner.is_solid:
                return Term(IdentityDesign(n), DenseCovariance(self(), chained=True))
        return whole_term(self())

    def variances(self) -> Tensor:
        z, g = self.operands.values()
        if isinstance(z, DiagonalMatrix) and isinstance(g, Matrix):
            return z.build_params() ** 2 * g.variances()
        return super().variances()

    def build_design(self) -> Tensor:
        """Z itself, (n, q)."""
        z, like = next(iter(self.operands.values())), self.no_values()
        if isinstance(z, Tensor):
            return z.to(like)
        return z() if z.num_free_params else z(like)

    def moment_start(self, variance: Tensor) -> bool:
        z, g = self.operands.values()
        if isinstance(z, MembershipMatrix):
            square = z.mean_squares().to(variance)
        elif isinstance(z, DummyMatrix):
            # Every level's column of an effect has the scale of the effect's covariate.
            values = z.values()
            square = variance.new_ones(1) if values is None else (values.detach() ** 2).mean(0)
            square = square.to(variance).repeat(z.design.levels)
        else:
            with torch.no_grad():
                dense = (z() if isinstance(z, Matrix) else z).detach().to(variance)
            # The columns add up to one row's variance: each has its share, in its own unit.
            square = (dense**2).mean(0) * dense.shape[1]
        share = harmonic_mean(variance) / torch.where(square > 0, square, 1)
        if isinstance(g, Matrix) and g.num_free_params and g.moment_start(share) is not False:
            return True
        # No scale in G: it is in Z, if anywhere.
        return super().moment_start(variance)


def propagated(design: Design, g: Matrix, dtype: torch.dtype | None = None) -> list[Term]:
    r"""The terms of :math:`Z G Z^\top`, with ``dtype`` as :meth:`Matrix.terms` takes it."""
    found = g.terms(None, dtype)
    if len(found) == 1 and isinstance(found[0].design, IdentityDesign):
        return [Term(design, found[0].covariance, known=found[0].known)]
    if len(found) > 1 and g.shape[0] <= _MOST_COLUMNS:
        # One random effect, whose covariance is a sum.
        with nullcontext() if dtype is None else g.computed_in(dtype):
            found = [whole_term(g())]
    if len(found) == 1:
        found = [replace(found[0], name="")]
    return [propagate(design, term) for term in found]


def _sandwich(design: Design, g: Tensor) -> Tensor:
    """Z G Z' for one G, or for several stacked in front."""
    if g.dim() == 2:
        return design.matmul(design.matmul(g.mT).mT)  # Z (Z G')'
    m, q, _ = g.shape
    n = design.shape[0]
    half = design.matmul(g.movedim(0, 1).reshape(q, m * q))  # Z G of each, (n, m * q)
    whole = design.matmul(half.reshape(n, m, q).movedim(2, 0).reshape(q, n * m))
    return whole.reshape(n, n, m).movedim((0, 1, 2), (2, 1, 0))
