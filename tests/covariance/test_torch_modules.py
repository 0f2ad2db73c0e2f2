"""A matrix does what torch says a module does: hooks, replaced parts, transforms, devices."""

import copy
import math
import pickle
import time

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from openreml_nn import InputError, MixedModel, RandomEffect, REMLLoss, fit_reml
from openreml_nn.covariance import (
    Adapter,
    AR1Matrix,
    CovariancePropagation,
    DiagonalMatrix,
    DummyMatrix,
    GaussianMatrix,
    HadamardProduct,
    IdentityMatrix,
    Inverse,
    KnownInverseMatrix,
    KnownMatrix,
    KroneckerProduct,
    Matrix,
    Operator,
    Product,
    ScalarMatrix,
    Sum,
    UnstructuredMatrix,
)
from openreml_nn.covariance.params import free_specs, user_name
from openreml_nn.covariance.transform import TransformExpPow2
from tests.forked import ranks
from tests.strategies import LEAVES, distances, kinship, pedigree


def tree():
    subject = CovariancePropagation(
        z=DummyMatrix(list("aabbc")), g=KroneckerProduct(IdentityMatrix(3), ScalarMatrix(1))
    )
    return Sum(subject=subject, residual=AR1Matrix(5))


def gradients(V, weight):
    V.zero_grad()
    (V() * weight).sum().backward()
    return {name: p.grad.clone() for name, p in V.named_parameters()}


# ---------------------------------------------------------------------- hooks


def called_nodes(V):
    """The nodes whose values a call forms: all but a one-hot Z."""
    return [m for m in V.modules() if isinstance(m, Matrix)]


@pytest.mark.parametrize("record", [True, False])
def test_hooks_of_every_node_run_once(record):
    V = tree()
    seen = {kind: [] for kind in ("before", "after", "backward")}
    for name, node in V.named_modules():
        node.register_forward_pre_hook(lambda m, a, name=name: seen["before"].append(name))
        node.register_forward_hook(lambda m, a, out, name=name: seen["after"].append(name))
        node.register_full_backward_hook(lambda m, i, o, name=name: seen["backward"].append(name))
    everywhere = sorted(name for name, _ in V.named_modules())
    with torch.set_grad_enabled(record):
        value = V()
    assert sorted(seen["before"]) == everywhere
    assert sorted(seen["after"]) == everywhere
    torch.testing.assert_close(value, tree()())
    if record:
        value.sum().backward()
        moving = [n for n, m in V.named_modules() if any(True for _ in m.parameters())]
        assert sorted(seen["backward"]) == sorted(moving)


@pytest.mark.parametrize("kind", LEAVES)
def test_hooks_of_a_leaf_see_its_value_in_training(kind):
    V = LEAVES[kind](3).double()
    seen = []
    V.register_forward_hook(lambda m, a, out: seen.append(out.detach()))
    value = V()
    torch.testing.assert_close(seen, [value.detach()])


@pytest.mark.parametrize("place", ["", "subject", "subject.g", "subject.g.op_1", "residual"])
def test_what_a_hook_returns_is_what_is_differentiated(place):
    V, weight = tree(), torch.randn(5, 5)
    V.get_submodule(place).register_forward_hook(lambda m, a, out: 3 * out)
    found = gradients(V, weight)
    for p in V.parameters():
        step = 1e-6
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                p.add_(sign * step)
                ends.append((V() * weight).sum())
                p.sub_(sign * step)
        slope = (ends[0] - ends[1]) / (2 * step)
        name = next(n for n, q in V.named_parameters() if q is p)
        torch.testing.assert_close(found[name][0], slope, rtol=1e-7, atol=1e-7)
    x = torch.cat([p.detach() for p in V.parameters()])
    torch.testing.assert_close(V(x), V())
    jacobian, _ = V.grad(x)
    torch.testing.assert_close(
        (jacobian * weight).sum((1, 2)), torch.cat([found[n] for n, _ in V.named_parameters()])
    )


def test_global_hooks_run():
    V, seen = tree(), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, a, out: seen.append(m))
    try:
        V().sum().backward()
    finally:
        handle.remove()
    assert len(seen) == len(called_nodes(V))


@pytest.mark.parametrize("place", ["", "subject", "subject.g", "subject.z", "residual"])
def test_hooks_count_in_the_likelihood(place):
    y, X = torch.randn(5), torch.ones(5, 1)
    V, seen = tree(), []
    V.get_submodule(place).register_forward_hook(lambda m, a, out: seen.append(1) or 2 * out)
    found = REMLLoss(V)(y, X)
    dense = REMLLoss(KnownMatrix(V().detach()).fix("sigma^2", 0.0), solver="dense")
    torch.testing.assert_close(found, dense(y, X))
    seen.clear()
    REMLLoss(V)(y, X).backward()
    assert len(seen) == 1


def test_hooks_of_a_matrix_too_large_to_be_formed_are_refused():
    V = ScalarMatrix(10**6)
    V.register_forward_hook(lambda m, a, out: out)
    with pytest.raises(ValueError, match=r"ScalarMatrix .*'sigma\^2'.* has hooks"):
        V.terms()


# ---------------------------------------------------------------------- parts that change


@pytest.mark.parametrize("way", ["attribute", "set_submodule", "add_module"])
def test_a_replaced_operand_counts(way):
    V = Sum(a=ScalarMatrix(3), e=ScalarMatrix(3))
    V()
    new = ScalarMatrix(3).set_value("sigma^2", 1.0)
    if way == "attribute":
        V.e = new
    elif way == "set_submodule":
        V.set_submodule("e", new)
    else:
        V.add_module("e", new)
    value = V()
    assert value[0, 0].item() == pytest.approx(1 + math.exp(2), rel=1e-12)
    value.sum().backward()
    assert new._parameters["sigma^2"].grad.item() == pytest.approx(6 * math.exp(2))
    assert V.param_defaults["e/sigma^2"].item() == 1.0


def test_a_replacement_that_does_not_fit_is_named():
    V = Sum(a=ScalarMatrix(3), e=ScalarMatrix(3))
    V.e = ScalarMatrix(1)
    with pytest.raises(ValueError, match=r"operand 'e' is now \(1, 1\)"):
        V.terms()
    with pytest.raises(ValueError, match=r"operand 'e' is now \(1, 1\)"):
        V()
    V.e = nn.Linear(3, 3)
    with pytest.raises(TypeError, match="operand 'e' is a Linear"):
        V()


class Tanh(nn.Module):
    def forward(self, x):
        return x.tanh()


def test_parametrize_moves_a_parameter_and_trains_what_is_behind_it():
    V = AR1Matrix(3).set_value("rho", 2.0)
    expected = V(torch.tensor([0.0, math.tanh(2.0)])).detach()
    parametrize.register_parametrization(V, "rho", Tanh())
    torch.testing.assert_close(V(), expected)
    assert V.free_param_names == ["sigma^2"]
    V().sum().backward()
    assert V.parametrizations["rho"].original.grad.abs() > 0.1
    assert V._parameters["sigma^2"].grad is not None
    torch.testing.assert_close(Sum(V, IdentityMatrix(3))(), expected + torch.eye(3))
    with pytest.raises(ValueError, match="parametrized or pruned"):
        V.fix("rho")


def test_prune_masks_a_parameter():
    V = AR1Matrix(3).set_value("rho", 2.0)
    prune.identity(V, "rho")
    torch.testing.assert_close(V(), AR1Matrix(3).set_value("rho", 2.0)())
    V.rho_mask.zero_()
    torch.testing.assert_close(V().detach(), torch.eye(3))
    y, X = torch.randn(3), torch.ones(3, 1)
    torch.testing.assert_close(REMLLoss(V)(y, X), REMLLoss(ScalarMatrix(3))(y, X))


def test_frozen_parameters_are_not_estimated():
    y, X = 2 * torch.randn(40), torch.ones(40, 1)
    V = Sum(
        g=CovariancePropagation(z=DummyMatrix([i % 8 for i in range(40)]), g=ScalarMatrix(8)),
        e=ScalarMatrix(40),
    )
    V.e.requires_grad_(False)
    assert V.estimated_param_names == ["g/g/sigma^2"]
    assert V.free_param_names == ["g/g/sigma^2", "e/sigma^2"]
    fit_reml(V, y, X)
    assert V.e._parameters["sigma^2"].item() == 0.0
    assert not V.e._parameters["sigma^2"].requires_grad
    assert V.param_defaults["g/g/sigma^2"].item() != 0.0


def test_a_parameter_as_operand_is_trained():
    W = nn.Parameter(torch.randn(10, 3))
    start = W.detach().clone()
    V = Sum(g=CovariancePropagation(W, IdentityMatrix(3)), e=ScalarMatrix(10))
    assert [name for name, _ in V.named_parameters()] == ["g.op_0", "e.sigma^2"]
    assert V.param_names == ["e/sigma^2"]
    loss = REMLLoss(V)
    optimizer = torch.optim.Adam(loss.parameters(), 0.1)
    y, X = torch.randn(10), torch.ones(10, 1)
    first = loss(y, X).item()
    for _ in range(20):
        optimizer.zero_grad()
        loss(y, X).backward()
        optimizer.step()
    assert (W - start).abs().max() > 0.1
    assert loss(y, X).item() < first
    plain = Sum(a=W.detach() @ W.detach().T, e=ScalarMatrix(10))
    assert next(name for name, _ in plain.named_buffers()) == "a"


def test_training_after_inference_mode():
    V, y, X = tree(), torch.randn(5), torch.ones(5, 1)
    loss = REMLLoss(V)
    with torch.inference_mode():
        before = loss(y, X)
        V()
    loss(y, X).backward()
    torch.testing.assert_close(loss(y, X), before.clone())
    assert all(p.grad is not None for p in V.parameters())


# ---------------------------------------------------------------------- state


def data_matrices():
    return {
        "dummy": CovariancePropagation(
            z=DummyMatrix(list("abcabcba"), covariates=torch.randn(8)), g=DiagonalMatrix(3)
        ),
        "known": KnownMatrix(kinship(4)),
        "inverse": KnownInverseMatrix(pedigree(4).inverse),
        "distance": GaussianMatrix(distances(4)),
        "tensor": Sum(ScalarMatrix(3), torch.randn(3, 3)),
    }


@pytest.mark.parametrize("kind", ["dummy", "known", "distance", "tensor"])
def test_data_outlive_the_meta_device(kind):
    V = data_matrices()[kind]
    for i, p in enumerate(V.parameters()):
        p.data.fill_(0.5 * i)
    W = copy.deepcopy(V).to("meta").to_empty(device="cpu")
    W.load_state_dict(V.state_dict())
    torch.testing.assert_close(W(), V(), rtol=0, atol=0)
    assert W.float()().dtype == torch.float32
    pickled = pickle.loads(pickle.dumps(copy.deepcopy(V).to("meta")))
    pickled.to_empty(device="cpu").load_state_dict(V.state_dict())
    torch.testing.assert_close(pickled(), V(), rtol=0, atol=0)


def test_data_that_were_never_known_are_refused():
    V = KnownMatrix(torch.empty(3, 3, device="meta"))
    with pytest.raises(ValueError, match="`matrix` of KnownMatrix was given on the meta device"):
        V.to_empty(device="cpu")


def test_the_state_of_an_adapter_is_that_of_its_matrix():
    spec = free_specs(["s"])

    def made(K):
        return Adapter(HadamardProduct(AR1Matrix(3), K), spec, lambda t: torch.cat([t, t]))

    a, b = made(torch.ones(3, 3)), made(torch.full((3, 3), 2.0))
    assert not torch.equal(a(), b())
    b.load_state_dict(a.state_dict())
    torch.testing.assert_close(b(), a(), rtol=0, atol=0)
    assert [name for name, _ in a.named_parameters()] == ["s"]
    inner = DiagonalMatrix(2)
    Adapter(inner, spec, lambda t: torch.cat([t, t]))
    assert inner.num_free_params == 2
    assert len(list(inner.parameters())) == 2


def test_a_network_in_an_adapted_matrix_is_trained():
    network = nn.Linear(2, 1)
    slope = DummyMatrix(list("aab"), covariates=Slopes(network))
    V = Adapter(
        CovariancePropagation(z=slope, g=DiagonalMatrix(2)),
        free_specs(["s"]),
        lambda t: torch.cat([t, 2 * t]),
    )
    names = [name for name, _ in V.named_parameters()]
    assert names == [
        "s",
        "adaptee.z.covariates.network.weight",
        "adaptee.z.covariates.network.bias",
    ]
    V().sum().backward()
    assert all(p.grad is not None for p in V.parameters())


class Slopes(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network
        self.register_buffer("x", torch.randn(3, 2))

    def forward(self):
        return self.network(self.x)


# ---------------------------------------------------------------------- tracing


@pytest.mark.parametrize("mode", ["default", "auto"])
def test_a_tree_is_exported(mode):
    V = tree()
    V.grad_mode = mode
    exported = torch.export.export(V, ())
    torch.testing.assert_close(exported.module()(), V())


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("made", [lambda: UnstructuredMatrix(3), tree])
def test_a_tree_is_traced_with_its_gradient_and_a_likelihood_is_refused(made):
    V = made().double()
    traced = torch.jit.trace(V, (), check_trace=False)
    W = torch.randn(V.shape).double()
    with torch.no_grad():
        for parameter in V.parameters():
            parameter += 0.1  # a trace is of the parameters, not of their values
    own, found = (torch.autograd.grad((v * W).sum(), list(V.parameters())) for v in (V(), traced()))
    torch.testing.assert_close(traced(), V(), rtol=0, atol=0)
    torch.testing.assert_close(found, own, rtol=1e-12, atol=1e-12)
    n = len(W)
    y, X = torch.arange(float(n)).double(), torch.ones(n, 1).double()
    with pytest.raises(InputError, match=r"a likelihood cannot be traced by torch\.jit\.trace"):
        torch.jit.trace(REMLLoss(V), (y, X))


def test_an_ensemble_by_vmap():
    models = [tree().set_value("residual/rho", 0.3 * i) for i in range(3)]
    params, buffers = torch.func.stack_module_state(models)

    def call(p, b):
        return torch.func.functional_call(models[0], (p, b), ())

    found = torch.func.vmap(call)(params, buffers)
    torch.testing.assert_close(found, torch.stack([m() for m in models]))
    slopes = torch.func.vmap(
        torch.func.grad(lambda p, b: torch.func.functional_call(models[0], (p, b), ()).sum())
    )(params, buffers)
    for i, model in enumerate(models):
        expected = gradients(model, torch.ones(5, 5))
        for name in expected:
            torch.testing.assert_close(slopes[name][i], expected[name])


@pytest.mark.parametrize(
    "make", [tree, lambda: Inverse(AR1Matrix(3)), lambda: Product(AR1Matrix(2), torch.eye(2))]
)
def test_nothing_looks_at_values_while_tracing(make):
    from torch._subclasses.fake_tensor import FakeTensorMode

    V = make()
    expected = V()
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert V().shape == expected.shape
    assert copy.deepcopy(V).to("meta")().shape == expected.shape


def test_what_has_no_inverse_is_nan_where_nobody_looks():
    V = Inverse(DiagonalMatrix(2, free_specs(["a", "b"])))
    at = torch.tensor([[1.0, 2.0], [1.0, -1.0]])
    found = torch.func.vmap(V)(at)
    torch.testing.assert_close(found[0], torch.diag(1 / at[0]))
    assert found[1].isnan().all()
    with pytest.raises(ValueError, match="not positive definite"):
        V(at[1])


# ---------------------------------------------------------------------- depth


def deep(depth):
    V = ScalarMatrix(2)
    for _ in range(depth):
        V = Sum(V, AR1Matrix(2))
    return V


def test_trees_of_any_depth():
    V = deep(1000)
    value = V()
    value.sum().backward()
    assert V.num_free_params == 2001
    assert V._modules["op_1"]._parameters["sigma^2"].grad.item() == pytest.approx(4.0)
    torch.testing.assert_close(value.detach(), 1001 * torch.eye(2))
    with torch.no_grad():
        torch.testing.assert_close(V(), value)


def test_what_is_too_deep_is_named():
    V = deep(1000)
    with pytest.raises(ValueError, match="too deep to be lowered to terms"):
        V.terms()
    for node in walk(V):
        node.register_forward_hook(lambda m, a, out: None)
    with pytest.raises(ValueError, match="too deep to be called with hooks"):
        V()


def walk(V):
    while isinstance(V, Operator):
        yield V
        V = V.operands["op_0"]


def test_backward_is_linear_in_depth():
    def work(depth):
        V = deep(depth)
        V().sum().backward()
        best = math.inf
        for _ in range(3):
            start = time.process_time()
            V().sum().backward()
            best = min(best, time.process_time() - start)
        return best

    # Eight times as deep: eight times the work, not sixty-four.
    assert work(400) < 24 * work(50)


# ---------------------------------------------------------------------- a user's classes


class Mine(Matrix):
    """As the docstring of Matrix.forward says, transforming by hand."""

    def __init__(self, n):
        super().__init__((n, n), free_specs(["s"], trans=TransformExpPow2()))
        self.seen = []

    def forward(self, free_params=None):
        self.seen.append(type(free_params))
        if free_params is None:
            x = self.build_params(trans=False)
        elif isinstance(free_params, dict):
            x = torch.cat([free_params[n] for n in self.free_param_names])
        else:
            x = free_params
        return (2 * x).exp() * torch.eye(self.shape[0])


class Own(Mine):
    """As any nn.Module reads its parameters."""

    def forward(self, free_params=None):
        self.seen.append(type(free_params))
        return (2 * self.s).exp() * torch.eye(self.shape[0])


class Natural(Mine):
    def forward(self, free_params=None):
        self.seen.append(type(free_params))
        return self.build_params(free_params) * torch.eye(self.shape[0])


@pytest.mark.parametrize("cls", [Mine, Own, Natural])
def test_a_matrix_needs_its_formula_only(cls):
    V, y, X = cls(5), torch.tensor([1.0, 2.0, 4.0, 3.0, 7.0]), torch.ones(5, 1)
    x = torch.tensor([0.4])
    torch.testing.assert_close(V(x).detach(), math.exp(0.8) * torch.eye(5))
    torch.testing.assert_close(V({"s": x}), V(x))
    slope = 2 * math.exp(0.8) * torch.eye(5)[None]
    torch.testing.assert_close(V.auto_grad(x)[0], slope)
    torch.testing.assert_close(Sum(V, IdentityMatrix(5)).manual_grad(x)[0], slope)
    torch.testing.assert_close(torch.func.jacfwd(V)(x).movedim(-1, 0), slope)
    expected = fit_reml(ScalarMatrix(5), y, X)
    found = fit_reml(V, y, X)
    assert found.converged
    assert found.log_likelihood == pytest.approx(expected.log_likelihood, abs=1e-9)
    assert found.parameters[0].value == pytest.approx(expected.parameters[0].value, rel=1e-6)
    kinds = set(V.seen)
    assert kinds <= {type(None), torch.Tensor, nn.Parameter}


def test_a_pull_back_alone_is_enough():
    class Pulled(Natural):
        def manual_vjp(self, cotangent, free_params=None):
            return 2 * self.build_params(free_params) * cotangent.diagonal().sum()

    V, x = Pulled(3), torch.tensor([0.2])
    assert V(x.requires_grad_()).grad_fn.name() == "ClosedFormBackward"
    slope = 2 * math.exp(0.4) * torch.eye(3)
    for way in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(way(V)(x.detach())[..., 0], slope)
    torch.testing.assert_close(V.grad(x.detach())[0][0], slope)


def test_a_formula_of_the_wrong_shape_is_named():
    class Vector(Matrix):
        def forward(self, free_params=None):
            return self.build_params(free_params)

    with pytest.raises(ValueError, match=r"Vector yields \(1,\): expected \(2, 2\)"):
        Vector((2, 2), free_specs(["a"]))()


class Difference(Operator):
    def __init__(self, *operands, share=0.5):
        super().__init__(*operands)
        self.share = share

    def combine(self, a, b):
        return a - self.share * b


class Original(Operator):
    def __call__(self, free_params=None):
        a, b = self.build_operands(free_params)
        return a - 0.5 * b


@pytest.mark.parametrize("cls", [Difference, Original])
def test_an_operator_needs_its_formula_only(cls):
    V = cls(ScalarMatrix(2), AR1Matrix(2))
    assert V.shape == (2, 2)
    x = torch.tensor([0.3, 0.1, 0.5])
    found = V(x)
    torch.testing.assert_close(found, V.op_0(x[:1]) - 0.5 * V.op_1(x[1:]))
    V().sum().backward()
    assert all(p.grad is not None for p in V.parameters())
    outer = Sum(V, ScalarMatrix(2))
    jacobian, names = outer.grad(torch.cat([x, x[:1]]))
    assert names == outer.param_names
    torch.testing.assert_close(jacobian[:3], V.auto_grad(x)[0])
    value = outer()
    value.sum().backward()
    y, X = torch.tensor([1.0, 3.0, -1.0, 0.0]), torch.ones(4, 1)
    loss = REMLLoss(KroneckerProduct(IdentityMatrix(2), V))
    assert torch.isfinite(loss(y, X))


def test_a_formula_of_the_old_kind_is_named():
    class Old(Operator):
        def combine(self, operands):
            return operands[0] - operands[1]

    with pytest.raises(
        TypeError, match=r"Old.combine\(operands\) does not take the values of its 2"
    ):
        Old(ScalarMatrix(2), ScalarMatrix(2))

    class Nothing(Operator):
        pass

    with pytest.raises(TypeError, match="Nothing has no formula"):
        Nothing(ScalarMatrix(2))


# ---------------------------------------------------------------------- names

NAMES = ("type", "train", "items", "values", "half", "shape", "float", "apply", "forward", "T")


@pytest.mark.parametrize("name", [*NAMES, "grad_mode", "_modules", "training", "a%b", "x y", "π"])
def test_names_of_operands(name):
    V = Sum({name: ScalarMatrix(2), "e": ScalarMatrix(2)})
    assert V.param_names == [f"{name}/sigma^2", "e/sigma^2"]
    found = torch.func.functional_call(V, {n: p + 1 for n, p in V.named_parameters()}, ())
    torch.testing.assert_close(found.detach(), 2 * math.exp(2) * torch.eye(2))
    again = Sum({name: ScalarMatrix(2), "e": ScalarMatrix(2)})
    again.load_state_dict(V.fix(f"{name}/sigma^2", 0.7).state_dict())
    torch.testing.assert_close(again(), V())
    setattr(V, name, ScalarMatrix(2).set_value("sigma^2", 1.0))
    assert V.param_defaults[f"{name}/sigma^2"].item() == 1.0
    assert user_name(next(iter(V._modules))) == name


@pytest.mark.parametrize(
    "name", [*NAMES, "plot.id", "a/b", "x y", "π", "residual", "50%", "subject"]
)
def test_names_of_groups(name):
    model = MixedModel(nn.Linear(2, 1), {name: RandomEffect(levels=3), "other": RandomEffect(2)})
    groups = {name: torch.arange(12) % 3, "other": torch.arange(12) % 2}
    batch = {"x": torch.randn(12, 2), "y": torch.randn(12), "groups": groups}
    model.loss(batch).backward()
    assert list(model.random) == [name, "other"]
    assert name in model.random
    assert model.random[name].g.param_names
    assert all(p.grad is not None for p in model.random[name].parameters())
    model.update(batch)
    assert model.random[name].blup.abs().sum() > 0
    twin = MixedModel(nn.Linear(2, 1), {name: RandomEffect(levels=3), "other": RandomEffect(2)})
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(twin.predict(batch).mean, model.predict(batch).mean)


def test_fully_shard_of_a_tree_and_of_a_part(tmp_path):
    ranks(_shard, 2, tmp_path)


def _shard():
    from torch.distributed.fsdp import fully_shard

    def made():
        g = UnstructuredMatrix(3).set_value("L_1_0", 0.5)
        return Sum(g=CovariancePropagation(z=DummyMatrix(list("abcabc")), g=g), e=AR1Matrix(6))

    y, X = torch.arange(6.0), torch.ones(6, 1)
    for kind in ("tree", "part"):
        V, plain = made(), made()
        fully_shard(V if kind == "tree" else V.g)
        value = V()
        torch.testing.assert_close(value, plain())
        (value * value).sum().backward()
        (plain() ** 2).sum().backward()
        for (name, p), q in zip(V.named_parameters(), plain.parameters(), strict=True):
            grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            torch.testing.assert_close(grad, q.grad, msg=name)
        loss = REMLLoss(V)(y, X)
        torch.testing.assert_close(loss, REMLLoss(plain)(y, X))
        loss.backward()


def test_a_formula_without_a_module_is_the_users():
    # As in a documentation test or a notebook cell that is run by `exec`.
    text = """
class Difference(Operator):
    def infer_shape(self, shapes):
        return shapes[0]

    def combine(self, a, b):
        return a - 0.5 * b
"""
    names = {"Operator": Operator, "__name__": None}
    exec(text, names)
    tree = names["Difference"](ScalarMatrix(2), ScalarMatrix(2))
    tree().sum().backward()
    assert [p.grad.item() for p in tree.parameters()] == [4.0, -2.0]
