"""Gaussian responses and those of a family: what a likelihood takes of a batch, and what it yields."""

from __future__ import annotations

import torch
from torch import Tensor

from openreml_nn.covariance import Matrix
from openreml_nn.families import Family
from openreml_nn.likelihood import LaplaceLoss, REMLLoss
from openreml_nn.likelihood.effects import Coefficients
from openreml_nn.likelihood.laplace_evaluation import LaplaceEvaluation
from openreml_nn.model.batch import Batch, check_outputs, part, row_values
from openreml_nn.model.posterior import Posterior
from openreml_nn.model.seen import SeenRows
from openreml_nn.result.equations import FixedBasis
from openreml_nn.support.checks import check_tensor
from openreml_nn.support.errors import InputError

__all__ = ["of_family", "of_gaussian", "remember_family", "remember_gaussian", "remember_modes"]


def of_gaussian(output: Tensor, batch: Batch, head: str) -> tuple[Tensor, Tensor]:
    """y (n,) without the offset, and X (n, p); with head ``"ml"`` y without the mean, and no X.

    Raises:
        TypeError: if a part is no tensor of floating-point numbers.
        InputError: if a part is missing, or shapes or precisions do not fit.
    """
    y = part(batch, "y")
    check_tensor("output", output, ("n", "p")[: 2 if head == "gls" else 1], "floating", False)
    n = output.shape[0]
    _check_rows(n)
    check_tensor("y", y, kind="floating", finite=False)
    if y.dim() != 1 or y.shape[0] != n:
        raise InputError(
            f"`y` has shape {tuple(y.shape)} but `mean` yields {n} rows: expected ({n},); "
            "a column is made a vector by y[:, 0], and several are for a model with responses="
        )
    if y.dtype != output.dtype:
        dtype = torch.promote_types(y.dtype, output.dtype)
        if dtype != y.dtype and y.dtype.itemsize < 4:
            raise InputError(
                f"`y` is {y.dtype} but `mean` yields {output.dtype}: make y as precise, by y.to({dtype})"
            )
        y, output = y.to(dtype), output.to(dtype)  # the wider holds all digits of both
    offset = row_values(batch, "offset", n)
    if offset is not None:
        y = y - offset.to(y)
    if head == "gls":
        return y, output
    return y - output, output.new_zeros(n, 0)


def of_family(
    family: Family | None, output: Tensor, batch: Batch, head: str
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """y with the family's inputs, the known part of the linear predictor (n,), X (n, p) with head ``"gls"``,
    and weights (n,) where the batch has some; proportions with their trials become counts.

    Raises:
        InputError: if a part is missing, or a number is not finite.
    """
    assert family is not None
    y, n = family.with_inputs(part(batch, "y"), batch.get("zi")), len(output)
    weights = row_values(batch, "weights", n, positive=True)
    _check_rows(n)
    check_outputs(output, batch)
    offset = row_values(batch, "offset", n)
    known = output.new_zeros(n) if offset is None else offset.to(output)
    if weights is not None:
        y, weights = family.with_weights(y, weights)
    if head == "gls":
        return y, known, output, weights
    return y, known + output, None, weights


def remember_gaussian(model: Posterior, loss: REMLLoss, y: Tensor, X: Tensor) -> None:
    """BLUPs and coefficients at the present parameters, with their variances."""
    objective = loss.objective(y, X)
    evaluation, fixed = objective.evaluate(), objective.problem.fixed
    model.remember(evaluation.random, evaluation.fixed, fixed.aliases)
    model.remember_errors(
        loss.covariance,
        lambda: (torch.cat([fixed.Q, fixed.y[:, None]], 1), FixedBasis.of(fixed)),
        len(fixed.T),
        fixed.y.dtype,
    )


def remember_family(
    model: Posterior,
    loss: LaplaceLoss,
    y: Tensor,
    known: Tensor,
    X: Tensor | None,
    weights: Tensor | None,
) -> None:
    """Modes and coefficients at the present parameters, with their conditional variances."""
    found = loss.evaluate(y, known, X, weights=weights)
    options = loss.method, loss.quadrature, loss.solver
    p = 0 if X is None else X.shape[1]
    data = y, known, X, weights
    seen = SeenRows.of(options, range(p), loss.covariance, model.effects(), data)
    remember_modes(model, found, loss.covariance, seen, found.coefficients.new_zeros(p, 0))


def remember_modes(
    model: Posterior, found: LaplaceEvaluation, covariance: Matrix, seen: SeenRows, aliases: Tensor
) -> None:
    """Modes and coefficients of rows, which the model keeps.

    Args:
        model: takes them up.
        found: the likelihood of the rows.
        covariance: of the rows.
        seen: the rows.
        aliases: (p, d) null space of their X.
    """
    fixed = Coefficients(found.coefficients, found.coefficient_covariance, seen.columns)
    model.remember(found.random, fixed, aliases)
    X = seen.X.to(found.coefficients)
    basis = FixedBasis(torch.eye(X.shape[1]).to(X)[:, list(seen.columns)], X.new_zeros(X.shape[1]))
    model.remember_errors(
        covariance,
        lambda: (X[:, list(seen.columns)], basis),
        len(seen.columns),
        X.dtype,
        found.residual,
    )
    model.seen = seen


def _check_rows(n: int) -> None:
    if not n:
        raise InputError("the batch is empty: drop it, or use drop_last=True")
