"""Akaike's criterion for the random effects of the data at hand."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from openreml_nn.estimation import Result
from openreml_nn.estimation.curvature import Curvature
from openreml_nn.estimation.derivatives import hessian_of_value, jacobian
from openreml_nn.inference.laplace_conditional import (
    degrees_by_differences,
    degrees_by_information,
    refuse_differences,
)
from openreml_nn.inference.laplace_refit import LaplaceRefit
from openreml_nn.inference.refit import Refit, family_of
from openreml_nn.likelihood.problem import cholesky
from openreml_nn.support.checks import check_choice, check_flag
from openreml_nn.support.errors import InputError
from openreml_nn.support.solving import solve_named
from openreml_nn.terms.term import residual_terms

__all__ = ["ConditionalAIC", "conditional_aic"]

#: What the matrix of a system is called in messages.
_INFORMATION = "the information of the fixed effects"
#: Rows of which dense matrices are formed for each parameter.
_MOST_ROWS = 3_000


class ConditionalAIC(NamedTuple):
    r"""Akaike's criterion given the random effects.

    Attributes:
        log_likelihood: :math:`\log p(y \mid \hat\beta, \hat b, \hat\theta)`.
        df: effective degrees of freedom, those of the residual's, or the family's, parameters among them.
        aic: :math:`-2\ell + 2\,\mathrm{df}`; the smaller is the better.
        correction: by what df is, ``"slopes"``, ``"differences"`` or ``"information"``; compare criteria of one.
    """

    log_likelihood: float
    df: float
    aic: float
    correction: str


def conditional_aic(
    result: Result, correction: str | None = None, progress: bool = True
) -> ConditionalAIC:
    r"""Conditional AIC: for predictions within the levels of the data, where AIC is for new ones.

    With fitted values :math:`\hat y = X\hat\beta + Z\hat b = y - RPy` and q parameters of the residual,

    .. math:: \mathrm{df} = q + \sum_i \frac{\partial \hat y_i}{\partial y_i}
        = q + \operatorname{tr}(I - RP) + \sum_{kl} \Big(\frac{\partial \hat y}{\partial \theta_k}\Big)^\top
        (H^{-1})_{kl}\, P V_l P y

    in which H is the observed information, because the variances follow the data too; those at a
    boundary, such as a zero, do not.

    Of a response that is not Gaussian, :math:`\hat\theta_i` being the natural parameter of a row,

    .. math:: \mathrm{df} = \sum_i y_i \{\hat\theta_i(y) - \hat\theta_i(y - e_i)\}, \qquad
        \mathrm{df} = \sum_i \hat\mu_i (1 - \hat\mu_i) \{\hat\theta_i(y_i = 1) - \hat\theta_i(y_i = 0)\}

    of counts (``poisson``) and of binary responses, from as many further fits as there are rows that are not
    zero, or rows. Any family has a simpler one, which takes the variances, and the q parameters of the
    family, for known ones: with C = [X Z], the observed information W of the responses and the precision S
    of the random effects

    .. math:: \mathrm{df} = q + \operatorname{tr}\big[C^\top W C\, (C^\top W C + S)^{-1}\big].

    Args:
        result: a fit.
        correction: ``"differences"`` or ``"information"``, of a response that is not Gaussian; the first by
            default where there is one. A Gaussian response has ``"slopes"`` alone.
        progress: whether a bar shows on stderr while models are fitted again.

    Raises:
        InputError: if the model has no residual and no family, its rows were streamed, there are more than
            3,000 rows of which slopes or differences are wanted, or the correction is none of the response's.
        NumericalError: if a further fit has no finite estimate.
        TypeError: if an argument is of another kind.

    Reference:
        Greven and Kneib, Biometrika 97 (2010) 773, theorem 3; Vaida and Blanchard, Biometrika 92
        (2005) 351. Lian, Electronic Journal of Statistics 6 (2012) 1, of counts; Efron, Journal of the
        American Statistical Association 99 (2004) 619, and Saefken, Kneib, van Waveren and Greven,
        Electronic Journal of Statistics 8 (2014) 201, of binary responses; Donohue,
        Overholser, Xu and Vaida, Biometrika 98 (2011) 685, and Wood, Pya and Saefken, Journal of the
        American Statistical Association 111 (2016) 1548, by the information.

    >>> from openreml_nn import lmm
    >>> from openreml_nn.datasets import sleepstudy
    >>> found = conditional_aic(lmm("Reaction ~ Days + (Days | Subject)", sleepstudy()))
    >>> f"{found.log_likelihood:.2f} {found.df:.2f} {found.aic:.2f}"
    '-824.51 31.25 1711.52'
    """
    check_flag("progress", progress)
    if family_of(result) is not None:
        return _of_family(LaplaceRefit(result), correction, progress)
    check_choice("correction", "slopes" if correction is None else correction, ("slopes",))
    refit = Refit(result)
    y, X = refit.y.double(), refit.X.double()
    n = len(y)
    if n > _MOST_ROWS:
        raise InputError(
            f"`result` has {n} rows, of which dense matrices are formed: expected at most {_MOST_ROWS}"
        )
    objective = refit.objective()
    with torch.no_grad():
        curvature = Curvature([objective])
        residual = _residual(result, [term.name for term in objective.terms()], refit)
    at, u = curvature.at, curvature.u
    if at.loose:
        raise InputError(
            f"`result` has {at.loose[0].name!r} estimated outside of its covariances: expected a model "
            "without networks"
        )

    def matrices(x: Tensor) -> tuple[Tensor, Tensor]:
        """V and R."""
        terms = [term.dense() for term in objective.terms(at.natural(0, x))]
        zero = y.new_zeros(n, n)
        return sum(terms, zero), sum((terms[i] for i in residual), zero)

    def value(x: Tensor) -> Tensor:
        return _log_likelihood(matrices(x)[0], y, X, result.method)

    with torch.no_grad():
        V, R = matrices(u)
        P = _projection(V, X)
        p_y = P @ y
        rest = R @ p_y
    inner = (~at.on_boundary(u)).nonzero()[:, 0]
    df = n - float((R * P).sum())
    own = 0
    if len(u):
        dV, dR = jacobian(matrices, u)
        own = int((dR.flatten(1).abs().amax(1) > 0).sum())
        _, H = hessian_of_value(value, u)
        pulled = dV @ p_y  # (m, n)
        moved = pulled @ P @ R - dR @ p_y  # of the fitted values, (m, n)
        information = -H[inner][:, inner]
        along = solve_named(
            information, (pulled @ P)[inner], "the information of the covariance parameters"
        )
        df += float((moved[inner] * along).sum())
    L = cholesky(R, "R")
    white = torch.linalg.solve_triangular(L, rest[:, None], upper=False)
    two_pi = torch.log(torch.tensor(2 * torch.pi, dtype=y.dtype))
    found = float(-(n * two_pi + 2 * L.diagonal().log().sum() + white.square().sum()) / 2)
    return _criterion(found, df + own, "slopes")


def _criterion(log_likelihood: float, df: float, correction: str) -> ConditionalAIC:
    return ConditionalAIC(log_likelihood, df, -2 * log_likelihood + 2 * df, correction)


def _of_family(refit: LaplaceRefit, correction: str | None, progress: bool) -> ConditionalAIC:
    """The criterion of a fit of a family."""
    result, why = refit.result, refuse_differences(refit)
    if correction is None:
        correction = "information" if why else "differences"
    check_choice("correction", correction, ("differences", "information"))
    if correction == "differences":
        if why:
            raise InputError(
                f"`correction` is 'differences' but `result` {why}: expected counts of the family 'poisson' or "
                "binary responses, or correction='information'"
            )
        if result.rows > _MOST_ROWS:
            raise InputError(
                f"`result` has {result.rows} rows, each of which takes a refit: expected at most "
                f"{_MOST_ROWS}, or correction='information'"
            )
        df = degrees_by_differences(refit, progress)
    else:
        df = degrees_by_information(refit)
    with torch.no_grad():
        loss, fit = refit.loss, refit.fit()
        predictor = fit.found(fit.x).predictor
        density = loss.family.log_density(refit.y, predictor)
        weighted = density if refit.weights is None else density * refit.weights
    return _criterion(float(weighted.sum()), df, correction)


def _residual(result: Result, names: list[str], refit: Refit) -> list[int]:
    """Positions of the residual's terms."""
    labelled = {c.name for c in result.components if c.is_residual}
    found = [i for i, name in enumerate(names) if name in labelled]
    found = found or residual_terms(refit.objective().terms())
    if not found:
        raise InputError("`result` is of a model without a residual: expected one that has")
    return found


def _projection(V: Tensor, X: Tensor) -> Tensor:
    """P, (n, n)."""
    inverse = torch.cholesky_inverse(cholesky(V, "V"))
    V_X = inverse @ X
    return inverse - V_X @ solve_named(X.mT @ V_X, V_X.mT, _INFORMATION)


def _log_likelihood(V: Tensor, y: Tensor, X: Tensor, method: str) -> Tensor:
    """The likelihood less its constant, by V."""
    L = cholesky(V, "V")
    white = torch.linalg.solve_triangular(L, torch.cat([X, y[:, None]], 1), upper=False)
    W, z = white[:, :-1], white[:, -1]
    cross = W.mT @ W
    rest = z @ z - (W.mT @ z) @ solve_named(cross, W.mT @ z, _INFORMATION)
    found = 2 * L.diagonal().log().sum() + rest
    return -(found + torch.logdet(cross) if method == "reml" else found) / 2
