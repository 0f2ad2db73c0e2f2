"""Where the parameters of a tree of modules are kept, and which of them are free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from openreml_nn.covariance.params import (
    Arrangement,
    check_name,
    check_spec,
)
from openreml_nn.covariance.transform import Transform
from openreml_nn.support.errors import InputError

__all__ = ["Entry", "Layout", "Owner", "tensors_of"]


def tensors_of(module: nn.Module, store: str) -> Iterator[Tensor]:
    """Tensors of a module and of all below it, as ``parameters()`` and ``buffers()`` yield them.

    One that stands in two places comes twice: nobody remembers those that were seen, which takes
    most of the time where a tree is small.

    Args:
        store: ``"_parameters"`` or ``"_buffers"``.
    """
    stack = [module]
    while stack:
        node = stack.pop()
        for tensor in node.__dict__[store].values():
            if tensor is not None:
                yield tensor
        stack.extend(reversed([child for child in node._modules.values() if child is not None]))


class Entry(NamedTuple):
    """One parameter of a tree: its full name, the leaf that owns it, its name there."""

    name: str
    leaf: Owner
    local: str

    @property
    def free(self) -> bool:
        """Whether it is an ``nn.Parameter`` of its own and not fixed."""
        return self.local in self.leaf._parameters

    @property
    def estimated(self) -> bool:
        """Whether a fit moves it: it is free, and ``requires_grad_(False)`` has not frozen it."""
        return self.free and self.tensor.requires_grad

    @property
    def tensor(self) -> Tensor:
        """The untransformed value of the parameter as it is now, (1,)."""
        return self.leaf.stored(self.local)

    @property
    def trans(self) -> Transform:
        """The transform of the parameter."""
        return self.leaf.own_trans[self.local]


class Layout:
    """The parameters of a tree in order, as they are found now.

    Attributes:
        entries: all parameters, each once.
        free, fixed: the free and the fixed ones among them.
        free_index, fixed_index: their positions.
        free_names: names of the free ones.
    """

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = tuple(entries)
        self.free_index = [i for i, e in enumerate(self.entries) if e.free]
        self.fixed_index = [i for i, e in enumerate(self.entries) if not e.free]
        self.free = tuple(self.entries[i] for i in self.free_index)
        self.fixed = tuple(self.entries[i] for i in self.fixed_index)
        self.free_names = [e.name for e in self.free]

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)


class Owner(nn.Module):
    """A module with parameters that have names and transforms and may be fixed.

    A *leaf* has parameters of its own; a tree has those of its leaves. This class is what both
    share; :meth:`leaves` tells them apart.

    Args:
        param_specs: of a leaf, as :class:`Matrix` has them; empty for a tree.

    Attributes:
        own_trans: transforms of a leaf's own parameters, by name.
    """

    def __init__(self, param_specs: Mapping[str, Mapping[str, Any]]) -> None:
        super().__init__()
        self.own_trans: dict[str, Transform] = {}
        self._arrangement_kept: tuple[tuple[str, ...], Arrangement] | None = None
        if not isinstance(param_specs, Mapping):
            raise TypeError(f"`param_specs` is a {type(param_specs).__name__}: expected a dict")
        for name, spec in param_specs.items():
            check_name(name, "parameter")
            check_spec(name, spec)
            value = spec["default"].detach().clone()
            # Written to the dictionaries themselves: register_parameter refuses names that
            # nn.Module also uses as attributes, and a parameter is only ever looked up by name.
            if spec["fixed"]:
                self._buffers[name] = value
            else:
                self._parameters[name] = nn.Parameter(value)
            self.own_trans[name] = spec["trans"]

    def stored(self, name: str) -> Tensor:
        """The untransformed value, (1,), of one of the leaf's own parameters, as it is now.

        Where ``torch.nn.utils`` (parametrize, prune) has moved the parameter, its
        value is the attribute that has taken its place.
        """
        for store in (self._parameters, self._buffers):
            found = store.get(name)
            if found is not None:
                return found
        moved = getattr(self, name, None)
        if not isinstance(moved, Tensor):
            raise InputError(f"parameter {name!r} of {self._get_name()} has no value of its own")
        return moved

    def arrangement(self) -> Arrangement:
        """Which of the leaf's parameters are free now."""
        # Kept for as long as the same parameters are free.
        own = tuple(self._parameters)
        kept = self._arrangement_kept
        if kept is None or kept[0] != own:
            free = tuple([name for name in self.own_trans if name in self._parameters])
            kept = self.__dict__["_arrangement_kept"] = (own, Arrangement(self.own_trans, free))
        return kept[1]

    def retransform(self, name: str, trans: Transform) -> None:
        """Give one of the leaf's own parameters another transform; its untransformed value stays."""
        self.own_trans[name] = trans
        self._arrangement_kept = None

    def own_values(self) -> Tensor | None:
        """The leaf's free parameters as a 1-D tensor; None if it has none."""
        names, own = self.arrangement().free, self._parameters
        found = [own[name] for name in names]
        if not found:
            return None
        if any(value is None for value in found):
            raise InputError(
                f"{self._get_name()} has no values of its own: those of an Adapter's matrix are given"
            )
        return found[0] if len(found) == 1 else torch.cat(found)  # type: ignore[arg-type]

    def register_data(self, name: str, tensor: Tensor | None) -> None:
        """Register what a matrix is made from (level codes, a kernel), which is no state.

        It is a buffer that is not in ``state_dict()``, because parameters learned
        with some rows are used with others. Nothing would load it again, so
        it keeps its values where a module loses them: ``to("meta")`` and
        ``to_empty()``.
        """
        self.register_buffer(name, tensor, persistent=False)
        self.__dict__.setdefault("_data", {})[name] = None

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        data: dict[str, Tensor | None] = self.__dict__.get("_data", {})
        known = {
            name: self._buffers.get(name) if data[name] is None else data[name] for name in data
        }
        super()._apply(fn, recurse)
        for name, tensor in known.items():
            moved = self._buffers.get(name)
            if tensor is None or moved is None:
                continue
            if moved.is_meta:
                data[name] = None if tensor.is_meta else tensor
            elif tensor.is_meta:
                raise InputError(
                    f"`{name}` of {self._get_name()} was given on the meta device: it has no values"
                )
            else:
                self._buffers[name], data[name] = tensor.to(moved.device, moved.dtype), None
        return self

    def canonical(self, coordinates: dict[str, float]) -> dict[str, float]:
        """Equivalent coordinates (see :class:`Transform`) that the parameters can hold.

        Args:
            coordinates: by local name, those of the free parameters that are
                being estimated, perhaps beyond their bounds.
        """
        return {name: self.own_trans[name].fold(u) for name, u in coordinates.items()}

    # ------------------------------------------------------------------ the tree

    def leaves(self) -> Mapping[str, Owner]:
        """Leaves below this module, each once, by the prefix of their parameters' names."""
        return {"": self}

    def entries(self) -> list[Entry]:
        """All parameters, each once, in the order of :attr:`param_names`."""
        return [
            Entry(prefix + name, leaf, name)
            for prefix, leaf in self.leaves().items()
            for name in leaf.own_trans
        ]

    def parameter_entries(self) -> Layout:
        """The parameters of the tree: names, owners, values and transforms as they are now.

        Those that a fit moves are the ones that are ``estimated``. Further
        parameters of the module (of a network, or a tensor that is an operand)
        are in ``parameters()`` and have no entry.
        """
        return Layout(self.entries())
