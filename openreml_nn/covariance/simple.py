"""Matrices from a user's function, and matrices in other parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from openreml_nn.covariance.matrix import FreeParams, Matrix
from openreml_nn.covariance.nodes import is_opaque
from openreml_nn.covariance.params import check_spec, free_specs
from openreml_nn.covariance.transform import TransformIdentity
from openreml_nn.covariance.tree import Tree
from openreml_nn.support.checks import check_count
from openreml_nn.support.errors import InputError

__all__ = ["Adapter", "SimpleMatrix"]


class SimpleMatrix(Matrix):
    r"""A matrix given by a function of its parameters.

    =========== ========= =======
    parameter   transform default
    =========== ========= =======
    ``theta_i`` identity  0
    =========== ========= =======

    For transforms and fixed parameters subclass :class:`Matrix`.

    Args:
        num_free_params: number of parameters.
        call: maps the parameters, a 1-D tensor, to the matrix, by
            differentiable operations of torch.
        manual_grad: maps the parameters to ``(jacobian, names)``, the closed
            form; by default the gradient is autograd's.
        default: tensor of shape (1,), the default of every parameter.

    Shape:
        Output: that of ``call``, found by calling it once.

    Raises:
        TypeError: if ``call`` is not callable.
        InputError: if ``num_free_params`` is not positive or ``call`` does not
            yield a 2-D tensor.

    >>> V = SimpleMatrix(2, torch.diag, default=torch.tensor([1.0]))
    >>> V(torch.tensor([2.0, 3.0]))
    tensor([[2., 0.],
            [0., 3.]])
    >>> V.param_names
    ['theta_0', 'theta_1']
    """

    def __init__(
        self,
        num_free_params: int,
        call: Callable[[Tensor], Tensor],
        manual_grad: Callable[[Tensor], tuple[Tensor, list[str]]] | None = None,
        default: Tensor | None = None,
    ) -> None:
        if not callable(call):
            raise TypeError(f"`call` is a {type(call).__name__}: expected a function")
        if manual_grad is not None and not callable(manual_grad):
            raise TypeError(f"`manual_grad` is a {type(manual_grad).__name__}: expected a function")
        num_free_params = check_count("num_free_params", num_free_params, 1)
        specs = free_specs([f"theta_{i}" for i in range(num_free_params)])
        if default is not None:
            specs = {name: {**spec, "default": default} for name, spec in specs.items()}
            check_spec("theta_0", specs["theta_0"])
        start = torch.cat([spec["default"] for spec in specs.values()])
        with torch.no_grad():
            made = call(start)
        if not isinstance(made, Tensor) or made.dim() != 2:
            got = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
            raise InputError(f"`call` yields {got}: expected a 2-D tensor")
        super().__init__(tuple(made.shape), specs)
        self._call = call
        self._manual = manual_grad

    def forward(self, free_params: FreeParams = None) -> Tensor:
        return self._call(self.build_params(free_params))

    def has_closed_form(self) -> bool:
        return self._manual is not None

    def manual_grad(self, free_params: FreeParams = None) -> tuple[Tensor | None, list[str]]:
        if self._manual is None:
            return super().manual_grad(free_params)
        jacobian, _ = self._manual(self.build_params(free_params))
        return self.free_grad(jacobian, free_params)


class Adapter(Matrix):
    r"""A matrix in other parameters, :math:`V(\theta) = A(f(\theta))`.

    Args:
        adaptee: the matrix A. Its free parameters are no part of the adapter,
            which computes them; its tensors, networks and fixed parameters are.
        param_specs: specifications of :math:`\theta`, with identity transforms.
        param_map: f, from :math:`\theta`, a 1-D tensor (fixed parameters among
            them), to the untransformed free parameters of ``adaptee``.

    Shape:
        Output: that of ``adaptee``.

    Raises:
        InputError: if a transform is not the identity.
        TypeError: if ``adaptee`` is no Matrix.

    >>> from openreml_nn.covariance import DiagonalMatrix
    >>> log_sd = {"fixed": False, "default": torch.zeros(1), "trans": TransformIdentity()}
    >>> V = Adapter(DiagonalMatrix(2), {"log_sd": log_sd}, lambda theta: theta.expand(2))
    >>> V(torch.tensor([0.5]))
    tensor([[2.7183, 0.0000],
            [0.0000, 2.7183]])
    """

    def __init__(
        self,
        adaptee: Matrix,
        param_specs: Mapping[str, Mapping[str, Any]],
        param_map: Callable[[Tensor], Tensor],
    ) -> None:
        if not isinstance(adaptee, Matrix):
            raise TypeError(f"`adaptee` is a {type(adaptee).__name__}: expected a Matrix")
        if not callable(param_map):
            raise TypeError(f"`param_map` is a {type(param_map).__name__}: expected a function")
        super().__init__(adaptee.shape, param_specs)
        if not param_specs:
            raise InputError("`param_specs` is empty: an Adapter has at least one parameter")
        for name, trans in self.param_trans.items():
            if not isinstance(trans, TransformIdentity):
                raise InputError(f"'trans' of {name!r} is {trans!r}: an Adapter needs the identity")
        self.adaptee = _hollow(adaptee, {})
        self.param_map = param_map

    def _mapped(self, free_params: FreeParams) -> Tensor:
        return self.param_map(self.build_params(free_params, trans=False))

    def forward(self, free_params: FreeParams = None) -> Tensor:
        return self.adaptee(self._mapped(free_params))

    def has_closed_form(self) -> bool:
        return not is_opaque(self.adaptee) and Tree(self.adaptee).closed[-1]

    def manual_grad(self, free_params: FreeParams = None) -> tuple[Tensor | None, list[str]]:
        theta = self.flat_params(free_params)
        if not theta.numel():
            return None, []
        inner, _ = self.adaptee.grad(self._mapped(theta))
        if inner is None:
            return theta.new_zeros(theta.numel(), *self.shape), self.free_param_names
        outer = torch.func.jacrev(self._mapped)(theta)  # (adaptee's, ours)
        return torch.tensordot(outer.mT, inner, dims=1), self.free_param_names

    def manual_vjp(self, cotangent: Tensor, free_params: FreeParams = None) -> Tensor:
        self.check_cotangent(cotangent)
        if not self.has_closed_form():
            return super().manual_vjp(cotangent, free_params)
        mapped, pull, *_ = torch.func.vjp(self._mapped, self.flat_params(free_params))
        return pull(self.adaptee.manual_vjp(cotangent, mapped))[0]

    @property
    def repr_dict(self) -> dict[str, Any]:
        return {"adaptee": self.adaptee, "param_specs": dict(self.param_specs)}


def _hollow(matrix: Matrix, made: dict[int, Matrix]) -> Matrix:
    """A matrix of this class without values of its own for its free parameters.

    Its other tensors and modules are those of the original. A module in two
    places stays one.
    """
    if id(matrix) not in made:
        found = made[id(matrix)] = matrix.__new__(type(matrix))
        found.__dict__.update(matrix.__dict__)
        own = {n: None if n in matrix.own_trans else p for n, p in matrix._parameters.items()}
        found.__dict__["_parameters"] = own
        found.__dict__["_buffers"] = dict(matrix._buffers)
        found.__dict__["_modules"] = {
            name: _hollow(module, made) if isinstance(module, Matrix) else module
            for name, module in matrix._modules.items()
        }
    return made[id(matrix)]
