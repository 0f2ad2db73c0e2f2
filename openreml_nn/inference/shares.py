"""Shares of variance: R² and intraclass correlations."""

from __future__ import annotations

from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

from openreml_nn.estimation import Result
from openreml_nn.estimation.curvature import Curvature
from openreml_nn.estimation.derivatives import jacobian
from openreml_nn.inference.refit import Refit
from openreml_nn.metrics import conditional_r2, marginal_r2
from openreml_nn.result import Component
from openreml_nn.terms.base import Covariance
from openreml_nn.terms.covariance import DiagonalCovariance, KroneckerCovariance, ScaledCovariance
from openreml_nn.terms.design import IdentityDesign, IndexedDesign
from openreml_nn.terms.term import Term

__all__ = ["R2", "r2", "variance_shares"]


class R2(NamedTuple):
    """Shares of the variance that the fixed effects explain, and these with the random ones."""

    marginal: float
    conditional: float


def r2(result: Result) -> R2:
    r"""Marginal and conditional :math:`R^2` of a fit, random slopes included.

    Correlated residuals, such as a field beside independent errors, are residual variance.

    Raises:
        InputError: if the rows were streamed.

    Reference:
        Nakagawa and Schielzeth, Methods in Ecology and Evolution 4 (2013) 133, eqs. 26 and 30;
        Johnson, ibid. 5 (2014) 944, eq. 10.

    >>> from openreml_nn import lmm
    >>> from openreml_nn.datasets import sleepstudy
    >>> found = r2(lmm("Reaction ~ Days + (Days | Subject)", sleepstudy()))
    >>> f"{found.marginal:.4f} {found.conditional:.4f}"
    '0.2787 0.7992'
    """
    refit = Refit(result)
    mean = refit.X @ result.fixed.estimate
    with torch.no_grad():
        variances = _row_variances(refit.objective().terms())
    zero = mean.new_zeros(())
    is_residual = [_is_residual(result, component) for component in result.components]
    residual = sum((v for v, of in zip(variances, is_residual, strict=True) if of), zero)
    total = sum((v for v, of in zip(variances, is_residual, strict=True) if not of), zero)
    return R2(
        float(marginal_r2(mean, total, residual)), float(conditional_r2(mean, total, residual))
    )


def variance_shares(result: Result) -> pd.DataFrame:
    r"""Share of each term in the variance of a row, :math:`v_t / \sum_s v_s`.

    :math:`v_t` is the mean over the rows of :math:`z_i^\top G_t z_i`: for a random intercept its
    variance, so that the share is the intraclass correlation; for an additive genetic effect the
    share is the heritability. Standard errors are by the delta method; that of a variance of zero
    is NaN.

    Returns:
        group, variance, share, std_error; the residual last.

    Raises:
        InputError: if the rows were streamed.

    Reference:
        Lynch and Walsh, Genetics and Analysis of Quantitative Traits (1998), appendix 1.

    >>> from openreml_nn import lmm
    >>> from openreml_nn.datasets import penicillin
    >>> result = lmm("diameter ~ 1 + (1 | plate) + (1 | sample)", penicillin())
    >>> variance_shares(result).round(3)
          group  variance  share  std_error
    0     plate     0.717  0.151      0.085
    1    sample     3.731  0.785      0.113
    2  Residual     0.302  0.064      0.033
    """
    objective = Refit(result).objective()
    curvature = Curvature([objective])
    at, u = curvature.at, curvature.u

    def variances(x: Tensor) -> tuple[Tensor]:
        return (torch.stack(_row_variances(objective.terms(at.natural(0, x)))),)

    with torch.no_grad():
        (value,) = variances(u)
    slope = jacobian(variances, u)[0].mT if len(u) else value.new_zeros(len(value), 0)
    # A coordinate at zero has neither information nor a slope.
    scale = curvature.information.diagonal().sqrt()
    scale = torch.where(scale > 0, scale, 1)
    information = curvature.information / (scale[:, None] * scale)
    slope = slope / scale
    spread = slope @ torch.linalg.pinv(information, hermitian=True, rtol=1e-10) @ slope.mT
    total = value.sum()
    by = (torch.eye(len(value), dtype=value.dtype) - value[:, None] / total) / total
    error = (by @ spread @ by.mT).diagonal().clamp(min=0).sqrt()
    # Nor has one of which the design is estimated too a standard error by this.
    error = torch.where((value > 0) & (not objective.moves), error, torch.nan)
    groups = [c.group for c in result.components]
    columns = {"variance": value, "share": value / total, "std_error": error}
    table = {name: column.numpy(force=True) for name, column in columns.items()}
    return pd.DataFrame({"group": groups, **table})


def _is_residual(result: Result, component: Component) -> bool:
    """Whether a term is of the residual, as a field is beside which stand independent errors."""
    is_field = result.model is not None and component.name == "residual"
    return component.is_residual or is_field


def _row_variances(terms: list[Term]) -> list[Tensor]:
    """Mean over the rows of each term's variance."""
    return [_row_variance(term) for term in terms]


def _row_variance(term: Term) -> Tensor:
    z, G = term.design, term.covariance
    if isinstance(z, IdentityDesign):
        blocks, codes, values = _blocks(G, 1), torch.arange(z.shape[0]), None
    elif isinstance(z, IndexedDesign):
        blocks, codes, values = _blocks(G, z.effects), z.codes, z.values
    else:
        Z = z.dense(G.matrix)
        return (Z * G.multiply(Z.mT).mT).sum(1).mean()
    if values is None and len(blocks) == 1:
        return blocks.reshape(())
    block = blocks[codes.to(blocks.device) % len(blocks)]
    values = block.new_ones(len(block), 1) if values is None else values.to(block)
    return (values[:, None] @ block @ values[..., None]).mean()


def _blocks(G: Covariance, effects: int) -> Tensor:
    """Covariances of the effects of a level, (m, k, k), those of level i at i modulo m."""
    if isinstance(G, ScaledCovariance | KroneckerCovariance):
        # As tables show it: a variance component, whatever the inbreeding of the animals.
        return G.shown()[None]
    if isinstance(G, DiagonalCovariance):
        return G.matrix.reshape(-1, effects).diag_embed()
    square = G.matrix.unflatten(1, (-1, effects)).unflatten(0, (-1, effects))  # (m, k, m, k)
    return square.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
