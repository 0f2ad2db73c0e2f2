"""Matrices from a user's function, and matrices in other parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from openreml_nn.covariance.matrix import FreeParams, Matrix, Recorded
from openreml_nn.covariance.params import free_specs
from openreml_nn.covariance.transform import TransformIdentity

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
        ValueError: if ``num_free_params`` is not positive or ``call`` does not
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
        if num_free_params < 1:
            raise ValueError(f"`num_free_params` is {num_free_params}: expected at least 1")
        specs = free_specs([f"theta_{i}" for i in range(num_free_params)])
        if default is not None:
            specs = {name: {**spec, "default": default} for name, spec in specs.items()}
        start = torch.cat([spec["default"] for spec in specs.values()])
        with torch.no_grad():
            made = call(start)
        if not isinstance(made, Tensor) or made.dim() != 2:
            raise ValueError(f"`call` yields {made!r}: expected a 2-D tensor")
        super().__init__(tuple(made.shape), specs)
        self._call = call
        self._manual = manual_grad

    def forward(self, free_params: FreeParams = None) -> Tensor:
        return self._call(self.build_params(free_params))

    def _has_manual(self) -> bool:
        return self._manual is not None

    def manual_grad(self, free_params: FreeParams = None) -> tuple[Tensor | None, list[str]]:
        if self._manual is None:
            return super().manual_grad(free_params)
        jacobian, _ = self._manual(self.build_params(free_params))
        return self._chain_grad(jacobian, free_params)


class Adapter(Matrix):
    r"""A matrix in other parameters, :math:`V(\theta) = A(f(\theta))`.

    Args:
        adaptee: the matrix A. Its own parameters are not part of the adapter.
        param_specs: specifications of :math:`\theta`, with identity transforms.
        param_map: f, from :math:`\theta`, a 1-D tensor (fixed parameters among
            them), to the untransformed free parameters of ``adaptee``.

    Shape:
        Output: that of ``adaptee``.

    Raises:
        ValueError: if a transform is not the identity.
        TypeError: if ``adaptee`` is no Matrix.

    >>> from openreml_nn.covariance import DiagonalMatrix
    >>> specs = {"log_sd": {"fixed": False, "default": torch.zeros(1), "trans": TransformIdentity()}}
    >>> V = Adapter(DiagonalMatrix(2), specs, lambda theta: theta.expand(2))
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
        super().__init__(adaptee.shape, param_specs)
        for name, trans in self.param_trans.items():
            if not isinstance(trans, TransformIdentity):
                raise ValueError(f"'trans' of {name!r} is {trans!r}: an Adapter needs the identity")
        # In a tuple, so that the adaptee's parameters are not registered as the adapter's.
        self._adaptee = (adaptee,)
        self.param_map = param_map

    @property
    def adaptee(self) -> Matrix:
        """The matrix A."""
        return self._adaptee[0]

    def _apply(self, fn: Any, recurse: bool = True) -> Adapter:
        self.adaptee._apply(fn, recurse)
        super()._apply(fn, recurse)
        return self

    def _mapped(self, free_params: FreeParams) -> Tensor:
        return self.param_map(self.build_params(free_params, trans=False))

    def forward(self, free_params: FreeParams = None) -> Tensor:
        mapped = self._mapped(free_params)
        if isinstance(free_params, Recorded):
            return self.adaptee(Recorded(mapped))
        return self.adaptee(mapped)

    def manual_grad(self, free_params: FreeParams = None) -> tuple[Tensor | None, list[str]]:
        theta = self._flat(free_params)
        if not theta.numel():
            return None, []
        inner, _ = self.adaptee.grad(self._mapped(theta))
        if inner is None:
            return theta.new_zeros(theta.numel(), *self.shape), self.free_param_names
        outer = torch.func.jacrev(self._mapped)(theta)  # (adaptee's, ours)
        return torch.tensordot(outer.mT, inner, dims=1), self.free_param_names

    def manual_vjp(self, cotangent: Tensor, free_params: FreeParams = None) -> Tensor:
        mapped, pull, *_ = torch.func.vjp(self._mapped, self._flat(free_params))
        return pull(self.adaptee.pull_back(cotangent, mapped))[0]

    @property
    def repr_dict(self) -> dict[str, Any]:
        return {"adaptee": self.adaptee, "param_specs": dict(self.param_specs)}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, adaptee={type(self.adaptee).__name__}"
