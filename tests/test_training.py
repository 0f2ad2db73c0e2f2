"""Training as Lightning's users train: any loader, any option of the Trainer, any checkpoint."""

import copy
import os
import warnings
from collections import namedtuple

import numpy as np
import pandas as pd
import pytest
import torch
from lightning import LightningModule
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    TensorDataset,
)

from openreml_nn import InputError, MixedModel, RandomEffect, lmm
from openreml_nn.covariance import GaussianMatrix
from openreml_nn.estimation.starts import climb
from openreml_nn.lightning import MixedModelDataModule, MixedModule, UpdateBLUPs
from openreml_nn.lightning.ways import Alternating
from openreml_nn.model import take
from tests.forked import forked
from tests.test_neural import quiet

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def single():
    """Networks in single precision, as most are."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(before)


N, Q = 400, 20
generator = torch.Generator().manual_seed(0)
X, G = torch.randn(N, 2, generator=generator), torch.randint(0, Q, (N,), generator=generator)
B = torch.randn(Q, generator=generator)
Y = X[:, 0] + B[G] + 0.5 * torch.randn(N, generator=generator)
WHOLE = {"x": X, "y": Y, "groups": {"g": G}}
DICTS = [{"x": X[i], "y": Y[i], "groups": {"g": G[i]}} for i in range(N)]
ADAM = {"_target_": "torch.optim.Adam", "lr": 0.02}
Named = namedtuple("Named", "x y groups")


def tuples(size=64, **options):
    return DataLoader(TensorDataset(X, Y, G), size, **options)


def held_out():
    return DataLoader(TensorDataset(X[:100], Y[:100], G[:100]), 32)


def model(norm=False):
    torch.manual_seed(0)
    layers = [nn.Linear(2, 8), *([nn.BatchNorm1d(8)] if norm else []), nn.Tanh(), nn.Linear(8, 1)]
    return MixedModel(nn.Sequential(*layers), {"g": RandomEffect(Q)})


def module(**options):
    return MixedModule(model(), ADAM, **options)


def fit(loader=None, val=None, found=None, epochs=2, **options):
    found = found or module()
    torch.manual_seed(0)
    trainer = quiet(epochs, **options)
    trainer.fit(found, tuples() if loader is None else loader, val)
    return trainer, found


class Stream(IterableDataset):
    def __iter__(self):
        return iter(DICTS)


class Keyed(Dataset):
    """Two factors as columns, in the order of the model's."""

    def __len__(self):
        return N

    def __getitem__(self, i):
        return X[i], Y[i], torch.stack([G[i], G[i] % 3])


class Empty(IterableDataset):
    def __iter__(self):
        return iter(())


class NoRows(IterableDataset):
    def __iter__(self):
        return iter([(X[:0], Y[:0], G[:0])])


# ---------------------------------------------------------------------- loaders


@pytest.mark.parametrize(
    "loader",
    [
        lambda: DataLoader(DICTS, 64),
        lambda: tuples(),
        lambda: DataLoader([Named(X[i], Y[i], G[i]) for i in range(N)], 64),
        lambda: DataLoader(Stream(), 64),
        lambda: tuples(num_workers=1, persistent_workers=True),
    ],
    ids=["dicts", "tuples", "named tuples", "stream", "workers"],
)
def test_loaders_of_the_same_rows_give_the_same_fit(loader):
    one, other = fit()[1], fit(loader())[1]
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7, msg=name)


def test_columns_are_the_factors_in_the_order_of_the_model():
    random = {"a": RandomEffect(Q), "b": RandomEffect(3)}
    found = MixedModule(MixedModel(nn.Linear(2, 1), random), ADAM)
    fit(DataLoader(Keyed(), 64), found=found)
    other = MixedModel(found.model.mean, {"a": RandomEffect(Q), "b": RandomEffect(3)})
    other.load_state_dict(found.model.state_dict())
    other.update({"x": X, "y": Y, "groups": {"a": G, "b": G % 3}})
    torch.testing.assert_close(other.random["a"].blup, found.model.random["a"].blup)


def test_inputs_of_any_form():
    class Lengths(nn.Module):
        def forward(self, x):
            padded, length = x
            return padded.sum(1) / length

    padded = [(X[i], torch.tensor(2.0)) for i in range(N)]
    rows = [{"x": padded[i], "y": Y[i], "groups": {"g": G[i]}} for i in range(N)]
    found = MixedModule(MixedModel(Lengths(), {"g": RandomEffect(Q)}), training="alternating")
    fit(DataLoader(rows, 64), found=found)
    assert float(found.model.random["g"].blup.std()) > 0.3


def test_every_epoch_reads_the_loader_anew():
    seen = set()

    class Net(nn.Linear):
        def forward(self, x):
            if self.training and torch.is_grad_enabled():
                seen.update(round(float(v), 6) for v in x[:, 0])
            return super().forward(x)

    class Augmented(Dataset):
        def __len__(self):
            return 60

        def __getitem__(self, i):
            return X[i] + torch.randn(2), Y[i], G[i]

    found = MixedModule(MixedModel(Net(2, 1), {"g": RandomEffect(Q)}), ADAM)
    fit(DataLoader(Augmented(), 20), found=found, epochs=5)
    assert len(seen) > 290


@pytest.mark.parametrize("head", ["ml", "gls"])
@pytest.mark.parametrize("data", [[], Empty(), NoRows()], ids=["empty", "stream", "no rows"])
def test_a_fit_without_rows_is_refused(data, head):
    mean = nn.Identity() if head == "gls" else nn.Linear(2, 1)
    found = MixedModule(MixedModel(mean, {"g": RandomEffect(Q)}, head=head))
    with pytest.raises(InputError, match=r"the training loader yielded no rows|the batch is empty"):
        fit(DataLoader(data, batch_size=None if isinstance(data, NoRows) else 4), found=found)


@pytest.mark.parametrize("training", ["alternating", "composite", "full"])
def test_a_loader_that_can_be_read_once_is_refused(training):
    with pytest.raises(InputError, match="the training loader is a generator, which is exhausted"):
        fit((batch for batch in tuples()), found=module(training=training))


def test_a_validation_loader_that_can_be_read_once_is_refused_in_a_fit():
    # Its metrics would be those of the first validation at every later one.
    found = module()
    with pytest.raises(InputError, match="a validation loader is a generator, which is exhausted"):
        quiet(1).fit(found, tuples(), [tuples(), (batch for batch in tuples())])
    fit(tuples(), found=found, epochs=1)
    assert quiet(1).validate(found, (batch for batch in tuples()), verbose=False)


def test_optimizers_that_the_module_did_not_make_are_refused():
    # As LightningCLI hands them over by default: the covariance would stay where it is.
    found = module()
    found.configure_optimizers = lambda: torch.optim.Adam(found.parameters())
    with pytest.raises(InputError, match="`configure_optimizers` was replaced"):
        fit(tuples(), found=found)


def test_rows_that_are_read_once_are_enough_for_a_linear_mean():
    found = [
        MixedModule(MixedModel(nn.Identity(), {"g": RandomEffect(Q)}, head="gls")) for _ in range(2)
    ]
    fit(tuples(), found=found[0])
    fit((batch for batch in tuples()), found=found[1])
    assert found[1].result.log_likelihood == found[0].result.log_likelihood


class Table(nn.Module):
    """The mean by an embedding of rounded inputs, whose gradient is sparse or dense."""

    def __init__(self, sparse):
        super().__init__()
        self.table = nn.Embedding(9, 1, sparse=sparse, _weight=torch.zeros(9, 1))

    def forward(self, x):
        return self.table((x[:, 0] + 4).long().clamp(0, 8))


@pytest.mark.parametrize(
    ("optimizer", "sparse", "message"),
    [
        ("SparseAdam", False, "SparseAdam, but the gradient of 'model.mean.table.weight' is dense"),
        ("Adam", True, "Adam, but the gradient of 'model.mean.table.weight' is sparse"),
        ("AdamW", True, "AdamW, but the gradient .* is sparse: .*torch.optim.SGD or Adagrad"),
    ],
)
def test_gradients_that_an_optimizer_does_not_take_are_named(optimizer, sparse, message):
    found = MixedModel(Table(sparse), {"g": RandomEffect(Q)})
    with pytest.raises(InputError, match=message):
        fit(found=MixedModule(found, {"_target_": f"torch.optim.{optimizer}"}), epochs=1)


@pytest.mark.parametrize("optimizer", ["SGD", "Adagrad", "SparseAdam"])
def test_sparse_gradients_train_as_dense_ones(optimizer):
    trained = []
    for sparse in (True, False):
        found = MixedModel(Table(sparse), {"g": RandomEffect(Q)})
        # Where it has all entries, a sparse gradient makes the step of Adam.
        name = "Adam" if optimizer == "SparseAdam" and not sparse else optimizer
        given = {"_target_": f"torch.optim.{name}", "lr": 0.01}
        fit(tuples(N), found=MixedModule(found, given), epochs=2)
        seen = ((X[:, 0] + 4).long().clamp(0, 8)).unique()
        trained.append(found.mean.table.weight.detach()[seen])
    torch.testing.assert_close(*trained)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            {**WHOLE, "y": Y.clone().index_fill_(0, torch.tensor(7), torch.inf)},
            r"`batch\['y'\]` is inf in row 7: expected finite numbers, or NaN",
        ),
        ({**WHOLE, "y": Y[:-1]}, r"`y` has shape \(399,\): expected \(400,\)"),
        ({**WHOLE, "y": Y[:, None]}, r"`y` has shape \(400, 1\).*y\[:, 0\]"),
        ({**WHOLE, "groups": {"g": G[:-1]}}, "group 'g'.*expected 400 integers"),
        ({**WHOLE, "groups": {"g": G + 1}}, "code 20: expected 0 to 19"),
        ({**WHOLE, "groups": G.float()}, "expected 400 integers"),
        ({**WHOLE, "groups": G[:, None].expand(-1, 2)}, r"groups have shape \(400, 2\)"),
        ({"x": X, "y": Y}, "has no 'groups'"),
        ((X, Y), r"list of 2: expected a dict.*\(x, y, group\)"),
        ({**WHOLE, "x": X[:, :1]}, "`mean` fails"),
        ({**WHOLE, "y": Y.half()}, "float16, which rounds it"),
        ({**WHOLE, "weights": torch.zeros(N)}, "weights.*expected above 0"),
    ],
)
def test_a_batch_at_fault_is_named(batch, message):
    good = DataLoader([WHOLE, batch], batch_size=None)
    with pytest.raises(InputError, match=f"^training batch 1: .*{message}"):
        fit(good)


@pytest.mark.parametrize("way", ["alternating", "composite"])
def test_a_batch_whose_means_are_not_finite_is_named(way):
    hole = X.clone()
    hole[7] = torch.nan
    with pytest.raises(InputError, match=r"^training batch 0: `batch\['x'\]` is nan in row 7"):
        fit(DataLoader(TensorDataset(hole, Y, G), 64), found=module(training=way))


def test_the_first_batch_at_fault_is_named_where_the_mean_is_linear():
    codes = G.clone()
    codes[3] = Q
    linear = MixedModule(MixedModel(nn.Identity(), {"g": RandomEffect(Q)}, head="gls"))
    with pytest.raises(InputError, match=r"^training batch 0: .*code 20: expected 0 to 19"):
        fit(DataLoader(TensorDataset(X, Y, codes), 64), found=linear)


def test_a_linear_mean_of_several_responses_takes_one_batch():
    # With noise of its own: of two responses that differ by the mean alone the likelihood has no bound.
    other = Y + X[:, 1] + 0.5 * torch.randn(N, generator=torch.Generator().manual_seed(1))
    rows = {**WHOLE, "y": torch.stack([Y, other], 1)}
    linear = MixedModel(nn.Identity(), {"g": RandomEffect(Q, responses=2)}, head="gls")
    found = fit(DataLoader([rows], batch_size=None), found=MixedModule(linear))[1]
    assert found.result.converged
    assert found.model.predict(rows).mean.shape == (N, 2)


def test_a_batch_of_no_known_level_has_as_many_levels_as_rows():
    rows = TensorDataset(X, Y, torch.where(torch.arange(N) < 64, -1, G))
    found = fit(DataLoader(rows, 64), found=module(training="composite"), epochs=1)[1]
    assert np.isfinite(found.result.log_likelihood)


def test_networks_of_the_wrong_shape_are_named():
    wide = MixedModel(nn.Linear(2, 1), {"g": RandomEffect(Q)}, residual=nn.Linear(2, 3))
    with pytest.raises(InputError, match=r"training batch 0: `residual` yields .*log-variance"):
        fit(found=MixedModule(wide))
    slopes = RandomEffect(Q, effects=2, features=nn.Linear(2, 3))
    with pytest.raises(InputError, match=r"training batch 0: `features of 'g'`.*64, 2"):
        fit(found=MixedModule(MixedModel(nn.Linear(2, 1), {"g": slopes})))


def test_a_code_of_no_level_is_a_level_of_its_own():
    torch.manual_seed(0)
    n, q = 6000, 300
    g, b = torch.randint(0, q, (n,)), 2 * torch.randn(q)
    known = torch.rand(n) < 0.7
    y = torch.where(known, b[g], 2 * torch.randn(n)) + torch.randn(n)
    rows = TensorDataset(torch.zeros(n, 1), y, torch.where(known, g, -1))
    found = MixedModule(MixedModel(nn.Linear(1, 1), {"g": RandomEffect(q)}), ADAM)
    fit(DataLoader(rows, 1000), found=found, epochs=3)
    sigma2_b, sigma2_e = (p.value for p in found.result.parameters)
    assert sigma2_b == pytest.approx(4, rel=0.2)
    assert sigma2_e == pytest.approx(1, rel=0.1)


# ---------------------------------------------------------------------- what is trained


def test_a_network_for_the_residual_is_trained():
    torch.manual_seed(0)
    n, q = 4000, 100
    x, g = torch.rand(n, 1), torch.randint(0, q, (n,))
    y = torch.randn(q)[g] + torch.exp(-1 + 2 * x[:, 0]) * torch.randn(n)
    spread = nn.Linear(1, 1)
    found = MixedModel(nn.Linear(1, 1), {"g": RandomEffect(q)}, residual=spread)
    fast = {"_target_": "torch.optim.Adam", "lr": 0.1}
    fit(DataLoader(TensorDataset(x, y, g), 256), found=MixedModule(found, fast), epochs=12)
    low, high = spread(torch.tensor([[0.0], [1.0]])).flatten().tolist()
    assert low == pytest.approx(-2, abs=0.3)
    assert high == pytest.approx(2, abs=0.3)
    p = found.predict({"x": x, "groups": {"g": g}})
    inside = (y - p.mean).abs() < 1.96 * p.variance.sqrt()
    for part in (x[:, 0] < 0.2, x[:, 0] > 0.8):
        assert float(inside[part].double().mean()) == pytest.approx(0.95, abs=0.03)


def test_learned_slopes_are_trained():
    torch.manual_seed(0)
    n, q = 2000, 60
    x, g = torch.randn(n, 3), torch.randint(0, q, (n,))
    y = x[:, 0] + 2 * torch.sin(2 * x[:, 1]) * torch.randn(q)[g] + 0.3 * torch.randn(n)
    features = nn.Sequential(nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, 1))
    found = MixedModel(nn.Linear(3, 1), {"g": RandomEffect(q, features=features)})
    fit(
        DataLoader(TensorDataset(x, y, g), 50, shuffle=True),
        found=MixedModule(found, {**ADAM, "lr": 0.04}),
        epochs=10,
    )
    p = found.predict({"x": x, "groups": {"g": g}})
    assert float(((p.mean - y) ** 2).mean()) < 0.25  # 2.2 with slopes that are not learned
    assert float(found.residual()) < 0.3


@pytest.mark.parametrize("unknown", [False, True], ids=["known", "some unknown"])
def test_a_step_goes_down_the_likelihood_by_fishers_identity(unknown):
    """With the BLUPs at hand the alternating loss has the gradient of the likelihood."""
    torch.manual_seed(0)
    groups = {"a": G.clone(), "b": (7 * G + torch.arange(N)) % 5}
    if unknown:
        groups["a"][::9] = groups["b"][4::7] = -1
    weights = 0.5 + torch.rand(N).double()
    batch = {"x": X.double(), "y": Y.double(), "groups": groups, "weights": weights}
    random = {
        "a": RandomEffect(Q, effects=2, features=nn.Linear(2, 2).double()),
        "b": RandomEffect(5, effects=2, features=nn.Linear(2, 2).double()),
    }
    found = MixedModel(nn.Linear(2, 1).double(), random, nn.Linear(2, 1).double())
    found.update(batch)
    parameters = list(found.network_parameters())
    own = torch.autograd.grad(Alternating().loss(found, batch)[0], parameters)
    exact = torch.autograd.grad(found.loss(batch), parameters)
    torch.testing.assert_close(own, exact, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("slopes", [False, True], ids=["features", "features and slopes"])
def test_a_step_with_coefficients_goes_down_the_restricted_likelihood(slopes):
    """Coefficients are estimated too: their covariance is that of REML's correction."""
    torch.manual_seed(0)
    batch = {
        "x": X.double(),
        "y": Y.double(),
        "groups": {"a": G, "b": (7 * G + torch.arange(N)) % 5},
    }
    own = {"effects": 2, "features": nn.Linear(2, 2).double()} if slopes else {}
    random = {"a": RandomEffect(Q, **own), "b": RandomEffect(5)}
    mean = nn.Sequential(nn.Linear(2, 4), nn.Tanh()).double()
    found = MixedModel(mean, random, head="gls")
    found.update(batch)
    parameters = list(found.network_parameters())
    own = torch.autograd.grad(Alternating().loss(found, batch)[0], parameters)
    exact = torch.autograd.grad(found.loss(batch), parameters)
    torch.testing.assert_close(own, exact, rtol=1e-8, atol=1e-11)


def test_features_with_coefficients_are_trained_from_batches():
    """As with all rows in one batch; the full likelihood, which is the same whatever the units of the
    features."""

    def made():
        torch.manual_seed(0)
        mean = nn.Sequential(nn.Linear(2, 8), nn.Tanh()).double()
        return MixedModel(mean, {"g": RandomEffect(Q)}, head="gls", method="ml")

    rows = TensorDataset(X.double(), Y.double(), G)
    found = {}
    for training, size, epochs in (("full", N, 60), ("alternating", 50, 15)):
        loader = DataLoader(rows, size, shuffle=True)
        _, found[training] = fit(
            loader, found=MixedModule(made(), ADAM, training), epochs=epochs, val=loader,
            check_val_every_n_epoch=epochs,
        )  # fmt: skip
    values = {name: each.result.log_likelihood for name, each in found.items()}
    assert values["alternating"] == pytest.approx(values["full"], abs=0.01 * N)
    assert found["alternating"].result.converged
    with pytest.raises(InputError, match=r"for training='alternating'.*'groups'"):
        fit(DataLoader(rows, 50), found=MixedModule(made(), ADAM))


def _linear(case):
    """A formula, its table, and the mixed model with a linear network for its mean."""
    rng = np.random.default_rng(1)
    n = 1500
    t = pd.DataFrame({"x": rng.standard_normal(n), "a": rng.integers(0, 30, n)})
    t["b"], t["w"] = rng.integers(0, 20, n), rng.uniform(0.5, 2, n)
    u, v = rng.standard_normal(30)[t.a], rng.standard_normal(30)[t.a]
    t["y"] = 2 + t.x + u + 0.5 * rng.standard_normal(n) / np.sqrt(t.w if case == "weights" else 1)
    if case == "slopes":
        t["y"] += v * t.x
    if case == "crossed":
        t["y"] += rng.standard_normal(20)[t.b]
    effects = {"a": RandomEffect(30, effects=2 if case == "slopes" else 1)}
    if case == "crossed":
        effects["b"] = RandomEffect(20)
    x = torch.tensor(t[["x"]].to_numpy())
    groups = {name: torch.tensor(t[name].to_numpy()) for name in effects}
    batch = {"x": x, "y": torch.tensor(t.y.to_numpy()), "groups": groups}
    if case == "slopes":
        batch["values"] = {"a": torch.cat([torch.ones_like(x), x], 1)}
    if case == "weights":
        batch["weights"] = torch.tensor(t.w.to_numpy())
    if case == "heteroscedastic":
        e = rng.standard_normal(n)
        t["y"] += (np.exp(0.5 * t.x) - 0.5) * e
        batch["y"] = torch.tensor(t.y.to_numpy())
    formula = {"slopes": "y ~ x + (x | a)", "crossed": "y ~ x + (1 | a) + (1 | b)"}
    return formula.get(case, "y ~ x + (1 | a)"), t, effects, batch


class Rows(Dataset):
    def __init__(self, batch):
        self.batch = batch

    def __len__(self):
        return len(self.batch["y"])

    def __getitem__(self, rows):
        return take(self.batch, torch.tensor(rows))


def _order(batch, size):
    return BatchSampler(RandomSampler(Rows(batch)), size, drop_last=False)


OPTIONS = {"weights": {"weights": "w"}, "heteroscedastic": {"residual": "exp(x)"}}


@pytest.mark.parametrize("case", ["intercepts", "slopes", "crossed", "weights", "heteroscedastic"])
def test_a_linear_mean_ends_at_the_likelihood_of_lmm(case):
    formula, table, effects, batch = _linear(case)
    options = OPTIONS.get(case, {})
    expected = lmm(formula, table, method="ml", categorical=["a", "b"], **options)
    rows, sampler = Rows(batch), _order(batch, 100)
    decay = {"_target_": "torch.optim.lr_scheduler.CosineAnnealingLR", "T_max": 20}
    adam = {"_target_": "torch.optim.Adam", "lr": 0.1}
    residual = nn.Linear(1, 1).double() if case == "heteroscedastic" else None
    linear = MixedModel(nn.Linear(1, 1).double(), effects, residual)
    found = MixedModule(linear, adam, scheduler=decay)
    fit(DataLoader(rows, sampler=sampler, batch_size=None), found=found, epochs=20)
    assert found.result.log_likelihood == pytest.approx(expected.log_likelihood, rel=1e-4)
    if case == "heteroscedastic":
        return
    for one, other in zip(found.result.components, expected.components, strict=True):
        torch.testing.assert_close(one.covariance, other.covariance, rtol=0.02, atol=0.01)


@pytest.mark.parametrize("case", ["intercepts", "slopes", "crossed", "weights"])
def test_a_linear_mean_of_head_gls_has_the_fit_of_lmm_whatever_the_batches(case):
    formula, table, effects, batch = _linear(case)
    expected = lmm(formula, table, categorical=["a", "b"], **OPTIONS.get(case, {}))
    batch["x"] = torch.cat([torch.ones_like(batch["x"]), batch["x"]], 1)
    for size in (7, 200, 1500):
        linear = MixedModel(nn.Identity(), copy.deepcopy(effects), head="gls")
        loader = DataLoader(Rows(batch), sampler=_order(batch, size), batch_size=None)
        trainer, found = fit(loader, found=MixedModule(linear), epochs=2)
        assert found.result.converged and found.result.rows == 1500
        assert found.result.log_likelihood == pytest.approx(expected.log_likelihood, rel=1e-9)
        torch.testing.assert_close(found.result.fixed.estimate, expected.fixed.estimate)
        p, q = linear.predict(take(batch, slice(0, 9))), expected.predict(table[:9])
        np.testing.assert_allclose(p.mean, q["mean"], rtol=1e-4)
        np.testing.assert_allclose(p.variance, q["variance"], rtol=1e-4)
        assert float(trainer.callback_metrics["train_loss"]) * -1500 <= expected.log_likelihood


def test_a_linear_mean_of_head_gls_that_needs_all_rows_says_so():
    batches = [take(WHOLE, slice(0, 200)), take(WHOLE, slice(200, 400))]
    several = DataLoader(batches, batch_size=None)
    linear = MixedModel(nn.Identity(), {"g": RandomEffect(Q)}, head="gls", solver="krylov")
    with pytest.raises(InputError, match="batch 1: solver 'krylov' needs all rows at once"):
        fit(several, found=MixedModule(linear))
    network = MixedModel(nn.Linear(2, 2), {"g": RandomEffect(Q)}, head="gls")
    with pytest.raises(InputError, match=r"batch 1: the loader yields several batches.*head 'ml'"):
        fit(several, found=MixedModule(network))


def test_what_a_network_cannot_yield_stays_with_the_blups():
    """Without a constant in the network the BLUPs keep their mean, as the likelihood wants it."""
    batch = {"x": X.double(), "y": 1 + Y.double(), "groups": {"g": G}}
    network = nn.Linear(2, 1, bias=False).double()
    decay = {"_target_": "torch.optim.lr_scheduler.CosineAnnealingLR", "T_max": 30}
    found = MixedModule(MixedModel(network, {"g": RandomEffect(Q)}), ADAM, scheduler=decay)
    order = BatchSampler(RandomSampler(Rows(batch)), 50, drop_last=False)
    fit(DataLoader(Rows(batch), sampler=order, batch_size=None), found=found, epochs=30)
    linear = MixedModel(nn.Identity(), {"g": RandomEffect(Q)}, head="gls", method="ml")
    objective = linear.objective(batch)
    climb(objective, 50)
    best = float(objective.evaluate().log_likelihood)
    assert found.result.log_likelihood == pytest.approx(best, rel=1e-4)
    assert float(found.model.random["g"].blup.mean()) > 0.5


def test_a_network_for_the_residual_of_a_table_is_trained():
    rng = np.random.default_rng(0)
    n, formula = 3000, "y ~ x + (1 | g)"
    x, g = rng.random(n), rng.integers(0, 60, n)
    y = rng.standard_normal(60)[g] + np.exp(-1 + 2 * x) * rng.standard_normal(n)
    table = pd.DataFrame({"y": y, "x": x, "g": g.astype(str)})
    layers = nn.Sequential(nn.LazyLinear(8), nn.Tanh())
    found = MixedModule(formula, ADAM, network=layers, residual=layers, rows=256)
    quiet(15).fit(found, MixedModelDataModule(table, formula, validation=0.2))
    predicted = found.predict(table)
    error = (table.y - predicted["mean"]).abs() / np.sqrt(predicted["variance"])
    for low, high, true in ((0, 0.2, 0.45), (0.8, 1, 2.23)):
        at = (x >= low) & (x < high)
        assert np.sqrt(predicted["variance"][at]).mean() == pytest.approx(true, rel=0.2)
        assert (error[at] < 1.96).mean() == pytest.approx(0.95, abs=0.04)


def test_weights_count():
    """Least squares with weights ends at the weighted likelihood's maximum."""
    torch.manual_seed(0)
    weights = torch.rand(N) + 0.5
    y = (Y + 0.5 * torch.randn(N) / weights.sqrt()).double()
    batch = {"x": X.double(), "y": y, "groups": {"g": G}, "weights": weights.double()}
    found = MixedModel(nn.Linear(2, 1).double(), {"g": RandomEffect(Q)})
    fast = {"_target_": "torch.optim.LBFGS", "line_search_fn": "strong_wolfe"}
    fit(DataLoader([batch], batch_size=None), found=MixedModule(found, fast), epochs=60)
    design = torch.cat([X.double(), torch.ones(N, 1).double()], 1)
    linear = MixedModel(nn.Identity(), {"g": RandomEffect(Q)}, head="gls", method="ml")
    objective = linear.objective({**batch, "x": design})
    climb(objective, 50)
    best = float(objective.evaluate().log_likelihood)
    reached = float(found.objective(batch).evaluate().log_likelihood)
    assert reached == pytest.approx(best, rel=1e-4)


# ---------------------------------------------------------------------- the Trainer's options


class Norms(Callback):
    """Norms of the network's gradient, as its steps took it."""

    def __init__(self):
        self.norms = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        parts = [p.grad.norm() for p in pl_module.model.network_parameters()]
        self.norms.append(float(torch.stack(parts).norm()))


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"gradient_clip_val": 1e-3}, 14),
        ({"accumulate_grad_batches": 2}, 8),
        ({"max_epochs": -1, "max_steps": 9}, 9),
        ({"limit_train_batches": 3}, 6),
        ({"limit_train_batches": 0.5}, 6),
        ({"overfit_batches": 2}, 4),
        ({"fast_dev_run": True}, 1),
        ({"detect_anomaly": True}, 14),
        ({"inference_mode": False}, 14),
        ({"val_check_interval": 0.25}, 14),
        ({"check_val_every_n_epoch": 2}, 14),
        ({"num_sanity_val_steps": 0}, 14),
        ({"precision": "bf16-mixed"}, 14),
        ({"precision": "64-true"}, 14),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else None,
)
def test_options_of_the_trainer(options, steps):
    watch = Norms()
    found = module()
    trainer = quiet(**{"epochs": options.pop("max_epochs", 2), **options, "callbacks": [watch]})
    trainer.fit(found, tuples(), held_out())
    assert trainer.global_step == steps  # those of the network alone
    if "gradient_clip_val" in options:
        assert max(watch.norms) == pytest.approx(1e-3, rel=1e-3)
    logged = trainer.callback_metrics
    assert {"train_loss", "val_mse", "val_negative_log_density", "val_coverage"} <= set(logged)
    assert float(found.model.random["g"].variance.max()) < float(found.model.random["g"].prior())
    assert found.result.rows == {"limit_train_batches": 192, "overfit_batches": 128}.get(
        next(iter(options)), 64 if "fast_dev_run" in options else N
    )


def test_early_stopping_and_the_best_checkpoint(tmp_path):
    best = ModelCheckpoint(tmp_path, "best", monitor="val_negative_log_density")
    callbacks = [EarlyStopping("val_mse", patience=1), best]
    trainer, _ = fit(val=held_out(), epochs=40, callbacks=callbacks, enable_checkpointing=True)
    assert trainer.current_epoch < 40
    again = MixedModule.load_from_checkpoint(best.best_model_path, model=model(), weights_only=True)
    (found,) = quiet(1).validate(again, held_out(), verbose=False)
    assert found["val_negative_log_density"] == pytest.approx(
        float(best.best_model_score), rel=1e-5
    )


def test_learning_rates_are_seen(tmp_path):
    schedule = {"_target_": "torch.optim.lr_scheduler.StepLR", "step_size": 1, "gamma": 0.5}
    logger = CSVLogger(tmp_path, name="a", version="b")
    fit(
        found=module(scheduler=schedule), logger=logger, callbacks=[LearningRateMonitor()], epochs=3
    )
    logged = pd.read_csv(tmp_path / "a" / "b" / "metrics.csv")["lr-Adam"].dropna()
    np.testing.assert_allclose(logged, [0.02, 0.01, 0.005])


def test_averaged_weights_have_their_own_blups():
    swa = StochasticWeightAveraging(1e-2, swa_epoch_start=2)
    found = MixedModule(model(norm=True), ADAM)
    fit(found=found, epochs=6, callbacks=[swa])
    blup = found.model.random["g"].blup.clone()
    found.model.update(WHOLE)
    torch.testing.assert_close(blup, found.model.random["g"].blup, rtol=1e-5, atol=1e-6)


def test_the_learning_rate_is_found(tmp_path):
    found = module()
    trainer = quiet(2, default_root_dir=tmp_path)
    before = found.state_dict()["model.mean.0.weight"].clone()
    search = Tuner(trainer).lr_find(found, tuples(), num_training=20)
    assert found.lr == search.suggestion() != 0.02
    torch.testing.assert_close(found.model.mean[0].weight.detach(), before)
    trainer.fit(found, tuples())
    assert trainer.optimizers[0].param_groups[0]["lr"] == found.lr


@pytest.mark.parametrize("training", ["alternating", "full", "parts", "groups", "composite"])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_responses_and_networks_of_other_precisions_keep_the_digits_of_both(training, dtypes):
    """As with both in double precision; a response far from zero that the network starts at."""
    of_y, of_network = dtypes
    y = (1000 + Y.double()).to(of_y)

    def fitted(of_y, of_network):
        network = nn.Linear(2, 1).to(of_network)
        with torch.no_grad():
            network.weight.fill_(0.5)
            network.bias.fill_(1000.0)
        batch = {"x": X.to(of_network), "y": y.to(of_y), "groups": {"g": G}}
        own = MixedModel(network, {"g": RandomEffect(Q)})
        loader = DataLoader([batch], batch_size=None)
        still = {"_target_": "torch.optim.SGD", "lr": 0.0}
        trainer, found = fit(loader, loader, MixedModule(own, still, training), epochs=1)
        loss, _ = found.way.loss(own, batch)
        values = trainer.callback_metrics
        return [loss, found.result.log_likelihood, values["val_mse"], own.predict(batch).variance]

    found, wanted = fitted(of_y, of_network), fitted(torch.float64, torch.float64)
    assert found[0].dtype == torch.float64
    for one, other in zip(found, wanted, strict=True):
        # A network in single precision yields 1000 in steps of 6e-5.
        torch.testing.assert_close(
            one, other, rtol=1e-10 if of_y == torch.float32 else 1e-4, atol=0
        )


def test_half_precision_of_the_response_is_refused():
    with pytest.raises(InputError, match=r"training batch 0: `y` is torch.bfloat16.*bf16-mixed"):
        fit(precision="bf16-true")


def test_a_network_in_half_precision_cannot_yield_a_response_far_from_zero():
    far = DataLoader(TensorDataset(X, Y + 1000, G), 64)
    with pytest.raises(InputError, match=r"batch 0: the network yields torch.bfloat16.*subtract"):
        fit(far, precision="bf16-mixed")


def test_test_and_predict():
    trainer, found = fit()
    (tested,) = trainer.test(found, tuples(), verbose=False)
    p = found.model.predict(WHOLE)
    assert tested["test_mse"] == pytest.approx(float(((p.mean - Y) ** 2).mean()), rel=1e-5)
    parts = trainer.predict(found, DataLoader(TensorDataset(X, G), 64))
    torch.testing.assert_close(torch.cat([part.mean for part in parts]), p.mean)


def test_before_anything_was_learned_the_variance_is_the_priors():
    found = module()
    (tested,) = quiet(1).test(found, tuples(), verbose=False)
    assert np.isfinite(tested["test_negative_log_density"])
    variance = found.model.predict({"x": X[:2], "groups": {"g": torch.tensor([0, -1])}}).variance
    torch.testing.assert_close(variance, torch.full((2,), 2.0).double())


def test_rows_without_a_response_are_left_out_of_metrics():
    _, found = fit()
    hole = Y.clone()
    hole[::3] = torch.nan
    (some,) = quiet(1).validate(found, DataLoader(TensorDataset(X, hole, G), N), verbose=False)
    p = found.model.predict(WHOLE)
    error = ((p.mean - Y) ** 2)[~hole.isnan()].mean()
    assert some["val_mse"] == pytest.approx(float(error), rel=1e-6)


def test_validations_and_checkpoints_leave_training_as_it_is(tmp_path):
    plain = fit(epochs=3)[1]
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1)
    options = {"val_check_interval": 0.3, "enable_checkpointing": True, "callbacks": [saver]}
    watched = fit(val=held_out(), epochs=3, **options)[1]
    for (name, a), b in zip(plain.state_dict().items(), watched.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0, msg=name)


@pytest.mark.parametrize("way", ["alternating", "full"])
def test_a_module_is_copied_after_a_fit(way):
    loader = DataLoader([WHOLE], batch_size=None) if way == "full" else tuples()
    _, found = fit(loader, found=module(training=way))
    again = copy.deepcopy(found)
    assert again.score_norm() == found.score_norm()
    torch.testing.assert_close(again.model.predict(WHOLE), found.model.predict(WHOLE))


# ---------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("way", ["alternating", "composite", "full", "parts"])
def test_every_checkpoint_predicts(tmp_path, way):
    loader = DataLoader([WHOLE], batch_size=None) if way in ("full", "parts") else tuples()
    saver = ModelCheckpoint(tmp_path, "{epoch}-{step}", every_n_train_steps=3, save_top_k=-1)
    trainer, found = fit(
        loader, found=module(training=way), enable_checkpointing=True, callbacks=[saver]
    )
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    for path in tmp_path.glob("*.ckpt"):
        again = MixedModule.load_from_checkpoint(path, model=model(), weights_only=True).model
        p = again.predict(WHOLE)
        again.update(WHOLE)
        expected = again.predict(WHOLE)
        torch.testing.assert_close(p.mean, expected.mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(p.variance, expected.variance, rtol=1e-5, atol=1e-6)
    kept = MixedModule.load_from_checkpoint(
        tmp_path / "last.ckpt", model=model(), weights_only=True
    )
    torch.testing.assert_close(kept.model.predict(WHOLE).mean, found.model.predict(WHOLE).mean)


def test_a_checkpoint_from_within_an_epoch_is_not_resumed(tmp_path):
    saved = ModelCheckpoint(tmp_path, "within", every_n_train_steps=2)
    quiet(1, callbacks=[saved], enable_checkpointing=True).fit(module(), tuples())
    with pytest.raises(InputError, match="the checkpoint was saved within an epoch"):
        quiet(2).fit(module(), tuples(), ckpt_path=saved.best_model_path, weights_only=True)


def test_a_run_that_had_ended_has_its_result_when_resumed(tmp_path):
    trainer, found = fit()
    trainer.save_checkpoint(tmp_path / "m.ckpt")
    again = module()
    quiet(2).fit(again, tuples(), ckpt_path=tmp_path / "m.ckpt", weights_only=True)
    assert again.result.log_likelihood == pytest.approx(found.result.log_likelihood, rel=1e-10)
    torch.testing.assert_close(again.model.random["g"].blup, found.model.random["g"].blup)


def test_half_precision_keeps_the_digits_of_a_response_far_from_zero():
    rng = np.random.default_rng(0)
    n, formula = 3000, "y ~ x + (1 | g)"
    x, g = rng.random(n), rng.integers(0, 60, n)
    y = 1000 + np.sin(6 * x) + rng.standard_normal(60)[g] + 0.5 * rng.standard_normal(n)
    table = pd.DataFrame({"y": y, "x": x, "g": g.astype(str)})
    layers = nn.Sequential(nn.LazyLinear(16), nn.Tanh())
    found = MixedModule(formula, ADAM, network=layers, rows=256)
    data = MixedModelDataModule(table, formula, validation=0.2)
    trainer = quiet(12, precision="bf16-mixed")
    trainer.fit(found, data)
    variance = [c.covariance.item() for c in found.result.components]
    assert variance[0] == pytest.approx(1, rel=0.5)
    assert variance[1] == pytest.approx(0.25, rel=0.15)
    assert float(trainer.callback_metrics["val_mse"]) < 0.35


# ---------------------------------------------------------------------- processes


def test_processes_that_hold_other_rows_are_refused(tmp_path):
    def run():
        class Other(Dataset):
            def __len__(self):
                return 1

            def __getitem__(self, i):
                at = slice(None, None, -1 if torch.distributed.get_rank() else None)
                at = torch.arange(N).flip(0) if torch.distributed.get_rank() else torch.arange(N)
                return {"x": X[at], "y": Y[at], "groups": {"g": G[at]}}

        trainer = quiet(1, devices=2, strategy="ddp_fork")
        trainer.fit(module(training="full"), DataLoader(Other(), batch_size=None))

    done = forked(run, tmp_path)
    assert done.returncode != 0
    assert (
        "the processes hold other rows, or the same in another order (`x` differs)" in done.stderr
    )


def test_processes_with_other_tables_are_refused(tmp_path):
    def run():
        table = pd.DataFrame({"y": Y.numpy(), "x": X[:, 0].numpy(), "g": G.numpy().astype(str)})

        class Shuffled(MixedModelDataModule):
            def setup(self, stage=None):
                super().setup(stage)
                if torch.distributed.get_rank():
                    self.table = self.table.sample(frac=1, random_state=1)
                    self.encoded = self.encoder.fit(self.table)

        found = MixedModule("y ~ x + (1 | g)", network=nn.LazyLinear(2), rows=64)
        quiet(1, devices=2, strategy="ddp_fork").fit(found, Shuffled(table, "y ~ x + (1 | g)"))

    done = forked(run, tmp_path)
    assert done.returncode != 0
    assert "the processes hold other rows, or the same in another order" in done.stderr


def test_rows_that_a_sampler_repeats_are_counted(tmp_path):
    def run():
        warnings.simplefilter("default")
        warnings.showwarning = lambda message, *_: os.write(2, f"{message}\n".encode())
        rows = TensorDataset(X[:399], Y[:399], G[:399])
        quiet(1, devices=2, strategy="ddp_fork").fit(module(), DataLoader(rows, 50))

    done = forked(run, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the sampler repeats 1 of 399 training rows") == 1


# ---------------------------------------------------------------------- someone else's module


class Mine(LightningModule):
    def __init__(self):
        super().__init__()
        self.mixed = model()

    def training_step(self, batch, batch_idx):
        x, y, g = batch
        return self.mixed.loss({"x": x, "y": y, "groups": {"g": g}})

    def validation_step(self, batch, batch_idx):
        x, y, g = batch
        found = self.mixed.predict({"x": x, "groups": {"g": g}})
        self.log("mse", ((found.mean - y) ** 2).mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.mixed.network_parameters(), lr=0.02)


def test_three_lines_in_someone_elses_module(tmp_path):
    mine = Mine()
    trainer = quiet(
        10, callbacks=[UpdateBLUPs()], enable_checkpointing=True, default_root_dir=tmp_path
    )
    trainer.fit(mine, tuples(shuffle=True), held_out())
    assert float(trainer.callback_metrics["mse"]) < 0.5
    assert float(mine.mixed.residual()) == pytest.approx(0.25, rel=0.4)
    state = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)["state_dict"]
    again = Mine()
    again.load_state_dict(state)
    torch.testing.assert_close(again.mixed.predict(WHOLE).mean, mine.mixed.predict(WHOLE).mean)
    blup = mine.mixed.random["g"].blup.clone()
    mine.mixed.update(WHOLE)
    torch.testing.assert_close(blup, mine.mixed.random["g"].blup, rtol=1e-5, atol=1e-6)


def test_an_optimizer_that_has_the_covariance_keeps_it():
    class All(Mine):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    mine = All()
    quiet(2, callbacks=[UpdateBLUPs("mixed")]).fit(mine, tuples())
    assert float(mine.mixed.residual()) == 1
    assert float(mine.mixed.random["g"].blup.std()) > 0


def test_a_model_that_is_not_there_is_named():
    with pytest.raises(InputError, match="Mine has 0 of a MixedModel 'other'"):
        quiet(1, callbacks=[UpdateBLUPs("other")]).fit(Mine(), tuples())


def test_dense_places_are_trained_in_single_precision():
    """A kernel that is rounded to single precision has eigenvalues below zero."""
    places = 4 * torch.rand(100, 2, generator=torch.Generator().manual_seed(1)).double()
    kernel = GaussianMatrix(torch.cdist(places, places))
    model = MixedModel(nn.Linear(2, 1), {"g": RandomEffect(100, kernel)})
    rounded = torch.linalg.eigvalsh(kernel().detach().double())
    assert float(rounded[0]) < -1e-9 * float(rounded[-1])
    codes = torch.randint(100, (N,), generator=torch.Generator().manual_seed(2))
    rows = {"x": X, "y": Y, "groups": {"g": codes}}
    module = MixedModule(model, ADAM)
    quiet(2).fit(
        module, DataLoader([take(rows, slice(i, i + 40)) for i in range(0, N, 40)], batch_size=None)
    )
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    wide = copy.deepcopy(model).double()
    wide.update({**rows, "x": X.double(), "y": Y.double()})
    model.update(rows)
    torch.testing.assert_close(
        model.predict(rows).mean.double(),
        wide.predict({**rows, "x": X.double()}).mean,
        rtol=0,
        atol=1e-4,
    )
