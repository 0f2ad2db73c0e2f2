r"""Terms: what the likelihood needs to know of a covariance tree.

Lowering turns :math:`V` into :math:`\sum_t Z_t G_t Z_t^\top`; each term pairs
a design with a structured covariance.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from openreml_nn.covariance.design import DenseDesign, Design, IdentityDesign, IndexedDesign

__all__ = [
    "Covariance",
    "DenseCovariance",
    "DiagonalCovariance",
    "RepeatedCovariance",
    "Term",
    "propagate",
]


@dataclass(frozen=True)
class RepeatedCovariance:
    r""":math:`G = I_q \otimes \Sigma`: ``levels`` independent copies of ``matrix`` (k, k).

    ``factor`` is a square root, :math:`\Sigma = L L^\top`, where the tree knows one.
    """

    levels: int
    matrix: Tensor
    factor: Tensor | None = None


@dataclass(frozen=True)
class DiagonalCovariance:
    r""":math:`G = \mathrm{diag}(v)` with ``matrix`` the variances (q,)."""

    matrix: Tensor


@dataclass(frozen=True)
class DenseCovariance:
    """A covariance without structure, ``matrix`` (q, q)."""

    matrix: Tensor


Covariance = RepeatedCovariance | DiagonalCovariance | DenseCovariance


@dataclass(frozen=True)
class Term:
    r"""One summand :math:`Z G Z^\top`; ``name`` is the path of its node in the tree."""

    design: Design
    covariance: Covariance
    name: str = ""

    def take(self, rows: Tensor | None) -> Term:
        """The term of some of the rows."""
        if rows is None:
            return self
        g = self.covariance
        if isinstance(self.design, IdentityDesign) and rows.unique().numel() == rows.numel():
            # Independent rows stay so: keep them a residual instead of indexing into all n.
            m = rows.numel()
            if isinstance(g, DiagonalCovariance):
                return replace(self, design=IdentityDesign(m), covariance=replace(g, matrix=g.matrix[rows]))
            if isinstance(g, RepeatedCovariance) and g.matrix.shape[0] == 1:
                return replace(self, design=IdentityDesign(m), covariance=replace(g, levels=m))
        return replace(self, design=self.design.take(rows))

    def within(self, name: str) -> Term:
        """The term as seen from one node further up."""
        return replace(self, name=f"{name}/{self.name}" if self.name else name)

    def multiply(self, x: Tensor) -> Tensor:
        """:math:`G x` for ``x`` of shape (q, m)."""
        g = self.covariance
        if isinstance(g, RepeatedCovariance):
            k = g.matrix.shape[0]
            return (g.matrix @ x.reshape(g.levels, k, -1)).reshape(x.shape)
        if isinstance(g, DiagonalCovariance):
            return g.matrix[:, None] * x
        return g.matrix @ x

    def dense(self) -> Tensor:
        """The (n, n) summand itself."""
        if isinstance(self.design, IdentityDesign):
            size = self.design.shape[0]
            eye = torch.eye(size, dtype=self.covariance.matrix.dtype)
            return self.multiply(eye.to(self.covariance.matrix.device))
        z = self.design.dense(self.covariance.matrix)
        return self.design.matmul(self.multiply(z.mT))


def propagate(outer: Design, term: Term) -> Term:
    """The term of ``outer`` acting on ``term``: its design becomes the product of both."""
    inner = term.design
    if isinstance(inner, IdentityDesign):
        return replace(term, design=outer)
    if isinstance(outer, IndexedDesign) and outer.values is None:
        return replace(term, design=inner.take(outer.codes))
    product = outer.matmul(inner.dense(term.covariance.matrix))
    return replace(term, design=DenseDesign(product))
