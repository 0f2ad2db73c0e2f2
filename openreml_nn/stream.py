"""A linear mixed model of a table larger than memory: exact, in one pass over the file.

The likelihood of a model with one residual variance depends on the rows through
cross-products alone, which add up over chunks of rows, and over the processes
of a ``torch.distributed`` group, each of which reads its share of the chunks.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from rich.progress import Progress
from torch import Tensor, distributed

from openreml_nn.covariance.design import IndexedDesign
from openreml_nn.data import Encoded, Encoder, RandomDesign
from openreml_nn.errors import InputError
from openreml_nn.estimation import Result
from openreml_nn.estimation.fit import checked, iterate, start_by_moments
from openreml_nn.likelihood.blocked import BlockedProblem
from openreml_nn.likelihood.fixed import FixedPart, aliased_columns, null_space
from openreml_nn.likelihood.loss import Objective
from openreml_nn.likelihood.plan import Plan
from openreml_nn.likelihood.products import Statistics

__all__ = ["Streamed", "accumulate", "fit_stream"]


def fit_stream(
    formula: str,
    path: str | os.PathLike[str],
    *,
    chunk_rows: int = 1_000_000,
    categorical: Sequence[str] = (),
    method: str = "reml",
    max_iterations: int = 200,
    progress: bool = True,
) -> Result:
    r"""Fit a linear mixed model to a file, chunk by chunk.

    Memory holds a chunk, and what does not grow with the rows: the levels of
    the grouping factors and which of them meet. The estimates are those of
    :func:`lmm`; there are no fitted values. Under an initialised
    ``torch.distributed`` process group every process reads its share of the
    chunks, and all get the same result.

    Columns of text among the fixed effects are read once more beforehand, for
    their levels.

    Args:
        formula: an lme4-style formula.
        path: a Parquet file, or a CSV file.
        chunk_rows: rows that are held at a time.
        categorical: numeric columns to be taken as factors.
        method: ``"reml"`` or ``"ml"``.
        max_iterations: after so many the fit stops, with a warning.
        progress: whether a bar shows on stderr how far the file is read.

    Raises:
        InputError: if the formula or the file is at fault, or a function such
            as ``scale`` needs all rows at once.

    >>> from openreml_nn.datasets import table_path
    >>> path = table_path("sleepstudy")
    >>> formula = "Reaction ~ Days + (Days | Subject)"
    >>> result = fit_stream(formula, path, chunk_rows=50, progress=False)
    >>> f"{result.log_likelihood:.4f}"
    '-871.8141'
    """
    found = accumulate(formula, path, chunk_rows, categorical, progress)
    return found.fit(method, max_iterations)


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

    def fit(self, method: str = "reml", max_iterations: int = 200) -> Result:
        """The fit by AI-REML."""
        covariance = self.skeleton.covariance()
        terms = covariance.terms()
        problem = BlockedProblem(self.fixed, terms, method, self.statistics)
        plan = Plan.of(terms, problem.p, "blocked", torch.float64).measured(problem, terms)
        plan = replace(plan, rows=problem.n, reason="cross-products of chunks of rows")
        objective = Objective(covariance, problem, None)
        start_by_moments(objective, self.size)
        history = iterate(objective, max_iterations)
        labels = self.skeleton.labels
        return checked(Result.of(objective, plan, None, None, history, self.names, labels))


def accumulate(
    formula: str,
    path: str | os.PathLike[str],
    chunk_rows: int = 1_000_000,
    categorical: Sequence[str] = (),
    progress: bool = True,
) -> Streamed:
    """Read a file chunk by chunk and keep its cross-products; see :func:`fit_stream`."""
    if chunk_rows < 1:
        raise InputError(f"`chunk_rows` is {chunk_rows}: expected at least 1")
    file = _File(path, chunk_rows)
    encoder = Encoder(formula, categorical, f"file {str(path)!r}")
    categories = _fixed_levels(file, encoder)
    parts = _Parts()
    for chunk in file.chunks(_columns(encoder, file), progress):
        parts.add(encoder, chunk, categories)
    return parts.whole(encoder, categories)


# ---------------------------------------------------------------------- reading


class _File:
    """A Parquet or CSV file in chunks, shared among the processes of a group."""

    def __init__(self, path: str | os.PathLike[str], chunk_rows: int) -> None:
        self.path, self.rows = Path(path), chunk_rows
        if not self.path.is_file():
            raise InputError(f"file {str(path)!r} does not exist: expected a CSV or Parquet file")
        self._parquet = self.path.suffix.lower() == ".parquet"
        if not self._parquet and ".csv" not in self.path.suffixes[-2:]:
            raise InputError(f"file {str(path)!r}: only CSV and Parquet files are read in chunks")

    def head(self) -> pd.DataFrame:
        """The first rows."""
        return next(self._all(None, 1000), pd.DataFrame())

    def chunks(self, columns: list[str], progress: bool) -> Iterator[pd.DataFrame]:
        """This process's chunks of some columns."""
        rank, size = _rank()
        with Progress(disable=not progress or rank > 0, transient=True) as bar:
            task = bar.add_task(f"reading {self.path.name}", total=self._total())
            for i, chunk in enumerate(self._all(columns, self.rows)):
                if i % size == rank:
                    yield chunk
                bar.advance(task, len(chunk))

    def _total(self) -> int | None:
        if not self._parquet:
            return None
        import pyarrow.parquet as pq

        with self._told(), pq.ParquetFile(self.path) as source:
            return int(source.metadata.num_rows)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Turn an error of reading into one that names the file."""
        try:
            yield
        except InputError:
            raise
        except (OSError, ValueError, pd.errors.ParserError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"file {str(self.path)!r} cannot be read: {reason}") from None

    def _all(self, columns: list[str] | None, rows: int) -> Iterator[pd.DataFrame]:
        if not self._parquet:
            with self._told():
                reader = pd.read_csv(self.path, usecols=columns, chunksize=rows)
            with reader:
                while True:
                    with self._told():
                        chunk = next(reader, None)
                    if chunk is None:
                        return
                    yield chunk
        import pyarrow.parquet as pq

        with self._told(), pq.ParquetFile(self.path) as source:
            for batch in source.iter_batches(rows, columns=columns):
                yield batch.to_pandas()


def _rank() -> tuple[int, int]:
    """This process's number in the group, and the group's size."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def _columns(encoder: Encoder, file: _File) -> list[str]:
    needed = [*encoder.columns(), *encoder.categorical]
    head = file.head()
    for column in needed:
        if column not in head.columns:
            near = ", ".join(map(str, head.columns[:20]))
            raise InputError(f"{encoder.source} has no column {column!r}: its columns are {near}")
    return list(dict.fromkeys(needed))


def _fixed_levels(file: _File, encoder: Encoder) -> dict[str, list[str]]:
    """Levels of the factors among the fixed effects, which all chunks must agree on."""
    _columns(encoder, file)
    factors = encoder.fixed_factors(file.head())
    if not factors:
        return {}
    seen: dict[str, pd.Series] = {}
    for chunk in file._all(factors, file.rows):
        for name in factors:
            new = chunk[name].dropna().drop_duplicates()
            seen[name] = new if name not in seen else pd.concat([seen[name], new]).drop_duplicates()
    return encoder.levels_of(
        pd.DataFrame({name: s.reset_index(drop=True) for name, s in seen.items()})
    )


# ---------------------------------------------------------------------- adding up


@dataclass
class _Parts:
    """The statistics of the chunks so far, with the levels that they have met."""

    levels: list[pd.Index] = field(default_factory=list)
    statistics: Statistics | None = None
    scale: tuple[Tensor, Tensor] | None = None
    encoded: Encoded | None = None
    dropped: int = 0
    numeric: dict[str, bool] = field(default_factory=dict)

    def add(self, encoder: Encoder, chunk: pd.DataFrame, categories: dict[str, list[str]]) -> None:
        """Take a chunk in."""
        columns = encoder.columns()
        complete = chunk[columns].notna().all(axis=1).sum()
        self.dropped += len(chunk) - int(complete)
        for name in columns:
            is_number = pd.api.types.is_numeric_dtype(chunk[name])
            self.numeric[name] = self.numeric.get(name, True) and is_number
        if not complete:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # rows left out are counted, and told of at the end
            encoded = encoder.fit(chunk, categories)
        if any(state for key, state in encoder.state["transforms"].items() if key != "response"):
            raise InputError(
                f"{encoder.source}: a function such as scale, center or poly needs all rows at "
                "once: write its result into a column"
            )
        self.encoded = encoded
        assert encoded.y is not None
        if self.scale is None:
            self.scale = _shared(_conditioned(encoded.X, encoded.y))
        T, offset = self.scale
        f = torch.cat([encoded.X @ T, (encoded.y - encoded.X @ offset)[:, None]], 1)
        designs = [IndexedDesign(d.codes, d.values, len(d.levels)) for d in encoded.random]
        labels = [pd.Index(_keys(encoder, d), dtype=object) for d in encoded.random]
        self.join(labels, Statistics.of(designs, f))

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

    def whole(self, encoder: Encoder, categories: dict[str, list[str]]) -> Streamed:
        """All processes' parts together, with levels in order."""
        for i, (labels, statistics, dropped, numeric) in enumerate(_gathered(self)):
            if i == 0:
                self.levels, self.statistics, self.dropped = [], None, 0
            self.dropped += dropped
            self.numeric = {k: self.numeric.get(k, True) and v for k, v in numeric.items()}
            if statistics is not None:
                self.join(labels, statistics)
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
        orders = [self._order(index, d) for index, d in zip(self.levels, self.encoded.random)]
        places = []
        for order in orders:
            place = torch.empty(len(order), dtype=torch.long)
            place[torch.from_numpy(order)] = torch.arange(len(order))
            places.append(place)
        statistics = self.statistics.relabelled(places, [len(order) for order in orders])
        fixed, statistics = _orthonormal(self.scale, statistics, names)
        levels = [index[order] for index, order in zip(self.levels, orders, strict=True)]
        designs = _skeletons(self.encoded.random, levels, statistics)
        rows = len(designs[0].codes) if designs else 1
        encoder.learn_levels(designs, levels, categories, self.numeric)
        for design in designs:
            encoder._check_size(design, statistics.rows)
        X = torch.zeros(rows, len(names), dtype=torch.float64)
        skeleton = Encoded(None, X, names, tuple(designs), np.arange(rows), self.dropped)
        return Streamed(encoder, skeleton, statistics, fixed, names, float(y_size), self.dropped)

    def _order(self, index: pd.Index, design: RandomDesign) -> np.ndarray:
        """Numbers by size and all else by spelling, factor by factor, as in one table."""
        numeric = [self.numeric.get(name, False) for name in design.group.split(":")]

        def key(label: tuple[str, ...]) -> tuple[Any, ...]:
            return tuple(float(x) if n else x for x, n in zip(label, numeric, strict=True))

        return np.array(sorted(range(len(index)), key=lambda i: key(index[i])), dtype=np.int64)


def _keys(encoder: Encoder, design: RandomDesign) -> list[tuple[str, ...]]:
    """A chunk's levels as tuples of the labels of their factors."""
    known = encoder.state["groups"][design.group]
    rest, parts = np.asarray(known["cells"]), []
    for labels in reversed(known["columns"]):
        parts.append(np.asarray(labels, dtype=object)[rest % len(labels)])
        rest = rest // len(labels)
    return list(zip(*reversed(parts), strict=True))


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
    designs: Sequence[RandomDesign], levels: Sequence[pd.Index], statistics: Statistics
) -> list[RandomDesign]:
    """Designs of few rows with the sizes of all: each effect's value is its root mean square."""
    rows = max((len(index) for index in levels), default=0) + len(designs)
    groups = list(dict.fromkeys(d.group for d in designs))
    found = []
    for t, (d, index) in enumerate(zip(designs, levels, strict=True)):
        # Different factors have different codes, whatever their numbers of levels.
        codes = (torch.arange(rows) + groups.index(d.group)) % len(index)
        square = statistics.products.zz[t, t].diagonal(dim1=1, dim2=2).sum(0) / statistics.rows
        values = square.sqrt().expand(rows, -1).clone()
        labels = tuple(":".join(parts) for parts in index)
        found.append(RandomDesign(d.name, d.group, d.effects, labels, codes, values))
    return found


# ---------------------------------------------------------------------- processes


def _shared(scale: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The first process's, for all."""
    if _rank()[1] > 1:
        kept = [scale]
        distributed.broadcast_object_list(kept, src=0)
        return kept[0]
    return scale


def _gathered(
    parts: _Parts,
) -> list[tuple[list[pd.Index], Statistics | None, int, dict[str, bool]]]:
    own = (parts.levels, parts.statistics, parts.dropped, parts.numeric)
    size = _rank()[1]
    if size == 1:
        return [own]
    found: list[Any] = [None] * size
    distributed.all_gather_object(found, own)
    return found
