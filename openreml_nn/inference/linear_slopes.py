r"""A covariance of rows that is linear in its parameters, and what its derivatives say.

Such are variances and covariances of independent or related levels, :math:`\dot V_a = Z (K \otimes J_a)
Z^\top` with a known K and the symmetric matrix :math:`J_a` (k, k) of the effects of a level.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from openreml_nn.estimation.coordinates import Coordinates
from openreml_nn.estimation.derivatives import jacobian
from openreml_nn.likelihood.loss import Objective
from openreml_nn.support.errors import InputError
from openreml_nn.terms.covariance import RepeatedCovariance, ScaledCovariance
from openreml_nn.terms.term import Term

__all__ = ["LinearSlopes"]

#: A standard deviation this small beside the largest has no derivative to speak of.
_SMALL = 1e-3
#: Columns by which a covariance is seen to be linear, and what is left of them by rounding.
_PROBES, _ROUNDING = 3, 1e-7


@dataclass(frozen=True)
class _Part:
    """Derivatives :math:`Z (K \\otimes J_a) Z^\\top` for all parameters a.

    Attributes:
        spread: :math:`Z^\\top v` of columns (n, c), (q k, c).
        kernel: :math:`K x` of (q, c).
        J: (m, k, k).
    """

    spread: Callable[[Tensor], Tensor]
    kernel: Callable[[Tensor], Tensor]
    J: Tensor

    def seen(self, P: Tensor) -> Tensor:
        """K Z' P of symmetric P (n, n), (q k, n)."""
        rows = self.spread(P)
        k = self.J.shape[1]
        return self.kernel(rows.reshape(len(rows) // k, -1)).reshape(rows.shape)


class LinearSlopes:
    """The derivatives of V by parameters in which it is linear.

    They are taken where no variance is zero: of a linear covariance they are the same everywhere.

    Args:
        objective: the likelihood, at its parameters.
        what: what wants them, for messages.

    Attributes:
        V: (n, n) at the parameters.
        count: how many parameters are estimated, m.

    Raises:
        InputError: if a covariance is not linear in its parameters.
    """

    def __init__(self, objective: Objective, what: str) -> None:
        self._objective, self._at = objective, Coordinates([objective])
        if self._at.loose:
            raise InputError(
                f"{what}: {self._at.loose[0].name!r} is estimated outside of the covariances, of which the "
                "correction takes variances: use ddf='satterthwaite'"
            )
        self._here = [term.detach() for term in objective.terms()]
        self._like = objective.problem.fixed.y
        n = len(self._like)
        self.V = sum((term.dense() for term in self._here), self._like.new_zeros(n, n))
        self.count = len(self._at)
        if not self.count:
            return
        u = self._inside()
        slopes = jacobian(lambda x: tuple(t.covariance.matrix for t in self._terms(x)), u)
        self._slopes = [part.detach() for part in slopes]
        with torch.no_grad():
            self._terms_inside = [term.detach() for term in self._terms(u)]
            self._check(u, what)

    def _terms(self, u: Tensor) -> list[Term]:
        return self._objective.terms(self._at.natural(0, u))

    def _inside(self) -> Tensor:
        """Coordinates at which no variance is zero."""
        u = self._at.read(self._like)
        vanishing = self._at.vanishing(u)
        scale = u[vanishing].abs().max() if bool(vanishing.any()) else u.new_ones(())
        scale = torch.where(scale > 0, scale, 1.0)
        return torch.where(vanishing & (u.abs() < _SMALL * scale), scale, u)

    def _check(self, u: Tensor, what: str) -> None:
        """Refuse a term that leaves the span of its derivatives elsewhere."""
        generator = torch.Generator().manual_seed(0)
        v = torch.randn(len(self._like), _PROBES, generator=generator, dtype=torch.float64)
        v = v.to(self._like)
        low, high = self._at.ends(u)
        inner = low.isfinite() & high.isfinite()
        middle = torch.where(inner, (low + high) / 2, 0)
        there = self._terms(
            torch.where(inner, u + (middle - u) / 3 + (high - low) / 20, 1.3 * u + 0.1)
        )
        for j, term in enumerate(self._terms_inside):
            change = (_product(there[j].detach(), v) - _product(term, v)).reshape(-1)
            along = torch.stack([self._along(j, a, v).reshape(-1) for a in range(self.count)], 1)
            scale = along.norm(dim=0).clamp(min=1e-300)
            # Derivatives may depend on each other, which torch allows for on the CPU alone.
            sides = (along / scale).cpu(), change[:, None].cpu()
            fit = torch.linalg.lstsq(*sides, driver="gelsd").solution
            left = (sides[1] - sides[0] @ fit)[:, 0]
            if float(left.norm()) > _ROUNDING * float(change.norm() + _product(term, v).norm()):
                raise InputError(
                    f"{what}: the correction is for a covariance that is linear in variances and "
                    f"covariances, which term {term.name!r} is not: use ddf='satterthwaite'"
                )

    def _along(self, j: int, a: int, v: Tensor) -> Tensor:
        """The derivative of a term by a parameter times columns."""
        term = self._terms_inside[j]
        moved = term.covariance.along(self._slopes[j][a], term.design.t_matmul(v))
        return term.design.matmul(moved)

    def times(self, v: Tensor) -> Tensor:
        r""":math:`\dot V_a v` of columns (n, p), (m, n, p)."""
        found = v.new_zeros(self.count, *v.shape)
        for j, slopes in enumerate(self._slopes):
            for a in range(self.count):
                if bool(slopes[a].any()):
                    found[a] += self._along(j, a, v)
        return found

    def traces(self, P: Tensor) -> Tensor:
        r""":math:`\operatorname{tr}(P \dot V_a P \dot V_b)` for symmetric P (n, n), (m, m).

        With :math:`H_{st} = K_s Z_s^\top P Z_t` it is, over parts s and t,
        :math:`\sum J_{as,ij} J_{bt,lm} \sum_{uv} H_{st}[uj, vl] H_{ts}[vm, ui]`.
        """
        parts = self._parts()
        seen = [part.seen(P) for part in parts]
        found = P.new_zeros(self.count, self.count)
        for s, one in enumerate(parts):
            for t, other in enumerate(parts[: s + 1]):
                k, r = one.J.shape[1], other.J.shape[1]
                H = other.spread(seen[s].mT).mT.unflatten(0, (-1, k)).unflatten(2, (-1, r))
                back = one.spread(seen[t].mT).mT.unflatten(0, (-1, r)).unflatten(2, (-1, k))
                left = H.permute(1, 3, 0, 2).reshape(k * r, -1)
                right = back.permute(2, 0, 1, 3).reshape(-1, r * k)
                C = (left @ right).reshape(k, r, r, k)  # (j, l, m, i)
                product = torch.einsum("aij,jlmi,blm->ab", one.J, C, other.J)
                found += product if s == t else product + product.mT
        return (found + found.mT) / 2

    def _parts(self) -> list[_Part]:
        """The terms whose parameters are estimated."""
        found, n = [], len(self._like)
        for j, (term, slopes) in enumerate(zip(self._terms_inside, self._slopes, strict=True)):
            own = [a for a in range(self.count) if bool(slopes[a].any())]
            G = term.covariance
            if (
                isinstance(G, RepeatedCovariance | ScaledCovariance)
                and term.design.shape[1] <= 2 * n
            ):
                kernel = G.kernel.multiply if isinstance(G, ScaledCovariance) else _same
                found += [_Part(term.design.t_matmul, kernel, slopes)] if own else []
                continue
            for a in own:  # each with a matrix of its own over the rows
                J = slopes.new_zeros(self.count, 1, 1)
                J[a] = 1
                found.append(_Part(_same, lambda x, j=j, a=a: self._along(j, a, x), J))  # type: ignore[misc]
        return found


def _same(x: Tensor) -> Tensor:
    return x


def _product(term: Term, v: Tensor) -> Tensor:
    """A term times columns (n, c)."""
    return term.design.matmul(term.covariance.multiply(term.design.t_matmul(v)))
