"""The likelihood against a dense reference, and the solvers against each other."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from openreml_nn import InputError, REMLLoss, fit_reml, restricted_log_likelihood
from openreml_nn.covariance import (
    AR1Matrix,
    CompoundSymmetricMatrix,
    CovariancePropagation,
    DiagonalMatrix,
    DummyMatrix,
    IdentityMatrix,
    Inverse,
    KnownInverseMatrix,
    KnownMatrix,
    KroneckerProduct,
    Matrix,
    ScalarMatrix,
    Sum,
    UnconstrainedMatrix,
    UnstructuredMatrix,
)
from openreml_nn.estimation.aireml import Curvature
from openreml_nn.estimation.outcome import outcome
from openreml_nn.likelihood import Blocked, NotPositiveDefiniteError
from tests.likelihood.models import models, reference

METHODS = ["reml", "ml"]
SOLVERS = ["dense", "blocked"]
#: Each example takes every solver through all that derives from a likelihood.
FEWER = settings(max_examples=settings.default.max_examples // 4)


def small():
    """Five subjects with correlated intercepts and slopes, crossed with three items."""
    n = 20
    subject = [i % 5 for i in range(n)]
    time = torch.linspace(-1, 1, n)
    V = Sum(
        subject=CovariancePropagation(
            z=DummyMatrix(subject, covariates=torch.stack([torch.ones(n), time], 1)),
            g=KroneckerProduct(IdentityMatrix(5), UnstructuredMatrix(2)),
        ),
        item=CovariancePropagation(z=DummyMatrix([i % 3 for i in range(n)]), g=ScalarMatrix(3)),
        residual=ScalarMatrix(n),
    ).double()
    return V, torch.randn(n), torch.stack([torch.ones(n), time], 1)


@given(st.data(), st.sampled_from(METHODS), st.sampled_from(SOLVERS))
def test_value_equals_the_reference(data, method, solver):
    m = data.draw(models())
    expected = reference(m.y, m.X, m.covariance(), method)
    loss = REMLLoss(m.covariance, method, solver, reduction="sum")
    assert -loss(m.y, m.X).item() == pytest.approx(expected, rel=1e-10, abs=1e-9)
    mean = REMLLoss(m.covariance, method, solver)(m.y, m.X).item()
    assert mean == pytest.approx(-expected / len(m.y), rel=1e-10, abs=1e-9)
    found = restricted_log_likelihood(m.y, m.X, m.covariance(), method).item()
    assert found == pytest.approx(expected, rel=1e-10, abs=1e-9)


def _objective(m, method, solver):
    loss = REMLLoss(m.covariance, method, solver, reduction="sum")
    return loss.objective(m.y, m.X), loss(m.y, m.X)


@pytest.mark.parametrize(
    "blocked",
    [Blocked(pair_cost=0), Blocked(), Blocked(pair_cost=1e9)],
    ids=["sparse", "auto", "dense"],
)
@FEWER
@given(st.data(), st.sampled_from(METHODS))
def test_blocked_equals_dense(blocked, data, method):
    m = data.draw(models())
    _compare_solvers(m, method, ("dense", blocked))


@pytest.mark.parametrize("pair_cost", [0, 1e9], ids=["sparse", "dense"])
@FEWER
@given(st.data(), st.sampled_from(METHODS))
def test_structured_residuals_equal_dense(pair_cost, data, method):
    m = data.draw(models(structured=True))
    _compare_solvers(m, method, ("dense", Blocked(pair_cost=pair_cost)))


def _compare_solvers(m, method, solvers=SOLVERS, second=True, tolerance=1e-9):
    """Every solver's likelihood with all that derives from it is that of the first."""
    parameters = list(m.covariance.parameters())
    found = {}
    for solver in solvers:
        objective, value = _objective(m, method, solver)
        gradient = torch.autograd.grad(value, parameters)
        recorded = bent = ()
        if second:
            _, again = _objective(m, method, solver)
            recorded = torch.autograd.grad(again, parameters, create_graph=True)
            bent = torch.autograd.grad(sum(g.sum() for g in recorded), parameters)
        effects = objective.evaluate().random_effects()
        result = outcome(objective, REMLLoss(m.covariance, solver=solver).plan, m.y, m.X)
        found[solver] = {
            "value": value,
            "gradient": torch.cat(gradient),
            "recorded gradient": recorded,
            "second": bent,
            "blups": [e.values for e in effects],
            "variances": [e.variances for e in effects],
            "beta": result.fixed.estimate,
            "beta covariance": result.fixed.covariance,
            "average information": Curvature([objective]).information,
            "fitted": result.fitted,
        }
    for key, expected in found[solvers[0]].items():
        torch.testing.assert_close(
            found[solvers[1]][key],
            expected,
            rtol=tolerance,
            atol=tolerance,
            msg=lambda s, k=key: f"{k}: {s}",
        )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_gradcheck_in_theta_y_and_x(method, solver):
    V, y, X = small()
    loss = REMLLoss(V, method, solver)
    names = [name for name, _ in loss.named_parameters()]
    at = [0.3 * torch.randn(1, requires_grad=True) for _ in names]

    def value(y, X, *theta):
        return torch.func.functional_call(loss, dict(zip(names, theta, strict=True)), (y, X))

    y.requires_grad_()
    X.requires_grad_()
    assert gradcheck(value, (y, X, *at), fast_mode=True)
    assert gradgradcheck(value, (y, X, *at), fast_mode=True)
    # Parameters alone: the closed-form score, and its derivative.
    assert gradcheck(lambda *theta: value(y.detach(), X.detach(), *theta), at)
    assert gradgradcheck(lambda *theta: value(y.detach(), X.detach(), *theta), at)


@pytest.mark.parametrize("solver", SOLVERS)
def test_torch_func_hessian_equals_finite_differences_of_the_score(solver):
    V, y, X = small()
    loss = REMLLoss(V, solver=solver)
    names = [name for name, _ in loss.named_parameters()]
    at = 0.2 * torch.randn(len(names))

    def value(theta):
        given_params = dict(zip(names, theta.split(1), strict=True))
        return torch.func.functional_call(loss, given_params, (y, X))

    hessian = torch.func.jacrev(torch.func.grad(value))(at)
    h = 1e-5
    rows = []
    for i in range(len(at)):
        e = torch.zeros_like(at)
        e[i] = h
        up, down = (torch.func.grad(value)(at + s * e) for s in (1, -1))
        rows.append((up - down) / (2 * h))
    torch.testing.assert_close(hessian, torch.stack(rows), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("solver", SOLVERS)
def test_trainable_design_gets_the_gradient_of_the_dense_formula(solver):
    V, y, X = small()
    slopes = torch.nn.Parameter(torch.randn(len(y), 1))
    z = DummyMatrix([i % 4 for i in range(len(y))], covariates=slopes)
    tree = Sum(slope=CovariancePropagation(z=z, g=ScalarMatrix(4)), rest=V).double()
    REMLLoss(tree, solver=solver)(y, X).backward()
    found = slopes.grad.clone()
    slopes.grad = None
    (-restricted_log_likelihood(y, X, tree()) / len(y)).backward()
    torch.testing.assert_close(found, slopes.grad, rtol=1e-9, atol=1e-12)


def test_a_variance_of_zero_is_an_ordinary_point():
    V, y, X = small()
    V.fix("item/g/sigma^2", -float("inf"))
    without = Sum(subject=V.operands["subject"], residual=V.operands["residual"])
    for solver in SOLVERS:
        value = REMLLoss(V, solver=solver)(y, X)
        torch.testing.assert_close(value, REMLLoss(without, solver=solver)(y, X))
        value.backward()
    assert all(torch.isfinite(p.grad).all() for p in V.parameters())


def test_rows_select_part_of_the_covariance():
    V, y, X = small()
    rows = torch.randperm(len(y))[:13]
    expected = restricted_log_likelihood(y[rows], X[rows], V()[rows][:, rows])
    for solver in SOLVERS:
        loss = REMLLoss(V, solver=solver, reduction="sum")
        torch.testing.assert_close(-loss(y[rows], X[rows], rows), expected)


def test_the_order_of_rows_does_not_matter():
    V, y, X = small()
    order = torch.randperm(len(y))
    loss = REMLLoss(V)
    torch.testing.assert_close(loss(y[order], X[order], order), loss(y, X))


@pytest.mark.parametrize("unit", [1e-6, 1e-3, 1e3, 1e6])
def test_the_likelihood_is_equivariant_to_units(unit):
    V, y, X = small()
    n, p = X.shape
    value = REMLLoss(V, reduction="sum")(y, X).item()
    scaled = copy.deepcopy(V)
    shift = torch.log(torch.tensor(unit))
    with torch.no_grad():
        for name, parameter in scaled.named_parameters():
            if not name.endswith("L_1_0"):
                parameter.add_(shift)
            else:
                parameter.mul_(unit)
    other = REMLLoss(scaled, reduction="sum")(unit * y, X).item()
    assert other == pytest.approx(value + (n - p) * shift.item(), rel=1e-12, abs=1e-9)


def test_repeated_backward_accumulates():
    V, y, X = small()
    loss = REMLLoss(V)
    loss(y, X).backward()
    once = [p.grad.clone() for p in V.parameters()]
    loss(y, X).backward()
    torch.testing.assert_close([p.grad for p in V.parameters()], [2 * g for g in once])


def test_in_place_changes_of_the_data_are_seen():
    V, y, X = small()
    loss = REMLLoss(V)
    before = loss(y, X).item()
    y.mul_(2)
    assert loss(y, X).item() != before
    assert loss(y, X).item() == REMLLoss(V)(y, X).item()


K = torch.eye(4, dtype=torch.float64) + 0.5


@pytest.mark.parametrize("other", [DiagonalMatrix(4), AR1Matrix(4), KnownInverseMatrix(K)])
@pytest.mark.parametrize("first", [ScalarMatrix(4), KnownMatrix(K)])
@pytest.mark.parametrize("rows", [None, torch.arange(11, -1, -1)])
def test_a_replaced_covariance_is_seen(first, other, rows):
    z = DummyMatrix.from_codes(torch.arange(12) % 4, 4)
    V = Sum(g=CovariancePropagation(z=z, g=first), e=ScalarMatrix(12)).double()
    y, X = torch.arange(12.0, dtype=torch.float64).sin(), torch.ones(12, 1, dtype=torch.float64)
    loss = REMLLoss(V)
    loss(y, X, rows)
    V.g.g = copy.deepcopy(other).double()
    fresh = REMLLoss(copy.deepcopy(V), solver="dense")
    value, expected = loss(y, X, rows), fresh(y, X, rows)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    value.backward()
    expected.backward()
    for p, q in zip(V.parameters(), fresh.covariance.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "other",
    [DiagonalMatrix(12), UnstructuredMatrix(12), IdentityMatrix(12), CompoundSymmetricMatrix(12)],
)
def test_a_replaced_side_of_a_field_is_seen(other):
    V = Sum(field=KroneckerProduct(AR1Matrix(12), AR1Matrix(10)), e=ScalarMatrix(120)).double()
    y = torch.arange(120.0, dtype=torch.float64).sin()
    X = torch.ones(120, 1, dtype=torch.float64)
    loss = REMLLoss(V)
    loss(y, X)
    assert loss.plan.solver == "grid"
    V.field.op_0 = copy.deepcopy(other).double()
    expected = REMLLoss(V, solver="dense")(y, X)
    torch.testing.assert_close(loss(y, X), expected, rtol=1e-12, atol=0)


def test_what_becomes_known_between_two_calls_is_the_residual():
    V = Sum(g=ScalarMatrix(6), e=DiagonalMatrix(6)).double()
    y, X = torch.arange(6.0, dtype=torch.float64).sin(), torch.ones(6, 1, dtype=torch.float64)
    loss = REMLLoss(V)
    loss(y, X)
    for i in range(6):
        V.fix(f"e/sigma^2_{i}", 0.1 * i)
    expected = REMLLoss(V, solver="dense")(y, X)
    torch.testing.assert_close(loss(y, X), expected, rtol=1e-12, atol=0)
    assert [e.name for e in loss.evaluate(y, X).random] == [
        e.name for e in REMLLoss(V).evaluate(y, X).random
    ]


def test_training_after_an_evaluation_without_recording():
    V, y, X = small()
    loss = REMLLoss(V)
    with torch.no_grad():
        value = loss(y, X)
    assert not value.requires_grad
    assert loss(y, X).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_precision_and_device_follow_the_tensors(device, dtype):
    V, y, X = small()
    V, y, X = V.to(device, dtype), y.to(device, dtype), X.to(device, dtype)
    for solver in SOLVERS:
        value = REMLLoss(V, solver=solver)(y, X)
        assert value.dtype == dtype
        assert value.device.type == device
        exact = REMLLoss(copy.deepcopy(V).double(), solver=solver)(y.double(), X.double())
        torch.testing.assert_close(value.double(), exact, rtol=1e-4, atol=1e-5)


def test_the_wider_precision_wins_and_autocast_does_not_lower_it():
    V, y, X = small()
    loss = REMLLoss(V)
    narrow = loss(y.float(), X.float())
    assert narrow.dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(loss(y, X), REMLLoss(V)(y, X), rtol=0, atol=0)


def test_rank_deficient_columns_are_dropped_with_a_warning_that_names_them():
    V, y, X = small()
    wide = torch.cat([X, 2 * X[:, 1:], torch.randn(len(y), 1)], 1)
    loss = REMLLoss(V)
    loss.names = ["one", "time", "twice", "noise"]
    with pytest.warns(RuntimeWarning, match="rank deficient: dropped twice"):
        value = loss(y, wide)
    torch.testing.assert_close(value, loss(y, wide[:, [0, 1, 3]]))


def test_plan_says_what_was_chosen_and_why():
    V, y, X = small()
    loss = REMLLoss(V, solver="blocked")
    loss(y, X)
    text = str(loss.plan)
    for part in ("solver", "'subject': 5 blocks of 2 x 2", "'item': dense, 3 x 3", "20 rows"):
        assert part in text
    assert loss.plan.solver == "blocked"
    assert loss.plan.cost.operations > 0
    assert REMLLoss(V).plan.solver == "dense"  # of 20 rows


def test_plan_says_that_nested_factors_fall_apart():
    n = 1200
    inner = [i // 2 for i in range(n)]
    parts = {
        name: CovariancePropagation(z=DummyMatrix(labels), g=ScalarMatrix(len(set(labels))))
        for name, labels in {
            "inner": inner,
            "middle": [i // 5 for i in inner],
            "outer": [i // 20 for i in inner],
        }.items()
    }
    loss = REMLLoss(Sum({**parts, "residual": ScalarMatrix(n)}).double())
    loss(torch.randn(n), torch.ones(n, 1))
    assert "'middle', 'outer': 30 groups of at most 5 x 5" in str(loss.plan)
    # As many fixed effects as columns remain: only the random step tells of groups.
    many = REMLLoss(Sum({**parts, "residual": ScalarMatrix(n)}).double())
    q = sum(len(set(labels)) for labels in ([i // 5 for i in inner], [i // 20 for i in inner]))
    many(torch.randn(n), torch.randn(n, q))
    assert many.plan.cost.steps[-1] == f"fixed effects: dense, {q} x {q}"
    assert many.plan.cost.steps[1] == "'middle', 'outer': 30 groups of at most 5 x 5"


class Own(Matrix):
    """A user's matrix that says nothing of its structure."""

    def __init__(self, n):
        from openreml_nn.covariance.params import free_specs

        super().__init__((n, n), free_specs(["tau"]))

    def forward(self, free_params=None):
        tau = self.build_params(free_params)
        n = self.shape[0]
        return torch.eye(n).to(tau) * (1 + tau**2) + 0.1 * tau**2


def test_an_unstructured_tree_goes_to_the_dense_solver():
    _, y, X = small()
    V = Own(len(y)).double()
    loss = REMLLoss(V)
    loss(y, X).backward()
    assert loss.plan.solver == "dense"
    with pytest.raises(ValueError, match="residual"):
        REMLLoss(V, solver="blocked")(y, X)


def test_a_matrix_that_is_not_positive_definite_is_an_error_without_repair():
    n = 6
    V = UnconstrainedMatrix(n).double()
    with torch.no_grad():
        V._parameters["sigma^2_1_0"].fill_(5.0)
    y, X = torch.randn(n), torch.ones(n, 1)
    with pytest.raises(NotPositiveDefiniteError, match="V is not positive definite"):
        REMLLoss(V)(y, X)
    with pytest.raises(NotPositiveDefiniteError):
        restricted_log_likelihood(y, X, V())


def negative():
    """A symmetric matrix with a negative eigenvalue."""
    V = UnconstrainedMatrix(3).double()
    V.set_value("sigma^2_1_0", 5.0)
    return V


INDEFINITE = {
    "known": lambda: KnownMatrix(negative()().detach()),
    "known inverse": lambda: KnownInverseMatrix(negative()().detach()),
    "sparse known inverse": lambda: KnownInverseMatrix(negative()().detach().to_sparse()),
    "singular known inverse": lambda: KnownInverseMatrix(torch.ones(3, 3).double()),
    "inverse": lambda: Inverse(negative()),
    "free": negative,
}


@pytest.mark.parametrize("solver", ["dense", "blocked", "sparse"])
@pytest.mark.parametrize("case", INDEFINITE)
def test_what_is_not_positive_definite_is_one_kind_of_error_whatever_finds_it(case, solver):
    codes = torch.arange(12) % 3
    V = Sum(
        group=CovariancePropagation(DummyMatrix.from_codes(codes, 3), INDEFINITE[case]()),
        residual=ScalarMatrix(12),
    ).double()
    y, X = torch.arange(12.0).double() ** 2, torch.ones(12, 1).double()
    with pytest.raises(NotPositiveDefiniteError, match=r"positive (semi-)?definite|singular"):
        REMLLoss(V, solver=solver)(y, X)
    with pytest.raises(NotPositiveDefiniteError, match=r"positive (semi-)?definite|singular"):
        fit_reml(V, y, X, solver=solver, start="current")


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda y, X: (y[:, None], X), ValueError, "`y` has shape"),
        (lambda y, X: (y, X[:, 0]), ValueError, "`X` has shape"),
        (lambda y, X: (y[:-1], X), ValueError, "rows"),
        (lambda y, X: (y.float(), X), TypeError, "`y` is torch.float32 but `X`"),
        (lambda y, X: (y.long(), X), TypeError, "floating-point"),
        (lambda y, X: (y, torch.randn(len(y), len(y))), ValueError, "more rows"),
        (lambda y, X: (y.index_fill(0, torch.tensor([3]), torch.nan), X), ValueError, "row 3"),
        (lambda y, X: (y, X.index_fill(0, torch.tensor([2]), torch.inf)), ValueError, "row 2"),
        (lambda y, X: (y.tolist(), X), TypeError, "`y`"),
        (lambda y, X: (y[:9], X[:9]), ValueError, "rows"),
        (lambda y, X: (y, X, torch.arange(len(y)) + 5), ValueError, "beyond"),
    ],
)
def test_wrong_data_is_refused(change, error, match):
    V, y, X = small()
    with pytest.raises(error, match=match):
        REMLLoss(V)(*change(y, X))


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"method": "map"}, InputError, "method"),
        ({"solver": "fast"}, InputError, "solver"),
        ({"reduction": "none"}, ValueError, "reduction"),
    ],
)
def test_wrong_options_are_refused(options, error, match):
    with pytest.raises(error, match=match):
        REMLLoss(ScalarMatrix(3), **options)
