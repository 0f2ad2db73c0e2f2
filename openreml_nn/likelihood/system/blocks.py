"""Products and solves with small blocks, one for each level: single numbers are far faster as such."""

from __future__ import annotations

from torch import Tensor
from torch.linalg import solve_triangular

__all__ = ["block_solve", "block_times"]


def block_times(block: Tensor, x: Tensor) -> Tensor:
    """Block by block :math:`B x`, for blocks (levels or 1, k, k) and x (levels or 1, k, m)."""
    return block * x if block.shape[-1] == 1 else block @ x


def block_solve(C: Tensor, x: Tensor, transpose: bool = False) -> Tensor:
    r"""Block by block :math:`C^{-1} x`, or :math:`C^{-\top} x`, for lower triangles C and x of the same
    shapes."""
    if C.shape[-1] == 1:
        return x / C
    return solve_triangular(C.mT if transpose else C, x, upper=transpose)
