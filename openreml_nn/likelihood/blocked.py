r"""The likelihood in the space of the random effects: V is never formed.

For :math:`V = \sum_t Z_t G_t Z_t^\top + \sigma^2 I` everything follows from
the cross-products of :math:`[Z_1 \,|\, Z_2 \,|\, X \,|\, y]`, computed once. The
factor with most columns, :math:`Z_1`, is eliminated first: its part of the
system is block diagonal, one small block a level. What remains falls apart
into groups of columns that have nothing in common: many small ones where the
other factors are nested, a single dense one where they are crossed.

With :math:`G = \Lambda\Lambda^\top` a variance of zero is an ordinary point:
no inverse of G is taken.

Reference:
    Bates, Mächler, Bolker and Walker, Journal of Statistical Software 67(1)
    (2015), sections 3.3 to 3.6; Harville, JASA 72 (1977), sections 4 and 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.linalg import solve_triangular

from openreml_nn.covariance.design import Design, IdentityDesign, IndexedDesign
from openreml_nn.covariance.terms import (
    Covariance,
    DiagonalCovariance,
    RepeatedCovariance,
    Term,
)
from openreml_nn.likelihood.cross import cross_product, values_of
from openreml_nn.likelihood.fixed import FixedPart
from openreml_nn.likelihood.problem import (
    Evaluation,
    NotPositiveDefiniteError,
    Problem,
    RandomEffects,
    cholesky,
)

__all__ = ["BlockedProblem", "Layout"]


@dataclass(frozen=True)
class Layout:
    """Which term does what; positions refer to the list of terms.

    Attributes:
        residual: terms that are multiples of the identity over the rows.
        eliminated: terms of the grouping factor that is eliminated first; they
            share its level codes, and their effects stand side by side.
        rest: the other random terms.
    """

    residual: list[int]
    eliminated: list[int]
    rest: list[int]

    @classmethod
    def of(cls, terms: Sequence[Term]) -> Layout:
        """Arrange the terms.

        Raises:
            ValueError: if the residual is not a multiple of the identity.
        """
        residual = [i for i, term in enumerate(terms) if term.is_residual]
        random = [i for i in range(len(terms)) if i not in residual]
        odd = [terms[i].name for i in random if isinstance(terms[i].design, IdentityDesign)]
        if odd or not residual:
            raise ValueError(
                "the blocked solver needs a residual of independent errors with one variance: "
                + (f"term {odd[0]!r} is over the rows and is not" if odd else "there is none")
            )
        factors: list[list[int]] = []
        for i in random:
            if not _separable(terms[i]):
                continue
            for factor in factors:
                if _same_codes(terms[factor[0]], terms[i]):
                    factor.append(i)
                    break
            else:
                factors.append([i])
        width = [sum(terms[i].design.shape[1] for i in factor) for factor in factors]
        eliminated = factors[width.index(max(width))] if factors else []
        return cls(residual, eliminated, [i for i in random if i not in eliminated])

    @property
    def random(self) -> list[int]:
        """The random terms, those eliminated first."""
        return [*self.eliminated, *self.rest]


def _separable(term: Term) -> bool:
    """Whether levels are independent, so that the term is block diagonal by level."""
    z, g = term.design, term.covariance
    if not isinstance(z, IndexedDesign):
        return False
    if isinstance(g, RepeatedCovariance):
        return g.levels == z.levels and g.matrix.shape[0] == z.effects
    return isinstance(g, DiagonalCovariance)


def _same_codes(a: Term, b: Term) -> bool:
    x, y = a.design, b.design
    assert isinstance(x, IndexedDesign) and isinstance(y, IndexedDesign)
    return x.levels == y.levels and torch.equal(x.codes, y.codes)


class BlockedProblem(Problem):
    r"""Depends on the residual variance, (1, 1), and the matrix of each random term.

    In names, 1 is the eliminated factor (``levels`` levels of k effects), 2
    the other random terms (q columns), f the p columns of Q and then y;
    ``A11`` (levels, k, k), ``W`` (levels, k, q), ``A1f`` (levels, k, p+1),
    ``A22``, ``A2f`` and ``Aff`` are their cross-products.
    """

    def __init__(self, fixed: FixedPart, terms: Sequence[Term], method: str) -> None:
        super().__init__(fixed, terms, method)
        self.layout = Layout.of(terms)
        f = torch.cat([fixed.Q, fixed.y[:, None]], 1)
        ones = [terms[i].design for i in self.layout.eliminated]
        two = [terms[i].design for i in self.layout.rest]
        one = _side_by_side(ones, f)
        self.levels, self.k = one.levels, one.effects
        self.widths = [design.shape[1] // one.levels for design in ones]
        self.sizes = [design.shape[1] for design in two]
        self.q = sum(self.sizes)
        # Levels and effects of the other terms whose levels are independent, None for the rest.
        self.grids = [_grid(terms[i]) for i in self.layout.rest]
        self._forms = [terms[i].covariance for i in self.layout.random]

        self.A11 = _squares(one)
        linked = [grid is None for grid in self.grids]
        self.W, self.A22, self.partition = cross_product(one, two, linked, f)
        self.A1f = one.t_matmul(f).unflatten(0, (self.levels, self.k))
        empty = f.new_zeros(0, f.shape[1])
        self.A2f = torch.cat([empty, *[design.t_matmul(f) for design in two]])
        self.Aff = f.mT @ f

    def matrices(self, terms: Sequence[Term]) -> list[Tensor]:
        variance = torch.stack([terms[i].covariance.matrix for i in self.layout.residual]).sum(0)
        return [variance, *[terms[i].covariance.matrix for i in self.layout.random]]

    def _evaluate(self, terms: Sequence[Term], matrices: list[Tensor]) -> Evaluation:
        return _BlockedEvaluation(self, terms, matrices[0])

    def recorded(self, matrices: Sequence[Tensor]) -> Tensor:
        # In G itself: a factor of G has no derivative where G is singular.
        s = matrices[0].reshape(())
        forms = zip(self._forms, matrices[1:], strict=True)
        random = [form.with_matrix(matrix) for form, matrix in forms]
        first, rest = random[: len(self.widths)], random[len(self.widths) :]
        eye = torch.eye(self.k, dtype=s.dtype, device=s.device)
        G1 = self.joint_blocks(first, eye)
        D = eye + self.A11 @ G1 / s
        K = torch.linalg.solve(D.mT, G1.mT).mT / s**2  # G1 D^-1 / s^2
        KA = K @ self.A1f
        E22 = self.A22 / s - self.W.gram(K)
        E2f = self.A2f / s - self.W.t_times(KA)
        Eff = self.Aff / s - _inner(self.A1f, KA)
        by = self.partition
        M = by.spread(self.multiply(rest, by.collect(E22)))  # G2 E22
        M = M + torch.eye(by.size, dtype=s.dtype, device=s.device)
        x = by.collect(torch.linalg.solve(M, by.spread(self.multiply(rest, E2f))))
        F = Eff - E2f.mT @ x
        log_det = self.n * s.log() + _log_det(D).sum() + _log_det(M).sum()
        return self._profile(log_det, F[:-1, :-1], F[:-1, -1], F[-1, -1])[0]

    def cost(self) -> tuple[float, float]:
        """Operations of an evaluation with its scores, and bytes held for it."""
        by, k = self.partition, self.k
        groups = max(by.count, 1) * float(by.size) ** 2
        r = self.p + 1
        own = self.levels * k * (8.0 * k * k + 4 * k * r)
        work = own + 2 * self.W.work + 2 * groups * by.size
        memory = self.Aff.itemsize * (self.W.entries + 5 * groups + 8.0 * self.levels * k * (k + r))
        return work, memory

    # ------------------------------------------------------------------ helpers

    def joint_blocks(self, parts: Sequence[Covariance], eye: Tensor) -> Tensor:
        """Blocks of the eliminated factor, its terms' blocks along the diagonal."""
        if not parts:
            return eye[None]
        blocks = [part.blocks(self.levels, w) for part, w in zip(parts, self.widths, strict=True)]
        if len(blocks) == 1:
            return blocks[0]
        count = max(len(block) for block in blocks)
        joint = eye.new_zeros(count, self.k, self.k)
        at = 0
        for block in blocks:
            w = block.shape[1]
            pad = (at, self.k - at - w, at, self.k - at - w)
            joint = joint + torch.nn.functional.pad(block, pad)
            at += w
        return joint

    def multiply(self, parts: Sequence[Covariance], x: Tensor, transpose: bool = False) -> Tensor:
        """The other terms' block-diagonal matrix times ``x`` (q, m)."""
        if not parts:
            return x
        if len(parts) == 1:
            return parts[0].multiply(x, transpose)
        pieces = zip(parts, x.split(self.sizes), strict=True)
        return torch.cat([part.multiply(piece, transpose) for part, piece in pieces])

    def along_blocks(
        self, parts: Sequence[Covariance], derivatives: Sequence[Tensor], u: Tensor
    ) -> Tensor:
        """Each derivative of the eliminated terms' matrices times ``u``, (m, levels, k)."""
        found = []
        for part, dG, x in zip(parts, derivatives, u.split(self.widths, 1), strict=True):
            blocks = (part.with_matrix(d).blocks(*x.shape) for d in dG)
            found.append(torch.stack([(block @ x[:, :, None])[:, :, 0] for block in blocks]))
        return torch.cat(found, 2)

    def along(
        self, parts: Sequence[Covariance], derivatives: Sequence[Tensor], u: Tensor
    ) -> Tensor:
        """Each derivative of the other terms' matrices times ``u``, (m, q)."""
        found = []
        for part, dG, x in zip(parts, derivatives, u.split(self.sizes), strict=True):
            moved = [part.with_matrix(d).multiply(x[:, None])[:, 0] for d in dG]
            found.append(torch.stack(moved))
        return torch.cat(found, 1)

    def split_blocks(self, blocks: Tensor) -> list[Tensor]:
        """From (levels, k, k) to the diagonal blocks of each eliminated term."""
        found, at = [], 0
        for w in self.widths:
            found.append(blocks[:, at : at + w, at : at + w])
            at += w
        return found

    def sandwich(
        self, roots: Sequence[Covariance], square: Tensor, transpose: bool = False
    ) -> Tensor:
        """:math:`\\Lambda S \\Lambda^\\top` (or transposed) for symmetric S by groups of columns."""
        by = self.partition
        # A root of one entry is a multiple of the identity.
        if all(isinstance(root, DiagonalCovariance) or len(root.matrix) == 1 for root in roots):
            scale = by.spread(self.multiply(roots, square.new_ones(self.q, 1)))
            return square * scale * scale.mT
        half = by.spread(self.multiply(roots, by.collect(square), transpose))
        return by.spread(self.multiply(roots, by.collect(half.mT), transpose))

    def own_blocks(self, square: Tensor) -> list[Tensor]:
        """Each other term's own part of a matrix by groups of columns: (levels, k, k) where its
        levels are independent."""
        found, at = [], 0
        for size, grid in zip(self.sizes, self.grids, strict=True):
            if grid is None:
                column = torch.arange(at, at + size, device=square.device)
                index = self.partition.index(column[:, None], column)
                found.append(square.reshape(-1)[index])
            else:
                found.append(self.partition.own(square, at, *grid))
            at += size
        return found

    def own_products(self, a: Tensor, b: Tensor) -> list[Tensor]:
        """The same of :math:`a b^\\top`, for a and b of shape (q, m)."""
        pieces = zip(a.split(self.sizes), b.split(self.sizes), self.grids, strict=True)
        return [
            x @ y.mT if grid is None else x.unflatten(0, grid) @ y.unflatten(0, grid).mT
            for x, y, grid in pieces
        ]


class _BlockedEvaluation(Evaluation):
    def __init__(self, problem: BlockedProblem, terms: Sequence[Term], variance: Tensor) -> None:
        self._problem = problem
        self._terms = terms
        self._s = s = variance.reshape(())
        if not float(s) > 0:
            raise NotPositiveDefiniteError(f"V is not positive definite: residual variance {s:.6g}")
        layout = problem.layout
        self._first = [terms[i].covariance for i in layout.eliminated]
        self._rest = [terms[i].covariance for i in layout.rest]
        eye = torch.eye(problem.k, dtype=s.dtype, device=s.device)
        self._L1 = problem.joint_blocks([_root(terms[i]) for i in layout.eliminated], eye)
        self._root2 = [_root(terms[i]) for i in layout.rest]

        D = eye + self._L1.mT @ problem.A11 @ self._L1 / s
        self._C = cholesky(D, "V")
        self._half = solve_triangular(self._C, self._L1.mT.expand_as(D), upper=False)
        self._P = self._half.mT @ self._half  # L1 D^-1 L1'
        KA = self._P @ problem.A1f / s**2
        self._E22 = problem.A22 / s - problem.W.gram(self._P / s**2)
        self._E2f = problem.A2f / s - problem.W.t_times(KA)
        eye = torch.eye(problem.partition.size, dtype=s.dtype, device=s.device)
        self._M = problem.sandwich(self._root2, self._E22, transpose=True) + eye
        self._Lc = cholesky(self._M, "V")
        self._K = self._forward_2(self._E2f)
        F = problem.Aff / s - _inner(problem.A1f, KA) - _inner(self._K, self._K)
        log_det = (
            problem.n * s.log()
            + 2 * self._C.diagonal(dim1=1, dim2=2).log().sum()
            + 2 * self._Lc.diagonal(dim1=1, dim2=2).log().sum()
        )
        self.log_likelihood, self.gamma_factor, white = problem._profile(
            log_det, F[:-1, :-1], F[:-1, -1], F[-1, -1]
        )
        self.y_p_y = F[-1, -1] - white @ white
        self.gamma = solve_triangular(self.gamma_factor.mT, white[:, None], upper=True)[:, 0]

    def _forward_2(self, x: Tensor) -> Tensor:
        """Lc^-1 L2' x for x (q, m), by groups of columns."""
        problem = self._problem
        rows = problem.partition.spread(problem.multiply(self._root2, x, transpose=True))
        return solve_triangular(self._Lc, rows, upper=False)

    # ------------------------------------------------------------------ Z' P y and Z' P Z

    @cached_property
    def _crossed(self) -> _Crossed:
        r"""What the score, the information and the BLUPs share."""
        problem, s = self._problem, self._s
        A = problem.A11 / s
        T = torch.eye(problem.k, dtype=s.dtype, device=s.device) - A @ self._P
        by = problem.partition
        back = by.collect(solve_triangular(self._Lc.mT, self._K, upper=True))
        x = problem.multiply(self._root2, back)
        Z1f = T @ (problem.A1f - problem.W.times(x)) / s  # Z1' V^-1 [Q | y]
        Z2f = self._E2f - by.collect(self._E22 @ by.spread(x))
        M_inverse = torch.cholesky_inverse(self._Lc)
        inverse = problem.sandwich(self._root2, M_inverse)
        B1 = T @ A - T @ problem.W.quadratic(inverse) @ T.mT / s**2
        Y1 = solve_triangular(self.gamma_factor, Z1f[..., :-1].mT, upper=False)
        Y2 = solve_triangular(self.gamma_factor, Z2f[:, :-1].mT, upper=False)
        u1 = Z1f[..., -1] - Z1f[..., :-1] @ self.gamma
        u2 = Z2f[:, -1] - Z2f[:, :-1] @ self.gamma
        B2 = self._inner_22(M_inverse, inverse)
        return _Crossed(u1, u2, B1, B2, Y1.mT @ Y1, problem.own_products(Y2.mT, Y2.mT))

    def _inner_22(self, M_inverse: Tensor, inverse: Tensor) -> list[Tensor]:
        r""":math:`Z_2^\top V^{-1} Z_2`, E22 less E22 (L2 M^-1 L2') E22, each term's own part."""
        problem = self._problem
        gain = problem.partition.diagonal(self._M) - 1
        if all(grid is not None and grid[1] == 1 for grid in problem.grids) and bool(
            (gain > 1e-4).all()
        ):
            # L2' of it L2 is I - M^-1: no product of large matrices, where no digits are lost.
            root = problem.multiply(self._root2, torch.ones_like(gain)[:, None])[:, 0]
            diagonal = (1 - problem.partition.diagonal(M_inverse)) / root**2
            return [part[:, None, None] for part in diagonal.split(problem.sizes)]
        return problem.own_blocks(self._E22 - self._E22 @ inverse @ self._E22)

    def scores(self) -> list[Tensor]:
        problem, s, z = self._problem, self._s, self._crossed
        reml = problem.method == "reml"
        B1 = z.B1 - z.R1 if reml else z.B1
        S1 = (z.u1[:, :, None] * z.u1[:, None, :] - B1) / 2
        found = [
            g.fold_blocks(x) for g, x in zip(self._first, problem.split_blocks(S1), strict=True)
        ]
        square = problem.own_products(z.u2[:, None], z.u2[:, None])
        for g, uu, B, R, grid in zip(self._rest, square, z.B2, z.R2, problem.grids, strict=True):
            S2 = (uu - B + R if reml else uu - B) / 2
            found.append(g.fold(S2) if grid is None else g.fold_blocks(S2))
        # The residual's score by V = sum Z G Z' + s I: tr(P V) = n - p and y' P V P y = y' P y.
        matrices = [g.matrix for g in (*self._first, *self._rest)]
        inner = sum((2 * (x * m).sum() for x, m in zip(found, matrices, strict=True)), 0 * s)
        rank = problem.n - (problem.p if reml else 0)
        residual = (self.y_p_y - rank - inner) / (2 * s)
        return [residual.reshape(1, 1), *found]

    def information(self, derivatives: Sequence[Tensor]) -> Tensor:
        problem, s, z = self._problem, self._s, self._crossed
        m = len(derivatives[0])
        ds = derivatives[0].reshape(m)
        split = len(self._first)
        b1, b2 = self._blups()
        # Working variates as coefficients of [Z1 | Z2 | Q | y].
        C1 = -b1.reshape(-1, 1) * ds / s
        C2 = -b2[:, None] * ds / s
        if split:
            w1 = problem.along_blocks(self._first, derivatives[1 : 1 + split], z.u1)
            C1 = C1 + w1.reshape(m, -1).mT
        if self._rest:
            C2 = C2 + problem.along(self._rest, derivatives[1 + split :], z.u2).mT
        Cf = torch.cat([ds.new_zeros(problem.p, m), (ds / s)[None]])
        C1 = C1.reshape(problem.levels, problem.k, m)
        T1 = (problem.A11 @ C1 + problem.W.times(C2) + problem.A1f @ Cf) / s
        by = problem.partition
        A22C2 = by.collect(problem.A22 @ by.spread(C2))
        T2 = (problem.W.t_times(C1) + A22C2 + problem.A2f @ Cf) / s
        Tf = (_inner(problem.A1f, C1) + problem.A2f.mT @ C2 + problem.Aff @ Cf) / s
        total = _inner(C1, T1) + C2.mT @ T2 + Cf.mT @ Tf
        e1 = self._half @ T1
        back = self._half.mT @ e1 / s
        T2 = T2 - problem.W.t_times(back)
        Tf = Tf - _inner(problem.A1f, back)
        e2 = self._forward_2(T2)
        TX = Tf[:-1] - _inner(self._K[..., :-1], e2)
        e3 = solve_triangular(self.gamma_factor, TX, upper=False)
        return (total - _inner(e1, e1) - _inner(e2, e2) - e3.mT @ e3) / 2

    def _blups(self) -> tuple[Tensor, Tensor]:
        """G u of the eliminated factor (levels, k) and of the others (q,)."""
        problem, z = self._problem, self._crossed
        eye = torch.eye(problem.k, dtype=self._s.dtype, device=self._s.device)
        G1 = problem.joint_blocks(self._first, eye)
        b1 = (G1 @ z.u1[:, :, None])[:, :, 0]
        return b1, problem.multiply(self._rest, z.u2[:, None])[:, 0]

    def random_effects(self) -> list[RandomEffects]:
        problem, z = self._problem, self._crossed
        b1, b2 = self._blups()
        B1 = problem.split_blocks(z.B1 - z.R1)
        found = {}
        layout = problem.layout
        for i, g, b, B in zip(
            layout.eliminated, self._first, b1.split(problem.widths, 1), B1, strict=True
        ):
            found[i] = RandomEffects.of_levels(self._terms[i].name, b, g.blocks(*b.shape), B)
        pieces = zip(layout.rest, b2.split(problem.sizes), z.B2, z.R2, problem.grids, strict=True)
        for i, b, whole, lost, grid in pieces:
            term = self._terms[i]
            if grid is None:
                found[i] = RandomEffects.of(term, b, whole - lost)
            else:
                prior = term.covariance.blocks(*grid)
                values = b.unflatten(0, grid)
                found[i] = RandomEffects.of_levels(term.name, values, prior, whole - lost)
        return [found[i] for i in sorted(found)]


@dataclass(frozen=True)
class _Crossed:
    r""":math:`u = Z^\top P y`, :math:`B = Z^\top V^{-1} Z` and what is lost of it in
    :math:`Z^\top P Z`, for the eliminated factor by levels and for the others' own parts."""

    u1: Tensor
    u2: Tensor
    B1: Tensor
    B2: list[Tensor]
    R1: Tensor
    R2: list[Tensor]


def _grid(term: Term) -> tuple[int, int] | None:
    """Levels and effects of a term whose levels are independent."""
    z = term.design
    return (z.levels, z.effects) if _separable(term) and isinstance(z, IndexedDesign) else None


def _root(term: Term) -> Covariance:
    try:
        return term.covariance.root()
    except ValueError as error:
        raise NotPositiveDefiniteError(
            f"the covariance of {term.name!r} is not positive semi-definite: {error}"
        ) from None


def _log_det(matrix: Tensor) -> Tensor:
    return torch.linalg.slogdet(matrix).logabsdet


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """:math:`a^\\top b` over levels and effects, of (levels, k, m) and (levels, k, r)."""
    return a.flatten(0, 1).mT @ b.flatten(0, 1)


def _side_by_side(designs: Sequence[Design], like: Tensor) -> IndexedDesign:
    """One design with the effects of several that share their codes; of no level if there are none."""
    if not designs:
        return IndexedDesign(like.new_zeros(len(like), dtype=torch.long), like[:, :0], 0)
    first = designs[0]
    assert isinstance(first, IndexedDesign)
    values = [values_of(d, like) for d in designs if isinstance(d, IndexedDesign)]
    return IndexedDesign(first.codes, torch.cat(values, 1), first.levels)


def _squares(design: IndexedDesign) -> Tensor:
    """Diagonal blocks of Z' Z, (levels, k, k)."""
    v = design.values
    assert v is not None
    k = design.effects
    total = v.new_zeros(design.levels, k * k)
    if design.levels:
        total = total.index_add(0, design.codes, (v[:, :, None] * v[:, None, :]).flatten(1))
    return total.unflatten(1, (k, k))
