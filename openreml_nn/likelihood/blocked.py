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
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.linalg import solve_triangular

from openreml_nn.covariance.design import DenseDesign, Design, IndexedDesign
from openreml_nn.covariance.terms import (
    Covariance,
    DiagonalCovariance,
    RepeatedCovariance,
    Term,
    residual_terms,
)
from openreml_nn.likelihood.cross import Arrangement, System
from openreml_nn.likelihood.fixed import FixedPart
from openreml_nn.likelihood.problem import (
    Evaluation,
    NotPositiveDefiniteError,
    Problem,
    RandomEffects,
    cholesky,
)
from openreml_nn.likelihood.products import Pattern, same_codes
from openreml_nn.likelihood.residual import Residual, White

__all__ = ["BlockedProblem", "Layout", "separated"]

#: A covariance of more effects than these within a level is taken as dense.
_MOST_EFFECTS = 64


@dataclass(frozen=True)
class Layout:
    """Which term does what; positions refer to the list of terms.

    Attributes:
        residual: the covariance R of the residuals.
        eliminated: terms of the grouping factor that is eliminated first; they
            share its level codes, and their effects stand side by side.
        rest: the other random terms.
    """

    residual: Residual
    eliminated: list[int]
    rest: list[int]

    @classmethod
    def of(cls, terms: Sequence[Term]) -> Layout:
        """Arrange the terms.

        Raises:
            ValueError: if the residuals are neither independent nor within groups.
        """
        residual = Residual.of(terms)
        random = [i for i in range(len(terms)) if i not in residual.at]
        factors: list[list[tuple[int, IndexedDesign]]] = []
        for i in random:
            design = terms[i].design
            # Rows that R makes dependent must be of one level, or levels would mix.
            if not isinstance(design, IndexedDesign) or not _separable(terms[i]):
                continue
            if not residual.is_within(design.codes):
                continue
            for factor in factors:
                if same_codes(factor[0][1], design):
                    factor.append((i, design))
                    break
            else:
                factors.append([(i, design)])
        width = [sum(design.shape[1] for _, design in factor) for factor in factors]
        eliminated = [i for i, _ in factors[width.index(max(width))]] if factors else []
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


def separated(terms: Sequence[Term]) -> list[Term]:
    r"""The same terms, with independent levels seen as such.

    A covariance of the cells of levels and occasions,
    :math:`I \otimes \Sigma` with a column for each cell, is that of so many
    effects of each level.
    """
    residual = residual_terms(terms)
    return [term if i in residual else _by_levels(term) for i, term in enumerate(terms)]


def _by_levels(term: Term) -> Term:
    z, g = term.design, term.covariance
    if not isinstance(z, IndexedDesign) or not isinstance(g, RepeatedCovariance):
        return term
    k = g.matrix.shape[0]
    if z.effects != 1 or not 1 < k <= _MOST_EFFECTS:
        return term
    values = torch.nn.functional.one_hot(z.codes % k, k).to(g.matrix.dtype)
    if z.values is not None:
        values = values * z.values
    return replace(term, design=IndexedDesign(z.codes // k, values, g.levels))


class BlockedProblem(Problem):
    r"""Depends on the matrices of the residual and on that of each random term.

    In names, 1 is the eliminated factor (``levels`` levels of k effects), 2
    the other random terms (q columns), f the p columns of Q and then y; rows
    are first made independent by R. With a scalar residual, its variance s
    factors out, so that the cross-products are had once.
    """

    def __init__(self, fixed: FixedPart, terms: Sequence[Term], method: str) -> None:
        super().__init__(fixed, terms, method)
        terms = separated(terms)
        self.layout = layout = Layout.of(terms)
        self.residual = layout.residual
        self._designs = [self._white_as_is(terms[i].design) for i in layout.random]
        self._f = torch.cat([fixed.Q, fixed.y[:, None]], 1)
        pattern = Pattern.of(self._designs)
        # Levels and effects of the other terms whose levels are independent, None for the rest.
        self.grids = [_grid(terms[i]) for i in layout.rest]
        split = len(layout.eliminated)
        arrangement = Arrangement(
            self._designs,
            pattern,
            range(split),
            range(split, len(self._designs)),
            [grid is None for grid in self.grids],
            self._f.device,
        )
        self.levels, self.k = arrangement.levels, arrangement.k
        self.widths, self.sizes = arrangement.widths, arrangement.sizes
        self.q, self.partition = arrangement.q, arrangement.partition
        self._cross_cost = arrangement.cross_cost()
        self._forms = [terms[i].covariance for i in layout.random]
        self._moving: tuple[Pattern, Arrangement] | None = (pattern, arrangement)
        self._constant: tuple[System, White] | None = None
        if not self.residual.moves:
            # Then the products are all that is needed, and what leads to them can go.
            self._constant = self._system([torch.ones_like(self._f[:1, :1])])
            self._moving = None

    def _white_as_is(self, design: Design) -> Design:
        """The design, without structure where R would mix its levels."""
        if isinstance(design, IndexedDesign) and not self.residual.is_within(design.codes):
            return DenseDesign(design.dense(self.fixed.y))
        return design

    def matrices(self, terms: Sequence[Term]) -> list[Tensor]:
        random = [terms[i].covariance.matrix for i in self.layout.random]
        return [*self.residual.matrices(terms), *random]

    def system(self, residual: Sequence[Tensor]) -> tuple[System, White, Tensor]:
        """The system of white rows, R without a scalar residual's variance, and that variance."""
        if self._constant is not None:
            return (*self._constant, residual[0].reshape(()))
        return (*self._system(residual), self._f.new_ones(()))

    def _system(self, residual: Sequence[Tensor]) -> tuple[System, White]:
        assert self._moving is not None
        pattern, arrangement = self._moving
        white = self.residual.white(residual)
        designs = [white.design(design) for design in self._designs]
        products = pattern.products(designs, white.rows(self._f))
        return arrangement.place(products), white

    def _evaluate(self, terms: Sequence[Term], matrices: list[Tensor]) -> Evaluation:
        return _BlockedEvaluation(self, terms, matrices)

    def recorded(self, matrices: Sequence[Tensor]) -> Tensor:
        # In G itself: a factor of G has no derivative where G is singular.
        split = len(matrices) - len(self._forms)
        at, white, s = self.system(matrices[:split])
        forms = zip(self._forms, matrices[split:], strict=True)
        random = [form.with_matrix(matrix) for form, matrix in forms]
        first, rest = random[: len(self.widths)], random[len(self.widths) :]
        eye = torch.eye(self.k, dtype=s.dtype, device=s.device)
        G1 = self.joint_blocks(first, eye)
        D = eye + at.A11 @ G1 / s
        K = torch.linalg.solve(D.mT, G1.mT).mT / s**2  # G1 D^-1 / s^2
        KA = K @ at.A1f
        E22 = at.A22 / s - at.W.gram(K)
        E2f = at.A2f / s - at.W.t_times(KA)
        Eff = at.Aff / s - _inner(at.A1f, KA)
        by = self.partition
        M = by.spread(self.multiply(rest, by.collect(E22)))  # G2 E22
        M = M + torch.eye(by.size, dtype=s.dtype, device=s.device)
        x = by.collect(torch.linalg.solve(M, by.spread(self.multiply(rest, E2f))))
        F = Eff - E2f.mT @ x
        log_det = white.log_det + self.n * s.log() + _log_det(D).sum() + _log_det(M).sum()
        return self._profile(log_det, F[:-1, :-1], F[:-1, -1], F[-1, -1])[0]

    def cost(self) -> tuple[float, float]:
        """Operations of an evaluation with its scores, and bytes held for it."""
        by, k = self.partition, self.k
        entries, work = self._cross_cost
        groups = max(by.count, 1) * float(by.size) ** 2
        r = self.p + 1
        own = self.levels * k * (8.0 * k * k + 4 * k * r)
        work = own + 2 * work + 2 * groups * by.size
        entries += 5 * groups + 8.0 * self.levels * k * (k + r)
        if self.residual.moves:
            work += 4.0 * self.n * (self.residual.size + self.k + r) * (self.k + r)
            entries += 4.0 * self.n * (self.residual.size + self.k + r)
        memory = self._f.itemsize * entries
        return work, memory

    # ------------------------------------------------------------------ helpers

    def row_effects(self, x1: Tensor, x2: Tensor) -> Tensor:
        r""":math:`Z_1 x_1 + Z_2 x_2` over the rows, of effects (levels * k, m) and (q, m)."""
        split = len(self.widths)
        found = x1.new_zeros(self.n, max(x1.shape[1], x2.shape[1]))
        pieces = list(x2.split(self.sizes)) if self.sizes else []
        if split:
            by_level = x1.unflatten(0, (self.levels, self.k)).split(self.widths, 1)
            pieces = [*(piece.flatten(0, 1) for piece in by_level), *pieces]
        for design, piece in zip(self._designs, pieces, strict=True):
            found = found + design.matmul(piece)
        return found

    def row_products(self, white: White, F: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r"""Products of white rows F (n, m) with :math:`[Z_1 | Z_2 | f]`."""
        back = white.back(F)
        split = len(self.widths)
        found = [design.t_matmul(back) for design in self._designs]
        ones = [x.unflatten(0, (self.levels, -1)) for x in found[:split]]
        by_level = (self.levels, self.k, F.shape[1])
        T1 = torch.cat(ones, 1) if ones else F.new_zeros(by_level)
        T2 = torch.cat(found[split:]) if found[split:] else F.new_zeros(0, F.shape[1])
        return T1, T2, self._f.mT @ back

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
    def __init__(
        self, problem: BlockedProblem, terms: Sequence[Term], matrices: Sequence[Tensor]
    ) -> None:
        self._problem = problem
        self._terms = terms
        self._matrices = matrices
        layout = problem.layout
        residual = matrices[: len(matrices) - len(layout.random)]
        self._at, self._white, s = at, white, s = problem.system(residual)
        self._s = s
        if not float(s) > 0:
            raise NotPositiveDefiniteError(f"V is not positive definite: residual variance {s:.6g}")
        self._first = [terms[i].covariance for i in layout.eliminated]
        self._rest = [terms[i].covariance for i in layout.rest]
        eye = torch.eye(problem.k, dtype=s.dtype, device=s.device)
        self._L1 = problem.joint_blocks([_root(terms[i]) for i in layout.eliminated], eye)
        self._root2 = [_root(terms[i]) for i in layout.rest]

        D = eye + self._L1.mT @ at.A11 @ self._L1 / s
        self._C = cholesky(D, "V")
        self._half = solve_triangular(self._C, self._L1.mT.expand_as(D), upper=False)
        self._P = self._half.mT @ self._half  # L1 D^-1 L1'
        KA = self._P @ at.A1f / s**2
        self._E22 = at.A22 / s - at.W.gram(self._P / s**2)
        self._E2f = at.A2f / s - at.W.t_times(KA)
        eye = torch.eye(problem.partition.size, dtype=s.dtype, device=s.device)
        self._M = problem.sandwich(self._root2, self._E22, transpose=True) + eye
        self._Lc = cholesky(self._M, "V")
        self._K = self._forward_2(self._E2f)
        F = at.Aff / s - _inner(at.A1f, KA) - _inner(self._K, self._K)
        log_det = (
            white.log_det
            + problem.n * s.log()
            + 2 * self._C.diagonal(dim1=1, dim2=2).log().sum()
            + 2 * self._Lc.diagonal(dim1=1, dim2=2).log().sum()
        )
        self.log_likelihood, self.gamma_factor, half = problem._profile(
            log_det, F[:-1, :-1], F[:-1, -1], F[-1, -1]
        )
        self.y_p_y = F[-1, -1] - half @ half
        self.gamma = solve_triangular(self.gamma_factor.mT, half[:, None], upper=True)[:, 0]

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
        A = self._at.A11 / s
        T = torch.eye(problem.k, dtype=s.dtype, device=s.device) - A @ self._P
        by = problem.partition
        back = by.collect(solve_triangular(self._Lc.mT, self._K, upper=True))
        x = problem.multiply(self._root2, back)
        Z1f = T @ (self._at.A1f - self._at.W.times(x)) / s  # Z1' V^-1 [Q | y]
        Z2f = self._E2f - by.collect(self._E22 @ by.spread(x))
        M_inverse = torch.cholesky_inverse(self._Lc)
        inverse = problem.sandwich(self._root2, M_inverse)
        B1 = T @ A - T @ self._at.W.quadratic(inverse) @ T.mT / s**2
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
        if self._problem.residual.moves:
            return self._scores_by_backward()
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

    def _scores_by_backward(self) -> list[Tensor]:
        with torch.enable_grad():
            matrices = [matrix.detach().requires_grad_() for matrix in self._matrices]
            value = self._problem.recorded(matrices)
            return list(torch.autograd.grad(value, matrices))

    def information(self, derivatives: Sequence[Tensor]) -> Tensor:
        problem = self._problem
        found = self._variates_of_rows if problem.residual.moves else self._variates
        T1, T2, Tf, total = found(derivatives)
        e1 = self._half @ T1
        back = self._half.mT @ e1 / self._s
        T2 = T2 - self._at.W.t_times(back)
        Tf = Tf - _inner(self._at.A1f, back)
        e2 = self._forward_2(T2)
        TX = Tf[:-1] - _inner(self._K[..., :-1], e2)
        e3 = solve_triangular(self.gamma_factor, TX, upper=False)
        return (total - _inner(e1, e1) - _inner(e2, e2) - e3.mT @ e3) / 2

    def _variates(self, derivatives: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        r"""Products of the working variates with [Z1 | Z2 | f] and with themselves, over s.

        As the variates are combinations of these columns, they cost nothing in n.
        """
        problem, at, s = self._problem, self._at, self._s
        m = len(derivatives[0])
        ds = derivatives[0].reshape(m)
        b1, b2 = self._blups()
        C1 = -b1.reshape(-1, 1) * ds / s
        C2 = -b2[:, None] * ds / s
        w1, w2 = self._moved(derivatives[1:])
        C1 = (C1 + w1).reshape(problem.levels, problem.k, m)
        C2 = C2 + w2
        Cf = torch.cat([ds.new_zeros(problem.p, m), (ds / s)[None]])
        T1 = (at.A11 @ C1 + at.W.times(C2) + at.A1f @ Cf) / s
        by = problem.partition
        A22C2 = by.collect(at.A22 @ by.spread(C2))
        T2 = (at.W.t_times(C1) + A22C2 + at.A2f @ Cf) / s
        Tf = (_inner(at.A1f, C1) + at.A2f.mT @ C2 + at.Aff @ Cf) / s
        return T1, T2, Tf, _inner(C1, T1) + C2.mT @ T2 + Cf.mT @ Tf

    def _variates_of_rows(
        self, derivatives: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same where R moves by more than a factor: over the rows."""
        problem, white = self._problem, self._white
        split = len(problem.residual.at)
        w1, w2 = self._moved(derivatives[split:])
        b1, b2 = self._blups()  # the conditional residual needs these, the variates the others
        both = torch.cat([b1.reshape(-1, 1), w1], 1), torch.cat([b2[:, None], w2], 1)
        effects = problem.row_effects(*both)
        fixed = problem.fixed
        rest = fixed.y - fixed.Q @ self.gamma - effects[:, 0]
        p_y = white.back(white.rows(rest[:, None]))[:, 0]  # R^-1 of it is P y
        variates = effects[:, 1:] + problem.residual.along(derivatives[:split], p_y)
        F = white.rows(variates)
        T1, T2, Tf = problem.row_products(white, F)
        return T1, T2, Tf, F.mT @ F

    def _moved(self, derivatives: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Each derivative of G times u, for the eliminated factor (levels * k, m) and the
        others (q, m)."""
        problem, z, split = self._problem, self._crossed, len(self._first)
        m = len(derivatives[0]) if derivatives else 1
        w1, w2 = z.u1.new_zeros(z.u1.numel(), m), z.u2.new_zeros(len(z.u2), m)
        if split:
            moved = problem.along_blocks(self._first, derivatives[:split], z.u1)
            w1 = moved.reshape(m, -1).mT
        if self._rest:
            w2 = problem.along(self._rest, derivatives[split:], z.u2).mT
        return w1, w2

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
