"""Kronecker products of matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from math import prod

import torch
from torch import Tensor

from openreml_nn.covariance.identity import IdentityMatrix
from openreml_nn.covariance.matrix import Matrix
from openreml_nn.covariance.nodes import is_opaque
from openreml_nn.covariance.operator import Operator
from openreml_nn.covariance.start import give_to_one, harmonic_mean
from openreml_nn.terms.base import Covariance
from openreml_nn.terms.covariance import DiagonalCovariance, KroneckerCovariance, RepeatedCovariance
from openreml_nn.terms.design import IdentityDesign, IndexedDesign
from openreml_nn.terms.precision import PrecisionCovariance
from openreml_nn.terms.products import kronecker_of, precise
from openreml_nn.terms.series import LONG, chained, repeated
from openreml_nn.terms.term import Term, has_own_columns, whole_term

__all__ = ["KroneckerProduct"]

#: A diagonal covariance of more effects than these is not written as a matrix.
_MOST_EFFECTS = 64


class KroneckerProduct(Operator):
    r"""Kronecker product :math:`V = A_0 \otimes A_1 \otimes \dots`.

    ``KroneckerProduct(IdentityMatrix(q), Sigma)`` is the covariance of q
    independent levels whose effects have covariance Sigma.

    Args:
        *args: operands; or a dict of them, or keyword arguments.

    Shape:
        Operands (nᵢ, mᵢ); output (∏ nᵢ, ∏ mᵢ).

    >>> from openreml_nn.covariance import IdentityMatrix, ScalarMatrix
    >>> KroneckerProduct(IdentityMatrix(2), ScalarMatrix(1))().detach()
    tensor([[1., 0.],
            [0., 1.]])
    """

    def infer_shape(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        return prod(s[0] for s in shapes), prod(s[1] for s in shapes)

    def combine(self, *values: Tensor) -> Tensor:
        return reduce(_kron, values)

    def combine_vjp(self, cotangent: Tensor, *values: Tensor) -> list[Tensor]:
        # Seen as a tensor of axes (n0, n1, ..., m0, m1, ...) the product is an outer product:
        # the cotangent of one operand contracts all axes but its own with the others.
        rows = [value.shape[0] for value in values]
        columns = [value.shape[1] for value in values]
        pulled = []
        for i in range(len(values)):
            rest = cotangent.reshape(*rows, *columns)
            for j in reversed(range(len(values))):
                if j != i:
                    half = rest.dim() // 2
                    axis = j if j < half else half - 1
                    rest = torch.tensordot(rest, values[j], dims=([axis, half + axis], [0, 1]))
            pulled.append(rest)
        return pulled

    def combine_jvp(self, index: int, tangent: Tensor, *values: Tensor) -> Tensor:
        return reduce(_kron, [*values[:index], tangent, *values[index + 1 :]])

    def structure(self) -> list[Term]:
        outer, *rest = self.operands.values()
        if type(outer) is IdentityMatrix and len(rest) == 1 and not is_opaque(outer):
            # What all independent levels have in common needs no product.
            (inner,) = rest
            found = inner.terms() if isinstance(inner, Matrix) else []
            if len(found) == 1 and isinstance(found[0].design, IdentityDesign):
                g = found[0].covariance
                if isinstance(g, RepeatedCovariance):
                    repeats = RepeatedCovariance(g.matrix, outer.shape[0] * g.levels, g.factor)
                    return [Term(IdentityDesign(self.shape[0]), repeats)]
        parts = []
        for name, found in self.lowered().items():
            if len(found) != 1 or not (
                isinstance(found[0].design, IdentityDesign) or _is_permuted(found[0])
            ):
                operand = self.operands[name]
                assert isinstance(operand, Matrix)
                found = [whole_term(operand())]
            parts += found
        parts = _fields(parts)
        merged: Term | None = parts[-1]
        for part in reversed(parts[:-1]):  # levels by effects, and then groups of these
            merged = _merge(part, merged)
        if merged is None:
            merged = parts[0]
            for part in parts[1:]:
                merged = _merge(merged, part)
        if merged is None:
            return super().structure()
        return [replace(merged, name="") if merged.name else merged]

    def variances(self) -> Tensor:
        own = [
            operand.variances() if isinstance(operand, Matrix) else operand.diagonal()
            for operand in self.operands.values()
        ]
        return reduce(torch.kron, own)

    def moment_start(self, variance: Tensor) -> bool:
        operands = list(self.operands.values())
        whole = variance.reshape([operand.shape[0] for operand in operands])
        shares = []
        for axis in range(len(operands)):
            others = [i for i in range(len(operands)) if i != axis]
            shares.append(harmonic_mean(whole, others) if others else whole)
        return give_to_one(operands, shares)


def _kron(a: Tensor, b: Tensor) -> Tensor:
    product = a[..., :, None, :, None] * b[..., None, :, None, :]
    rows, columns = a.shape[-2] * b.shape[-2], a.shape[-1] * b.shape[-1]
    return product.reshape(*product.shape[:-4], rows, columns)


def _fields(parts: Sequence[Term]) -> list[Term]:
    """The parts, autoregressions that stand side by side as one: their product is sparse."""
    found = [parts[0]]
    for part in parts[1:]:
        last = found[-1]
        sides = [chained(each.covariance, each.design.shape[0]) for each in (last, part)]
        joined = _merge(last, part) if None not in sides else None
        found = [*found, part] if joined is None else [*found[:-1], joined]
    return found


def _merge(outer: Term | None, inner: Term | None) -> Term | None:
    """The term of a Kronecker product of two, or None where no structure is known."""
    if outer is None or inner is None or not isinstance(outer.design, IdentityDesign):
        return None
    a, b = outer.covariance, inner.covariance
    q, k = outer.design.shape[0], inner.design.shape[0]
    if isinstance(inner.design, IndexedDesign):
        if not a.is_scalar:
            return None
        many: Covariance
        if isinstance(b, PrecisionCovariance):
            many = repeated(b.times(a.matrix.reshape(())), q)
        elif isinstance(b, RepeatedCovariance):
            many = RepeatedCovariance(a.matrix * b.matrix, q * b.levels)
        else:
            return None
        start = torch.arange(0, q * k, k, device=inner.design.codes.device)
        codes = (start[:, None] + inner.design.codes).reshape(-1)
        return Term(IndexedDesign(codes, None, q * k, absent=False), many)
    design = IdentityDesign(q * k)
    one, other = chained(a, q), chained(b, k)
    if one is not None and other is not None:
        return Term(design, KroneckerCovariance.of(one, other, chained=True))
    if a.is_scalar and (isinstance(b, PrecisionCovariance) or (q > 1 and _is_long(b, k))):
        field = precise(b)
        assert field is not None
        return Term(design, repeated(field.times(a.matrix.reshape(())), q))
    if q * k > LONG and not a.is_scalar and not (b.is_scalar and q <= _MOST_EFFECTS):
        # An autoregression by effects is not written as one matrix.
        a, b = (precise(g) or g if g.is_chained else g for g in (a, b))
        if isinstance(a, PrecisionCovariance) and isinstance(b, PrecisionCovariance):
            field = kronecker_of(a, b)
            assert field is not None
            return Term(design, field)
    if b.is_related:
        small = _small(a, q)
        if small is not None:
            found = b.with_effects(small)
            return None if found is None else Term(_levels_last(q, k, small.device), found)
        if b.width > 1 or not a.is_scalar:
            return None
        return Term(design, RepeatedCovariance(a.matrix * b.whole(k), q))
    if a.is_related:
        small = _small(b, k)
        if small is None and b.is_scalar and isinstance(a, PrecisionCovariance) and a.effects == 1:
            many = repeated(a.times(b.matrix.reshape(())), k)
            return Term(_levels_last(q, k, b.matrix.device), many)
        found = None if small is None else a.with_effects(small)
        return None if found is None else Term(design, found)
    if a.is_scalar:
        if q == 1 and isinstance(b, KroneckerCovariance):
            return Term(design, b.times(a.matrix.reshape(())))  # one field stays a product
        if isinstance(b, RepeatedCovariance):
            known = getattr(a, "factor", None) is not None and b.factor is not None
            factor = a.factor * b.factor if known else None  # type: ignore[attr-defined]
            return Term(design, RepeatedCovariance(a.matrix * b.matrix, q * b.levels, factor))
        if isinstance(b, DiagonalCovariance) and k > _MOST_EFFECTS:
            return Term(design, DiagonalCovariance((a.matrix[0] * b.matrix).repeat(q)))
        return Term(design, RepeatedCovariance(a.matrix * b.whole(k), q))
    small = _small(a, q)
    if b.is_scalar and small is not None:
        return Term(_levels_last(q, k, small.device), RepeatedCovariance(b.matrix * small, k))
    if a.is_solid and b.is_solid:
        return Term(design, KroneckerCovariance.of(a.matrix, b.matrix))
    return None


def _is_permuted(term: Term) -> bool:
    """Whether it is over levels of several effects, each row with a column of its own."""
    return isinstance(term.covariance, PrecisionCovariance) and has_own_columns(term.design)


def _is_long(g: Covariance, size: int) -> bool:
    """Whether copies of it are held by a sparse precision."""
    return size > LONG and precise(g) is not None


def _small(g: Covariance, size: int) -> Tensor | None:
    """The matrix itself where it is small, None otherwise."""
    return g.whole(size) if size <= _MOST_EFFECTS else None


def _levels_last(effects: int, levels: int, device: torch.device) -> IndexedDesign:
    """Rows effect by effect, over columns level by level."""
    row = torch.arange(effects * levels, device=device)
    codes = row % levels * effects + row // levels
    return IndexedDesign(codes, None, effects * levels, absent=False)
