"""The base class of every matrix: its evaluation, its gradients and its operators."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from openreml_nn.covariance.calls import called, evaluate
from openreml_nn.covariance.compat import Intermediates
from openreml_nn.covariance.nodes import Kind, TreeNode, differentiated, hooked, is_opaque, is_ours
from openreml_nn.covariance.parametrized import FreeParams, Recorded
from openreml_nn.covariance.params import checked_shape
from openreml_nn.covariance.start import harmonic_mean, rescale
from openreml_nn.support.checks import found
from openreml_nn.support.errors import InputError
from openreml_nn.terms.covariance import DenseCovariance
from openreml_nn.terms.design import IdentityDesign
from openreml_nn.terms.term import Term

__all__ = ["FreeParams", "Matrix", "Recorded", "differentiated", "written"]

_TOO_DEEP = (
    "the tree is too deep to be {}: join nested sums, which are one Sum of many operands, or raise "
    "sys.setrecursionlimit"
)

#: Bytes beyond which a matrix with hooks is not formed for the likelihood.
_MOST_BYTES = 2**31


#: The operator that each sign between matrices makes, written beside the operator's class.
_WRITTEN: dict[str, type[Any]] = {}
_Made = TypeVar("_Made", bound="Matrix")


def written(sign: str) -> Callable[[type[_Made]], type[_Made]]:
    """Decorates the class of operators that ``+``, ``*``, ``@`` or ``.T`` makes of matrices."""

    def keep(operator: type[_Made]) -> type[_Made]:
        _WRITTEN[sign] = operator
        return operator

    return keep


class Matrix(Intermediates, TreeNode):
    r"""A matrix :math:`V(\theta)` as a module.

    A subclass passes its shape and parameter specifications to the
    constructor and writes its formula as :meth:`forward`, starting from
    :meth:`build_params`. That is all it needs. With :meth:`manual_grad` (or
    :meth:`manual_vjp`) it also has a closed-form gradient, which *calling* the
    module wires into backprop; without one, calling it records plain autograd.

    Each free parameter is an ``nn.Parameter`` of shape (1,) registered under its own name, each fixed
    one a buffer. Values are stored on the untransformed scale; the name says what the transform yields.

    A matrix with hooks, or with an operand that has hooks, is called as any module is, and plain
    autograd records it: the hooks run once, on the value, and the gradient is that of what they return.

    Args:
        shape: ``(rows, columns)`` of the matrix.
        param_specs: maps a parameter's name (non-empty, without ``/`` and ``.``) to
            ``{"fixed": bool, "default": tensor of shape (1,), "trans": Transform}``.

    Attributes:
        grad_mode: ``"default"`` uses the closed form where there is one,
            ``"manual"`` insists on it, ``"auto"`` uses plain autograd.

    Raises:
        TypeError: if ``shape`` or ``param_specs`` has the wrong type.
        InputError: if a size is not positive, a name is not allowed or a
            default is not of shape (1,).
    """

    #: A number of NumPy times a matrix is what the matrix says, not an array.
    __array_ufunc__ = None

    def __init__(self, shape: Sequence[int], param_specs: Mapping[str, Mapping[str, Any]]) -> None:
        super().__init__(param_specs)
        self.known_shape = checked_shape(shape)
        self.grad_mode = "default"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix."""
        assert self.known_shape is not None
        return self.known_shape

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
            InputError: if it has the wrong number of dimensions, length or names.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement forward")

    def __call__(self, free_params: FreeParams = None) -> Tensor:
        """Evaluate :meth:`forward`, with the closed-form gradient where there is one."""
        if not is_opaque(self):
            return evaluate(self, free_params)
        try:
            return called(self, free_params, super().__call__)
        except RecursionError:
            raise InputError(_TOO_DEEP.format("called with hooks")) from None

    @classmethod
    def node_kind(cls) -> Kind:
        opaque = cls.__call__ is not Matrix.__call__
        return Kind(operator=False, opaque=opaque, ours=is_ours(cls.forward), closed=True)

    def has_closed_form(self) -> bool:
        """Whether calling it has the gradient in closed form, of itself and of all its operands."""
        cls = type(self)
        return cls.manual_grad is not Matrix.manual_grad or cls.manual_vjp is not Matrix.manual_vjp

    def has_jacobian(self) -> bool:
        """Whether :meth:`manual_grad` is there; that of an operator records operands that have none."""
        return type(self).manual_grad is not Matrix.manual_grad and self.has_closed_form()

    # ------------------------------------------------------------------ gradients

    def grad(self, free_params: FreeParams = None) -> tuple[Tensor | None, list[str]]:
        """Jacobian by :attr:`grad_mode`: see :meth:`manual_grad` and :meth:`auto_grad`."""
        if self.grad_mode not in ("default", "manual", "auto"):
            raise InputError(
                f"`grad_mode` is {self.grad_mode!r}: expected 'default', 'manual' or 'auto'"
            )
        closed = self.grad_mode == "default" and self.has_jacobian() and not hooked(self)
        if closed or self.grad_mode == "manual":
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
        """The Jacobian by reverse-mode automatic differentiation of :meth:`forward`."""
        values = self.flat_params(free_params)
        if not values.numel():
            return None, []
        jacobian = torch.func.jacrev(self.recorded_value)(values)
        return jacobian.movedim(-1, 0), self.free_param_names

    def recorded_value(self, values: Tensor) -> Tensor:
        """The matrix by plain autograd."""
        return self(values) if is_opaque(self) else evaluate(self, values, plain=True)

    def manual_vjp(self, cotangent: Tensor, free_params: FreeParams = None) -> Tensor:
        r"""Pull-back :math:`\bar\theta_i = \langle\bar V, \partial V/\partial\theta_i\rangle`.

        The default contracts with :meth:`manual_grad`; structured classes
        override it so that no Jacobian is formed.

        Args:
            cotangent: :math:`\bar V`, of the matrix's shape.

        Shape:
            Output: ``(num_free_params,)``.
        """
        self.check_cotangent(cotangent)
        jacobian, _ = self.manual_grad(free_params)
        if jacobian is None:
            return cotangent.new_zeros(0)
        return torch.tensordot(jacobian, cotangent, dims=cotangent.dim())

    def check_cotangent(self, cotangent: Tensor) -> None:
        if not isinstance(cotangent, Tensor):
            raise TypeError(f"`cotangent` is {found(cotangent)}: expected a tensor")
        if cotangent.shape != self.shape or not cotangent.is_floating_point():
            raise InputError(
                f"`cotangent` is {cotangent.dtype} of shape {tuple(cotangent.shape)}: expected "
                f"floating-point numbers of shape {self.shape}"
            )

    def push_forward(self, tangent: Tensor, free_params: Tensor) -> Tensor:
        r"""Directional derivative :math:`\dot V = \sum_i \dot\theta_i\,\partial V/\partial\theta_i`."""
        jacobian, _ = self.grad(free_params)
        if jacobian is None:
            return free_params.new_zeros(self.shape)
        return torch.tensordot(tangent, jacobian, dims=1)

    def trans_grad(self, free_params: FreeParams = None) -> Tensor:
        """Derivative of each free parameter's transform, shape ``(num_free_params,)``."""
        return self.transformed_by("grad", self.flat_params(free_params))

    def free_grad(
        self, jacobian: Tensor, free_params: FreeParams
    ) -> tuple[Tensor | None, list[str]]:
        """Turn the Jacobian by all transformed parameters into that by the free ones."""
        arrangement = self.arrangement()
        if not arrangement.free:
            return None, []
        slope = self.trans_grad(free_params)
        kept = jacobian[arrangement.free_index] if arrangement.fixed else jacobian
        return kept * slope.reshape(-1, *[1] * (kept.dim() - 1)), self.free_param_names

    def entries_grad(
        self, places: Sequence[Tensor], free_params: FreeParams
    ) -> tuple[Tensor | None, list[str]]:
        """The Jacobian of entries that are each one parameter's value.

        Args:
            places: where the parameters stand among the entries, row by row,
                (num_params,); several tensors for as many places each, which differ.
        """
        free = self.arrangement().free_index
        if not free:
            return None, []
        slope = self.trans_grad(free_params)
        flat = slope.new_zeros(len(slope), self.shape[0] * self.shape[1])
        # In place where it can be: one pass over a Jacobian that may be large.
        traced = torch._C._functorch.is_functorch_wrapped_tensor(slope)
        for i, place in enumerate(places):
            slopes = slope if not i else slope * (place != places[0])[free]
            index = place[free][:, None]
            add = flat.scatter_add if traced else flat.scatter_add_
            flat = add(1, index, slopes[:, None])
        return flat.reshape(-1, *self.shape), self.free_param_names

    def free_vjp(self, cotangent: Tensor, free_params: FreeParams) -> Tensor:
        """Turn cotangents of all transformed parameters into those of the free ones."""
        arrangement = self.arrangement()
        if arrangement.fixed:
            cotangent = cotangent[arrangement.free_index]
        return cotangent * self.trans_grad(free_params)

    # ------------------------------------------------------------------ structure

    def terms(self, rows: Tensor | None = None, dtype: torch.dtype | None = None) -> list[Term]:
        r"""Lower to terms :math:`V = \sum_t Z_t G_t Z_t^\top` for the likelihood.

        They are those of :meth:`structure`; a matrix with hooks is its value, so that they run.

        Args:
            rows: indices of the rows (and columns) to keep; all by default.
            dtype: in which they are computed, from parameters that are brought to it first, because a
                kernel that was rounded need not be positive semi-definite; by default theirs.

        Raises:
            InputError: if the matrix is not square, or has hooks and is too large to
                be formed.
        """
        if rows is not None:
            self._check_rows(rows)
        if dtype is None:
            return self._lowered(rows)
        with self.computed_in(dtype):  # where a user's formula may yet yield another
            return [term.to(dtype) for term in self._lowered(rows)]

    def _lowered(self, rows: Tensor | None) -> list[Term]:
        if not is_opaque(self):
            try:
                return [term.take(rows) for term in self.structure()]
            except RecursionError:
                raise InputError(_TOO_DEEP.format("lowered to terms")) from None
        if self.shape[0] * self.shape[1] * 8 > _MOST_BYTES:
            raise InputError(
                f"{self._get_name()} with parameters {self.param_names[:3]} has hooks and is "
                f"{self.shape[0]} x {self.shape[1]}: it would have to be formed for them to run; "
                "remove the hooks"
            )
        return [term.take(rows) for term in Matrix.structure(self)]

    def _check_rows(self, rows: Tensor) -> None:
        if not isinstance(rows, Tensor):
            raise TypeError(f"`rows` is {found(rows)}: expected a tensor of integers")
        if rows.dim() != 1 or rows.is_floating_point() or rows.is_complex():
            raise InputError(
                f"`rows` is {rows.dtype} of shape {tuple(rows.shape)}: expected (n,) integers"
            )

    def structure(self) -> list[Term]:
        """The terms of all rows. A matrix that says nothing of its structure is one dense term."""
        if self.shape[0] != self.shape[1]:
            raise InputError(f"{self._get_name()} is {self.shape}: only a square matrix has terms")
        return [Term(IdentityDesign(self.shape[0]), DenseCovariance(self()))]

    def variances(self) -> Tensor:
        """The diagonal, (n,); a class of which that takes less than the matrix overrides it."""
        return self().diagonal()

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
        """Set how far correlation reaches, where it decays with a distance, to `reach` in (0, 1): the
        correlation of neighbours, or the range as a fraction of the typical distance. Returns whether
        such a parameter is there and free; beside other terms its likelihood may have several optima.
        """
        return False

    def coarsen(self) -> bool:
        """Become an approximation of itself that takes less time, with the same parameters; returns
        whether there is one. The first steps of a fit are those of such a copy."""
        return False

    def kinks(self) -> Mapping[str, Tensor]:
        """Values of parameters, in order, at which the first derivative of the matrix jumps, by their
        names; none by default. There the likelihood may have a maximum with a slope on both sides."""
        return {}

    def ends(self) -> bool:
        """Whether correlation ends at a length: the likelihood may have several optima alone too."""
        return False

    @property
    def repr_dict(self) -> dict[str, Any]:
        """What the string representation shows."""
        return {"shape": self.shape, "param_specs": dict(self.param_specs)}

    def extra_repr(self) -> str:
        fixed = self.fixed_param_names if not any(self.children()) else []
        return f"shape={self.shape}" + (f", fixed={fixed}" if fixed else "")

    # ------------------------------------------------------------------ operators

    def __add__(self, other: Matrix | Tensor) -> Matrix:
        return self._operate("+", other)

    def __mul__(self, other: Matrix | Tensor | float) -> Matrix:
        if isinstance(other, Real) and not isinstance(other, bool | np.bool_):
            like = self.reference()
            other = torch.tensor([float(other)], dtype=like.dtype, device=like.device)
        return self._operate("*", other)

    def __matmul__(self, other: Matrix | Tensor) -> Matrix:
        return self._operate("@", other)

    def __radd__(self, other: Tensor) -> Matrix:
        # Sums and entrywise products commute.
        return self + other

    def __rmul__(self, other: Tensor | float) -> Matrix:
        return self * other

    def __rmatmul__(self, other: Tensor) -> Matrix:
        return _WRITTEN["@"](other, self) if isinstance(other, Tensor) else NotImplemented

    @property
    def T(self) -> Matrix:
        """The transpose of the matrix."""
        return _WRITTEN[".T"](self)

    def _operate(self, sign: str, other: Any) -> Any:
        """``self op other``; a chain ``A op B op C`` is one operator of three operands."""
        operator = _WRITTEN[sign]
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

    def map_theta_to_dv(self, theta: FreeParams = None) -> Tensor | None:
        """The Jacobian at ``theta``, ``(num_free_params, *shape)``; None if all is fixed."""
        return self.grad(theta)[0]
