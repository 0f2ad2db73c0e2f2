"""The data of a call of the marginal likelihood, and what is kept for the next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from openreml_nn.covariance import Matrix
from openreml_nn.families.family import Family
from openreml_nn.likelihood.fixed import traced
from openreml_nn.likelihood.laplace_mode import Rows
from openreml_nn.likelihood.laplace_space import Factor, Space
from openreml_nn.support.checks import check_constant, check_tensor
from openreml_nn.support.errors import InputError
from openreml_nn.terms.covariance import RepeatedCovariance
from openreml_nn.terms.kernel import private, same_content
from openreml_nn.terms.term import Term

__all__ = [
    "CheckedResponses",
    "Kept",
    "Task",
    "check_call",
    "constants_of",
    "factors_of",
    "with_tensors",
]


def constants_of(terms: Sequence[Term]) -> list[Tensor]:
    """What designs and kernels hold."""
    return [t for term in terms for t in term.constants if t is not None]


def factors_of(terms: Sequence[Term]) -> list[Tensor]:
    """The factors of covariances that are held by one."""
    forms = (term.covariance for term in terms)
    return [g.factor for g in forms if isinstance(g, RepeatedCovariance) and g.factor is not None]


def with_tensors(
    terms: Sequence[Term],
    matrices: Sequence[Tensor],
    factors: Iterator[Tensor],
    constants: Iterator[Tensor],
) -> list[Term]:
    """The terms with other tensors in the places of their own."""
    found = []
    for term, matrix in zip(terms, matrices, strict=True):
        form = term.covariance.with_matrix(matrix)
        if isinstance(term.covariance, RepeatedCovariance) and term.covariance.factor is not None:
            form = RepeatedCovariance(matrix, term.covariance.levels, next(factors))
        place = {id(t): next(constants) for t in term.constants if t is not None}
        design = term.design.map(lambda t, place=place: place[id(t)])  # type: ignore[misc]
        found.append(replace(term, design=design, covariance=form))
    return found


class Task:
    """The data of a call with their terms, and the coefficients of X once they are known."""

    def __init__(self, rows: Rows, terms: list[Term]) -> None:
        self.rows, self.terms = rows, terms
        self.beta = rows.eta.detach().new_zeros(0)

    def is_recorded(self, method: str, quadrature: int) -> bool:
        """Whether derivatives come from a recorded formula, which is by blocks: with quadrature, of
        designs that move, and of an X that is integrated over."""
        moves = any(t.requires_grad for t in constants_of(self.terms))
        return quadrature > 1 or moves or (method == "reml" and self.rows.X.requires_grad)


class Kept:
    """Where the effects of some designs stand, and where their last mode was: a start for the next."""

    def __init__(self, forms: list[Any], constants: list[Tensor | None], space: Space) -> None:
        self._forms, self._constants, self.space = forms, constants, space
        self.start: Tensor | None = None
        self.beta: Tensor | None = None
        self._factor: tuple[Factor, Tensor, list[Tensor]] | None = None

    def factor_of(self, rows: Rows, terms: Sequence[Term]) -> tuple[Factor | None, bool]:
        """The last factor, for data of this precision and as many columns, or none, and whether
        covariances and X are those that it is of."""
        if self._factor is None or self.start_of(rows) is None:
            return None, False
        factor, X, held = self._factor
        same = all(map(same_content, held, _of_factor(terms)))
        if not rows.X.shape[1]:
            return factor if not X.shape[1] else factor.alone(), same
        return (
            (factor, same and same_content(X, rows.X)) if X.shape == rows.X.shape else (None, False)
        )

    def keep_factor(self, factor: Factor | None, rows: Rows, terms: Sequence[Term]) -> None:
        """Keep the factor of a mode for the next; None where it is found as fast anew."""
        self._factor = None
        if factor is not None:
            self._factor = factor, private(rows.X), [private(x) for x in _of_factor(terms)]

    def is_of(self, forms: list[Any], constants: Sequence[Tensor | None]) -> bool:
        """Whether other terms have the same designs."""
        return (
            forms == self._forms
            and len(constants) == len(self._constants)
            and all(map(same_content, self._constants, constants))
        )

    def start_of(self, rows: Rows) -> Tensor | None:
        """The last mode, for data of this precision."""
        return self.start if self.start is not None and self.start.dtype == rows.eta.dtype else None

    def beta_of(self, rows: Rows) -> Tensor | None:
        """The last coefficients, for as many columns."""
        same = self.beta is not None and self.beta.shape[0] == rows.X.shape[1]
        return self.beta if same and self.start_of(rows) is not None else None


def _of_factor(terms: Sequence[Term]) -> list[Tensor]:
    """What a factor is of, beside weights, designs and X."""
    return [*(term.covariance.matrix for term in terms), *factors_of(terms)]


@dataclass(frozen=True)
class CheckedResponses:
    """The responses that were checked last.

    Attributes:
        family: of which they are.
        given: copies of the responses and weights that a call gave.
        y, weights: them as the family takes both.
        beside: what their density has beside its kernel.
    """

    family: Family
    given: tuple[Tensor, Tensor | None]
    y: Tensor
    weights: Tensor | None
    beside: float

    @classmethod
    def of(cls, family: Family, y: Tensor, weights: Tensor | None) -> CheckedResponses:
        """Check responses; those of proportions become counts."""
        given = private(y), None if weights is None else private(weights)
        y = given[0].detach()
        y, w = (y, None) if weights is None else family.with_weights(y, weights.detach())
        family.check(y)
        return cls(family, given, y, w, _beside_kernel(family, y, w))

    def is_of(self, family: Family, y: Tensor, weights: Tensor | None) -> bool:
        """Whether they are what a call gives."""
        own = self.given
        return (
            family is self.family
            and same_content(y, own[0])
            and (weights is None) == (own[1] is None)
            and (weights is None or same_content(weights, own[1]))
        )


def _beside_kernel(family: Family, y: Tensor, weights: Tensor | None) -> float:
    """The sum of what the log-density of responses has beside its kernel."""
    if not family.has_kernel:
        return 0.0
    with torch.no_grad():
        y = y.double()
        eta = y.new_zeros(len(y))
        found = family.log_density(y, eta) - family.kernel(y, eta)
        return float((found if weights is None else found * weights.double()).sum())


def check_call(
    covariance: Matrix,
    method: str,
    y: Tensor,
    eta: Tensor,
    X: Tensor | None,
    rows: Tensor | None,
    weights: Tensor | None,
) -> None:
    """Refuse what does not fit together, see :class:`LaplaceLoss`.

    Raises:
        TypeError, InputError: if it does not.
    """
    check_tensor("y", y, None, "real")
    check_tensor("eta", eta, ("n",), "floating")
    if traced(y, eta, *covariance.parameters()):
        raise InputError(
            "torch.func transforms do not go through LaplaceLoss: call backward, or "
            "torch.autograd.grad"
        )
    n = len(eta)
    if len(y) != n:
        raise InputError(f"`y` has {len(y)} rows but `eta` has {n}: expected as many")
    if X is not None:
        check_tensor("X", X, (n, "p"), "floating")
    elif method == "reml":
        raise InputError("`X` is None: method 'reml' integrates the coefficients of X")
    if weights is not None:
        check_tensor("weights", weights, (n,), "floating")
        check_constant("weights", weights)
        if not bool((weights > 0).all()):
            row = int((weights <= 0).nonzero()[0])
            raise InputError(
                f"`weights` is {float(weights[row]):g} in row {row}: expected a positive number; leave "
                "out rows that are to count nothing"
            )
    for name, tensor in (("y", y), ("X", X), ("weights", weights)):
        if tensor is not None and tensor.device != eta.device:
            raise InputError(f"`{name}` is on {tensor.device} but `eta` on {eta.device}")
    if rows is None and n != covariance.shape[0]:
        raise InputError(
            f"`eta` has {n} rows but the covariance has {covariance.shape[0]}: pass `rows`"
        )
    if rows is not None:
        check_tensor("rows", rows, (n,), "integer")
        if n and not (int(rows.min()) >= 0 and int(rows.max()) < covariance.shape[0]):
            raise InputError(
                f"`rows` reaches beyond the {covariance.shape[0]} rows of the covariance"
            )
