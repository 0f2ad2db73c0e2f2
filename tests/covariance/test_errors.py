"""What a matrix, a structure or a relationship cannot be made of is said in one line."""

import numpy as np
import pandas as pd
import pytest
import torch

from openreml_nn import InputError
from openreml_nn.covariance import (
    Adapter,
    AR1Matrix,
    ContinuousAR1Matrix,
    DiagonalMatrix,
    DummyMatrix,
    EqualEntryMatrix,
    ExponentialMatrix,
    Heteroscedastic,
    IdentityMatrix,
    LowerTriangularMatrix,
    Operator,
    Pedigree,
    SimpleMatrix,
    Sum,
    marker_codes,
    marker_effects,
    single_step_relationship,
    weighted,
    within,
)
from openreml_nn.covariance.transform import TransformExpPow2, TransformIdentity

NAMES = list("abc")
EYE = pd.DataFrame(np.eye(3), index=NAMES, columns=NAMES)
CODES = marker_codes(pd.DataFrame([[0, 1, 2], [2, 1, 0], [1, 0, 1]], index=NAMES))


def spec(trans=None, default=None):
    """Of one free parameter."""
    default = torch.zeros(1) if default is None else default
    return {"a": {"fixed": False, "default": default, "trans": trans or TransformIdentity()}}


def founders(names):
    return Pedigree.of(names, [None] * len(names), [None] * len(names))


class WithoutDerivatives(Operator):
    def infer_shape(self, shapes):
        return shapes[0]

    def combine(self, *values):
        return 2 * values[0]


@pytest.mark.parametrize(
    ("call", "kind", "match"),
    [
        (lambda: DummyMatrix.from_codes(torch.tensor([0]), []), InputError, "`levels` is empty"),
        (lambda: marker_codes(pd.DataFrame()), InputError, "expected individuals and markers"),
        (lambda: marker_codes(pd.DataFrame({"m": ["x"]})), InputError, "expected 0, 1, 2 or NaN"),
        (lambda: marker_effects(CODES, pd.Series([1.0, 2], ["a", "a"])), InputError, "'a' twice"),
        (lambda: single_step_relationship(founders(NAMES), EYE.astype(str).map("x".join)),
         InputError, "`genomic` holds what is no number"),
        (lambda: single_step_relationship(founders(NAMES), EYE * np.nan),
         InputError, "`genomic` holds NaN or infinity"),
        (lambda: single_step_relationship(founders(["1", "2"]), pd.DataFrame(
            np.eye(2), index=[1, "1"], columns=[1, "1"])), InputError, "one animal under two names"),
        (lambda: single_step_relationship(founders(NAMES), EYE * 0 + 1, beta=0.0, tuned=True),
         InputError, "`genomic` is constant"),
        (lambda: Heteroscedastic(DiagonalMatrix(3), AR1Matrix(4)), InputError, r"`matrix` \(4, 4\)"),
        (lambda: Sum(torch.eye(2).long(), AR1Matrix(2)), TypeError, "'op_0' is torch.int64"),
        (lambda: Sum(torch.empty(0, 0)), InputError, r"'op_0' has shape \(0, 0\): it is empty"),
        (lambda: Sum(AR1Matrix(2)).manual_vjp(torch.eye(3)), InputError, r"shape \(2, 2\)"),
        (lambda: LowerTriangularMatrix(3, 2).terms(), InputError, "only a square matrix has terms"),
        (lambda: WithoutDerivatives(AR1Matrix(2)).manual_grad(), NotImplementedError, "combine_vjp"),
        (lambda: SimpleMatrix(1, torch.diag).manual_grad(), NotImplementedError, "no closed-form"),
        (lambda: weighted(torch.ones(2, 2)), InputError, r"shape \(2, 2\): expected \(n,\)"),
        (lambda: weighted(torch.tensor([1.0, 0.0])), InputError, "is 0 in row 1: expected above 0"),
        (lambda: within(["a", "a"], AR1Matrix(2), [0]), InputError, "has 1 rows but `groups` 2"),
        (lambda: within(["a"] * 3, AR1Matrix(2)), InputError, "2 x 2 but there are 3 positions"),
        (lambda: within(["a", "a"], AR1Matrix(2), [0, 0]), InputError, "'a' already has its"),
        (lambda: within(["a"], LowerTriangularMatrix(3, 2)), InputError, "expected a square matrix"),
        (lambda: ContinuousAR1Matrix(torch.ones(2, 2)), InputError, "expected differences of times"),
        (lambda: ExponentialMatrix(torch.empty(0, 0)), InputError, "`distance` has shape"),
        (lambda: Adapter(AR1Matrix(2), {}, torch.diag), InputError, "`param_specs` is empty"),
        (lambda: Adapter(AR1Matrix(2), spec(TransformExpPow2()), torch.diag),
         InputError, "an Adapter needs the identity"),
        (lambda: Adapter(AR1Matrix(2), spec(default=torch.tensor([torch.nan])), torch.diag),
         InputError, "'default' of 'a' is NaN"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(call, kind, match):
    with pytest.raises(kind, match=match):
        call()


def test_a_way_of_differentiating_that_there_is_not_is_named():
    matrix = AR1Matrix(3)
    matrix.grad_mode = "by hand"
    with pytest.raises(InputError, match="`grad_mode` is 'by hand': expected 'default'"):
        matrix.grad()


def test_what_has_no_free_parameter_has_no_slices():
    matrix = EqualEntryMatrix(3)
    matrix.fix(matrix.param_names[0], 0.2)
    adapter = Adapter(IdentityMatrix(3), spec(), lambda t: t[:0])
    assert matrix.manual_grad() == DummyMatrix([1, 2]).manual_grad() == (None, [])
    torch.testing.assert_close(adapter.manual_grad()[0], torch.zeros(1, 3, 3))


def test_an_operator_without_derivatives_is_recorded():
    matrix = WithoutDerivatives(AR1Matrix(2)).double()
    matrix().sum().backward()
    grads = torch.cat([p.grad for p in matrix.parameters()])
    torch.testing.assert_close(grads, matrix.auto_grad()[0].sum((1, 2)))


def test_levels_that_are_written_alike_stay_apart():
    assert torch.equal(DummyMatrix([1, "1", 1])(), torch.tensor([[1.0, 0], [0, 1], [1, 0]]))
