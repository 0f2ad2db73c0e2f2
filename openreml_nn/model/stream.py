"""A linear mixed model of a table larger than memory: exact, in one pass over the file.

The likelihood of a model with one residual variance depends on the rows through
cross-products alone, which add up over chunks of rows, and over the processes
of a ``torch.distributed`` group, each of which reads its share of the chunks.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any

import numpy as np
import pandas as pd
import torch
from rich.progress import Progress
from torch import Tensor, distributed

from openreml_nn.estimation import Result
from openreml_nn.estimation.fit import checked, iterate, start_by_moments
from openreml_nn.estimation.outcome import outcome
from openreml_nn.likelihood.fixed import FixedPart, aliased_columns, null_space
from openreml_nn.likelihood.loss import Objective
from openreml_nn.likelihood.plan import Plan
from openreml_nn.likelihood.solver import Solver
from openreml_nn.likelihood.solvers.blocked import Blocked, BlockedProblem
from openreml_nn.likelihood.solvers.dense import check_method
from openreml_nn.likelihood.system.products import Statistics
from openreml_nn.model.mixed_model import MixedModel
from openreml_nn.model.structures import labels_of, linear_model
from openreml_nn.result.joint import Equations
from openreml_nn.result.prediction import lowered
from openreml_nn.support.checks import (
    check_count,
    check_flag,
    check_instance,
    check_names,
    check_text,
)
from openreml_nn.support.errors import InputError
from openreml_nn.table import Encoded, Encoder, RandomDesign, TableFile
from openreml_nn.table.encoder import group_key
from openreml_nn.table.formula import MixedFormula, RandomPart
from openreml_nn.terms.design import IndexedDesign

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
        solver: ``"auto"`` or ``"blocked"``, which is the same here.
        residual: None; residuals of another structure are not for chunks.
        progress: whether a bar shows on stderr how far the file is read.

    Raises:
        InputError: if the formula or the file is at fault, an option is not for chunks, or a
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
    if solver not in ("auto", "blocked", Blocked()):
        raise InputError(
            f"`solver` is {solver!r}: expected 'auto' or 'blocked', because chunks leave "
            "cross-products alone; or leave out `chunk_rows`"
        )
    known = residual_variance is not None
    found = accumulate(formula, path, chunk_rows, categorical, progress, weights, known)
    return found.fit(method, max_iterations, residual_variance)


@dataclass
class Streamed:
    """What is kept of the rows.

    Attributes:
        encoder: what the formula makes of a table, with the levels of all rows.
        skeleton: designs of the learned sizes, without the rows.
        statistics: cross-products of the random terms and of the fixed part.
        fixed: how the fixed part was made well conditioned.
        names: names of the columns of X.
        size: length of the response.
        dropped_rows: rows left out because of missing values.
    """

    encoder: Encoder
    skeleton: Encoded
    statistics: Statistics
    fixed: FixedPart
    names: tuple[str, ...]
    size: float
    dropped_rows: int

    def fit(
        self,
        method: str = "reml",
        max_iterations: int = 200,
        residual_variance: float | None = None,
    ) -> Result:
        """The fit by AI-REML; see :func:`lmm`."""
        begun = perf_counter()
        check_method(method)
        model = linear_model(self.skeleton, method, residual_variance=residual_variance)
        covariance = model.covariance(self.skeleton.batch())
        terms = covariance.terms()
        solver = Blocked()
        problem = BlockedProblem(self.fixed, terms, method, solver, self.statistics)
        plan = Plan.of(terms, problem.p, solver, torch.float64).measured(problem)
        plan = replace(plan, rows=problem.n, reason="cross-products of chunks of rows")
        objective = Objective(covariance, problem, None)
        start_by_moments(objective, self.size)
        free = any(p.requires_grad for p in covariance.parameters())
        history = iterate(objective, max_iterations if free else 0)
        labels = labels_of(self.skeleton)
        result = outcome(objective, plan, None, None, history, self.names, labels)
        result = replace(
            result,
            formula=self.encoder.formula.text,
            dropped_rows=self.dropped_rows,
            seconds=perf_counter() - begun,
            encoder=self.encoder,
            model=self._known(model, result),
        )
        return checked(result)

    def _known(self, model: MixedModel, result: Result) -> MixedModel:
        """A copy of the model that predicts."""
        model = copy.deepcopy(model)
        model.remember(result.random, result.fixed, result.fixed.aliases)
        basis = self.fixed.T.new_zeros(len(result.fixed.aliases), len(self.fixed.T))
        basis[self.fixed.columns] = self.fixed.T
        variance = model.residual().detach().reshape(())
        model.joint.update(
            [lowered(effect.g).map(Tensor.detach) for effect in model.effects().values()],
            self.statistics.sizes,
            len(self.fixed.T),
            lambda: Equations.of_statistics(self.statistics, variance, basis),
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
    _check_formula(encoder.formula)
    found: _Parts | InputError
    try:
        found = _summed(file, encoder, chunk_rows, progress)
    except InputError as error:
        found = error  # told to all processes, none of which may wait for this one
    return _joined(_gathered(found)).whole(encoder)


def _check_formula(formula: MixedFormula) -> None:
    for part in formula.random:
        if part.grouping.relation is not None or part.structure.name != "us":
            raise InputError(
                f"formula {formula.text!r}: {part} is not for chunks: leave out `chunk_rows`"
            )
    if formula.stateful:
        raise InputError(
            f"formula {formula.text!r}: {formula.stateful[0]!r} needs all rows at once: write its "
            "result into a column, or leave out `chunk_rows`"
        )


def _summed(file: TableFile, encoder: Encoder, rows: int, progress: bool) -> _Parts:
    """What this process keeps of its chunks."""
    columns = _columns(encoder, file)
    rank, size = _rank()
    encoder.survey(file.chunks(rows, columns))
    parts = _Parts()
    with Progress(disable=not progress or rank > 0, transient=True) as bar:
        task = bar.add_task(f"reading {file}", total=file.count())
        for i, chunk in enumerate(file.chunks(rows, columns)):
            # The first chunk sets the scale, which all processes must have alike.
            if i % size == rank or parts.scale is None:
                parts.add(encoder, chunk, i % size == rank)
            bar.advance(task, len(chunk))
    return parts


def _columns(encoder: Encoder, file: TableFile) -> list[str]:
    """The columns that are read: all of the file where the formula says '.'."""
    needed = list(dict.fromkeys([*encoder.columns(), *encoder.categorical]))
    return file.columns() if encoder.formula.fixed.is_open else needed


def _rank() -> tuple[int, int]:
    """This process's number in the group, and the group's size."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


# ---------------------------------------------------------------------- adding up


@dataclass
class _Parts:
    """What a process keeps of its chunks: statistics, with the levels that they have met.

    Attributes:
        levels: for each random effect its levels, as tuples of the labels of their columns.
        orders: how the labels of each grouping column are sorted, see :attr:`Encoder.orders`.
        statistics: cross-products of all terms; None before the first row.
        scale: how X and y are made well conditioned, see :func:`_conditioned`.
        encoded: a chunk, for names and designs.
        dropped: rows that miss a value.
    """

    levels: list[pd.Index] = field(default_factory=list)
    orders: dict[str, str | dict[str, int]] = field(default_factory=dict)
    statistics: Statistics | None = None
    scale: tuple[Tensor, Tensor] | None = None
    encoded: Encoded | None = None
    dropped: int = 0

    def add(self, encoder: Encoder, chunk: pd.DataFrame, own: bool) -> None:
        """Take a chunk in; one of another process only sets the scale."""
        encoded = encoder.encode(chunk)
        self.dropped += encoded.dropped_rows if own else 0
        if not len(encoded.X):
            return
        self.encoded, self.orders = encoded, encoder.orders
        y = encoded.adjusted
        if self.scale is None:
            self.scale = _conditioned(encoded.X, y)
        if not own:
            return
        T, offset = self.scale
        f = torch.cat([encoded.X @ T, (y - encoded.X @ offset)[:, None]], 1)
        designs = [IndexedDesign(d.codes, d.values, len(d.levels)) for d in encoded.random]
        groups = [encoder.learned.groups[group_key(part)] for part in encoder.formula.random]
        found = Statistics.of(designs, f, encoded.weights)
        self.join([_index(group.parts) for group in groups], found)

    def join(self, labels: Sequence[pd.Index], other: Statistics) -> None:
        """Add statistics whose levels have these labels."""
        if self.statistics is None:
            self.levels, self.statistics = list(labels), other
            return
        places = []
        for i, new in enumerate(labels):
            known = self.levels[i]
            at = known.get_indexer(new)
            fresh = at < 0
            at[fresh] = len(known) + np.arange(fresh.sum())
            self.levels[i] = known.append(new[fresh])
            places.append(torch.from_numpy(at.astype(np.int64)))
        sizes = [len(known) for known in self.levels]
        same = [torch.arange(size) for size, _ in self.statistics.sizes]
        kept = self.statistics.relabelled(same, sizes)
        self.statistics = kept + other.relabelled(places, sizes)

    def whole(self, encoder: Encoder) -> Streamed:
        """The sums over all rows, with levels in order."""
        if self.statistics is None or self.encoded is None or self.scale is None:
            raise InputError(f"{encoder.source}: every row has a missing value")
        if self.dropped:
            warnings.warn(
                f"{encoder.source}: {self.dropped} of {self.dropped + self.statistics.rows} rows "
                "left out, which miss a value",
                RuntimeWarning,
                stacklevel=4,
            )
        names, y_size = self.encoded.names, self.statistics.products.ff[-1, -1].sqrt()
        parts = encoder.formula.random
        encoder.orders = self.orders
        orders = [_order(i, encoder, part) for i, part in zip(self.levels, parts, strict=True)]
        places = []
        for order in orders:
            place = torch.empty(len(order), dtype=torch.long)
            place[torch.from_numpy(order)] = torch.arange(len(order))
            places.append(place)
        statistics = self.statistics.relabelled(places, [len(order) for order in orders])
        fixed, statistics = _orthonormal(self.scale, statistics, names)
        levels = [index[order] for index, order in zip(self.levels, orders, strict=True)]
        for part, labels in zip(parts, levels, strict=True):
            encoder.learn_group(part, list(labels))
        designs = _skeletons(encoder, self.encoded.random, statistics)
        for design in designs:
            encoder.check_size(design, statistics.rows)
        rows = len(designs[0].codes) if designs else 1
        X = torch.zeros(rows, len(names), dtype=torch.float64)
        weights = None if encoder.weights is None else torch.ones(rows, dtype=torch.float64)
        skeleton = Encoded(
            None, X, names, tuple(designs), np.arange(rows), self.dropped, weights=weights
        )
        return Streamed(encoder, skeleton, statistics, fixed, names, float(y_size), self.dropped)


def _order(index: pd.Index, encoder: Encoder, part: RandomPart) -> np.ndarray:
    """Column by column in the order that the levels of one table have."""
    keys = [encoder.sort_key(name) for name in part.factors]
    sort = [tuple(key(item) for key, item in zip(keys, label, strict=True)) for label in index]
    return np.array(sorted(range(len(sort)), key=sort.__getitem__), dtype=np.int64)


def _index(labels: Sequence[tuple[str, ...]]) -> pd.Index:
    """Tuples as values of one index, also where they have one entry."""
    values = np.empty(len(labels), dtype=object)
    values[:] = labels
    return pd.Index(values, dtype=object, tupleize_cols=False)


def _conditioned(X: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """T and b by which :math:`X T` and :math:`y - X b` are well conditioned in the first chunk."""
    p = X.shape[1]
    if len(X) > p:
        Q, R = torch.linalg.qr(X)
        if not aliased_columns(R):
            eye = torch.eye(p, dtype=X.dtype)
            T = torch.linalg.solve_triangular(R, eye, upper=True) * len(X) ** 0.5
            return T, T @ (Q.mT @ y) / len(X) ** 0.5
    # Columns that depend on others here need not in all rows.
    size = torch.linalg.vector_norm(X, dim=0)
    return torch.diag(1 / torch.where(size > 0, size, 1)), X.new_zeros(p)


def _orthonormal(
    scale: tuple[Tensor, Tensor], statistics: Statistics, names: Sequence[str]
) -> tuple[FixedPart, Statistics]:
    """The fixed part as in :class:`FixedPart`, from its cross-products."""
    T, offset = scale
    ff = statistics.products.ff
    p = len(ff) - 1
    values, vectors = torch.linalg.eigh(ff[:p, :p])
    root = values.clamp(min=0).sqrt()[:, None] * vectors.mT
    aliased = aliased_columns(root)
    if aliased:
        warnings.warn(
            "the fixed-effect model matrix is rank deficient: dropped "
            + ", ".join(names[j] for j in aliased),
            RuntimeWarning,
            stacklevel=5,
        )
    kept = [j for j in range(p) if j not in aliased]
    if statistics.rows <= len(kept):
        raise InputError(f"{statistics.rows} rows for {len(kept)} fixed effects: more are needed")
    R = torch.linalg.cholesky(ff[kept][:, kept]).mT
    eye = torch.eye(len(kept), dtype=ff.dtype)
    inner = torch.linalg.solve_triangular(R, eye, upper=True)
    b = inner @ (inner.mT @ ff[kept, -1])
    M = ff.new_zeros(p + 1, len(kept) + 1)
    M[kept, :-1], M[kept, -1], M[-1, -1] = inner, -b, 1.0
    own = T[kept][:, kept]
    none = ff.new_zeros(0)
    estimate = offset[kept] + own @ b
    Q = ff.new_zeros(0, len(kept))
    fixed = FixedPart(none, Q, own @ inner, estimate, kept, T @ null_space(root, kept))
    return fixed, statistics.mapped(M)


def _skeletons(
    encoder: Encoder, designs: Sequence[RandomDesign], statistics: Statistics
) -> list[RandomDesign]:
    """Designs of few rows with the sizes of all: each effect's value is its root mean square."""
    levels = [encoder.learned.groups[group_key(p)].labels for p in encoder.formula.random]
    rows = max(map(len, levels), default=0) + len(designs)
    groups = list(dict.fromkeys(d.group for d in designs))
    found = []
    for t, (d, labels) in enumerate(zip(designs, levels, strict=True)):
        # Different factors have different codes, whatever their numbers of levels.
        codes = (torch.arange(rows) + groups.index(d.group)) % len(labels)
        square = statistics.products.zz[t, t].diagonal(dim1=1, dim2=2).sum(0) / statistics.rows
        values = square.sqrt().expand(rows, -1).clone()
        found.append(RandomDesign(d.name, d.group, d.effects, labels, codes, values))
    return found


# ---------------------------------------------------------------------- processes


def _gathered(own: _Parts | InputError) -> list[_Parts | InputError]:
    """What each process has."""
    size = _rank()[1]
    if size == 1:
        return [own]
    found: list[Any] = [None] * size
    distributed.all_gather_object(found, own)
    return found


def _joined(parts: Sequence[_Parts | InputError]) -> _Parts:
    """The sum of all processes' parts.

    Raises:
        InputError: the first that a process met.
    """
    for part in parts:
        if isinstance(part, InputError):
            raise part
    total = _Parts()
    for part in parts:
        assert isinstance(part, _Parts)
        total.scale = part.scale or total.scale
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
