"""Mini-batches as a loader yields them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from openreml_nn.lightning.sharing import total
from openreml_nn.model import MixedModel
from openreml_nn.model.batch import Batch, check_keys, responding
from openreml_nn.support.checks import found as described
from openreml_nn.support.errors import InputError
from openreml_nn.support.warning import warn

__all__ = ["Responses", "as_batch", "blamed", "check_response", "concatenated", "row_count"]

_FORM = "a dict with 'x', 'y' and 'groups', or a tuple (x, y, group)"
_HALF = (torch.float16, torch.bfloat16)


def as_batch(batch: Any, model: MixedModel, has_response: bool = True) -> Batch:
    """A batch of :class:`MixedModel` from what a loader yields.

    Args:
        batch: a dict, or a tuple or list (x, y, group); to predict also (x, group). ``group``
            is a dict, a tensor (n,) of one factor's codes, or (n, k) with a column for each
            factor in the order of the model's random effects.
            What it carries under ``extra`` is not the model's, and left out.
        model: whose batch it is.
        has_response: whether there must be y.

    Raises:
        InputError: if it has another form, or a part that the model does not read.

    >>> from torch import nn
    >>> from openreml_nn import RandomEffect
    >>> x, y, g = torch.zeros(3, 2), torch.zeros(3), torch.tensor([[0, 1], [0, 2], [1, 0]])
    >>> model = MixedModel(nn.Linear(2, 1), {"user": RandomEffect(2), "item": RandomEffect(3)})
    >>> as_batch((x, y, g), model)["groups"]["item"]
    tensor([1, 2, 0])
    """
    fields = getattr(batch, "_fields", ())
    if isinstance(batch, tuple) and {"x", "groups"} <= set(fields):
        batch = dict(zip(fields, batch, strict=True))
    if isinstance(batch, tuple | list):
        keys = {3: ("x", "y", "groups"), 2: ("x", "groups")}.get(len(batch))
        if keys is None or (has_response and len(batch) == 2):
            raise InputError(f"it is a {type(batch).__name__} of {len(batch)}: expected {_FORM}")
        batch = dict(zip(keys, batch, strict=True))
    if not isinstance(batch, Mapping):
        raise InputError(f"it is {described(batch)}: expected {_FORM}")
    for key in ("x", "y", "groups") if has_response else ("x", "groups"):
        if key not in batch:
            raise InputError(
                f"it has no {key!r} beside {sorted(map(str, batch))}: expected {_FORM}"
            )
    check_keys(batch)
    model.check(batch)
    none = {key for key, value in batch.items() if value is None} - {"x", "y"}
    found = {key: value for key, value in batch.items() if key not in none | {"extra"}}
    return {**found, "groups": _by_name(batch["groups"], list(model.effects()))}


def _by_name(groups: Any, names: Sequence[str]) -> Mapping[str, Any]:
    if isinstance(groups, Mapping):
        return groups
    if not isinstance(groups, Tensor):
        raise InputError(
            f"its groups are {described(groups)}: expected a dict by factor, or a tensor of codes"
        )
    if groups.dim() == 1 and len(names) == 1:
        return {names[0]: groups}
    if groups.dim() == 2 and groups.shape[1] == len(names):
        return dict(zip(names, groups.unbind(1), strict=True))
    wanted = "(n,)" if len(names) == 1 else f"(n, {len(names)}), a column for each of {names}"
    raise InputError(f"its groups have shape {tuple(groups.shape)}: expected {wanted}, or a dict")


@contextmanager
def blamed(stage: str, index: int) -> Iterator[None]:
    """Name the batch in an error of its input.

    Raises:
        InputError: in the place of any ValueError or TypeError.
    """
    try:
        yield
    except (ValueError, TypeError) as error:
        raise InputError(f"{stage} batch {index}: {error}") from error


class Responses:
    """The training rows that have a response; the others train nothing, and are counted.

    Args:
        has_own: whether each process has rows of its own.
        several: whether a row has several responses, and counts where all are missing.
    """

    def __init__(self, has_own: bool, several: bool) -> None:
        self._has_own, self._several = has_own, several
        self._missing, self._rows, self._is_told = 0, 0, False
        self._index: int | None = None

    def of(self, batch: Batch, index: int) -> Batch:
        """The rows of a batch that have one, which may be none.

        Args:
            batch: the rows.
            index: the batch's in its epoch: an optimizer may ask for its loss more than once, and
                its rows count once.
        """
        kept, rows = responding(batch, self._several)
        if index != self._index:
            if rows is not None:
                self._missing += len(batch["y"]) - len(rows)
            self._rows += row_count(batch["y"])
        self._index = index
        return kept

    def tell(self, is_first: bool, device: torch.device) -> None:
        """Say how many rows of an epoch had none, once in a fit.

        Args:
            is_first: whether this process is the one that speaks.
            device: of the processes' rows.
        """
        missing, rows = self._missing, self._rows
        if self._has_own and not self._is_told:
            missing, rows = total(missing, device), total(rows, device)
        if missing and is_first and not self._is_told:
            warn(
                f"{missing} of {rows} training rows have no response (NaN in `y`): they train "
                "nothing"
            )
        self._missing, self._rows, self._is_told = 0, 0, True
        self._index = None


def row_count(y: Any) -> int:
    """Rows of a response; 1 where it is none, which is refused elsewhere."""
    return len(y) if isinstance(y, Tensor) and y.dim() else 1


def check_response(y: Any, output: Tensor, responses: int = 1) -> None:
    """Refuse a response, or several, that cannot train the rows of a network's output.

    Raises:
        InputError: if it is no tensor (n,), or (n, t), of floating-point numbers in single precision or
            better, or so far from zero that a network in half precision cannot yield it.
    """
    n = len(output)
    shape = (n,) if responses == 1 else (n, responses)
    if not isinstance(y, Tensor) or not y.is_floating_point():
        raise InputError(f"`y` is {described(y)}: expected a floating-point tensor {shape}")
    if y.dtype in _HALF:
        raise InputError(
            f"`y` is {y.dtype}, which rounds it to three digits: use precision='bf16-mixed' or "
            "'16-mixed', which leave the response as it is"
        )
    if y.shape != shape:
        is_column = y.dim() == 2 and responses == 1
        column = "; a column is made a vector by y[:, 0]" if is_column else ""
        raise InputError(f"`y` has shape {tuple(y.shape)}: expected {shape}{column}")
    if output.dtype in _HALF and n > 1:
        rounding, spread = float(y.abs().mean()) * torch.finfo(output.dtype).eps, float(y.std())
        if rounding > spread / 2:
            raise InputError(
                f"the network yields {output.dtype}, which at the size of `y` is rounded by "
                f"{rounding:.2g}, and the standard deviation of `y` is {spread:.2g}: subtract its "
                "mean from `y`, or use precision='32-true'"
            )


def concatenated(batches: list[Any]) -> Any:
    """The rows of all batches, one after the other."""
    first = batches[0]
    if len(batches) == 1:
        return first
    if isinstance(first, Mapping):
        return {key: concatenated([batch[key] for batch in batches]) for key in first}
    if isinstance(first, tuple | list):
        parts = [concatenated(list(part)) for part in zip(*batches, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    return torch.cat(batches)
