"""The data of a call of the marginal likelihood, and what is kept for the next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from openreml_nn.likelihood.laplace_mode import Rows
from openreml_nn.likelihood.laplace_space import Factor, Space
from openreml_nn.terms.covariance import RepeatedCovariance
from openreml_nn.terms.kernel import same_content
from openreml_nn.terms.term import Term

__all__ = ["Kept", "Task", "constants_of", "factors_of", "with_tensors"]


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
        self.factor: Factor | None = None

    def factor_of(self, rows: Rows) -> Factor | None:
        """The last factor, for data of this precision and as many columns."""
        return self.factor if self.beta_of(rows) is not None else None

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
