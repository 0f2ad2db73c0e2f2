"""Relationship of animals with and without markers, by its inverse."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from scipy.linalg import cho_factor, cho_solve

from openreml_nn.covariance.genomic import check_square
from openreml_nn.covariance.pedigree import Pedigree
from openreml_nn.covariance.relationship import Relationship
from openreml_nn.support.checks import check_flag, check_instance, check_number
from openreml_nn.support.errors import InputError

__all__ = ["single_step_relationship"]


def single_step_relationship(
    pedigree: Pedigree,
    genomic: pd.DataFrame,
    *,
    alpha: float = 0.95,
    beta: float = 0.05,
    tau: float = 1.0,
    omega: float = 1.0,
    tuned: bool = False,
) -> Relationship:
    r"""The inverse of the relationships H of a pedigree some of whose animals are genotyped.

    .. math::
        H^{-1} = A^{-1} + \begin{bmatrix} 0 & 0 \\
            0 & \tau (\alpha G + \beta A_{22})^{-1} - \omega A_{22}^{-1} \end{bmatrix}

    with :math:`A_{22}` of the genotyped animals. It is sparse but for the block of these; m
    genotyped of n animals take about :math:`n m + m^3` operations and :math:`m^2` numbers.

    Args:
        pedigree: of all animals.
        genomic: G of those genotyped, see :func:`genomic_relationship`.
        alpha, beta: weights of G and :math:`A_{22}`; a G of more animals than markers, or of
            frequencies of their own, is singular and needs a ``beta``.
        tau, omega: scales of the two inverses.
        tuned: whether the weighted sum is brought to the base of the pedigree, :math:`a + b\,G_w`
            with the means of :math:`A_{22}` over the diagonal and over all entries.

    Raises:
        InputError: if a genotyped animal is not in the pedigree, a weight is negative, or what is to
            be inverted is not positive definite.
        TypeError: if an argument is of another kind.

    Reference:
        Aguilar et al., Journal of Dairy Science 93 (2010) 743; Christensen and Lund, Genetics
        Selection Evolution 42 (2010) 2; tuned, Chen et al., Journal of Animal Science 89 (2011)
        2673.

    >>> pedigree = Pedigree.of(["c", "d"], ["a", "a"], ["b", "b"])
    >>> G = pd.DataFrame([[1.0, 0.7], [0.7, 1.0]], ["c", "d"], ["c", "d"])
    >>> found = single_step_relationship(pedigree, G, alpha=1.0, beta=0.0)
    >>> found.inverse.to_dense().inverse()[2:, 2:]
    tensor([[1.0000, 0.7000],
            [0.7000, 1.0000]], dtype=torch.float64)
    """
    check_instance("pedigree", pedigree, Pedigree)
    check_square("genomic", genomic)
    weights = {"alpha": alpha, "beta": beta, "tau": tau, "omega": omega}
    for name, weight in weights.items():
        check_number(name, weight, least=0.0)
    at = pedigree.positions(list(genomic.index))
    if len(set(at.tolist())) < len(at):
        raise InputError("`genomic` has one animal under two names: expected each once")
    A22 = pedigree.relationship(genomic.index).to_numpy()
    G = alpha * genomic.to_numpy(dtype=np.float64) + beta * A22
    if check_flag("tuned", tuned):
        G = _tuned(G, A22)
    block = tau * _inverse("alpha G + beta A22", G) - omega * _inverse("A22", A22)
    index = torch.from_numpy(np.stack([np.repeat(at, len(at)), np.tile(at, len(at))]))
    values, size = torch.from_numpy(block.reshape(-1)), pedigree.inverse.shape
    added = torch.sparse_coo_tensor(index, values, size, check_invariants=True)
    return Relationship(pedigree.levels, (pedigree.inverse + added).coalesce())


def _tuned(G: np.ndarray, A22: np.ndarray) -> np.ndarray:
    spread = np.diag(G).mean() - G.mean()
    if not spread > 0:
        raise InputError("`genomic` is constant: expected one that can be `tuned`")
    b = (np.diag(A22).mean() - A22.mean()) / spread
    return np.asarray(A22.mean() + b * (G - G.mean()))


def _inverse(what: str, matrix: np.ndarray) -> np.ndarray:
    # Rounding leaves many a singular matrix a factor; the smallest eigenvalue is above 1 / trace of
    # the inverse, and not n times as large.
    try:
        inverse = cho_solve(cho_factor(matrix, lower=True), np.eye(len(matrix)))
        least = 1 / np.trace(inverse)
    except np.linalg.LinAlgError:
        least = 0.0
    if not least > len(matrix) * np.finfo(float).eps * np.abs(matrix).max():
        raise InputError(
            f"`genomic`: {what} is not positive definite: expected a larger `beta`, or to leave out "
            "one of two animals with the same calls"
        )
    return np.asarray((inverse + inverse.T) / 2)
