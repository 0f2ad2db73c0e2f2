"""Propagation of a covariance through a design."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from openreml_nn.covariance.design import DenseDesign, Design
from openreml_nn.covariance.dummy import DummyMatrix
from openreml_nn.covariance.identity import DiagonalMatrix
from openreml_nn.covariance.matrix import FreeParams, Matrix
from openreml_nn.covariance.operator import Operator
from openreml_nn.covariance.start import harmonic_mean
from openreml_nn.covariance.terms import Term, propagate, whole_term

__all__ = ["CovariancePropagation"]

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
        ValueError: if the shapes do not fit.

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

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if len(args) == 2 and not kwargs:
            kwargs, args = {"z": args[0], "g": args[1]}, ()
        super().__init__(*args, **kwargs)

    def _infer_shape(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        (n, q), g = shapes
        if g != (q, q):
            raise ValueError(
                f"`z` has {q} columns but `g` is {g[0]} x {g[1]}: "
                "CovariancePropagation needs Z (n, q) and G (q, q)"
            )
        return n, n

    def _design(self, z: Tensor) -> Design:
        first = next(iter(self.operands.values()))
        return first.design if isinstance(first, DummyMatrix) else DenseDesign(z)

    def forward(self, free_params: FreeParams = None) -> Tensor:
        return self.combine(self._evaluated(free_params))

    def _evaluated(self, free_params: FreeParams) -> list[Tensor]:
        """Operands, but nothing in the place of a one-hot Z, which is never formed."""
        built: list[Tensor] = []
        for name, operand in self._typed_operands(free_params).items():
            if isinstance(operand, DummyMatrix) and not built:
                built.append(torch.empty(0))
            elif isinstance(operand, Matrix):
                built.append(operand(self._sub(name, free_params)))
            else:
                built.append(operand)
        return built

    def combine(self, operands: Sequence[Tensor]) -> Tensor:
        z, g = operands
        return _sandwich(self._design(z), g)

    def combine_vjp(self, cotangent: Tensor, operands: Sequence[Tensor]) -> list[Tensor]:
        z, g = operands
        design = self._design(z)
        g_bar = design.t_matmul(design.t_matmul(cotangent).mT).mT
        if not isinstance(design, DenseDesign):
            return [z, g_bar]
        z_bar = cotangent @ (z @ g.mT) + cotangent.mT @ (z @ g)
        return [z_bar, g_bar]

    def combine_jvp(self, index: int, tangent: Tensor, operands: Sequence[Tensor]) -> Tensor:
        z, g = operands
        if index == 1:
            return _sandwich(self._design(z), tangent)
        return tangent @ g @ z.mT + z @ g @ tangent.mT

    def terms(self, rows: Tensor | None = None, free_params: FreeParams = None) -> list[Term]:
        operands = list(self._typed_operands(free_params).items())
        (z_name, z), (g_name, g) = operands
        if isinstance(z, DiagonalMatrix):
            # A scale for each row and column is part of the covariance, not a design.
            return [whole_term(self(free_params)).take(rows)]
        if isinstance(z, DummyMatrix):
            design: Design = z.design
        else:
            design = DenseDesign(z(self._sub(z_name, free_params)) if isinstance(z, Matrix) else z)
        if isinstance(g, Matrix):
            found = g.terms(None, self._sub(g_name, free_params))
            if len(found) > 1 and g.shape[0] <= _MOST_COLUMNS:
                # One random effect, whose covariance is a sum.
                found = [whole_term(g(self._sub(g_name, free_params)))]
        else:
            found = [whole_term(g)]
        if len(found) == 1:
            found = [replace(found[0], name="")]
        return [propagate(design, term).take(rows) for term in found]

    def moment_start(self, variance: Tensor) -> bool:
        z, g = self.operands.values()
        if isinstance(z, DummyMatrix):
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


def _sandwich(design: Design, g: Tensor) -> Tensor:
    """Z G Z' for one G, or for several stacked in front."""
    if g.dim() == 2:
        return design.matmul(design.matmul(g.mT).mT)  # Z (Z G')'
    m, q, _ = g.shape
    n = design.shape[0]
    half = design.matmul(g.movedim(0, 1).reshape(q, m * q))  # Z G of each, (n, m * q)
    whole = design.matmul(half.reshape(n, m, q).movedim(2, 0).reshape(q, n * m))
    return whole.reshape(n, n, m).movedim((0, 1, 2), (2, 1, 0))
