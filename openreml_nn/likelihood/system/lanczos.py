r"""Lanczos quadrature for :math:`z^\top \log(M) z`, with its derivative by M."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from openreml_nn.support.errors import NotPositiveDefiniteError
from openreml_nn.support.spectrum import decomposed

__all__ = ["LogForms", "log_forms"]

_MOST_STEPS = 1000
#: Vectors whose share in the derivative is less than this are left out.
_NEGLIGIBLE = 1e-12


@dataclass(frozen=True)
class LogForms:
    r"""The forms :math:`z^\top \log(M) z` for some z.

    Attributes:
        values: (m,) of each z.
        vectors: (q, r, m) such that the derivative of each is :math:`\sum_r x_r^\top \dot M x_r`.
    """

    values: Tensor
    vectors: Tensor


def log_forms(times: Callable[[Tensor], Tensor], z: Tensor, tolerance: float) -> LogForms:
    r"""Lanczos' method from each column of z (q, m).

    With :math:`T = S\,\mathrm{diag}(\lambda)\,S^\top` and V the basis, the form is
    :math:`|z|^2\sum_a s_a^2\log\lambda_a` for the first row s of S, and its derivative, that of the
    logarithm by Daleckii and Krein, :math:`\sum_{ab} C_{ab}\, y_a^\top \dot M y_b` with
    :math:`Y = VS` and :math:`C_{ab} = |z|^2 s_a s_b
    (\log\lambda_a - \log\lambda_b)/(\lambda_a - \lambda_b)`, a matrix of low rank.

    Args:
        times: products with M.
        z: (q, m), no column zero.
        tolerance: relative residual of :math:`M x = z` at which the steps end.

    Raises:
        NotPositiveDefiniteError: if M is not positive definite, or 1,000 steps do not suffice.

    Reference:
        Higham, Functions of Matrices (2008), theorem 3.11; Golub and Meurant, Matrices, Moments and
        Quadrature (2010), chapter 7.
    """
    tolerance = max(tolerance, 20 * torch.finfo(z.dtype).eps)
    size = torch.linalg.vector_norm(z, dim=0)
    v, before = z / size, torch.zeros_like(z)
    beta = torch.zeros_like(size)
    going = torch.ones_like(size, dtype=torch.bool)
    pivot, residual = torch.ones_like(size), torch.ones_like(size)
    basis: list[Tensor] = []
    diagonal: list[Tensor] = []
    off: list[Tensor] = []
    for step in range(_MOST_STEPS):
        basis.append(v)
        w = times(v).sub_(before * beta)
        alpha = (w * v).sum(0)
        w.addcmul_(v, alpha, value=-1)
        pivot = torch.where(going, alpha - (beta * beta / pivot if step else 0), 1.0)
        if not bool((pivot > 0).all()):
            raise NotPositiveDefiniteError(
                "the system of the random effects is not positive definite"
            )
        diagonal.append(torch.where(going, alpha, 1.0))
        beta = torch.linalg.vector_norm(w, dim=0)
        residual = residual * beta / pivot
        going = going & (residual > tolerance)
        # A column that has converged has no more of a basis.
        beta = torch.where(going, beta, 0.0)
        before, v = v, torch.where(going, w / torch.where(going, beta, 1.0), 0.0)
        if not bool(going.any()):
            return _forms(basis, diagonal, off, size)
        off.append(beta)
    raise NotPositiveDefiniteError(
        "the system of the random effects is not positive definite to working precision: "
        f"Lanczos' method did not converge in {_MOST_STEPS} steps"
    )


def _forms(
    basis: list[Tensor], diagonal: list[Tensor], off: list[Tensor], size: Tensor
) -> LogForms:
    T = torch.diag_embed(torch.stack(diagonal, 1))
    if off:
        side = torch.stack(off, 1)
        T = T + torch.diag_embed(side, 1) + torch.diag_embed(side, -1)
    values, S = decomposed(T, "the Lanczos matrix of a probe")  # (m, k), (m, k, k)
    if not bool((values > 0).all()):
        raise NotPositiveDefiniteError("the system of the random effects is not positive definite")
    first = size[:, None] * S[:, 0, :]
    one, other = values[:, :, None], values[:, None, :]
    # (log a - log b) / (a - b) = 2 artanh(d) / (d (a + b)) with d = (a - b) / (a + b).
    d = (one - other) / (one + other)
    near = d.abs() < 1e-3
    ratio = torch.where(near, 1 + d * d / 3, torch.atanh(d) / torch.where(near, 1.0, d))
    C = first[:, :, None] * first[:, None, :] * 2 * ratio / (one + other)
    share, G = decomposed(C, "the derivative of the logarithm of a Lanczos matrix")
    kept = int((share > _NEGLIGIBLE * share[:, -1:]).sum(1).amax())
    share, G = share[:, -kept:].clamp(min=0), G[:, :, -kept:]
    mixed = S @ (G * share.sqrt()[:, None, :])  # (m, k, r)
    q, m = basis[0].shape
    vectors = basis[0].new_zeros(q, kept, m)
    for v, part in zip(basis, mixed.unbind(1), strict=True):
        vectors.addcmul_(v[:, None, :], part.mT[None])
    return LogForms((first**2 * values.log()).sum(1), vectors)
