"""Conjugate gradients, and the Lanczos matrices that their coefficients make."""

from __future__ import annotations

from collections.abc import Callable
from math import nan

import torch
from torch import Tensor

from openreml_nn.support.errors import NotPositiveDefiniteError
from openreml_nn.support.spectrum import decomposed

__all__ = ["conjugate_gradients", "log_samples"]

_MOST_STEPS = 1000


def conjugate_gradients(
    times: Callable[[Tensor], Tensor], b: Tensor, x: Tensor, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Solve for each column of b (q, m), from x on.

    Returns:
        The solution, and the Lanczos matrix of each column, (m, steps, steps), padded with ones
        on its diagonal.

    Raises:
        NotPositiveDefiniteError: if the residual is not below the tolerance in 1,000 steps.
    """
    m = b.shape[1]
    found = x.clone()
    tolerance = max(tolerance, 20 * torch.finfo(b.dtype).eps)
    if not b.numel():
        return found, torch.ones(m, 1, 1, dtype=b.dtype, device=b.device)
    r = b - times(x) if bool(x.any()) else b.clone()
    goal = tolerance * torch.linalg.vector_norm(b, dim=0)
    squares = (r * r).sum(0)
    # What is worked on are the columns that have not converged.
    active = (squares.sqrt() > goal).nonzero()[:, 0]
    x, r, squares, goal = found[:, active], r[:, active], squares[active], goal[active]
    p = r.clone()
    alphas: list[Tensor] = []
    betas: list[Tensor] = []
    for _ in range(_MOST_STEPS):
        if not len(active):
            return found, _lanczos(alphas, betas, b)
        Mp = times(p)
        alpha = squares / (p * Mp).sum(0)
        x.addcmul_(p, alpha)
        r.addcmul_(Mp, alpha, value=-1)
        new = (r * r).sum(0)
        beta, squares = new / squares, new
        p.mul_(beta).add_(r)
        alphas.append(_spread(alpha, active, m))
        betas.append(_spread(beta, active, m))
        going = new.sqrt() > goal
        if not bool(going.all()):
            found[:, active] = x
            kept = going.nonzero()[:, 0]
            active, x, r, p = active[kept], x[:, kept], r[:, kept], p[:, kept]
            squares, goal = squares[kept], goal[kept]
    raise NotPositiveDefiniteError(
        "V is not positive definite to working precision: "
        f"conjugate gradients did not converge in {_MOST_STEPS} steps"
    )


def log_samples(T: Tensor, q: int) -> Tensor:
    r""":math:`z^\top (\log \hat M - E) z` for each probe from its Lanczos matrix (m, steps, steps).

    The first-order part :math:`z^\top E z`, which is taken off, has the expectation zero.
    """
    values, vectors = decomposed(T, "the Lanczos matrix of a probe")
    weights = vectors[:, 0, :] ** 2
    return q * ((weights * values.log()).sum(1) - (T[:, 0, 0] - 1))


def _spread(values: Tensor, active: Tensor, m: int) -> Tensor:
    """Values of the active columns among all m, NaN for the others."""
    return values.new_full((m,), nan).index_copy(0, active, values)


def _lanczos(alphas: list[Tensor], betas: list[Tensor], like: Tensor) -> Tensor:
    """Tridiagonal matrices (m, steps, steps) from the coefficients of conjugate gradients."""
    if not alphas:
        return torch.ones(like.shape[1], 1, 1, dtype=like.dtype, device=like.device)
    a, b = torch.stack(alphas, 1), torch.stack(betas, 1)  # (m, steps)
    diagonal = 1 / a
    diagonal[:, 1:] += b[:, :-1] / a[:, :-1]
    # Past the last step of a column there is nothing, and nothing to couple to.
    over = a[:, 1:].isnan()
    off = torch.where(over, 0.0, b[:, :-1].sqrt() / a[:, :-1])
    diagonal[:, 1:] = torch.where(over, 1.0, diagonal[:, 1:])
    return torch.diag_embed(diagonal) + torch.diag_embed(off, 1) + torch.diag_embed(off, -1)
