"""What solvers in the space of the random effects share: who is eliminated, and what follows
from the inverse of the system."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.linalg import solve_triangular

from openreml_nn.likelihood.fixed import FixedPart
from openreml_nn.likelihood.problem import (
    Evaluation,
    NotPositiveDefiniteError,
    Problem,
    RandomEffects,
    cholesky,
    pivot_loss,
)
from openreml_nn.likelihood.residual import Residual, White
from openreml_nn.likelihood.system.cross import Arrangement, System
from openreml_nn.likelihood.system.partition import Partition
from openreml_nn.likelihood.system.products import Pattern, same_codes
from openreml_nn.likelihood.system.square_root import SquareRootEvaluation
from openreml_nn.terms.covariance import (
    Covariance,
    DiagonalCovariance,
    RepeatedCovariance,
    ScaledCovariance,
)
from openreml_nn.terms.design import DenseDesign, Design, IndexedDesign
from openreml_nn.terms.term import Term, residual_terms

__all__ = [
    "Crossed",
    "GroupedEvaluation",
    "GroupedProblem",
    "Layout",
    "by_levels",
    "grid_of",
    "inner",
    "root",
    "separated",
    "steps_of",
]

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

    def sizes(self, terms: Sequence[Term]) -> tuple[int, int]:
        """Levels of the eliminated factor and effects of each, (0, 1) if there is none."""
        if not self.eliminated:
            return 0, 1
        levels = getattr(terms[self.eliminated[0]].design, "levels", 1)
        return levels, sum(terms[i].design.shape[1] for i in self.eliminated) // levels


def steps_of(
    terms: Sequence[Term], layout: Layout, p: int, groups: Partition | None = None
) -> tuple[str, ...]:
    """What is eliminated, in order; ``groups`` are those of the other terms' columns, None where
    they are not factorised."""
    steps = []
    if layout.residual.moves:
        block = f"{layout.residual.size} x {layout.residual.size}"
        steps.append(f"residuals: blocks of at most {block}, anew at each evaluation")
    if layout.eliminated:
        levels, k = layout.sizes(terms)
        names = " and ".join(repr(terms[i].name) for i in layout.eliminated)
        steps.append(f"{names}: {levels} blocks of {k} x {k}")
    if layout.rest:
        q = sum(terms[i].design.shape[1] for i in layout.rest)
        names = ", ".join(repr(terms[i].name) for i in layout.rest)
        if groups is None:
            steps.append(f"{names}: conjugate gradients, {q} columns")
        elif groups.whole:
            steps.append(f"{names}: dense, {q} x {q}")
        else:
            size = f"{groups.size} x {groups.size}"
            steps.append(f"{names}: {groups.count} groups of at most {size}")
    return (*steps, f"fixed effects: dense, {p} x {p}")


def _separable(term: Term) -> bool:
    """Whether levels are independent, so that the term is block diagonal by level."""
    z, g = term.design, term.covariance
    if not isinstance(z, IndexedDesign):
        return False
    if isinstance(g, RepeatedCovariance):
        return z.effects % g.matrix.shape[0] == 0
    return isinstance(g, DiagonalCovariance)


def separated(terms: Sequence[Term]) -> list[Term]:
    r"""The same terms, with independent levels seen as such.

    A covariance of the cells of levels and occasions,
    :math:`I \otimes \Sigma` with a column for each cell, is that of so many
    effects of each level.
    """
    residual = residual_terms(terms)
    return [term if i in residual else by_levels(term) for i, term in enumerate(terms)]


def by_levels(term: Term) -> Term:
    """The term with a column for each of the effects of a level, where its levels are independent."""
    z, g = term.design, term.covariance
    if not isinstance(z, IndexedDesign):
        return term
    if not isinstance(g, RepeatedCovariance | ScaledCovariance):
        return term
    k = g.matrix.shape[0]
    if z.effects != 1 or not 1 < k <= _MOST_EFFECTS:
        return term
    values = torch.nn.functional.one_hot(z.codes % k, k).to(g.matrix.dtype)
    if z.values is not None:
        values = values * z.values
    return replace(term, design=IndexedDesign(z.codes // k, values, z.levels // k))


def arranged(
    designs: Sequence[Design],
    layout: Layout,
    grids: Sequence[tuple[int, int] | None],
    pair_cost: float,
    pattern: Pattern | None = None,
) -> tuple[Pattern, Arrangement]:
    """Which levels of the random terms meet, and where their products stand in the system."""
    if pattern is None:
        pattern = Pattern.of(designs)
    split, count = len(layout.eliminated), len(designs)
    linked = [grid is None for grid in grids]
    two = range(split, count)
    return pattern, Arrangement(designs, pattern, range(split), two, linked, pair_cost)


class GroupedProblem(Problem):
    r"""Depends on the matrices of the residual and on that of each random term.

    In names, 1 is the eliminated factor (``levels`` levels of k effects), 2
    the other random terms (q columns), f the p columns of Q and then y; rows
    are first made independent by R. With a scalar residual, its variance s
    factors out.
    """

    takes_data = True

    def __init__(self, fixed: FixedPart, terms: Sequence[Term], method: str) -> None:
        super().__init__(fixed, terms, method)
        self._constant: tuple[System, White] | None = None
        self.terms = list(terms)
        terms = separated(terms)
        self.layout = layout = Layout.of(terms)
        self.residual = layout.residual
        self._designs = [self._white_as_is(terms[i].design) for i in layout.random]
        self._f = torch.cat([fixed.Q, fixed.y[:, None]], 1)
        # Levels and effects of the other terms whose levels are independent, None for the rest.
        self.grids = [grid_of(terms[i]) for i in layout.rest]
        self._forms = [terms[i].covariance for i in layout.random]
        ones = self._designs[: len(layout.eliminated)]
        self.levels = ones[0].levels if ones and isinstance(ones[0], IndexedDesign) else 0
        self.widths = [design.shape[1] // self.levels for design in ones]
        self.k = sum(self.widths)
        self.sizes = [design.shape[1] for design in self._designs[len(ones) :]]
        self.q = sum(self.sizes)

    def _white_as_is(self, design: Design) -> Design:
        """The design, without structure where R would mix its levels."""
        if isinstance(design, IndexedDesign) and not self.residual.is_within(design.codes):
            return DenseDesign(design.dense(self.fixed.y))
        return design

    def matrices(self, terms: Sequence[Term]) -> list[Tensor]:
        random = [terms[i].covariance.matrix for i in self.layout.random]
        return [*self.residual.matrices(terms), *random]

    def precise(self, terms: Sequence[Term]) -> Evaluation | None:
        placed = zip(self.terms, terms, strict=True)
        return SquareRootEvaluation.of(
            self, [replace(own, covariance=term.covariance) for own, term in placed]
        )

    def by_matrix(self, parts: Sequence[Tensor]) -> list[Tensor]:
        at = self.residual.at if self.residual.moves else self.residual.at[:1]
        return [parts[i] for i in (*at, *self.layout.random)]

    def by_term(self, parts: Sequence[Tensor]) -> list[Tensor]:
        at = self.residual.at if self.residual.moves else self.residual.at[:1]
        found = dict(zip((*at, *self.layout.random), parts, strict=True))
        # With one variance the derivative is that of the sum of the residual's terms.
        return [found.get(i, parts[0][:0]) for i in range(len(self.terms))]

    def with_fixed(self, fixed: FixedPart) -> Problem:
        found = super().with_fixed(fixed)
        assert isinstance(found, GroupedProblem)
        found._f = torch.cat([fixed.Q, fixed.y[:, None]], 1)
        if self._constant is not None:
            system, white = self._constant
            A1f, A2f, Aff = found.row_products(white, white.rows(found._f))
            found._constant = replace(system, A1f=A1f, A2f=A2f, Aff=Aff), white
        return found

    def system(self, residual: Sequence[Tensor]) -> tuple[System, White, Tensor]:
        """The system of white rows, R without a scalar residual's variance, and that variance."""
        raise NotImplementedError

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
            moved = [part.along(d, x[:, None])[:, 0] for d in dG]
            found.append(torch.stack(moved))
        return torch.cat(found, 1)

    def split_blocks(self, blocks: Tensor) -> list[Tensor]:
        """From (levels, k, k) to the diagonal blocks of each eliminated term."""
        found, at = [], 0
        for w in self.widths:
            found.append(blocks[:, at : at + w, at : at + w])
            at += w
        return found

    def own_products(self, a: Tensor, b: Tensor) -> list[Tensor]:
        """The same of :math:`a b^\\top`, for a and b of shape (q, m)."""
        pieces = zip(a.split(self.sizes), b.split(self.sizes), self.grids, strict=True)
        return [
            x @ y.mT if grid is None else x.unflatten(0, grid) @ y.unflatten(0, grid).mT
            for x, y, grid in pieces
        ]


@dataclass(frozen=True)
class Crossed:
    r""":math:`u = Z^\top P y`, :math:`B = Z^\top V^{-1} Z` and what is lost of it in
    :math:`Z^\top P Z`, for the eliminated factor by levels and for the others' own parts;
    ``Y2`` (p, q) is a factor of the latter loss, and ``Z1f``, ``Z2f`` are products of
    :math:`V^{-1}` with Z and f."""

    u1: Tensor
    u2: Tensor
    B1: Tensor
    B2: list[Tensor]
    R1: Tensor
    R2: list[Tensor]
    Y2: Tensor
    Z1f: Tensor
    Z2f: Tensor


class GroupedEvaluation(Evaluation):
    """The likelihood at one point by the inverse of the system.

    A subclass sets the attributes and implements :meth:`_explained`,
    :meth:`_times_22`, :meth:`_gain`, :meth:`_conditional`, ``_crossed`` and ``_solved``.
    """

    _problem: GroupedProblem
    _at: System
    _white: White

    def __init__(
        self, problem: GroupedProblem, terms: Sequence[Term], matrices: Sequence[Tensor]
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
        self._L1 = problem.joint_blocks([root(terms[i]) for i in layout.eliminated], eye)
        self._root2 = [self._root_of(terms[i]) for i in layout.rest]

        D = eye + self._L1.mT @ at.A11 @ self._L1 / s
        self._C = cholesky(D, "V")
        self._gain_1 = D.diagonal(dim1=1, dim2=2).amax() if D.numel() else s.new_ones(())
        self._pivot_loss = pivot_loss(D, self._C)
        self._half = solve_triangular(self._C, self._L1.mT.expand_as(D), upper=False)
        self._P = self._half.mT @ self._half  # L1 D^-1 L1'
        # By roots, because P times f is a difference where a level has fewer rows than effects.
        self._half_f = solve_triangular(self._C, self._L1.mT @ at.A1f, upper=False) / s
        self._KA = self._half.mT @ self._half_f / s
        self._E2f = at.A2f / s - at.W.t_times(self._KA)
        self._log_det = (
            white.log_det + problem.n * s.log() + 2 * self._C.diagonal(dim1=1, dim2=2).log().sum()
        )

    @staticmethod
    def _root_of(term: Term) -> Covariance:
        """The root of an other term's covariance."""
        return root(term)

    @cached_property
    def _crossed(self) -> Crossed:
        r"""What the score, the information and the BLUPs share."""
        raise NotImplementedError

    @cached_property
    def _solved(self) -> Tensor:
        r""":math:`G_2 Z_2^\top V^{-1} f`, (q, p + 1)."""
        raise NotImplementedError

    def _explained(self, T2: Tensor) -> tuple[Tensor, Tensor]:
        r"""Of T2 (q, m), what the other terms explain: :math:`T_2^\top N T_2` and
        :math:`E_{2Q}^\top N T_2` with N their :math:`\Lambda M^{-1}\Lambda^\top`."""
        raise NotImplementedError

    def _times_22(self, x: Tensor) -> Tensor:
        r""":math:`Z_2^\top Z_2 x` for x (q, m)."""
        raise NotImplementedError

    def _reduced(self, x: Tensor) -> Tensor:
        r""":math:`(I + A_{11} G_1 / s)^{-1} x` for x (levels, k, m).

        Not as :math:`I - A_{11} \Lambda D^{-1} \Lambda^\top`: where a level has fewer rows than
        effects that is a difference of large numbers.
        """
        if not len(x):
            return x
        if self._problem.k == 1:
            return x / self._C**2
        return torch.linalg.lu_solve(*self._factors, x)

    @cached_property
    def _factors(self) -> tuple[Tensor, Tensor]:
        problem, at = self._problem, self._at
        eye = torch.eye(problem.k, dtype=self._s.dtype, device=self._s.device)
        G1 = problem.joint_blocks(self._first, eye)
        LU, pivots = torch.linalg.lu_factor(eye + at.A11 @ G1 / self._s)
        return LU, pivots

    def _cross(self, Z1f: Tensor, Z2f: Tensor, B1: Tensor, B2: list[Tensor]) -> Crossed:
        r"""From products of :math:`V^{-1}` with :math:`Z` and f to those of P."""
        problem = self._problem
        Y1 = solve_triangular(self.gamma_factor, Z1f[..., :-1].mT, upper=False)
        Y2 = solve_triangular(self.gamma_factor, Z2f[:, :-1].mT, upper=False)
        u1 = Z1f[..., -1] - Z1f[..., :-1] @ self.gamma
        u2 = Z2f[:, -1] - Z2f[:, :-1] @ self.gamma
        own = problem.own_products(Y2.mT, Y2.mT)
        return Crossed(u1, u2, B1, B2, Y1.mT @ Y1, own, Y2, Z1f, Z2f)

    def _profile(self, log_det: Tensor, F: Tensor) -> None:
        """Profile the fixed effects out of :math:`[Q | y]^\top V^{-1} [Q | y]`."""
        self.log_likelihood, self.gamma_factor, half = self._problem._profile(
            log_det, F[:-1, :-1], F[:-1, -1], F[-1, -1]
        )
        self.y_p_y = F[-1, -1] - half @ half
        self.gamma = solve_triangular(self.gamma_factor.mT, half[:, None], upper=True)[:, 0]
        # What is left of the sums of squares, and how far the random effects exceed the residual.
        before, after = self._at.Aff.diagonal() / self._s, F.diagonal().clone()
        after[-1] = self._problem.n + self.y_p_y
        lost = max(float((before / after).max()), float(self._gain()), self._white.condition)
        self.rounding = torch.finfo(F.dtype).eps * lost

    def _gain(self) -> Tensor:
        r"""The largest entry on the diagonal of :math:`\Lambda^\top Z^\top R^{-1} Z \Lambda`."""
        raise NotImplementedError

    def _scores(self) -> list[Tensor]:
        problem, s, z = self._problem, self._s, self._crossed
        reml = problem.method == "reml"
        B1 = z.B1 - z.R1 if reml else z.B1
        S1 = (z.u1[:, :, None] * z.u1[:, None, :] - B1) / 2
        found = [
            g.fold_blocks(x) for g, x in zip(self._first, problem.split_blocks(S1), strict=True)
        ]
        found += self._scores_of_rest(reml)
        # The residual's score by V = sum Z G Z' + s I: tr(P V) = n - p and y' P V P y = y' P y.
        forms = (*self._first, *self._rest)
        explained = sum((2 * g.inner(x) for g, x in zip(forms, found, strict=True)), 0 * s)
        rank = problem.n - (problem.p if reml else 0)
        residual = (self.y_p_y - rank - explained) / (2 * s)
        return [residual.reshape(1, 1), *found]

    def _scores_of_rest(self, reml: bool) -> list[Tensor]:
        problem, z = self._problem, self._crossed
        found = []
        square = problem.own_products(z.u2[:, None], z.u2[:, None])
        for g, uu, B, R, grid in zip(self._rest, square, z.B2, z.R2, problem.grids, strict=True):
            S2 = (uu - B + R if reml else uu - B) / 2
            found.append(g.fold(S2) if grid is None else g.fold_blocks(S2))
        return found

    def information(self, derivatives: Sequence[Tensor]) -> Tensor:
        problem = self._problem
        found = self._variates_of_rows if problem.residual.moves else self._variates
        T1, T2, Tf, total = found(derivatives)
        e1 = self._half @ T1
        back = self._half.mT @ e1 / self._s
        T2 = T2 - self._at.W.t_times(back)
        Tf = Tf - inner(self._at.A1f, back)
        own, with_fixed = self._explained(T2)
        e3 = solve_triangular(self.gamma_factor, Tf[:-1] - with_fixed, upper=False)
        return (total - inner(e1, e1) - own - e3.mT @ e3) / 2

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
        T2 = (at.W.t_times(C1) + self._times_22(C2) + at.A2f @ Cf) / s
        Tf = (inner(at.A1f, C1) + at.A2f.mT @ C2 + at.Aff @ Cf) / s
        return T1, T2, Tf, inner(C1, T1) + C2.mT @ T2 + Cf.mT @ Tf

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

    def inverse_times_data(self) -> Tensor:
        problem, white = self._problem, self._white
        b1, b2 = self._effects_of_data
        rest = problem._f - problem.row_effects(b1.flatten(0, 1), b2)
        return white.back(white.rows(rest)) / self._s

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

    @cached_property
    def _effects_of_data(self) -> tuple[Tensor, Tensor]:
        r""":math:`G Z^\top V^{-1} f`, without a difference of large numbers, for the eliminated
        factor (levels, k, p + 1) and for the others (q, p + 1)."""
        x = self._solved
        at = self._at
        right = self._L1.mT @ (at.A1f - at.W.times(x)) / self._s
        return self._half.mT @ solve_triangular(self._C, right, upper=False), x

    def _blups(self) -> tuple[Tensor, Tensor]:
        """G u of the eliminated factor (levels, k) and of the others (q,)."""
        b1, b2 = self._effects_of_data
        return (
            b1[..., -1] - b1[..., :-1] @ self.gamma,
            b2[:, -1] - b2[:, :-1] @ self.gamma,
        )

    def _conditional(self) -> tuple[list[Tensor], list[Tensor]]:
        r"""Own blocks of the variance of b given y and the fixed effects, for each eliminated term
        and for each other term."""
        raise NotImplementedError

    def random_effects(self) -> list[RandomEffects]:
        problem, layout = self._problem, self._problem.layout
        values = self._blups()
        of_X = [part[..., :-1] for part in self._effects_of_data]
        first, rest = self._conditional()
        # What the fixed effects add: the effects of an orthonormal basis of X.
        lost = [solve_triangular(self.gamma_factor, part.mT, upper=False).mT for part in of_X]
        found = {}
        at = 0
        for i, w, spread in zip(layout.eliminated, problem.widths, first, strict=True):
            added = lost[0][:, at : at + w]
            found[i] = RandomEffects(
                self._terms[i].name, values[0][:, at : at + w], spread + added @ added.mT
            )
            at += w
        pieces = zip(
            layout.rest,
            values[1].split(problem.sizes),
            lost[1].split(problem.sizes),
            rest,
            problem.grids,
            strict=True,
        )
        for i, b, whole, own, grid in pieces:
            term = self._terms[i]
            shape = (-1, RandomEffects.width(term)) if grid is None else grid
            added = whole.unflatten(0, shape)
            found[i] = RandomEffects(term.name, b.reshape(shape), own + added @ added.mT)
        return [found[i] for i in sorted(found)]


def grid_of(term: Term) -> tuple[int, int] | None:
    """Levels and effects of a term whose levels are independent."""
    z = term.design
    return (z.levels, z.effects) if _separable(term) and isinstance(z, IndexedDesign) else None


def root(term: Term) -> Covariance:
    try:
        return term.covariance.root()
    except ValueError as error:
        raise NotPositiveDefiniteError(
            f"the covariance of {term.name!r} is not positive semi-definite: {error}"
        ) from None


def inner(a: Tensor, b: Tensor) -> Tensor:
    """:math:`a^\\top b` over levels and effects, of (levels, k, m) and (levels, k, r)."""
    return a.flatten(0, 1).mT @ b.flatten(0, 1)
