"""Designs of rows that have several levels of one factor each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from openreml_nn.covariance.dummy import DummyMatrix
from openreml_nn.covariance.matrix import FreeParams, Matrix
from openreml_nn.covariance.nodes import has_values
from openreml_nn.support.checks import found
from openreml_nn.support.errors import InputError
from openreml_nn.terms.design import MembershipDesign

__all__ = ["MembershipMatrix"]


class MembershipMatrix(Matrix):
    r"""Design :math:`Z` of rows that have m levels of one factor each, such as an animal and its dam.

    Row i is :math:`\sum_j` of ``values[i, j]`` in the k columns of level ``codes[i, j]``, columns level by
    level. Two parents with one effect (an *overlay*) have values of one; with k = m effects, of which
    the j-th is that of the j-th level (``separate=True``), :math:`Z` with
    :math:`G = A \otimes \Sigma` has correlated direct and maternal genetic effects.

    Only codes and values are stored.

    Args:
        codes: (n, m) levels of each row, from 0; -1 for none.
        levels: names of the levels, or how many there are.
        values: (n, m) or (n, m, k) entries in place of ones.
        separate: whether each of the m has an effect of its own, in place of ``values``.

    Shape:
        Output: (n, levels · k).

    Raises:
        TypeError: if ``codes`` are no integers, or ``values`` no floating-point tensor.
        InputError: if a code is out of range, a shape does not fit, a value is not finite, or there are
            ``values`` beside ``separate``.

    Reference:
        Mrode, Linear Models for the Prediction of Animal Breeding Values (2014), chapter 7.

    >>> MembershipMatrix(torch.tensor([[2, 0], [1, 1]]), 3)()
    tensor([[1., 0., 1.],
            [0., 2., 0.]])
    >>> MembershipMatrix(torch.tensor([[2, 0]]), 3, separate=True)()
    tensor([[0., 1., 0., 0., 1., 0.]])
    """

    codes: Tensor
    like: Tensor
    values: Tensor | None

    def __init__(
        self,
        codes: Tensor,
        levels: Sequence[str] | int,
        values: Tensor | None = None,
        separate: bool = False,
    ) -> None:
        if not isinstance(codes, Tensor):
            raise TypeError(f"`codes` is {found(codes)}: expected a tensor of integers")
        if codes.dim() != 2 or not codes.numel():
            raise InputError(f"`codes` has shape {tuple(codes.shape)}: expected (n, m)")
        # Dtype, range and names are those of rows of one level.
        flat = DummyMatrix.from_codes(codes.flatten(), levels)
        n, m = codes.shape
        if separate and values is not None:
            raise InputError("`values` are given beside `separate`: expected one of them")
        values = (
            torch.eye(m, device=codes.device).expand(n, m, m)
            if separate
            else _checked(values, n, m)
        )
        self.effects = 1 if values is None else values.shape[2]
        self.levels = flat.shape[1]
        super().__init__((n, self.levels * self.effects), {})
        self._labels = None if isinstance(levels, int) else flat.labels
        self.register_buffer("like", torch.empty(0), persistent=False)
        self.register_data("codes", codes.long())
        self.register_data("values", values)

    @property
    def labels(self) -> list[str]:
        """Names of the levels."""
        return [str(i) for i in range(self.levels)] if self._labels is None else self._labels

    @property
    def design(self) -> MembershipDesign:
        """The design by its columns."""
        codes, values = self.codes, self.values
        if values is None:
            values = self.like.new_ones(*codes.shape, 1)
        return MembershipDesign(codes, values, self.levels)

    def mean_squares(self) -> Tensor:
        """Of the entries of a row in the columns of an effect, level by level: their sum, on average."""
        design = self.design
        square = design.values.detach().square().unflatten(1, (-1, self.effects)).sum(1).mean(0)
        return square.repeat(self.levels)

    def forward(self, free_params: FreeParams = None) -> Tensor:
        return self.design.dense(self.flat_params(free_params))

    def manual_grad(self, free_params: FreeParams = None) -> tuple[Tensor | None, list[str]]:
        return None, []

    @property
    def repr_dict(self) -> dict[str, Any]:
        return {"shape": self.shape}


def _checked(values: Tensor | None, n: int, m: int) -> Tensor | None:
    """Values as (n, m, k)."""
    if values is None:
        return None
    if not isinstance(values, Tensor) or not values.is_floating_point():
        got = values.dtype if isinstance(values, Tensor) else found(values)
        raise TypeError(f"`values` is {got}: expected a floating-point tensor")
    shape = tuple(values.shape)
    if shape[:2] != (n, m) or len(shape) not in (2, 3):
        raise InputError(f"`values` has shape {shape}: expected ({n}, {m}) or ({n}, {m}, k)")
    if has_values(values) and not bool(torch.isfinite(values).all()):
        raise InputError("`values` has an entry that is not finite")
    return values if len(shape) == 3 else values[:, :, None]
