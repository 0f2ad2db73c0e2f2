r"""The likelihood of crossed factors too large for a factorisation, by products alone.

One factor is eliminated exactly, as in the blocked solver. The system of the
others, scaled by its diagonal blocks, is :math:`\hat M = I + E` with nothing on
the diagonal of E. It is never formed: preconditioned conjugate gradients solve
with it, and their coefficients give Lanczos quadrature for its log-determinant.

What is exact (to the tolerance of the solves): BLUEs, BLUPs, the generalised
residual sum of squares, the average information. What is estimated by
random signs z, fixed once for all evaluations: the log-determinant
and traces of :math:`\hat M^{-1}`. Their first-order parts, known to be zero, are
taken off each sample, so that only second-order noise is left.

Reference:
    Golub and Meurant, Matrices, Moments and Quadrature (2010), chapters 7 and 11;
    Ubaru, Chen and Saad, SIAM Journal on Matrix Analysis 38 (2017) 1075;
    Kündig and Sigrist, arXiv:2505.09552.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from openreml_nn.likelihood.fixed import FixedPart
from openreml_nn.likelihood.problem import Cost, Evaluation, Problem
from openreml_nn.likelihood.residual import Residual
from openreml_nn.likelihood.solver import Solver
from openreml_nn.likelihood.system.blocks import block_times
from openreml_nn.likelihood.system.conjugate import conjugate_gradients, log_samples
from openreml_nn.likelihood.system.control import Control, is_every
from openreml_nn.likelihood.system.elimination import inner, root
from openreml_nn.likelihood.system.evaluation import Crossed, GroupedEvaluation
from openreml_nn.likelihood.system.listed import (
    ListedCross,
    ListedProblem,
    through,
    without_levels,
)
from openreml_nn.likelihood.system.roles import Roles, separated, steps_of
from openreml_nn.likelihood.system.scaled import ScaledSystem
from openreml_nn.support.checks import check_count, check_number
from openreml_nn.support.errors import InputError
from openreml_nn.support.modes import outside_inference
from openreml_nn.terms.base import Covariance
from openreml_nn.terms.term import Term

__all__ = ["Krylov", "KrylovProblem"]

#: Steps of conjugate gradients in a forecast.
_STEPS = 30
#: An entry of a sparse product takes the time of so many operations of a dense one.
_FAR = 8.0
_REASON = "by products alone"


@dataclass(frozen=True)
class Krylov(Solver):
    """Conjugate gradients and random signs: for crossed factors that are too large otherwise.

    Args:
        probes: random signs, which share the work of one sparse product. Where there are as many
            as patterns of signs, each of these is taken once, and the likelihood is exact. By
            default 24, and 192 where levels are related: relatives differ less from each other
            than the system from its diagonal.
        tolerance: relative residual at which the solves for data end.
        probe_tolerance: that at which the solves for probes end.
        seed: of the random signs, which are the same at all evaluations.

    Raises:
        TypeError, InputError: if an option is no number of its kind.
    """

    name: ClassVar[str] = "krylov"
    exact: ClassVar[bool] = False
    probes: int | None = None
    tolerance: float = 1e-11
    probe_tolerance: float = 1e-6
    seed: int = 0

    def __post_init__(self) -> None:
        if self.probes is not None:
            check_count("probes", self.probes, 1)
        check_number("tolerance", self.tolerance, above=0, below=1)
        check_number("probe_tolerance", self.probe_tolerance, above=0, below=1)
        check_count("seed", self.seed)

    def forecast(self, terms: Sequence[Term], p: int, dtype: torch.dtype) -> Cost | None:
        if self.obstacle(terms) is not None:
            return None
        terms = separated(terms)
        roles = Roles.of(terms)
        n, q = terms[0].design.shape[0], sum(terms[i].design.shape[1] for i in roles.random)
        related = any(terms[i].covariance.known_kernel is not None for i in roles.rest)
        return self.cost(n, q, p, related, dtype, steps_of(terms, roles, p))

    def cost(
        self,
        rows: int,
        columns: int,
        p: int,
        related: bool,
        dtype: torch.dtype,
        steps: tuple[str, ...],
    ) -> Cost:
        """What an evaluation takes of rows and columns of random effects, with p fixed effects."""
        vectors = self.count(related) + p + 1
        # No more levels meet than there are rows.
        work, held = 4.0 * rows * vectors, 8.0 * (rows + vectors * columns)
        return Cost(_STEPS * _FAR * work, dtype.itemsize * held, self.exact, _REASON, steps)

    def problem(self, fixed: FixedPart, terms: Sequence[Term], method: str) -> Problem:
        return KrylovProblem(fixed, terms, method, self)

    def obstacle(self, terms: Sequence[Term]) -> str | None:
        terms = separated(terms)
        try:
            residual = Residual.of(terms)
        except InputError as error:
            return str(error)
        found = without_levels(term for i, term in enumerate(terms) if i not in residual.at)
        if found is None and residual.moves:
            return "the krylov solver needs residuals of one variance"
        return found

    def count(self, related: bool) -> int:
        """How many random signs are taken, where levels are related or not."""
        return self.probes or (192 if related else 24)

    def signs(self, q: int, related: bool) -> Tensor:
        """The random signs (q, count)."""
        count = self.count(related)
        if is_every(q, count):
            bits = torch.arange(2**q)[None, :] >> torch.arange(q)[:, None]
            return 2 * (bits & 1) - 1
        generator = torch.Generator().manual_seed(self.seed)
        return 2 * torch.randint(0, 2, (q, count), generator=generator) - 1


class KrylovProblem(ListedProblem):
    """The system of the other terms by conjugate gradients.

    Raises:
        InputError: if a random term is not a grouping factor with independent levels, or the
            residuals have more than one variance.
    """

    has_second_derivatives = False

    def __init__(
        self, fixed: FixedPart, terms: Sequence[Term], method: str, solver: Krylov
    ) -> None:
        solver.check(terms)
        super().__init__(fixed, terms, method)
        self.solver = solver
        self.probes = solver.signs(self.q, self.others.are_related).to(self.f)
        self.start: Tensor | None = None  # the last solution for the data

    def anew(self, fixed: FixedPart, terms: Sequence[Term]) -> Problem:
        return KrylovProblem(fixed, terms, self.method, self.solver)

    def with_fixed(self, fixed: FixedPart) -> Problem:
        found = super().with_fixed(fixed)
        assert isinstance(found, KrylovProblem)
        if self.start is not None and self.start.shape[1] != fixed.Q.shape[1] + 1:
            found.start = None
        return found

    def evaluate_unchecked(self, terms: Sequence[Term], matrices: list[Tensor]) -> Evaluation:
        return _KrylovEvaluation(self, terms, matrices)

    def recorded(self, matrices: Sequence[Tensor]) -> Tensor:
        raise NotImplementedError(
            "the krylov solver has no second derivative, and no gradient by a trainable design: "
            "use solver='blocked'"
        )

    def cost(self) -> Cost | None:
        found = self.solver.forecast(self.terms, self.p, self.f.dtype)
        assert found is not None and self.constant is not None
        columns = self.probes.shape[1] + self.p + 1
        held = self.constant[0].W.entries + 8.0 * columns * (self.q + self.levels * self.k)
        return replace(found, bytes=self.f.itemsize * held)

    @cached_property
    def control(self) -> Control:
        """What is known of the errors of the probes."""
        return Control(self.others, self.probes, self.solver.probe_tolerance)


class _KrylovEvaluation(GroupedEvaluation):
    problem: KrylovProblem

    def __init__(
        self, problem: KrylovProblem, terms: Sequence[Term], matrices: Sequence[Tensor]
    ) -> None:
        super().__init__(problem, terms, matrices)
        at, s, W = self.system, self.s, self.system.W
        assert isinstance(W, ListedCross)
        self._Kd = self.N1 / s**2
        self._own = own = [block / s for block in problem.own]
        if problem.levels:
            for i, (a, b, value) in enumerate(W.cells):
                K = self._Kd[a] if len(self._Kd) > 1 else self._Kd
                lost = block_times(value.mT, block_times(K, value))
                own[i] = own[i].index_add(0, b, -lost)
        pairs = zip(self.root2, problem.others.grids, strict=True)
        roots = [root.blocks(*grid) for root, grid in pairs]
        self._scaled = ScaledSystem(problem.others, self._times_e22, own, roots)
        self._b = b = self._scaled.to(self.E2f)
        start = problem.start if problem.start is not None else torch.zeros_like(b)
        self._x, _ = conjugate_gradients(self._scaled.times, b, start, problem.solver.tolerance)
        problem.start = self._x
        F = at.Aff / s - inner(self.half_f, self.half_f) - b.mT @ self._x

        log_det = self.log_det + self._scaled.log_det + problem.others.log_det
        self._without_probes = self.profile(log_det, F)

    @cached_property
    def _probed(self) -> tuple[Tensor, Tensor]:
        r""":math:`\hat M^{-1} z` of the probes, and what each of them says of :math:`\log|\hat M|`."""
        problem, z = self.problem, self.problem.probes
        with outside_inference(recording=False):
            zero, goal = torch.zeros_like(z), problem.solver.probe_tolerance
            found, T = conjugate_gradients(self._scaled.times, z, zero, goal)
            samples = log_samples(T, problem.q)
            return found, problem.control.controlled(samples) if problem.q else samples

    @cached_property
    def log_likelihood(self) -> Tensor:  # type: ignore[override]
        with outside_inference(recording=False):
            return self._without_probes - self._probed[1].mean() / 2

    @cached_property
    def error(self) -> float:  # type: ignore[override]
        count, samples = self.problem.probes.shape[1], self._probed[1]
        return 0.0 if is_every(self.problem.q, count) else float(samples.std() / count**0.5 / 2)

    @staticmethod
    def root_of(term: Term) -> Covariance:
        """Of a kernel's term that of its effects: the kernel enters by its inverse."""
        return root(replace(term, covariance=term.covariance.without_kernel()))

    def _times_e22(self, x: Tensor) -> Tensor:
        W = self.system.W
        found = self.problem.times_22(x) / self.s
        if self.problem.levels:
            found = found - W.t_times(block_times(self._Kd, W.times(x)))
        return found

    def explained(self, T2: Tensor) -> tuple[Tensor, Tensor]:
        right, goal = self._scaled.to(T2), self.problem.solver.tolerance
        x, _ = conjugate_gradients(self._scaled.times, right, torch.zeros_like(right), goal)
        return right.mT @ x, self._b[:, :-1].mT @ x

    def times_22(self, x: Tensor) -> Tensor:
        return self.problem.times_22(x)

    # ------------------------------------------------------------------ Z' P y and Z' P Z

    @cached_property
    def crossed(self) -> Crossed:
        problem, at, s = self.problem, self.system, self.s
        x = self.solved
        Z1f = at.A1f / s
        if problem.levels:
            Z1f = self.reduced(at.A1f - at.W.times(x)) / s
        Z2f = self.E2f - self._times_e22(x)
        B1 = self.reduced(at.A11 / s)
        if problem.levels and problem.q:
            B1 = B1 - self.reduced(self.reduced(self._quadratic()).mT) / s**2
        return self.cross(Z1f, Z2f, B1, self._inner_22())

    @cached_property
    def solved(self) -> Tensor:
        return self._scaled.back(self._x)

    def gain(self) -> Tensor:
        gain = self.gain_1
        for own, half in zip(self.problem.own, self._scaled.roots, strict=True):
            squares = (half.mT @ (own / self.s) @ half).diagonal(dim1=1, dim2=2)
            gain = torch.maximum(gain, squares.amax())
        return gain

    def _quadratic(self) -> Tensor:
        r"""Diagonal blocks of :math:`W N W^\top`, the inverse's own diagonal blocks exactly."""
        problem, W = self.problem, self.system.W
        assert isinstance(W, ListedCross)
        found = self.N1.new_zeros(problem.levels, problem.k, problem.k)
        for (a, b, value), half in zip(W.cells, self._scaled.halves, strict=True):
            part = block_times(value, half.mT[b])
            found.index_add_(0, a, block_times(part, part.mT))
        left = W.times(self._scaled.back(self._probed[0] - problem.probes))
        right = W.times(self._scaled.back(problem.probes))
        noisy = left @ right.mT / problem.probes.shape[1]
        return found + (noisy + noisy.mT) / 2

    def _inner_22(self) -> list[Tensor]:
        r"""Own blocks of :math:`Z_2^\top V^{-1} Z_2 = (I + E_{22} G)^{-1} E_{22}`.

        With :math:`E_{22} = F + O`, F its own blocks, and :math:`H = (I + FG)^{-1}` this is

        .. math:: HF + HOH^\top - (H O \Lambda C^{-\top}) \hat M^{-1} (H O \Lambda C^{-\top})^\top

        of which the first part is exact and the second has no own blocks. No root is
        inverted, and no large numbers are subtracted.
        """
        problem, z, system = self.problem, self.problem.probes, self._scaled
        right, left = system.back(z), system.back(self._probed[0])
        parts = (right, left, self._times_e22(right), self._times_e22(left))
        found = []
        pieces = zip(
            problem.others.kernels,
            self._own,
            system.roots,
            *map(problem.others.by_levels, parts),
            strict=True,
        )
        for kernel, F, L, one, other, E_one, E_other in pieces:
            if kernel is not None:
                found.append(F.new_zeros(0))  # what a kernel needs is not its levels' own blocks
                continue
            system_of_own = torch.eye(F.shape[-1]).to(F) + F @ (L @ L.mT)
            both = torch.cat([F, E_one - F @ one, E_other - F @ other], 2)
            B, a, b = torch.linalg.solve(system_of_own, both).split(
                [F.shape[-1], z.shape[1], z.shape[1]], 2
            )
            gained = a @ b.mT / z.shape[1]
            found.append(B - (gained + gained.mT) / 2)
        return found

    # ------------------------------------------------------------------ kernels

    def scores_of_rest(self, reml: bool) -> list[Tensor]:
        problem, z = self.problem, self.crossed
        found = []
        u, Y = problem.others.by_levels(z.u2[:, None]), problem.others.by_levels(z.Y2.mT)
        pieces = zip(self.rest, problem.others.kernels, u, Y, z.B2, z.R2, strict=True)
        for i, (g, kernel, own, lost, B, R) in enumerate(pieces):
            if kernel is None:
                S2 = (own @ own.mT - B + R if reml else own @ own.mT - B) / 2
                found.append(g.fold_blocks(S2))
                continue
            score = through(kernel, own, own) - self._trace(i)
            found.append((score + through(kernel, lost, lost) if reml else score) / 2)
        return found

    def _trace(self, i: int) -> Tensor:
        r""":math:`\sum_{ij} K_{ij} (Z_2^\top V^{-1} Z_2)_{ij}` of a kernel's term, (t, t).

        By :math:`K \Lambda^\top Z^\top V^{-1} Z = M^{-1} \Lambda^\top E_{22}` this is the sum of
        the own blocks of :math:`E_{22} \Lambda M^{-1} \Lambda^{-1}`, of which the part of
        :math:`\hat M`'s own blocks is exact.
        """
        problem, system, z = self.problem, self._scaled, self.problem.probes
        L, F = system.roots[i][0], self._own[i]
        half = system.inverses[i]
        own = half.mT @ half
        if len(L) == 1 and float(L) == 0:
            return (F @ own).sum(0)  # what is left where the root cancels

        def part(x: Tensor) -> Tensor:
            return problem.others.by_levels(x)[i]

        moved = part(self._times_e22(system.back(self._probed[0] - z)))
        # Less its first-order part, which has no own blocks.
        moved = moved + F @ part(system.back(system.times(z) - z))
        sign = block_times(half.mT, part(z))
        samples = problem.control.controlled(torch.einsum("lam,lbm->mab", moved, sign))
        total = ((F @ L @ own).sum(0) + samples.mean(0)) @ torch.linalg.pinv(L)
        return (total + total.mT) / 2

    def conditional(self) -> tuple[list[Tensor], list[Tensor]]:
        problem, z, P = self.problem, self.problem.probes, self.N1
        whole = P
        if problem.levels and problem.q:
            whole = P + P @ self._quadratic() @ P / self.s**2
        # The inverse of the system less its first-order parts, of which the own blocks are known.
        sample = self._probed[0] + self._scaled.times(z) - 2 * z
        rest = []
        pieces = zip(
            self._scaled.halves,
            problem.others.by_levels(sample),
            problem.others.by_levels(z),
            strict=True,
        )
        for half, moved, sign in pieces:
            mean = torch.eye(half.shape[-1]).to(half) + moved @ sign.mT / z.shape[1]
            rest.append(half.mT @ (mean + mean.mT) @ half / 2)
        return problem.split_blocks(whole), rest
