"""What is kept of the rows of a table that comes in chunks: cross-products, which add up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from openreml_nn.likelihood.fixed import FixedPart, aliased_columns, null_space
from openreml_nn.likelihood.system.crossproducts import Statistics
from openreml_nn.model.structures import bases_of
from openreml_nn.support.errors import InputError
from openreml_nn.support.spectrum import decomposed
from openreml_nn.support.warning import warn
from openreml_nn.table import Encoded, Encoder, RandomDesign
from openreml_nn.table.encoder import group_key
from openreml_nn.table.formula import RandomPart
from openreml_nn.terms.design import IndexedDesign

__all__ = ["Parts", "Sums", "conditioned", "fixed_part", "orthonormal"]


@dataclass
class Sums:
    """What is kept of the rows.

    Attributes:
        encoder: what the formula makes of a table, with the levels of all rows.
        skeleton: designs of the learned sizes, without the rows.
        statistics: cross-products of the random terms and of the fixed part.
        fixed: how the fixed part was made well conditioned.
        names: names of the columns of X.
        size: length of the response.
        dropped_rows: rows left out because of missing values.
        bases: in which the cross-products of random effects are, by the names of their designs.
    """

    encoder: Encoder
    skeleton: Encoded
    statistics: Statistics
    fixed: FixedPart
    names: tuple[str, ...]
    size: float
    dropped_rows: int
    bases: Mapping[str, Tensor]


@dataclass
class Parts:
    """What a process keeps of its chunks: statistics, with the levels that they have met.

    Attributes:
        levels: for each random effect its levels, as tuples of the labels of their columns.
        orders: how the labels of each grouping column are sorted.
        statistics: cross-products of all terms; None before the first row.
        scale: how X and y are made well conditioned, see :func:`conditioned`.
        bases: those of the random effects' values, see :func:`basis_of`, by the names of designs.
        encoded: a chunk, for names and designs.
        dropped: rows that miss a value.
    """

    levels: list[pd.Index] = field(default_factory=list)
    orders: dict[str, str | dict[str, int]] = field(default_factory=dict)
    statistics: Statistics | None = None
    scale: tuple[Tensor, Tensor] | None = None
    bases: dict[str, Tensor] = field(default_factory=dict)
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
            self.scale = conditioned(encoded.X, y)
            self.bases = bases_of(encoded.random)
        if not own:
            return
        T, offset = self.scale
        f = torch.cat([encoded.X @ T, (y - encoded.X @ offset)[:, None]], 1)
        designs = [self._design(d) for d in encoded.random]
        groups = [encoder.learned.groups[group_key(part)] for part in encoder.formula.random]
        own_sums = Statistics.of(designs, f, encoded.weights)
        self.join([_index(group.parts) for group in groups], own_sums)

    def _design(self, d: RandomDesign) -> IndexedDesign:
        values = d.values @ self.bases[d.name] if d.name in self.bases else d.values
        return IndexedDesign(d.codes, values, len(d.levels))

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

    def whole(self, encoder: Encoder) -> Sums:
        """The sums over all rows, with levels in order."""
        if self.statistics is None or self.encoded is None or self.scale is None:
            what = "every row has a missing value" if self.dropped else "there are no rows"
            raise InputError(f"{encoder.source}: {what}")
        if self.dropped:
            warn(
                f"{encoder.source}: {self.dropped} of {self.dropped + self.statistics.rows} rows "
                "left out, which miss a value"
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
        fixed, statistics = orthonormal(self.scale, statistics, names)
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
        return Sums(
            encoder, skeleton, statistics, fixed, names, float(y_size), self.dropped, self.bases
        )


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


def conditioned(X: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """T and b by which :math:`X T` and :math:`y - X b` are well conditioned in the first chunk; of
    several responses (n, t) b is (p, t)."""
    p = X.shape[1]
    if len(X) > p:
        Q, R = torch.linalg.qr(X)
        if not aliased_columns(R):
            eye = torch.eye(p, dtype=X.dtype)
            T = torch.linalg.solve_triangular(R, eye, upper=True) * len(X) ** 0.5
            return T, T @ (Q.mT @ y) / len(X) ** 0.5
    # Columns that depend on others here need not in all rows.
    size = torch.linalg.vector_norm(X, dim=0)
    return torch.diag(1 / torch.where(size > 0, size, 1)), X.new_zeros(p, *y.shape[1:])


def orthonormal(
    scale: tuple[Tensor, Tensor], statistics: Statistics, names: Sequence[str]
) -> tuple[FixedPart, Statistics]:
    """The fixed part as in :class:`FixedPart`, from its cross-products.

    Args:
        scale: T and b of :func:`conditioned`.
        statistics: those of :math:`[X T, y - X b]`.
        names: of the columns of X, for warnings.

    Returns:
        The fixed part, of no rows, and its cross-products.

    Raises:
        InputError: if there are not more rows than columns.
    """
    fixed, M = fixed_part(scale, statistics.products.ff, statistics.rows, names)
    return fixed, statistics.mapped(M)


def fixed_part(
    scale: tuple[Tensor, Tensor], ff: Tensor, rows: int, names: Sequence[str]
) -> tuple[FixedPart, Tensor]:
    """The fixed part of so many rows, and M by which :math:`[X T, y - X b]` become its columns and y;
    see :func:`orthonormal`."""
    T, offset = scale
    p = len(ff) - 1
    values, vectors = decomposed(ff[:p, :p], "the cross-products of the features")
    root = values.clamp(min=0).sqrt()[:, None] * vectors.mT
    aliased = aliased_columns(root)
    if aliased:
        warn(
            "the fixed-effect model matrix is rank deficient: dropped "
            + ", ".join(names[j] for j in aliased)
        )
    kept = [j for j in range(p) if j not in aliased]
    if rows <= len(kept):
        raise InputError(f"{rows} rows for {len(kept)} fixed effects: more are needed")
    R = torch.linalg.cholesky(ff[kept][:, kept]).mT
    eye = torch.eye(len(kept), dtype=ff.dtype, device=ff.device)
    inner = torch.linalg.solve_triangular(R, eye, upper=True)
    b = inner @ (inner.mT @ ff[kept, -1])
    M = ff.new_zeros(p + 1, len(kept) + 1)
    M[kept, :-1], M[kept, -1], M[-1, -1] = inner, -b, 1.0
    own = T[kept][:, kept]
    none = ff.new_zeros(0)
    estimate = offset[kept] + own @ b
    Q = ff.new_zeros(0, len(kept))
    fixed = FixedPart(none, Q, own @ inner, estimate, kept, T @ null_space(root, kept))
    return fixed, M


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
