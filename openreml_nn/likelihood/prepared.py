"""A problem with the data that it was prepared for, to know when it can be used again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from openreml_nn.likelihood.problem import Problem
from openreml_nn.terms.kernel import same_content

__all__ = ["Prepared"]


@dataclass(frozen=True)
class Prepared:
    """A problem with private copies of the data, and of the other constants, that it was
    prepared for.

    Contents are compared and not identities, because memory also changes through NumPy,
    through ``.data`` and by loading a state, of which a tensor's version does not tell.
    """

    data: tuple[Tensor, Tensor] | None
    forms: list[tuple[object, ...]]
    constants: list[Tensor | None]
    options: tuple[object, ...]
    problem: Problem

    def has_seen(self, y: Tensor, X: Tensor) -> bool:
        """Whether the data are those that it was prepared for, and have no graph."""
        if self.data is None or not (isinstance(y, Tensor) and isinstance(X, Tensor)):
            return False
        return not (y.requires_grad or X.requires_grad) and _all_same([y, X], self.data)

    def is_of(
        self,
        forms: Sequence[tuple[object, ...]],
        constants: Sequence[Tensor | None],
        options: tuple[object, ...],
        dtype: torch.dtype,
    ) -> bool:
        """Whether it was prepared for terms of the same forms, designs, kernels and rows, by the
        same method and solver."""
        problem = self.problem
        if problem.fixed.y.dtype != dtype or self.options != options or self.forms != forms:
            return False
        return _all_same(constants, self.constants)


def _all_same(tensors: Sequence[Tensor | None], kept: Sequence[Tensor | None]) -> bool:
    return len(tensors) == len(kept) and all(map(same_content, tensors, kept))
