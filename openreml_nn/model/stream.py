"""A linear mixed model of a table larger than memory: exact, in one pass over the file.

The likelihood of a model with one residual variance depends on the rows through
cross-products alone, which add up over chunks of rows, and over the processes
of a ``torch.distributed`` group, each of which reads its share of the chunks.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch
from rich.markup import escape
from rich.progress import Progress
from torch import Tensor, distributed

from openreml_nn.estimation import Result
from openreml_nn.estimation.fit import checked, start_by_moments
from openreml_nn.estimation.outcome import outcome
from openreml_nn.estimation.starts import climb
from openreml_nn.likelihood.loss import Objective
from openreml_nn.likelihood.plan import Plan, check_solver
from openreml_nn.likelihood.problem import Evaluation
from openreml_nn.likelihood.solver import Solver
from openreml_nn.likelihood.solvers.dense import check_method
from openreml_nn.model.mixed_model import MixedModel
from openreml_nn.model.structures import labels_of, linear_model
from openreml_nn.model.sums import Parts, Sums
from openreml_nn.result.equations import Equations, FixedBasis
from openreml_nn.result.prediction import lowered
from openreml_nn.support.checks import (
    check_count,
    check_flag,
    check_instance,
    check_names,
    check_number,
    check_text,
)
from openreml_nn.support.display import plain_console, visible
from openreml_nn.support.errors import InputError
from openreml_nn.table import Encoder, TableFile
from openreml_nn.table.columns import check_constants
from openreml_nn.table.formula import MixedFormula

__all__ = ["Streamed", "accumulate", "fit_stream"]


def fit_stream(
    formula: str,
    path: str | os.PathLike[str] | TableFile,
    *,
    chunk_rows: int = 1_000_000,
    method: str = "reml",
    solver: str | Solver = "auto",
    categorical: Sequence[str] = (),
    weights: str | None = None,
    residual: str | None = None,
    residual_variance: float | None = None,
    max_iterations: int = 200,
    progress: bool = True,
) -> Result:
    r"""Fit a linear mixed model to a file, chunk by chunk.

    Memory holds a chunk, and what does not grow with the rows: the levels of
    the grouping factors and which of them meet. The options are those of :func:`lmm`, and so are
    estimates and predictions; there are no fitted values. Under an initialised
    ``torch.distributed`` process group every process reads its share of the
    chunks, and all get the same result.

    Text is read once more beforehand, for the types of its columns, and so are factors among the
    effects, for their levels.

    Args:
        formula: an lme4-style formula.
        path: of a Parquet or CSV file, a folder, or a :class:`TableFile`.
        chunk_rows: rows that are held at a time.
        method, categorical, weights, residual_variance, max_iterations: see :func:`lmm`.
        solver: ``"blocked"`` or ``"sparse"``; by default the one of least cost for the sums.
        residual: None; residuals of another structure are not for chunks.
        progress: whether a bar shows on stderr how far the file is read.

    Raises:
        InputError: if the formula or the file is invalid, an option is not for chunks, or a
            function such as ``scale`` needs all rows at once.

    >>> from openreml_nn.datasets import table_path
    >>> path = table_path("sleepstudy")
    >>> formula = "Reaction ~ Days + (Days | Subject)"
    >>> result = fit_stream(formula, path, chunk_rows=50, progress=False)
    >>> f"{result.log_likelihood:.4f}"
    '-871.8141'
    """
    check_text("formula", formula)
    check_instance("path", path, (str, os.PathLike), "the path of a file")
    check_names("categorical", categorical)
    check_flag("progress", progress)
    check_method(method)
    check_count("max_iterations", max_iterations, 1)
    if residual is not None:
        raise InputError(
            f"`residual` is {residual!r}, which needs all rows at once: leave out `chunk_rows`"
        )
    if check_solver(solver).name not in ("auto", "blocked", "sparse"):
        raise InputError(
            f"`solver` is {solver!r}: expected 'auto', 'blocked' or 'sparse', because chunks leave "
            "cross-products alone; or leave out `chunk_rows`"
        )
    known = residual_variance is not None
    if known:
        check_number("residual_variance", residual_variance, above=0)
    found = accumulate(formula, path, chunk_rows, categorical, progress, weights, known)
    return found.fit(method, max_iterations, residual_variance, solver)


class Streamed(Sums):
    """The sums of all rows, from which the model is fitted."""

    def fit(
        self,
        method: str = "reml",
        max_iterations: int = 200,
        residual_variance: float | None = None,
        solver: str | Solver = "auto",
    ) -> Result:
        """The fit by AI-REML; see :func:`lmm`."""
        begun = perf_counter()
        check_method(method)
        model = linear_model(self.skeleton, method, residual_variance=residual_variance)
        covariance = model.covariance(self.skeleton.batch())
        terms = covariance.terms(None, torch.float64)
        plan = Plan.of(terms, len(self.fixed.T), solver, torch.float64, self.statistics)
        problem = plan.choice.problem_of_sums(self.fixed, terms, method, self.statistics)
        plan = plan.measured(problem)
        plan = replace(plan, rows=problem.n, reason="cross-products of chunks of rows")
        objective = Objective(covariance, problem, None)
        start_by_moments(objective, self.size)
        free = any(p.requires_grad for p in covariance.parameters())
        history = climb(objective, max_iterations if free else 0)
        labels = labels_of(self.skeleton)
        labels |= {name: labels[name]._replace(basis=B) for name, B in self.bases.items()}
        result = outcome(objective, plan, None, None, history, self.names, labels)
        result = replace(
            result,
            formula=self.encoder.formula.text,
            dropped_rows=self.dropped_rows,
            seconds=perf_counter() - begun,
            encoder=self.encoder,
            model=self._known(model, objective.evaluate(), result),
        )
        return checked(result)

    def _known(self, fitted: MixedModel, at: Evaluation, result: Result) -> MixedModel:
        """A copy of the model that predicts, for values as the table has them."""
        model = copy.deepcopy(fitted)
        for name, B in self.bases.items():
            model.effects()[name].basis = B
        model.remember(at.random, at.fixed, result.fixed.aliases)
        variance = model.residual().detach().reshape(())
        model.remember_equations(
            [
                lowered(effect.g, torch.float64).map(Tensor.detach)
                for effect in model.effects().values()
            ],
            self.statistics.sizes,
            len(self.fixed.T),
            lambda: Equations.of_statistics(self.statistics, variance, FixedBasis.of(self.fixed)),
        )
        return model


def accumulate(
    formula: str,
    path: str | os.PathLike[str] | TableFile,
    chunk_rows: int = 1_000_000,
    categorical: Sequence[str] = (),
    progress: bool = True,
    weights: str | None = None,
    known_residual: bool = False,
) -> Streamed:
    """Read a file chunk by chunk and keep its cross-products; see :func:`fit_stream`.

    Args:
        formula, path, chunk_rows, categorical, progress, weights: see there.
        known_residual: whether the residual variance is known, see :class:`Encoder`.
    """
    check_count("chunk_rows", chunk_rows, 1)
    file = path if isinstance(path, TableFile) else TableFile(path)
    encoder = Encoder(
        formula,
        categorical,
        f"file {str(file)!r}",
        weights=weights,
        known_residual=known_residual,
    )
    encoder.dialect = file.dialect
    _check_formula(encoder.formula)
    found: Parts | InputError
    try:
        found = _summed(file, encoder, chunk_rows, progress)
    except InputError as error:
        found = error  # told to all processes, none of which may wait for this one
    return Streamed(**vars(_joined(_gathered(found)).whole(encoder)))


def _check_formula(formula: MixedFormula) -> None:
    for part in formula.random:
        grouping = part.grouping
        if grouping.relation is not None or grouping.members or part.structure.name != "us":
            raise InputError(
                f"formula {formula.text!r}: {part} is not for chunks: leave out `chunk_rows`"
            )
    if formula.stateful:
        raise InputError(
            f"formula {formula.text!r}: {formula.stateful[0]!r} needs all rows at once: write its "
            "result into a column, or leave out `chunk_rows`"
        )


def _summed(file: TableFile, encoder: Encoder, rows: int, progress: bool) -> Parts:
    """What this process keeps of its chunks."""
    columns = _columns(encoder, file)
    rank, size = _rank()
    encoder.survey(file.chunks(rows, columns))
    parts = Parts()
    console = plain_console(stderr=True)  # standard output is for results
    with Progress(console=console, disable=not progress or rank > 0, transient=True) as bar:
        task = bar.add_task(escape(f"reading {visible(file)}"), total=file.count())
        for i, chunk in enumerate(file.chunks(rows, columns)):
            # The first chunk sets the scale, which all processes must have alike.
            if i % size == rank or parts.scale is None:
                parts.add(encoder, chunk, i % size == rank)
            bar.advance(task, len(chunk))
    return parts


def _columns(encoder: Encoder, file: TableFile) -> list[str]:
    """The columns that are read: all of the file where the formula says '.'."""
    check_constants(encoder.formula.text, file.columns(), encoder.source)
    needed = list(dict.fromkeys([*encoder.columns(), *encoder.categorical]))
    return file.columns() if encoder.formula.fixed.is_open else needed


def _rank() -> tuple[int, int]:
    """This process's number in the group, and the group's size."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


# ---------------------------------------------------------------------- processes


def _gathered(own: Parts | InputError) -> list[Parts | InputError]:
    """What each process has."""
    size = _rank()[1]
    if size == 1:
        return [own]
    found: list[Any] = [None] * size
    distributed.all_gather_object(found, own)
    return found


def _joined(parts: Sequence[Parts | InputError]) -> Parts:
    """The sum of all processes' parts.

    Raises:
        InputError: the first that a process met.
    """
    for part in parts:
        if isinstance(part, InputError):
            raise part
    total = Parts()
    for part in parts:
        assert isinstance(part, Parts)
        if part.scale is not None:
            total.scale, total.bases = part.scale, part.bases
        total.encoded = part.encoded or total.encoded
        total.dropped += part.dropped
        for name, order in part.orders.items():
            kept = total.orders.setdefault(name, order)
            if isinstance(kept, dict) and isinstance(order, dict):
                for label in order:
                    kept.setdefault(label, len(kept))
        if part.statistics is not None:
            total.join(part.levels, part.statistics)
    return total
