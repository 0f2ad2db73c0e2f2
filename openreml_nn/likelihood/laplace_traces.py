r"""The log-determinant of the other terms' system by random signs, and sums for its derivatives.

With :math:`\hat M` scaled by its own diagonal blocks :math:`CC^\top` and random signs z, the estimate is

.. math::
    \log|\hat M| \approx \sum_j \omega_j \{z_j^\top \log(\hat M) z_j - z_j^\top(\hat M - I)z_j\},

whose second part has the expectation zero. Its derivative is that of
:math:`\sum_v \sigma_v\, v^\top \hat M v` with the vectors v of Lanczos quadrature held, so that value and
derivatives are of one function, whatever the signs. They are worked on some at a time, and only sums are
kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from openreml_nn.likelihood.laplace_layout import Prior, times_blocks
from openreml_nn.likelihood.laplace_listed import ListedLayout, ListedSystem
from openreml_nn.likelihood.laplace_system import weighted_products
from openreml_nn.likelihood.system.lanczos import log_forms
from openreml_nn.likelihood.system.listed import own_blocks

__all__ = ["Traces", "of_blocks", "outer"]

#: Numbers that are held at a time, and how many vectors a sign makes, about.
_HELD = 2**25
_BASIS = 40


class Traces:
    r"""Sums over vectors v with their signs; :math:`x = C^{-\top}v`, :math:`b = \Lambda x`.

    Args:
        at: the other terms' system.
        signs: (q, m) those of each probe.
        shares: (m,) of each probe in the mean.
        tolerance: at which Lanczos' method ends.
        weights: of the rows, (n,).

    Attributes:
        log_det: :math:`\log|\hat M|`.
        samples: (m,) of each probe.
        rows: (n,) the derivative by the weights of the rows, x held.
        first: (levels, k, k) minus that by the covariance of the eliminated factor.
        met: (levels, k, k) :math:`W \Lambda C^{-\top}(\hat M^{-1} - I)C^{-1}\Lambda^\top W^\top`.
        by_root: for each other term (levels, k, k), the derivative by :math:`\Lambda`, x held.
        by_scale: for each, that by C.
        own: for each, own blocks of :math:`\hat M^{-1} - I`.

    Raises:
        NotPositiveDefiniteError: if the system is not positive definite.
    """

    def __init__(
        self,
        at: ListedSystem,
        signs: Tensor,
        shares: Tensor,
        tolerance: float,
        weights: Tensor,
    ) -> None:
        self._at = at
        grids, system = at.others.grids, at.scaled
        self.rows = torch.zeros_like(weights)
        self.first, self.met = torch.zeros_like(at.K), torch.zeros_like(at.K)
        none = [weights.new_zeros(levels, k, k) for levels, k in grids]
        self.by_root, self.by_scale, self.own = (
            none,
            [*map(torch.clone, none)],
            [*map(torch.clone, none)],
        )
        width = max(1, _HELD // (_BASIS * max(1, signs.shape[0])))
        samples = []
        for z, share in zip(signs.split(width, 1), shares.split(width), strict=True):
            z = z.to(weights)
            forms = log_forms(system.times, z, tolerance)
            beyond = system.times(z) - z
            samples.append(forms.values - (z * beyond).sum(0))
            for v in forms.vectors.unbind(1):
                self._add(v, share)
            self._add(z, -share)
            # The first-order part of the inverse has no own blocks.
            pairs = zip(*map(at.others.by_levels, (beyond * share, z)), strict=True)
            for own, (one, other) in zip(self.own, pairs, strict=True):
                part = outer(one, other)
                own += (part + part.mT) / 2
        self.samples = torch.cat(samples)
        self.log_det = shares @ self.samples

    def _add(self, v: Tensor, share: Tensor) -> None:
        """Add vectors (q, m), each as often as it has a share."""
        at, system, others = self._at, self._at.scaled, self._at.others
        x, b = system.unscaled(v), system.back(v)
        met, lost, predictor = at.carried(b)
        self.rows += predictor.square_() @ share
        self.met += outer(met * share, met)
        self.first += outer(lost * share, lost)
        parts = (v * share, v, x * share, at.times_rest(b), system.times(v))
        for i, part in enumerate(zip(*map(others.by_levels, parts), strict=True)):
            own, same, below, reached, product = part
            self.own[i] += outer(own, same)
            self.by_root[i] += 2 * outer(reached, below)
            self.by_scale[i] -= 2 * outer(below, product)


def of_blocks(
    layout: ListedLayout, weights: Tensor, prior: Prior, by_scale: Sequence[Tensor]
) -> Tensor:
    """A function with the derivatives of the whole log-determinant by all that depends on own blocks.

    Args:
        layout: where the effects stand.
        weights: of the rows, (n,).
        prior: covariances of the eliminated terms, and roots of those of the others.
        by_scale: see :class:`Traces`.
    """
    split = layout.split
    zz = weighted_products(layout.pattern, layout.designs, weights, layout.own_pairs)
    value = weights.new_zeros(())
    own = [zz[t, t] for t in layout.rest]
    if split:
        A11, G1 = own_blocks(zz, split), prior.blocks(weights)
        eye = torch.eye(layout.k, dtype=G1.dtype, device=G1.device)
        D = eye + times_blocks(A11, G1)
        value = D.log().sum() if layout.k == 1 else torch.linalg.slogdet(D).logabsdet.sum()
        K = G1 / D if layout.k == 1 else torch.linalg.solve(D.mT, G1.mT.expand_as(D)).mT
        for i, (a, b) in enumerate(layout.places.cells):
            met = torch.cat([zz[t, split + i] for t in range(split)], 1)
            own[i] = own[i].index_add(0, b, -(met.mT @ K[a] @ met))
    roots, diagonals = layout.blocks_of(prior), layout.others.diagonals
    for i, (block, L, diagonal) in enumerate(zip(own, roots, diagonals, strict=True)):
        of_prior = torch.diag_embed(diagonal.expand(block.shape[:2]))
        C = torch.linalg.cholesky(L.mT @ block @ L + of_prior)
        value = value + 2 * C.diagonal(dim1=1, dim2=2).log().sum()
        value = value + (by_scale[i] * C).sum()
    return value


def outer(a: Tensor, b: Tensor) -> Tensor:
    """:math:`a b^\\top` level by level, for (levels, k, m)."""
    return (a * b).sum(2, keepdim=True) if a.shape[1] == 1 else a @ b.mT
