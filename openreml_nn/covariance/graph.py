"""Random walks, and areas beside their neighbours: sparse precisions on a graph."""

from __future__ import annotations

from collections.abc import Mapping
from math import comb
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_matrix, csc_matrix, diags, issparse
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from openreml_nn.covariance.exchangeable import within_bounds
from openreml_nn.covariance.known_inverse import KnownInverseMatrix
from openreml_nn.covariance.matrix import FreeParams, Matrix
from openreml_nn.covariance.params import free_specs, merge_specs
from openreml_nn.covariance.start import harmonic_mean
from openreml_nn.covariance.transform import TransformExpPow2
from openreml_nn.support.checks import check_constant, check_count, found
from openreml_nn.support.errors import InputError
from openreml_nn.terms.design import IdentityDesign
from openreml_nn.terms.precision import GraphPrecision, PrecisionCovariance
from openreml_nn.terms.term import Term

__all__ = ["CARMatrix", "ICARMatrix", "RandomWalkMatrix"]

#: Random signs by which the variance of an intrinsic field is estimated, for a start.
_SIGNS = 8


class _IntrinsicMatrix(KnownInverseMatrix):
    r"""Base of :math:`\sigma^2 Q^+` for a precision Q that is zero on something."""

    def moment_start(self, variance: Tensor) -> bool:
        n = self.shape[0]
        generator = torch.Generator().manual_seed(0)
        z = 2.0 * torch.randint(0, 2, (n, _SIGNS), generator=generator).to(variance) - 1
        size = (z * self.kernel.multiply(z)).sum() / (n * _SIGNS)
        return self.set_start(self.param_names[0], harmonic_mean(variance) / size)


class RandomWalkMatrix(_IntrinsicMatrix):
    r"""A random walk of first or second order, :math:`V = \sigma^2 (D^\top D)^+`.

    D takes differences of that order, which are independent with variance :math:`\sigma^2`. They say
    nothing of the level of the walk, nor with second order of its slope: the effects sum to zero,
    and with second order have no linear trend. Both are fixed effects where they are wanted: with
    an intercept (and the position) among the fixed effects the restricted likelihood is that of a
    diffuse start.

    =========== ============== =======
    parameter   transform      default
    =========== ============== =======
    ``sigma^2`` :math:`e^{2x}` 0
    =========== ============== =======

    Args:
        n: how many positions, equally far apart.
        order: 1 or 2.
        param_specs: specifications that replace the ones above.

    Shape:
        Output: (n, n).

    Raises:
        InputError: if ``order`` is another number, or n is not above it.

    Reference:
        Rue and Held, Gaussian Markov Random Fields (2005), sections 3.3.1 and 3.4.1.

    >>> RandomWalkMatrix(3)(torch.zeros(1)).round(decimals=4)
    tensor([[ 0.5556, -0.1111, -0.4444],
            [-0.1111,  0.2222, -0.1111],
            [-0.4444, -0.1111,  0.5556]])
    """

    def __init__(
        self, n: int, order: int = 1, param_specs: Mapping[str, Any] | None = None
    ) -> None:
        n = check_count("n", n, 1)
        if check_count("order", order, 1) > 2:
            raise InputError(f"`order` is {order}: expected 1 or 2")
        if n <= order:
            raise InputError(f"`n` is {n}: expected more than {order} positions of a walk")
        weights = [(-1.0) ** (order - i) * comb(order, i) for i in range(order + 1)]
        D = diags(weights, range(order + 1), shape=(n - order, n), format="csc")
        at = np.arange(n) - (n - 1) / 2
        null = np.stack([at**power / np.linalg.norm(at**power) for power in range(order)], 1)
        super().__init__(_tensor(csc_matrix(D.T @ D)), param_specs, torch.from_numpy(null))
        self.order = order

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, order={self.order}"


class ICARMatrix(_IntrinsicMatrix):
    r"""The intrinsic conditional autoregression of areas, :math:`V = \sigma^2 (D - W)^+`.

    W holds the weights of neighbours and D their sums: given the others an area has the mean of its
    neighbours, and variance :math:`\sigma^2 / D_{ii}`. The effects of each connected part of the
    graph sum to zero: its level is a fixed effect.

    =========== ============== =======
    parameter   transform      default
    =========== ============== =======
    ``sigma^2`` :math:`e^{2x}` 0
    =========== ============== =======

    Args:
        adjacency: W, (n, n), symmetric with zeros on its diagonal, a tensor or a SciPy matrix, sparse
            or dense; or the pairs of neighbours, (m, 2) integers from 0, each pair once.
        param_specs: specifications that replace the ones above.

    Shape:
        Output: (n, n).

    Raises:
        TypeError, InputError: if that is no such graph, or an area has no neighbour.

    Reference:
        Besag, York and Mollié, Annals of the Institute of Statistical Mathematics 43 (1991) 1.

    >>> ICARMatrix(torch.tensor([[0, 1], [1, 2]]))(torch.zeros(1)).round(decimals=4)
    tensor([[ 0.5556, -0.1111, -0.4444],
            [-0.1111,  0.2222, -0.1111],
            [-0.4444, -0.1111,  0.5556]])
    """

    def __init__(self, adjacency: Any, param_specs: Mapping[str, Any] | None = None) -> None:
        W = _weights(adjacency)
        parts, part = connected_components(W)
        null = (part[:, None] == np.arange(parts)).astype(float)
        null /= np.linalg.norm(null, axis=0)
        Q = csc_matrix(diags(np.asarray(W.sum(1)).reshape(-1)) - W)
        super().__init__(_tensor(Q), param_specs, torch.from_numpy(null))


class CARMatrix(Matrix):
    r"""The proper conditional autoregression of areas, :math:`V = \sigma^2 (D - \rho W)^{-1}`.

    W holds the weights of neighbours and D their sums: given the others an area has ρ times the mean
    of its neighbours, and variance :math:`\sigma^2 / D_{ii}`.

    =========== ================================ =======
    parameter   transform                        default
    =========== ================================ =======
    ``sigma^2`` :math:`e^{2x}`                   0
    ``rho``     sigmoid, scaled to (−1, 1)       0
    =========== ================================ =======

    Args:
        adjacency: see :class:`ICARMatrix`.
        param_specs: specifications that replace the ones above.

    Shape:
        Output: (n, n).

    Raises:
        TypeError, InputError: as in :class:`ICARMatrix`.

    Reference:
        Cressie, Statistics for Spatial Data (1993), section 7.2.2.

    >>> CARMatrix(torch.tensor([[0, 1], [1, 2]]))(torch.zeros(2))
    tensor([[1.0000, 0.0000, 0.0000],
            [0.0000, 0.5000, 0.0000],
            [0.0000, 0.0000, 1.0000]])
    """

    _own: Tensor
    _between: Tensor

    def __init__(self, adjacency: Any, param_specs: Mapping[str, Any] | None = None) -> None:
        W = _weights(adjacency)
        n = W.shape[0]
        default = free_specs(["sigma^2"], trans=TransformExpPow2())
        default |= free_specs(["rho"], trans=within_bounds(-1.0, 1.0))
        super().__init__((n, n), merge_specs(default, param_specs))
        whole = csc_matrix(W + diags(np.ones(n)))
        whole.sort_indices()
        entries = whole.tocoo()
        low = entries.row >= entries.col
        row, column = entries.row[low].astype(np.int64), entries.col[low].astype(np.int64)
        self.precision = GraphPrecision(n, row, column)
        on, weight = row == column, entries.data[low]
        sums = np.asarray(W.sum(1)).reshape(-1)
        self.register_data("_own", torch.from_numpy(np.where(on, sums[row], 0.0)))
        self.register_data("_between", torch.from_numpy(np.where(on, 0.0, weight)))

    def _numbers(self, free_params: FreeParams = None) -> tuple[Tensor, Tensor]:
        """The variance, and the entries of the precision."""
        variance, rho = self.build_params(free_params).split(1)
        return variance, self._own.to(rho) - rho * self._between.to(rho)

    def forward(self, free_params: FreeParams = None) -> Tensor:
        variance, entries = self._numbers(free_params)
        return variance * self.precision.covariance(entries)

    def manual_grad(self, free_params: FreeParams = None) -> tuple[Tensor | None, list[str]]:
        variance, entries = self._numbers(free_params)
        by_rho = self.precision.covariance_along(entries, -self._between.to(entries))
        slices = torch.stack([self.precision.covariance(entries), variance * by_rho])
        return self.free_grad(slices, free_params)

    def structure(self) -> list[Term]:
        g = PrecisionCovariance(torch.cat(self._numbers()), self.precision)
        return [Term(IdentityDesign(self.shape[0]), g)]

    def moment_start(self, variance: Tensor) -> bool:
        self.set_start(self.param_names[1], torch.zeros_like(variance[0]))
        sums = self._own[self._own > 0].to(variance)
        return self.set_start(self.param_names[0], harmonic_mean(variance) / (1 / sums).mean())

    def start_reach(self, reach: float) -> bool:
        return self.set_start(self.param_names[1], torch.tensor(reach))


def _tensor(matrix: csc_matrix) -> Tensor:
    entries = matrix.tocoo()
    index = torch.from_numpy(np.stack([entries.row, entries.col]).astype(np.int64))
    shape = tuple(matrix.shape)
    return torch.sparse_coo_tensor(
        index, torch.from_numpy(entries.data.astype(float)), shape, check_invariants=True
    ).coalesce()


def _weights(adjacency: Any) -> csc_matrix:
    """The weights of a graph, (n, n)."""
    if isinstance(adjacency, Tensor) and not adjacency.is_floating_point():
        return _checked_graph(_of_pairs(adjacency))
    if isinstance(adjacency, Tensor):
        if adjacency.dim() != 2:
            shape = tuple(adjacency.shape)
            raise InputError(f"`adjacency` has shape {shape}: expected (n, n) weights")
        check_constant("adjacency", adjacency)
        entries = adjacency.detach().cpu().double().to_sparse_coo().coalesce()
        row, column = entries.indices().numpy()
        W = coo_matrix((entries.values().numpy(), (row, column)), tuple(adjacency.shape)).tocsc()
    elif issparse(adjacency):
        W = csc_matrix(adjacency, dtype=float)
    else:
        raise TypeError(
            f"`adjacency` is {found(adjacency)}: expected a tensor or a SciPy matrix of weights, or "
            "a tensor of pairs"
        )
    return _checked_graph(W)


def _of_pairs(pairs: Tensor) -> csc_matrix:
    if pairs.dim() != 2 or pairs.shape[1] != 2 or not len(pairs) or pairs.dtype == torch.bool:
        raise InputError(
            f"`adjacency` is {pairs.dtype} of shape {tuple(pairs.shape)}: expected (m, 2) pairs of "
            "neighbours, or (n, n) weights as floating-point numbers"
        )
    row, column = pairs.detach().cpu().long().mT.numpy()
    if min(row.min(), column.min()) < 0:
        raise InputError("`adjacency` has a negative position: expected pairs from 0")
    n = int(max(row.max(), column.max())) + 1
    one, other = np.minimum(row, column), np.maximum(row, column)
    key, count = np.unique(one * n + other, return_counts=True)
    if count.max() > 1:
        i, j = divmod(int(key[count.argmax()]), n)
        raise InputError(f"`adjacency` has the pair ({i}, {j}) twice: expected each once")
    half = coo_matrix((np.ones(len(row)), (row, column)), (n, n))
    return csc_matrix(half + half.T)


def _checked_graph(W: csc_matrix) -> csc_matrix:
    W.eliminate_zeros()
    if W.shape[0] != W.shape[1] or not W.shape[0]:
        raise InputError(f"`adjacency` has shape {tuple(W.shape)}: expected (n, n)")
    if not np.isfinite(W.data).all() or (W.data < 0).any():
        raise InputError("`adjacency` has a weight that is negative or not finite")
    if W.diagonal().any():
        node = int((W.diagonal() != 0).argmax())
        raise InputError(f"`adjacency` makes node {node} its own neighbour: expected a zero there")
    apart = csc_matrix(abs(W - W.T)).tocoo()
    if apart.nnz and apart.data.max() > 1e-12 * W.data.max():
        i, j = int(apart.row[apart.data.argmax()]), int(apart.col[apart.data.argmax()])
        raise InputError(
            f"`adjacency` is not symmetric: its weights ({i}, {j}) and ({j}, {i}) differ; "
            "`adjacency + adjacency.T` makes neighbours mutual"
        )
    alone = np.diff(W.indptr) == 0
    if alone.any():
        raise InputError(
            f"`adjacency` leaves {int(alone.sum())} of {W.shape[0]} nodes without a neighbour, the "
            f"first is node {int(alone.argmax())}: join each to one, or leave it out"
        )
    return W
