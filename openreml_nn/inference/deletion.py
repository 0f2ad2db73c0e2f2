r"""What a fit owes to single rows or groups of rows, by leaving them out.

To leave rows I out is to give each of them a fixed effect of its own, a column of E. At the
variances of the fit then, with :math:`\Phi = (X^\top V^{-1}X)^{-1}` and
:math:`S = E^\top P E`,

.. math:: \hat\beta - \hat\beta_{(I)} = \Phi X^\top V^{-1} E\, S^{-1} E^\top P y, \qquad
    \Phi_{(I)} = \Phi + \Phi X^\top V^{-1} E\, S^{-1} E^\top V^{-1} X \Phi .
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from openreml_nn.estimation import Result
from openreml_nn.inference.laplace_deletion import LaplaceDeletion
from openreml_nn.inference.laplace_refit import LaplaceRefit
from openreml_nn.inference.refit import Refit, family_of, tracked
from openreml_nn.support.checks import check_flag, found
from openreml_nn.support.errors import InputError, NumericalError
from openreml_nn.support.solving import invert_named, solve_named
from openreml_nn.support.spectrum import decomposed
from openreml_nn.terms.design import IndexedDesign
from openreml_nn.terms.term import Term, residual_terms

__all__ = ["influence"]

#: Rows beyond which the columns of P of all rows take too long.
_MOST_ROWS = 20_000
#: Columns of P that are held at a time.
_COLUMNS = 256
#: The rest of the rows does not determine the coefficients where S is this near to singular.
_SINGULAR = 1e-10


def influence(
    result: Result,
    by: str | Sequence[object] | None = None,
    refit: bool = False,
    progress: bool = True,
) -> pd.DataFrame:
    r"""How much a fit owes to each row, or to each group of rows.

    With I the rows of a case, :math:`\hat\beta_{(I)}` and :math:`\Phi_{(I)}` the coefficients and
    their covariance without them, and :math:`\hat\beta, \Phi` those of all p coefficients:

    - ``cook``: :math:`(\hat\beta - \hat\beta_{(I)})^\top \Phi^{-1} (\hat\beta - \hat\beta_{(I)}) / p`;
    - ``mdffits``: the same with :math:`\Phi_{(I)}` in place of :math:`\Phi`;
    - ``covtrace``: :math:`|\operatorname{tr}(\Phi^{-1}\Phi_{(I)}) - p|`; ``covratio``:
      :math:`|\Phi_{(I)}| / |\Phi|`;
    - ``leverage``: :math:`\sum_{i \in I} \partial\hat y_i / \partial y_i` of the fitted values, random
      effects included; NaN where the model has no residual;
    - ``dfbeta_…``: each entry of :math:`\hat\beta - \hat\beta_{(I)}`.

    They are NaN, but for the leverage, where the other rows do not determine all coefficients.

    Of a response that is not Gaussian :math:`\hat\beta_{(I)}` at the held variances, and parameters of
    the family, is at the maximum of the marginal likelihood of the other rows, and :math:`\Phi` then is
    at held ones too; with ``refit`` both are of fits of all parameters. The leverage is NaN. A case
    takes about p + 4 evaluations of the likelihood with its gradient: groups are told sooner than rows.

    Args:
        result: a fit.
        by: the cases: a grouping factor of the model, or a label for each row; each row by default.
        refit: whether the variances are estimated again without each case; else they are held.
        progress: whether a bar shows on stderr while models are fitted again.

    Returns:
        A data frame with the columns case, rows, cook, mdffits, covtrace, covratio, leverage, and a
        ``dfbeta_…`` for each fixed effect.

    Raises:
        InputError: if there is no such group, the labels are not as many as rows, the model has no
            fixed effects, there are more than 20,000 rows of a Gaussian response, or the rows were streamed.
        TypeError: if an argument is of another kind.

    Reference:
        Demidenko and Stukel, Statistics in Medicine 24 (2005) 893; Loy and Hofmann, Journal of
        Statistical Software 56(5) (2014), section 4.

    >>> from openreml_nn import lmm
    >>> from openreml_nn.datasets import sleepstudy
    >>> result = lmm("Reaction ~ Days + (Days | Subject)", sleepstudy())
    >>> influence(result, "Subject")[["case", "cook"]].nlargest(2, "cook").round(3)
      case   cook
    1  309  0.149
    8  335  0.129
    """
    check_flag("refit", refit)
    check_flag("progress", progress)
    is_family = family_of(result) is not None
    own = LaplaceRefit(result) if is_family else Refit(result)
    if not result.fixed.names:
        raise InputError("`result` has no fixed effects: expected some, whose change is told")
    deletion: _Deletion | LaplaceDeletion
    with torch.no_grad():
        if isinstance(own, LaplaceRefit):
            cases, codes = _cases(result, own.loss.covariance.terms(), len(own.y), by)
            codes = codes.to(own.y.device)
            deletion = LaplaceDeletion(own, codes, len(cases))
        else:
            if result.rows > _MOST_ROWS:
                raise InputError(
                    f"`result` has {result.rows} rows: columns of P are formed of each of them, "
                    f"expected at most {_MOST_ROWS}"
                )
            cases, codes = _cases(result, own.objective().terms(), len(own.y), by)
            codes = codes.to(own.y.device)
            deletion = _Deletion.of(own, codes, len(cases))
    leave = deletion.refitted if refit else deletion.without
    rows = [
        leave(case)
        for case in tracked(range(len(cases)), "influence", progress and (refit or is_family))
    ]
    names = ["cook", "mdffits", "covtrace", "covratio"]
    phi = deletion.phi(refit)
    numbers = [_compared(phi, *(row or ())) for row in rows]
    table = pd.DataFrame([part for part, _ in numbers], columns=names)
    table.insert(0, "case", cases)
    table.insert(1, "rows", torch.bincount(codes, minlength=len(cases)).numpy(force=True))
    table["leverage"] = deletion.leverage.numpy(force=True)
    for j, name in enumerate(result.fixed.names):
        table[f"dfbeta_{name}"] = [float(change[j]) for _, change in numbers]
    return table


@dataclass(frozen=True)
class _Deletion:
    """What the deletion of a case needs.

    Attributes:
        refit: the fit.
        codes: the case of each row (n,).
        rows: rows of each case.
        blocks: S of each case.
        p_y: P y (n,).
        moves: :math:`V^{-1} X \\Phi` (n, p).
        covariance: :math:`\\Phi` (p, p).
        leverage: of each case.
    """

    refit: Refit
    codes: Tensor
    rows: list[Tensor]
    blocks: list[Tensor]
    p_y: Tensor
    moves: Tensor
    covariance: Tensor
    leverage: Tensor

    @classmethod
    def of(cls, refit: Refit, codes: Tensor, cases: int) -> _Deletion:
        """For all cases, from the columns of P."""
        y, n = refit.y, len(refit.y)
        terms = [term.detach() for term in refit.objective().terms()]
        residual = [terms[i] for i in residual_terms(terms)]
        order = torch.argsort(codes, stable=True)
        rows = list(order.split(torch.bincount(codes, minlength=cases).tolist()))
        leverage = y.new_full((n,), torch.nan)
        P_own = []
        for part in _packed(rows, _COLUMNS):
            at = torch.cat([rows[i] for i in part])
            unit = y.new_zeros(n, len(at))
            unit[at, torch.arange(len(at), device=y.device)] = 1
            P = refit.project(unit)
            start = 0
            for i in part:
                P_own.append(P[rows[i], start : start + len(rows[i])])
                start += len(rows[i])
            if residual:
                # The residuals are R P y.
                left = sum(
                    (
                        t.design.matmul(t.covariance.multiply(t.design.t_matmul(P)))
                        for t in residual
                    ),
                    torch.zeros_like(P),
                )
                leverage[at] = 1 - left[at, torch.arange(len(at), device=y.device)]
        V_X = refit.solve(refit.X)
        phi = invert_named(refit.X.mT @ V_X, "the information of the fixed effects")
        by_case = y.new_zeros(cases).index_add(0, codes, leverage)
        p_y = refit.project(y[:, None])[:, 0]
        return cls(refit, codes, rows, P_own, p_y, V_X @ phi, phi, by_case)

    def phi(self, is_refitted: bool) -> Tensor:
        """The covariance of the coefficients of all rows, as results have it."""
        return self.refit.result.fixed.covariance

    def without(self, case: int) -> tuple[Tensor, Tensor] | None:
        """How coefficients change and what their covariance is without a case; None where the other
        rows do not determine them."""
        at, S = self.rows[case], self.blocks[case]
        values, vectors = decomposed((S + S.mT) / 2, "the covariance of the rows that are left out")
        if not len(at) or float(values[0]) <= _SINGULAR * float(values[-1]):
            return None
        inverse = (vectors / values) @ vectors.mT
        toward = self.moves[at].mT @ inverse  # (p, rows of the case)
        return toward @ self.p_y[at], self.covariance + toward @ self.moves[at]

    def refitted(self, case: int) -> tuple[Tensor, Tensor] | None:
        """How coefficients change without a case, and their covariance, all parameters refitted."""
        refit = self.refit
        refit.reset()
        try:
            without = refit.fit(keep=(self.codes != case).nonzero()[:, 0])
        except (InputError, NumericalError):
            return None
        fixed, own = without.fixed, refit.result.fixed
        if fixed.names != own.names:
            return None
        return own.estimate - fixed.estimate, fixed.covariance


def _cases(
    result: Result, terms: Sequence[Term], n: int, by: str | Sequence[object] | None
) -> tuple[list[object], Tensor]:
    """Labels of the cases, and the case of each of n rows."""
    if by is None:
        return list(range(n)), torch.arange(n)
    if isinstance(by, str):
        return _cases_of_group(result, terms, by)
    if not isinstance(by, Sequence | np.ndarray | pd.Series | pd.Index):
        raise TypeError(f"`by` is {found(by)}: expected a grouping factor, or a label for each row")
    if len(by) != n:
        raise InputError(f"`by` has {len(by)} labels: expected one for each of the {n} rows")
    codes, labels = pd.factorize(np.asarray(by), sort=False)
    if (codes < 0).any():
        raise InputError(f"`by` has no label in row {int((codes < 0).argmax()) + 1}: expected one")
    return list(labels), torch.from_numpy(codes)


def _cases_of_group(result: Result, terms: Sequence[Term], by: str) -> tuple[list[object], Tensor]:
    groups = {c.group: c for c in result.components if not c.is_residual}
    if by not in groups:
        raise InputError(f"`by` is {by!r}: expected one of {list(groups)}, or a label for each row")
    design = next(term.design for term in terms if term.name == groups[by].name)
    if not isinstance(design, IndexedDesign):
        raise InputError(
            f"`by` is {by!r}, of which a row has no one level: pass a label for each row"
        )
    seen, codes = design.codes.unique(return_inverse=True)
    if int(seen[0]) < 0:
        raise InputError(
            f"`by` is {by!r}, of which some rows have no level: pass a label for each row"
        )
    return [groups[by].levels[i] for i in seen.tolist()], codes


def _packed(rows: Sequence[Tensor], most: int) -> list[list[int]]:
    """Cases in order, together as many as have so many rows, or one that has more."""
    parts: list[list[int]] = []
    size = most + 1
    for i, own in enumerate(rows):
        if size + len(own) > most:
            parts.append([])
            size = 0
        parts[-1].append(i)
        size += len(own)
    return parts


def _compared(
    phi: Tensor, change: Tensor | None = None, covariance: Tensor | None = None
) -> tuple[list[float], Tensor]:
    p = len(phi)
    if change is None or covariance is None:
        return [torch.nan] * 4, phi.new_full((p,), torch.nan)
    what = "the covariance of the fixed effects"
    ratio = solve_named(phi, covariance, what)
    return [
        float(change @ solve_named(phi, change, what)) / p,
        float(change @ solve_named(covariance, change, f"{what} without a case")) / p,
        abs(float(ratio.diagonal().sum()) - p),
        float(torch.linalg.det(ratio)),
    ], change
