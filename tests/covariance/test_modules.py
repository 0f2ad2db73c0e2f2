"""A matrix is a module like any other."""

import copy
import math
import pickle
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from openreml_nn.covariance import (
    AR1Matrix,
    CovariancePropagation,
    DiagonalMatrix,
    DummyMatrix,
    ExponentialCorrelation,
    HadamardProduct,
    ICARMatrix,
    IdentityMatrix,
    KnownInverseMatrix,
    KroneckerProduct,
    Matrix,
    ScalarMatrix,
    Sum,
    UnconstrainedMatrix,
    UnstructuredMatrix,
    VecchiaMatrix,
)
from openreml_nn.covariance.params import free_specs
from openreml_nn.covariance.transform import TransformExp, TransformIdentity
from openreml_nn.support.errors import InputError
from tests.strategies import LEAVES, matrices, points


def model():
    subject = CovariancePropagation(
        z=DummyMatrix(list("aabbc"), covariates=torch.arange(10.0).reshape(5, 2)),
        g=KroneckerProduct(IdentityMatrix(3), UnstructuredMatrix(2)),
    )
    return Sum(subject=subject, residual=ScalarMatrix(5)).double()


def test_parameters_are_named_by_their_path():
    V = model()
    assert V.param_names == [
        "subject/g/op_1/L_0_0",
        "subject/g/op_1/L_1_0",
        "subject/g/op_1/L_1_1",
        "residual/sigma^2",
    ]
    assert [name.replace(".", "/") for name, _ in V.named_parameters()] == V.param_names
    assert [name.replace(".", "/") for name in V.state_dict()] == V.param_names
    assert all(p.shape == (1,) for p in V.parameters())


def test_state_dict_round_trip_with_weights_only(tmp_path):
    V, other = model(), model()
    with torch.no_grad():
        for p in V.parameters():
            p.normal_()
    torch.save(V.state_dict(), tmp_path / "v.pt")
    other.load_state_dict(torch.load(tmp_path / "v.pt", weights_only=True))
    torch.testing.assert_close(other(), V(), rtol=0, atol=0)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_equal_and_independent(copied):
    V = model()
    V().sum().backward()
    other = copied(V)
    torch.testing.assert_close(other(), V())
    with torch.no_grad():
        next(other.parameters()).add_(1)
    assert not torch.equal(other(), V())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_and_device_follow_the_module(device, dtype):
    V = model().to(device, dtype)
    assert V().dtype == dtype
    assert V().device.type == device
    V().sum().backward()
    assert all(p.grad.dtype == dtype for p in V.parameters())


def test_functional_call_uses_the_given_parameters():
    V = model()
    given_params = {name: torch.randn(1) for name, _ in V.named_parameters()}
    found = torch.func.functional_call(V, given_params)
    torch.testing.assert_close(found, V(torch.cat(list(given_params.values()))))


def test_a_module_in_two_places_is_one_set_of_parameters():
    g = UnstructuredMatrix(2).double()
    V = Sum(a=KroneckerProduct(IdentityMatrix(2), g), b=KroneckerProduct(g, IdentityMatrix(2)))
    assert V.num_params == 3
    assert len(list(V.named_parameters())) == 3
    weight = torch.randn(4, 4)
    jacobian, _ = V.manual_grad()
    torch.testing.assert_close(
        V.manual_vjp(weight), (jacobian * weight).sum((1, 2)), rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(jacobian, V.auto_grad()[0])


@given(st.data())
def test_names_match_values(data):
    matrix = data.draw(matrices())
    at = data.draw(points(matrix))
    natural = matrix.build_params(at, out_format="dict")
    assert list(natural) == matrix.param_names
    free = matrix.build_params(at, include_fixed=False, trans=False, out_format="dict")
    assert list(free) == matrix.free_param_names
    for name, trans in matrix.free_param_trans.items():
        torch.testing.assert_close(trans(free[name]), natural[name])
    assert [matrix.param_names[i] for i in matrix.free_param_index] == matrix.free_param_names
    assert [matrix.param_names[i] for i in matrix.fixed_param_index] == matrix.fixed_param_names
    assert matrix.num_free_params + matrix.num_fixed_params == matrix.num_params


def test_fix_and_free():
    V = model()
    V.fix("residual/sigma^2", 0.25)
    assert V.fixed_param_names == ["residual/sigma^2"]
    assert "residual.sigma^2" not in dict(V.named_parameters())
    assert "residual.sigma^2" in V.state_dict()
    assert float(V.param_defaults["residual/sigma^2"]) == 0.25
    V.free("residual/sigma^2")
    assert V.num_fixed_params == 0
    assert dict(V.named_parameters())["residual.sigma^2"].item() == 0.25
    with pytest.raises(ValueError, match="expected one of"):
        V.fix("residual/tau")


def test_everything_fixed_has_no_gradient():
    V = ScalarMatrix(2).fix("sigma^2", 0.0)
    assert V.manual_grad() == (None, [])
    assert V.auto_grad() == (None, [])
    assert V.grad() == (None, [])
    assert not V().requires_grad


@pytest.mark.parametrize(
    ("free_params", "error"),
    [
        ([0.0], TypeError),
        (torch.zeros(2), ValueError),
        (torch.zeros(1, 1), ValueError),
        ({}, ValueError),
        ({"sigma^2": torch.zeros(1), "tau": torch.zeros(1)}, ValueError),
        ({"tau": torch.zeros(1)}, ValueError),
    ],
)
def test_wrong_free_params_are_refused(free_params, error):
    with pytest.raises(error, match="free_params"):
        ScalarMatrix(2)(free_params)


@pytest.mark.parametrize("name", ["", "a/b", "a.b"])
def test_names_that_would_break_paths_are_refused(name):
    with pytest.raises(ValueError, match="name"):
        Matrix((2, 2), free_specs([name]))
    if name:
        with pytest.raises(ValueError, match="name"):
            Sum({name: ScalarMatrix(2), "b": ScalarMatrix(2)})


@pytest.mark.parametrize(
    "spec",
    [
        {"fixed": False, "default": torch.zeros(1)},
        {"fixed": 0, "default": torch.zeros(1), "trans": TransformIdentity()},
        {"fixed": False, "default": 0.0, "trans": TransformIdentity()},
        {"fixed": False, "default": torch.zeros(1), "trans": torch.exp},
    ],
)
def test_wrong_specifications_are_refused(spec):
    with pytest.raises(TypeError):
        Matrix((2, 2), {"x": spec})


def test_operators_refuse_what_does_not_fit():
    a, b = ScalarMatrix(2), ScalarMatrix(3)
    with pytest.raises(ValueError, match="one shape"):
        Sum(a, b)
    with pytest.raises(ValueError, match="by position and by keyword"):
        Sum(a, b=a)
    with pytest.raises(ValueError, match="`z` has 3 columns"):
        CovariancePropagation(z=torch.zeros(4, 3), g=a)
    with pytest.raises(ValueError, match="got 3 operands"):
        CovariancePropagation(a, a, a)
    with pytest.raises(TypeError, match="no Matrix"):
        Sum(torch.eye(2), torch.eye(2))
    with pytest.raises(TypeError, match="expected a Matrix"):
        Sum(a, 1.0)


def test_specifications_are_read_by_name_and_can_be_replaced():
    specs = free_specs(["tau"], default=1.0, trans=TransformExp())
    V = ScalarMatrix(2, specs)
    assert V.param_names == ["tau"]
    torch.testing.assert_close(V().detach(), torch.e * torch.eye(2))
    with pytest.raises(TypeError):
        V.param_specs["tau"]["fixed"] = True


def test_grad_mode_chooses_and_is_checked():
    V = UnconstrainedMatrix(2).double()
    V.grad_mode = "auto"
    assert "ClosedForm" not in V().grad_fn.name()
    V.grad_mode = "manual"
    assert "ClosedForm" in V().grad_fn.name()
    V.grad_mode = "fast"
    with pytest.raises(ValueError, match="grad_mode"):
        V()


def test_sizes_of_one_are_not_squeezed_away():
    assert DiagonalMatrix(1)().shape == (1, 1)
    assert UnstructuredMatrix(1)().shape == (1, 1)
    V = CovariancePropagation(z=DummyMatrix(["a"]), g=ScalarMatrix(1))
    assert V().shape == (1, 1)
    assert V.manual_grad()[0].shape == (1, 1, 1)


def test_names_of_module_attributes_are_allowed_as_operands():
    V = Sum(type=ScalarMatrix(2), half=ScalarMatrix(2), shape=IdentityMatrix(2))
    assert V.param_names == ["type/sigma^2", "half/sigma^2"]
    assert V.shape == (2, 2)


def test_intermediates_are_kept_for_exactly_these_parameters():
    V = UnconstrainedMatrix(2)
    x, y = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.3, 0.2, 0.1])
    V.set_intermediates(x, "kept")
    assert V.get_intermediates(x) == "kept"
    assert V.get_intermediates(y) is None
    assert V.get_intermediates(x.float()) is None
    V.set_intermediates(y.requires_grad_(), "a graph")
    assert V.get_intermediates(y) is None
    V.reset_intermediates()
    assert V.get_intermediates(x) is None


def test_repr_shows_the_tree():
    text = repr(model())
    assert "Sum" in text
    assert "(subject): CovariancePropagation" in text
    assert "shape=(5, 5)" in text


@pytest.mark.parametrize("kind", LEAVES)
def test_every_leaf_is_an_ordinary_module(kind, tmp_path, device):
    V = LEAVES[kind](4).double()
    with torch.no_grad():
        for p in V.parameters():
            p.add_(0.1)
    expected = V()
    for other in (copy.deepcopy(V), pickle.loads(pickle.dumps(V))):
        torch.testing.assert_close(other(), expected, rtol=0, atol=0)
    torch.save(V.state_dict(), tmp_path / "v.pt")
    fresh = LEAVES[kind](4).double()
    fresh.load_state_dict(torch.load(tmp_path / "v.pt", weights_only=True))
    torch.testing.assert_close(fresh(), expected, rtol=0, atol=0)
    moved = V.to(device, torch.float32)()
    assert moved.dtype == torch.float32
    assert moved.device.type == device
    torch.testing.assert_close(moved.double().cpu(), expected, rtol=1e-4, atol=1e-5)
    assert type(V).__name__ in repr(V)
    assert V.repr_dict


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", LEAVES)
def test_the_default_dtype_is_followed(kind, dtype):
    torch.set_default_dtype(dtype)
    assert LEAVES[kind](3)().dtype == dtype


#: Leaves that are built from tensors, which are data and not on the meta device.
FROM_DATA = (
    "conditional", "continuous ar1", "exponential", "gaussian", "intrinsic", "known",
    "heteroscedastic", "known inverse", "linear", "matern", "neighbours", "power", "random walk", "rational", "spherical",
)  # fmt: skip


@pytest.mark.parametrize("kind", [k for k in LEAVES if not k.startswith(FROM_DATA)])
def test_construction_on_the_meta_device(kind):
    with torch.device("meta"):
        V = LEAVES[kind](3)
    assert all(p.is_meta for p in V.parameters())
    V = V.to_empty(device="cpu").double()
    V.load_state_dict(LEAVES[kind](3).double().state_dict())
    torch.testing.assert_close(V(), LEAVES[kind](3).double()())


def test_compiled_matrices_agree():
    V = model()

    def loss(x):
        return (V(x) ** 2).sum()

    x = torch.randn(V.num_free_params)
    compiled = torch.compile(loss, backend="eager")
    torch.testing.assert_close(compiled(x), loss(x))


def test_covariates_from_a_module_are_trainable():
    features = torch.randn(5, 3)

    class Slope(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(3, 2)

        def forward(self):
            return self.net(features)

    slope = Slope()
    z = DummyMatrix(list("aabbc"), covariates=slope)
    V = CovariancePropagation(z=z, g=KroneckerProduct(IdentityMatrix(3), UnstructuredMatrix(2)))
    assert z.shape == (5, 6)
    before = V().detach()
    V().sum().backward()
    assert slope.net.weight.grad is not None
    assert V.operands["g"].operands["op_1"]._parameters["L_0_0"].grad is not None
    with torch.no_grad():
        slope.net.weight.add_(1.0)
    assert not torch.equal(V(), before)
    fixed = DummyMatrix(list("aabbc"), covariates=slope().detach())
    torch.testing.assert_close(z(), fixed())


# ---------------------------------------------------------------------- values and arithmetic


def test_values_are_set_on_either_scale():
    V = Sum(a=ScalarMatrix(2), e=ScalarMatrix(2))
    V.set_value("a/sigma^2", 4.0, natural=True).fix("e/sigma^2", 9.0, natural=True)
    torch.testing.assert_close(V().detach(), 13 * torch.eye(2))
    assert V.fixed_param_names == ["e/sigma^2"]
    V.set_value("e/sigma^2", 0.5)
    assert V.param_defaults["e/sigma^2"].item() == 0.5
    V.fix("a/sigma^2", 0.0, natural=True)
    torch.testing.assert_close(V().detach(), torch.e * torch.eye(2))
    V.fix("a/sigma^2", torch.tensor(-torch.inf))
    torch.testing.assert_close(V().detach(), torch.e * torch.eye(2))


@pytest.mark.parametrize("change", ["fix", "set_value"])
@pytest.mark.parametrize(
    ("name", "value", "natural"),
    [
        ("rho", float("nan"), False),
        ("rho", float("inf"), False),
        ("rho", -float("inf"), False),
        ("rho", 1e20, False),
        ("rho", 1.0, True),
        ("rho", -1.5, True),
        ("sigma^2", float("nan"), True),
        ("sigma^2", float("inf"), False),
        ("sigma^2", 1e20, False),
        ("sigma^2", -1e20, False),
        ("sigma^2", -1.0, True),
    ],
)
def test_values_that_a_transform_does_not_reach_are_refused(change, name, value, natural):
    V = AR1Matrix(3)
    before = V().detach()
    with pytest.raises(ValueError, match=f"`value` of '{re.escape(name)}'"):
        getattr(V, change)(name, value, natural=natural)
    torch.testing.assert_close(V().detach(), before, rtol=0, atol=0)
    assert V.num_fixed_params == 0


def test_specifications_cannot_be_assigned_to():
    V = AR1Matrix(3)
    with pytest.raises(TypeError, match=r"fix\(name, value\)"):
        V.param_specs["rho"]["fixed"] = True
    with pytest.raises(TypeError, match=r"fix\(name, value\)"):
        V.param_specs["rho"] = {}
    with pytest.raises(TypeError, match=r"fix\(name, value\)"):
        V.set_param_specs("rho", fixed=True)
    assert AR1Matrix(2, V.param_specs).param_names == V.param_names


@pytest.mark.parametrize("scale", [2.0, 2, np.float64(2.0), np.int64(2), torch.tensor([2.0])])
def test_a_number_times_a_matrix(scale):
    V = model()
    for scaled in (scale * V, V * scale):
        torch.testing.assert_close(scaled(), 2 * V())
        assert scaled.shape == V.shape
        torch.testing.assert_close(scaled.grad()[0], 2 * V.grad()[0])
    with pytest.raises(TypeError):
        V * "2"


@pytest.mark.parametrize("scale", [torch.tensor([2.0]), torch.tensor(2.0)])
def test_a_multiple_has_the_structure_of_the_matrix(scale):
    V = KroneckerProduct(AR1Matrix(3), AR1Matrix(4))
    for whole in (model(), V):
        scaled = HadamardProduct(whole, scale)
        terms = scaled.terms()
        assert [type(t.covariance) for t in terms] == [type(t.covariance) for t in whole.terms()]
        total = sum(term.dense() for term in terms)
        torch.testing.assert_close(total, 2 * whole())


def test_integers_of_numpy_are_sizes():
    for n in (np.int64(3), np.uint8(3)):
        for make in (ScalarMatrix, DiagonalMatrix, AR1Matrix, UnstructuredMatrix, IdentityMatrix):
            assert make(n).shape == (3, 3)
            assert type(make(n).shape[0]) is int


def test_the_jacobian_under_the_name_of_the_original():
    V = DiagonalMatrix(3)
    x = torch.tensor([0.0, 0.5, 1.0])
    torch.testing.assert_close(V.map_theta_to_dv(x), V.manual_grad(x)[0])
    assert ScalarMatrix(2).fix("sigma^2").map_theta_to_dv() is None


def test_operands_grad_is_a_pair_of_lists():
    V = CovariancePropagation(torch.randn(4, 3), DiagonalMatrix(3))
    slices, names = V.operands_grad(torch.zeros(3))
    assert slices[0] is None
    assert slices[1].shape == (3, 3, 3)
    assert names == [[], ["op_1/sigma^2_0", "op_1/sigma^2_1", "op_1/sigma^2_2"]]


def test_positional_operands_have_numbers_and_keywords_any_order():
    z, g = DummyMatrix(["a", "b", "c", "a"]), DiagonalMatrix(3)
    x = torch.tensor([0.0, 0.5, 1.0])
    V = CovariancePropagation(z, g)
    assert list(V.operands) == ["op_0", "op_1"]
    turned = CovariancePropagation(g=g, z=z)
    assert list(turned.operands) == ["z", "g"]
    torch.testing.assert_close(turned(x), V(x))
    jacobian, names = turned.manual_grad(x)
    assert names == [f"g/sigma^2_{i}" for i in range(3)]
    expected = torch.zeros(3, 4, 4)
    for i, rows in enumerate([[0, 3], [1], [2]]):
        for a in rows:
            for b in rows:
                expected[i, a, b] = 2 * math.exp(2 * x[i])
    torch.testing.assert_close(jacobian, expected)


@pytest.mark.parametrize("what", [None, "abc", -1, 2.5, [1], {}, torch.zeros(2, 3), np.zeros(2)])
@pytest.mark.parametrize("cls", [ScalarMatrix, DiagonalMatrix, AR1Matrix, UnstructuredMatrix])
def test_sizes_of_the_wrong_kind_are_named(cls, what):
    with pytest.raises((TypeError, ValueError), match=r"`n` is .*: expected"):
        cls(what)


def test_designs_of_the_wrong_kind_are_named():
    codes = torch.tensor([0, 1])
    for build, name in [
        (lambda: DummyMatrix(list("aabb"), drop_first="no"), "drop_first"),
        (lambda: DummyMatrix.from_codes(codes, "ab"), "levels"),
        (lambda: DummyMatrix.from_codes(codes, 0), "levels"),
        (lambda: DummyMatrix.from_codes([0, 1], 2), "codes"),
        (lambda: DummyMatrix.from_codes(codes, 2, [1.0, 2.0]), "`values`"),
        (lambda: DummyMatrix.from_codes(codes, 2, torch.tensor([1.0, torch.nan])), "`values`"),
        (lambda: Sum(ScalarMatrix(1), torch.tensor([[torch.nan]])), "operand 'op_1'"),
        (lambda: ScalarMatrix(2).terms([0]), "rows"),
    ]:
        with pytest.raises((TypeError, ValueError), match=name) as error:
            build()
        assert "\n" not in str(error.value)


def test_a_value_that_is_set_has_all_its_digits_whatever_the_default_dtype():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        matrix = ScalarMatrix(1).double().set_value("sigma^2", 2.3, natural=True)
    finally:
        torch.set_default_dtype(before)
    assert matrix().item() == pytest.approx(2.3, rel=1e-15)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("inverse", lambda: KnownInverseMatrix(torch.eye(3).requires_grad_())),
        ("adjacency", lambda: ICARMatrix((1 - torch.eye(3)).requires_grad_())),
        (
            "places",
            lambda: VecchiaMatrix(torch.rand(4, 2, requires_grad=True), ExponentialCorrelation()),
        ),
    ],
)
def test_known_numbers_that_would_get_no_gradient_are_refused(name, make):
    with pytest.raises(InputError, match=f"`{name}` requires a gradient"):
        make()
