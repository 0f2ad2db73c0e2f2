"""The parameters of a module: their names, values and transforms, and which are fixed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, Self, cast

import torch
from torch import Tensor, nn

from openreml_nn.covariance.params import (
    Arrangement,
    Entry,
    Layout,
    Spec,
    check_name,
    check_spec,
    check_value,
)
from openreml_nn.covariance.transform import Transform
from openreml_nn.support.checks import check_flag, found
from openreml_nn.support.errors import InputError

if TYPE_CHECKING:
    from openreml_nn.covariance.matrix import Matrix

__all__ = ["FreeParams", "Given", "Parametrized", "Recorded"]


class Recorded(NamedTuple):
    """Free parameters to be used with plain autograd instead of the closed forms.

    With ``natural`` the values are already transformed: estimation evaluates
    the tree at them, because a variance of zero is an ordinary number on that
    scale but minus infinity before the transform.
    """

    values: Tensor
    natural: bool = False


FreeParams = Tensor | Mapping[str, Tensor] | Recorded | None


class Given(NamedTuple):
    """What a leaf takes for its own free parameters while a call lasts.

    Attributes:
        values: the free parameters.
        natural: whether they are transformed.
        untransformed: where a user's formula is called with what gives natural
            values when transformed, this.
    """

    values: Tensor
    natural: bool = False
    untransformed: Tensor | None = None


class Parametrized(nn.Module):
    """A module whose parameters have names and transforms and may be fixed.

    A *leaf* has parameters of its own; a tree has those of its leaves. This
    class is what both share; :meth:`leaves` tells them apart.
    """

    #: Values that stand in for the free parameters while a call lasts; see :meth:`given`.
    stand_in: Given | None = None

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

    # ------------------------------------------------------------------ one leaf

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

    def free_values(self) -> Tensor:
        """The leaf's free parameters, untransformed, or what stands in for them, 1-D."""
        given = self.stand_in
        if given is None:
            own = self.own_values()
            return self.no_params() if own is None else own
        if given.untransformed is not None:
            return given.untransformed
        return self.transformed_by("inverse", given.values) if given.natural else given.values

    def transformed_by(self, method: str, values: Tensor) -> Tensor:
        return self.arrangement().of_free.apply(method, values)

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

    # ------------------------------------------------------------------ the tree

    def leaves(self) -> dict[str, Matrix]:
        """Leaves below this module, each once, by the prefix of their parameters' names."""
        return {"": cast("Matrix", self)}

    @contextmanager
    def given(self, free_params: FreeParams) -> Iterator[None]:
        """Let values stand in for the free parameters within the context."""
        natural = isinstance(free_params, Recorded) and free_params.natural
        leaves = list(self.leaves().values())
        before = [leaf.stand_in for leaf in leaves]
        values = self.flat_params(free_params)
        sizes = [len(leaf.arrangement().free) for leaf in leaves]
        try:
            for leaf, part in zip(leaves, values.split(sizes), strict=True):
                leaf.__dict__["stand_in"] = Given(part, natural)
            yield
        finally:
            for leaf, old in zip(leaves, before, strict=True):
                leaf.__dict__["stand_in"] = old

    def _entries(self) -> list[Entry]:
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
        return Layout(self._entries())

    def _entry(self, name: str) -> Entry:
        for entry in self._entries() if isinstance(name, str) else ():
            if entry.name == name:
                return entry
        raise InputError(f"`name` is {found(name)}: expected one of {self.param_names}")

    # ------------------------------------------------------------------ values

    def flat_params(self, free_params: FreeParams) -> Tensor:
        """Free parameters as a checked 1-D tensor in the order of :attr:`free_param_names`."""
        if isinstance(free_params, Recorded):
            return free_params.values
        leaves = self.leaves().values()
        if free_params is None:
            own = [leaf for leaf in leaves if leaf.arrangement().free or leaf.stand_in is not None]
            parts = [leaf.free_values() for leaf in own]
            if len(parts) == 1:
                return parts[0]
            return torch.cat(parts) if parts else self.no_params()
        if isinstance(free_params, Tensor):
            count = sum(len(leaf.arrangement().free) for leaf in leaves)
            if free_params.dim() != 1 or free_params.shape[0] != count:
                raise InputError(
                    f"`free_params` has shape {tuple(free_params.shape)}: expected "
                    f"({count},), one number for each of {self.free_param_names}"
                )
            if not free_params.is_floating_point():
                raise TypeError(
                    f"`free_params` is {free_params.dtype}: expected floating-point numbers"
                )
            return free_params
        if not isinstance(free_params, Mapping):
            raise TypeError(
                f"`free_params` is a {type(free_params).__name__}: expected a tensor or a dict"
            )
        names = self.free_param_names
        missing = [name for name in names if name not in free_params]
        unexpected = [name for name in free_params if name not in names]
        if missing or unexpected:
            raise InputError(
                f"`free_params` lacks {missing} and has unexpected {unexpected}: "
                f"expected exactly {names}"
            )
        for name in names:
            value = free_params[name]
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"`free_params[{name!r}]` is a {type(value).__name__}: expected a tensor"
                )
            if value.shape not in ((), (1,)):
                raise InputError(
                    f"`free_params[{name!r}]` has shape {tuple(value.shape)}: expected (1,)"
                )
        return torch.cat([free_params[n].reshape(1) for n in names]) if names else self.no_params()

    def no_params(self) -> Tensor:
        like = self.reference()
        return torch.empty(0, dtype=like.dtype, device=like.device)

    def reference(self) -> Tensor:
        """A tensor whose dtype and device an evaluation without free parameters follows."""
        for tensor in (*self.parameters(), *self.buffers()):
            if tensor.is_floating_point():
                return tensor
        return torch.empty(0)

    def build_params(
        self,
        free_params: FreeParams = None,
        include_fixed: bool = True,
        trans: bool = True,
        out_format: str = "tensor",
    ) -> Any:
        """Parameters in the order of :attr:`param_names`, fixed ones merged in.

        Args:
            free_params: nothing (the module's own parameters), a 1-D tensor in
                the order of :attr:`free_param_names`, or a dict by those names.
            include_fixed: whether fixed parameters are part of the result.
            trans: whether values are transformed.
            out_format: ``"tensor"`` or ``"dict"`` (name to tensor of shape (1,)).

        Raises:
            ValueError: if ``out_format`` is something else, or as in calling the matrix.
        """
        if not isinstance(out_format, str) or out_format not in ("tensor", "dict"):
            raise InputError(f"`out_format` is {found(out_format)}: expected 'tensor' or 'dict'")
        check_flag("include_fixed", include_fixed)
        check_flag("trans", trans)
        if len(leaves := self.leaves()) == 1 and leaves.get("") is self:
            values = self._own_params(free_params, include_fixed, trans)
        else:
            with nullcontext() if free_params is None else self.given(free_params):
                parts = [leaf._own_params(None, include_fixed, trans) for leaf in leaves.values()]
            parts = [part for part in parts if part.numel()]
            values = torch.cat(parts) if parts else self.no_params()
        if out_format == "tensor":
            return values
        names = self.param_names if include_fixed else self.free_param_names
        return dict(zip(names, values.split(1), strict=True)) if names else {}

    def _own_params(self, free_params: FreeParams, include_fixed: bool, trans: bool) -> Tensor:
        """:meth:`build_params` of a leaf."""
        arrangement, given = self.arrangement(), self.stand_in
        if isinstance(free_params, Recorded):
            with self.given(free_params):
                return self._own_params(None, include_fixed, trans)
        stand_in = given is not None and (free_params is None or free_params is given.untransformed)
        if stand_in and trans and given is not None and given.natural:
            values = given.values
        else:
            values = self.flat_params(free_params)
            if trans:
                values = arrangement.of_free.apply("__call__", values)
        if include_fixed and arrangement.merged is not None:
            fixed = torch.cat([self.stored(name) for name in arrangement.fixed]).to(values)
            if trans:
                fixed = arrangement.of_fixed.apply("__call__", fixed)
            values = torch.cat([values, fixed])[arrangement.merged]
        return values

    # ------------------------------------------------------------------ changing them

    def fix(self, name: str, value: float | Tensor | None = None, natural: bool = False) -> Self:
        """Make a parameter fixed, optionally at a value; returns ``self``.

        Args:
            name: one of :attr:`param_names`.
            value: where to fix it, untransformed; its present value by default.
            natural: whether ``value`` is on the natural scale: a variance and not half its logarithm.

        Raises:
            TypeError: if ``value`` is no number.
            ValueError: if there is no such parameter, or ``value`` is not finite or
                not in the range of the transform.

        >>> from openreml_nn.covariance import ScalarMatrix
        >>> ScalarMatrix(1).fix("sigma^2", 4.0, natural=True)()
        tensor([[4.]])
        """
        entry = self._entry(name)
        self._refuse_moved(entry)
        with torch.no_grad():
            fixed = entry.tensor.detach().clone()
            if value is not None:
                fixed.copy_(check_value(name, value, entry.trans, natural))
        entry.leaf._parameters.pop(entry.local, None)
        entry.leaf._buffers[entry.local] = fixed
        return self

    def free(self, name: str) -> Self:
        """Make a fixed parameter free, from its present value; returns ``self``."""
        entry = self._entry(name)
        self._refuse_moved(entry)
        if not entry.free:
            value = entry.leaf._buffers.pop(entry.local)
            assert value is not None
            entry.leaf._parameters[entry.local] = nn.Parameter(value)
        return self

    def set_value(self, name: str, value: float | Tensor, natural: bool = False) -> Self:
        """Set a parameter, free or fixed; returns ``self``.

        Args:
            name: one of :attr:`param_names`.
            value: the value, untransformed.
            natural: whether ``value`` is on the natural scale.

        Raises:
            TypeError, ValueError: as in :meth:`fix`.

        >>> from openreml_nn.covariance import ScalarMatrix
        >>> ScalarMatrix(1).set_value("sigma^2", 4.0, natural=True)().detach()
        tensor([[4.]])
        """
        entry = self._entry(name)
        self._refuse_moved(entry)
        with torch.no_grad():
            entry.tensor.copy_(check_value(name, value, entry.trans, natural))
        return self

    @staticmethod
    def _refuse_moved(entry: Entry) -> None:
        if not entry.free and entry.local not in entry.leaf._buffers:
            raise InputError(
                f"`name` is {entry.name!r}: it is parametrized or pruned by torch.nn.utils, "
                "which must be removed first"
            )

    def set_param_specs(self, *args: Any, **kwargs: Any) -> None:
        """Specifications are not assigned to.

        Raises:
            TypeError: always; the message names what to call.
        """
        raise TypeError(
            "specifications are read-only: fix(name, value), free(name) and "
            "set_value(name, value) change a parameter"
        )

    def set_start(self, name: str, value: Tensor) -> bool:
        """Set a parameter, if a fit may move it, to what its transform shall yield; whether it may."""
        parameter = self._parameters.get(name)
        if parameter is None or not parameter.requires_grad:
            return False
        with torch.no_grad():
            parameter.copy_(self.own_trans[name].inverse(value.detach().reshape(1)))
        return True

    # ------------------------------------------------------------------ lists

    @property
    def param_specs(self) -> Mapping[str, Mapping[str, Any]]:
        """The specifications as they are now, read-only; :meth:`fix`, :meth:`free` and
        :meth:`set_value` change them."""
        return _Specs(
            (e.name, Spec(fixed=not e.free, default=e.tensor.detach(), trans=e.trans))
            for e in self._entries()
        )

    @property
    def param_names(self) -> list[str]:
        """Names of all parameters."""
        return [prefix + name for prefix, leaf in self.leaves().items() for name in leaf.own_trans]

    @property
    def free_param_names(self) -> list[str]:
        """Names of the free parameters."""
        return [
            prefix + name
            for prefix, leaf in self.leaves().items()
            for name in leaf.arrangement().free
        ]

    @property
    def fixed_param_names(self) -> list[str]:
        """Names of the fixed parameters."""
        return [e.name for e in self._entries() if not e.free]

    @property
    def estimated_param_names(self) -> list[str]:
        """Names of the parameters that a fit moves: free, and not frozen by
        ``requires_grad_(False)``."""
        return [e.name for e in self._entries() if e.estimated]

    @property
    def num_params(self) -> int:
        """Number of parameters."""
        return sum(len(leaf.own_trans) for leaf in self.leaves().values())

    @property
    def num_free_params(self) -> int:
        """Number of free parameters."""
        return sum(len(leaf.arrangement().free) for leaf in self.leaves().values())

    @property
    def num_fixed_params(self) -> int:
        """Number of fixed parameters."""
        return self.num_params - self.num_free_params

    @property
    def free_param_index(self) -> list[int]:
        """Positions of the free parameters among all."""
        return self.parameter_entries().free_index

    @property
    def fixed_param_index(self) -> list[int]:
        """Positions of the fixed parameters among all."""
        return self.parameter_entries().fixed_index

    @property
    def param_defaults(self) -> dict[str, Tensor]:
        """Present untransformed values by name."""
        return {e.name: e.tensor.detach() for e in self._entries()}

    @property
    def free_param_defaults(self) -> dict[str, Tensor]:
        """Present untransformed values of the free parameters."""
        return {e.name: e.tensor.detach() for e in self._entries() if e.free}

    @property
    def fixed_param_defaults(self) -> dict[str, Tensor]:
        """Untransformed values of the fixed parameters."""
        return {e.name: e.tensor.detach() for e in self._entries() if not e.free}

    @property
    def param_trans(self) -> dict[str, Transform]:
        """Transforms by parameter name."""
        return {e.name: e.trans for e in self._entries()}

    @property
    def free_param_trans(self) -> dict[str, Transform]:
        """Transforms of the free parameters."""
        return {e.name: e.trans for e in self._entries() if e.free}

    @property
    def fixed_param_trans(self) -> dict[str, Transform]:
        """Transforms of the fixed parameters."""
        return {e.name: e.trans for e in self._entries() if not e.free}


class _Specs(Spec):
    """All specifications of a tree."""
