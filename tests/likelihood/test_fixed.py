"""The fixed part: which columns are kept, and coefficients of the original ones."""

import pytest
import torch

from openreml_nn.likelihood.fixed import FixedPart


def nearly_twice(gap):
    """A constant, a column, and its double but for ``gap``."""
    x, z = torch.randn(2, 50)
    return torch.stack([torch.ones(50), x, 2 * x + gap * z], 1)


@pytest.mark.parametrize("gap", [1.0, 1e-3, 1e-5])
def test_columns_that_are_nearly_aliased_are_kept(gap):
    X, beta = nearly_twice(gap), torch.tensor([1.0, -2.0, 3.0])
    fixed = FixedPart.of(X @ beta + torch.randn(50), X)
    assert fixed.columns == [0, 1, 2]
    torch.testing.assert_close(fixed.Q.mT @ fixed.Q, torch.eye(3))
    torch.testing.assert_close(X @ fixed.T, fixed.Q, rtol=1e-8, atol=1e-8)
    # Coefficients of least squares, where those of Q are zero.
    y = fixed.y + X @ fixed.offset
    expected = torch.linalg.lstsq(X, y[:, None]).solution[:, 0]
    torch.testing.assert_close(fixed.coefficients(torch.zeros(3)), expected, rtol=1e-6, atol=1e-6)


def test_columns_that_rounding_alone_parts_are_dropped():
    X = nearly_twice(1e-9)
    with pytest.warns(RuntimeWarning, match="dropped doubled"):
        fixed = FixedPart.of(torch.randn(50), X, ["one", "x", "doubled"])
    assert fixed.columns == [0, 1]
