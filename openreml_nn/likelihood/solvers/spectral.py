r"""The likelihood by one eigendecomposition, for a known kernel and independent individuals.

For :math:`V = K \otimes \Sigma + I \otimes R`, with t traits of each of n individuals and
:math:`K = U \Lambda U^\top`, the rotated data :math:`(U^\top \otimes I) y` have blocks
:math:`\lambda_i \Sigma + R` and nothing between them, whatever Σ and R: after one decomposition
an evaluation takes time linear in n. With one trait the blocks are numbers.

Reference:
    Kang et al., Genetics 178 (2008) 1709, eq. 2 to 4; Lippert et al., Nature
    Methods 8 (2011) 833; Zhou and Stephens, Nature Methods 11 (2014) 407.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.linalg import solve_triangular

from openreml_nn.likelihood.effects import RandomEffects
from openreml_nn.likelihood.fixed import FixedPart, traced
from openreml_nn.likelihood.problem import Cost, Evaluation, Problem, cholesky
from openreml_nn.likelihood.solver import Solver
from openreml_nn.support.errors import NotPositiveDefiniteError
from openreml_nn.support.spectrum import decomposed
from openreml_nn.terms.base import Covariance
from openreml_nn.terms.covariance import RepeatedCovariance
from openreml_nn.terms.design import Design, IdentityDesign, IndexedDesign
from openreml_nn.terms.term import Term, residual_terms

__all__ = ["Spectral", "SpectralProblem"]


@dataclass(frozen=True)
class Spectral(Solver):
    """One eigendecomposition: for a known kernel over the rows, and independent errors."""

    name: ClassVar[str] = "spectral"

    def forecast(self, terms: Sequence[Term], p: int, dtype: torch.dtype) -> Cost | None:
        if _parts(terms) is None:
            return None
        n = terms[0].design.shape[0]
        steps = (f"eigendecomposition of the kernel, {n} x {n}, once",)
        held = dtype.itemsize * 2.0 * n**2
        # Its decomposition, ten times n cubed, is that of all evaluations: say a hundred.
        work = 2.0 * n * (p + 1) ** 2 + n**3 / 10
        return Cost(work, held, True, "one known kernel: decomposed once", steps)

    def problem(self, fixed: FixedPart, terms: Sequence[Term], method: str) -> Problem:
        return SpectralProblem(fixed, terms, method)

    def obstacle(self, terms: Sequence[Term]) -> str | None:
        if _parts(terms) is not None:
            return None
        return "the spectral solver needs one known kernel over the rows and independent errors"


def _parts(terms: Sequence[Term]) -> tuple[int, list[int]] | None:
    """Positions of the kernel's term and of the residual's terms, None if there are others."""
    if all(term.covariance.known_kernel is None for term in terms):
        return None
    residual = residual_terms(terms)
    kernel = [i for i in range(len(terms)) if i not in residual]
    if len(kernel) != 1 or not residual:
        return None
    g, z = terms[kernel[0]].covariance, terms[kernel[0]].design
    if g.known_kernel is None:
        return None
    t, cells = g.width, _cells(z)
    if cells is None or len(cells) != g.known_kernel.size * t:
        return None
    for i in residual:
        r = terms[i].covariance
        if not isinstance(r, RepeatedCovariance) or len(r.matrix) not in (1, t):
            return None
        own = _cells(terms[i].design)
        if own is None or (len(r.matrix) > 1 and not torch.equal(own, cells)):
            return None
    return kernel[0], residual


def _cells(design: Design) -> Tensor | None:
    """Column of each row where that is an order of the columns, None otherwise."""
    if isinstance(design, IdentityDesign):
        return torch.arange(design.shape[0])
    if not isinstance(design, IndexedDesign) or design.values is not None:
        return None
    n, q = design.shape
    whole = n == q and int(torch.bincount(design.codes, minlength=q).max()) == 1
    return design.codes.cpu() if whole else None


class SpectralProblem(Problem):
    """Depends on the residual's matrix R and on that of the kernel, Σ, each (t, t)."""

    def __init__(self, fixed: FixedPart, terms: Sequence[Term], method: str) -> None:
        super().__init__(fixed, terms, method)
        Spectral().check(terms)
        found = _parts(terms)
        assert found is not None
        self.kernel, self.residual = found
        term = terms[self.kernel]
        g = term.covariance
        assert g.known_kernel is not None
        self.t = g.width
        K = g.known_kernel.dense().to(fixed.y)
        self.eigenvalues, self.U = decomposed(K, f"the kernel of {term.name!r}")
        least, most = float(self.eigenvalues[0]), float(self.eigenvalues[-1])
        if least < -len(K) * torch.finfo(K.dtype).eps * max(most, 0.0):
            raise NotPositiveDefiniteError(
                f"the kernel of {term.name!r} is not positive semi-definite: "
                f"its smallest eigenvalue is {least:.6g}"
            )
        self.eigenvalues = self.eigenvalues.clamp(min=0)  # rounding
        f = torch.cat([fixed.Q, fixed.y[:, None]], 1)
        cells = _cells(term.design)
        assert cells is not None
        self.cells = cells.to(f.device)
        by_cell = torch.empty_like(f).index_copy(0, self.cells, f)
        self.f = (self.U.mT @ by_cell.reshape(len(K), -1)).reshape(
            len(K), self.t, -1
        )  # (n, t, p+1)

    def matrices(self, terms: Sequence[Term]) -> list[Tensor]:
        parts = [self._whole(terms[i].covariance) for i in self.residual]
        return [torch.stack(parts).sum(0), terms[self.kernel].covariance.matrix]

    def _whole(self, g: Covariance) -> Tensor:
        """R of one part, (t, t)."""
        if len(g.matrix) == self.t:
            return g.matrix
        return g.matrix * torch.eye(self.t, dtype=g.matrix.dtype, device=g.matrix.device)

    def recorded(self, matrices: Sequence[Tensor]) -> Tensor:
        evaluation = _SpectralEvaluation(self, [], matrices)
        self.check_rounding(evaluation.rounding)
        return evaluation.log_likelihood

    def evaluate_unchecked(self, terms: Sequence[Term], matrices: list[Tensor]) -> Evaluation:
        return _SpectralEvaluation(self, terms, matrices)


class _SpectralEvaluation(Evaluation):
    """With blocks D = λ Σ + R of factors C, everything is in rows :math:`C^{-1} x`."""

    problem: SpectralProblem

    def __init__(
        self, problem: SpectralProblem, terms: Sequence[Term], matrices: Sequence[Tensor]
    ) -> None:
        self.problem, self._terms = problem, terms
        self._R, self._sigma = matrices
        D = self._R + problem.eigenvalues[:, None, None] * self._sigma  # (n, t, t)
        if problem.t == 1:
            if not traced(D) and not bool((D > 0).all()):
                raise NotPositiveDefiniteError("V is not positive definite")
            self._C = D.sqrt()
        else:
            self._C = cholesky(D, "V")
        if not traced(D):
            # Each pivot beside the largest: rounding of the kernel's decomposition is of that size.
            pivots = self._C.detach().diagonal(dim1=1, dim2=2) ** 2
            most = D.detach().diagonal(dim1=1, dim2=2).amax(0)
            self.rounding = torch.finfo(D.dtype).eps * float((most / pivots).max())
            self.recorded_rounding = self.rounding
        white = self._forward(problem.f)
        self._white_Q, white_y = white[..., :-1], white[..., -1]
        Q, y = self._white_Q.flatten(0, 1), white_y.flatten()
        log_det = 2 * self._C.diagonal(dim1=1, dim2=2).log().sum()
        self.log_likelihood, self.gamma_factor, half = problem.profile(
            log_det, Q.mT @ Q, Q.mT @ y, y @ y
        )
        self.gamma = solve_triangular(self.gamma_factor.mT, half[:, None], upper=True)[:, 0]
        rest = white_y - self._white_Q @ self.gamma
        self.y_p_y = (rest * rest).sum()
        self._p_y = self._back(rest[..., None])[..., 0]  # (U' P y), (n, t)

    def _forward(self, x: Tensor) -> Tensor:
        """C^-1 x for x (n, t, m)."""
        return x / self._C if self.problem.t == 1 else solve_triangular(self._C, x, upper=False)

    def _back(self, x: Tensor) -> Tensor:
        if self.problem.t == 1:
            return x / self._C
        return solve_triangular(self._C.mT, x, upper=True)

    def _projected(self) -> Tensor:
        """What the fixed effects take away: white rows (n, t, p) of an orthonormal basis."""
        flat = solve_triangular(self.gamma_factor, self._white_Q.flatten(0, 1).mT, upper=False)
        return flat.mT.unflatten(0, self._p_y.shape)

    def inverse_times_data(self) -> Tensor:
        problem = self.problem
        back = self._back(self._forward(problem.f))  # (n, t, p + 1)
        by_cell = (problem.U @ back.flatten(1)).reshape(-1, back.shape[-1])
        return by_cell[problem.cells]

    def scores_unchecked(self) -> list[Tensor]:
        problem = self.problem
        eye = torch.eye(problem.t, dtype=self._C.dtype, device=self._C.device)
        half = self._back(eye.expand_as(self._C))  # C^-T
        inner = half @ half.mT
        if problem.method == "reml":
            lost = self._back(self._projected())
            inner = inner - lost @ lost.mT
        S = (self._p_y[:, :, None] * self._p_y[:, None, :] - inner) / 2
        return [S.sum(0), (problem.eigenvalues[:, None, None] * S).sum(0)]

    def information(self, derivatives: Sequence[Tensor]) -> Tensor:
        residual, kernel = derivatives  # (m, t, t)
        moved = torch.einsum("mab,nb->nam", residual, self._p_y)
        weighted = self.problem.eigenvalues[:, None] * self._p_y
        moved = moved + torch.einsum("mab,nb->nam", kernel, weighted)
        white = self._forward(moved).flatten(0, 1)
        part = self._projected().flatten(0, 1).mT @ white
        return (white.mT @ white - part.mT @ part) / 2

    def random_effects(self) -> list[RandomEffects]:
        problem, sigma = self.problem, self._sigma
        weight = problem.eigenvalues[:, None, None]  # (n, 1, 1)
        values = problem.U @ (weight * (sigma @ self._p_y[..., None]))[..., 0]
        # Blocks of G - G V^-1 G = G V^-1 R in the coordinates of U.
        half = self._back(self._forward(self._R.expand_as(self._C)))  # D^-1 R
        kept = weight * sigma @ half
        kept = (kept + kept.mT) / 2
        back = weight * (sigma @ self._back(self._projected()))  # (n, t, p)
        shape = (len(problem.U), -1)
        lost = (problem.U @ back.reshape(shape)).reshape(back.shape)
        spread = ((problem.U**2) @ kept.reshape(shape)).reshape(kept.shape)
        term = self._terms[problem.kernel]
        return [RandomEffects(term.name, values, spread + lost @ lost.mT)]
