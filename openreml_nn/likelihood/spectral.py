r"""The likelihood by one eigendecomposition, for a known kernel and independent errors.

For :math:`V = \sigma_k^2 K + \sigma^2 I` with :math:`K = U \Lambda U^\top` the rotated data
:math:`U^\top y` have the diagonal covariance :math:`\sigma_k^2 \Lambda + \sigma^2 I`, whatever
the variances: after one decomposition an evaluation takes time linear in n.

Reference:
    Kang et al., Genetics 178 (2008) 1709, eq. 2 to 4; Lippert et al., Nature
    Methods 8 (2011) 833.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.linalg import solve_triangular

from openreml_nn.covariance.design import IdentityDesign
from openreml_nn.covariance.terms import ScaledCovariance, Term
from openreml_nn.likelihood.fixed import FixedPart
from openreml_nn.likelihood.problem import (
    Evaluation,
    NotPositiveDefiniteError,
    Problem,
    RandomEffects,
)

__all__ = ["SpectralProblem", "spectral_terms"]


def spectral_terms(terms: Sequence[Term]) -> tuple[int, list[int]] | None:
    """Positions of the kernel's term and of the residual's terms, None if there are others."""
    residual = [i for i, term in enumerate(terms) if term.is_residual]
    kernel = [i for i in range(len(terms)) if i not in residual]
    if len(kernel) != 1 or not residual:
        return None
    term = terms[kernel[0]]
    known = isinstance(term.covariance, ScaledCovariance)
    return (kernel[0], residual) if known and isinstance(term.design, IdentityDesign) else None


class SpectralProblem(Problem):
    """Depends on the residual variance and on that of the kernel, each (1, 1)."""

    def __init__(self, fixed: FixedPart, terms: Sequence[Term], method: str) -> None:
        super().__init__(fixed, terms, method)
        found = spectral_terms(terms)
        if found is None:
            raise ValueError(
                "the spectral solver needs one known kernel over the rows and independent errors"
            )
        self.kernel, self.residual = found
        term = terms[self.kernel]
        assert isinstance(term.covariance, ScaledCovariance)
        K = term.covariance.base.to(fixed.y)
        self.eigenvalues, self.U = torch.linalg.eigh(K)
        least, most = float(self.eigenvalues[0]), float(self.eigenvalues[-1])
        if least < -self.n * torch.finfo(K.dtype).eps * max(most, 0.0):
            raise NotPositiveDefiniteError(
                f"the kernel of {term.name!r} is not positive semi-definite: "
                f"its smallest eigenvalue is {least:.6g}"
            )
        self.eigenvalues = self.eigenvalues.clamp(min=0)  # rounding
        self.y, self.Q = self.U.mT @ fixed.y, self.U.mT @ fixed.Q

    def matrices(self, terms: Sequence[Term]) -> list[Tensor]:
        residual = torch.stack([terms[i].covariance.matrix for i in self.residual]).sum(0)
        return [residual, terms[self.kernel].covariance.matrix]

    def recorded(self, matrices: Sequence[Tensor]) -> Tensor:
        return _SpectralEvaluation(self, [], matrices).log_likelihood

    def _evaluate(self, terms: Sequence[Term], matrices: list[Tensor]) -> Evaluation:
        return _SpectralEvaluation(self, terms, matrices)


class _SpectralEvaluation(Evaluation):
    def __init__(
        self, problem: SpectralProblem, terms: Sequence[Term], matrices: Sequence[Tensor]
    ) -> None:
        self._problem, self._terms = problem, terms
        residual, self._variance = (matrix.reshape(()) for matrix in matrices)
        self._d = d = residual + self._variance * problem.eigenvalues
        traced = torch._C._functorch.is_functorch_wrapped_tensor(d)
        if not traced and not bool((d > 0).all()):
            raise NotPositiveDefiniteError("V is not positive definite")
        white = torch.cat([problem.Q, problem.y[:, None]], 1) / d.sqrt()[:, None]
        self._white_Q, white_y = white[:, :-1], white[:, -1]
        self.log_likelihood, self.gamma_factor, half = problem._profile(
            d.log().sum(), self._white_Q.mT @ self._white_Q, self._white_Q.mT @ white_y,
            white_y @ white_y,
        )  # fmt: skip
        self.gamma = solve_triangular(self.gamma_factor.mT, half[:, None], upper=True)[:, 0]
        rest = white_y - self._white_Q @ self.gamma
        self.y_p_y = rest @ rest
        self._p_y = rest / d.sqrt()  # U' P y

    def _projected(self) -> Tensor:
        """C^-1 Q' D^-1/2, (p, n): what the fixed effects take away."""
        return solve_triangular(self.gamma_factor, self._white_Q.mT, upper=False)

    def scores(self) -> list[Tensor]:
        diagonal = 1 / self._d
        if self._problem.method == "reml":
            diagonal = diagonal * (1 - (self._projected() ** 2).sum(0))
        part = (self._p_y**2 - diagonal) / 2
        kernel = (part * self._problem.eigenvalues).sum()
        return [part.sum().reshape(1, 1), kernel.reshape(1, 1)]

    def information(self, derivatives: Sequence[Tensor]) -> Tensor:
        residual, kernel = (d.reshape(-1) for d in derivatives)
        slope = residual + self._problem.eigenvalues[:, None] * kernel  # (n, m)
        white = slope * (self._p_y / self._d.sqrt())[:, None]
        part = self._projected() @ white
        return (white.mT @ white - part.mT @ part) / 2

    def random_effects(self) -> list[RandomEffects]:
        problem, v = self._problem, self._variance
        loadings = v * problem.eigenvalues
        values = problem.U @ (loadings * self._p_y)
        # Diagonal of G - G P G, with G and P in the coordinates of U.
        kept = loadings - loadings**2 / self._d
        back = problem.U @ ((loadings / self._d.sqrt())[:, None] * self._projected().mT)
        variance = (problem.U**2) @ kept + (back**2).sum(1)
        term = self._terms[problem.kernel]
        return [RandomEffects(term.name, values[:, None], variance[:, None, None])]
