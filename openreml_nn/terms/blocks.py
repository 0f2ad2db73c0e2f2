r"""Covariances of independent groups of effects, of which each has a matrix of its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from openreml_nn.terms.base import Covariance, LinearCovariance, condition, square_root

__all__ = ["BlockCovariance"]


@dataclass(frozen=True)
class BlockCovariance(LinearCovariance):
    r""":math:`G = \mathrm{diag}(\Sigma_1, \dots, \Sigma_q)` with ``matrix`` the blocks (q, k, k)."""

    @property
    def block(self) -> int:
        return self.matrix.shape[-1]

    width = block

    def shown(self, effects: int = 1) -> Tensor:
        return self.matrix.mean(0)

    def places(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        # Columns of different blocks never share entries, so that a position is of all columns.
        return codes // self.block, codes

    def among(self, at: Tensor, joint: Tensor) -> Tensor:
        own, place = at // self.block, at % self.block
        return joint * self.matrix[own[..., :, None], place[..., :, None], place[..., None, :]]

    def multiply(self, x: Tensor, transpose: bool = False) -> Tensor:
        matrix = self.matrix.mT if transpose else self.matrix
        return (matrix @ x.reshape(*matrix.shape[:2], -1)).reshape(x.shape)

    def root(self) -> Covariance:
        return BlockCovariance(torch.stack([square_root(block) for block in self.matrix]))

    def root_condition(self) -> float:
        return max(condition(block) for block in self.matrix)

    def fold(self, cotangent: Tensor) -> Tensor:
        q, k = self.matrix.shape[:2]
        return cotangent.reshape(q, k, q, k).diagonal(dim1=0, dim2=2).movedim(-1, 0)

    def blocks(self, levels: int, effects: int) -> Tensor:
        k = self.block
        if k == effects:
            return self.matrix
        several = self.matrix.unflatten(0, (levels, effects // k))
        eye = torch.eye(effects // k, dtype=self.matrix.dtype, device=self.matrix.device)
        return torch.einsum("ij,liab->liajb", eye, several).reshape(levels, effects, effects)

    def fold_blocks(self, cotangent: Tensor) -> Tensor:
        levels, effects, k = *cotangent.shape[:2], self.block
        if k == effects:
            return cotangent
        four = cotangent.reshape(levels, effects // k, k, effects // k, k)
        return four.diagonal(dim1=1, dim2=3).movedim(-1, 1).flatten(0, 1)
