"""What the steps before have shown of the curvature."""

from __future__ import annotations

import torch
from torch import Tensor

from openreml_nn.estimation.curvature import Curvature

__all__ = ["Past"]

#: The curvature is learned from steps within this many standard errors, squared.
_NEAR = 0.01


class Past:
    """Steps with the changes of the score along them, the last few."""

    def __init__(self) -> None:
        self._at: tuple[Tensor, Tensor] | None = None
        self._pairs: list[tuple[Tensor, Tensor]] = []

    def see(self, curvature: Curvature) -> None:
        """Keep the present point."""
        u, score = curvature.u, curvature.score
        if self._at is not None and len(self._at[0]) == len(u):
            self._pairs.append((u - self._at[0], self._at[1] - score))
            del self._pairs[: -len(u) - 2]
        self._at = u.clone(), score.clone()

    def correct(self, hessian: Tensor) -> Tensor:
        """The curvature with what the steps have shown of it (Broyden, Fletcher, Goldfarb, Shanno).

        Pairs along which the likelihood does not bend downwards say nothing, nor do those that
        differ from the curvature by no more than third derivatives explain, which for a step
        of s standard errors is a part s of it.
        """
        for s, y in self._pairs:
            Bs = hessian @ s
            along, seen = float(s @ Bs), float(s @ y)
            if not (0 < along < _NEAR and 0.1 * along < seen < 10 * along):
                continue
            size = hessian.diagonal().abs().sqrt()
            off = float(((y - Bs) / torch.where(size > 0, size, 1)).norm())
            if off > along:
                hessian = hessian - torch.outer(Bs, Bs) / along + torch.outer(y, y) / seen
        return hessian
