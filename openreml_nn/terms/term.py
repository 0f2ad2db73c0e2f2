r"""Terms: what the likelihood needs to know of a covariance tree.

Lowering turns :math:`V` into :math:`\sum_t Z_t G_t Z_t^\top`; each term pairs
a design with a structured covariance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from openreml_nn.terms.base import Covariance, Meeting
from openreml_nn.terms.covariance import DenseCovariance
from openreml_nn.terms.design import (
    DenseDesign,
    Design,
    IdentityDesign,
    IndexedDesign,
    SparseDesign,
)
from openreml_nn.terms.kernel import private

__all__ = ["Term", "has_own_columns", "propagate", "residual_terms", "whole_term"]


@dataclass(frozen=True)
class Term:
    r"""One summand :math:`Z G Z^\top`; ``name`` is the path of its node in the tree.

    It is ``known`` if no parameter of it is estimated.
    """

    design: Design
    covariance: Covariance
    name: str = ""
    known: bool = False

    @property
    def is_residual(self) -> bool:
        r"""Whether it is :math:`\sigma^2 I` over the rows."""
        return self.covariance.is_scalar and isinstance(self.design, IdentityDesign)

    @property
    def effects(self) -> int:
        """Effects of each level."""
        return max(self.design.effects, self.covariance.width)

    def shown(self) -> Tensor:
        """What tables show of its covariance: that of the effects of a level where levels share it,
        (k, k), variances where it is diagonal, (q,), and the whole elsewhere, (q, q)."""
        return self.covariance.shown(self.design.effects)

    def met(self, shown: Tensor) -> Tensor:
        """A covariance of the effects of a level, (k, k), as rows meet it: the effect of a covariate by
        the covariate's root mean square, which is the same in any unit."""
        values = self.design.values if isinstance(self.design, IndexedDesign) else None
        if values is None or shown.dim() != 2 or values.shape[1] != len(shown):
            return shown
        scale = (values.detach().to(shown) ** 2).mean(0).sqrt()
        return scale[:, None] * shown * scale

    @property
    def form(self) -> tuple[object, ...]:
        """What the term is beside the numbers that it holds.

        What was prepared for a term serves another one of the same form and the same
        :attr:`constants`.
        """
        design = self.design
        return self.name, self.known, type(design), design.shape, self.covariance.form

    @property
    def constants(self) -> list[Tensor | None]:
        """What the term holds beside the entries of its covariance."""
        return [*self.design.tensors, *self.covariance.constants]

    def with_covariance(self, covariance: Covariance) -> Term:
        """A term with this design and another covariance."""
        return Term(self.design, covariance, self.name, self.known)

    def held(self) -> Term:
        """The term without a graph, and with constants that nobody else can change."""
        covariance = self.covariance.private().map(Tensor.detach)
        return Term(self.design.map(private), covariance, self.name, self.known)

    def take(self, rows: Tensor | None) -> Term:
        """The term of some of the rows."""
        if rows is None:
            return self
        if isinstance(self.design, IdentityDesign) and rows.unique().numel() == rows.numel():
            # Independent rows stay so: keep them a residual instead of indexing into all n.
            kept = self.covariance.take(rows)
            if kept is not None:
                return replace(self, design=IdentityDesign(len(rows)), covariance=kept)
        return replace(self, design=self.design.take(rows))

    def to(self, dtype: torch.dtype) -> Term:
        """The term with its covariance in another precision."""
        if self.covariance.matrix.dtype == dtype:
            return self
        return self.with_covariance(self.covariance.map(lambda x: x.to(dtype)))

    def detach(self) -> Term:
        """The term without the graph of its covariance."""
        return self.with_covariance(self.covariance.map(Tensor.detach))

    def within(self, name: str, known: bool = False) -> Term:
        """The term as seen from one node further up, which may say that it is known."""
        name = f"{name}/{self.name}" if self.name else name
        return Term(self.design, self.covariance, name, self.known or known)

    def meeting(self) -> Meeting | None:
        """What :meth:`dense` and :meth:`fold` start with, where there is something."""
        if isinstance(self.design, IdentityDesign):
            return None
        return self.covariance.meeting(self.design)

    def dense(self, meeting: Meeting | None = None) -> Tensor:
        """The (n, n) summand itself."""
        if isinstance(self.design, IdentityDesign):
            return self.covariance.whole(self.design.shape[0])
        return self.covariance.sandwich(self.design, meeting)

    def fold(self, cotangent: Tensor, meeting: Meeting | None = None) -> Tensor:
        """From a symmetric cotangent of the summand, (n, n), to that of the covariance's entries."""
        if isinstance(self.design, IdentityDesign):
            return self.covariance.fold(cotangent)
        return self.covariance.fold_sandwich(self.design, cotangent, meeting)


def whole_term(matrix: Tensor) -> Term:
    """A matrix over the rows, without structure."""
    return Term(IdentityDesign(matrix.shape[0]), DenseCovariance(matrix))


def residual_terms(terms: Sequence[Term]) -> list[int]:
    """Positions of the terms that make up the covariance R of the residuals.

    These are the terms over the rows themselves whose covariance is a multiple
    of the identity, diagonal, or of independent blocks. Where there is none,
    those whose design gives each row a column of its own take their place,
    such as the occasions within subjects; of these, where there are any, the
    multiples of known weights. Where one of all these is known, as
    error variances from an earlier analysis are, it is the residual, and
    those that are estimated are effects.
    """
    structured = [i for i, term in enumerate(terms) if term.covariance.block]
    over_rows = [i for i in structured if isinstance(terms[i].design, IdentityDesign)]
    if over_rows and not any(terms[i].known for i in structured):
        return over_rows
    own_columns = [i for i in structured if has_own_columns(terms[i].design)]
    known = [i for i in (*over_rows, *own_columns) if terms[i].known]
    if known and len(known) < len(over_rows) + len(own_columns):
        return sorted(known)
    weighted = [i for i in own_columns if terms[i].covariance.is_scalar]
    return over_rows or weighted or own_columns


def has_own_columns(design: Design) -> bool:
    """Whether each row has a column of its own, of an indexed design."""
    if not isinstance(design, IndexedDesign) or design.effects != 1:
        return False
    n, q = design.shape
    return n <= q and int(torch.bincount(design.codes, minlength=1).max()) == 1


def propagate(outer: Design, term: Term) -> Term:
    """The term of ``outer`` acting on ``term``: its design becomes the product of both."""
    inner = term.design
    if isinstance(inner, IdentityDesign):
        return replace(term, design=outer)
    if isinstance(outer, IndexedDesign) and outer.values is None:
        return replace(term, design=inner.take(outer.codes))
    if (
        isinstance(outer, SparseDesign)
        and isinstance(inner, IndexedDesign)
        and inner.values is None
    ):
        moved = SparseDesign(inner.codes[outer.columns], outer.values, inner.shape[1])
        return replace(term, design=moved)
    if isinstance(outer, IndexedDesign) and isinstance(inner, IndexedDesign) and outer.effects == 1:
        taken = inner.take(outer.codes)
        assert isinstance(taken, IndexedDesign) and outer.values is not None
        values = outer.values if taken.values is None else outer.values * taken.values
        return replace(term, design=IndexedDesign(taken.codes, values, taken.levels, absent=False))
    product = outer.matmul(inner.dense(term.covariance.matrix))
    return replace(term, design=DenseDesign(product))
