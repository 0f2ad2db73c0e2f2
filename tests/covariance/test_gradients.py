"""Closed forms against automatic differentiation, for every matrix and nestings of them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from openreml_nn.covariance import (
    Adapter,
    AR1Matrix,
    Augment,
    BlockDiagonal,
    ContinuousAR1Matrix,
    CovariancePropagation,
    DummyMatrix,
    Gram,
    HadamardProduct,
    Inverse,
    KroneckerProduct,
    LowerTriangularMatrix,
    Product,
    SimpleMatrix,
    Stack,
    Sum,
    Transpose,
    UnstructuredMatrix,
)
from openreml_nn.covariance.matrix import Recorded
from openreml_nn.covariance.transform import TransformIdentity
from tests.strategies import LEAVES, line, matrices, points


def closed(matrix):
    """The matrix, within an operator if it has no closed form itself."""
    return matrix if matrix.has_closed_form() else Sum(matrix)


@given(st.data())
def test_manual_grad_equals_auto_grad(data):
    matrix = closed(data.draw(matrices()))
    at = data.draw(points(matrix))
    manual, names = matrix.manual_grad(at)
    auto, auto_names = matrix.auto_grad(at)
    assert names == auto_names == (matrix.free_param_names if manual is not None else [])
    if matrix.num_free_params:
        assert manual.shape == (matrix.num_free_params, *matrix.shape)
        torch.testing.assert_close(manual, auto, rtol=1e-10, atol=1e-10)
    else:
        assert manual is None
        assert auto is None


@given(st.data())
def test_pullback_equals_jacobian_contraction(data):
    matrix = closed(data.draw(matrices()))
    at = data.draw(points(matrix))
    cotangent = torch.randn(matrix.shape)
    jacobian, _ = matrix.manual_grad(at)
    expected = torch.zeros(0) if jacobian is None else (jacobian * cotangent).sum((1, 2))
    torch.testing.assert_close(matrix.manual_vjp(cotangent, at), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "make",
    [
        lambda: CovariancePropagation(z=LowerTriangularMatrix(3, 2), g=LowerTriangularMatrix(2, 2)),
        lambda: Inverse(Sum(AR1Matrix(3), UnstructuredMatrix(3))),
        lambda: Gram(LowerTriangularMatrix(3, 2)),
        lambda: Gram(LowerTriangularMatrix(3, 2), gram_type="xxt"),
        lambda: Product(LowerTriangularMatrix(3, 3), AR1Matrix(3), LowerTriangularMatrix(3, 3)),
    ],
)
def test_pullback_equals_the_recorded_one_by_operator(make):
    """Neither the operands nor the cotangent are symmetric."""
    matrix = make().double()
    at = 0.5 * torch.randn(matrix.num_free_params)
    cotangent = torch.randn(matrix.shape)
    expected = (matrix.auto_grad(at)[0] * cotangent).sum((1, 2))
    torch.testing.assert_close(matrix.manual_vjp(cotangent, at), expected, rtol=1e-10, atol=1e-10)


@given(st.data())
def test_gradcheck_and_gradgradcheck_through_the_custom_function(data):
    matrix = data.draw(matrices())
    if not matrix.num_free_params or not matrix.has_closed_form():
        return  # a function of the user's alone is recorded by autograd
    at = data.draw(points(matrix)).requires_grad_()
    assert matrix(at).grad_fn.name() == "ClosedFormBackward"
    # Along random directions, which costs a few evaluations and not one for each entry.
    assert gradcheck(matrix, at, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    assert gradgradcheck(matrix, at, fast_mode=True)


def test_a_closed_form_is_that_of_all_operands():
    user = SimpleMatrix(2, torch.diag)
    for matrix in (Sum(AR1Matrix(2), user), Sum(torch.eye(2), Sum(user)), Product(user, user)):
        assert not matrix.has_closed_form()
        assert matrix.has_jacobian()  # in which the user's is recorded
        assert matrix().grad_fn.name() != "ClosedFormBackward"
        torch.testing.assert_close(matrix.manual_grad()[0], matrix.auto_grad()[0])
    tree = Sum(AR1Matrix(2), Sum(AR1Matrix(2)))
    assert tree.has_closed_form()
    tree.operands["op_1"].grad_mode = "auto"
    assert not tree.has_closed_form()


def test_an_adapter_of_times_has_no_correlation_of_its_own():
    times = ContinuousAR1Matrix(line(3))
    specs = {"a": {"fixed": False, "default": torch.zeros(1), "trans": TransformIdentity()}}
    adapter = Adapter(times, specs, lambda theta: theta.expand(2)).double()
    torch.testing.assert_close(adapter(), times(torch.zeros(2).double()))


def shared():
    """Matrices in which a leaf, or an operator, stands in two places."""

    def leaf(mode="default"):
        g = UnstructuredMatrix(3)
        g.grad_mode = mode
        return g

    def auto(operator):
        operator.grad_mode = "auto"
        return operator

    one, recorded = leaf(), leaf("auto")
    total, within = Sum(leaf(), AR1Matrix(3)), leaf()
    return {
        "a leaf": Sum(one, Gram(one)),
        "an operator": HadamardProduct(total, Product(total, total)),
        "a recorded leaf": Product(recorded, Gram(recorded)),
        "a leaf in recorded operators": Sum(auto(Gram(within)), auto(Transpose(within)), within),
        "one of its two uses": Sum(within, auto(Gram(within))),
    }


@pytest.mark.parametrize("kind", shared())
def test_a_node_in_two_places_counts_twice(kind):
    matrix = shared()[kind]
    at = 0.5 * torch.randn(matrix.num_free_params)
    cotangent = torch.randn(matrix.shape)
    expected = torch.func.jacrev(lambda x: matrix(Recorded(x)))(at).movedim(-1, 0)
    pulled = (expected * cotangent).sum((1, 2))
    torch.testing.assert_close(matrix.manual_grad(at)[0], expected)
    torch.testing.assert_close(matrix.manual_vjp(cotangent, at), pulled)
    leaf = at.clone().requires_grad_()
    (found,) = torch.autograd.grad((matrix(leaf) * cotangent).sum(), leaf)
    torch.testing.assert_close(found, pulled)
    _, moved = torch.func.jvp(matrix, (at,), (torch.ones_like(at),))
    torch.testing.assert_close(moved, expected.sum(0))


@pytest.mark.parametrize("kind", LEAVES)
def test_gradients_of_each_leaf(kind):
    matrix = LEAVES[kind](3).double()
    at = 0.3 * torch.randn(matrix.num_free_params, requires_grad=True)
    if matrix.num_free_params:
        assert gradcheck(matrix, at, check_forward_ad=True)
        assert gradgradcheck(matrix, at, fast_mode=True)
        jacobian, names = closed(matrix).manual_grad(at.detach())
        torch.testing.assert_close(jacobian, matrix.auto_grad(at.detach())[0])
        assert [name.split("/")[-1] for name in names] == [
            name.split("/")[-1] for name in matrix.free_param_names
        ]
    else:
        assert matrix.manual_grad() == (None, [])


@pytest.mark.parametrize("kind", LEAVES)
@pytest.mark.parametrize("value", [0.0, -3.0, 3.0])
def test_closed_forms_at_special_points(kind, value):
    """At zero, where correlations vanish, and far out."""
    matrix = closed(LEAVES[kind](4).double())
    if matrix.num_free_params:
        at = torch.full((matrix.num_free_params,), value)
        jacobian, _ = matrix.manual_grad(at)
        assert torch.isfinite(jacobian).all()
        torch.testing.assert_close(jacobian, matrix.auto_grad(at)[0], rtol=1e-10, atol=1e-10)
        single, _ = matrix.float().manual_grad(at.float())
        torch.testing.assert_close(single.double(), jacobian, rtol=1e-4, atol=1e-4)


@given(st.data())
def test_all_ways_to_give_parameters_agree(data):
    matrix = data.draw(matrices())
    at = data.draw(points(matrix))
    expected = matrix(at)
    by_name = {name: at[i : i + 1] for i, name in enumerate(matrix.free_param_names)}
    torch.testing.assert_close(matrix(by_name), expected, rtol=0, atol=0)
    with torch.no_grad():
        for name, value in zip(matrix.free_param_names, at, strict=True):
            entry = matrix._entry(name)
            entry.tensor.copy_(value)
    torch.testing.assert_close(matrix(), expected, rtol=0, atol=0)


@given(st.data())
def test_torch_func_transforms_agree_with_the_jacobian(data):
    matrix = data.draw(matrices())
    if not matrix.num_free_params:
        return
    at = data.draw(points(matrix))
    jacobian, _ = matrix.auto_grad(at)
    moved = jacobian.movedim(0, -1)
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(transform(matrix)(at), moved, rtol=1e-10, atol=1e-10)
    batch = torch.stack([at, at + 0.1])
    torch.testing.assert_close(
        torch.func.vmap(matrix)(batch), torch.stack([matrix(b) for b in batch])
    )


@given(st.data())
def test_second_derivatives_by_reverse_over_reverse(data):
    matrix = data.draw(matrices())
    if not matrix.num_free_params:
        return
    at = data.draw(points(matrix))
    weight = torch.randn(matrix.shape)

    def manual(x):
        return (matrix(x) * weight).sum()

    def plain(x):
        matrix.grad_mode = "auto"
        return (matrix(x) * weight).sum()

    found = torch.func.jacrev(torch.func.grad(manual))(at)
    forward = torch.func.hessian(manual)(at)
    expected = torch.func.jacrev(torch.func.grad(plain))(at)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(forward, expected, rtol=1e-10, atol=1e-10)


def test_second_backward_at_the_same_parameters():
    matrix = UnstructuredMatrix(3).double()
    for _ in range(2):
        matrix().sum().backward()
    once = [2 * g for g in torch.autograd.grad(matrix().sum(), list(matrix.parameters()))]
    torch.testing.assert_close([p.grad for p in matrix.parameters()], once)


def test_evaluation_without_recording_does_not_stick():
    matrix = UnstructuredMatrix(2)
    with torch.no_grad():
        assert not matrix().requires_grad
    assert matrix().requires_grad


def test_in_place_changes_of_a_result_do_not_stick():
    matrix = UnstructuredMatrix(2)
    with torch.no_grad():
        first = matrix()
        expected = first.clone()
        first.zero_()
        torch.testing.assert_close(matrix(), expected)


def test_trainable_design_gets_its_gradient():
    slopes = torch.nn.Parameter(torch.randn(5, 2))
    z = DummyMatrix(list("aabba"), covariates=slopes)
    g = UnstructuredMatrix(4).double()
    V = CovariancePropagation(z=z, g=g)
    weight = torch.randn(5, 5)
    (V() * weight).sum().backward()
    dense = torch.zeros(5, 2, 2)
    codes = torch.tensor([0, 0, 1, 1, 0])
    leaf = slopes.detach().clone().requires_grad_()
    dense = dense.index_put((torch.arange(5), codes), leaf).reshape(5, 4)
    (dense @ g().detach() @ dense.T * weight).sum().backward()
    torch.testing.assert_close(slopes.grad, leaf.grad)
    assert all(p.grad is not None for p in g.parameters())


def test_pullback_of_a_one_hot_design_forms_no_jacobian():
    n, q = 300, 60
    V = CovariancePropagation(
        z=DummyMatrix([i % q for i in range(n)]), g=UnstructuredMatrix(q).double()
    )
    jacobian_size = V.num_free_params * n * n
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                sizes.append(out.numel())
            return out

    with Watch():
        V().sum().backward()
    assert max(sizes) < jacobian_size / 10


@pytest.mark.parametrize("order", [1, 2, 3])
def test_autoregression_without_correlation_has_all_derivatives(order):
    matrix = AR1Matrix(4)

    def value(rho):
        return matrix(Recorded(torch.cat([torch.ones(1), rho]), natural=True))[0]

    rho = torch.zeros(1)
    for _ in range(order):
        value = torch.func.jacrev(value)
    expected = torch.zeros(4)
    expected[order] = [1, 1, 2, 6][order]
    torch.testing.assert_close(value(rho).reshape(-1), expected)


def curved(kind):
    """Small trees, one for each operator and closed form."""
    a, b = AR1Matrix(2), UnstructuredMatrix(2)
    made = {
        "sum": lambda: Sum(a, b),
        "tied": lambda: Sum(a, b, a),
        "kronecker": lambda: KroneckerProduct(a, b),
        "one-hot": lambda: CovariancePropagation(z=DummyMatrix(list("aba")), g=b),
        "dense": lambda: CovariancePropagation(z=torch.randn(3, 2), g=b),
        "design": lambda: CovariancePropagation(z=LowerTriangularMatrix(3, 2), g=b),
        "hadamard": lambda: HadamardProduct(a, b),
        "scaled": lambda: 2.0 * b,
        "product": lambda: Product(a, b),
        "transpose": lambda: Transpose(LowerTriangularMatrix(2, 2)),
        "gram": lambda: Gram(LowerTriangularMatrix(2, 2)),
        "inverse": lambda: Inverse(b),
        "block": lambda: BlockDiagonal(a, b),
        "augment": lambda: Augment(a, b),
        "stack": lambda: Stack(a, b),
    }
    return (made[kind]() if kind in made else LEAVES[kind](3)).double()


CURVED = ["sum", "tied", "kronecker", "one-hot", "dense", "design", "hadamard", "scaled"]
CURVED += ["product", "transpose", "gram", "inverse", "block", "augment", "stack"]


@pytest.mark.parametrize("mode", ["default", "manual", "auto"])
@pytest.mark.parametrize("kind", [*LEAVES, *CURVED])
def test_second_derivatives_agree_whichever_way(kind, mode):
    from torch.func import hessian, jacfwd, jacrev

    matrix = curved(kind)
    if not matrix.num_free_params:
        return
    at, weight = 0.3 * torch.randn(matrix.num_free_params), torch.randn(matrix.shape)

    def value(x):
        return (matrix(x) * weight).sum()

    step, differences = 1e-5, []
    for i in range(len(at)):
        move = step * torch.eye(len(at))[i]
        differences.append((jacrev(value)(at + move) - jacrev(value)(at - move)) / (2 * step))
    matrix.grad_mode = mode
    ways = [jacfwd(jacfwd(value)), jacrev(jacrev(value)), jacfwd(jacrev(value))]
    ways += [jacrev(jacfwd(value)), hessian(value)]
    for way in ways:
        torch.testing.assert_close(way(at), torch.stack(differences), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", [*LEAVES, *CURVED])
def test_the_closed_form_jacobian_is_itself_differentiable(kind):
    matrix = closed(curved(kind))
    if not matrix.num_free_params:
        return
    at = 0.3 * torch.randn(matrix.num_free_params)
    weight = torch.randn(matrix.num_free_params, *matrix.shape)

    def contracted(gradient):
        return torch.func.grad(lambda x: (gradient(x)[0] * weight).sum())(at)

    torch.testing.assert_close(
        contracted(matrix.manual_grad), contracted(matrix.auto_grad), rtol=1e-9, atol=1e-9
    )


def test_forward_mode_three_deep():
    matrix = AR1Matrix(2)
    value = lambda x: matrix(x)[0, 1]  # noqa: E731
    third = value
    plain = value
    for _ in range(3):
        third = torch.func.jacfwd(third)
        plain = torch.func.jacrev(plain)
    at = torch.tensor([0.1, 0.4])
    torch.testing.assert_close(third(at), plain(at))
    mixed = torch.func.jacfwd(torch.func.jacrev(torch.func.jacfwd(value)))
    torch.testing.assert_close(mixed(at), plain(at))
