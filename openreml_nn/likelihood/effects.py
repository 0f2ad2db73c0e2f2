"""Estimates of the fixed effects, and predictions of the random ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from openreml_nn.terms.term import Term

__all__ = ["Coefficients", "RandomEffects"]


@dataclass(frozen=True)
class Coefficients:
    r"""Generalised least-squares coefficients of the fixed effects.

    Attributes:
        estimate: (p,) BLUEs :math:`(X^\top V^{-1} X)^{-1} X^\top V^{-1} y`.
        covariance: (p, p) :math:`(X^\top V^{-1} X)^{-1}`.
        columns: the p columns of X that were kept.
    """

    estimate: Tensor
    covariance: Tensor
    columns: tuple[int, ...]


@dataclass(frozen=True)
class RandomEffects:
    r"""BLUPs of one term.

    Attributes:
        name: path of the term in the tree.
        values: (q, k) BLUPs :math:`G Z^\top P y`.
        variances: (q, k, k) prediction-error variances, the diagonal blocks
            of :math:`G - G Z^\top P Z G`.
    """

    name: str
    values: Tensor
    variances: Tensor

    @classmethod
    def of(cls, term: Term, values: Tensor, z_p_z: Tensor) -> RandomEffects:
        """From :math:`G Z^\\top P y` (q,) and :math:`Z^\\top P Z` (q, q)."""
        g, k = term.covariance, term.effects
        G, half = g.whole(len(values)), g.multiply(z_p_z)  # G, G Z' P Z
        levels = (len(values) // k, k)
        prior = G.unflatten(1, levels).unflatten(0, levels).diagonal(dim1=0, dim2=2).movedim(-1, 0)
        lost = half.unflatten(0, levels) @ G.unflatten(0, levels).mT
        return cls(term.name, values.reshape(-1, k), prior - lost)

    @classmethod
    def of_roots(cls, term: Term, values: Tensor, root: Tensor) -> RandomEffects:
        """From BLUPs (q,) and a root (q, m) of their prediction-error variance."""
        by_level = root.unflatten(0, (-1, term.effects))
        return cls(term.name, values.reshape(by_level.shape[:2]), by_level @ by_level.mT)

    def to(self, dtype: torch.dtype) -> RandomEffects:
        """The effects in another precision."""
        return RandomEffects(self.name, self.values.to(dtype), self.variances.to(dtype))
