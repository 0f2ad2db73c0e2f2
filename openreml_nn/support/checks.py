"""Checks of arguments: each refuses in one line that names the argument, what was found and what
was expected."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from math import isfinite
from numbers import Integral, Real
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from openreml_nn.support.errors import InputError

__all__ = [
    "check_choice",
    "check_constant",
    "check_count",
    "check_flag",
    "check_instance",
    "check_labels",
    "check_maker",
    "check_mapping",
    "check_names",
    "check_number",
    "check_symmetric",
    "check_table",
    "check_tensor",
    "check_text",
    "found",
    "is_finite",
    "refuse_tracing",
]


def found(value: object) -> str:
    """What an argument was, in a few words.

    >>> found(torch.zeros(2, 3))
    'a torch.float32 tensor of shape (2, 3)'
    >>> found("yes")
    "'yes'"
    """
    if isinstance(value, Tensor):
        where = "" if value.device.type == "cpu" else f" on {value.device}"
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}{where}"
    if value is None or isinstance(value, str | bool | Real | list | tuple | dict):
        text = " ".join(repr(value).split())
        return text if len(text) <= 60 else f"{text[:57]}..."
    if isinstance(value, type):
        return f"the class {value.__name__}"
    shape = getattr(value, "shape", None)
    size = f" of shape {shape}" if isinstance(shape, tuple) else ""
    return f"a {type(value).__name__}{size}"


def check_instance(
    name: str, value: object, kinds: type | tuple[type, ...], expected: str | None = None
) -> None:
    """Refuse a value of another class.

    Args:
        name: of the argument.
        value: what was given.
        kinds: the classes that are taken.
        expected: what to call them; their names by default.

    Raises:
        TypeError: if the value is of none of them.
    """
    if not isinstance(value, kinds):
        classes = kinds if isinstance(kinds, tuple) else (kinds,)
        expected = expected or "a " + " or a ".join(kind.__name__ for kind in classes)
        raise TypeError(f"`{name}` is {found(value)}: expected {expected}")


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Refuse a word that is not one of ``choices``.

    Raises:
        InputError: if it is not.
    """
    if not isinstance(value, str) or value not in choices:
        words = [repr(choice) for choice in choices]
        last = f" or {words[-1]}" if len(words) > 1 else words[-1]
        raise InputError(f"`{name}` is {found(value)}: expected {', '.join(words[:-1])}{last}")


def refuse_tracing(what: str) -> None:
    """Refuse ``torch.jit.trace``, which cannot hold a custom function.

    Raises:
        InputError: naming what was traced.
    """
    if torch._C._get_tracing_state() is not None:
        raise InputError(
            f"{what} cannot be traced by torch.jit.trace: expected a covariance or a network, and "
            "exported(model, batch) for predictions"
        )


def check_flag(name: str, value: object) -> bool:
    """The True or False that was given, Python's or NumPy's.

    Raises:
        TypeError: if it is something else.
    """
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"`{name}` is {found(value)}: expected True or False")
    return bool(value)


def check_count(name: str, value: object, least: int = 0) -> int:
    """The whole number that was given, Python's or NumPy's.

    Raises:
        TypeError: if it is no whole number.
        InputError: if it is less than ``least``.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"`{name}` is {found(value)}: expected a whole number, {least} or more")
    if value < least:
        raise InputError(f"`{name}` is {value}: expected a whole number, {least} or more")
    return int(value)


def check_number(
    name: str,
    value: object,
    above: float | None = None,
    below: float | None = None,
    least: float | None = None,
) -> float:
    """The finite number that was given.

    Args:
        name: of the argument.
        value: what was given.
        above, below: bounds that it must not reach.
        least: the smallest that is taken.

    Raises:
        TypeError: if it is no number.
        InputError: if it is not finite or out of bounds.
    """
    bounds = [
        text
        for text, bound in (
            (f"of at least {least}", least),
            (f"above {above}", above),
            (f"below {below}", below),
        )
        if bound is not None
    ]
    expected = " ".join(["a number", " and ".join(bounds)]).strip()
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"`{name}` is {found(value)}: expected {expected}")
    number = float(value)
    outside = (
        (above is not None and number <= above)
        or (below is not None and number >= below)
        or (least is not None and number < least)
    )
    if not isfinite(number) or outside:
        raise InputError(f"`{name}` is {found(value)}: expected {expected}")
    return number


def check_names(name: str, value: object) -> list[str]:
    """The names in a sequence of strings; a string is not taken for its letters.

    Raises:
        TypeError: if it is something else.
    """
    is_sequence = isinstance(value, Sequence) and not isinstance(value, str)
    if not is_sequence or not all(isinstance(item, str) for item in value):  # type: ignore[attr-defined]
        raise TypeError(f"`{name}` is {found(value)}: expected a list of names")
    return list(value)  # type: ignore[call-overload]


def check_text(name: str, value: object) -> None:
    """Refuse what is no text, or empty.

    Raises:
        TypeError: if it is no string.
        InputError: if it is empty.
    """
    check_instance(name, value, str, "text")
    if not value:
        raise InputError(f"`{name}` is empty: expected text")


def check_table(name: str, value: object) -> None:
    """Refuse what is neither a data frame nor a path.

    Raises:
        TypeError: if it is something else.
    """
    kinds = (pd.DataFrame, str, os.PathLike)
    check_instance(name, value, kinds, "a data frame, or the path of a file")


def check_maker(name: str, value: object) -> None:
    """Refuse what is neither a config with ``_target_`` nor a function.

    Raises:
        TypeError: if it is something else.
        InputError: if the config has no ``_target_``.
    """
    if not callable(value):
        check_instance(name, value, Mapping, "a config with `_target_`, or a function")
        assert isinstance(value, Mapping)
        if not isinstance(value.get("_target_"), str):
            raise InputError(f"`{name}` is {found(value)}: expected a config with `_target_`")


def check_labels(name: str, value: object) -> tuple[str, ...]:
    """The labels in a sequence, as strings: at least one, none twice.

    Raises:
        TypeError: if it is no sequence, or a string.
        InputError: if it is empty, or a label stands in it twice.
    """
    text = isinstance(value, str | bytes)
    if text or not isinstance(value, Sequence | np.ndarray | pd.Index):
        raise TypeError(f"`{name}` is {found(value)}: expected a whole number, or a list of names")
    labels = tuple(map(str, value))
    if not labels or len(set(labels)) < len(labels):
        raise InputError(f"`{name}` is {found(value)}: expected names, none twice, at least one")
    return labels


def check_mapping(name: str, value: object, kinds: type | None = None) -> None:
    """Refuse anything but a mapping from names, to values of a class if one is given.

    Raises:
        TypeError: if it is something else.
    """
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise TypeError(f"`{name}` is {found(value)}: expected a dict by names")
    if kinds is not None:
        for key, item in value.items():
            check_instance(f"{name}[{key!r}]", item, kinds)


def check_tensor(
    name: str,
    value: object,
    shape: Sequence[int | str] | None = None,
    kind: str | None = "real",
    finite: bool = True,
) -> None:
    """Refuse what is no tensor of a shape and kind, or holds NaN or infinity.

    Args:
        name: of the argument.
        value: what was given.
        shape: sizes, a letter for any; any shape by default.
        kind: ``"real"`` numbers, ``"floating"`` ones, ``"integer"`` ones, or None for any.
        finite: whether the entries must be finite.

    Raises:
        TypeError: if it is no tensor, or of another dtype.
        InputError: if it has another shape, holds no values (the meta device) or a value that is
            not finite.
    """
    expected = f"{_KINDS[kind]} tensor" if kind else "a tensor"
    if shape is not None:
        sizes = ", ".join(map(str, shape))
        expected += f" of shape ({sizes}{',' if len(shape) == 1 else ''})"
    if not isinstance(value, Tensor) or not _is_of(value.dtype, kind):
        raise TypeError(f"`{name}` is {found(value)}: expected {expected}")
    if shape is not None and not _fits(tuple(value.shape), shape):
        raise InputError(f"`{name}` is {found(value)}: expected {expected}")
    if value.is_meta:
        raise InputError(f"`{name}` is {found(value)}, which holds no values: expected {expected}")
    if finite and value.is_floating_point() and not is_finite(value):
        raise InputError(f"`{name}` holds NaN or infinity: expected finite numbers")


def check_constant(name: str, tensor: Tensor) -> None:
    """Refuse a tensor whose gradient is wanted where its numbers are taken as known.

    Raises:
        InputError: if it requires a gradient.
    """
    if tensor.requires_grad:
        raise InputError(
            f"`{name}` requires a gradient, which it would not get: expected known numbers, such as "
            f"`{name}.detach()`"
        )


def check_symmetric(name: str, matrix: Tensor) -> None:
    """Refuse what is no symmetric matrix.

    Raises:
        TypeError: if it is no floating-point tensor.
        InputError: if it is not (n, n), empty, not finite, or further from its transpose than rounding.
    """
    if not isinstance(matrix, Tensor) or not matrix.is_floating_point():
        got = matrix.dtype if isinstance(matrix, Tensor) else found(matrix)
        raise TypeError(f"`{name}` is {got}: expected a floating-point tensor")
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
        raise InputError(f"`{name}` has shape {tuple(matrix.shape)}: expected (n, n)")
    if not len(matrix):
        raise InputError(f"`{name}` has shape (0, 0): it is empty")
    if matrix.is_meta:
        return
    if not bool(torch.isfinite(matrix).all()):
        raise InputError(f"`{name}` has an entry that is not finite")
    scale = float(matrix.abs().max())
    if float((matrix - matrix.mT).abs().max()) > 1e3 * torch.finfo(matrix.dtype).eps * scale:
        raise InputError(f"`{name}` is not symmetric")


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers of a tensor are finite."""
    tensor = tensor.detach() if tensor.requires_grad else tensor
    # NaN and infinity stay in a sum, which is cheaper; a sum alone may also be too large.
    return isfinite(tensor.sum()) or bool(torch.isfinite(tensor).all())


_KINDS = {"real": "a real", "floating": "a floating-point", "integer": "an integer"}


def _is_of(dtype: torch.dtype, kind: str | None) -> bool:
    if kind is None:
        return True
    whole = not dtype.is_floating_point and not dtype.is_complex and dtype != torch.bool
    return {
        "real": whole or dtype.is_floating_point,
        "floating": dtype.is_floating_point,
        "integer": whole,
    }[kind]


def _fits(found: tuple[Any, ...], shape: Sequence[int | str]) -> bool:
    return len(found) == len(shape) and all(
        isinstance(size, str) or size == own for own, size in zip(found, shape, strict=True)
    )
