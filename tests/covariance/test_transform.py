"""Each transform with its inverse, derivative, intervals and coordinate."""

import math
import warnings

import pytest
import torch

from openreml_nn import InputError, fit_reml
from openreml_nn.covariance import (
    AR1Matrix,
    CovariancePropagation,
    DummyMatrix,
    EquicorrelationMatrix,
    IdentityMatrix,
    MaternMatrix,
    ScalarMatrix,
    Sum,
    UnstructuredMatrix,
    kron,
)
from openreml_nn.covariance.transform import (
    Transform,
    TransformChain,
    TransformExp,
    TransformExp2,
    TransformExp10,
    TransformExpPow2,
    TransformIdentity,
    TransformPow,
    TransformScaleShift,
    TransformSigmoid,
)

INF = math.inf
REALS, POSITIVE = (-INF, INF), (0.0, INF)
SHIFT = TransformScaleShift(-2.0, 0.5)
SHIFT_TO_ONE = TransformScaleShift(2.0, -1.0)
CORRELATION = TransformChain([TransformSigmoid(), TransformScaleShift(2.0, -1.0)])


class Softplus(Transform):
    """A user's transform, which does not know infinity."""

    codomain = POSITIVE

    def __call__(self, x):
        return torch.where(x < 30, torch.log1p(torch.exp(x)), x) + 0 * x

    def inverse(self, value):
        return torch.log(torch.expm1(value))

    def grad(self, x):
        return torch.sigmoid(x)


class Vanishing(Softplus):
    vanishes = True


#: A transform, its formula, the numbers that it takes, those that it yields.
TRANSFORMS = [
    (TransformIdentity(), lambda x: x, REALS, REALS),
    (TransformExp(), torch.exp, REALS, POSITIVE),
    (TransformExp(degree=1), torch.exp, REALS, POSITIVE),
    (TransformExp(degree=0), torch.exp, REALS, POSITIVE),
    (TransformExp2(), lambda x: torch.exp(x * math.log(2)), REALS, POSITIVE),
    (TransformExp2(degree=1), lambda x: 2**x, REALS, POSITIVE),
    (TransformExp10(), lambda x: torch.exp(x * math.log(10)), REALS, POSITIVE),
    (TransformExpPow2(), lambda x: torch.exp(x) ** 2, REALS, POSITIVE),
    (TransformPow(2.0), lambda x: x * x, POSITIVE, POSITIVE),
    (TransformPow(3.0), lambda x: x * x * x, REALS, REALS),
    (TransformPow(0.5), torch.sqrt, POSITIVE, POSITIVE),
    (TransformPow(-1.0), lambda x: 1 / x, POSITIVE, POSITIVE),
    (TransformScaleShift(2.0, -1.0), lambda x: 2 * x - 1, REALS, REALS),
    (SHIFT, lambda x: 0.5 - 2 * x, REALS, REALS),
    (TransformSigmoid(), lambda x: 1 / (1 + torch.exp(-x)), REALS, (0.0, 1.0)),
    (Softplus(), lambda x: torch.log(1 + torch.exp(x)), REALS, POSITIVE),
    (Vanishing(), lambda x: torch.log(1 + torch.exp(x)), REALS, POSITIVE),
    (CORRELATION, lambda x: torch.tanh(x / 2), REALS, (-1.0, 1.0)),
    (TransformChain([SHIFT, TransformExp()]), lambda x: torch.exp(0.5 - 2 * x), REALS, POSITIVE),
    (
        TransformChain([TransformExp(), SHIFT]),
        lambda x: 0.5 - 2 * torch.exp(x),
        REALS,
        (-INF, 0.5),
    ),
    (
        TransformChain([TransformExp2(), TransformScaleShift(3.0, 0.25)]),
        lambda x: 3 * 2**x + 0.25,
        REALS,
        (0.25, INF),
    ),
    (
        TransformChain([TransformExp(), TransformPow(2.0)]),
        lambda x: torch.exp(2 * x),
        REALS,
        POSITIVE,
    ),
    (
        TransformChain([TransformScaleShift(1.0, 5.0), TransformPow(0.5)]),
        lambda x: torch.sqrt(x + 5),
        (-5.0, INF),
        POSITIVE,
    ),
    (
        TransformChain([TransformChain([TransformExp()]), TransformSigmoid(), SHIFT]),
        lambda x: 0.5 - 2 / (1 + torch.exp(-torch.exp(x))),
        REALS,
        (-1.5, -0.5),
    ),
    (
        TransformChain([Softplus(), TransformScaleShift(2.0)]),
        lambda x: 2 * torch.log(1 + torch.exp(x)),
        REALS,
        POSITIVE,
    ),
]
EACH = pytest.mark.parametrize(
    ("trans", "formula", "domain", "codomain"),
    TRANSFORMS,
    # Names that are the same in every process: a function's repr holds its address.
    ids=[repr(trans) for trans, *_ in TRANSFORMS],
)


@EACH
@pytest.mark.parametrize("shape", [(), (1,), (4,), (2, 3)])
def test_value_inverse_and_derivative(trans, formula, domain, codomain, shape):
    x = torch.rand(shape) + 0.1
    torch.testing.assert_close(trans(x), formula(x))
    torch.testing.assert_close(trans.inverse(trans(x)), x)
    slope = trans.grad(x)
    assert slope.shape == x.shape
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(trans(leaf).sum(), leaf)
    torch.testing.assert_close(slope, expected, rtol=1e-12, atol=0)
    coordinate = trans.coordinate(x)
    torch.testing.assert_close(trans.from_coordinate(coordinate), x)
    torch.testing.assert_close(trans.at_coordinate(coordinate), trans(x))


@EACH
def test_the_derivative_is_autograds_over_the_domain(trans, formula, domain, codomain):
    x = torch.linspace(max(domain[0], -6.0), 6.0, 51)[1:].requires_grad_()
    (expected,) = torch.autograd.grad(trans(x).sum(), x)
    torch.testing.assert_close(trans.grad(x.detach()), expected, rtol=1e-12, atol=1e-300)


@EACH
def test_the_codomain_is_what_the_transform_yields(trans, formula, domain, codomain):
    assert trans.domain == domain
    assert trans.codomain == pytest.approx(codomain)
    values = trans(torch.linspace(max(domain[0], -9.0), 3.0, 201)[1:-1])
    assert bool((values > codomain[0]).all()) and bool((values < codomain[1]).all())
    # To its ends, which far numbers come near.
    for end in codomain:
        far = trans(torch.tensor([max(domain[0], -300.0), 300.0]))
        assert bool(
            ((far - end).abs() < 1e-2).any() if math.isfinite(end) else (far.abs() > 16).any()
        )


@pytest.mark.parametrize(
    ("trans", "codomain"),
    [(t, c) for t, _, _, c in TRANSFORMS if type(t) not in (Softplus, Vanishing)],
    ids=lambda t: repr(t)[:60],
)
def test_an_inverse_outside_the_codomain_is_refused(trans, codomain):
    outside = [end + step for end, step in zip(codomain, (-0.5, 0.5)) if math.isfinite(end)]
    for value in [*outside, math.nan]:
        with pytest.raises(InputError, match=rf"`value` is {value:.6g}: .* yields numbers in \("):
            trans.inverse(torch.tensor([trans(torch.ones(1)).item(), value]))
    with pytest.raises(TypeError, match="`value` is a float: expected a tensor"):
        trans.inverse(0.5)
    with pytest.raises(TypeError, match="`x` is a float: expected a tensor"):
        trans(0.5)
    with pytest.raises(TypeError, match="`x` is a list: expected a tensor"):
        trans.grad([0.5])
    with pytest.raises(TypeError, match="`x` is a str: expected a tensor"):
        trans.coordinate("0.5")
    for method in (trans.from_coordinate, trans.at_coordinate):
        with pytest.raises(TypeError, match=r"`[ux]` is a NoneType: expected a tensor"):
            method(None)


def test_a_correlation_out_of_bounds_is_named_with_its_own_bounds():
    trans = EquicorrelationMatrix(5).param_trans["rho"]
    with pytest.raises(InputError, match=r"`value` is -0.3: .* numbers in \(-0.25, 1\)"):
        trans.inverse(torch.tensor([-0.3]))


@pytest.mark.parametrize("n", range(2, 40))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ends_of_a_codomain_have_infinite_inverses(n, dtype):
    # Whatever the rounding of -1 / (n - 1) on its way through the chain.
    trans = EquicorrelationMatrix(n).param_trans["rho"]
    found = trans.inverse(torch.tensor(trans.codomain, dtype=dtype))
    assert not bool(found.isnan().any())
    assert found[0] < -14 and found[1] > 14
    for positive in (TransformExp(), TransformExp2(), TransformExp10(), TransformExpPow2()):
        assert positive.inverse(torch.zeros(1, dtype=dtype)).item() == -INF


def test_roots_of_negative_numbers():
    x = torch.tensor([-8.0, 0.0, 27.0])
    torch.testing.assert_close(TransformPow(3).inverse(x), torch.tensor([-2.0, 0.0, 3.0]))
    with pytest.raises(InputError, match=r"is -8: TransformPow\(factor=2.0\) yields numbers in"):
        TransformPow(2).inverse(x)


ONE_EACH = [
    TransformIdentity(),
    TransformExp(),
    TransformExp(degree=1),
    TransformExp(degree=0),
    TransformExp2(),
    TransformExp10(degree=1),
    TransformExpPow2(),
    TransformPow(3.0),
    SHIFT,
    TransformSigmoid(),
    CORRELATION,
    Softplus(),
    Vanishing(),
]


@pytest.mark.parametrize("element", ONE_EACH, ids=repr)
def test_a_chain_of_one_is_its_element(element):
    chain, x = TransformChain([element]), torch.linspace(-3, 3, 13)
    assert (chain.vanishes, chain.bounds) == (element.vanishes, element.bounds)
    assert chain.fold(2.5) == element.fold(2.5)
    assert (chain.domain, chain.codomain) == (element.domain, element.codomain)
    u = element.coordinate(x)
    for method, argument in (
        ("__call__", x),
        ("grad", x),
        ("inverse", element(x)),
        ("coordinate", x),
        ("from_coordinate", u),
        ("at_coordinate", u),
    ):
        found = getattr(chain, method)(argument)
        torch.testing.assert_close(found, getattr(element, method)(argument), rtol=0, atol=0)


VANISHING = [
    ([SHIFT, TransformExp()], True),
    ([SHIFT, TransformExp(degree=1)], True),
    ([TransformPow(3.0), TransformExpPow2()], True),
    ([TransformExp(), TransformScaleShift(3.0)], True),
    ([TransformExp(), TransformScaleShift(3.0, 0.5)], True),
    ([TransformExp(), TransformPow(2.0)], True),
    ([TransformExp(), TransformPow(0.5)], True),
    ([TransformExp(), TransformPow(-1.0)], True),
    ([TransformChain([SHIFT, TransformExp2()]), TransformScaleShift(2.0)], True),
    ([TransformExp(), TransformExp()], True),
    ([Vanishing(), TransformScaleShift(2.0)], True),
    ([TransformExp(), SHIFT], True),
    # Zero is out of reach, at the other end or no ordinary value.
    ([TransformSigmoid(), TransformExp()], False),
    ([SHIFT, TransformSigmoid()], False),
    ([TransformExp(), SHIFT, TransformExp()], False),
    ([TransformExp(), TransformSigmoid()], False),
    ([TransformExp(degree=0), TransformScaleShift(2.0)], False),
    ([Softplus(), TransformScaleShift(2.0)], False),
]


@pytest.mark.parametrize(("elements", "vanishes"), VANISHING, ids=repr)
def test_which_chains_vanish(elements, vanishes):
    chain, x = TransformChain(elements), torch.linspace(-1.5, 1.5, 7)
    assert chain.vanishes is vanishes
    u = chain.coordinate(x)
    torch.testing.assert_close(chain.from_coordinate(u), x)
    torch.testing.assert_close(chain.at_coordinate(u), chain(x))
    if not vanishes:
        assert 0.0 not in chain.bounds
        if not chain.bounds:
            torch.testing.assert_close(u, x, rtol=0, atol=0)
        return
    assert chain.bounds == (0.0,)
    assert chain.fold(-0.3) == chain.fold(0.3) == 0.3
    assert bool((u > 0).all())
    zero = torch.zeros(1, requires_grad=True)
    value = chain.at_coordinate(zero)
    assert value.item() in chain.codomain
    (slope,) = torch.autograd.grad(value.sum(), zero, create_graph=True)
    assert bool(slope.isfinite())
    assert abs(chain.from_coordinate(torch.zeros(1)).item()) == INF


@pytest.mark.parametrize(
    "trans", [TransformExp(), TransformExp2(), TransformExp10(), TransformExpPow2()], ids=repr
)
def test_a_variance_of_zero_is_an_ordinary_point_in_the_coordinate(trans):
    u = torch.zeros(1, requires_grad=True)
    value = trans.at_coordinate(u)
    (slope,) = torch.autograd.grad(value.sum(), u)
    assert value.item() == 0.0
    assert slope.item() == 0.0


@pytest.mark.parametrize(
    "trans",
    [
        TransformSigmoid(),
        CORRELATION,
        TransformChain([SHIFT, TransformSigmoid(), TransformIdentity(), SHIFT]),
    ],
    ids=repr,
)
def test_both_ends_of_an_interval_are_ordinary_points_in_the_coordinate(trans):
    assert trans.bounds == (-math.pi / 2, math.pi / 2)
    ends = torch.tensor(trans.bounds, requires_grad=True)
    values = trans.at_coordinate(ends)
    torch.testing.assert_close(values.sort()[0], torch.tensor(trans.codomain), rtol=0, atol=1e-15)
    (slope,) = torch.autograd.grad(values.sum(), ends)
    torch.testing.assert_close(slope, torch.zeros(2), rtol=0, atol=1e-15)
    # A coordinate beyond an end is its mirror image.
    u = torch.linspace(-6.0, 6.0, 25)
    folded = torch.tensor([trans.fold(float(v)) for v in u])
    assert bool((folded.abs() <= math.pi / 2).all())
    torch.testing.assert_close(trans.at_coordinate(folded), trans.at_coordinate(u))
    # Far out the coordinate has the digits that the value has not.
    far = torch.tensor([-200.0, -37.0, 20.0])
    near = TransformSigmoid()
    torch.testing.assert_close(near.from_coordinate(near.coordinate(far[:2] / 8)), far[:2] / 8)
    assert near.coordinate(far)[0] == pytest.approx(-math.pi / 2)


def test_a_length_is_exp_and_steps_in_its_logarithm():
    distance = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    trans = MaternMatrix(distance).param_trans["lengthscale"]
    assert isinstance(trans, TransformExp)
    assert not trans.vanishes
    x = torch.tensor([-0.7])
    torch.testing.assert_close(trans.coordinate(x), x, rtol=0, atol=0)


def fitted(trans, y, groups):
    specs = {"sigma^2": {"fixed": False, "default": torch.zeros(1), "trans": trans}}
    q = len(set(groups))
    group = CovariancePropagation(DummyMatrix(groups), ScalarMatrix(q, specs))
    V = Sum(group=group, residual=ScalarMatrix(len(y), specs))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = fit_reml(V, y, torch.ones(len(y), 1))
    return torch.tensor([p.value for p in result.parameters]), result


@pytest.mark.parametrize(
    "trans", [TransformExp(degree=d) for d in range(3)] + [TransformIdentity()], ids=repr
)
def test_canonical_coordinates_have_the_same_matrix(trans):
    """A sign is folded for all of a column of L, or for none: a logarithm below zero has none."""
    matrix = UnstructuredMatrix(3).double()
    for i in range(3):
        matrix.retransform(f"L_{i}_{i}", trans)

    def at(coordinates):
        L = torch.zeros(3, 3)
        for name, u in coordinates.items():
            i, j = map(int, name.split("_")[1:])
            L[i, j] = float(matrix.own_trans[name].at_coordinate(torch.tensor(u)))
        return L @ L.mT

    values = (-0.7, 0.5, -0.4, 0.3, 0.8, -1.1)
    coordinates = dict(zip(matrix.param_names, values, strict=True))
    torch.testing.assert_close(at(matrix.canonical(coordinates)), at(coordinates))


@pytest.mark.parametrize("singular", [False, True])
def test_estimates_do_not_depend_on_the_transform_of_a_variance(singular):
    groups = [f"g{i // 5}" for i in range(60)]
    y = torch.randn(60)
    if singular:
        y = y - y.reshape(12, 5).mean(1).repeat_interleave(5)
    else:
        y = y + torch.randn(12).repeat_interleave(5)
    expected, reference = fitted(TransformExpPow2(), y, groups)
    assert (expected[0].item() == 0.0) == singular
    for trans in (
        TransformExp(),
        TransformExp2(),
        TransformExp10(),
        TransformChain([TransformScaleShift(-1.5, 2.0), TransformExp()]),
        TransformChain([TransformExp(), TransformPow(2.0)]),
        TransformChain([TransformExp(), TransformPow(-0.5)]),
        TransformChain([TransformExp(), TransformScaleShift(3.0)]),
    ):
        found, result = fitted(trans, y, groups)
        assert result.singular == reference.singular
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
        assert float(result.log_likelihood) == pytest.approx(
            float(reference.log_likelihood), abs=1e-8
        )


@pytest.mark.parametrize("same", [False, True])
def test_estimates_do_not_depend_on_the_transform_of_a_correlation(same):
    q, n = 8, 6
    torch.manual_seed(0)
    if same:
        # A random intercept and nothing else: the best correlation is one.
        y = torch.randn(q, 1).expand(q, n) + 0.1 * torch.randn(q, n)
    else:
        y = torch.randn(q, n).cumsum(1)
    y, X = y.reshape(-1), torch.ones(q * n, 1)

    def fitted(trans):
        specs = {"rho": {"fixed": False, "default": torch.zeros(1), "trans": trans}}
        subject = kron(IdentityMatrix(q), AR1Matrix(n, specs if trans is not None else None))
        V = Sum(subject=subject, residual=ScalarMatrix(q * n))
        result = fit_reml(V, y, X)
        return V.build_params().detach(), result

    expected, reference = fitted(None)
    assert (expected[1].item() == 1.0) == same
    for trans in (
        TransformChain([TransformScaleShift(-1.5, 0.3), TransformSigmoid(), SHIFT_TO_ONE]),
        TransformChain([TransformSigmoid(), TransformScaleShift(-2.0, 1.0)]),
    ):
        found, result = fitted(trans)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        assert float(result.log_likelihood) == pytest.approx(
            float(reference.log_likelihood), abs=1e-6
        )


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: TransformScaleShift(0.0), InputError, "`a` is 0: a constant"),
        (lambda: TransformScaleShift(math.nan), InputError, "`a` is nan: expected a finite"),
        (lambda: TransformScaleShift(1.0, INF), InputError, "`b` is inf: expected a finite"),
        (lambda: TransformScaleShift("2"), TypeError, "`a` is '2': expected a number"),
        (lambda: TransformScaleShift(True), TypeError, "`a` is True: expected a number"),
        (lambda: TransformPow(0), InputError, "`factor` is 0: a constant"),
        (lambda: TransformPow(math.nan), InputError, "`factor` is nan: expected a finite"),
        (lambda: TransformPow(None), TypeError, "`factor` is None: expected a number"),
        (lambda: TransformExp(3), InputError, "`degree` is 3: expected 0, 1 or 2"),
        (lambda: TransformExp2("x"), TypeError, "`degree` is 'x': expected an int"),
        (lambda: TransformExpPow2(True), TypeError, "`degree` is True: expected an int"),
        (lambda: TransformChain([]), InputError, "`chain` is empty"),
        (lambda: TransformChain([torch.exp]), TypeError, "holds a builtin.*Transform instances"),
        (lambda: TransformChain(5), TypeError, "`chain` is 5: expected a sequence of Transform"),
        (lambda: TransformChain("exp"), TypeError, "`chain` is 'exp': expected a sequence"),
        (
            lambda: TransformChain([TransformExp(), TransformScaleShift(-1.0), TransformPow(0.5)]),
            InputError,
            r"`chain` holds TransformExp\(\), which yields numbers in \(0, inf\), before one that "
            r"takes those in \(-inf, 0\)",
        ),
    ],
)
def test_wrong_transforms_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_numbers_of_numpy_are_numbers():
    np = pytest.importorskip("numpy")
    trans = TransformScaleShift(np.float32(2), np.int64(-1))
    assert repr(trans) == "TransformScaleShift(a=2.0, b=-1.0)"
    assert TransformPow(np.int64(3)) == TransformPow(3.0)


def test_equal_transforms_are_equal_and_shown_as_they_are_made():
    pairs = [
        (TransformExp(), TransformExp(degree=2), "TransformExp()"),
        (TransformExp(degree=0), TransformExp(degree=0), "TransformExp(degree=0)"),
        (
            TransformChain([TransformExp(), SHIFT]),
            TransformChain((TransformExp(), TransformScaleShift(-2, 0.5))),
            "TransformChain(chain=(TransformExp(), TransformScaleShift(a=-2.0, b=0.5)))",
        ),
    ]
    for one, other, shown in pairs:
        assert one == other and hash(one) == hash(other)
        assert repr(one) == shown
    assert TransformExp() != TransformExp(degree=1)
    assert TransformExp() != TransformExp2()
