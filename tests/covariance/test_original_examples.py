"""Values that torch_openreml documents: the same calls, with the import changed, yield them."""

import math

import pytest
import torch

from openreml_nn.covariance import (
    Adapter,
    AR1Matrix,
    Augment,
    BlockDiagonal,
    CompoundSymmetricMatrix,
    CovariancePropagation,
    DiagonalMatrix,
    DummyMatrix,
    EqualEntryMatrix,
    EquicorrelationMatrix,
    Gram,
    HadamardProduct,
    IdentityMatrix,
    Inverse,
    KroneckerProduct,
    LowerTriangularMatrix,
    Product,
    ScalarMatrix,
    SimpleMatrix,
    Stack,
    Sum,
    Transpose,
    UnconstrainedMatrix,
    simple_param_specs,
    transform,
)

E, E2, E4 = math.e, math.e**2, math.e**4
#: The correlation of AR1 at 1 on the untransformed scale.
R = math.tanh(0.5)
LEVELS = ["a", "b", "c", "a"]
EYE, ONES = torch.eye(3).double(), torch.ones(3, 3).double()
ONE_HOT = torch.eye(3).double()[[0, 1, 2, 0]]


def kron(*matrices):
    return torch.kron(*(torch.as_tensor(m).double() for m in matrices))


#: A matrix, its parameters in the original's order, and its value there.
VALUES = [
    (lambda: IdentityMatrix(3), [], EYE),
    (lambda: ScalarMatrix(3), [0.5], E * EYE),
    (lambda: DiagonalMatrix(3), [0.0, 0.5, 1.0], torch.diag(torch.tensor([1.0, E, E2]))),
    (lambda: EqualEntryMatrix(3), [0.5], E * ONES),
    (lambda: EquicorrelationMatrix(3), [0.0], 0.75 * EYE + 0.25 * ONES),
    (lambda: CompoundSymmetricMatrix(3), [0.5, 0.0], E * (0.75 * EYE + 0.25 * ONES)),
    (
        lambda: AR1Matrix(4),
        [0.5, 1.0],
        E * R ** (torch.arange(4)[:, None] - torch.arange(4)).abs(),
    ),
    (
        lambda: UnconstrainedMatrix(3),
        [0.0, 0.5, 1.0, 0.2, -0.3, 0.4],
        [[1, 0.5, 0.2], [0.5, E2, -0.3], [0.2, -0.3, math.exp(0.8)]],
    ),
    (
        lambda: LowerTriangularMatrix(3, 2),
        [0.0, 0.5, 1.0, 0.2, -0.3],
        [[0, 0], [0.5, 1.0], [0.2, -0.3]],
    ),
    (
        lambda: SimpleMatrix(num_free_params=3, call=torch.diag, default=torch.ones(1)),
        [1.0, 2.0, 3.0],
        torch.diag(torch.tensor([1.0, 2.0, 3.0])),
    ),
    (
        lambda: Adapter(
            DiagonalMatrix(2),
            {"logit": simple_param_specs(1)["theta_0"]},
            lambda theta: torch.stack([torch.sigmoid(theta[0]), 1 - torch.sigmoid(theta[0])]),
        ),
        [0.0],
        E * torch.eye(2),
    ),
    (lambda: Sum(A=ScalarMatrix(2), B=ScalarMatrix(2)), [0.0, 0.0], 2 * torch.eye(2)),
    (
        lambda: Sum(time=AR1Matrix(2), noise=ScalarMatrix(2)),
        [0.5, 1.0, 1.0],
        [[E + E2, E * R], [E * R, E + E2]],
    ),
    (
        lambda: BlockDiagonal(residual=ScalarMatrix(3), random=DiagonalMatrix(2)),
        [0.5, 0.0, 1.0],
        torch.diag(torch.tensor([E, E, E, 1.0, E2])),
    ),
    (
        lambda: CovariancePropagation(z=DummyMatrix(LEVELS), g=DiagonalMatrix(3)),
        [0.0, 0.5, 1.0],
        ONE_HOT @ torch.diag(torch.tensor([1.0, E, E2]).double()) @ ONE_HOT.mT,
    ),
    (
        lambda: KroneckerProduct(time=AR1Matrix(2), subject=ScalarMatrix(2)),
        [1.0, 1.0, 1.0],
        kron([[E4, E4 * R], [E4 * R, E4]], torch.eye(2)),
    ),
    (
        lambda: HadamardProduct(a=EquicorrelationMatrix(2), b=torch.full((2, 2), 5.0)),
        [0.0],
        5 * torch.eye(2),
    ),
    (lambda: Product(a=DummyMatrix(LEVELS), b=ScalarMatrix(3)), [1.0], E2 * ONE_HOT),
    (lambda: Transpose(a=DummyMatrix(LEVELS)), [], ONE_HOT.mT),
    (lambda: Inverse(a=ScalarMatrix(3)), [0.5], EYE / E),
    (
        lambda: Augment(A=ScalarMatrix(3), B=ScalarMatrix(3)),
        [0.5, 1.0],
        torch.cat([E * EYE, E2 * EYE], 1),
    ),
    (
        lambda: Stack(A=ScalarMatrix(3), B=ScalarMatrix(3)),
        [0.5, 1.0],
        torch.cat([E * EYE, E2 * EYE]),
    ),
    (lambda: Gram(LowerTriangularMatrix(3, 2), gram_type="xtx"), [1.0] * 5, [[3, 2], [2, 2]]),
    (
        lambda: Gram(LowerTriangularMatrix(3, 2), gram_type="xxt"),
        [1.0] * 5,
        [[1, 1, 1], [1, 2, 2], [1, 2, 2]],
    ),
]


@pytest.mark.parametrize(("make", "theta", "value"), VALUES)
def test_values_and_derivatives(make, theta, value):
    matrix, theta = make(), torch.tensor(theta)
    value = torch.as_tensor(value).double()
    found = matrix(theta)
    torch.testing.assert_close(found, value, rtol=1e-7, atol=1e-7)
    assert matrix.shape == value.shape
    named = dict(zip(matrix.free_param_names, theta.split(1), strict=True)) if len(theta) else {}
    torch.testing.assert_close(matrix(named), found, rtol=0, atol=0)
    jacobian, names = matrix.grad(theta)
    assert names == matrix.free_param_names
    if not len(theta):
        assert jacobian is None
        return
    expected = torch.autograd.functional.jacobian(matrix, theta).movedim(-1, 0)
    torch.testing.assert_close(jacobian, expected)
    assert jacobian.shape == (len(theta), *value.shape)


@pytest.mark.parametrize(
    ("matrix", "theta", "slices"),
    [
        (ScalarMatrix(3), [0.5], [2 * E * EYE]),
        (EquicorrelationMatrix(3), [0.0], [0.375 * (ONES - EYE)]),
        (
            CompoundSymmetricMatrix(3),
            [0.5, 0.0],
            [2 * E * (0.75 * EYE + 0.25 * ONES), 0.375 * E * (ONES - EYE)],
        ),
        (EqualEntryMatrix(3), [0.5], [2 * E * ONES]),
        (
            BlockDiagonal(subject=ScalarMatrix(2), noise=IdentityMatrix(1)),
            [0.5],
            [torch.diag(torch.tensor([2 * E, 2 * E, 0.0]))],
        ),
    ],
    ids=lambda x: type(x).__name__,
)
def test_documented_slices(matrix, theta, slices):
    jacobian, _ = matrix.grad(torch.tensor(theta))
    torch.testing.assert_close(
        jacobian, torch.stack([s.double() for s in slices]), rtol=1e-7, atol=0
    )


def test_the_jacobian_of_a_propagated_covariance_has_one_level_a_slice():
    # Documentation of an earlier version shows the first slice three times.
    V = CovariancePropagation(z=DummyMatrix(LEVELS), g=DiagonalMatrix(3))
    jacobian, names = V.grad(torch.tensor([0.0, 0.5, 1.0]))
    assert names == ["g/sigma^2_0", "g/sigma^2_1", "g/sigma^2_2"]
    expected = [2 * s * torch.outer(z, z) for s, z in zip((1, E, E2), ONE_HOT.mT, strict=True)]
    torch.testing.assert_close(jacobian, torch.stack(expected))


def test_parameters_by_name():
    matrix = DiagonalMatrix(3)
    theta = torch.tensor([0.0, 0.5, 1.0])
    torch.testing.assert_close(matrix.build_params(theta), torch.tensor([1.0, E, E2]))
    torch.testing.assert_close(matrix.build_params(theta, trans=False), theta)
    torch.testing.assert_close(matrix.trans_grad(theta), 2 * torch.tensor([1.0, E, E2]))
    # There by param_specs["sigma^2_2"]["fixed"] = True, or set_param_specs.
    matrix.fix("sigma^2_2")
    assert matrix.free_param_names == ["sigma^2_0", "sigma^2_1"]
    torch.testing.assert_close(matrix.build_params(theta[:2]), torch.tensor([1.0, E, 1.0]))
    free = matrix.build_params(theta[:2], include_fixed=False)
    torch.testing.assert_close(free, torch.tensor([1.0, E]))
    matrix.fix("sigma^2_1", 7.5)
    found = matrix.build_params(torch.ones(1), trans=False)
    torch.testing.assert_close(found, torch.tensor([1.0, 7.5, 0.0]))
    both = Sum(ScalarMatrix(2), ScalarMatrix(2))
    named = both.build_params(torch.tensor([0.0, 0.5]), out_format="dict")
    assert list(named) == ["op_0/sigma^2", "op_1/sigma^2"]
    torch.testing.assert_close(torch.cat(list(named.values())), torch.tensor([1.0, E]))


def test_intermediates():
    matrix = DiagonalMatrix(3)
    params = matrix.build_params(torch.tensor([0.0, 0.5, 1.0]))
    matrix.set_intermediates(params, "roots")
    assert matrix.get_intermediates(params) == "roots"
    assert matrix.get_intermediates(params.flip(0)) is None
    matrix.reset_intermediates()
    assert matrix.get_intermediates(params) is None


def test_designs():
    rep, block = ["rep1", "rep2", "rep2"], ["block1", "block2", "block1"]
    crossed = DummyMatrix(rep, block)
    assert crossed.colnames == ["rep1⋈block1", "rep1⋈block2", "rep2⋈block1", "rep2⋈block2"]
    assert crossed().argmax(1).tolist() == [0, 3, 2]
    first = DummyMatrix(rep, block, drop_first=True)
    assert first.colnames == crossed.colnames[1:]
    assert first().tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 0]]
    levels = [["rep2", "rep1"], ["block1", "block2"]]
    kept = DummyMatrix(rep, block, levels=levels, lex_order=False, drop_empty_cols=True)
    assert kept.colnames == ["rep2⋈block1", "rep2⋈block2", "rep1⋈block1"]
    assert kept().argmax(1).tolist() == [2, 1, 0]
    assert DummyMatrix(rep)(torch.zeros(0, dtype=torch.float32)).dtype == torch.float32


def test_simple_specifications():
    specs = simple_param_specs(3)
    assert list(specs) == ["theta_0", "theta_1", "theta_2"]
    for spec in specs.values():
        assert spec == {
            "fixed": False,
            "default": torch.zeros(1),
            "trans": transform.TransformIdentity(),
        }
    start = torch.tensor([1.5])
    specs = simple_param_specs(2, default=start, trans=transform.TransformExp2())
    start.zero_()
    assert [spec["default"].item() for spec in specs.values()] == [1.5, 1.5]
    assert {repr(spec["trans"]) for spec in specs.values()} == {"TransformExp2()"}
    assert simple_param_specs(0) == {}
    for error, arguments, message in (
        (TypeError, ("3",), "`n` is '3': expected an int"),
        (TypeError, (True,), "`n` is True: expected an int"),
        (ValueError, (-1,), "`n` is -1: expected a number of parameters"),
        (TypeError, (1, 0.5), "`default` is 0.5: expected a tensor of shape"),
        (ValueError, (1, torch.zeros(2)), r"`default` has shape \(2,\): expected \(1,\)"),
        (TypeError, (1, None, torch.exp), "`trans` is .*: expected a Transform"),
    ):
        with pytest.raises(error, match=message):
            simple_param_specs(*arguments)


@pytest.mark.parametrize(
    ("trans", "x", "value", "slope"),
    [
        (transform.TransformExp(), 1.0, E, E),
        (transform.TransformExp2(), 1.0, 2.0, 2 * math.log(2)),
        (transform.TransformExp10(), 1.0, 10.0, 10 * math.log(10)),
        (transform.TransformExpPow2(), 1.0, E2, 2 * E2),
        (transform.TransformIdentity(), -3.5, -3.5, 1.0),
        (transform.TransformPow(factor=3.0), 2.0, 8.0, 12.0),
        (transform.TransformScaleShift(a=2.0, b=1.0), 2.0, 5.0, 2.0),
        (transform.TransformSigmoid(), 0.0, 0.5, 0.25),
        (
            transform.TransformChain([transform.TransformExp(), transform.TransformPow(2.0)]),
            1.0,
            E2,
            2 * E2,
        ),
    ],
    ids=lambda x: repr(x)[:40],
)
def test_transforms(trans, x, value, slope):
    x, value, slope = (torch.tensor([number]) for number in (x, value, slope))
    torch.testing.assert_close(trans(x), value)
    torch.testing.assert_close(trans.inverse(value), x)
    torch.testing.assert_close(trans.grad(x), slope)


@pytest.mark.parametrize("make", [EquicorrelationMatrix, CompoundSymmetricMatrix])
@pytest.mark.parametrize("n", [2, 3, 10])
def test_the_least_correlation(make, n):
    matrix = make(n)
    assert matrix.rho_min == -1 / (n - 1)
    assert matrix.param_trans["rho"].codomain == pytest.approx((matrix.rho_min, 1.0))
    # There, and only there, the matrix is singular.
    for above, definite in ((1e-6, True), (-1e-6, False)):
        V = (1 - matrix.rho_min - above) * torch.eye(n) + matrix.rho_min + above
        assert (torch.linalg.eigvalsh(V)[0] > 0) == definite
