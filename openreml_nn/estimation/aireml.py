"""Average-information REML as an optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import inf, isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor

from openreml_nn.estimation.coordinates import Coordinates
from openreml_nn.estimation.curvature import Curvature
from openreml_nn.likelihood.loss import Heard, Objective, listen
from openreml_nn.likelihood.problem import NotPositiveDefiniteError
from openreml_nn.support.checks import check_number
from openreml_nn.support.checks import found as described
from openreml_nn.support.errors import NumericalError

__all__ = ["AIREML", "Coordinates", "Curvature", "Past", "Step", "average_information_step"]


#: The curvature is learned from steps within this many standard errors, squared.
_NEAR = 0.01


class Step(NamedTuple):
    r"""What a step of :class:`AIREML` saw and did.

    Attributes:
        log_likelihood: at the end of the step.
        score_norm: :math:`\sqrt{g^\top H^{-1} g}` at its start, the distance to
            the optimum in standard errors.
        length: accepted fraction of the full step; 0 where none was taken.
        condition: condition number of the scaled curvature H.
        converged: whether ``score_norm`` is below the tolerance, so that no
            step was needed.
    """

    log_likelihood: float
    score_norm: float
    length: float
    condition: float
    converged: bool


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
        """
        if not callable(closure):
            raise TypeError(
                f"`closure` is {described(closure)}: expected a function that evaluates the loss"
            )
        owned = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        with torch.enable_grad(), listen() as heard, _watched(owned) as gradients:
            value = closure()
            if isinstance(value, Objective):
                tolerance = min(group["tolerance"] for group in self.param_groups)
                self.last = average_information_step([value], owned, tolerance)
                return value
            # To this optimizer a likelihood without a parameter of its own is a constant.
            mine = [h for h in heard if _shares(h.objective, owned)]
            weights = _weights(value, mine, owned)
        if not (isinstance(value, Tensor) and value.requires_grad):
            _refuse_unexplained(mine, weights, owned, gradients)
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


def _shares(objective: Objective, owned: Sequence[Tensor]) -> bool:
    """Whether any of the parameters belongs to the covariance."""
    mine = {id(p) for p in owned}
    return any(id(p) in mine for p in objective.covariance.parameters())


def _weights(value: Any, heard: Sequence[Heard], owned: Sequence[Tensor]) -> list[float]:
    """The factor with which each loss is in the value, or was in a backward of the closure."""
    weights = [h.pulled or 0.0 for h in heard]
    if not (isinstance(value, Tensor) and value.requires_grad):
        return weights
    # What a backward has been through needs no second one, for which its graph may be gone.
    inside = [i for i in _losses_in(value, heard, owned) if heard[i].pulled is None]
    if not inside:
        return weights
    if value.numel() != 1:
        raise RuntimeError(f"the closure returned shape {tuple(value.shape)}: expected a scalar")
    found = torch.autograd.grad(value, [heard[i].value for i in inside], retain_graph=True)
    for i, part in zip(inside, found, strict=True):
        weights[i] = float(part)
    return weights


_BESIDE = (
    "the value that the closure returned depends on parameters of AIREML beside the "
    "likelihood: a penalty takes an optimizer of torch, such as LBFGS"
)


def _losses_in(value: Tensor, heard: Sequence[Heard], owned: Sequence[Tensor]) -> list[int]:
    """Positions of the losses that the value was computed from.

    Raises:
        RuntimeError: if autograd reaches a parameter from the value by a way that avoids them.
    """
    mine = {id(p) for p in owned}
    losses = {h.value.grad_fn: i for i, h in enumerate(heard)}
    found: list[int] = []
    seen: set[Any] = set()
    stack = [value.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in losses:
            found.append(losses[node])
            continue
        if id(getattr(node, "variable", None)) in mine:
            raise RuntimeError(_BESIDE)
        stack += [further for further, _ in node.next_functions]
    return found


@contextmanager
def _watched(owned: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Gradients of parameters as backward passes find them, before anything is done to them."""
    gradients = [torch.zeros_like(p) for p in owned]

    def watch(i: int) -> Callable[[Tensor], None]:
        def see(gradient: Tensor) -> None:
            gradients[i] = gradients[i] + gradient.detach()

        return see

    handles = [p.register_hook(watch(i)) for i, p in enumerate(owned)]
    try:
        yield gradients
    finally:
        for handle in handles:
            handle.remove()


def _refuse_unexplained(
    heard: Sequence[Heard],
    weights: Sequence[float],
    owned: Sequence[Tensor],
    gradients: Sequence[Tensor],
) -> None:
    """Raise if the gradients of a backward are not those of the losses in it.

    Where the closure returns a value without a graph, this is what tells of a penalty.
    """
    expected = [torch.zeros_like(p) for p in owned]
    noise = 0.0
    for h, weight in zip(heard, weights, strict=True):
        if not weight:
            continue
        parts = h.objective.gradient(owned)
        noise += abs(weight * h.scale) * h.objective.problem.n
        expected = [e + weight * h.scale * part for e, part in zip(expected, parts, strict=True)]
    for found, wanted in zip(gradients, expected, strict=True):
        eps = torch.finfo(found.dtype).eps
        room = eps**0.5 * (found.abs() + wanted.abs()) + 1e3 * eps * noise
        if bool(((found - wanted).abs() > room).any()):
            raise RuntimeError(_BESIDE)


def average_information_step(
    objectives: Sequence[Objective],
    parameters: Sequence[Tensor] | None = None,
    tolerance: float = 1e-6,
    weights: Sequence[float] | None = None,
    past: Past | None = None,
) -> Step:
    """The step of :class:`AIREML` on some likelihoods.

    A fit calls this and not the optimizer, because making any
    ``torch.optim.Optimizer`` imports torch's compiler, which takes longer than
    many a fit.

    Args:
        objectives: the likelihoods.
        parameters: those to move; all that require a gradient if None.
        tolerance: score norm that counts as converged.
        weights: what each log-likelihood is multiplied by; 1 by default.
        past: the steps before this one on the same likelihoods, from which the
            curvature is learned; None where the data may have moved.
    """
    with torch.no_grad():
        return _Stepper(objectives, parameters, weights, past).step(tolerance)


class Past:
    """Steps with the changes of the score along them, the last few."""

    def __init__(self) -> None:
        self._at: tuple[Tensor, Tensor] | None = None
        self._pairs: list[tuple[Tensor, Tensor]] = []

    def see(self, curvature: Curvature) -> None:
        """Keep the present point."""
        u, score = curvature.u, curvature.score
        if self._at is not None and len(self._at[0]) == len(u):
            self._pairs.append((u - self._at[0], self._at[1] - score))
            del self._pairs[: -len(u) - 2]
        self._at = u.clone(), score.clone()

    def correct(self, hessian: Tensor) -> Tensor:
        """The curvature with what the steps have shown of it (Broyden, Fletcher, Goldfarb, Shanno).

        Pairs along which the likelihood does not bend downwards say nothing, nor do those that
        differ from the curvature by no more than third derivatives explain, which for a step
        of s standard errors is a part s of it.
        """
        for s, y in self._pairs:
            Bs = hessian @ s
            along, seen = float(s @ Bs), float(s @ y)
            if not (0 < along < _NEAR and 0.1 * along < seen < 10 * along):
                continue
            size = hessian.diagonal().abs().sqrt()
            off = float(((y - Bs) / torch.where(size > 0, size, 1)).norm())
            if off > along:
                hessian = hessian - torch.outer(Bs, Bs) / along + torch.outer(y, y) / seen
        return hessian


class _Stepper:
    """One step: everything that depends on the point it starts from."""

    def __init__(
        self,
        objectives: Sequence[Objective],
        owned: Sequence[Tensor] | None,
        weights: Sequence[float] | None,
        past: Past | None,
    ) -> None:
        self._objectives = objectives
        self._weights = [1.0] * len(objectives) if weights is None else list(weights)
        self._eps = torch.finfo(objectives[0].problem.fixed.y.dtype).eps
        try:
            self._start = self._total()
        except NotPositiveDefiniteError as error:
            text = "V is not positive definite at the starting values"
            raise NotPositiveDefiniteError(text) from error
        if not isfinite(self._start):
            raise NumericalError(f"the log-likelihood at the starting values is {self._start}")
        self._curvature = c = Curvature(objectives, owned, self._weights)
        if not len(c.at):
            raise RuntimeError("none of AIREML's parameters belongs to a covariance in the loss")
        self._norm = c.norm
        if past is not None:
            past.see(c)
            c.solve(past.correct(c.hessian))
        # Differences of the likelihood below this are rounding, as are those within what an
        # estimated likelihood is known to.
        self._slack = 100 * self._eps * (abs(self._start) + c.rows)
        self._slack += sum(o.evaluate().error for o in objectives)

    def step(self, tolerance: float) -> Step:
        c = self._curvature
        escaped = self._escape()
        if escaped is not None:
            return self._step(escaped, 1.0)
        if self._norm < max(tolerance, c.resolution):
            settled = self._settle()
            if settled is not None:
                return self._step(settled, 1.0)
            return self._step(self._start, 0.0)
        for move, length in self._moves():
            reached = self._try(move)
            if reached is not None and self._has_scores():
                return self._step(reached, length)
        c.at.write(c.u)
        return self._step(self._start, 0.0)

    def _moves(self) -> Iterator[tuple[Tensor, float]]:
        """Moves to be tried in turn, with their lengths beside the full step.

        Parts of the full step come first, because in a curved valley, as of loadings whose
        squares add up, damping takes away what moves along it.
        """
        c = self._curvature
        for length in (1.0, 0.5, 0.25, 0.125, 0.0625, 0.03125):
            yield length * c.move, length
        damping = 0.1
        for _ in range(40):
            yield c.damped(damping), 1 / (1 + damping)
            damping *= 4

    def _step(self, reached: float, length: float) -> Step:
        c = self._curvature
        return Step(reached, self._norm, length, c.condition, length == 0 and c.is_optimum)

    def _log_likelihood(self) -> float:
        """The log-likelihood at the parameters as they are; minus infinity where it does not exist."""
        try:
            total = self._total()
        except NumericalError:
            return -inf
        return total if isfinite(total) else -inf

    def _total(self) -> float:
        """The weighted sum of the log-likelihoods; a NumericalError says why there is none."""
        return sum(
            w * float(o.evaluate().log_likelihood)
            for o, w in zip(self._objectives, self._weights, strict=True)
        )

    def _has_scores(self) -> bool:
        """Whether the next step can start from here: digits are left for the derivatives, and
        no parameter is infinite, as a length of which the data know only that it is long."""
        natural = (e.trans(e.tensor.detach()) for e in self._curvature.at.entries)
        if not all(bool(torch.isfinite(value).all()) for value in natural):
            return False
        try:
            for o in self._objectives:
                if not o.moves:
                    o.evaluate().scores()
        except NumericalError:
            return False
        return True

    def _at(self, u: Tensor) -> float:
        self._curvature.at.write(u)
        return self._log_likelihood()

    def _try(self, move: Tensor) -> float | None:
        """Move unless the likelihood falls; returns the log-likelihood reached."""
        c = self._curvature
        u, target = c.u, c.u + move
        low, high = c.at.ends(u)
        bound = torch.where(move < 0, low, high)
        gap = (bound - u).abs()  # to the boundary that the coordinate moves to
        ends = (gap > 0) & (move.abs() >= 0.9 * gap)
        reached = self._at(target)
        # What the quadratic promises; a step that keeps half of it, and is not all the way to
        # the boundary, needs no better one.
        promised = float(c.score @ move - move @ c.hessian @ move / 2)
        inside = bool((move.abs() < 0.98 * gap)[ends].all())
        least = self._start - self._slack
        if not bool(ends.any()) or (reached - self._start > promised / 2 and inside):
            return reached if reached >= least else None
        # Perhaps it ends at the boundary, perhaps the step is too long.
        halfway = u + torch.where(move < 0, -gap, gap) / 2
        candidates = [torch.where(ends, bound, target), target, torch.where(ends, halfway, target)]
        values = [self._at(candidates[0]), reached, self._at(candidates[2])]
        best = values.index(max(values))
        if values[0] >= values[best] - self._slack:
            best = 0
        if values[best] < least:
            return None
        if best != len(candidates) - 1:
            self._at(candidates[best])
        return values[best]

    def _settle(self) -> float | None:
        """Put coordinates within a fraction of a standard error of a boundary onto it.

        What converges towards a boundary would else end near it, at 1e-45 in place of 0.
        """
        c = self._curvature
        low, high = c.at.ends(c.u)
        bound = torch.where((c.u - low) < (high - c.u), low, high)
        gap = (bound - c.u).abs()
        bend = c.hessian.diagonal().abs()
        near = (gap > 0) & (gap**2 * bend < 1e-3) & ~c.silent
        for j in near.nonzero()[:, 0].tolist():
            target = c.u.clone()
            target[j] = bound[j]
            reached = self._at(target)
            if reached >= self._start - self._slack:
                return reached
        if bool(near.any()):
            self._at(c.u)
        return None

    def _escape(self) -> float | None:
        """Leave a boundary or a saddle where the likelihood rises from there, which no gradient
        shows."""
        c = self._curvature
        low, _ = c.at.ends(c.u)
        for j in c.stuck:
            distance = c.boundary_step(j) ** 0.5
            for _ in range(40):
                target = c.u.clone()
                target[j] += distance if float(low[j]) == float(c.u[j]) else -distance
                reached = self._at(target)
                if reached > self._start + self._slack:
                    return reached
                distance /= 2
        if self._norm < max(1e-3, c.resolution):
            for direction in c.descents:
                for length in (1.0, -1.0, 0.1, -0.1):
                    reached = self._at(c.u + length * direction)
                    if reached > self._start + self._slack:
                        return reached
        if c.stuck or len(c.descents):
            self._at(c.u)
        return None
