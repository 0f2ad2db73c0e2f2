"""Several starts, for models whose likelihood may have several optima."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import inf

import torch

from openreml_nn.covariance import Matrix
from openreml_nn.estimation.curvature import CONVERGED, Curvature, lost_in_noise
from openreml_nn.estimation.past import Past
from openreml_nn.estimation.step import average_information_step
from openreml_nn.likelihood.loss import Objective
from openreml_nn.likelihood.problem import Evaluation
from openreml_nn.result.result import Record, Start
from openreml_nn.support.errors import NumericalError

__all__ = [
    "CLOSEST",
    "FIRST_STEPS",
    "REACHES",
    "SAME_OPTIMUM",
    "SHORTEST",
    "climb",
    "climb_from_several",
    "evaluate_within_reach",
    "has_several_optima",
    "reaches",
    "set_reach",
]

#: How far correlation reaches at each start, see :meth:`Matrix.start_reach`.
REACHES = (0.7, 0.3, 0.9)
#: Reaches for distances some of which are so short that V is singular at a longer one.
_SHORT = (0.1, 0.03, 0.01, 3e-3, 1e-3, 3e-4, 1e-4)
#: Where one matrix's correlation reaches far, and the others' hardly.
_FAR, _NEAR = 0.9, 0.1
#: More matrices than these are not far one by one.
_MANY = 4
#: A run that is within this many standard errors of an optimum already found goes there too.
_CLOSE = 0.3
#: A coarse likelihood is left so many standard errors from its optimum.
_NEARBY = 0.1
#: Steps end so many standard errors from the optimum.
CLOSEST = 1e-6
#: A step shorter than this part of the one proposed leads nowhere.
SHORTEST = 0.02
#: A run ends whose log-likelihood rises by nothing in so many shortened steps.
_STALLED = 5
#: A run ends whose log-likelihood rises, in as many steps, by less than this part of what each of
#: them promised, half of the square of its score norm: it is on a ridge to infinity.
_CRAWL = 0.01
#: Each run takes so many steps first; after that a run goes on only where it may end as the best.
FIRST_STEPS = 30
#: Log-likelihoods that differ by less are of one optimum.
SAME_OPTIMUM = 1e-3


@dataclass(eq=False)
class _Run:
    """A run and where it ended; ``twin`` is an earlier run whose optimum it was about to reach."""

    history: list[Record]
    past: Past
    log_likelihood: float
    converged: bool
    curvature: Curvature
    twin: _Run | None = None

    @property
    def end(self) -> _Run:
        return self if self.twin is None else self.twin

    def is_short_of(self, top: float, most: int) -> bool:
        """Whether the run was still rising when it was left, and would get above the best of the others
        at the pace of its last steps.

        Args:
            top: the log-likelihood of the best of the others.
            most: steps that a run may take.
        """
        left = most - len(self.history)
        if (
            self.converged
            or left <= 0
            or len(self.history) < FIRST_STEPS
            or self.history[-1].step == 0
        ):
            return False
        if self.log_likelihood >= top:
            return True
        return self.log_likelihood + _rise(self.history) / _STALLED * left > top + SAME_OPTIMUM


def has_several_optima(objective: Objective) -> bool:
    """Whether a correlation that decays with a distance stands beside other estimated terms.

    An autoregressive field beside a nugget is known for it: the likelihood can explain the
    same data by short correlation of all the variance or by long correlation of a part of it. One
    that ends at a length, spherical or linear, is not smooth where a pair comes within it, alone too.
    """
    matrices = _matrices(objective.covariance)
    alone = any(matrix.ends() for matrix in matrices)
    if not alone and sum(not term.known for term in objective.terms()) < 2:
        return False
    reaching = [matrix.start_reach(REACHES[0]) for matrix in matrices]
    return any(reaching)


def climb(
    objective: Objective,
    most: int,
    arrived: Callable[[Record], bool] | None = None,
    before: Sequence[Record] = (),
    past: Past | None = None,
    near: float = CLOSEST,
) -> list[Record]:
    """Average-information steps until the optimum, or as many as allowed.

    Args:
        objective: the likelihood, at its start.
        most: so many steps, those before counted.
        arrived: says after a step whether the rest of the way is known.
        before: steps that were taken before.
        past: what these have shown of the curvature, to which the steps add.
        near: the score norm, in standard errors, at which steps end.
    """
    history = list(before)
    past = Past() if past is None else past
    while len(history) < most:
        step = average_information_step([objective], None, near, past=past)
        history.append(Record.of(objective.covariance, *step[:3]))
        if step.converged or step.length == 0 or (arrived is not None and arrived(history[-1])):
            break
        if len(history) > _STALLED and _relative_rise(history) < 1e-12:
            # Rounding is all that moves it: it is as near as the numbers let one see.
            history[-1] = replace(history[-1], step=0.0)
            break
        if _has_stalled(history) and step.score_norm < _lost(objective):
            history[-1] = replace(history[-1], step=0.0)
            break
        far = step.score_norm > CONVERGED
        if far and len(history) > _STALLED and _relative_rise(history) < 1e-8:
            # At the edge of where V is positive definite there is nowhere to go, and a ridge to
            # infinity has no end.
            at_edge = step.length < SHORTEST
            if at_edge or _is_crawling(history):
                break
    return history


def _lost(objective: Objective) -> float:
    return 0.0 if objective.moves else lost_in_noise(objective.evaluate())


def _has_stalled(history: Sequence[Record]) -> bool:
    """Whether the last step began hardly nearer to the optimum than the one before."""
    return len(history) > 1 and history[-1].score_norm > history[-2].score_norm / 2


def _relative_rise(history: Sequence[Record]) -> float:
    """The rise of the log-likelihood in the last steps, relative to its size."""
    return _rise(history) / (1 + abs(history[-1].log_likelihood))


def _rise(history: Sequence[Record]) -> float:
    """The rise of the log-likelihood in the last ``_STALLED`` steps."""
    return history[-1].log_likelihood - history[-1 - _STALLED].log_likelihood


def _is_crawling(history: Sequence[Record]) -> bool:
    """Whether the last steps together rose by next to nothing of what each of them promised."""
    least = min(record.score_norm for record in history[-_STALLED:])
    return _rise(history) < _CRAWL * least**2 / 2


def climb_from_several(
    objective: Objective, most: int, start: Callable[[], None], coarse: Objective | None = None
) -> tuple[list[Record], list[Start]]:
    """Climb from each reach, and leave the parameters at the best end.

    Each run takes 30 steps first. After these a run goes on only where it is the best so far, or gets
    above the best at the pace of its last five steps.

    Args:
        objective: the likelihood.
        most: steps of each run, at most.
        start: sets the parameters to where all starts have them, reaches apart.
        coarse: the likelihood of a coarser covariance with the same parameters, near the optimum of
            which each run begins.

    Returns:
        The history of the best run, and where the others ended.
    """
    runs: list[_Run] = []
    failure: NumericalError | None = None
    for reach_of in reaches(objective.covariance):
        start()
        for matrix, reach in reach_of:
            matrix.start_reach(reach)
        if coarse is not None:
            _approach(objective, coarse, most)
        try:
            runs.append(_run(objective, min(most, FIRST_STEPS), runs))
        except NumericalError as error:
            failure = error
    _go_on(objective, most, runs)
    if not runs:
        # The start itself may reach less far than any of these.
        start()
        try:
            runs.append(_run(objective, most, runs))
        except NumericalError as error:
            raise failure or error from error
    # Equal but for rounding: the first of them.
    ends = [run for run in runs if run.twin is None]
    top = max(run.log_likelihood for run in ends)
    best = next(run for run in ends if run.log_likelihood > top - 1e-7 * (1 + abs(top)))
    best.curvature.at.write(best.curvature.u)
    starts = [_start(run, best) for run in runs if run is not best]
    return best.history, starts


def _go_on(objective: Objective, most: int, runs: list[_Run]) -> None:
    """Let the runs that may still end as the best take the steps that are left, the best run first."""
    for run in sorted(runs, key=lambda run: -run.log_likelihood):
        others = [other for other in runs if other is not run]
        top = max((other.log_likelihood for other in others), default=-inf)
        if run.is_short_of(top, most):
            run.curvature.at.write(run.curvature.u)
            try:
                runs[runs.index(run)] = _run(objective, most, others, run)
            except NumericalError:
                continue  # it stays where it was


@torch.no_grad()
def _approach(objective: Objective, coarse: Objective, most: int) -> None:
    """Move the parameters to near the optimum of the coarse likelihood, if a climb ends there."""
    own, other = (list(o.covariance.parameters()) for o in (objective, coarse))
    for to, value in zip(other, own, strict=True):
        to.copy_(value)
    try:
        history = climb(coarse, most, lambda record: record.score_norm < _NEARBY)
    except NumericalError:
        return
    if history[-1].score_norm < _NEARBY:
        for to, value in zip(own, other, strict=True):
            to.copy_(value)


def _run(
    objective: Objective, most: int, others: Sequence[_Run], before: _Run | None = None
) -> _Run:
    """A run, or what is left of one.

    Args:
        objective: the likelihood, at the start of the run, or where it was left.
        most: steps of the run.
        others: other runs, to whose optima it need not go again.
        before: the run as it was left.
    """
    history, past = ([], Past()) if before is None else (before.history, before.past)
    found: list[_Run] = []

    def arrived(record: Record) -> bool:
        found.extend(
            other
            for other in others
            if other.converged
            and abs(record.log_likelihood - other.log_likelihood) < _CLOSE**2
            and _distance(other.curvature) < _CLOSE
        )
        return bool(found)

    history = climb(objective, most, arrived, history, past)
    with torch.no_grad():
        curvature = found[0].curvature if found else Curvature([objective])
    converged = bool(found) or (curvature.is_optimum and not history[-1].step > 0)
    end = found[0].log_likelihood if found else history[-1].log_likelihood
    return _Run(history, past, end, converged, curvature, found[0].end if found else None)


def _distance(curvature: Curvature) -> float:
    """From the present parameters to an optimum, in its standard errors."""
    u = curvature.at.read(curvature.u)
    move = u - curvature.u
    return float((move @ curvature.hessian @ move).clamp(min=0).sqrt())


def _start(run: _Run, best: _Run) -> Start:
    end = run.end
    same = end is best or (
        abs(end.log_likelihood - best.log_likelihood) < SAME_OPTIMUM
        and _between(end, best) < _CLOSE
    )
    values = end.history[-1].parameters
    return Start(run.log_likelihood, len(run.history), run.converged, same, values)


def _between(one: _Run, other: _Run) -> float:
    move = one.curvature.u - other.curvature.u
    return float((move @ other.curvature.hessian @ move).clamp(min=0).sqrt())


def reaches(covariance: Matrix) -> list[list[tuple[Matrix, float]]]:
    """For each start the matrices whose correlation reaches somewhere, and how far.

    All reach as far as each other, also hardly where one of them ends at a length. Of two or more,
    such as the rows and columns of a field, also one reaches far and the others hardly. Those of
    many, such as the rows of the fields of some trials, go together by their name.
    """
    reaching = [m for m in _matrices(covariance) if m.start_reach(REACHES[0])]
    starts = [[(matrix, reach) for matrix in reaching] for reach in REACHES]
    if any(matrix.ends() for matrix in reaching):
        starts.append([(matrix, _NEAR) for matrix in reaching])
    if len(reaching) > 1:
        named = {id(m): name for name, m in covariance.named_modules()}
        sides: dict[object, list[int]] = {}
        for matrix in reaching:
            side = named[id(matrix)].rpartition(".")[2] if len(reaching) > _MANY else id(matrix)
            sides.setdefault(side, []).append(id(matrix))
        starts += [
            [(matrix, _FAR if id(matrix) in far else _NEAR) for matrix in reaching]
            for far in sides.values()
        ]
    return starts


def set_reach(objective: Objective, reach: float) -> bool:
    """Let every correlation that decays with a distance reach so far; whether there is one."""
    found = [matrix.start_reach(reach) for matrix in _matrices(objective.covariance)]
    return any(found)


def evaluate_within_reach(objective: Objective) -> tuple[Evaluation, float | None]:
    """Evaluate the likelihood at its start, with correlation that reaches less far where V is
    singular, as by times that are hardly apart.

    Returns:
        The evaluation and the reach that was set; None where the start was left as it is.

    Raises:
        NumericalError: if the likelihood does not exist, however short the correlation reaches.
    """
    try:
        return _with_scores(objective), None
    except NumericalError:
        for reach in _SHORT:
            if not set_reach(objective, reach):
                break
            try:
                return _with_scores(objective), reach
            except NumericalError:
                continue
        raise


def _with_scores(objective: Objective) -> Evaluation:
    """The likelihood where a step can start: digits are left for its derivatives."""
    evaluation = objective.evaluate()
    # Scores lose more digits, but not all of them where hardly any are lost.
    if (
        not objective.moves
        and evaluation.rounding > torch.finfo(objective.problem.fixed.y.dtype).eps ** 0.75
    ):
        evaluation.scores()
    return evaluation


def _matrices(covariance: Matrix) -> list[Matrix]:
    return [m for m in covariance.modules() if isinstance(m, Matrix)]
