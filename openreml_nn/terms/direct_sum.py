r"""Covariances of independent parts, each of a structure and a size of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from openreml_nn.terms.base import Covariance, condition
from openreml_nn.terms.covariance import DenseCovariance
from openreml_nn.terms.series import is_series

__all__ = ["DirectSumCovariance"]


@dataclass(frozen=True)
class DirectSumCovariance(Covariance):
    r""":math:`G = \mathrm{diag}(G_1, \dots, G_m)`, such as a field for each of several trials.

    ``matrix`` holds the entries of the parts, one after the other.

    Attributes:
        forms: the parts; their own entries are not looked at.
        sizes: columns of each.
    """

    forms: tuple[Covariance, ...] = ()
    sizes: tuple[int, ...] = ()

    @classmethod
    def of(cls, parts: Sequence[Covariance], sizes: Sequence[int]) -> DirectSumCovariance:
        """From the parts and the columns of each."""
        entries = torch.cat([part.matrix.reshape(-1) for part in parts])
        return cls(entries, tuple(part.map(Tensor.detach) for part in parts), tuple(sizes))

    def parts(self) -> list[Covariance]:
        """The parts with their entries."""
        pieces = self.matrix.split([form.matrix.numel() for form in self.forms])
        return [
            form.with_matrix(piece.reshape(form.matrix.shape))
            for form, piece in zip(self.forms, pieces, strict=True)
        ]

    @property
    def form(self) -> tuple[object, ...]:
        return *super().form, self.sizes, tuple(form.form for form in self.forms)

    @property
    def constants(self) -> list[Tensor | None]:
        return [constant for form in self.forms for constant in form.constants]

    def private(self) -> Covariance:
        forms = tuple(form.private() for form in self.forms)
        return DirectSumCovariance(self.matrix, forms, self.sizes)

    def with_matrix(self, matrix: Tensor) -> DirectSumCovariance:
        return DirectSumCovariance(matrix, self.forms, self.sizes)

    def times(self, scale: Tensor) -> DirectSumCovariance:
        return self.of([part.times(scale) for part in self.parts()], self.sizes)

    @property
    def is_chained(self) -> bool:
        return all(form.is_chained or is_series(form) for form in self.forms)

    def shown(self, effects: int = 1) -> Tensor:
        """The mean variance, (1, 1)."""
        sizes = self.matrix.new_tensor(self.sizes)
        means = torch.stack([part.shown().diagonal().mean() for part in self.parts()])
        return ((means * sizes).sum() / sizes.sum()).reshape(1, 1)

    def multiply(self, x: Tensor, transpose: bool = False) -> Tensor:
        pairs = zip(self.parts(), x.split(list(self.sizes)), strict=True)
        return torch.cat([part.multiply(own, transpose) for part, own in pairs])

    def along(self, derivative: Tensor, x: Tensor) -> Tensor:
        moved = self.with_matrix(derivative).parts()
        found = []
        for part, d, own in zip(self.parts(), moved, x.split(list(self.sizes)), strict=True):
            still = not bool(d.matrix.any())  # as most are: a parameter is one part's
            found.append(torch.zeros_like(own) if still else part.along(d.matrix, own))
        return torch.cat(found)

    def whole(self, size: int) -> Tensor:
        pairs = zip(self.parts(), self.sizes, strict=True)
        return torch.block_diag(*(part.whole(own) for part, own in pairs))

    def root(self) -> Covariance:
        pairs = zip(self.parts(), self.sizes, strict=True)
        return DenseCovariance(torch.block_diag(*(part.root().whole(own) for part, own in pairs)))

    def root_condition(self) -> float:
        pairs = zip(self.parts(), self.sizes, strict=True)
        return max(condition(part.whole(own)) for part, own in pairs)

    def fold(self, cotangent: Tensor) -> Tensor:
        found, start = [], 0
        for part, size in zip(self.parts(), self.sizes, strict=True):
            own = slice(start, start + size)
            found.append(part.fold(cotangent[own, own]).reshape(-1))
            start += size
        return torch.cat(found)

    def inner(self, folded: Tensor) -> Tensor:
        parts = self.parts()
        pieces = folded.split([part.matrix.numel() for part in parts])
        found = [
            part.inner(piece.reshape(part.matrix.shape))
            for part, piece in zip(parts, pieces, strict=True)
        ]
        return torch.stack([x.reshape(()) for x in found]).sum()
