r"""The responses of some rows given the BLUPs, and given coefficients with head ``"gls"``."""

from __future__ import annotations

from collections.abc import Mapping
from math import log, pi

import torch
from torch import Tensor

from openreml_nn.covariance import Matrix
from openreml_nn.lightning.sums import refuse_weights_of_responses
from openreml_nn.likelihood.problem import cholesky
from openreml_nn.model import MixedModel, RandomEffect
from openreml_nn.model.batch import Batch, adjusted, row_values
from openreml_nn.model.random_effect import Coded
from openreml_nn.model.residual import structure_of
from openreml_nn.model.several import check_one_level, coded_rows
from openreml_nn.terms.design import IndexedDesign

__all__ = ["deviance", "is_uneven"]


def deviance(
    model: MixedModel, batch: Batch, output: Tensor, handed: Mapping[str, Tensor]
) -> tuple[Tensor, int]:
    r""":math:`-2 \log` of the density of the responses given the BLUPs, and of how many responses.

    Where a network yields features, residual variances or values of random effects, it is the
    expectation over the effects given the data: with the variance of what BLUPs and coefficients
    explain. It is computed in the wider of the precisions of response and network.

    Args:
        model: with BLUPs.
        batch: the rows.
        output: what the network has yielded for them.
        handed: by random effect what is taken off all BLUPs of it (k,).
    """
    n, t = len(output), model.responses
    y = adjusted(batch, n, t)
    wide = torch.promote_types(y.dtype, output.dtype)
    y, mean = y.to(wide), output.to(wide)
    effects = model.effects()
    coded = coded_rows(effects, batch, n)
    check_one_level(coded)
    X = mean if model.head == "gls" else None
    e = y - (mean if X is None else X @ model.beta.to(X))
    e = _unexplained(effects, coded, e, handed)
    # With ML coefficients are no random variables.
    uneven = is_uneven(model) or (X is not None and model.method == "reml")
    with torch.set_grad_enabled(uneven and torch.is_grad_enabled()):
        R = _residual(model, batch, e)
        unknown = _unknown(effects, coded, t)
        R = R if unknown is None else R + unknown.to(e)
    return _square(e, R, _spread(model, coded, X).to(e) if uneven else None)


def _unexplained(
    effects: Mapping[str, RandomEffect], coded: Coded, e: Tensor, handed: Mapping[str, Tensor]
) -> Tensor:
    """Residuals less what the BLUPs explain, (n,) or (n, t)."""
    for name, effect in effects.items():
        codes, values = coded[name]
        absent = _absent(codes)
        b = effect.blup[codes if absent is None else codes.clamp(min=0)]
        if name in handed:
            b = b - handed[name].to(b)
        b = b.unflatten(1, (effect.responses, -1))  # (n, t or 1, k)
        part = b[..., 0] if values is None else (values.to(b)[:, None] * b).sum(2)
        part = part if absent is None else part.masked_fill(absent[:, None], 0)
        e = e - (part[:, 0] if e.dim() == 1 else part).to(e)
    return e


def _absent(codes: Tensor) -> Tensor | None:
    """Which rows are of no known level; None where there is none."""
    return codes < 0 if len(codes) and int(codes.min()) < 0 else None


def is_uneven(model: MixedModel) -> bool:
    """Whether a network yields the residuals' variances or values of random effects."""
    learned = any(effect.features is not None for effect in model.effects().values())
    return learned or not isinstance(model.residual, Matrix)


def _residual(model: MixedModel, batch: Batch, like: Tensor) -> Tensor:
    """Variances of the residuals of the rows (n,), or their covariances (n or 1, t, t)."""
    n, t = len(like), model.responses
    if t == 1:
        return structure_of(model.residual).variances(batch, n).to(like)
    R = model.residual().to(like)
    R = R * torch.eye(t).to(R) if R.shape == (1, 1) else R
    refuse_weights_of_responses(batch, n)
    weights = row_values(batch, "weights", n, positive=True)
    return R[None] if weights is None else R / weights.to(R)[:, None, None]


def _square(e: Tensor, R: Tensor, spread: Tensor | None) -> tuple[Tensor, int]:
    r""":math:`\sum_i e_i^\top R_i^{-1} e_i + \log|2\pi R_i|`, for e (n,) or (n, t) in which NaN is
    left out, with the responses that were counted.

    Args:
        e: what is left of the responses.
        R: their variances (n,), or covariances (n or 1, t, t).
        spread: variance of what the BLUPs and coefficients explain, given the data (n,).
    """
    if e.dim() == 1:
        square = e @ (e / R) + R.log().sum() + len(e) * log(2 * pi)
        return (square if spread is None else square + (spread / R).sum()), len(e)
    there = ~e.isnan()
    count = int(there.sum())
    if count < e.numel():
        e = torch.where(there, e, 0)
        both = there[:, :, None] & there[:, None, :]
        R = torch.where(both, R, torch.eye(e.shape[1]).to(R))
    L = cholesky(R, "R")
    white = torch.linalg.solve_triangular(L.expand(len(e), -1, -1), e[:, :, None], upper=False)
    log_det = 2 * L.diagonal(dim1=1, dim2=2).log().sum() * (len(e) / len(L))
    return white.square().sum() + log_det + count * log(2 * pi), count


def _spread(model: MixedModel, coded: Coded, X: Tensor | None) -> Tensor:
    """Variance of what the BLUPs, and with head ``"gls"`` coefficients, explain, given the data (n,);
    zero before there were any."""
    effects = model.effects()
    like = model.beta_covariance
    n = len(next(iter(coded.values()))[0]) if X is None else len(X)
    if not bool(model.joint.is_known):
        return like.new_zeros(n)
    designs = [
        IndexedDesign(codes, like.new_ones(n, 1) if z is None else z.to(like), effects[name].levels)
        for name, (codes, z) in coded.items()
    ]
    rows = like.new_zeros(n, 0) if X is None else X.to(like)
    if model.joint.has_variances():  # and they are differentiable
        return model.joint.variance(designs, rows)
    found = torch.einsum("np,pq,nq->n", rows, model.beta_covariance, rows)
    for effect, design in zip(effects.values(), designs, strict=True):
        z, own = design.values, effect.variance[design.codes]
        found = found + torch.einsum("nk,nkl,nl->n", z, own, z)
    return found


def _unknown(effects: Mapping[str, RandomEffect], coded: Coded, t: int) -> Tensor | None:
    """Prior variance of the effects of levels that are not known, (n,), or of several responses (n,
    t, t); None where all are known."""
    found: Tensor | None = None
    for name, effect in effects.items():
        codes, values = coded[name]
        absent = _absent(codes)
        if absent is not None:
            prior = effect.prior_in_basis().detach()
            r, k = effect.responses, effect.effects // effect.responses
            z = prior.new_ones(len(codes), 1) if values is None else values.to(prior)
            own = torch.einsum("nk,jkli,ni->njl", z, prior.reshape(r, k, r, k), z)
            own = own * absent[:, None, None]
            own = own[:, 0, 0] if t == 1 else own.expand(-1, t, t)
            found = own if found is None else found + own
    return found
