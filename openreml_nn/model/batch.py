"""Batches of a mixed model: what each part must be, and some of their rows."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, overload

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from openreml_nn.support.checks import check_instance, check_mapping, check_tensor, is_finite
from openreml_nn.support.checks import found as described
from openreml_nn.support.errors import InputError
from openreml_nn.support.warning import warn

__all__ = [
    "KEYS",
    "Batch",
    "adjusted",
    "by_effect",
    "check_finite",
    "check_inputs",
    "check_keys",
    "check_outputs",
    "check_values",
    "level_codes",
    "level_places",
    "level_values",
    "named_tensors",
    "part",
    "responding",
    "row_values",
    "rows_of",
    "split",
    "take",
    "with_responses",
]

Batch = Mapping[str, Any]

#: What a batch holds of each row.
_OF_ROWS = (
    "x", "y", "groups", "values", "weights", "offset", "residual", "covariate", "places", "zi"
)  # fmt: skip
#: What a batch may hold, see :class:`MixedModel`.
KEYS = (*_OF_ROWS, "extra")
_KNOWN = frozenset(KEYS)


def check_keys(batch: Batch) -> None:
    """Refuse, by an :class:`InputError`, a key that nothing reads, such as one that is misspelt."""
    if not batch.keys() <= _KNOWN:
        unknown = ", ".join(sorted(repr(key) for key in batch.keys() - _KNOWN))
        raise InputError(
            f"`batch` has {unknown}: expected no other keys than {', '.join(KEYS)}; the key "
            "'extra' is for anything else, such as an index"
        )


def part(batch: Batch, key: str) -> Any:
    """A part of a batch that must be there.

    Raises:
        InputError: if it is not.
        TypeError: if the batch is no dict.
    """
    if type(batch) is not dict and not isinstance(batch, Mapping):
        raise TypeError(
            f"`batch` is {described(batch)}: expected a dict with 'x', 'y' and 'groups'"
        )
    check_keys(batch)
    if key not in batch:
        raise InputError(f"`batch` has no {key!r}: expected it beside {list(map(str, batch))}")
    return batch[key]


def check_inputs(x: Any) -> None:
    """Refuse what no network takes; one may have inputs of a class of its own.

    Raises:
        TypeError: if it is no tensor, and no tuple, list or dict of them.
        InputError: if a tensor holds no values.
    """
    if isinstance(x, Mapping | tuple | list) and len(x):
        for item in x.values() if isinstance(x, Mapping) else x:
            check_inputs(item)
        return
    kinds = Mapping | tuple | list | np.ndarray | pd.DataFrame | str | bytes | complex | float | int
    if x is None or isinstance(x, kinds | type):
        raise TypeError(
            f"`batch['x']` is {described(x)}: expected a tensor, or a tuple, list or dict of them"
        )
    if isinstance(x, Tensor) and x.is_meta:
        raise InputError(f"`batch['x']` is {described(x)}, which holds no values: expected some")


def check_finite(name: str, values: Tensor, expected: str = "finite numbers") -> None:
    """Refuse numbers (n, ...) that are not finite, by the row of the first.

    Raises:
        InputError: if there is one.
    """
    if not is_finite(values):
        at = (~torch.isfinite(values)).nonzero()[0]
        value, row = float(values[tuple(at)]), int(at[0]) if len(at) else 0
        raise InputError(f"`{name}` is {value:g} in row {row}: expected {expected}")


def check_outputs(output: Tensor, batch: Batch) -> None:
    """Refuse what a network has yielded for a batch if it is not finite, by the row, and by the
    batch's ``x`` where that is the cause.

    Raises:
        InputError: if a number is not finite.
    """
    if is_finite(output):
        return
    row = int((~torch.isfinite(output.detach())).nonzero()[0, 0])
    for name, x in named_tensors("batch['x']", batch.get("x")):
        if x.is_floating_point() and x.dim() and len(x) == len(output):
            check_finite(name, x, "finite numbers, as the network's output there is not finite")
    raise InputError(
        f"the network's output is not finite in row {row}: lower the learning rate, clip gradients "
        "or look for large numbers in `batch['x']`; expected finite numbers"
    )


def named_tensors(name: str, x: Any) -> list[tuple[str, Tensor]]:
    """The tensors of a part of a batch, such as a network's inputs, each with its name."""
    if isinstance(x, Tensor):
        return [(name, x)]
    if isinstance(x, Mapping):
        return [pair for key, item in x.items() for pair in named_tensors(f"{name}[{key!r}]", item)]
    if isinstance(x, tuple | list):
        return [pair for i, item in enumerate(x) for pair in named_tensors(f"{name}[{i}]", item)]
    return []


def responding(batch: Batch, several: bool = False) -> tuple[Batch, Tensor | None]:
    """The rows of a batch that have a response, with which they are; None if all have one.

    A row without a response has NaN in ``y``: in any of its columns, such as successes and
    failures; where these are ``several`` responses, in all.

    Raises:
        InputError: if a response is infinite, or the batch has not as many rows of something else.
    """
    y = part(batch, "y")
    if not isinstance(y, Tensor) or not y.is_floating_point() or not y.dim() or y.is_meta:
        return batch, None  # what takes the response refuses it
    y = y.detach()
    if is_finite(y):
        return batch, None
    columns = y.isnan().reshape(len(y), -1)
    missing = columns.all(1) if several else columns.any(1)
    check_finite(
        "batch['y']",
        torch.where(y.isnan(), 0, y),
        "finite numbers, or NaN for a row without a response",
    )
    if not bool(missing.any()):
        return batch, None
    rows, n = (~missing).nonzero()[:, 0], len(y)
    return {key: _some(batch, key, rows, n) for key in batch}, rows


@overload
def with_responses(
    batch: Batch, output: None = None, several: bool = False
) -> tuple[Batch, None]: ...
@overload
def with_responses(batch: Batch, output: Tensor, several: bool = False) -> tuple[Batch, Tensor]: ...
@overload
def with_responses(
    batch: Batch, output: Tensor | None, several: bool = False
) -> tuple[Batch, Tensor | None]: ...
def with_responses(
    batch: Batch, output: Tensor | None = None, several: bool = False
) -> tuple[Batch, Tensor | None]:
    """The rows of a batch that have a response, and of what the network has yielded for it; the
    others are counted in a warning.

    Raises:
        InputError: as :func:`responding`, or if no row has a response.
    """
    own, rows = responding(batch, several)
    if rows is None:
        return batch, output
    n = len(batch["y"])
    if output is not None and len(output) != n:
        raise InputError(f"`output` has {len(output)} rows but `batch['y']` {n}: expected as many")
    if not len(rows):
        raise InputError(
            f"`batch['y']` is NaN in all {n} rows: expected a response in one at least"
        )
    warn(
        f"{n - len(rows)} of {n} rows have no response (NaN in `batch['y']`): they add nothing to "
        "the likelihood"
    )
    return own, None if output is None else output[rows]


def _some(batch: Batch, key: str, rows: Tensor, n: int) -> Any:
    """Some of n rows of a part of a batch."""
    value = batch[key]
    if key not in _OF_ROWS or value is None:
        return value
    for name, x in named_tensors(f"batch[{key!r}]", value):
        if not x.dim() or len(x) != n:
            raise InputError(f"`{name}` is {described(x)}: expected {n} rows, as `batch['y']` has")
    try:
        return take(value, rows)
    except (TypeError, KeyError, IndexError, RuntimeError) as error:
        raise InputError(
            f"`batch[{key!r}]` is {described(value)}, of which no rows can be taken: expected what "
            f"[rows] works on, because `batch['y']` is NaN in {n - len(rows)} of {n} rows"
        ) from error


def rows_of(batch: Batch) -> int:
    """How many rows a batch has, by what it holds of each.

    Raises:
        InputError: if it holds nothing of that kind.
    """
    groups = part(batch, "groups")
    check_mapping("batch['groups']", groups, Tensor)
    known = [batch.get(key) for key in ("y", "residual", "covariate", "weights", "offset", "x")]
    for x in (*groups.values(), *known):
        if isinstance(x, Tensor) and x.dim():
            return len(x)
    raise InputError("the batch has nothing of rows: expected 'y', or codes in 'groups'")


def row_values(batch: Batch, key: str, n: int, positive: bool = False) -> Tensor | None:
    """A number for each row (n,) that a batch may have, such as ``offset``; None without it.

    Raises:
        TypeError: if it is no tensor of floating-point numbers.
        InputError: if its shape is another, or a number is not finite, or not positive where it
            must be.
    """
    found = batch.get(key)
    if found is None:
        return None
    name = f"batch['{key}']"
    check_tensor(name, found, (n,), "floating", False)
    check_finite(name, found)
    if positive and n and not bool((found > 0).all()):
        row = int((found <= 0).nonzero()[0])
        raise InputError(f"`{name}` is {float(found[row]):g} in row {row}: expected above 0")
    return found


def adjusted(batch: Batch, n: int, responses: int = 1) -> Tensor:
    """The response less the offset, (n,) or (n, t).

    Raises:
        TypeError, InputError: if the offset is of another shape or kind.
    """
    y: Tensor = part(batch, "y")
    given = batch.get("offset")
    if responses > 1 and isinstance(given, Tensor) and given.dim() == 2:
        check_tensor("batch['offset']", given, (n, responses), "floating")
        return y - given.to(y)
    offset = row_values(batch, "offset", n)
    return y if offset is None else y - offset.to(y).reshape(n, *[1] * (y.dim() - 1))


def level_codes(batch: Batch, name: str, levels: int, n: int) -> Tensor:
    """Level of each row (n,) of a random effect, or m levels each (n, m), -1 where it is not known, as
    integers of 64 bits: torch indexes by few others, and takes those of ``uint8`` for a mask.

    Raises:
        TypeError, InputError: if they are not there, not integers of n rows, or out of range.
    """
    groups = part(batch, "groups")
    check_mapping("batch['groups']", groups)
    if name not in groups:
        raise InputError(
            f"the batch has no group {name!r}: expected batch['groups'][{name!r}] with the "
            f"level codes; it has {sorted(groups)}"
        )
    codes = groups[name]
    check_instance(f"batch['groups'][{name!r}]", codes, Tensor, f"a tensor of {n} integers")
    several = codes.dim() == 2 and len(codes) == n and codes.shape[1] > 0
    numbers = codes.is_floating_point() or codes.is_complex()
    if not (codes.shape == (n,) or several) or numbers or codes.is_meta:
        raise InputError(f"group {name!r} is {described(codes)}: expected {n} integers")
    if codes.dtype == torch.bool:
        raise TypeError(f"group {name!r} is {described(codes)}: expected {n} integers")
    codes = codes.long()
    if codes.numel():
        least, most = (int(x) for x in codes.aminmax())
        if least < -1 or most >= levels:
            raise InputError(
                f"group {name!r} has the code {most if most >= levels else least}: expected 0 to "
                f"{levels - 1}, or -1 for a level that is not known"
            )
    return codes


def by_effect(batch: Batch, key: str) -> Mapping[str, Any]:
    """What a batch holds for some random effects, by their names; None is nothing.

    Raises:
        TypeError: if it is no dict.
    """
    given = batch.get(key)
    if given is None:
        return {}
    check_mapping(f"batch['{key}']", given)
    return given


def check_values(batch: Batch, names: Collection[str]) -> None:
    """Refuse values of effects, or places of levels, of another name than the random effects have.

    Raises:
        TypeError: if one of these is no dict.
        InputError: naming it.
    """
    for key in ("values", "places"):
        given = by_effect(batch, key)
        for name in given:
            if name not in names:
                raise InputError(f"batch['{key}'] has {name!r}: the effects are {list(names)}")


def level_values(batch: Batch, name: str, effects: int, rows: Sequence[int]) -> Tensor | None:
    """Values of the effects of a random effect (n, k), or (n, m, k) of rows of m levels each; None for
    an intercept.

    Args:
        batch, name: the batch, and the name of the random effect.
        effects: k.
        rows: the shape of its codes, (n,) or (n, m).

    Raises:
        TypeError, InputError: if they are not there, or of another shape or kind.
    """
    values = by_effect(batch, "values").get(name)
    if values is None:
        if effects > 1:
            raise InputError(
                f"random effect {name!r} has {effects} effects: expected their values as "
                f"batch['values'][{name!r}], {(*rows, effects)}"
            )
        return None
    check_instance(f"batch['values'][{name!r}]", values, Tensor, "a tensor")
    if values.shape != (*rows, effects):
        raise InputError(
            f"values of {name!r} have shape {tuple(values.shape)}: expected {(*rows, effects)}"
        )
    check_tensor(f"batch['values'][{name!r}]", values, finite=False)
    check_finite(f"batch['values'][{name!r}]", values)
    return values


def level_places(batch: Batch, name: str, places: Tensor | None, n: int) -> Tensor | None:
    """Coordinates of the rows (n, d) of a random effect whose levels are at places; None where the
    batch, or the levels, have none.

    Raises:
        TypeError, InputError: if they are of another shape or kind.
    """
    found = by_effect(batch, "places").get(name)
    if found is None or places is None:
        return None
    what = f"batch['places'][{name!r}]"
    check_tensor(what, found, (n, places.shape[1]), "real", False)
    check_finite(what, found)
    return found


def take(x: Any, rows: slice | Tensor) -> Any:
    """Some ``rows``, a slice or positions (m,), of a tensor, or of each in a tuple, list or dict.

    >>> take({"age": torch.tensor([30, 40, 50])}, slice(1, 3))
    {'age': tensor([40, 50])}
    """
    if isinstance(x, Mapping):
        return {key: take(value, rows) for key, value in x.items()}
    if isinstance(x, tuple | list):
        parts = [take(value, rows) for value in x]
        return type(x)(*parts) if hasattr(x, "_fields") else type(x)(parts)
    return x[rows]


def split(x: Any, rows: int) -> list[Any]:
    """Some rows at a time."""
    first = x
    while not isinstance(first, Tensor):
        first = next(iter(first.values() if isinstance(first, Mapping) else first))
    return [take(x, slice(i, i + rows)) for i in range(0, max(len(first), 1), rows)]
