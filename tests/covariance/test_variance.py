"""Variances that are a function of a covariate."""

import pytest
import torch

from openreml_nn import InputError
from openreml_nn.covariance import (
    AR1Matrix,
    CovariancePropagation,
    DiagonalMatrix,
    DummyMatrix,
    Heteroscedastic,
    IdentityMatrix,
    ScalarMatrix,
    Sum,
    VarianceFunction,
)


@pytest.mark.parametrize("kind", ["power", "exp", "const_power"])
def test_at_other_values_it_is_the_same_function(kind):
    """Its parameters are the same tensors: what trains one trains the other."""
    x, other = torch.tensor([1.0, 2.0, -3.0]), torch.tensor([4.0, -0.5])
    V = VarianceFunction(x, kind)
    V.fix("delta", 0.7)
    with torch.no_grad():
        V.get_parameter("sigma^2").fill_(0.3)
    raised = (1.4 * other).exp() if kind == "exp" else other.abs() ** 1.4
    if kind == "const_power":
        V.set_value("constant", 0.4, natural=True)
        raised = (0.4 + other.abs() ** 0.7) ** 2
    expected = torch.exp(torch.tensor(0.6)) * raised
    found = V.at(other)
    torch.testing.assert_close(found(), torch.diag(expected))
    assert found.fixed_param_names == V.fixed_param_names == ["delta"]
    assert [id(p) for p in found.parameters()] == [id(p) for p in V.parameters()]


@pytest.mark.parametrize(
    ("covariate", "kind", "error", "message"),
    [
        (torch.ones(2), "linear", InputError, "`kind` is 'linear': expected 'power', 'exp' or"),
        ([1.0, 2.0], "power", TypeError, "`covariate` is .*expected a floating-point tensor"),
        (torch.ones(2, dtype=torch.long), "exp", TypeError, "expected a floating-point tensor"),
        (torch.ones(2, 1), "exp", InputError, r"shape \(2, 1\): expected \(n,\)"),
        (torch.ones(0), "exp", InputError, r"shape \(0,\): expected \(n,\)"),
        (torch.tensor([1.0, 0.0]), "power", InputError, "is 0 in row 1: .*other than zero"),
        (torch.tensor([float("nan"), 0.0]), "exp", InputError, "in row 0: expected a finite"),
    ],
)
def test_what_is_no_covariate_is_refused(covariate, kind, error, message):
    with pytest.raises(error, match=message):
        VarianceFunction(covariate, kind)


@pytest.mark.parametrize("kind", ["power", "exp", "const_power"])
def test_a_start_has_one_variance_and_its_slopes_are_those_of_autograd(kind):
    V = VarianceFunction(torch.tensor([0.5, 2.0, 3.0]), kind).double()
    at = torch.tensor([0.2, -0.4, 0.3][: V.num_params], requires_grad=True)
    cotangent = torch.tensor([[1.0, 9.0, 9.0], [9.0, -2.0, 9.0], [9.0, 9.0, 0.5]])
    expected = torch.autograd.grad((V(at) * cotangent).sum(), at)[0]
    torch.testing.assert_close(V.manual_vjp(cotangent, at.detach()), expected)
    gradient, _ = V.manual_grad(at.detach())
    torch.testing.assert_close((gradient * cotangent).sum((-2, -1)), expected)
    assert V.moment_start(torch.tensor([2.0, 2.0, 2.0]))
    torch.testing.assert_close(V.variances(), torch.full((3,), 2.0))


SHUFFLED = DummyMatrix.from_codes(torch.tensor([5, 3, 1, 0, 2, 4]), 6)
MIDDLES = {
    "identity": lambda: IdentityMatrix(6),
    "variances": lambda: DiagonalMatrix(6),
    "variances of levels": lambda: CovariancePropagation(SHUFFLED, DiagonalMatrix(6)),
    "one variance of levels": lambda: CovariancePropagation(SHUFFLED, ScalarMatrix(6)),
    "series": lambda: AR1Matrix(6),
    "sum": lambda: Sum(AR1Matrix(6), ScalarMatrix(6)),
}


@pytest.mark.parametrize("middle", MIDDLES)
@pytest.mark.parametrize("summands", [1, 2])
def test_terms_are_the_matrix_whatever_the_variances_are_made_of(middle, summands):
    """Of a variance that is a sum, the diagonal counts."""
    variance = Sum(VarianceFunction(torch.rand(6) + 1), *[AR1Matrix(6)] * (summands - 1))
    V = Heteroscedastic(variance, MIDDLES[middle]()).double()
    with torch.no_grad():
        for parameter in V.parameters():
            parameter.add_(0.3 * torch.randn(1))
    torch.testing.assert_close(sum(term.dense() for term in V.terms()), V())
