"""Parameters of a matrix: specifications, names, sizes, transforms."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from functools import cached_property
from math import inf, isfinite
from typing import Any
from urllib.parse import unquote

import numpy as np
import torch
from torch import Tensor

from openreml_nn.covariance.transform import Transform, TransformIdentity
from openreml_nn.support.checks import check_count, check_flag, found
from openreml_nn.support.errors import InputError

__all__ = [
    "Arrangement",
    "Spec",
    "check_name",
    "check_spec",
    "check_value",
    "checked_shape",
    "free_specs",
    "merge_specs",
    "module_name",
    "operand_name",
    "user_name",
]


def free_specs(
    names: Sequence[str], default: float = 0.0, trans: Transform | None = None
) -> dict[str, dict[str, Any]]:
    """Specifications of free parameters that share a default and a transform."""
    return {
        name: {
            "fixed": False,
            "default": torch.tensor([default], dtype=torch.get_default_dtype()),
            "trans": trans or TransformIdentity(),
        }
        for name in names
    }


def merge_specs(
    default: Mapping[str, Mapping[str, Any]], given: Mapping[str, Mapping[str, Any]] | None
) -> dict[str, Mapping[str, Any]]:
    """A class's specifications with those that a user gives in their place.

    They are matched by name, in any order; names that are all new rename the
    parameters, in the order of the class.

    Raises:
        TypeError: if they are not a dict.
        InputError: if only some of the names are known.
    """
    if given is None:
        return dict(default)
    if not isinstance(given, Mapping):
        raise TypeError(f"`param_specs` is a {type(given).__name__}: expected a dict")
    if set(given) <= set(default):
        return {name: given.get(name, spec) for name, spec in default.items()}
    if len(given) == len(default) and not set(given) & set(default):
        return dict(given)
    raise InputError(f"`param_specs` names {list(given)}: expected some of {list(default)}")


def check_name(name: object, what: str) -> None:
    """Raise unless ``name`` can be part of a path."""
    if not isinstance(name, str):
        raise TypeError(f"the {what} name is {found(name)}: expected a string")
    if not name or "/" in name or "." in name:
        raise InputError(f"the {what} name {name!r} is empty or holds '/' or '.'")


def check_spec(name: str, spec: object) -> None:
    """Raise unless ``spec`` is the specification of a parameter."""
    if not isinstance(spec, Mapping) or set(spec) != {"fixed", "default", "trans"}:
        raise TypeError(
            f"the specification of {name!r} is {found(spec)}: "
            "expected a dict with exactly 'fixed', 'default' and 'trans'"
        )
    if not isinstance(spec["fixed"], bool):
        raise TypeError(f"'fixed' of {name!r} is {found(spec['fixed'])}: expected a bool")
    default = spec["default"]
    if not isinstance(default, Tensor) or not default.is_floating_point():
        got = default.dtype if isinstance(default, Tensor) else found(default)
        raise TypeError(f"'default' of {name!r} is {got}: expected a floating-point tensor")
    if default.shape != (1,):
        raise InputError(f"'default' of {name!r} has shape {tuple(default.shape)}: expected (1,)")
    if not default.is_meta and bool(default.isnan()):
        raise InputError(f"'default' of {name!r} is NaN")
    if not isinstance(spec["trans"], Transform):
        raise TypeError(f"'trans' of {name!r} is {found(spec['trans'])}: expected a Transform")


def check_value(
    name: str, value: object, trans: Transform, natural: bool, option: str = "value"
) -> Tensor:
    """The untransformed value, (1,), of a number that a parameter is to have.

    Zero is the end of a variance's range and an ordinary variance: it is
    allowed, untransformed as minus infinity.

    Args:
        name: of the parameter.
        value: the number, or a tensor of one.
        trans: its transform.
        natural: whether it is on the natural scale.
        option: what messages call the argument.

    Raises:
        TypeError: if it is no number, nor a tensor of one.
        InputError: if it is not finite or the transform does not reach it.
    """
    check_flag("natural", natural)
    try:
        # A number of Python has all its digits, whatever the default dtype.
        kept = value.dtype if isinstance(value, Tensor) else torch.float64
        number = torch.as_tensor(value, dtype=kept, device="cpu").detach().double().reshape(1)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"`{option}` of {name!r} is {found(value)}: expected one number") from None
    plain = float(number)
    if trans.vanishes and plain == (0 if natural else -inf):
        return number if not natural else trans.inverse(number)
    if not isfinite(plain):
        raise InputError(f"`{option}` of {name!r} is {plain}: expected a finite number")
    try:
        x = trans.inverse(number) if natural else number
        there = trans(x)
        reached = torch.isfinite(x) & torch.isfinite(there) & torch.isfinite(trans.inverse(there))
    except InputError:
        reached = torch.tensor(False)
    if not bool(reached):
        scale = "natural" if natural else "untransformed"
        low, high = trans.codomain
        where = f"within ({low:g}, {high:g})" if natural else f"in the domain of {trans}"
        raise InputError(
            f"`{option}` of {name!r} is {plain:g} on the {scale} scale: expected a value {where}"
        )
    return x


def module_name(name: str, owner: object) -> str:
    """The name under which a module keeps the submodule or tensor that a user calls ``name``.

    It is the name itself but where that would hide an attribute of ``owner``
    (``type``, ``train``, ``shape``) or break a path (a dot): these characters
    are percent-encoded.

    Raises:
        InputError: if it is empty.
    """
    if not name:
        raise InputError("a name is '': expected one that is not empty, such as that of a factor")
    return _encoded(name, "%.", _Attributes(owner))


def operand_name(name: str, taken: Container[str] = ()) -> str:
    """The name of an operand for what a user calls ``name``: without dots and slashes, and none
    of those that are ``taken``."""
    return _encoded(name, "%./", taken)


def user_name(name: str) -> str:
    """The name that :func:`module_name` or :func:`operand_name` has encoded."""
    return unquote(name)


class _Attributes:
    """Names of an object's attributes, those of a module's children not among them."""

    def __init__(self, owner: object) -> None:
        self._owner = owner

    def __contains__(self, name: object) -> bool:
        return name in vars(self._owner) or hasattr(type(self._owner), str(name))


def _encoded(name: str, characters: str, taken: Container[str]) -> str:
    # Most names are words.
    found = name
    if not name.isidentifier():
        found = "".join(f"%{ord(c):02X}" if c in characters else c for c in name)
    return f"%{ord(found[0]):02X}{found[1:]}" if found in taken else found


class Spec(dict[str, Any]):
    """A specification as it is shown: it cannot be assigned to."""

    def __setitem__(self, key: str, value: Any) -> None:
        raise TypeError(
            f"specifications are read-only, {key!r} too: fix(name, value), free(name) and "
            "set_value(name, value) change a parameter"
        )

    __delitem__ = update = pop = setdefault = clear = __setitem__  # type: ignore[assignment]

    def __reduce__(self) -> tuple[type[Spec], tuple[dict[str, Any]]]:
        return Spec, (dict(self),)


class Arrangement:
    """How one leaf's free parameters and fixed ones make up all of its parameters.

    It depends on nothing but which of them are free, and is kept with the
    names of these.

    Attributes:
        free, fixed: names.
        free_index: positions of the free ones among all.
        of_free, of_fixed: their transforms.
        merged: where each parameter stands in the free ones followed by the
            fixed ones; None where nothing is fixed.
    """

    def __init__(self, trans: Mapping[str, Transform], free: tuple[str, ...]) -> None:
        self.free = free
        among = set(free)
        self.fixed = tuple(name for name in trans if name not in among)
        self.of_free = _Transforms([trans[name] for name in free])
        self._trans = trans
        place = {name: i for i, name in enumerate(trans)}
        order = [place[name] for name in (*free, *self.fixed)]
        self.merged = np.argsort(order) if self.fixed else None
        self.free_index = [place[name] for name in free]

    @property
    def is_whole(self) -> bool:
        """Whether there are parameters, and all of them are free."""
        return self.merged is None and bool(self.free)

    @cached_property
    def of_fixed(self) -> _Transforms:
        return _Transforms([self._trans[name] for name in self.fixed])


class _Transforms:
    """The transforms of a 1-D tensor's elements, each distinct one applied once."""

    def __init__(self, transforms: Sequence[Transform]) -> None:
        self._distinct: list[Transform] = []
        places: list[list[int]] = []
        for i, trans in enumerate(transforms):
            for known, place in zip(self._distinct, places):
                if known is trans or known == trans:
                    place.append(i)
                    break
            else:
                self._distinct.append(trans)
                places.append([i])
        order = [i for place in places for i in place]
        self._lengths = [len(place) for place in places]
        in_runs = order == sorted(order)
        self._order = None if in_runs else np.array(order)
        self._back = None if in_runs else np.argsort(order)

    def apply(self, method: str, x: Tensor) -> Tensor:
        """Apply each transform's ``method`` to its elements of ``x``."""
        if not self._distinct:
            return x
        if len(self._distinct) == 1:
            return getattr(self._distinct[0], method)(x)
        if self._order is not None:
            x = x.index_select(0, torch.from_numpy(self._order).to(x.device))
        parts = zip(self._distinct, x.split(self._lengths), strict=True)
        found = torch.cat([getattr(trans, method)(part) for trans, part in parts])
        if self._back is None:
            return found
        return found.index_select(0, torch.from_numpy(self._back).to(x.device))


def checked_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of a matrix as it was given.

    Raises:
        TypeError, InputError: if it is no tuple of positive integers.
    """
    if not isinstance(shape, Sequence) or isinstance(shape, str | bytes):
        raise TypeError(f"`shape` is {found(shape)}: expected a tuple of integers")
    return tuple(check_count(f"shape[{i}]", size, 1) for i, size in enumerate(shape))
