"""The base class of every matrix: parameters, evaluation and gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from openreml_nn.covariance.autograd import ClosedForm
from openreml_nn.covariance.params import Entry, Layout, check_name, check_spec
from openreml_nn.covariance.start import harmonic_mean, rescale
from openreml_nn.covariance.transform import Transform

if TYPE_CHECKING:
    from openreml_nn.covariance.terms import Term

__all__ = ["FreeParams", "Matrix", "Recorded", "differentiated"]


class Recorded(NamedTuple):
    """Free parameters to be used with plain autograd instead of the closed forms.

    With ``natural`` the values are already transformed: estimation evaluates
    the tree at them, because a variance of zero is an ordinary number on that
    scale but minus infinity before the transform.
    """

    values: Tensor
    natural: bool = False


FreeParams = Tensor | Mapping[str, Tensor] | Recorded | None


class Matrix(nn.Module):
    r"""A matrix :math:`V(\theta)` as a module.

    A subclass passes its shape and parameter specifications to the
    constructor and writes its formula as :meth:`forward`, starting from
    :meth:`build_params`. With :meth:`manual_grad` (or :meth:`manual_vjp`) it
    also has a closed-form gradient, which *calling* the module wires into
    backprop; without one, calling it records plain autograd.

    Each free parameter is an ``nn.Parameter`` of shape (1,) registered under
    its own name, each fixed one a buffer. Values are stored on the
    untransformed scale; the name says what the transform yields.

    Args:
        shape: ``(rows, columns)`` of the matrix.
        param_specs: maps a parameter's name (non-empty, without ``/`` and
            ``.``) to ``{"fixed": bool, "default": tensor of shape (1,),
            "trans": Transform}``.

    Attributes:
        grad_mode: ``"default"`` uses the closed form where there is one,
            ``"manual"`` insists on it, ``"auto"`` uses plain autograd.

    Raises:
        TypeError: if ``shape`` or ``param_specs`` has the wrong type.
        ValueError: if a size is not positive, a name is not allowed or a
            default is not of shape (1,).
    """

    def __init__(self, shape: Sequence[int], param_specs: Mapping[str, Mapping[str, Any]]) -> None:
        super().__init__()
        self._shape = _checked_shape(shape)
        self.grad_mode = "default"
        self._trans: dict[str, Transform] = {}
        self._intermediates: tuple[Tensor, Any] | None = None
        self._layout_kept: Layout | None = None
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
            self._trans[name] = spec["trans"]

    # ------------------------------------------------------------------ evaluation

    def forward(self, free_params: FreeParams = None) -> Tensor:
        """The matrix, recorded by plain autograd. Subclasses implement this.

        Args:
            free_params: nothing (the module's own parameters), a 1-D tensor in
                the order of :attr:`free_param_names`, or a dict by those names.

        Shape:
            Output: :attr:`shape`.

        Raises:
            TypeError: if ``free_params`` is neither a tensor nor a dict.
            ValueError: if it has the wrong number of dimensions, length or names.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement forward")

    def __call__(self, free_params: FreeParams = None) -> Tensor:
        """Evaluate :meth:`forward`, with the closed-form gradient where there is one."""
        if isinstance(free_params, Recorded):
            return super().__call__(free_params)
        values = self._flat(free_params)
        if not values.numel() or not differentiated(values) or not self._closed_form():
            return super().__call__(values)
        return ClosedForm.apply(self, values)

    def _closed_form(self) -> bool:
        if self.grad_mode not in ("default", "manual", "auto"):
            raise ValueError(
                f"`grad_mode` is {self.grad_mode!r}: expected 'default', 'manual' or 'auto'"
            )
        return self.grad_mode != "auto" and self._has_manual() and not self._foreign_gradient()

    def _has_manual(self) -> bool:
        cls = type(self)
        return cls.manual_grad is not Matrix.manual_grad or cls.manual_vjp is not Matrix.manual_vjp

    def _foreign_gradient(self) -> bool:
        """Whether a tensor that is no covariance parameter (a trainable Z) needs a gradient."""
        return any(
            tensor is not None and tensor.requires_grad
            for owner, name in self._others()
            for tensor in (owner[name],)
        )

    def _others(self) -> list[tuple[dict[str, Tensor | None], str]]:
        """Where tensors of the tree that are no covariance parameters stand."""
        layout = self._layout()
        if layout.others is None:
            own = {(id(e.leaf._parameters), e.local) for e in layout.entries}
            own |= {(id(e.leaf._buffers), e.local) for e in layout.entries}
            layout.others = [
                (owner, name)
                for module in self.modules()
                for owner in cast(
                    list[dict[str, Tensor | None]], [module._parameters, module._buffers]
                )
                for name in owner
                if (id(owner), name) not in own
            ]
        return layout.others

    def build_params(
        self,
        free_params: FreeParams = None,
        include_fixed: bool = True,
        trans: bool = True,
        out_format: str = "tensor",
    ) -> Any:
        """Parameters in the order of :attr:`param_names`, fixed ones merged in.

        Args:
            free_params: see :meth:`forward`.
            include_fixed: whether fixed parameters are part of the result.
            trans: whether values are transformed.
            out_format: ``"tensor"`` or ``"dict"`` (name to tensor of shape (1,)).

        Raises:
            ValueError: if ``out_format`` is something else, or as in :meth:`forward`.
        """
        if out_format not in ("tensor", "dict"):
            raise ValueError(f"`out_format` is {out_format!r}: expected 'tensor' or 'dict'")
        layout = self._layout()
        natural = isinstance(free_params, Recorded) and free_params.natural
        values = self._flat(free_params)
        if trans and not natural:
            values = layout.of_free.apply("__call__", values)
        kept = layout.free
        if include_fixed and layout.fixed:
            constants = torch.cat([e.tensor for e in layout.fixed]).to(values)
            if trans:
                constants = layout.of_fixed.apply("__call__", constants)
            assert layout.merged is not None
            values = torch.cat([values, constants])[layout.merged]
            kept = layout.entries
        if out_format == "tensor":
            return values
        return dict(zip([e.name for e in kept], values.split(1), strict=True)) if kept else {}

    # ------------------------------------------------------------------ gradients

    def grad(self, free_params: FreeParams = None) -> tuple[Tensor | None, list[str]]:
        """Jacobian by :attr:`grad_mode`: see :meth:`manual_grad` and :meth:`auto_grad`."""
        if self._closed_form() or self.grad_mode == "manual":
            return self.manual_grad(free_params)
        return self.auto_grad(free_params)

    def manual_grad(self, free_params: FreeParams = None) -> tuple[Tensor | None, list[str]]:
        """Closed-form Jacobian with respect to the untransformed free parameters.

        Returns:
            ``(jacobian, names)`` with the Jacobian of shape
            ``(num_free_params, *shape)``; ``(None, [])`` if all is fixed.

        Raises:
            NotImplementedError: if the class has no closed form.
        """
        raise NotImplementedError(f"{type(self).__name__} has no closed-form gradient")

    def auto_grad(self, free_params: FreeParams = None) -> tuple[Tensor | None, list[str]]:
        """The same Jacobian by reverse-mode automatic differentiation of :meth:`forward`."""
        if not self.num_free_params:
            return None, []
        values = self._flat(free_params)
        jacobian = torch.func.jacrev(lambda x: self(Recorded(x)))(values)
        return jacobian.movedim(-1, 0), self.free_param_names

    def manual_vjp(self, cotangent: Tensor, free_params: FreeParams = None) -> Tensor:
        r"""Pull-back :math:`\bar\theta_i = \langle\bar V, \partial V/\partial\theta_i\rangle`.

        The default contracts with :meth:`manual_grad`; structured classes
        override it so that no Jacobian is formed.

        Args:
            cotangent: :math:`\bar V`, of the matrix's shape.

        Shape:
            Output: ``(num_free_params,)``.
        """
        jacobian, _ = self.manual_grad(free_params)
        if jacobian is None:
            return cotangent.new_zeros(0)
        return torch.tensordot(jacobian, cotangent, dims=cotangent.dim())

    def pull_back(self, cotangent: Tensor, free_params: Tensor) -> Tensor:
        """:meth:`manual_vjp` where there is a closed form, else autograd's."""
        if not free_params.numel():
            return free_params
        if self._closed_form():
            return self.manual_vjp(cotangent, free_params)
        _, pull, *_ = torch.func.vjp(lambda x: self(Recorded(x)), free_params)
        return pull(cotangent)[0]

    def push_forward(self, tangent: Tensor, free_params: Tensor) -> Tensor:
        r"""Directional derivative :math:`\dot V = \sum_i \dot\theta_i\,\partial V/\partial\theta_i`."""
        jacobian, _ = self.grad(free_params)
        if jacobian is None:
            return free_params.new_zeros(self.shape)
        return torch.tensordot(tangent, jacobian, dims=1)

    def trans_grad(self, free_params: FreeParams = None) -> Tensor:
        """Derivative of each free parameter's transform, shape ``(num_free_params,)``."""
        return self._layout().of_free.apply("grad", self._flat(free_params))

    def _chain_grad(
        self, jacobian: Tensor, free_params: FreeParams
    ) -> tuple[Tensor | None, list[str]]:
        """From the Jacobian in all transformed parameters to that in the free ones."""
        if not self.num_free_params:
            return None, []
        slope = self.trans_grad(free_params)
        kept = jacobian[self.free_param_index] if self.num_fixed_params else jacobian
        return kept * slope.reshape(-1, *[1] * (kept.dim() - 1)), self.free_param_names

    def _spread_grad(
        self, places: Sequence[Tensor], free_params: FreeParams
    ) -> tuple[Tensor | None, list[str]]:
        """The Jacobian of entries that are each one parameter's value.

        Args:
            places: where the parameters stand among the entries, row by row,
                (num_params,); several tensors for as many places each.
        """
        if not self.num_free_params:
            return None, []
        slope = self.trans_grad(free_params)
        index = torch.stack([place[self.free_param_index] for place in places], 1)
        slopes = slope[:, None].expand_as(index)
        flat = slope.new_zeros(len(slope), self.shape[0] * self.shape[1])
        # In place where it can be: one pass over a Jacobian that may be large.
        traced = torch._C._functorch.is_functorch_wrapped_tensor(slope)
        flat = flat.scatter(1, index, slopes) if traced else flat.scatter_(1, index, slopes)
        return flat.reshape(-1, *self.shape), self.free_param_names

    def _chain_vjp(self, cotangent: Tensor, free_params: FreeParams) -> Tensor:
        """From cotangents of all transformed parameters to those of the free ones."""
        if self.num_fixed_params:
            cotangent = cotangent[self.free_param_index]
        return cotangent * self.trans_grad(free_params)

    # ------------------------------------------------------------------ structure

    def terms(self, rows: Tensor | None = None, free_params: FreeParams = None) -> list[Term]:
        r"""Lower to terms :math:`V = \sum_t Z_t G_t Z_t^\top` for the likelihood.

        A matrix that says nothing of its structure is one dense term.

        Args:
            rows: indices of the rows (and columns) to keep; all by default.
            free_params: see :meth:`forward`.
        """
        from openreml_nn.covariance.design import IdentityDesign
        from openreml_nn.covariance.terms import DenseCovariance, Term

        if self.shape[0] != self.shape[1]:
            raise ValueError(f"{self._get_name()} is {self.shape}: only a square matrix has terms")
        whole = Term(IdentityDesign(self.shape[0]), DenseCovariance(self(free_params)))
        return [whole.take(rows)]

    # ------------------------------------------------------------------ estimation

    def moment_start(self, variance: Tensor) -> bool:
        """Set the free parameters to a rough start for estimation.

        Afterwards the diagonal is about ``variance``, shape ``(rows,)``, and
        correlations are zero. A class that does not say how is multiplied by a
        number.

        Returns:
            Whether the matrix has a free scale, so that it could follow the units.
        """
        return rescale(self, float(harmonic_mean(variance)))

    def start_reach(self, reach: float) -> bool:
        """Set how far correlation reaches, for a matrix in which it decays with a distance.

        Beside other terms the likelihood of such a matrix may have several
        optima, and a fit starts from several reaches.

        Args:
            reach: the correlation of neighbours, or the range as a fraction of
                the typical distance; between 0 and 1.

        Returns:
            Whether there is such a parameter, and it is free.
        """
        return False

    def canonical(self, coordinates: dict[str, float]) -> dict[str, float]:
        """Equivalent coordinates (see :class:`Transform`) that the parameters can hold.

        Args:
            coordinates: by local name, those of the free parameters that are
                being estimated, perhaps beyond their bounds.
        """
        return {name: self._trans[name].fold(u) for name, u in coordinates.items()}

    def _set(self, name: str, value: Tensor) -> bool:
        """Set a parameter, if it is free, to what its transform shall yield; whether it is."""
        parameter = self._parameters.get(name)
        if parameter is None or not parameter.requires_grad:
            return False
        with torch.no_grad():
            parameter.copy_(self._trans[name].inverse(value.detach().reshape(1)))
        return True

    # ------------------------------------------------------------------ parameters

    def fix(self, name: str, value: float | Tensor | None = None) -> Matrix:
        """Make a parameter fixed, optionally at ``value`` (untransformed); returns ``self``."""
        entry = self._entry(name)
        with torch.no_grad():
            old = entry.tensor.detach().clone()
            if value is not None:
                old.copy_(torch.as_tensor(value, dtype=old.dtype).reshape(1))
        entry.leaf._parameters.pop(entry.local, None)
        entry.leaf._buffers[entry.local] = old
        Layout.changes += 1
        return self

    def free(self, name: str) -> Matrix:
        """Make a fixed parameter free, from its present value; returns ``self``."""
        entry = self._entry(name)
        if not entry.free:
            value = entry.leaf._buffers.pop(entry.local)
            assert value is not None
            entry.leaf._parameters[entry.local] = nn.Parameter(value)
            Layout.changes += 1
        return self

    def _entry(self, name: str) -> Entry:
        for entry in self._layout().entries:
            if entry.name == name:
                return entry
        raise ValueError(f"`name` is {name!r}: expected one of {self.param_names}")

    def _entries(self) -> list[Entry]:
        """All parameters, each once, in the order of :attr:`param_names`."""
        return [Entry(name, self, name) for name in self._trans]

    def _layout(self) -> Layout:
        """What :meth:`_entries` says, kept until a parameter is fixed or freed."""
        if self._layout_kept is None or self._layout_kept.made != Layout.changes:
            self._layout_kept = Layout(self._entries())
        return self._layout_kept

    def __getstate__(self) -> dict[str, Any]:
        # A layout belongs to these very modules; a copy makes its own.
        return {**self.__dict__, "_layout_kept": None}

    def _flat(self, free_params: FreeParams) -> Tensor:
        """Free parameters as a checked 1-D tensor in the order of :attr:`free_param_names`."""
        if isinstance(free_params, Recorded):
            return free_params.values
        layout = self._layout()
        if isinstance(free_params, Tensor):
            if free_params.dim() != 1 or free_params.shape[0] != len(layout.free):
                raise ValueError(
                    f"`free_params` has shape {tuple(free_params.shape)}: expected "
                    f"({len(layout.free)},), one number for each of {layout.free_names}"
                )
            return free_params
        if free_params is None:
            parts = [e.tensor for e in layout.free]
        elif isinstance(free_params, Mapping):
            names = layout.free_names
            missing = [name for name in names if name not in free_params]
            unexpected = [name for name in free_params if name not in names]
            if missing or unexpected:
                raise ValueError(
                    f"`free_params` lacks {missing} and has unexpected {unexpected}: "
                    f"expected exactly {names}"
                )
            parts = [free_params[name].reshape(1) for name in names]
        else:
            raise TypeError(
                f"`free_params` is a {type(free_params).__name__}: expected a tensor or a dict"
            )
        return torch.cat(parts) if parts else self._no_params()

    def _no_params(self) -> Tensor:
        like = self._reference()
        return torch.empty(0, dtype=like.dtype, device=like.device)

    def _reference(self) -> Tensor:
        """A tensor whose dtype and device an evaluation without free parameters follows."""
        for tensor in (*self.parameters(), *self.buffers()):
            if tensor.is_floating_point():
                return tensor
        return torch.empty(0)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix."""
        return self._shape

    @property
    def param_specs(self) -> Mapping[str, Mapping[str, Any]]:
        """Read-only view of the specifications; change them by :meth:`fix` and :meth:`free`."""
        return MappingProxyType(
            {
                e.name: MappingProxyType(
                    {"fixed": not e.free, "default": e.tensor.detach(), "trans": e.trans}
                )
                for e in self._layout().entries
            }
        )

    @property
    def param_names(self) -> list[str]:
        """Names of all parameters."""
        return [e.name for e in self._layout().entries]

    @property
    def free_param_names(self) -> list[str]:
        """Names of the free parameters."""
        return list(self._layout().free_names)

    @property
    def fixed_param_names(self) -> list[str]:
        """Names of the fixed parameters."""
        return [e.name for e in self._layout().fixed]

    @property
    def num_params(self) -> int:
        """Number of parameters."""
        return len(self._layout().entries)

    @property
    def num_free_params(self) -> int:
        """Number of free parameters."""
        return len(self._layout().free)

    @property
    def num_fixed_params(self) -> int:
        """Number of fixed parameters."""
        return len(self._layout().fixed)

    @property
    def free_param_index(self) -> list[int]:
        """Positions of the free parameters among all."""
        return list(self._layout().free_index)

    @property
    def fixed_param_index(self) -> list[int]:
        """Positions of the fixed parameters among all."""
        return list(self._layout().fixed_index)

    @property
    def param_defaults(self) -> dict[str, Tensor]:
        """Present untransformed values by name."""
        return {e.name: e.tensor.detach() for e in self._layout().entries}

    @property
    def free_param_defaults(self) -> dict[str, Tensor]:
        """Present untransformed values of the free parameters."""
        return {e.name: e.tensor.detach() for e in self._layout().free}

    @property
    def fixed_param_defaults(self) -> dict[str, Tensor]:
        """Untransformed values of the fixed parameters."""
        return {e.name: e.tensor.detach() for e in self._layout().fixed}

    @property
    def param_trans(self) -> dict[str, Transform]:
        """Transforms by parameter name."""
        return {e.name: e.trans for e in self._layout().entries}

    @property
    def free_param_trans(self) -> dict[str, Transform]:
        """Transforms of the free parameters."""
        return {e.name: e.trans for e in self._layout().free}

    @property
    def fixed_param_trans(self) -> dict[str, Transform]:
        """Transforms of the fixed parameters."""
        return {e.name: e.trans for e in self._layout().fixed}

    @property
    def repr_dict(self) -> dict[str, Any]:
        """What the string representation shows."""
        return {"shape": self.shape, "param_specs": dict(self.param_specs)}

    def extra_repr(self) -> str:
        fixed = self.fixed_param_names if not any(self.children()) else []
        return f"shape={self.shape}" + (f", fixed={fixed}" if fixed else "")

    # ------------------------------------------------------------------ operators

    def __add__(self, other: Matrix | Tensor) -> Matrix:
        from openreml_nn.covariance.sum import Sum

        return self._operate(Sum, other)

    def __mul__(self, other: Matrix | Tensor) -> Matrix:
        from openreml_nn.covariance.product import HadamardProduct

        return self._operate(HadamardProduct, other)

    def __matmul__(self, other: Matrix | Tensor) -> Matrix:
        from openreml_nn.covariance.product import Product

        return self._operate(Product, other)

    def __radd__(self, other: Tensor) -> Matrix:
        # Sums and entrywise products commute.
        return self + other

    def __rmul__(self, other: Tensor) -> Matrix:
        return self * other

    def __rmatmul__(self, other: Tensor) -> Matrix:
        from openreml_nn.covariance.product import Product

        return Product(other, self) if isinstance(other, Tensor) else NotImplemented

    @property
    def T(self) -> Matrix:
        """Its transpose."""
        from openreml_nn.covariance.product import Transpose

        return Transpose(self)

    def _operate(self, operator: Any, other: Matrix | Tensor) -> Any:
        """``self op other``; a chain ``A op B op C`` is one operator of three operands."""
        if not isinstance(other, Matrix | Tensor):
            return NotImplemented
        operands: list[Matrix | Tensor] = [self]
        if type(self) is operator:
            named: Mapping[str, Matrix | Tensor] = self.operands  # type: ignore[assignment]
            if list(named) == [f"op_{i}" for i in range(len(named))]:
                operands = list(named.values())
        return operator(*operands, other)

    # ------------------------------------------------------------------ names of the original

    def map_theta_to_v(self, theta: FreeParams = None) -> Tensor:
        """The matrix at ``theta``; the same as calling the module."""
        return self(theta)

    def map_theta_to_dv(self, theta: FreeParams = None) -> tuple[Tensor | None, list[str]]:
        """The Jacobian at ``theta``; the same as :meth:`grad`."""
        return self.grad(theta)

    def set_intermediates(self, params: Tensor, intermediates: Any) -> None:
        """Keep a by-product of an evaluation, to be had again at exactly these parameters.

        Nothing is kept while autograd records or a ``torch.func`` transform
        runs: a kept graph would be freed by the first backward.
        """
        traced = torch._C._functorch.is_functorch_wrapped_tensor(params)
        if traced or (params.requires_grad and torch.is_grad_enabled()) or not params.numel():
            return
        self._intermediates = (params.detach().clone(), intermediates)

    def get_intermediates(self, params: Tensor) -> Any:
        """What :meth:`set_intermediates` kept at these parameters, dtype and device, or None."""
        if self._intermediates is None or torch._C._functorch.is_functorch_wrapped_tensor(params):
            return None
        key, kept = self._intermediates
        same = key.dtype == params.dtype and key.device == params.device
        return kept if same and torch.equal(key, params.detach()) else None

    def reset_intermediates(self) -> None:
        """Forget what :meth:`set_intermediates` kept."""
        self._intermediates = None


def differentiated(values: Tensor) -> bool:
    """Whether anything records what is done to ``values``."""
    return (
        (values.requires_grad and torch.is_grad_enabled())
        or torch._C._functorch.is_functorch_wrapped_tensor(values)
        or forward_ad._current_level >= 0
    )


def _checked_shape(shape: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(shape, Sequence):
        raise TypeError(f"`shape` is a {type(shape).__name__}: expected a tuple of ints")
    for size in shape:
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"`shape` holds {size!r}: expected ints")
        if size < 1:
            raise ValueError(f"`shape` is {tuple(shape)}: sizes must be positive")
    return tuple(shape)
