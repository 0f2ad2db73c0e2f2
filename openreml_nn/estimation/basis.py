r"""Random slopes in a better conditioned basis than their covariates are.

For :math:`z^\top b` with :math:`b \sim N(0, \Sigma)` and any invertible B the effects
:math:`B^{-1} b` of :math:`z^\top B` have the covariance :math:`B^{-1}\Sigma B^{-\top}`, as free as Σ where that is
unstructured. Where covariates are far from zero the intercept of a level lies far outside of the
data, with a variance beside which the others drown and correlations of almost ±1; in the basis in
which their products over the rows are those of independent columns they are of the size of the
response.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["basis_of", "factor_in_user_basis", "factor_names", "history_in_user_basis"]

#: Columns of a better condition than this are taken as they are.
_CONDITION = 1e3


def basis_of(values: Tensor) -> Tensor | None:
    """B (k, k) by which the columns of values (n, k) have orthogonal ones of mean square 1.

    None where they are well conditioned, or depend on each other.

    >>> basis_of(torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]])) is None
    True
    >>> basis_of(torch.tensor([[1.0, 1e4], [1.0, 1e4 + 1], [1.0, 1e4 + 2]]).double()).shape
    torch.Size([2, 2])
    """
    n, k = values.shape
    size = torch.linalg.vector_norm(values, dim=0)
    if k < 2 or n < k or not bool((size > 0).all()):
        return None
    R = torch.linalg.qr(values / size).R
    spread = torch.linalg.svdvals(R)
    if not _CONDITION < float((spread[0] / spread[-1]) ** 2) < 1e20:
        return None
    eye = torch.eye(k, dtype=values.dtype, device=values.device)
    B = torch.linalg.solve_triangular(R, eye, upper=True) / size[:, None]
    return B * n**0.5 * R.diagonal().sign()


def factor_in_user_basis(factor: Tensor, B: Tensor) -> Tensor:
    r"""The Cholesky factor of :math:`B L L^\top B^\top`, by which the effects of z have the covariance
    that those of :math:`z^\top B` have by L."""
    R = torch.linalg.qr((B @ factor).mT).R
    # A variance of zero keeps its column of zeros.
    sign = torch.where(R.diagonal() < 0, -1.0, 1.0).to(R)
    return (R * sign[:, None]).mT


def history_in_user_basis(
    parameters: Mapping[str, float], bases: Mapping[str, Tensor]
) -> dict[str, float]:
    """Parameters by name with the entries of the factors of some terms in the user's basis.

    Args:
        parameters: transformed values, those of a factor as ``term/…/L_i_j``.
        bases: B of each term, by its name.
    """
    found = dict(parameters)
    for term, B in bases.items():
        names = factor_names(parameters, term)
        L = torch.zeros_like(B)
        for name, (i, j) in names.items():
            L[i, j] = parameters[name]
        L = factor_in_user_basis(L, B)
        found |= {name: float(L[i, j]) for name, (i, j) in names.items()}
    return found


def factor_names(names: Mapping[str, object], term: str) -> dict[str, tuple[int, int]]:
    """The entries of a term's factor among the names of parameters, with row and column."""
    pattern = re.compile(re.escape(term) + r"/.*\bL_(\d+)_(\d+)")
    matches = {name: pattern.fullmatch(name) for name in names}
    return {name: (int(m[1]), int(m[2])) for name, m in matches.items() if m}
