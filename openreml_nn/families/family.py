"""What the likelihood needs to know of a response: its log-density in the linear predictor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from openreml_nn.covariance.parametrized import Parametrized
from openreml_nn.support.errors import InputError

__all__ = ["Family", "refuse_rows"]


class Family(Parametrized):
    r"""The distribution :math:`p(y \mid \eta, \varphi)` of a response given its linear predictor.

    A subclass writes :meth:`log_density` and has a model: derivatives are then had by automatic
    differentiation. With :meth:`derivatives` they are in closed form; with :meth:`kernel` searches take
    less; with :meth:`mean` and
    :meth:`variance` it predicts; with :meth:`deviance` predictions are judged by it; with :meth:`draw`
    and :meth:`cumulative` it simulates and has quantile residuals; with :meth:`check` it refuses
    responses that it cannot have, and with :meth:`start` a fit begins near the data.

    Its own parameters :math:`\varphi` have names, transforms and bounds as those of a matrix have:
    each free one is an ``nn.Parameter`` of shape (1,) under its own name, untransformed.

    Args:
        param_specs: maps a parameter's name to ``{"fixed": bool, "default": tensor of shape (1,),
            "trans": Transform}``; no parameters by default.

    Attributes:
        name: its name in ``family=``.
        link: name of the link :math:`g(\mu) = \eta`.
        has_kernel: whether :meth:`kernel` is that of its density and less than it.

    >>> class Laplace(Family):
    ...     def log_density(self, y, eta):
    ...         return -(y - eta).abs() - torch.log(torch.tensor(2.0))
    >>> Laplace().log_density(torch.zeros(1), torch.zeros(1))
    tensor([-0.6931])
    """

    name: str = ""
    link: str = "identity"
    has_kernel: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # A density of its own has not the formulas of the one whose place it takes.
        own = vars(cls)
        if "log_density" in own or "kernel" in own:
            cls.has_kernel = "kernel" in own
        if "log_density" in own and "derivatives" not in own:
            cls.derivatives = Family.derivatives  # type: ignore[method-assign]

    def __init__(self, param_specs: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        super().__init__({} if param_specs is None else param_specs)

    def log_density(self, y: Tensor, eta: Tensor) -> Tensor:
        r""":math:`\log p(y_i \mid \eta_i)` for each row, all constants included, (n,).

        Args:
            y: the responses, (n,), or (n, 2) successes and failures of a binomial family.
            eta: (n,) linear predictor.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement log_density")

    def kernel(self, y: Tensor, eta: Tensor) -> Tensor:
        r""":meth:`log_density` without terms of which neither :math:`\eta` nor a parameter is part, such
        as factorials of counts, so that a search need not compute them again; by default all of it."""
        return self.log_density(y, eta)

    def derivatives(self, y: Tensor, eta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r"""The first three derivatives of :meth:`log_density` in each row's :math:`\eta_i`, (n,).

        While autograd records they are differentiable in y, :math:`\eta` and the parameters.
        """
        recording = torch.is_grad_enabled()
        with torch.enable_grad():
            x = eta if recording and eta.requires_grad else eta.detach().requires_grad_()
            slope, found = self.log_density(y, x).sum(), []
            for _ in range(3):
                (part,) = (
                    torch.autograd.grad(slope, x, create_graph=True, materialize_grads=True)
                    if slope.requires_grad
                    else (torch.zeros_like(x),)
                )
                found.append(part)
                slope = part.sum()
        first, second, third = found if recording else (part.detach() for part in found)
        return first, second, third

    def mean(self, eta: Tensor) -> Tensor:
        r""":math:`E(y \mid \eta)`, on the scale of the response."""
        raise NotImplementedError(f"{type(self).__name__} does not implement mean")

    def variance(self, eta: Tensor) -> Tensor:
        r""":math:`\mathrm{var}(y \mid \eta)`."""
        raise NotImplementedError(f"{type(self).__name__} does not implement variance")

    def deviance(self, y: Tensor, mean: Tensor) -> Tensor:
        r"""The unit deviance :math:`2\int_\mu^y (y - t) / V(t)\,dt` of each row (n,), 0 at best,
        with V the variance function without its dispersion; the likelihood's in an exponential family.

        Args:
            y: the responses.
            mean: (n,) their means :math:`\mu`, on the scale of the response.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement deviance")

    @property
    def has_deviance(self) -> bool:
        """Whether :meth:`deviance` is there."""
        return type(self).deviance is not Family.deviance

    def draw(self, y: Tensor, eta: Tensor, rng: np.random.Generator) -> Tensor:
        r"""Responses drawn given their linear predictor, for simulation and the parametric bootstrap.

        Args:
            y: responses like those to draw, of which only what is no outcome counts: trials.
            eta: (n,) linear predictor.
            rng: of the random numbers.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement draw")

    def cumulative(self, y: Tensor, eta: Tensor) -> tuple[Tensor, Tensor]:
        r""":math:`P(Y_i < y_i \mid \eta_i)` and :math:`P(Y_i \le y_i \mid \eta_i)`, each (n,), of
        which quantile residuals are made; equal for a continuous response."""
        raise NotImplementedError(f"{type(self).__name__} does not implement cumulative")

    def check(self, y: Tensor, what: str = "`y`") -> None:
        """Refuse responses that the family cannot have.

        Args:
            y: the responses.
            what: what messages call them.

        Raises:
            InputError: if a response is out of range; the message names the first such row.
        """
        if y.dim() != 1:
            raise InputError(f"{what} has shape {tuple(y.shape)}: expected (n,)")
        refuse_rows(y, ~torch.isfinite(y), what, "finite numbers")

    def exact_predictor(self, y: Tensor) -> Tensor | None:
        """The linear predictor (n,) about which responses may lie as closely as they like: the link of
        them; None of a family that has a spread at any parameters."""
        return None

    def start(self, y: Tensor) -> Tensor:
        """Set the free parameters to a rough start and return a linear predictor near the data,
        (n,)."""
        return torch.zeros_like(y)

    def of_rows(self, inputs: Tensor | None) -> Family:
        """The family of rows with inputs of its own: itself, where it takes none.

        Args:
            inputs: (n, k) of the rows, or None.
        """
        self.with_inputs(torch.empty(0), inputs)
        return self

    def with_inputs(self, y: Tensor, inputs: Tensor | None) -> Tensor:
        """Responses with the rows' inputs of the family, as :meth:`log_density` takes both.

        Args:
            y: the responses alone.
            inputs: (n, k), or None.

        Raises:
            InputError: if there are inputs and the family takes none, or none and it does.
        """
        if inputs is not None:
            raise InputError(
                "`batch['zi']` is given but the family is not ZeroInflated: leave it out"
            )
        return y

    def with_weights(self, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor | None]:
        """Responses and the factors of their log-densities, of prior weights (n,), which are these
        factors: a row of weight 2 counts as two rows alike. Of binomial proportions weights are trials:
        they become successes and failures, and no factors.

        Args:
            y: the responses, as :meth:`log_density` takes them or, of a binomial family, proportions.
            weights: (n,), positive.

        Raises:
            InputError: if proportions and trials give no whole successes.
        """
        return y, weights

    def observed(self, y: Tensor) -> Tensor:
        """The responses on the scale of :meth:`mean`, (n,)."""
        return y

    def inputs_of(self, y: Tensor) -> Tensor | None:
        """The inputs among the responses, as :meth:`of_rows` takes them."""
        return None

    @property
    def base(self) -> Family:
        """The family whose linear predictor :math:`\\eta` is: itself, and that of the other responses where
        some are zeros of their own."""
        return self

    def natural(self, name: str, like: Tensor) -> Tensor:
        """One of its own parameters, transformed, (1,), on the dtype and device of ``like``."""
        return self.own_trans[name](self.stored(name).to(like))

    def quantities(self, like: Tensor) -> dict[str, Tensor]:
        """The parameters of the family as tables show them, on the natural scale, by name, (1,)
        each: a differentiable function of what it stores."""
        return {name: self.natural(name, like) for name in self.own_trans}

    def by_parameters(self, given: Mapping[str, Any], option: str) -> dict[str, Any]:
        """What is given for its :meth:`quantities`, by the names of its own parameters.

        Args:
            given: values, ends or names, by name; those of others stay.
            option: what a message calls them.

        Raises:
            InputError: if a quantity is no parameter, and cannot be had by its own.
        """
        return dict(given)

    def extra_repr(self) -> str:
        return f"link={self.link!r}"


def refuse_rows(y: Tensor, bad: Tensor, what: str, expected: str) -> None:
    """Raise an InputError that names the first bad row, if there is one."""
    if bool(bad.any()):
        row = int(bad.reshape(len(y), -1).any(1).nonzero()[0])
        value = y[row].tolist()
        shown = f"{value:.6g}" if isinstance(value, float) else str(value)
        raise InputError(f"{what} is {shown} in row {row}: expected {expected}")
