"""The parameters of a tree: their specifications, names, places and transforms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from openreml_nn.covariance.transform import Transform, TransformIdentity

if TYPE_CHECKING:
    from openreml_nn.covariance.matrix import Matrix

__all__ = ["Entry", "Layout", "check_name", "check_spec", "free_specs", "merge_specs"]


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
        ValueError: if only some of the names are known.
    """
    if given is None:
        return dict(default)
    if not isinstance(given, Mapping):
        raise TypeError(f"`param_specs` is a {type(given).__name__}: expected a dict")
    if set(given) <= set(default):
        return {name: given.get(name, spec) for name, spec in default.items()}
    if len(given) == len(default) and not set(given) & set(default):
        return dict(given)
    raise ValueError(f"`param_specs` names {list(given)}: expected some of {list(default)}")


def check_name(name: object, what: str) -> None:
    """Raise unless ``name`` can be part of a path."""
    if not isinstance(name, str):
        raise TypeError(f"the {what} name {name!r} is a {type(name).__name__}: expected a string")
    if not name or "/" in name or "." in name:
        raise ValueError(f"the {what} name {name!r} is empty or holds '/' or '.'")


def check_spec(name: str, spec: object) -> None:
    """Raise unless ``spec`` is the specification of a parameter."""
    if not isinstance(spec, Mapping) or set(spec) != {"fixed", "default", "trans"}:
        raise TypeError(
            f"the specification of {name!r} is {spec!r}: "
            "expected a dict with exactly 'fixed', 'default' and 'trans'"
        )
    if not isinstance(spec["fixed"], bool):
        raise TypeError(f"'fixed' of {name!r} is {spec['fixed']!r}: expected a bool")
    if not isinstance(spec["default"], Tensor):
        raise TypeError(f"'default' of {name!r} is {spec['default']!r}: expected a tensor")
    if spec["default"].shape != (1,):
        raise ValueError(
            f"'default' of {name!r} has shape {tuple(spec['default'].shape)}: expected (1,)"
        )
    if not isinstance(spec["trans"], Transform):
        raise TypeError(f"'trans' of {name!r} is {spec['trans']!r}: expected a Transform")


class Entry(NamedTuple):
    """One parameter of a tree: its full name, the leaf that owns it, its name there."""

    name: str
    leaf: Matrix
    local: str

    @property
    def key(self) -> tuple[int, str]:
        """What tells parameters apart, wherever in a tree they are met."""
        return id(self.leaf), self.local

    @property
    def free(self) -> bool:
        return self.local in self.leaf._parameters

    @property
    def tensor(self) -> Tensor:
        owner = self.leaf._parameters if self.free else self.leaf._buffers
        tensor = owner[self.local]
        assert tensor is not None
        return tensor

    @property
    def trans(self) -> Transform:
        return self.leaf._trans[self.local]


class Layout:
    """Which parameters a tree has, and in what order.

    A tree keeps its layout, because walking it for every evaluation would
    take longer than many an evaluation. It holds no tensors, which would
    belong to the device or the ``torch.func`` transform of their making.

    Attributes:
        entries: all parameters, each once.
        free, fixed: the free and the fixed ones among them.
        free_index, fixed_index: their positions.
        others: where the tree's other tensors stand, filled in when asked for.
    """

    #: Grows whenever a parameter of any matrix is fixed or freed; older layouts are outdated.
    changes = 0

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.made = Layout.changes
        self.entries = tuple(entries)
        self.free_index = [i for i, e in enumerate(self.entries) if e.free]
        self.fixed_index = [i for i, e in enumerate(self.entries) if not e.free]
        self.free = tuple(self.entries[i] for i in self.free_index)
        self.fixed = tuple(self.entries[i] for i in self.fixed_index)
        self.free_names = [e.name for e in self.free]
        self.of_free = _Transforms([e.trans for e in self.free])
        self.of_fixed = _Transforms([e.trans for e in self.fixed])
        # Where each parameter stands in the free ones followed by the fixed ones.
        self.merged = np.argsort([*self.free_index, *self.fixed_index]) if self.fixed else None
        self.others: list[tuple[dict[str, Tensor | None], str]] | None = None


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
            x = x[self._order]
        parts = zip(self._distinct, x.split(self._lengths), strict=True)
        found = torch.cat([getattr(trans, method)(part) for trans, part in parts])
        return found if self._back is None else found[self._back]
