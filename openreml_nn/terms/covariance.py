r"""The kinds of structured covariances :math:`G`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from openreml_nn.support.errors import NumericalError
from openreml_nn.terms.base import Covariance, LinearCovariance, Meeting, condition, square_root
from openreml_nn.terms.design import Design, IndexedDesign
from openreml_nn.terms.kernel import Kernel

__all__ = [
    "DenseCovariance",
    "DiagonalCovariance",
    "KroneckerCovariance",
    "RepeatedCovariance",
    "ScaledCovariance",
    "kronecker",
]


def _equal(codes: Tensor, like: Tensor) -> Tensor:
    """Ones where two of the codes (n,) are equal, zeros elsewhere, (n, n)."""
    if torch._C._are_functorch_transforms_active():
        return (codes[:, None] == codes).to(like.dtype)
    # Written as numbers at once, which takes half the time; a double holds any code.
    n = codes.shape[0]
    codes = codes.double() if like.dtype == torch.float64 else codes
    return torch.eq(codes[:, None], codes, out=like.new_empty(n, n))


@dataclass(frozen=True)
class RepeatedCovariance(LinearCovariance):
    r""":math:`G = I_q \otimes \Sigma`: ``levels`` independent copies of ``matrix`` (k, k).

    ``factor`` is a square root, :math:`\Sigma = L L^\top`, where the tree knows one.
    """

    levels: int = 1
    factor: Tensor | None = None

    @property
    def block(self) -> int:
        return self.matrix.shape[0]

    width = block

    @property
    def is_scalar(self) -> bool:
        return self.matrix.shape[0] == 1

    is_diagonal = is_scalar

    @property
    def is_solid(self) -> bool:
        return self.levels == 1

    def take(self, rows: Tensor) -> Covariance | None:
        if not self.is_scalar:
            return None
        return RepeatedCovariance(self.matrix, len(rows), self.factor)

    def places(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        return codes // self.block, codes % self.block

    def among(self, at: Tensor, joint: Tensor) -> Tensor:
        return joint * self.matrix[at[..., :, None], at[..., None, :]]

    def with_matrix(self, matrix: Tensor) -> RepeatedCovariance:
        return RepeatedCovariance(matrix, self.levels)

    def map(self, function: Callable[[Tensor], Tensor]) -> RepeatedCovariance:
        factor = None if self.factor is None else function(self.factor)
        return RepeatedCovariance(function(self.matrix), self.levels, factor)

    def multiply(self, x: Tensor, transpose: bool = False) -> Tensor:
        matrix = self.matrix.mT if transpose else self.matrix
        if matrix.shape[0] == 1:
            return matrix[0] * x
        return (matrix @ x.reshape(self.levels, matrix.shape[0], -1)).reshape(x.shape)

    def sandwich(self, design: Design, meeting: Meeting | None = None) -> Tensor:
        found = self.meeting(design) if meeting is None else meeting
        if found is None:
            return super().sandwich(design)
        together, rows = found
        if rows is None:
            return together * self.matrix
        if rows.shape[1] == 1:
            z = rows[:, 0]
            return together * (z @ self.matrix @ z.mT)
        # (n, copies, k): a copy of the block for each k effects of a row.
        return together * torch.einsum("nak,kl,mal->nm", rows, self.matrix, rows)

    def fold_sandwich(
        self, design: Design, cotangent: Tensor, meeting: Meeting | None = None
    ) -> Tensor:
        found = self.meeting(design) if meeting is None else meeting
        if found is None:
            return super().fold_sandwich(design, cotangent)
        together, rows = found
        if rows is None:
            return (together.reshape(-1) @ cotangent.reshape(-1)).reshape(1, 1)
        if rows.shape[1] == 1:
            z = rows[:, 0]
            return z.mT @ (together * cotangent) @ z
        return torch.einsum("nak,nm,mal->kl", rows, together * cotangent, rows)

    def meeting(self, design: Design) -> Meeting | None:
        # Rows of different blocks are independent, so that nothing of all levels need be formed.
        k = len(self.matrix)
        if not isinstance(design, IndexedDesign) or (k % design.effects and design.effects % k):
            return None
        codes, values = design.codes, design.values
        levels = k // design.effects  # of a block; 0 where a level has several
        if levels > 1:
            like = self.matrix if values is None else values.to(self.matrix)
            rows = like.new_zeros(len(codes), levels, design.effects)
            ones = rows.new_ones(len(codes), 1) if values is None else like
            at = (codes % levels)[:, None, None].expand(-1, 1, design.effects)
            values = rows.scatter(1, at, ones[:, None]).flatten(1)
            codes = codes // levels
        together = _equal(codes, self.matrix)
        if values is None:
            return Meeting(together, None)
        z = values.to(self.matrix)
        return Meeting(together, z[:, None] if z.shape[1] == k else z.unflatten(1, (-1, k)))

    def root(self) -> RepeatedCovariance:
        factor = square_root(self.matrix) if self.factor is None else self.factor
        return RepeatedCovariance(factor, self.levels)

    def root_condition(self) -> float:
        return 1.0 if self.factor is not None or self.is_scalar else condition(self.matrix)

    def fold(self, cotangent: Tensor) -> Tensor:
        k = self.matrix.shape[0]
        if k == 1:
            return cotangent.trace().reshape(1, 1)
        four = cotangent.reshape(self.levels, k, self.levels, k)
        return four.diagonal(dim1=0, dim2=2).sum(-1)

    def blocks(self, levels: int, effects: int) -> Tensor:
        k = self.matrix.shape[0]
        if k == effects:
            return self.matrix[None]
        # Several copies within a level, as where all effects have one variance.
        eye = torch.eye(effects // k, dtype=self.matrix.dtype, device=self.matrix.device)
        return torch.einsum("ij,ab->iajb", eye, self.matrix).reshape(1, effects, effects)

    def fold_blocks(self, cotangent: Tensor) -> Tensor:
        k, effects = self.matrix.shape[0], cotangent.shape[-1]
        if k == effects:
            return cotangent.sum(0)
        four = cotangent.sum(0).reshape(effects // k, k, effects // k, k)
        return four.diagonal(dim1=0, dim2=2).sum(-1)


@dataclass(frozen=True)
class DiagonalCovariance(LinearCovariance):
    r""":math:`G = \mathrm{diag}(v)` with ``matrix`` the variances (q,)."""

    @property
    def block(self) -> int:
        return 1

    @property
    def is_diagonal(self) -> bool:
        return True

    def take(self, rows: Tensor) -> Covariance | None:
        return DiagonalCovariance(self.matrix[rows])

    def places(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        return torch.arange(len(codes), device=codes.device), codes

    def among(self, at: Tensor, joint: Tensor) -> Tensor:
        return torch.diag_embed(self.matrix[at])

    def multiply(self, x: Tensor, transpose: bool = False) -> Tensor:
        return self.matrix[:, None] * x

    def root(self) -> DiagonalCovariance:
        if bool((self.matrix < 0).any()):
            raise NumericalError("a variance is negative")
        return DiagonalCovariance(self.matrix.sqrt())

    def root_condition(self) -> float:
        return 1.0

    def fold(self, cotangent: Tensor) -> Tensor:
        return cotangent.diagonal()

    def blocks(self, levels: int, effects: int) -> Tensor:
        return torch.diag_embed(self.matrix.reshape(levels, effects))

    def fold_blocks(self, cotangent: Tensor) -> Tensor:
        return cotangent.diagonal(dim1=1, dim2=2).reshape(-1)


@dataclass(frozen=True)
class DenseCovariance(LinearCovariance):
    """A covariance without structure, ``matrix`` (q, q).

    It is ``chained`` where its inverse is tridiagonal whatever the parameters, as an
    autoregression's is.
    """

    chained: bool = False

    def with_matrix(self, matrix: Tensor) -> DenseCovariance:
        return DenseCovariance(matrix, self.chained)

    @property
    def form(self) -> tuple[object, ...]:
        return *super().form, self.chained

    @property
    def is_chained(self) -> bool:
        return self.chained

    @property
    def is_diagonal(self) -> bool:
        return len(self.matrix) == 1

    @property
    def is_solid(self) -> bool:
        return True

    def multiply(self, x: Tensor, transpose: bool = False) -> Tensor:
        return (self.matrix.mT if transpose else self.matrix) @ x

    def whole(self, size: int) -> Tensor:
        return self.matrix

    def root(self) -> DenseCovariance:
        return DenseCovariance(square_root(self.matrix))

    def fold(self, cotangent: Tensor) -> Tensor:
        return cotangent


@dataclass(frozen=True)
class KroneckerCovariance(Covariance):
    r""":math:`G = A \otimes B`, ``matrix`` the entries of A (r, r) and then those of B (c, c)."""

    sizes: tuple[int, int] = (1, 1)
    chained: bool = False

    @classmethod
    def of(cls, A: Tensor, B: Tensor, chained: bool = False) -> KroneckerCovariance:
        """From its two parts; it is ``chained`` where both their inverses are tridiagonal."""
        return cls(torch.cat([A.reshape(-1), B.reshape(-1)]), (len(A), len(B)), chained)

    @property
    def form(self) -> tuple[object, ...]:
        return *super().form, self.sizes, self.chained

    @property
    def is_chained(self) -> bool:
        return self.chained

    def parts(self) -> tuple[Tensor, Tensor]:
        """A and B."""
        r, c = self.sizes
        A, B = self.matrix.split([r * r, c * c])
        return A.reshape(r, r), B.reshape(c, c)

    def with_matrix(self, matrix: Tensor) -> KroneckerCovariance:
        return KroneckerCovariance(matrix, self.sizes, self.chained)

    def times(self, scale: Tensor) -> KroneckerCovariance:
        A, B = self.parts()
        return self.of(scale * A, B, self.chained)

    def shown(self, effects: int = 1) -> Tensor:
        A, B = self.parts()
        if len(B) == effects:  # levels that are correlated, each with effects of covariance B
            return A.diagonal().mean() * B
        return (A.diagonal().mean() * B.diagonal().mean()).reshape(1, 1)

    def multiply(self, x: Tensor, transpose: bool = False) -> Tensor:
        A, B = (part.mT if transpose else part for part in self.parts())
        return kronecker(A, B, x)

    def along(self, derivative: Tensor, x: Tensor) -> Tensor:
        (A, B), (dA, dB) = self.parts(), self.with_matrix(derivative).parts()
        return kronecker(dA, B, x) + kronecker(A, dB, x)

    def whole(self, size: int) -> Tensor:
        A, B = self.parts()
        return torch.einsum("ij,ab->iajb", A, B).reshape(size, size)

    def root(self) -> KroneckerCovariance:
        A, B = self.parts()
        return self.of(square_root(A), square_root(B))

    def root_condition(self) -> float:
        A, B = self.parts()
        return condition(A) * condition(B)

    def fold(self, cotangent: Tensor) -> Tensor:
        (A, B), (r, c) = self.parts(), self.sizes
        four = cotangent.reshape(r, c, r, c)
        of_A, of_B = torch.einsum("rcsd,cd->rs", four, B), torch.einsum("rcsd,rs->cd", four, A)
        return torch.cat([of_A.reshape(-1), of_B.reshape(-1)])

    def inner(self, folded: Tensor) -> Tensor:
        # Bilinear: the cotangent of either side has seen the other already.
        r = self.sizes[0]
        return folded[: r * r] @ self.matrix[: r * r]


def kronecker(A: Tensor, B: Tensor, x: Tensor) -> Tensor:
    r""":math:`(A \otimes B) x` for x (r * c, m), first by columns and then by rows."""
    grid = x.reshape(A.shape[1], B.shape[1], -1)
    moved = A @ (B @ grid).flatten(1)
    return moved.reshape(len(A) * len(B), -1)


@dataclass(frozen=True)
class ScaledCovariance(LinearCovariance):
    r""":math:`G = K \otimes \Sigma` with a known kernel K (q, q) and ``matrix`` Σ (t, t).

    With t = 1 a multiple of K. Columns stand level by level, the t effects of
    a level together.
    """

    kernel: Kernel = field(default_factory=lambda: Kernel(torch.empty(0, 0)))

    @property
    def form(self) -> tuple[object, ...]:
        return *super().form, self.kernel.inverse is None

    @property
    def constants(self) -> list[Tensor | None]:
        return [self.kernel.source]

    def private(self) -> Covariance:
        return ScaledCovariance(self.matrix, self.kernel.private())

    @property
    def width(self) -> int:
        return self.matrix.shape[0]

    @property
    def is_related(self) -> bool:
        return True

    @property
    def known_kernel(self) -> Kernel | None:
        return self.kernel

    def without_kernel(self) -> Covariance:
        return RepeatedCovariance(self.matrix, self.kernel.size)

    def with_effects(self, sigma: Tensor) -> Covariance | None:
        return self.with_matrix(self.matrix * sigma) if self.width == 1 else None

    def with_matrix(self, matrix: Tensor) -> ScaledCovariance:
        return ScaledCovariance(matrix, self.kernel)

    def map(self, function: Callable[[Tensor], Tensor]) -> ScaledCovariance:
        # K stays as it is: converting it for every evaluation would take longer than that.
        return self.with_matrix(function(self.matrix))

    def multiply(self, x: Tensor, transpose: bool = False) -> Tensor:
        t = self.matrix.shape[0]
        if t == 1:
            return self.matrix[0] * self.kernel.multiply(x)
        matrix = self.matrix.mT if transpose else self.matrix
        moved = self.kernel.multiply(x.reshape(self.kernel.size, -1))
        return (matrix @ moved.reshape(self.kernel.size, t, -1)).reshape(x.shape)

    def whole(self, size: int) -> Tensor:
        K = self.kernel.dense().to(self.matrix)
        if self.matrix.shape[0] == 1:
            return self.matrix * K
        t, q = self.matrix.shape[0], self.kernel.size
        return torch.einsum("ij,ab->iajb", K, self.matrix).reshape(q * t, q * t)

    def root(self) -> Covariance:
        return DenseCovariance(square_root(self.whole(self.kernel.size * self.matrix.shape[0])))

    def root_condition(self) -> float:
        return condition(self.whole(self.kernel.size * self.matrix.shape[0]))

    def fold(self, cotangent: Tensor) -> Tensor:
        t, q = self.matrix.shape[0], self.kernel.size
        K = self.kernel.dense().to(cotangent)
        if t == 1:
            # A product without a matrix of its own to hold it.
            return (cotangent.reshape(-1) @ K.reshape(-1)).reshape(1, 1)
        return torch.einsum("ij,iajb->ab", K, cotangent.reshape(q, t, q, t))
