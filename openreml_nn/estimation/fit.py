"""Fit a linear mixed model in one call."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from math import isfinite
from time import perf_counter

import torch
from torch import Tensor

from openreml_nn.covariance import Matrix
from openreml_nn.estimation.coordinates import Coordinates
from openreml_nn.estimation.outcome import outcome, unreached
from openreml_nn.estimation.safeguard import edge_of
from openreml_nn.estimation.starts import (
    CLOSEST,
    climb,
    climb_from_several,
    evaluate_within_reach,
    has_several_optima,
    set_reach,
)
from openreml_nn.estimation.step import average_information_step
from openreml_nn.likelihood import REMLLoss
from openreml_nn.likelihood.fixed import check_data
from openreml_nn.likelihood.loss import Objective
from openreml_nn.likelihood.solver import Solver
from openreml_nn.likelihood.solvers.krylov import Krylov
from openreml_nn.result.result import Label, Result, Start
from openreml_nn.support.checks import (
    check_choice,
    check_count,
    check_instance,
    check_mapping,
)
from openreml_nn.support.errors import InputError, NumericalError
from openreml_nn.support.warning import warn
from openreml_nn.terms.design import Design, IndexedDesign
from openreml_nn.terms.term import Term, has_own_columns, residual_terms

__all__ = ["checked", "fit_reml", "moment_start", "start_by_moments"]

#: An exact evaluation is put off when it takes this many times the work of an approximate one, and of
#: relatives, whose systems are far from their diagonal and take more steps than are forecast.
_WORTH, _WORTH_OF_RELATIVES = 1.5, 150.0
_ROUGH_STEPS = 30
#: A step from so few standard errors ends nearer than the approximate likelihood is to the exact one.
_ROUGHLY = 0.1
#: A standard deviation has all but vanished below this part of that at its start.
_GONE = 0.05
#: Operations of an evaluation in place of which coarser ones are made at first.
_LONG = 1e8
#: Where an evaluation takes more, steps end so many standard errors from the optimum, and not a
#: millionth: the log-likelihood there is within 5e-9 of its maximum.
_LONGER, _NEAR = 5e10, 1e-4
#: With few digits and probes: what error they leave a step with exact evaluations takes away.
_ROUGH = Krylov(probes=8, tolerance=1e-5, probe_tolerance=1e-3)


def moment_start(loss: REMLLoss, y: Tensor, X: Tensor, rows: Tensor | None = None) -> None:
    r"""Set the covariance parameters to a start that follows the units of the data.

    Every term first gets the same share of variance; then all are scaled by
    the profiled estimate :math:`\hat\sigma^2 = y^\top P y / (n - p)`.

    Args:
        loss: the likelihood, whose covariance is set.
        y: response (n,).
        X: model matrix of the fixed effects (n, p).
        rows: the rows of the covariance that the data belong to; all by default.

    Raises:
        TypeError, InputError: if the data are not as in :class:`REMLLoss`, or the fixed effects fit
            the response exactly.
    """
    check_instance("loss", loss, REMLLoss)
    check_data(y, X)
    with torch.no_grad():
        size = float(torch.linalg.vector_norm(y.double()))
        start_by_moments(loss.objective(y, X, rows), size)


def start_by_moments(objective: Objective, size: float) -> None:
    """Set the parameters of a prepared likelihood to their start; ``size`` is the response's length."""
    covariance, problem = objective.covariance, objective.problem
    y = problem.fixed.y
    one = torch.ones(covariance.shape[0], dtype=y.dtype, device=y.device)
    with torch.no_grad():
        covariance.moment_start(one)
        evaluation, reach = evaluate_within_reach(objective)
        scale = float(evaluation.y_p_y) / (problem.n - problem.p)
        if not scale > (torch.finfo(y.dtype).eps * size) ** 2 / problem.n:
            if not covariance.num_free_params:
                return
            raise InputError("the fixed effects fit `y` exactly: there is no variance to estimate")
        covariance.moment_start(scale * one)
        if reach is not None:
            set_reach(objective, reach)


def _check_confounded(terms: Sequence[Term]) -> None:
    """Raise if a random effect of one variance has a level of its own for each row, as the
    residual has, and both variances are to be estimated."""
    residual = residual_terms(terms)
    if not any(terms[i].is_residual and not terms[i].known for i in residual):
        return
    for i, term in enumerate(terms):
        if i in residual or term.known or not term.covariance.is_scalar:
            continue
        if has_own_columns(term.design) and not _is_weighted(term.design):
            n, q = term.design.shape
            raise InputError(
                f"term {term.name!r} has {q} levels for {n} rows, one row each: it cannot be told "
                "from the residual"
            )


def _is_weighted(design: Design) -> bool:
    """Whether the rows of an indexed design differ in the size of their values."""
    values = design.values if isinstance(design, IndexedDesign) else None
    if values is None:
        return False
    size = values.detach().abs()
    return bool((size - size[0]).abs().max() > 1e-6 * size.max())


def _start_by_krylov(objective: Objective, loss: REMLLoss, y: Tensor, X: Tensor) -> bool:
    """Set the parameters to approximate estimates where exact evaluations take long.

    Most steps of the fit are then taken with evaluations that cost little, and
    the exact ones start so near the optimum that two or three suffice.

    Returns:
        Whether that was worth it, and done.
    """
    problem, krylov = objective.problem, _ROUGH
    exact = problem.cost()
    if exact is None or not exact.exact:
        return False
    related = [term.covariance for term in objective.terms() if term.covariance.is_related]
    if any(g.known_kernel is None or g.known_kernel.inverse is None for g in related):
        return False  # products with a dense kernel take as long as the exact solver
    cost = krylov.forecast(objective.terms(), problem.p, problem.fixed.y.dtype)
    worth = _WORTH_OF_RELATIVES if related else _WORTH
    if cost is None or exact.operations < worth * cost.operations:
        return False
    rough = REMLLoss(loss.covariance, loss.method, krylov)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the loss itself warns of what there is to warn of
        approximate = rough.objective(y, X, objective.rows)
        moment_start(rough, y, X, objective.rows)
    parameters, at = list(loss.covariance.parameters()), Coordinates([objective])
    begun = at.read(y)
    for _ in range(_ROUGH_STEPS):
        before = at.read(y)
        step = average_information_step([approximate], parameters, 1e-3, trusted=_ROUGHLY)
        if step.converged or step.length == 0 or step.score_norm < _ROUGHLY:
            break
    try:
        strayed = _strayed(objective, at, begun)
    except NumericalError:  # the last step went to where the exact likelihood does not exist
        at.write(before)
    else:
        if bool(strayed.any()):
            at.write(torch.where(strayed, begun, at.read(y)))
    return True


def _strayed(objective: Objective, at: Coordinates, begun: Tensor) -> Tensor:
    """Which variances have all but vanished since their start, while the exact likelihood rises with them,
    (m,): from there, where it is flat in their logarithms, exact steps would be short.

    Raises:
        NumericalError: if the exact likelihood does not exist here.
    """
    now = at.read(begun)
    gone = at.vanishing(now) & (now.abs() < _GONE * begun.abs())
    places = gone.nonzero()[:, 0].tolist()
    if not places:
        objective.evaluate().scores()  # kept, as the first exact step asks for them
        return gone
    slopes = objective.gradient([at.entries[j].tensor for j in places])
    for j, slope in zip(places, slopes, strict=True):
        gone[j] = bool(slope > 0)
    return gone


def _coarsenable(covariance: Matrix) -> list[Matrix]:
    """Matrices that may have a coarser form."""
    found = (m for m in covariance.modules() if isinstance(m, Matrix))
    return [m for m in found if type(m).coarsen is not Matrix.coarsen]


def _coarser(objective: Objective, loss: REMLLoss, y: Tensor, X: Tensor) -> Objective | None:
    """The likelihood of a coarser copy of the covariance, where the exact one takes long."""
    exact = objective.problem.cost()
    if exact is None or exact.operations < _LONG or not _coarsenable(loss.covariance):
        return None  # without a copy, which of known matrices is large
    covariance = deepcopy(loss.covariance)
    if not sum(matrix.coarsen() for matrix in _coarsenable(covariance)):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the loss itself warns of what there is to warn of
        coarse = REMLLoss(covariance, loss.method, loss.solver).objective(y, X, objective.rows)
    cost = coarse.problem.cost()
    return coarse if cost is not None and exact.operations > _WORTH * cost.operations else None


def fit_reml(
    covariance: Matrix,
    y: Tensor,
    X: Tensor,
    *,
    method: str = "reml",
    solver: str | Solver = "auto",
    rows: Tensor | None = None,
    start: str = "moments",
    max_iterations: int = 200,
    names: Sequence[str] | None = None,
    labels: Mapping[str, Label] | None = None,
) -> Result:
    r"""Fit :math:`y \sim N(X\beta, V(\theta))` by average-information REML.

    The covariance is moved to the dtype and device of ``y`` and left with its
    parameters at the estimates. All that require a gradient are estimated, those of
    designs and of networks too. Where the likelihood may have several optima, as of
    correlation that decays with a distance beside other terms, the fit runs from
    several starts and its result is the best of them. Where an evaluation takes long, the first
    steps are taken with a coarser covariance (:meth:`Matrix.coarsen`) or an approximate likelihood;
    the last are exact.

    Args:
        covariance: the covariance V.
        y: response (n,).
        X: model matrix of the fixed effects (n, p).
        method: ``"reml"`` or ``"ml"``.
        solver: see :class:`REMLLoss`.
        rows: the rows of the covariance that the data belong to; all by default.
        start: ``"moments"`` starts from the scale of the data,
            ``"current"`` from the parameters as they are.
        max_iterations: after so many the fit stops, with a warning.
        names: names of the columns of X.
        labels: name of a term to names for the tables.

    Raises:
        InputError: if a random effect is confounded with the residual, or the fixed effects
            fit the response exactly.
        NotPositiveDefiniteError: if V is not positive definite at the start (a ValueError).
        TypeError, InputError: if the data do not fit, or an option is unknown.

    >>> from openreml_nn.covariance import *
    >>> batch = DummyMatrix(["a", "a", "b", "b", "c", "c"])
    >>> V = Sum(batch=CovariancePropagation(batch, ScalarMatrix(3)), residual=ScalarMatrix(6))
    >>> y = torch.tensor([1.0, 1.2, 3.0, 3.5, 2.0, 1.9], dtype=torch.float64)
    >>> result = fit_reml(V, y, torch.ones(6, 1, dtype=torch.float64))
    >>> [f"{c.group} {c.covariance.item():.4f}" for c in result.components]
    ['batch 1.1475', 'Residual 0.0500']
    """
    begun = perf_counter()
    check_choice("start", start, ("moments", "current"))
    check_count("max_iterations", max_iterations, 1)
    loss = REMLLoss(covariance, method, solver, reduction="sum")
    check_data(y, X)
    check_names(names, X)
    check_mapping("labels", {} if labels is None else labels, tuple)
    loss.names = names
    y, X = y.detach(), X.detach()
    covariance.to(y)
    objective = loss.objective(y, X, rows)
    _check_confounded(objective.terms())
    free = any(p.requires_grad for p in covariance.parameters())
    others: list[Start] = []

    def begin() -> None:
        moment_start(loss, y, X, rows)

    if start == "moments" and free and has_several_optima(objective):
        coarse = _coarser(objective, loss, y, X)
        history, others = climb_from_several(objective, max_iterations, begin, coarse)
    else:
        if start == "moments" and not (free and _start_by_krylov(objective, loss, y, X)):
            begin()
        cost = objective.problem.cost()
        near = _NEAR if cost is not None and cost.operations > _LONGER else CLOSEST
        history = climb(objective, max_iterations if free else 0, near=near)
    result = outcome(objective, loss.plan, y, X, history, names, labels, others)
    edge = "" if result.converged else edge_of(objective)
    left = result.residual_variance
    if not result.converged and left is not None and left < 1e-10 * float(y.var()):
        edge = (
            f"the likelihood rises without end: the residual variance, {left:.2g}, goes to zero, as the "
            "effects fit the response exactly"
        )
    return checked(replace(result, seconds=perf_counter() - begun), edge)


def check_names(names: object, X: Tensor) -> None:
    """Raise InputError unless there is one name, a string, for each column of X."""
    if names is None:
        return
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise InputError(f"`names` is {names!r}: expected a list of strings, one for each column")
    wrong = [name for name in names if not isinstance(name, str)]
    if wrong:
        raise InputError(f"`names` holds {wrong[0]!r}: expected strings")
    if X.dim() == 2 and len(names) != X.shape[1]:
        raise InputError(f"`names` has {len(names)} entries but `X` has {X.shape[1]} columns")


def checked(result: Result, edge: str = "") -> Result:
    """The result, with warnings of what is wrong with it.

    Args:
        result: what was found.
        edge: why steps ended where they did, see :func:`edge_of`.
    """
    if not result.converged:
        why = f"; from there steps lead where {edge}" if edge else ""
        warn(
            f"the fit did not converge in {result.iterations} iterations: "
            f"{unreached(result.score_norm, result.history)}{why}"
        )
    if result.indistinct:
        warn(
            f"the data cannot tell apart: {', '.join(result.indistinct)}; only what they have "
            "in common is estimated"
        )
    if not isfinite(result.log_likelihood):
        raise NumericalError("the log-likelihood is not finite: rescale the response")
    return result
