"""Starting values that follow the units of the data, for matrices of any make."""

from __future__ import annotations

from collections.abc import Sequence
from math import log, prod

import torch
from torch import Tensor

from openreml_nn.covariance.nodes import TreeNode

__all__ = ["give_to_one", "harmonic_mean", "rescale"]

#: The Jacobian of a matrix that is scaled by its entries may hold this many numbers.
_MOST_NUMBERS = 5e7


def harmonic_mean(variance: Tensor, dim: list[int] | None = None) -> Tensor:
    r"""The variance that all entries share so that the sum of :math:`x_j^2 v` follows the units.

    Where entry j is :math:`v / x_j^2` for columns of unlike units, the
    harmonic mean of m entries is :math:`m v / \sum_j x_j^2`, whatever the units.
    """
    if dim is None:
        return 1 / (1 / variance).mean()
    return 1 / (1 / variance).mean(dim)


def give_to_one(operands: Sequence[TreeNode | Tensor], shares: Sequence[Tensor]) -> bool:
    """Start the operands of a product: one takes the variance, the others keep the scale 1.

    Args:
        operands: in the order in which they are asked, last first.
        shares: the variance for each if it takes it, of as many rows.

    Returns:
        Whether one of them has a free scale, and so could.
    """
    taken = False
    for operand, share in reversed(list(zip(operands, shares, strict=True))):
        if isinstance(operand, TreeNode) and operand.num_free_params:
            took = operand.moment_start(torch.ones_like(share) if taken else share)
            taken = taken or took is not False
    return taken


def rescale(matrix: TreeNode, variance: float) -> bool:
    r"""Multiply a matrix by a number, so that its diagonal is ``variance`` on average.

    Whichever of its free parameters can do so move: on the path
    :math:`V(\theta_s) = s\,V(\theta_0)` from s = 1 on, by Gauss-Newton steps on
    all entries, so that nobody need say what the parameters mean. From
    :math:`V(\theta_0) = 0` there is no such path; then one step is made
    towards ``variance`` on the diagonal and zero off it.

    Returns:
        Whether the path exists; if not, the parameters stay.
    """
    everything = matrix.parameter_entries().free
    moves = torch.tensor([e.tensor.requires_grad for e in everything], dtype=torch.bool)
    if not bool(moves.any()) or int(moves.sum()) * prod(matrix.shape) > _MOST_NUMBERS:
        return False
    with torch.no_grad():
        x = torch.cat([e.tensor.detach() for e in everything]).double()
        origin = matrix(x)
        size = float(origin.diagonal().mean())
        if not bool(torch.isfinite(origin).all()) or size < 0:
            return False
        if size > 0:
            factor = variance / size
            # By factors of four: Newton's method on an exponential keeps up with that.
            steps = max(1, round(abs(log(factor)) / log(4.0)))
            path = [origin * factor ** (i / steps) for i in range(1, steps + 1)]
        else:
            path = [variance * torch.eye(len(origin), dtype=x.dtype, device=x.device)]
        for target in path:
            reached, distance = _towards(matrix, x, moves, target, 12 if size > 0 else 1)
            if size > 0 and not distance < torch.finfo(origin.dtype).eps ** 0.5:
                return False
            x = reached
        for e, value in zip(everything, x, strict=True):
            if e.tensor.requires_grad:
                e.tensor.copy_(value)
    return True


def _towards(
    matrix: TreeNode, x: Tensor, moves: Tensor, target: Tensor, most: int
) -> tuple[Tensor, float]:
    """Gauss-Newton steps from x to where the matrix is nearest to the target; how near."""
    size = torch.linalg.vector_norm(target)
    for _ in range(most):
        gap = target - matrix(x)
        if float(torch.linalg.vector_norm(gap) / size) < 1e-13:
            break
        jacobian, _ = matrix.grad(x)
        assert jacobian is not None
        J = jacobian[moves].flatten(1).mT  # (entries, parameters)
        length = torch.linalg.vector_norm(J, dim=0)
        length = torch.where(length > 0, length, 1)
        J = J / length  # columns of one length, so that no unit matters
        square = J.mT @ J
        square.diagonal().add_(1e-12)  # directions that change nothing stay
        move = torch.linalg.solve(square, J.mT @ gap.reshape(-1, 1))[:, 0] / length
        x = x.clone()
        x[moves] += move
    return x, float(torch.linalg.vector_norm(target - matrix(x)) / size)
