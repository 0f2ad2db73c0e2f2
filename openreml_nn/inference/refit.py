"""A fitted model that can be moved and fitted again, without touching the one it came from."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TypeVar

import torch
from rich.progress import track
from torch import Tensor

from openreml_nn.estimation import Result, fit_reml
from openreml_nn.likelihood import REMLLoss
from openreml_nn.likelihood.loss import Objective
from openreml_nn.result.result import Source
from openreml_nn.support.checks import check_instance, check_number
from openreml_nn.support.display import plain_console
from openreml_nn.support.errors import InputError
from openreml_nn.support.names import distinct
from openreml_nn.support.solving import solve_named

__all__ = [
    "Refit",
    "check_fit",
    "check_level",
    "family_of",
    "matrix_entries",
    "source_of",
    "tracked",
]

T = TypeVar("T")

#: Columns that are solved for at a time.
_COLUMNS = 256


def check_fit(result: object, name: str = "result") -> None:
    """Refuse what is not a fit.

    Raises:
        TypeError: if it is something else.
    """
    check_instance(name, result, Result, "a Result, of lmm() or fit_reml()")


def check_level(level: object) -> float:
    """The level of an interval.

    Raises:
        TypeError: if it is no number.
        InputError: if it is not between 0 and 1.
    """
    return check_number("level", level, above=0, below=1)


def source_of(result: Result, name: str = "result") -> Source:
    """Data and model of a result.

    Raises:
        InputError: if its rows were streamed, or came by :meth:`Result.update`.
        TypeError: if it is no result.
    """
    check_fit(result, name)
    if result.source is None:
        raise InputError(
            f"`{name}` has no data, because its rows were read in chunks or came by update(): "
            "expected a fit by lmm()"
        )
    return result.source


def family_of(result: Result) -> str | None:
    """The family of the response of a generalised model; None of a linear one.

    Raises:
        TypeError: if it is no result.
    """
    check_fit(result)
    return result.family


def matrix_entries(result: Result) -> dict[str, tuple[int, int, int]]:
    """Names of standard deviations and correlations, each with its component, row and column.

    As in lme4: ``sd_Days|Subject``, ``cor_Days.(Intercept)|Subject``, and ``sigma``. Those of a
    second term of the same group, as ``(1 | animal)`` beside ``(1 | ped(animal))``, get a number. A
    term with a variance for each row, a function of a covariate, has none.
    """
    names, entries = [], []
    by_row: set[str] = set()
    if result.source is not None:
        with torch.no_grad():
            terms = result.source.covariance.terms()
        by_row = {term.name for term in terms if term.shown().dim() == 1}
    for index, c in enumerate(result.components):
        if c.name in by_row:
            continue
        if c.covariance.dim() != 2 or len(c.covariance) != len(c.effects):
            continue
        plain = c.is_residual and len(c.effects) == 1
        for i, effect in enumerate(c.effects):
            names.append("sigma" if plain else f"sd_{effect}|{c.group}")
            names += [f"cor_{effect}.{other}|{c.group}" for other in c.effects[:i]]
            entries += [(index, i, j) for j in (i, *range(i))]
    return dict(zip(distinct(names), entries, strict=True))


def tracked(parts: Sequence[T], what: str, progress: bool) -> Iterable[T]:
    """The parts one after another, with a bar on stderr if one is wanted."""
    console = plain_console(stderr=True)
    return track(parts, what, disable=not progress, transient=True, console=console)


class Refit:
    """A copy of a fitted model at its estimates.

    Args:
        result: the fit.

    Raises:
        InputError: if its rows were streamed, or its response is not Gaussian.
        TypeError: if it is no result.
    """

    def __init__(self, result: Result) -> None:
        family = family_of(result)
        if family is not None:
            raise InputError(
                f"`result` has a response of the family {family!r}, and what is asked for is computed of "
                "Gaussian responses alone: expected a fit by lmm() or fit_reml()"
            )
        self.result = result
        self.source = source = source_of(result)
        # A trainer takes its module back to the CPU after a fit, and leaves the data where they are.
        self.covariance = copy.deepcopy(source.covariance).to(source.y.device)
        # A network in single precision beside a covariance in double: the wider holds both.
        own = torch.promote_types(source.y.dtype, self.covariance.no_params().dtype)
        self.y = source.y.detach().to(own)
        self.X = source.X.detach()[:, list(result.fixed.columns)].to(own)
        self._losses: dict[str, REMLLoss] = {}
        self.reset()

    def reset(self) -> None:
        """Set the parameters to the estimates."""
        stored = {estimate.name: estimate.untransformed for estimate in self.result.parameters}
        with torch.no_grad():
            for entry in self.covariance.parameter_entries().entries:
                entry.tensor.fill_(stored[entry.name])

    def objective(
        self, y: Tensor | None = None, X: Tensor | None = None, method: str | None = None
    ) -> Objective:
        """The likelihood, of other data or by another method if these are given."""
        y, X = self.y if y is None else y, self.X if X is None else X
        method = method or self.result.method
        if method not in self._losses:
            solver = self.result.plan.choice
            self._losses[method] = REMLLoss(self.covariance, method, solver)
        return self._losses[method].objective(y, X, self.source.rows)

    def fit(
        self, method: str | None = None, y: Tensor | None = None, keep: Tensor | None = None
    ) -> Result:
        """Fit again, from where the parameters are, to all rows or to those kept."""
        y, X, rows = self.y if y is None else y, self.X, self.source.rows
        if keep is not None:
            y, X, rows = y[keep], X[keep], keep if rows is None else rows[keep]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return fit_reml(
                self.covariance,
                y,
                X,
                method=method or self.result.method,
                solver=self.result.plan.choice,
                rows=rows,
                start="current",
                names=self.result.fixed.names,
                labels=self.source.labels,
            )

    def solve(self, columns: Tensor) -> Tensor:
        r""":math:`V^{-1} B` of some columns B (n, m), by the solver of the fit.

        Columns of a model matrix come with it, so they take the place of X, a few at a time.
        """
        found = []
        for part in columns.to(self.y).split(max(1, min(_COLUMNS, len(self.y) // 2)), 1):
            Q, R = torch.linalg.qr(part)
            objective = self.objective(X=Q, method="ml")
            fixed = objective.problem.fixed
            solved = objective.evaluate().inverse_times_data()[:, :-1]
            found.append(solved @ (fixed.Q.mT @ Q) @ R)
        return torch.cat(found, 1) if found else columns.to(self.y)

    def project(self, columns: Tensor) -> Tensor:
        r""":math:`PB = V^{-1}B - V^{-1}X(X^\top V^{-1}X)^{-1}X^\top V^{-1}B` of columns (n, m)."""
        V_X = self._solved_x
        information = self.X.mT @ V_X
        inner = solve_named(
            information, V_X.mT @ columns.to(self.y), "the information of the fixed effects"
        )
        return self.solve(columns) - V_X @ inner

    @cached_property
    def _solved_x(self) -> Tensor:
        """V^-1 X at the estimates."""
        return self.solve(self.X)
