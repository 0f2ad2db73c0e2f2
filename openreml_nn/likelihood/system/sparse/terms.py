"""Random terms as the sparse equations take them: designs as matrices, covariances by roots."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.sparse import coo_matrix, csc_matrix, csr_matrix, eye
from torch import Tensor

from openreml_nn.likelihood.system.elimination import root as root_of
from openreml_nn.likelihood.system.sparse.chains import Chain
from openreml_nn.likelihood.system.sparse.equations import Equations
from openreml_nn.likelihood.system.sparse.moving import Moving, MovingAt
from openreml_nn.likelihood.system.sparse.part import Part
from openreml_nn.support.errors import NotPositiveDefiniteError
from openreml_nn.terms.base import Covariance
from openreml_nn.terms.blocks import BlockCovariance
from openreml_nn.terms.covariance import DenseCovariance
from openreml_nn.terms.design import (
    DenseDesign,
    Design,
    IdentityDesign,
    IndexedDesign,
    SparseDesign,
)
from openreml_nn.terms.precision import PrecisionCovariance
from openreml_nn.terms.term import Term, residual_terms

__all__ = [
    "Root",
    "SparseTerm",
    "TermAt",
    "are_nested",
    "has_sparse_inverse",
    "is_dense",
    "on_cpu",
    "over_levels",
]

#: What a direction of no variance adds to the system in place of zero: far below its rounding.
_NOTHING = 1e-22


def on_cpu(terms: Sequence[Term]) -> Sequence[Term]:
    """The terms where the equations are: themselves, or copies of those on another device."""
    if all(term.covariance.matrix.device.type == "cpu" for term in terms):
        return terms
    return [
        replace(
            term, design=term.design.map(Tensor.cpu), covariance=term.covariance.map(Tensor.cpu)
        )
        for term in terms
    ]


def over_levels(terms: Sequence[Term]) -> list[Term]:
    """The terms, effects of the rows themselves written as those of a level for each row."""
    residual = residual_terms(terms)
    return [
        term if i in residual or not isinstance(term.design, IdentityDesign) else _indexed(term)
        for i, term in enumerate(terms)
    ]


def _indexed(term: Term) -> Term:
    n, device = term.design.shape[0], term.covariance.matrix.device
    codes = torch.arange(n, device=device)
    return replace(term, design=IndexedDesign(codes, None, n, absent=False))


def has_sparse_inverse(term: Term) -> bool:
    """Whether the inverse of its kernel is known, or made of numbers that are estimated."""
    g = term.covariance
    kernel = g.known_kernel
    return isinstance(g, PrecisionCovariance) or (kernel is not None and kernel.inverse is not None)


def is_dense(term: Term) -> bool:
    """Whether all columns of a term meet."""
    g = term.covariance
    if g.is_chained or isinstance(g, PrecisionCovariance):
        return False
    if g.known_kernel is not None:
        return g.known_kernel.inverse is None
    return not g.block or isinstance(term.design, DenseDesign)


def are_nested(terms: Sequence[Term]) -> bool:
    """Whether each factor's levels are within those of the next, from the finest to the coarsest."""
    designs = [term.design for term in terms]
    factors = [design for design in designs if isinstance(design, IndexedDesign)]
    if len(factors) < len(designs):
        return False
    codes = [x.codes for x in sorted(factors, key=lambda x: -x.levels)]
    for fine, coarse in itertools.pairwise(codes):
        first = torch.zeros(int(fine.max()) + 1, dtype=coarse.dtype).to(coarse)
        if not bool((first.scatter(0, fine, coarse)[fine] == coarse).all()):
            return False
    return True


@dataclass(frozen=True)
class SparseTerm:
    """A random term.

    Attributes:
        at: its position among the terms.
        part: its columns of the equations.
        by_level: whether each level has a covariance of its own.
        whole: whether its covariance has no independent levels.
        chain: its pattern where its inverse is a chain's, and moves with parameters.
        moving: where the precision of its levels moves with parameters.
    """

    at: int
    part: Part
    by_level: bool
    whole: bool
    chain: Chain | None = None
    moving: Moving | None = None

    @classmethod
    def of_all(cls, terms: Sequence[Term], residual: Sequence[int]) -> list[SparseTerm]:
        """All terms that are not of the residual."""
        return [cls.of(term, i) for i, term in enumerate(terms) if i not in residual]

    @classmethod
    def of(cls, term: Term, at: int) -> SparseTerm:
        """One of them."""
        g, prior, basis, null = term.covariance, None, None, None
        if g.is_chained:
            chain = Chain(g)
            Z = _matrix(term.design)
            part = Part(term.name, Z, 1, term.effects, chain.pattern, None, moves=True)
            return cls(at, part, chain.fields > 1, False, chain)
        form, kernel = g.without_kernel(), g.known_kernel
        if isinstance(g, PrecisionCovariance):
            moving, Z = Moving(g), _matrix(term.design)
            part = Part(term.name, Z, g.effects, term.effects, moving.pattern, None, moves=True)
            return cls(at, part, False, False, None, moving)
        if kernel is not None and kernel.inverse is not None:
            prior = _sparse(kernel.inverse)
            if kernel.null is not None:
                null = _numbers(kernel.null)
        elif kernel is not None:
            K = kernel.dense().detach().cpu().double()
            basis = root_of(replace(term, covariance=DenseCovariance(K))).matrix.numpy()
        effects = form.block or term.design.shape[1]
        by_level = (form.block == 1 and not form.is_scalar) or isinstance(form, BlockCovariance)
        Z = _matrix(term.design)
        part = Part(term.name, Z, effects, term.effects, prior, basis, null=null)
        return cls(at, part, by_level, not form.block)

    def roots(self, term: Term, largest: float) -> Root:
        r"""Roots of the covariance of a term of this form.

        Args:
            term: the term.
            largest: the largest entry on the diagonal of :math:`Z^\top R^{-1} Z`.
        """
        least = _NOTHING / max(largest, 1e-290)
        if self.chain is not None:
            return Root.of(self.part, self.chain.roots(_form(term)), least)
        form = root_of(replace(term, covariance=term.covariance.without_kernel()))
        k, levels = self.part.effects, self.part.levels
        blocks = form.whole(k)[None] if self.whole else form.blocks(levels, k)
        return Root.of(self.part, blocks.double().numpy(), least)

    def at_point(self, term: Term) -> TermAt:
        """What of the term depends on the parameters, beside the root."""
        g = term.covariance
        if self.moving is not None:
            assert isinstance(g, PrecisionCovariance)
            moving = self.moving.at(g)
            part = replace(self.part, prior=moving.matrix)
            log_det = g.effects * moving.log_det
            return TermAt(self, term, part, log_det, moving.entries, moving)
        if self.chain is None:
            return TermAt(self, term, self.part)
        found = self.chain.at(_form(term))
        entries = found.entries.numpy()
        part = replace(self.part, prior=self.chain.matrix(entries))
        return TermAt(self, term, part, float(found.log_det), entries)


@dataclass(frozen=True)
class TermAt:
    """A random term at one point.

    Attributes:
        own: the term.
        term: with its covariance there.
        part: with the prior there.
        log_det: of that prior, where it moves.
        entries: of the lower triangle of that prior, where it moves.
        moving: the precision there, where the numbers of one move.
    """

    own: SparseTerm
    term: Term
    part: Part
    log_det: float = 0.0
    entries: np.ndarray | None = None
    moving: MovingAt | None = None

    def times_prior(self, u: np.ndarray) -> np.ndarray:
        """:math:`Q u` for u (columns, m)."""
        return self.part.times_prior(u) if self.moving is None else self.moving.times(u)

    def inner_prior(self, u: np.ndarray) -> np.ndarray:
        r""":math:`u^\top Q u` for u (columns, m)."""
        if self.moving is None:
            return np.asarray(u.T @ self.part.times_prior(u))
        return self.moving.inner(u, self.part.effects)

    def score(self, score: np.ndarray, within: Callable[[], np.ndarray], u: np.ndarray) -> Tensor:
        """The derivative of the log-likelihood by the entries that G holds.

        Args:
            score: that by the blocks of G without its kernel.
            within: gives the entries of the inverse of the equations in the order of a prior that
                moves.
            u: effects over their root, (q, m).
        """
        form, S = _form(self.term), torch.from_numpy(score)
        if self.own.chain is not None:
            fields = self.own.chain.fields
            by_field = score.reshape(-1)
            if fields > 1:
                by_field = np.bincount(self.own.chain.of, by_field, fields)
            return self.own.chain.score(form, by_field, within(), u)
        folded = form.fold(S[0]) if self.own.whole else form.fold_blocks(S)
        if self.moving is None:
            return folded
        by_numbers = self.moving.score(within(), u, self.part.effects)
        return torch.cat([folded.reshape(-1), by_numbers])

    def along(self, derivatives: Tensor, u: np.ndarray, root: Root) -> np.ndarray:
        r"""Changes :math:`\dot G G^{-1} b` of effects b by derivatives of G.

        Args:
            derivatives: of the entries that G holds, (m, *shape).
            u: effects over their root, (q, 1).
            root: of G without its kernel.
        """
        form, derivatives = _form(self.term), derivatives.cpu().double()
        # The kernel is within Q, but a chain's is within G: there it is taken off.
        effects = u if self.own.chain is None else self.part.times_prior(u)
        x = torch.from_numpy(root.unlift(effects))
        if self.moving is None:
            return np.concatenate([form.along(d, x).numpy() for d in derivatives], 1)
        t = self.part.effects
        by_sigma = derivatives[:, : t * t].reshape(-1, t, t)
        found = np.concatenate([form.along(d, x).numpy() for d in by_sigma], 1)
        b = root.times(root.lifted, u)
        return found + self.moving.along(list(derivatives[:, t * t :]), b)


@dataclass(frozen=True)
class Root:
    r"""Blocks of Λ with :math:`\Lambda\Lambda^\top` the covariance of a level, (levels or 1, k, k).

    Attributes:
        part: whose it is.
        root: Λ itself.
        lifted: Λ with a root of next to nothing in directions of no variance: the equations are the
            same to the last digit, and it has an inverse.
    """

    part: Part
    root: np.ndarray
    lifted: np.ndarray

    @classmethod
    def of(cls, part: Part, blocks: np.ndarray, least: float) -> Root:
        """From blocks that may be singular.

        Args:
            part: whose they are.
            blocks: (levels or 1, k, k).
            least: a variance that is nothing beside rounding.

        Raises:
            NotPositiveDefiniteError: if they hold numbers that are not finite.
        """
        if not np.isfinite(blocks).all():
            raise NotPositiveDefiniteError(
                f"the covariance of {part.name!r} is not positive semi-definite: it holds numbers that "
                "are not finite"
            )
        if blocks.shape[1] == 1:
            blocks = np.abs(blocks)
            return cls(part, blocks, np.maximum(blocks, least**0.5))
        if (np.triu(blocks, 1) == 0).all() and (
            blocks.diagonal(axis1=1, axis2=2) ** 2 >= least
        ).all():
            return cls(part, blocks, blocks)
        U, s, _ = np.linalg.svd(blocks)
        return cls(part, U * s[:, None], U * np.maximum(s, least**0.5)[:, None])

    def times(self, blocks: np.ndarray, x: np.ndarray, transpose: bool = False) -> np.ndarray:
        """Blocks times x (columns, m), level by level."""
        if blocks.shape[1] == 1:
            return blocks[:, 0] * x
        if transpose:
            blocks = blocks.transpose(0, 2, 1)
        return (blocks @ x.reshape(self.part.levels, self.part.effects, x.shape[1])).reshape(
            x.shape
        )

    def unlift(self, x: np.ndarray) -> np.ndarray:
        r""":math:`\Lambda^{-\top} x` for x (columns, m)."""
        if self.lifted.shape[1] == 1:
            return x / self.lifted[:, 0]
        by_level = x.reshape(self.part.levels, self.part.effects, x.shape[1])
        left = np.broadcast_to(
            self.lifted.transpose(0, 2, 1), (len(by_level), *self.lifted.shape[1:])
        )
        return np.linalg.solve(left, by_level).reshape(x.shape)

    def unpull(self, x: np.ndarray) -> np.ndarray:
        r""":math:`\Lambda^{-\top} x \Lambda^{-1}` for symmetric blocks x."""
        left = self.lifted.transpose(0, 2, 1)
        half = np.linalg.solve(left, (x + x.transpose(0, 2, 1)) / 2)
        found = np.linalg.solve(left, half.transpose(0, 2, 1))
        return (found + found.transpose(0, 2, 1)) / 2

    def variances(self, equations: Equations, inverse: np.ndarray, i: int) -> np.ndarray:
        r"""Blocks of :math:`\Lambda M^{-1} \Lambda^\top`, (levels, w, w)."""
        w, k, L = self.part.width, self.part.effects, self.root
        if self.part.basis is not None or w < k:
            whole = equations.own(inverse, i, self.part.columns)[0]
            half = self._all(whole)
            both = self._all(half.T)
            by = (self.part.columns // w, w)
            four = both.reshape(*by, *by)
            return np.ascontiguousarray(four.diagonal(axis1=0, axis2=2).transpose(2, 0, 1))
        blocks = equations.own(inverse, i, w)
        if k == 1:
            scale = np.broadcast_to(L[:, 0, 0], self.part.columns).reshape(-1, w)
            return blocks * scale[:, :, None] * scale[:, None, :]
        if k < w:
            by_level = np.broadcast_to(L, (self.part.levels, k, k)).reshape(-1, w // k, k, k)
            L = np.einsum("lnij,nm->lnimj", by_level, np.eye(w // k)).reshape(-1, w, w)
        return L @ blocks @ L.transpose(0, 2, 1)

    def _all(self, x: np.ndarray) -> np.ndarray:
        return self.part.to_effects(self.times(self.root, x))


def _form(term: Term) -> Covariance:
    return term.covariance.without_kernel().map(Tensor.double)


def _matrix(design: Design) -> csr_matrix:
    n, q = design.shape
    if isinstance(design, IdentityDesign):
        return csr_matrix(eye(n))
    if isinstance(design, IndexedDesign):
        codes, k = design.codes.detach().cpu().numpy(), design.effects
        values = np.ones((n, 1)) if design.values is None else _numbers(design.values)
        column = codes[:, None] * k + np.arange(k)
        start = np.arange(0, n * k + 1, k)
        return csr_matrix((values.reshape(-1), column.reshape(-1), start), (n, q))
    if isinstance(design, SparseDesign):
        column, entries = design.columns.detach().cpu().numpy(), _numbers(design.values)
        start = np.arange(0, column.size + 1, max(column.shape[1], 1))
        found = csr_matrix((entries.reshape(-1), column.reshape(-1), start), (n, q))
        found = found.copy()  # what follows sorts in place
        found.sum_duplicates()
        return found
    assert isinstance(design, DenseDesign)
    return csr_matrix(_numbers(design.matrix.to_dense()))


def _numbers(x: Tensor) -> np.ndarray:
    return x.detach().cpu().double().numpy()


def _sparse(inverse: Tensor) -> csc_matrix:
    """Both triangles of a kernel's inverse, what is zero left out."""
    found = inverse.detach().cpu().double().to_sparse_coo().coalesce()
    row, column = found.indices().numpy()
    return coo_matrix((found.values().numpy(), (row, column)), tuple(inverse.shape)).tocsc()
