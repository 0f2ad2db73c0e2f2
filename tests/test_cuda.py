"""What is computed on a CUDA device is what the CPU computes, and stays there."""

import copy
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from openreml_nn import InputError, MixedModel, RandomEffect, REMLLoss, fit_reml, inference, metrics
from openreml_nn.covariance import (
    AR1Matrix,
    CovariancePropagation,
    DummyMatrix,
    ExponentialMatrix,
    KnownInverseMatrix,
    KnownMatrix,
    MaternCorrelation,
    ScalarMatrix,
    Sum,
    UnstructuredMatrix,
    VecchiaMatrix,
    ar1_field,
    stratified,
    weighted,
    within,
)
from openreml_nn.datasets import sleepstudy
from openreml_nn.estimation.aireml import Curvature
from openreml_nn.estimation.marginal import fit_laplace
from openreml_nn.families import Binomial, Gamma, Ordinal, Poisson, ZeroInflated
from openreml_nn.lightning import MixedModelDataModule, MixedModule
from openreml_nn.likelihood import Krylov, LaplaceLoss
from openreml_nn.likelihood.solvers import SOLVERS
from tests.likelihood.test_laplace import FAMILIES, TREES, normal, setting
from tests.likelihood.test_laplace import N as ROWS
from tests.likelihood.test_solvers import FITS
from tests.strategies import LEAVES, distances, kinship, pedigree, places
from tests.test_neural import data, loader, module, quiet

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*which the network has not learned"),
]


def on(device, x):
    """A copy of tensors and modules, however they are nested, on a device."""
    if isinstance(x, Mapping):
        return {key: on(device, item) for key, item in x.items()}
    if isinstance(x, tuple | list):
        return type(x)(on(device, item) for item in x)
    return x if x is None else copy.deepcopy(x).to(device)


def tensors(x):
    """The tensors of what was computed, by the attributes that hold them."""
    if isinstance(x, Tensor):
        return [x.detach()]
    if is_dataclass(x):
        return [t for field in fields(x) for t in tensors(getattr(x, field.name))]
    if isinstance(x, Mapping):
        return tensors(list(x.values()))
    if isinstance(x, tuple | list):
        return [t for item in x for t in tensors(item)]
    return []


def check_equal(compute, *given, rtol=1e-8, atol=1e-9):
    """That a computation yields the same tensors on both devices, each where the data are."""
    expected, found = (tensors(compute(*on(device, given))) for device in ("cpu", "cuda"))
    assert expected and {t.device.type for t in found} == {"cuda"}
    found = [t.cpu() for t in found]
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol, equal_nan=True)


def gradients(module):
    return [p.grad for p in module.parameters() if p.grad is not None]


# ---------------------------------------------------------------------- covariance and likelihood


@pytest.mark.parametrize("mode", ["manual", "auto"])
@pytest.mark.parametrize("kind", LEAVES)
def test_matrices_and_their_gradients(kind, mode):
    def compute(V):
        V.grad_mode = mode
        value = V()
        (
            value * torch.arange(1.0, value.numel() + 1).reshape(value.shape).to(value)
        ).sum().backward()
        return value, gradients(V)

    check_equal(compute, Sum(LEAVES[kind](4), ScalarMatrix(4)).double())


TREES_OF_SOLVERS = {name: make for name, (make, _) in FITS.items()} | {
    "dense": lambda: Sum(
        a=ExponentialMatrix(distances(24)),
        b=within([i // 4 for i in range(24)], AR1Matrix(4), [i % 4 for i in range(24)]),
    ),
    "blocked": lambda: Sum(
        a=CovariancePropagation(z=DummyMatrix.from_codes(torch.arange(24) % 6, 6), g=ScalarMatrix(6)),
        b=CovariancePropagation(z=DummyMatrix.from_codes(torch.arange(24) % 5, 5), g=KnownMatrix(kinship(5))),
        residual=stratified([i % 2 for i in range(24)]),
    ),
    "sparse": lambda: Sum(
        a=CovariancePropagation(
            z=DummyMatrix.from_codes(torch.arange(24) % 12, 12),
            g=VecchiaMatrix(places(12), MaternCorrelation(1.5), neighbours=3),
        ),
        b=CovariancePropagation(z=DummyMatrix.from_codes(torch.arange(24) % 5, 5), g=ScalarMatrix(5)),
        residual=ScalarMatrix(24),
    ),
}  # fmt: skip


def gaussian(name):
    V = (TREES_OF_SOLVERS | SPARSE)[name]().double()
    with torch.no_grad():
        for i, p in enumerate(V.parameters()):
            p.add_(0.1 * i - 0.2)
    return V, normal(24, seed=2), torch.stack([torch.ones(24), normal(24, seed=3)], 1)


SPARSE = {
    "pedigree": lambda: Sum(
        a=CovariancePropagation(
            z=DummyMatrix.from_codes(torch.arange(24) % 6, 6),
            g=KnownInverseMatrix(pedigree(6).inverse),
        ),
        residual=within([i // 4 for i in range(24)], AR1Matrix(4), [i % 4 for i in range(24)]),
    ),
    "kernel": lambda: Sum(
        a=CovariancePropagation(z=DummyMatrix.from_codes(torch.arange(24) % 5, 5), g=KnownMatrix(kinship(5))),
        b=CovariancePropagation(z=DummyMatrix.from_codes(torch.arange(24) % 7, 7), g=AR1Matrix(7)),
        residual=weighted(torch.arange(1.0, 25)),
    ),
    "field": lambda: Sum(
        a=CovariancePropagation(z=DummyMatrix.from_codes(torch.arange(24) % 5, 5), g=ScalarMatrix(5)),
        field=CovariancePropagation(z=DummyMatrix.from_codes(torch.arange(24), 24), g=ar1_field(4, 6)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("method", ["reml", "ml"])
@pytest.mark.parametrize("name", [*SOLVERS, *SPARSE])
def test_every_solver(name, method):
    solver = "sparse" if name in SPARSE else name

    def compute(V, y, X):
        y.requires_grad_()
        loss = REMLLoss(V, method, solver)
        value = loss(y, X)
        value.backward()
        found = loss.evaluate(y.detach(), X)
        information = Curvature([loss.objective(y.detach(), X)]).information
        own = [found.log_likelihood, found.fixed, found.random, information]
        return value, gradients(V), y.grad, own

    check_equal(compute, *gaussian(name))


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_fits(name):
    (_, y, X), V = gaussian(name), FITS[name][0]().double()
    one, other = (fit_reml(*on(device, (V, y, X)), solver=name) for device in ("cpu", "cuda"))
    assert other.log_likelihood == pytest.approx(one.log_likelihood, rel=1e-10)
    for a, b in zip(one.parameters, other.parameters, strict=True):
        assert (b.name, b.value) == (a.name, pytest.approx(a.value, rel=1e-6, abs=1e-8))
    assert {t.device.type for t in tensors((other.fixed, other.random, other.fitted))} == {"cuda"}
    for a, b in zip(
        tensors((one.fixed, one.random)), tensors((other.fixed, other.random)), strict=True
    ):
        torch.testing.assert_close(b.cpu(), a, rtol=1e-6, atol=1e-7)


def test_a_fit_moves_the_covariance_to_the_data():
    V, y, X = gaussian("blocked")
    fit_reml(V, y.cuda(), X.cuda())
    assert {p.device.type for p in V.parameters()} == {"cuda"}
    assert {b.device.type for b in V.buffers()} == {"cuda"}


def test_data_on_two_devices_are_refused():
    V, y, X = gaussian("blocked")
    with pytest.raises(InputError, match="`y` is on cuda:0 but `X` on cpu: move one of them"):
        REMLLoss(V)(y.cuda(), X)
    with pytest.raises(InputError, match="`y` is on cuda:0 but the covariance on cpu"):
        REMLLoss(V)(y.cuda(), X.cuda())


def posterior(loss, y, eta, X):
    """The value, its gradients, and all that an evaluation says."""
    eta = eta.requires_grad_()
    value = loss(y, eta, X)
    value.backward()
    found = loss.evaluate(y, eta.detach(), X)
    own = [found.coefficients, found.coefficient_covariance, found.predictor, found.random]
    return [value, gradients(loss), eta.grad, *own]


RESPONSES = [(tree, "logit", "ml", "auto") for tree in TREES]
RESPONSES += [(tree, "poisson", "reml", "dense") for tree in TREES]
RESPONSES += [("crossed", family, "ml", "blocked") for family in FAMILIES]
RESPONSES += [
    (tree, family, method, Krylov(probes=8))
    for tree in ("crossed", "rows", "animals")
    for family, method in (("logit", "ml"), ("poisson", "reml"))
]


@pytest.mark.parametrize(("tree", "family", "method", "solver"), RESPONSES)
def test_responses_that_are_not_gaussian(tree, family, method, solver):
    covariance, own, y, eta = setting(tree, family)
    X = normal(ROWS, 2, seed=11) if method == "reml" else None
    loss = LaplaceLoss(covariance.double(), own.double(), method, solver=solver)
    check_equal(posterior, loss, y, eta, X, rtol=1e-7, atol=1e-8)


def test_quadrature():
    covariance, own, y, eta = setting("slopes", "logit")
    check_equal(posterior, LaplaceLoss(covariance, own, quadrature=5), y, eta, None)


@pytest.mark.parametrize("family", ["logit", "negative_binomial"])
def test_a_fit_of_responses_that_are_not_gaussian(family):
    covariance, own, y, eta = setting("crossed", family)
    given = (LaplaceLoss(covariance, own), y, normal(ROWS, 2, seed=11), eta)
    (one, _), (other, _) = (fit_laplace(*on(device, given)) for device in ("cpu", "cuda"))
    assert other.log_likelihood == pytest.approx(one.log_likelihood, rel=1e-10)
    assert other.fixed.estimate.device.type == "cuda"
    torch.testing.assert_close(other.fixed.estimate.cpu(), one.fixed.estimate, rtol=1e-6, atol=1e-7)


def test_the_sparse_solver_of_other_responses_says_that_it_works_on_the_cpu():
    covariance, own, y, eta = setting("crossed", "logit")
    loss = LaplaceLoss(covariance, own, solver="sparse").cuda()
    with pytest.raises(
        InputError, match="'sparse', which works on the CPU, but `eta` is on cuda:0"
    ):
        loss(y.cuda(), eta.cuda())


# ---------------------------------------------------------------------- results


def test_a_result_says_the_same_of_itself(tmp_path):
    one, other = (fit_reml(*on(device, gaussian("blocked"))) for device in ("cpu", "cuda"))
    assert other.summary().split("\n")[2:] == one.summary().split("\n")[2:]
    records = []
    for i, result in enumerate((one, other)):
        result.to_json(tmp_path / f"{i}.json")
        record = json.loads((tmp_path / f"{i}.json").read_text())
        record["fit"].pop("seconds")
        records.append(record)
    assert records[1]["fixed"] == [
        {k: v if k == "name" else pytest.approx(v, rel=1e-6) for k, v in row.items()}
        for row in records[0]["fixed"]
    ]
    assert records[1]["fit"]["log_likelihood"] == pytest.approx(one.log_likelihood, rel=1e-10)


INFERENCE = {
    "Satterthwaite": lambda r: inference.coefficients(r),
    "profile": lambda r: inference.profile(r).intervals(),
    "influence": lambda r: inference.influence(r),
    "scan": lambda r: inference.scan(r, normal(24, 3, seed=8)),
    "shares": lambda r: inference.variance_shares(r),
    "r2": lambda r: pd.DataFrame([inference.r2(r)]),
    "reliability": lambda r: inference.reliability(r),
    "conditional AIC": lambda r: pd.DataFrame([inference.conditional_aic(r)]),
    "simulate": lambda r: pd.DataFrame(inference.simulate(r, 2, seed=1).cpu()),
    "bootstrap": lambda r: inference.bootstrap(r, 3, seed=1).intervals(),
}


@pytest.mark.parametrize("name", INFERENCE)
def test_inference(name):
    one, other = (
        INFERENCE[name](fit_reml(*on(device, gaussian("spectral")))) for device in ("cpu", "cuda")
    )
    pd.testing.assert_frame_equal(one, other, rtol=1e-5, atol=1e-7)


def test_a_result_stays_usable_where_its_covariance_has_moved():
    V, y, X = on("cuda", gaussian("blocked"))
    result = fit_reml(V, y, X)
    expected = inference.variance_shares(result)
    V.cpu()
    pd.testing.assert_frame_equal(inference.variance_shares(result), expected, rtol=1e-9)


# ---------------------------------------------------------------------- models


def batch(n=60, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    a, b = (torch.randint(0, q, (n,), generator=generator) for q in (7, 5))
    y = x[:, 0] + torch.randn(7, generator=generator, dtype=torch.float64)[a]
    y = y + torch.randn(n, generator=generator, dtype=torch.float64)
    return {"x": x.to(dtype), "y": y.to(dtype), "groups": {"a": a, "b": b}}


def network(outputs=1):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, outputs)).double()


def crossed():
    return {"a": RandomEffect(7), "b": RandomEffect(5)}


MODELS = {
    "ml": lambda: MixedModel(network(), crossed()),
    "gls": lambda: MixedModel(network(3), crossed(), head="gls"),
    "slopes": lambda: MixedModel(
        network(), {"a": RandomEffect(7, UnstructuredMatrix(2), 2, features=nn.Linear(2, 2).double())}
    ),
    "kernel": lambda: MixedModel(network(), {"a": RandomEffect(7, ExponentialMatrix(distances(7)))}),
    "two responses": lambda: MixedModel(network(2), crossed(), responses=2),
    "within groups": lambda: MixedModel(network(), crossed(), AR1Matrix(3)),
    "residual network": lambda: MixedModel(network(), crossed(), nn.Linear(2, 1).double()),
    "sparse": lambda: MixedModel(network(), crossed(), solver="sparse"),
    "logit": lambda: MixedModel(network(), crossed(), family=Binomial()),
    "poisson": lambda: MixedModel(network(3), crossed(), head="gls", family=Poisson()),
    "gamma": lambda: MixedModel(network(), crossed(), family=Gamma()),
    "grades": lambda: MixedModel(network(), crossed(), family=Ordinal(3)),
    "zeros": lambda: MixedModel(network(), crossed(), family=ZeroInflated(Poisson(), nn.Linear(1, 1))),
}  # fmt: skip
RESPONSE = {
    "two responses": lambda y: torch.stack([y, y.square().where(y > -1, torch.nan)], 1),
    "logit": lambda y: (y > 0).double(),
    "poisson": lambda y: y.exp().round(),
    "gamma": lambda y: y.exp(),
    "grades": lambda y: (y > -0.5).double() + (y > 0.5).double(),
    "zeros": lambda y: y.exp().round(),
}


def of_model(name):
    rows, model = batch(), MODELS[name]().double()
    rows["y"] = RESPONSE.get(name, lambda y: y)(rows["y"])
    rows["groups"] = {key: rows["groups"][key] for key in model.random}
    if name == "within groups":
        rows["residual"] = torch.arange(60)
    if name == "zeros":
        rows["zi"] = rows["x"][:, :1]
    return model, rows


def unseen(rows):
    groups = {**rows["groups"], "a": rows["groups"]["a"] % 5 - 1}
    return {key: x for key, x in rows.items() if key != "y"} | {"groups": groups}


@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    def compute(model, rows):
        value = model.loss(rows)
        value.backward()
        model.update(rows)
        new = rows if name == "kernel" else unseen(rows)
        found = [value, gradients(model), model.predict(new), model.interval(new)]
        priors = [effect.prior() for effect in model.random.values()]
        return [*found, model.log_density(rows), priors, dict(model.state_dict())]

    check_equal(compute, *of_model(name), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", ["ml", "gls", "logit"])
def test_rows_and_levels_that_come_later(name):
    def compute(model, rows, more):
        model.update(rows)
        solution = model.add(more)
        return solution, model.predict(more), dict(model.state_dict())

    model, rows = of_model(name)
    more = {key: x[:9] for key, x in rows.items() if key != "groups"}
    more["groups"] = {"a": torch.arange(9), "b": rows["groups"]["b"][:9]}
    check_equal(compute, model, rows, more, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", ["ml", "gls", "logit"])
@pytest.mark.parametrize("key", ["x", "y", "groups"])
def test_a_part_of_the_batch_on_another_device_is_named(name, key):
    model, rows = of_model(name)
    model.cuda()
    given = on("cuda", rows) | {key: rows[key]}
    said = {
        "x": r"`mean` fails for batch\['x'\].* same device",
        "y": r"`batch\['y'\]` is on cpu but the model on cuda:0: move one of them",
        "groups": r"`batch\['groups'\]\['a'\]` is on cpu but the model on cuda:0: move one of them",
    }[key]
    for method in (model.loss, model.update, *([] if key == "y" else [model.predict])):
        with pytest.raises(InputError, match=said) as caught:
            method(given)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["ml", "gls", "logit"])
def test_a_model_moves_with_what_it_has_learned(name):
    model, rows = of_model(name)
    model.update(rows)
    expected = model.predict(unseen(rows))
    found = model.cuda().predict(on("cuda", unseen(rows)))
    torch.testing.assert_close(on("cpu", tuple(found)), tuple(expected), rtol=1e-10, atol=1e-10)
    fresh, _ = of_model(name)
    fresh.cuda().load_state_dict(model.cpu().state_dict())
    assert {t.device.type for t in fresh.state_dict().values()} == {"cuda"}
    loaded = fresh.predict(on("cuda", unseen(rows)))
    torch.testing.assert_close(on("cpu", tuple(loaded)), tuple(expected), rtol=1e-10, atol=1e-10)
    back = model.predict(unseen(rows))
    torch.testing.assert_close(tuple(back), tuple(expected), rtol=1e-10, atol=1e-10)


# ---------------------------------------------------------------------- training


def trained(training, accelerator, head="ml", found=None, rows=None, **options):
    found = found or module(head, training).double()
    rows = rows or loader(training, on_double(data(200)))
    torch.manual_seed(0)
    trainer = quiet(2, accelerator=accelerator, devices=1, **options)
    trainer.fit(found, rows, rows)
    return trainer, found


def on_double(rows):
    return {key: x.double() if key in ("x", "y") else x for key, x in rows.items()}


WAYS = [
    ("alternating", "ml"), ("full", "ml"), ("parts", "ml"), ("groups", "ml"), ("composite", "ml"),
    ("full", "gls"), ("alternating", "gls"),
]  # fmt: skip


@pytest.mark.parametrize(("training", "head"), WAYS)
def test_every_way_of_training(training, head):
    (on_cpu, one), (on_gpu, other) = (trained(training, x, head) for x in ("cpu", "gpu"))
    assert on_gpu.strategy.root_device.type == "cuda"
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(b.cpu(), a, rtol=1e-6, atol=1e-7, msg=name)
    for key, value in on_cpu.callback_metrics.items():
        assert float(on_gpu.callback_metrics[key]) == pytest.approx(float(value), rel=1e-6), key


def test_training_of_a_family():
    rows = on_double(data(200))
    rows["y"] = (rows["y"] > 3).double()

    def found():
        torch.manual_seed(0)
        model = MixedModel(network(), {"g": RandomEffect(20)}, family=Binomial())
        return MixedModule(model, {"_target_": "torch.optim.Adam", "lr": 0.02}, "full")

    (on_cpu, one), (on_gpu, other) = (
        trained("full", x, found=found(), rows=loader("full", rows)) for x in ("cpu", "gpu")
    )
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(b.cpu(), a, rtol=1e-6, atol=1e-7, msg=name)
    for key, value in on_cpu.callback_metrics.items():
        assert float(on_gpu.callback_metrics[key]) == pytest.approx(float(value), rel=1e-6), key


def test_a_formula():
    table = sleepstudy()
    values = []
    for accelerator in ("cpu", "gpu"):
        found = MixedModule("Reaction ~ Days + (Days | Subject)")
        rows = MixedModelDataModule(table, "Reaction ~ Days + (Days | Subject)", validation=0.0)
        quiet(20, accelerator=accelerator, devices=1).fit(found, rows)
        values.append(found.result.log_likelihood)
    assert values[1] == pytest.approx(values[0], rel=1e-9)


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed", "32-true", "64-true"])
@pytest.mark.parametrize("training", ["alternating", "full"])
def test_precisions(training, precision):
    found = module(training=training)
    rows = data(200)
    if precision == "64-true":
        rows, found = on_double(rows), found.double()
    trainer, found = trained(
        training, "gpu", found=found, rows=loader(training, rows), precision=precision
    )
    _, exact = trained(training, "cpu")
    variance = [m.model.residual().item() for m in (found, exact)]
    assert variance[0] == pytest.approx(variance[1], rel=0.05)
    assert found.model.residual().dtype == torch.float64
    assert torch.isfinite(trainer.callback_metrics["train_loss"])


@pytest.mark.parametrize("head", ["ml", "gls"])
def test_checkpoints_go_from_one_device_to_the_other(tmp_path, head):
    trainer, found = trained("alternating", "gpu", head)
    trainer.save_checkpoint(tmp_path / "m.ckpt")
    new = {"x": normal(5, 2), "groups": {"g": torch.tensor([0, 3, 19, -1, -1])}}
    expected = tuple(on("cpu", tuple(found.model.cuda().predict(on("cuda", new)))))
    loaded = MixedModule.load_from_checkpoint(
        tmp_path / "m.ckpt",
        map_location="cpu",
        model=module(head).double().model,
        weights_only=True,
    )
    assert {t.device.type for t in loaded.state_dict().values()} == {"cpu"}
    torch.testing.assert_close(tuple(loaded.model.predict(new)), expected, rtol=1e-9, atol=1e-9)
    other = module(head).double()
    rows = loader(rows=on_double(data(200)))
    resumed = quiet(3, accelerator="cpu")
    resumed.fit(other, rows, ckpt_path=tmp_path / "m.ckpt", weights_only=True)
    assert resumed.current_epoch == 3
    resumed.save_checkpoint(tmp_path / "n.ckpt")
    back = quiet(4, accelerator="gpu", devices=1)
    back.fit(module(head).double(), rows, ckpt_path=tmp_path / "n.ckpt", weights_only=True)
    assert back.current_epoch == 4


def test_one_process_of_several():
    rows = on_double(data(200))
    tensors = TensorDataset(rows["x"], rows["y"], rows["groups"]["g"])
    _, alone = trained("alternating", "gpu", rows=DataLoader(tensors, 64))
    try:
        options = {"strategy": "ddp", "use_distributed_sampler": False}  # which would shuffle
        _, found = trained("alternating", "gpu", rows=DataLoader(tensors, 64), **options)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    for (name, a), b in zip(alone.state_dict().items(), found.state_dict().values(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-8, atol=1e-9, msg=name)


def test_pinned_memory_and_predictions_by_a_trainer():
    rows = on_double(data(200))
    tensors = TensorDataset(rows["x"], rows["y"], rows["groups"]["g"])
    trainer, found = trained("alternating", "gpu", rows=DataLoader(tensors, 64, pin_memory=True))
    parts = trainer.predict(found, DataLoader(tensors, 64, pin_memory=True))
    whole = found.model.cpu().predict({"x": rows["x"], "groups": rows["groups"]})
    for i, value in enumerate(whole):
        torch.testing.assert_close(torch.cat([part[i] for part in parts]).cpu(), value)


# ---------------------------------------------------------------------- metrics


METRICS = {
    "GaussianNegativeLogDensity": lambda m, y: m(y, y.exp(), y + 1),
    "IntervalCoverage": lambda m, y: m(y, y.exp(), 2 * y),
    "IntervalWidth": lambda m, y: m(y, y.exp(), 2 * y),
    "LogLoss": lambda m, y: m(y.sigmoid(), (y > 0.1).double()),
    "BrierScore": lambda m, y: m(y.sigmoid(), (y > 0.1).double()),
    "AUC": lambda m, y: m(y.sigmoid(), (y.square() > 0.5).double()),
    "CalibrationError": lambda m, y: m(y.sigmoid(), (y > 0.1).double()),
    "CalibrationCurve": lambda m, y: m(y.sigmoid(), (y > 0.1).double()),
}


@pytest.mark.parametrize("name", METRICS)
def test_metrics(name):
    def compute(metric, y):
        METRICS[name](metric, y)
        METRICS[name](metric, y / 2)
        return metric.compute()

    check_equal(compute, getattr(metrics, name)(), normal(30))
