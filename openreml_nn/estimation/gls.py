r"""Generalised least squares: what follows once the covariance is known.

Each function takes the covariance V as a tensor, or as a tree of matrices at
its present parameters or at other ones, ``theta``. It forms V and its Cholesky
factor, so it is for data of a few thousand rows; the estimates of a fit, of any
size, are in its result, and those at the present parameters of a tree come
from :class:`~openreml_nn.REMLLoss`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce

import torch
from torch import Tensor

from openreml_nn.covariance import Matrix
from openreml_nn.covariance.matrix import FreeParams
from openreml_nn.likelihood.fixed import FixedPart, check_data, traced
from openreml_nn.likelihood.problem import cholesky
from openreml_nn.likelihood.solvers.dense import restricted_log_likelihood
from openreml_nn.support.errors import InputError

__all__ = [
    "blue",
    "blup",
    "loglik",
    "marginal_predict",
    "marginal_residual",
    "predict",
    "residual",
]


def blue(y: Tensor, X: Tensor, V: Tensor | Matrix, theta: FreeParams = None) -> Tensor:
    r"""Best linear unbiased estimate of the fixed effects.

    .. math::
        \hat\beta = (X^\top V^{-1} X)^{-1} X^\top V^{-1} y

    Args:
        y: response (n,).
        X: model matrix of the fixed effects (n, p).
        V: covariance of y (n, n).
        theta: free parameters at which the tree V is taken, a 1-D tensor or a
            dict by name; its present ones by default.

    Returns:
        (p,), differentiable in y, X, V and theta. A column that depends on
        earlier ones is dropped with a warning; its coefficient is NaN.

    Raises:
        NotPositiveDefiniteError: if V is not positive definite (a ValueError).
        InputError: if shapes do not fit, V is not symmetric, or ``theta`` is
            given for a tensor (a ValueError).
        TypeError, InputError: if y or X is not what it should be, as in
            :class:`~openreml_nn.REMLLoss`.

    Reference:
        Henderson, Biometrics 31 (1975), eq. 3.

    >>> y, X = torch.tensor([1.0, 2.0, 4.0]), torch.ones(3, 1)
    >>> blue(y, X, torch.eye(3))
    tensor([2.3333])
    """
    fit = _GLS(*_together(y, X, theta, V=V))
    return fit.beta.new_full((fit.p,), torch.nan).index_copy(0, fit.columns, fit.beta)


def marginal_predict(y: Tensor, X: Tensor, V: Tensor | Matrix, theta: FreeParams = None) -> Tensor:
    r"""Fitted values from the fixed effects alone, :math:`X\hat\beta`, (n,).

    Args:
        y: response (n,).
        X: model matrix of the fixed effects (n, p).
        V: covariance of y (n, n).
        theta: free parameters of the tree V; its present ones by default.

    Raises:
        TypeError, InputError, NotPositiveDefiniteError: as :func:`blue`.

    Reference:
        Henderson, Biometrics 31 (1975), eq. 3.

    >>> y, X = torch.tensor([1.0, 2.0, 4.0]), torch.ones(3, 1)
    >>> marginal_predict(y, X, torch.eye(3))
    tensor([2.3333, 2.3333, 2.3333])
    """
    fit = _GLS(*_together(y, X, theta, V=V))
    return fit.y - fit.residual


def marginal_residual(y: Tensor, X: Tensor, V: Tensor | Matrix, theta: FreeParams = None) -> Tensor:
    r"""Residuals from the fixed effects alone, :math:`y - X\hat\beta`, (n,).

    Args:
        y: response (n,).
        X: model matrix of the fixed effects (n, p).
        V: covariance of y (n, n).
        theta: free parameters of the tree V; its present ones by default.

    Raises:
        TypeError, InputError, NotPositiveDefiniteError: as :func:`blue`.

    Reference:
        Henderson, Biometrics 31 (1975), eq. 3.

    >>> y, X = torch.tensor([1.0, 2.0, 4.0]), torch.ones(3, 1)
    >>> marginal_residual(y, X, torch.eye(3))
    tensor([-1.3333, -0.3333,  1.6667])
    """
    return _GLS(*_together(y, X, theta, V=V)).residual


def blup(
    y: Tensor,
    X: Tensor,
    Z: Tensor | Matrix,
    G: Tensor | Matrix,
    V: Tensor | Matrix,
    theta: FreeParams = None,
) -> Tensor:
    r"""Best linear unbiased predictions of random effects.

    .. math::
        \hat b = G Z^\top V^{-1}(y - X\hat\beta)

    Args:
        y: response (n,).
        X: model matrix of the fixed effects (n, p).
        Z: design of the random effects (n, q).
        G: their covariance (q, q), one of the parts of V.
        V: covariance of y (n, n).
        theta: free parameters at which the tree V is taken, and G and Z, where
            they are trees, with it; the present ones by default.

    Returns:
        (q,), differentiable in every argument.

    Raises:
        InputError: as in :func:`blue`, or if ``theta`` is given and G or Z has
            parameters that V has not (a ValueError).

    Reference:
        Henderson, Biometrics 31 (1975), eq. 4.

    >>> y, X = torch.tensor([1.0, 2.0, 4.0]), torch.ones(3, 1)
    >>> Z, G = torch.eye(3), torch.eye(3)
    >>> blup(y, X, Z, G, Z @ G @ Z.T + torch.eye(3))
    tensor([-0.6667, -0.1667,  0.8333])
    """
    y, X, values = _together(y, X, theta, V=V, Z=Z, G=G)
    return _predicted(_GLS(y, X, values), values)


def predict(
    y: Tensor,
    X: Tensor,
    Z: Tensor | Matrix,
    G: Tensor | Matrix,
    V: Tensor | Matrix,
    theta: FreeParams = None,
) -> Tensor:
    r"""Fitted values from fixed and random effects, :math:`X\hat\beta + Z\hat b`, (n,).

    Several random effects are one, with Z an :class:`~openreml_nn.covariance.Augment` of their
    designs and G a :class:`~openreml_nn.covariance.BlockDiagonal` of their covariances.

    Args:
        y: response (n,).
        X: model matrix of the fixed effects (n, p).
        Z: design of the random effects (n, q).
        G: their covariance (q, q), one of the parts of V.
        V: covariance of y (n, n).
        theta: free parameters of the tree V, and of G and Z with it; the present ones by default.

    Raises:
        TypeError, InputError, NotPositiveDefiniteError: as :func:`blup`.

    Reference:
        Henderson, Biometrics 31 (1975), eqs. 3 and 4.

    >>> y, X = torch.tensor([1.0, 2.0, 4.0]), torch.ones(3, 1)
    >>> predict(y, X, torch.eye(3), torch.eye(3), 2 * torch.eye(3))
    tensor([1.6667, 2.1667, 3.1667])
    """
    y, X, values = _together(y, X, theta, V=V, Z=Z, G=G)
    fit = _GLS(y, X, values)
    return y - fit.residual + values["Z"] @ _predicted(fit, values)


def residual(
    y: Tensor,
    X: Tensor,
    Z: Tensor | Matrix,
    G: Tensor | Matrix,
    V: Tensor | Matrix,
    theta: FreeParams = None,
) -> Tensor:
    r"""Residuals from fixed and random effects, :math:`y - X\hat\beta - Z\hat b`, (n,).

    Args:
        y: response (n,).
        X: model matrix of the fixed effects (n, p).
        Z: design of the random effects (n, q).
        G: their covariance (q, q), one of the parts of V.
        V: covariance of y (n, n).
        theta: free parameters of the tree V, and of G and Z with it; the present ones by default.

    Raises:
        TypeError, InputError, NotPositiveDefiniteError: as :func:`blup`.

    Reference:
        Henderson, Biometrics 31 (1975), eqs. 3 and 4.

    >>> y, X = torch.tensor([1.0, 2.0, 4.0]), torch.ones(3, 1)
    >>> residual(y, X, torch.eye(3), torch.eye(3), 2 * torch.eye(3))
    tensor([-0.6667, -0.1667,  0.8333])
    """
    y, X, values = _together(y, X, theta, V=V, Z=Z, G=G)
    fit = _GLS(y, X, values)
    return fit.residual - values["Z"] @ _predicted(fit, values)


def loglik(
    y: Tensor,
    X: Tensor,
    V: Tensor | Matrix,
    theta: FreeParams = None,
    method: str = "reml",
) -> Tensor:
    r"""Restricted or full log-likelihood of a covariance, constants included.

    The formula is that of :func:`~openreml_nn.restricted_log_likelihood`, for
    a tree of matrices too.

    Args:
        y: response (n,).
        X: model matrix of the fixed effects (n, p).
        V: covariance of y (n, n).
        theta: as in :func:`blue`.
        method: ``"reml"`` or ``"ml"``.

    Returns:
        A scalar, differentiable in y, X, V and theta.

    Raises:
        InputError: as in :func:`blue`, or if ``method`` is another word (a ValueError).

    >>> from openreml_nn.covariance import ScalarMatrix
    >>> y, X = torch.tensor([1.0, 2.0, 4.0]), torch.ones(3, 1)
    >>> loglik(y, X, ScalarMatrix(3), torch.zeros(1))
    tensor(-4.7205)
    """
    y, X, values = _together(y, X, theta, V=V)
    return restricted_log_likelihood(y, X, values["V"], method)


class _GLS:
    """Generalised least squares of y on X.

    Attributes:
        y: response (n,).
        p: number of columns of X.
        columns: those that are kept.
        beta: their coefficients.
        residual: :math:`y - X\\hat\\beta`.
        p_y: :math:`V^{-1}(y - X\\hat\\beta)`.
    """

    def __init__(self, y: Tensor, X: Tensor, values: Mapping[str, Tensor]) -> None:
        V = values["V"]
        fixed = FixedPart.plain(y, X) if traced(y, X, V) else FixedPart.of(y, X)
        L = cholesky(V, "V")
        data = torch.cat([fixed.Q, fixed.y[:, None]], 1)
        white = torch.linalg.solve_triangular(L, data, upper=False)
        white_Q, white_y = white[:, :-1], white[:, -1:]
        factor = cholesky(white_Q.mT @ white_Q, "X' V^-1 X")
        gamma = torch.cholesky_solve(white_Q.mT @ white_y, factor)[:, 0]
        self.y, self.p = y, X.shape[1]
        self.columns = torch.tensor(fixed.columns, dtype=torch.long, device=y.device)
        self.beta = fixed.coefficients(gamma)
        self.residual = fixed.y - fixed.Q @ gamma
        self.p_y = torch.cholesky_solve(self.residual[:, None], L)[:, 0]


def _predicted(fit: _GLS, values: Mapping[str, Tensor]) -> Tensor:
    """:math:`G Z^\\top V^{-1}(y - X\\hat\\beta)`."""
    return values["G"] @ (values["Z"].mT @ fit.p_y)


def _together(
    y: Tensor, X: Tensor, theta: FreeParams, **matrices: Tensor | Matrix
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The data and the evaluated matrices, checked and in the widest of their precisions."""
    for name, matrix in matrices.items():
        if not isinstance(matrix, Tensor | Matrix):
            raise TypeError(f"`{name}` is a {type(matrix).__name__}: expected a tensor or a Matrix")
    if not traced(y, X):
        check_data(y, X)
    values = _evaluated(matrices, theta)
    for name, value in values.items():
        _check_value(name, value, y, values)
    dtype = reduce(torch.promote_types, [v.dtype for v in (y, *values.values())], torch.float32)
    return y.to(dtype), X.to(dtype), {name: value.to(dtype) for name, value in values.items()}


def _check_value(name: str, value: Tensor, y: Tensor, values: Mapping[str, Tensor]) -> None:
    if not value.is_floating_point():
        raise TypeError(f"`{name}` is {value.dtype}: expected a floating-point tensor")
    n, q = len(y), values[name].shape[-1]
    if name == "G":
        n = q = values["Z"].shape[1]
    elif name == "V":
        q = n
    if tuple(value.shape) != (n, q):
        wanted = f"({n}, q)" if name == "Z" else str((n, q))
        raise InputError(f"`{name}` has shape {tuple(value.shape)}: expected {wanted}")
    if value.device != y.device:
        raise InputError(f"`{name}` is on {value.device} but `y` on {y.device}: move one of them")
    if traced(value):
        return
    with torch.no_grad():
        if not bool(torch.isfinite(value).all()):
            raise InputError(f"`{name}` has an entry that is not finite")
        if name == "Z":
            return
        gap = (value - value.mT).abs().max()
        if bool(gap > 1e3 * torch.finfo(value.dtype).eps * value.abs().max()):
            raise InputError(f"`{name}` is not symmetric")


def _evaluated(matrices: Mapping[str, Tensor | Matrix], theta: FreeParams) -> dict[str, Tensor]:
    """The matrices as tensors, those that are trees at ``theta``."""
    if theta is None:
        return {name: m() if isinstance(m, Matrix) else m for name, m in matrices.items()}
    V = matrices["V"]
    if not isinstance(V, Matrix):
        raise InputError("`theta` is given but `V` is a tensor: expected a Matrix, or no `theta`")
    trees = {name: m for name, m in matrices.items() if isinstance(m, Matrix)}
    known = {id(module) for module in V.modules()}
    for name, tree in trees.items():
        owners = [m for m in tree.modules() if any(True for _ in m.parameters(recurse=False))]
        if any(id(owner) not in known for owner in owners):
            raise InputError(
                f"`{name}` has parameters that are not in `V`, so that `theta` has no values "
                f"for them: pass its value, `{name}(…)`"
            )
    with V.given(theta):
        return {name: m() if isinstance(m, Matrix) else m for name, m in matrices.items()}
