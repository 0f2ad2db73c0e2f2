"""Several responses of a row: a row for each of them, as the likelihood takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from openreml_nn.model.batch import (
    Batch,
    check_outputs,
    level_codes,
    level_values,
    part,
    rows_of,
    take,
)
from openreml_nn.model.random_effect import RandomEffect
from openreml_nn.support.checks import check_tensor
from openreml_nn.support.checks import found as described
from openreml_nn.support.errors import InputError
from openreml_nn.support.spectrum import eigenvalues

__all__ = [
    "check_one_level",
    "coded_rows",
    "refuse_copied_columns",
    "refuse_copies",
    "stacked",
    "stacked_output",
]

#: A part this small of a response is rounding.
_EXACT = 1e-11
#: Where the cross-products of columns of length 1 have no smaller eigenvalue, none is rounding of the others.
_SQUARE = 1e-10


def stacked(
    batch: Batch, responses: int, effects: Mapping[str, RandomEffect], is_data: bool, with_x: bool
) -> dict[str, Any]:
    """A batch of n rows with t responses as one of n t rows with one response: all of the first row,
    then all of the second.

    An effect that each response has of its own has the values :math:`e_j \\otimes z` in the row of
    response j; ``batch["residual"]`` are the cells of the rows, so that a residual (t, t) is the
    covariance among the responses of a row.

    Args:
        batch: the rows.
        responses: t.
        effects: the model's random effects by name.
        is_data: whether the rows are of the likelihood, in which levels must be known.
        with_x: whether the network's inputs are needed, row by row.

    Raises:
        TypeError, InputError: if a part has another shape, or a level is not known in data.
    """
    n = rows_of(batch)
    rows = torch.arange(n).repeat_interleave(responses)
    found: dict[str, Any] = {"groups": {}, "values": {}, "residual": torch.arange(len(rows))}
    for name, effect in effects.items():
        codes = level_codes(batch, name, 2**62, n)  # which there are is looked at later
        if codes.dim() == 2:
            raise InputError(
                f"group {name!r} is {described(codes)}: expected one level a row beside {responses} "
                "responses, or a table with a row for each response"
            )
        if is_data and n and int(codes.min()) < 0:
            raise InputError(
                f"group {name!r} has the code -1 in row {int(codes.argmin())}: expected known levels "
                "in rows of the likelihood of several responses"
            )
        found["groups"][name] = codes.repeat_interleave(responses)
        z = level_values(batch, name, effect.effects // effect.responses, (n,))
        if effect.responses > 1:
            z = effect.blup.new_ones(n, 1) if z is None else z
            found["values"][name] = _by_response(z, responses)
        elif z is not None:
            found["values"][name] = z.repeat_interleave(responses, 0)
    for key in ("y", "weights", "offset"):
        value = batch.get(key)
        if value is None:
            continue
        whole = (n, responses) if key == "y" or getattr(value, "dim", int)() == 2 else (n,)
        check_tensor(f"batch['{key}']", value, whole, "floating", False)
        found[key] = value.reshape(-1) if len(whole) == 2 else value.repeat_interleave(responses)
    if places := batch.get("places"):
        found["places"] = {
            name: at.repeat_interleave(responses, 0) if isinstance(at, Tensor) else at
            for name, at in places.items()
        }
    device = found["y"].device if "y" in found else rows.device
    for group in found["groups"].values():
        device = group.device
    found["residual"] = found["residual"].to(device)
    if with_x:
        found["x"] = take(part(batch, "x"), rows)
    return found


def coded_rows(
    effects: Mapping[str, RandomEffect], batch: Batch, n: int
) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Level of each row (n,) of each random effect, and the values (n, k) that its effects have, which
    those of each response share; None for ones.

    Raises:
        TypeError, InputError: as :meth:`RandomEffect.coded`.
    """
    found = {}
    for name, effect in effects.items():
        if effect.responses == 1:
            found[name] = effect.coded(name, batch, n)
            continue
        codes = level_codes(batch, name, effect.levels, n)
        found[name] = codes, level_values(batch, name, effect.effects // effect.responses, (n,))
    return found


def check_one_level(coded: Mapping[str, tuple[Tensor, Tensor | None]]) -> None:
    """Refuse rows of several levels of one factor, which no sums by level are of.

    Raises:
        InputError: naming the factor.
    """
    for name, (codes, _) in coded.items():
        if codes.dim() == 2:
            raise InputError(
                f"group {name!r} has {codes.shape[1]} levels a row, which mini-batches do not sum up: "
                "expected one, or training='full' or 'parts' with all rows in one batch"
            )


def refuse_copies(y: Tensor, X: Tensor, cells: Tensor, names: Sequence[str]) -> None:
    """Refuse responses of which a combination is one of fixed effects: it has no residual, so that the
    likelihood rises without end.

    Args:
        y: (n,) responses, a row for each.
        X: (n, p) fixed effects.
        cells: (n,) the unit of each row times the number t of responses, plus its response.
        names: of the responses.

    Raises:
        InputError: naming them.
    """
    t = len(names)
    order = cells.argsort()
    _, count = torch.unique_consecutive(cells[order] // t, return_counts=True)
    whole = order[(count == t).repeat_interleave(count)]
    Y, of_unit = y[whole].reshape(-1, t), X[whole].reshape(len(whole) // t, -1)
    c = _copied(Y, of_unit, t * X.shape[1])
    if c is None:
        return
    # The rows of that combination, of which the coefficients must be able to take it off.
    own = torch.outer(Y @ c, c / (c @ c)).reshape(-1, 1)
    beta = torch.linalg.lstsq(X[whole], own, driver="gelsd").solution
    if float((own - X[whole] @ beta).norm()) <= 1e3 * _EXACT / float(c.norm()):
        _refuse_copies(
            c * torch.linalg.vector_norm(Y, dim=0), names, "the fixed effects fit exactly"
        )


def refuse_copied_columns(y: Tensor, x: Tensor | None) -> None:
    """Refuse responses as :func:`refuse_copies` does, where each has coefficients of its own.

    Args:
        y: (n, t) responses, NaN where one is missing.
        x: (n, p) features; None for a network, which yields a constant for each at least.

    Raises:
        InputError: naming them.
    """
    whole = ~y.isnan().any(1)
    Y = y[whole].double().cpu()
    of_unit = Y.new_ones(len(Y), 1) if x is None else x[whole].double().cpu()
    rounding = max(_EXACT, 10 * torch.finfo(y.dtype).eps if y.dtype != torch.float64 else 0.0)
    c = _copied(Y, of_unit, of_unit.shape[1], rounding)
    if c is not None:
        names = [f"y[:, {j}]" for j in range(y.shape[1])]
        what = "is a constant" if x is None else "the features fit exactly"
        _refuse_copies(c * torch.linalg.vector_norm(Y, dim=0), names, what)


def _copied(Y: Tensor, of_unit: Tensor, p: int, rounding: float = _EXACT) -> Tensor | None:
    """The combination c (t,) of responses (m, t) that columns of their units (m, ·) leave nothing of;
    None if there is none, or too few units to say so of p coefficients."""
    m, t = Y.shape
    if m <= p + t:
        return None
    # Squares, which are quick, say of most that no column is one of the others.
    every = torch.cat([of_unit, Y], 1)
    size = torch.linalg.vector_norm(every, dim=0)
    squares = every.mT @ every / torch.outer(size, size)
    if bool((size > 0).all()):
        least = float(eigenvalues(squares, "the cross-products of the responses")[0])
        if least > _SQUARE:
            return None
    left = Y - of_unit @ torch.linalg.lstsq(of_unit, Y, driver="gelsd").solution
    scale = torch.linalg.vector_norm(Y, dim=0)
    _, size, directions = torch.linalg.svd(left / scale, full_matrices=False)
    if not bool((scale > 0).all()) or float(size[-1]) > rounding:
        return None
    return directions[-1] / scale


def _refuse_copies(direction: Tensor, names: Sequence[str], what: str) -> None:
    pairs = zip(names, direction.tolist(), strict=True)
    among = ", ".join(repr(name) for name, part in pairs if abs(part) > 1e-6)
    raise InputError(
        f"the responses {among} have a combination that {what}, as where two differ by their means "
        "alone: their covariance is singular, and the likelihood has no maximum; leave one of "
        "them out"
    )


def _by_response(z: Tensor, responses: int) -> Tensor:
    """:math:`e_j \\otimes z_i` for each response j of each row i, (n t, t k), of z (n, k)."""
    own = torch.eye(responses, dtype=z.dtype, device=z.device)
    n, k = z.shape
    whole = own[None, :, :, None] * z[:, None, None, :]
    return whole.reshape(n * responses, responses * k)


def stacked_output(output: Tensor, batch: Batch, responses: int, head: str) -> Tensor:
    """What the network has yielded, as :func:`stacked` has the rows: means (n t,) of (n, t), or
    features (n t, t p) of (n, p), which have coefficients for each response.

    Raises:
        InputError: if it is of another shape, or not finite.
    """
    check_outputs(output, batch)
    if head == "gls":
        return _by_response(output, responses)
    return output.reshape(-1)
