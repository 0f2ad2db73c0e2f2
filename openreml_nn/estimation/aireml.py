"""Average-information REML as an optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from openreml_nn.estimation.closure import depends_on, refuse_unexplained, watched, weights_in
from openreml_nn.estimation.coordinates import Coordinates
from openreml_nn.estimation.curvature import Curvature
from openreml_nn.estimation.past import Past
from openreml_nn.estimation.step import Step, average_information_step
from openreml_nn.likelihood.loss import Objective, listen
from openreml_nn.support.checks import check_number
from openreml_nn.support.checks import found as described

__all__ = ["AIREML", "Coordinates", "Curvature", "Past", "Step", "average_information_step"]


class AIREML(torch.optim.Optimizer):
    r"""Safeguarded average-information steps on covariance parameters.

    A step maximises the likelihoods in the value that its closure returns, or whose backward
    ran within the closure, each with the weight that it has there, over the parameters that
    the optimizer was handed. What the closure evaluates beside that, such as a loss on
    held-out data, does not count. It moves in coordinates in which a variance of zero and a
    correlation of one are ordinary points, by

    .. math::
        u \leftarrow u + (|H| + \lambda D)^{-1} g

    with g the score, H the :class:`Curvature`, :math:`|H|` the same with its eigenvalues made
    positive, and :math:`\lambda` zero, or so large that the likelihood does not fall.
    A coordinate whose step ends at or beyond a boundary is also tried on it, and
    leaves it again where the likelihood rises from there.

    Args:
        params: parameters, or groups of them. Those of designs and of networks in the
            covariance are among them; the others that the likelihood depends on are constants.
        tolerance: score norm (in standard errors) that counts as converged.

    Attributes:
        last: the last :class:`Step`, None before the first.

    Raises:
        RuntimeError: by :meth:`step`, if no REMLLoss is in the value that the closure returns,
            its value depends on the parameters in another way too, or
            none of the parameters belongs to a covariance in it.

    Reference:
        Gilmour, Thompson and Cullis, Biometrics 51 (1995) 1440; Johnson and
        Thompson, Journal of Dairy Science 78 (1995) 449.

    >>> from openreml_nn.covariance import ScalarMatrix
    >>> from openreml_nn.likelihood import REMLLoss
    >>> loss = REMLLoss(ScalarMatrix(4).double())
    >>> y, X = torch.tensor([1.0, 2.0, 4.0, 5.0]).double(), torch.ones(4, 1).double()
    >>> optimizer = AIREML(loss.parameters())
    >>> while not (optimizer.last and optimizer.last.converged):
    ...     value = optimizer.step(lambda: loss(y, X))
    >>> f"{loss.covariance.build_params().item():.4f}"
    '3.3333'
    """

    def __init__(self, params: Iterable[Any], tolerance: float = 1e-6) -> None:
        check_number("tolerance", tolerance, above=0)
        if not isinstance(params, Iterable) or isinstance(params, Tensor | str | bytes | Mapping):
            raise TypeError(
                f"`params` is {described(params)}: expected parameters or groups of them"
            )
        params = list(params)
        if not params or not all(isinstance(p, Tensor | Mapping | tuple) for p in params):
            raise TypeError(
                f"`params` is {described(params)}: expected parameters or groups of them"
            )
        super().__init__(params, {"tolerance": tolerance})
        self.last: Step | None = None

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Evaluate the closure and take one step; returns what the closure returned.

        The closure may also return an :class:`Objective`, a likelihood that is prepared and that
        nothing need evaluate first.

        Args:
            closure: evaluates a loss in which likelihoods of this package take part, without a
                backward pass.

        Raises:
            TypeError: if ``closure`` is no function, or returns no loss.
            RuntimeError: if the loss is no scalar, no parameter is in it, or it depends on parameters
                beside the likelihood, such as by a penalty.
        """
        if not callable(closure):
            raise TypeError(
                f"`closure` is {described(closure)}: expected a function that evaluates the loss"
            )
        owned = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        with torch.enable_grad(), listen() as heard, watched(owned) as gradients:
            value = closure()
            if isinstance(value, Objective):
                tolerance = min(group["tolerance"] for group in self.param_groups)
                self.last = average_information_step([value], owned, tolerance)
                return value
            # To this optimizer a likelihood without a parameter of its own is a constant.
            mine = [h for h in heard if depends_on(h.objective, owned)]
            weights = weights_in(value, mine, owned)
        if not (isinstance(value, Tensor) and value.requires_grad):
            refuse_unexplained(mine, weights, owned, gradients)
        # A loss to be minimised is a likelihood of negative scale to be maximised.
        wanted = [(h.objective, -w * h.scale) for h, w in zip(mine, weights, strict=True) if w]
        if heard and not mine:
            raise RuntimeError("none of AIREML's parameters belongs to a covariance in the loss")
        if not wanted:
            raise RuntimeError(
                "the closure evaluated no REMLLoss that is in the value that it returned: "
                "AIREML needs its likelihood"
            )
        size = max(abs(weight) for _, weight in wanted)
        tolerance = min(group["tolerance"] for group in self.param_groups)
        self.last = average_information_step(
            [objective for objective, _ in wanted],
            owned,
            tolerance,
            [weight / size for _, weight in wanted],
        )
        return value
