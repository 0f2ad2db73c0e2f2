"""Derivatives and random effects from the inverse of the system, at one point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.linalg import solve_triangular

from openreml_nn.likelihood.effects import RandomEffects
from openreml_nn.likelihood.system.blocks import block_solve, block_times
from openreml_nn.likelihood.system.elimination import EliminatedEvaluation, inner

__all__ = ["Crossed", "GroupedEvaluation"]


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


class GroupedEvaluation(EliminatedEvaluation):
    """The likelihood at one point by the inverse of the system.

    A subclass implements :meth:`explained`, :meth:`times_22`, :meth:`gain`, :meth:`conditional`,
    ``crossed`` and ``solved``, and calls :meth:`profile` when it is made.
    """

    @cached_property
    def crossed(self) -> Crossed:
        r"""What the score, the information and the BLUPs share."""
        raise NotImplementedError

    @cached_property
    def solved(self) -> Tensor:
        r""":math:`G_2 Z_2^\top V^{-1} f`, (q, p + 1)."""
        raise NotImplementedError

    def explained(self, T2: Tensor) -> tuple[Tensor, Tensor]:
        r"""Of T2 (q, m), what the other terms explain: :math:`T_2^\top N T_2` and
        :math:`E_{2Q}^\top N T_2` with N their :math:`\Lambda M^{-1}\Lambda^\top`."""
        raise NotImplementedError

    def times_22(self, x: Tensor) -> Tensor:
        r""":math:`Z_2^\top Z_2 x` for x (q, m)."""
        raise NotImplementedError

    def cross(self, Z1f: Tensor, Z2f: Tensor, B1: Tensor, B2: list[Tensor]) -> Crossed:
        r"""From products of :math:`V^{-1}` with :math:`Z` and f to those of P."""
        problem = self.problem
        Y1 = solve_triangular(self.gamma_factor, Z1f[..., :-1].mT, upper=False)
        Y2 = solve_triangular(self.gamma_factor, Z2f[:, :-1].mT, upper=False)
        u1 = Z1f[..., -1] - Z1f[..., :-1] @ self.gamma
        u2 = Z2f[:, -1] - Z2f[:, :-1] @ self.gamma
        own = problem.own_products(Y2.mT, Y2.mT)
        return Crossed(u1, u2, B1, B2, Y1.mT @ Y1, own, Y2, Z1f, Z2f)

    def scores_unchecked(self) -> list[Tensor]:
        problem, s, z = self.problem, self.s, self.crossed
        reml = problem.method == "reml"
        B1 = z.B1 - z.R1 if reml else z.B1
        S1 = (z.u1[:, :, None] * z.u1[:, None, :] - B1) / 2
        found = [
            g.fold_blocks(x) for g, x in zip(self.first, problem.split_blocks(S1), strict=True)
        ]
        found += self.scores_of_rest(reml)
        # The residual's score by V = sum Z G Z' + s I: tr(P V) = n - p and y' P V P y = y' P y.
        forms = (*self.first, *self.rest)
        explained = sum((2 * g.inner(x) for g, x in zip(forms, found, strict=True)), 0 * s)
        rank = problem.n - (problem.p if reml else 0)
        residual = (self.y_p_y - rank - explained) / (2 * s)
        return [residual.reshape(1, 1), *found]

    def scores_of_rest(self, reml: bool) -> list[Tensor]:
        problem, z = self.problem, self.crossed
        found = []
        square = problem.own_products(z.u2[:, None], z.u2[:, None])
        for g, uu, B, R, grid in zip(self.rest, square, z.B2, z.R2, problem.grids, strict=True):
            S2 = (uu - B + R if reml else uu - B) / 2
            found.append(g.fold(S2) if grid is None else g.fold_blocks(S2))
        return found

    def information(self, derivatives: Sequence[Tensor]) -> Tensor:
        problem = self.problem
        found = self.variates_of_rows if problem.residual.moves else self._variates
        T1, T2, Tf, total = found(derivatives)
        e1 = block_times(self.half, T1)
        back = block_times(self.half.mT, e1) / self.s
        T2 = T2 - self.system.W.t_times(back)
        Tf = Tf - inner(self.system.A1f, back)
        own, with_fixed = self.explained(T2)
        e3 = solve_triangular(self.gamma_factor, Tf[:-1] - with_fixed, upper=False)
        return (total - inner(e1, e1) - own - e3.mT @ e3) / 2

    def _variates(self, derivatives: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        r"""Products of the working variates with [Z1 | Z2 | f] and with themselves, over s.

        As the variates are combinations of these columns, they cost nothing in n.
        """
        problem, at, s = self.problem, self.system, self.s
        m = len(derivatives[0])
        ds = derivatives[0].reshape(m)
        b1, b2 = self.blups()
        C1 = -b1.reshape(-1, 1) * ds / s
        C2 = -b2[:, None] * ds / s
        w1, w2 = self.moved(derivatives[1:])
        C1 = (C1 + w1).reshape(problem.levels, problem.k, m)
        C2 = C2 + w2
        Cf = torch.cat([ds.new_zeros(problem.p, m), (ds / s)[None]])
        T1 = (at.A11 @ C1 + at.W.times(C2) + at.A1f @ Cf) / s
        T2 = (at.W.t_times(C1) + self.times_22(C2) + at.A2f @ Cf) / s
        Tf = (inner(at.A1f, C1) + at.A2f.mT @ C2 + at.Aff @ Cf) / s
        return T1, T2, Tf, inner(C1, T1) + C2.mT @ T2 + Cf.mT @ Tf

    def variates_of_rows(
        self, derivatives: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Products of the working variates with [Z1 | Z2 | f] and with themselves, over the rows, where
        R moves by more than a factor."""
        problem, white = self.problem, self.white
        split = len(problem.residual.at)
        w1, w2 = self.moved(derivatives[split:])
        b1, b2 = self.blups()  # the conditional residual needs these, the variates the others
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
        problem, white = self.problem, self.white
        b1, b2 = self._effects_of_data
        rest = problem.f - problem.row_effects(b1.flatten(0, 1), b2)
        return white.back(white.rows(rest)) / self.s

    def moved(self, derivatives: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Each derivative of G times u, for the eliminated factor (levels * k, m) and the
        others (q, m)."""
        problem, z, split = self.problem, self.crossed, len(self.first)
        m = len(derivatives[0]) if derivatives else 1
        w1, w2 = z.u1.new_zeros(z.u1.numel(), m), z.u2.new_zeros(len(z.u2), m)
        if split:
            moved = problem.along_blocks(self.first, derivatives[:split], z.u1)
            w1 = moved.reshape(m, -1).mT
        if self.rest:
            w2 = problem.along(self.rest, derivatives[split:], z.u2).mT
        return w1, w2

    @cached_property
    def _effects_of_data(self) -> tuple[Tensor, Tensor]:
        r""":math:`G Z^\top V^{-1} f`, without a difference of large numbers, for the eliminated
        factor (levels, k, p + 1) and for the others (q, p + 1)."""
        x = self.solved
        at = self.system
        left = at.A1f - at.W.times(x) if self.problem.q else at.A1f
        right = block_solve(self.C, block_times(self.L1.mT, left) / self.s)
        return block_times(self.half.mT, right), x

    def blups(self) -> tuple[Tensor, Tensor]:
        """G u of the eliminated factor (levels, k) and of the others (q,)."""
        b1, b2 = self._effects_of_data
        return (
            b1[..., -1] - b1[..., :-1] @ self.gamma,
            b2[:, -1] - b2[:, :-1] @ self.gamma,
        )

    def conditional(self) -> tuple[list[Tensor], list[Tensor]]:
        r"""Own blocks of the variance of b given y and the fixed effects, for each eliminated term
        and for each other term."""
        raise NotImplementedError

    def random_effects(self) -> list[RandomEffects]:
        problem, roles = self.problem, self.problem.roles
        values = self.blups()
        of_X = [part[..., :-1] for part in self._effects_of_data]
        first, rest = self.conditional()
        # What the fixed effects add: the effects of an orthonormal basis of X.
        lost = [solve_triangular(self.gamma_factor, part.mT, upper=False).mT for part in of_X]
        found = {}
        at = 0
        for i, w, spread in zip(roles.eliminated, problem.widths, first, strict=True):
            added = lost[0][:, at : at + w]
            found[i] = RandomEffects(
                self.terms[i].name, values[0][:, at : at + w], spread + added @ added.mT
            )
            at += w
        pieces = zip(
            roles.rest,
            values[1].split(problem.sizes),
            lost[1].split(problem.sizes),
            rest,
            problem.grids,
            strict=True,
        )
        for i, b, whole, own, grid in pieces:
            term = self.terms[i]
            shape = (-1, term.effects) if grid is None else grid
            added = whole.unflatten(0, shape)
            found[i] = RandomEffects(term.name, b.reshape(shape), own + added @ added.mT)
        return [found[i] for i in sorted(found)]
