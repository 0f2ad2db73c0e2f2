"""Several responses of a row: the same as a row for each, and as all of V written out."""

import copy

import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from openreml_nn import InputError, MixedModel, RandomEffect
from openreml_nn.covariance import AR1Matrix, DiagonalMatrix, ScalarMatrix, UnstructuredMatrix
from openreml_nn.estimation import AIREML
from openreml_nn.estimation.curvature import Curvature
from openreml_nn.families import Poisson
from openreml_nn.lightning import MixedModelDataModule, MixedModule
from openreml_nn.lightning.sums import LevelSums
from openreml_nn.lightning.ways import Alternating
from openreml_nn.model import take
from openreml_nn.model.batch import responding
from tests.test_neural import quiet

T, N = 3, 40


def rows(missing=False, n=N, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    g, h = (torch.randint(0, q, (n,), generator=generator) for q in (7, 4))
    L = torch.tensor([[1.0, 0, 0], [0.6, 0.8, 0], [-0.5, 0.2, 0.7]]).double()
    x = normal(n, 2)
    y = x @ normal(2, T) + (normal(7, T) @ L)[g] + normal(4)[h][:, None] + normal(n, T) @ L / 2
    if missing:
        y[torch.rand(n, T, generator=generator) < 0.2] = torch.nan
        y[5] = torch.nan
    return {"x": x, "y": y, "groups": {"g": g, "h": h}}


def network(outputs=T):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, outputs)).double()


class Long(nn.Module):
    """The network for (x, number of the response), a row for each response."""

    def __init__(self, network, head):
        super().__init__()
        self.network, self.head = network, head

    def forward(self, x):
        x, trait = x
        found = self.network(x)
        if self.head == "ml":
            return found.gather(1, trait[:, None])[:, 0]
        own = nn.functional.one_hot(trait, T).to(found)
        return (own[:, :, None] * found[:, None, :]).flatten(1)


def effects(kind):
    """Random effects, and the same of long rows."""
    if kind == "slopes":
        return (
            {"g": RandomEffect(7, effects=2, responses=T)},
            {"g": RandomEffect(7, effects=2 * T)},
        )
    own = {"g": RandomEffect(7, responses=T), "h": RandomEffect(4)}
    return own, {"g": RandomEffect(7, effects=T), "h": RandomEffect(4)}


def made(kind="crossed", head="ml", residual=None):
    """The model, and the same of long rows."""
    one, other = effects(kind)
    p = T if head == "ml" else 3
    wide = MixedModel(network(p), one, residual, head)
    own = UnstructuredMatrix(T).double() if residual is None else copy.deepcopy(residual)
    long = MixedModel(Long(network(p), head), other, own, head)
    for model in (wide, long):
        with torch.no_grad():
            for i, parameter in enumerate(model.covariance_parameters()):
                parameter.fill_(0.3 * (i % 4) - 0.4)
    return wide, long


def stacked(data, kind):
    """Long rows: those with a response, each with its cell."""
    n = len(data["x"])
    unit, trait = torch.arange(n).repeat_interleave(T), torch.arange(T).repeat(n)
    one = nn.functional.one_hot(trait, T).double()
    z = torch.stack([torch.ones(n).double(), data["x"][:, 0]], 1)
    values = {"g": (one[:, :, None] * z[unit][:, None, :]).flatten(1) if kind == "slopes" else one}
    found = {
        "x": (data["x"][unit], trait),
        "groups": {name: codes[unit] for name, codes in data["groups"].items()},
        "values": values,
        "residual": unit * T + trait,
    }
    for key in ("weights", "offset"):
        if key in data:
            own = data[key]
            found[key] = own.reshape(-1) if own.dim() == 2 else own[unit]
    if "y" not in data:
        return found
    y = data["y"].reshape(-1)
    return take({**found, "y": y}, (~y.isnan()).nonzero()[:, 0])


def with_values(data, kind):
    z = torch.stack([torch.ones(len(data["x"])).double(), data["x"][:, 0]], 1)
    if kind == "slopes":
        groups = {"g": data["groups"]["g"]}
        return {**data, "groups": groups, "values": {"g": z}}
    return data


def variances(found):
    """Predictions with the variance of each response."""
    return found._replace(variance=found.variance.diagonal(dim1=1, dim2=2))


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize(
    ("kind", "head"), [("crossed", "ml"), ("crossed", "gls"), ("slopes", "ml")]
)
def test_the_variance_of_a_prediction_is_the_covariance_of_its_responses(kind, head, weights):
    """As of all rows, old and new, written out: what is left of the new ones, given the old."""
    found, _ = made(kind, head)
    data, new = with_values(rows(), kind), with_values(rows(n=5, seed=3), kind)
    new["groups"]["g"][0] = -1
    found.update(data)
    if weights:
        new["weights"] = 0.5 + torch.rand(5, T).double()
    both = {"x": torch.cat([data["x"], new["x"]]), "groups": {}}
    for name, codes in data["groups"].items():
        more = torch.where(new["groups"][name] < 0, 7, new["groups"][name])
        both["groups"][name] = torch.cat([codes, more])
    if kind == "slopes":
        both["values"] = {"g": torch.cat([data["values"]["g"], new["values"]["g"]])}
    effects_of_more = {"g": RandomEffect(8, effects=2 if kind == "slopes" else 1, responses=T)}
    if kind == "crossed":
        effects_of_more["h"] = RandomEffect(4)
    grown = MixedModel(found.mean, effects_of_more, found.residual, head)
    for name, parameter in found.named_parameters():
        dict(grown.named_parameters())[name].data.copy_(parameter)
    with torch.no_grad():
        V = grown.covariance(both)()
        at, R = N * T, found.residual()
        V[at:, at:] -= torch.block_diag(*[R] * 5)
        w = new.get("weights", torch.ones(5, T).double()).rsqrt()
        V[at:, at:] += torch.block_diag(*[R * a[:, None] * a for a in w])
        A = torch.linalg.solve(V[:at, :at], V[:at, at:])
        left = V[at:, at:] - V[at:, :at] @ A
        if head == "gls":
            X = torch.stack([torch.kron(torch.eye(T).double(), x[None]) for x in found(both)])
            X = X.flatten(0, 1)
            D = X[at:] - A.mT @ X[:at]
            left += D @ torch.linalg.solve(
                X[:at].mT @ torch.linalg.solve(V[:at, :at], X[:at]), D.mT
            )
    variance = found.predict(new).variance
    assert variance.shape == (5, T, T)
    for i, own in enumerate(variance):
        at = slice(i * T, i * T + T)
        torch.testing.assert_close(own, left[at, at], rtol=1e-8, atol=1e-9)


CASES = [("crossed", "ml"), ("crossed", "gls"), ("slopes", "ml")]


@pytest.mark.filterwarnings("ignore:.*rows have no response")
@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize(("kind", "head"), CASES)
def test_several_responses_are_rows_of_one(kind, head, missing):
    """Loss, gradients, BLUPs and predictions, of known and unknown levels."""
    wide, long = made(kind, head)
    data = with_values(rows(missing), kind)
    found = []
    for model, batch in ((wide, data), (long, stacked(data, kind))):
        loss = model.loss(batch)
        loss.backward()
        gradients = [p.grad for p in model.parameters()]
        model.update(batch)
        effects = [t for e in model.effects().values() for t in (e.blup, e.variance)]
        likelihood = model.objective(batch).evaluate().log_likelihood
        found.append([loss.detach(), *gradients, *effects, model.beta, torch.tensor(likelihood)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)
    new = with_values(rows(n=9, seed=3), kind)
    new["groups"]["g"][:2] = -1
    del new["y"]
    if kind == "crossed":
        new["groups"]["h"][1:4] = -1
    wanted = long.predict(stacked(new, kind))
    for own, other in zip(variances(wide.predict(new)), wanted, strict=True):
        assert own.shape == (9, T)
        torch.testing.assert_close(own, other.reshape(9, T), rtol=1e-9, atol=1e-10)
    whole = with_values(rows(missing), kind)
    density = wide.log_density(whole)
    assert torch.equal(density.isnan(), whole["y"].isnan())
    own = density.reshape(-1)[~density.isnan().reshape(-1)]
    expected = long.log_density(stacked(whole, kind))
    torch.testing.assert_close(own, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.filterwarnings("ignore:.*rows have no response")
@pytest.mark.parametrize("missing", [False, True])
def test_the_likelihood_is_that_of_the_dense_covariance(missing):
    wide, _ = made()
    data = rows(missing)
    g, h = wide.random["g"], wide.random["h"]
    with torch.no_grad():
        G, s2, R = g.prior(), h.prior().reshape(()), wide.residual()
        same = data["groups"]["g"][:, None] == data["groups"]["g"]
        V = torch.kron(same.double(), G) + torch.kron(torch.eye(N).double(), R)
        same = data["groups"]["h"][:, None] == data["groups"]["h"]
        V = V + s2 * torch.kron(same.double(), torch.ones(T, T).double())
        e = (data["y"] - network()(data["x"])).reshape(-1)
        there = ~e.isnan()
        e, V = e[there], V[there][:, there]
        normal = torch.distributions.MultivariateNormal(torch.zeros(len(e)).double(), V)
        expected = -normal.log_prob(e) / len(e)
    torch.testing.assert_close(wide.loss(data).detach(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("residual", [ScalarMatrix(1).double(), DiagonalMatrix(T).double()])
def test_responses_that_are_independent_given_the_effects(residual):
    """Of effects that are independent too: the sum of a model for each."""
    data = rows()
    data["groups"] = {"g": data["groups"]["g"]}
    diagonal = DiagonalMatrix(T).double()
    model = MixedModel(network(), {"g": RandomEffect(7, diagonal, responses=T)}, residual)
    total = 0.0
    for j in range(T):
        net = network()
        net[-1].weight.data, net[-1].bias.data = net[-1].weight[j : j + 1], net[-1].bias[j : j + 1]
        one = MixedModel(net, {"g": RandomEffect(7)})
        total = total + one.loss({**data, "y": data["y"][:, j]}) * N
    torch.testing.assert_close(model.loss(data) * N * T, total, rtol=1e-10, atol=1e-10)


def test_weights_and_offsets_of_rows_or_of_responses():
    wide, long = made()
    data = rows()
    w = 0.5 + torch.rand(N, T).double()
    for weights, offset in ((w[:, 0], data["x"][:, 0]), (w, data["y"] / 3)):
        own = {**data, "weights": weights, "offset": offset}
        value = wide.loss(own)
        torch.testing.assert_close(value, long.loss(stacked(own, "crossed")), rtol=1e-10, atol=0)


def test_the_order_of_rows_and_responses_does_not_matter():
    wide, _ = made("slopes")
    data = with_values(rows(), "slopes")
    order = torch.randperm(N)
    shuffled = wide.loss(take(data, order))
    torch.testing.assert_close(shuffled, wide.loss(data), rtol=1e-10, atol=0)


def test_effects_have_the_names_of_responses():
    names = ["height", "weight"]
    one = RandomEffect(3, responses=names)
    assert one.effect_names == ("height", "weight")
    two = RandomEffect(3, effects=["a", "b"], responses=names)
    assert two.effect_names == ("height:a", "height:b", "weight:a", "weight:b")
    assert one.g.shape == (6, 6) and two.prior().shape == (4, 4)


@pytest.mark.filterwarnings("ignore:.*training rows have no response")
@pytest.mark.parametrize(("training", "head"), [("full", "ml"), ("parts", "ml"), ("full", "gls")])
def test_training_in_lightning(training, head):
    """With all rows in a batch; validation counts every response."""
    model, long = made("crossed", head)
    data = rows(True)
    module = MixedModule(model, {"_target_": "torch.optim.Adam", "lr": 0.01}, training)
    loader = DataLoader([data], batch_size=None)
    trainer = quiet(3)
    trainer.fit(module, loader, DataLoader([rows(seed=2)], batch_size=None))
    assert "val_mse" in trainer.callback_metrics
    for (name, own), other in zip(
        model.named_parameters(), (p for p in long.parameters()), strict=True
    ):
        assert own.shape == other.shape, name
        other.data.copy_(own)
    long.update(stacked(data, "crossed"))
    new = rows(seed=2)
    del new["y"]
    wanted = long.predict(stacked(new, "crossed"))
    torch.testing.assert_close(
        variances(model.predict(new)).variance, wanted.variance.reshape(N, T), rtol=1e-7, atol=1e-8
    )


RESIDUALS = {
    "any": None, "one variance": ScalarMatrix(1), "variances": DiagonalMatrix(T), "ar1": AR1Matrix(T)
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*rows have no response")
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize(("kind", "head"), CASES)
def test_sums_by_level_say_what_all_rows_do(kind, head, residual):
    """Likelihood, gradient, average information, BLUPs and predictive variances, in which a batch is
    split by which responses are there, rows have weights, and batches any size."""
    given = RESIDUALS[residual]
    found, _ = made(kind, head, None if given is None else copy.deepcopy(given).double())
    data = with_values(rows(True, n=60), kind)
    data |= {"weights": 0.5 + torch.rand(60).double(), "offset": torch.rand(60, T).double()}
    there, _ = responding(data, several=True)
    sums, output = LevelSums(found, waiting=17), found(there).detach()
    for at in torch.arange(len(output)).split(13):
        sums.add(take(there, at), output[at])
    summed, whole = sums.gathered(), found.objective(data)
    parameters = list(found.covariance_parameters())
    one, other = summed.objective.evaluate(), whole.evaluate()
    torch.testing.assert_close(one.log_likelihood, other.log_likelihood, rtol=1e-10, atol=1e-9)
    torch.testing.assert_close(
        summed.objective.gradient(parameters), whole.gradient(parameters), rtol=1e-8, atol=1e-8
    )
    one, other = Curvature([summed.objective]), Curvature([whole])
    torch.testing.assert_close(one.information, other.information, rtol=1e-8, atol=1e-8)
    held = copy.deepcopy(found)
    held.update(data)
    summed.update()
    new = with_values(rows(n=9, seed=3), kind)
    new["groups"]["g"][:2] = -1
    torch.testing.assert_close(found.predict(new), held.predict(new), rtol=1e-8, atol=1e-9)
    assert summed.result([], None).rows == int((~data["y"].isnan()).sum())


@pytest.mark.filterwarnings("ignore:.*rows have no response")
@pytest.mark.parametrize("residual", ["any", "one variance"])
@pytest.mark.parametrize("kind", ["crossed", "slopes"])
def test_a_step_given_the_blups_goes_down_the_likelihood(kind, residual):
    given = RESIDUALS[residual]
    found, _ = made(kind, "ml", None if given is None else copy.deepcopy(given).double())
    data = with_values(rows(True), kind) | {"weights": 0.5 + torch.rand(N).double()}
    found.update(data)
    parameters = list(found.mean.parameters())
    there, _ = responding(data, several=True)
    own = torch.autograd.grad(Alternating().loss(found, there)[0], parameters)
    exact = torch.autograd.grad(found.loss(data), parameters)
    torch.testing.assert_close(own, exact, rtol=1e-8, atol=1e-11)


def test_a_level_that_is_not_known_is_one_of_its_own_in_sums_by_level():
    found, _ = made()
    data = rows()
    unknown = {**data, "groups": {"g": data["groups"]["g"].clone(), "h": data["groups"]["h"]}}
    unknown["groups"]["g"][3:6] = -1
    more = RandomEffect(10, UnstructuredMatrix(T).double(), responses=T)
    grown = MixedModel(network(), {"g": more, "h": RandomEffect(4)})
    known = dict(grown.named_parameters())
    for name, parameter in found.named_parameters():
        known[name].data.copy_(parameter)
    as_known = {**data, "groups": {**data["groups"], "g": unknown["groups"]["g"].clone()}}
    as_known["groups"]["g"][3:6] = torch.arange(7, 10)
    sums = LevelSums(found)
    sums.add(unknown, found(data).detach())
    value = sums.gathered().objective.evaluate().log_likelihood
    expected = grown.objective(as_known).evaluate().log_likelihood
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)
    # In a step it adds its prior covariance among the responses.
    with torch.no_grad():
        loss, _ = Alternating().loss(found, take(unknown, torch.tensor([4])))
        h = take(data, torch.tensor([4]))["groups"]["h"]
        V = found.residual() + found.random["g"].prior()
        mean = found(data)[4] + found.random["h"].blup[h][0]
        normal = torch.distributions.MultivariateNormal(mean, V)
    torch.testing.assert_close(loss, -normal.log_prob(data["y"][4]) / T, rtol=1e-10, atol=0)


@pytest.mark.filterwarnings("ignore:.*training rows have no response")
def test_mini_batches_with_missing_responses_end_where_all_rows_do(tmp_path):
    """A linear mean, at a learning rate that goes to zero; and its checkpoint predicts the same."""
    data = rows(True, n=150)
    torch.manual_seed(0)
    found = MixedModel(nn.Linear(2, T).double(), effects("crossed")[0])
    module = MixedModule(
        found, {"_target_": "torch.optim.Adam", "lr": 0.3},
        scheduler={"_target_": "torch.optim.lr_scheduler.ExponentialLR", "gamma": 0.8},
    )  # fmt: skip
    parts = [take(data, at) for at in torch.arange(150).split(40)]
    trainer = quiet(20, check_val_every_n_epoch=20)
    trainer.fit(module, DataLoader(parts, batch_size=None), DataLoader(parts, batch_size=None))
    X = torch.cat([data["x"], torch.ones(150, 1).double()], 1)
    linear = MixedModel(nn.Identity(), effects("crossed")[0], head="gls", method="ml")
    batches = [{**part, "x": X[at]} for part, at in zip(parts, torch.arange(150).split(40))]
    exact = MixedModule(linear)
    quiet(12).fit(exact, DataLoader(batches, batch_size=None))
    assert exact.result.converged
    assert module.result.log_likelihood == pytest.approx(exact.result.log_likelihood, rel=1e-4)
    torch.testing.assert_close(found.residual(), linear.residual(), rtol=0.02, atol=0.01)
    assert "val_coverage" in trainer.callback_metrics
    trainer.save_checkpoint(tmp_path / "m.ckpt")
    loaded = MixedModule.load_from_checkpoint(
        tmp_path / "m.ckpt", weights_only=True,
        model=MixedModel(nn.Linear(2, T).double(), effects("crossed")[0]),
    )  # fmt: skip
    for one, other in zip(loaded.model.predict(data), found.predict(data), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("model", "batch", "message"),
    [
        ({"head": "gls"}, {}, "3 responses of a row with head 'gls'.*use training='full'"),
        ({"residual": nn.Linear(2, 1)}, {}, "a network for variances need all rows at once"),
        ({}, {"weights": torch.ones(N, T).double()}, r"batch 0: `batch\['weights'\]`.*single resp"),
    ],
)
def test_what_sums_by_level_do_not_take_is_refused(model, batch, message):
    found = MixedModel(network(), effects("crossed")[0], **model)
    loader = DataLoader([{**rows(), **batch}], batch_size=None)

    def fit():
        quiet(1).fit(MixedModule(found, training="alternating"), loader)

    with pytest.raises(InputError, match=message):
        fit()


@pytest.mark.filterwarnings("ignore:.*rows have no response")
def test_parameters_are_found_by_average_information():
    model, _ = made()
    data = rows(True, n=400)
    optimizer = AIREML(list(model.covariance_parameters()))
    for _ in range(15):
        optimizer.step(lambda: model.objective(data))
    gradients = torch.autograd.grad(model.loss(data), list(model.covariance_parameters()))
    assert max(float(x.abs().max()) for x in gradients) < 1e-6


def test_gradients_in_parts_are_those_of_all_rows():
    model, _ = made()
    data = rows()
    model.loss(data).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.backward_in_parts(data, 7)
    for p, wanted in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.filterwarnings("ignore:.*rows have no response")
def test_new_rows_and_levels_are_added():
    data = rows(True)
    data["groups"]["g"] = data["groups"]["g"].clamp(max=5)
    data["groups"]["g"][-3:] = 6
    model, _ = made()
    small = MixedModel(network(), {"g": RandomEffect(6, responses=T), "h": RandomEffect(4)})
    small.load_state_dict(
        {k: v for k, v in model.state_dict().items() if k in dict(small.named_parameters())},
        strict=False,
    )
    small.update(take(data, torch.arange(30)))
    small.add(take(data, torch.arange(30, N)))
    model.update(data)
    for one, other in zip(small.predict(data), model.predict(data), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": torch.zeros(N).double()}, rf"`batch\['y'\]` is .*\({N}, 3\)"),
        ({"y": torch.zeros(N, 2).double()}, rf"`batch\['y'\]` is .*\({N}, 3\)"),
        ({"residual": torch.arange(N)}, "`batch\\['residual'\\]`.*expected none"),
        ({"weights": torch.ones(N, 2).double()}, rf"`batch\['weights'\]` is .*\({N}, 3\)"),
    ],
)
def test_batches_at_fault_are_named(change, message):
    model, _ = made()
    with pytest.raises(InputError, match=message):
        model.loss({**rows(), **change})


def test_models_at_fault_are_named():
    data = rows()
    own = {"g": RandomEffect(7, responses=T)}
    with pytest.raises(InputError, match=r"`mean` yields \(40, 2\): expected \(n, 3\)"):
        MixedModel(network(2), own).loss({**data, "groups": {"g": data["groups"]["g"]}})
    with pytest.raises(InputError, match=r"random effect 'h' has 2 responses: expected 1.* or 3"):
        MixedModel(network(), {**own, "h": RandomEffect(4, responses=2)})
    with pytest.raises(InputError, match="`responses` is 3 with the family Poisson"):
        MixedModel(network(), own, family=Poisson())
    with pytest.raises(InputError, match=r"`residual` is \(2, 2\): expected \(1, 1\) or \(3, 3\)"):
        MixedModel(network(), own, UnstructuredMatrix(2))
    with pytest.raises(InputError, match=r"`features` is .* with 3 responses: expected None"):
        RandomEffect(7, responses=T, features=nn.Linear(2, 1))
    with pytest.raises(InputError, match=r"`y` has shape.*several are for a model with responses"):
        MixedModel(network(1), {"g": RandomEffect(7)}).loss(data)
    model, _ = made()
    data["groups"]["g"][4] = -1
    with pytest.raises(InputError, match=r"group 'g' has the code -1 in row 4.*several responses"):
        model.loss(data)


def test_without_random_effects_of_their_own():
    """Seemingly unrelated regressions, and an effect that the responses share."""
    data = rows()
    model = MixedModel(network(), {"h": RandomEffect(4)}, responses=T)
    assert model.residual.shape == (T, T)
    assert model.predict(data).mean.shape == (N, T)
    model.update({**data, "groups": {"h": data["groups"]["h"]}})
    plain = MixedModel(network(3), {}, head="gls", responses=2)
    plain.update({**data, "y": data["y"][:, :2], "groups": {}})
    X = network(3)(data["x"])
    expected = torch.linalg.lstsq(X, data["y"][:, :2]).solution.mT.reshape(-1).detach()
    torch.testing.assert_close(plain.beta, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("head", ["ml", "gls"])
def test_responses_that_tell_each_other_are_refused_where_all_rows_are_at_hand(head, dtype):
    data = rows()
    data["y"][:, 2] = 3 - 2 * data["y"][:, 0]
    data["y"][4, 1] = torch.nan
    data |= {"x": data["x"].to(dtype), "y": data["y"].to(dtype)}
    mean = nn.Sequential(network(3), Constant()) if head == "gls" else network()
    own = MixedModel(
        mean.to(dtype), {"g": RandomEffect(7), "h": RandomEffect(4)}, None, head, responses=T
    )
    said = "is a constant" if head == "ml" else "the features fit exactly"
    message = rf"responses 'y\[:, 0\]', 'y\[:, 2\]' have a combination that {said}"
    module = MixedModule(own, training="full")
    for call in (
        lambda: own.update(data),
        lambda: own.objective(data),
        lambda: quiet(1).fit(module, DataLoader([data], batch_size=None)),
    ):
        with pytest.raises(InputError, match=message):
            call()
    # Where something is left the covariance is regular, and one without correlations always is.
    for residual in (DiagonalMatrix(T), ScalarMatrix(1)):
        given = residual.double()
        MixedModel(mean, own.effects(), given, head, responses=T).update(data)
    data["y"][6, 2] += 0.1
    own.update(data)


class Constant(nn.Module):
    def forward(self, features):
        return torch.cat([torch.ones_like(features[:, :1]), features], 1)


@pytest.mark.parametrize("network", [None, nn.LazyLinear(3)])
def test_a_module_of_a_formula_refuses_them_too(network):
    data = rows()
    y, x = data["y"][:, 0].numpy(), data["x"][:, 0].numpy()
    table = pd.DataFrame({"y": y, "z": y + 5, "x": x, "g": data["groups"]["g"].numpy()})
    formula = "cbind(y, z) ~ x + (1 | g)"
    with pytest.raises(InputError, match="the responses 'y', 'z' have a combination"):
        quiet(1).fit(MixedModule(formula, network=network), MixedModelDataModule(table))
