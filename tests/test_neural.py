"""Training a neural mixed model in Lightning."""

import pandas as pd
import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from openreml_nn import InputError, MixedModel, RandomEffect
from openreml_nn.covariance import KnownMatrix
from openreml_nn.inference import heritability
from openreml_nn.lightning import ExportBLUPs, MixedModule, TraceVariances, WholeGroups
from openreml_nn.lightning.batches import connected_rows, whole
from openreml_nn.model import take
from tests import sharing
from tests.forked import forked
from tests.strategies import kinship


def data(n=600, levels=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, generator=generator)
    codes = torch.randint(0, levels, (n,), generator=generator)
    b = 1.5 * torch.randn(levels, generator=generator)
    y = x[:, 0].sin() + 2 * x[:, 1] + 3 + b[codes] + 0.5 * torch.randn(n, generator=generator)
    return {"x": x, "y": y, "groups": {"g": codes}}


def module(head="ml", training="alternating", mean=None, lr=0.02, **options):
    torch.manual_seed(0)
    mean = mean or nn.Sequential(
        nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1 if head == "ml" else 4)
    )
    model = MixedModel(mean, {"g": RandomEffect(20)}, head=head)
    adam = {"_target_": "torch.optim.Adam", "lr": lr}
    return MixedModule(model, adam, training, **options)


def loader(way="alternating", rows=None, size=64):
    """A loader of the rows that suits the way of training."""
    rows = rows or data()
    if way in ("full", "parts"):
        return DataLoader([rows], batch_size=None)
    tensors = TensorDataset(rows["x"], rows["y"], *rows["groups"].values())
    if way == "groups":
        sampler = WholeGroups(rows["groups"], 150)
        return DataLoader(tensors, batch_sampler=sampler)
    return DataLoader(tensors, size, shuffle=True)


def quiet(epochs, **options):
    off = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    off |= {"enable_model_summary": False, "accelerator": "cpu"}
    return Trainer(max_epochs=epochs, **{**off, **options})


def train(found, epochs, rows=None, **options):
    torch.manual_seed(0)
    trainer = quiet(epochs, **options)
    trainer.fit(found, loader(type(found.way).__name__.lower()) if rows is None else rows)
    return trainer


def variances(found):
    return [estimate.value for estimate in found.result.parameters]


@pytest.mark.parametrize(
    ("training", "head"),
    [
        ("alternating", "ml"),
        ("full", "ml"),
        ("groups", "ml"),
        ("composite", "ml"),
        ("full", "gls"),
    ],
)
def test_every_way_of_training_finds_mean_and_variances(training, head):
    """By parts, the steps are those of the full way, see below."""
    rows, full = 150 if training == "groups" else 64, training == "full"
    found = module(head, training, lr=0.06 if full else 0.02, rows=rows)
    train(found, 60 if full else 30)
    sigma2_b, sigma2_e = variances(found)
    assert sigma2_b == pytest.approx(1.5**2, rel=0.6)
    assert sigma2_e == pytest.approx(0.25, rel=0.25)
    new = data(seed=1)
    known = {"x": new["x"], "groups": new["groups"]}
    prediction = found.model.predict(known)
    mean = new["x"][:, 0].sin() + 2 * new["x"][:, 1] + 3
    off = (prediction.population_mean - mean).mean()
    assert float((prediction.population_mean - mean - off).std()) < 0.35
    assert found.history[-1].score_norm < 1e-4


def test_alternating_training_ends_at_the_likelihoods_maximum():
    """With a linear mean the maximum is known: generalised least squares."""
    found, rows = module(mean=nn.Linear(2, 1)), data()
    train(found, 400, loader("full"))
    loss, e, _ = found.model.data(found.model(rows), rows)
    X = torch.cat([rows["x"], torch.ones(600, 1)], 1).double()
    from openreml_nn import fit_reml

    best = fit_reml(loss.covariance, rows["y"].double(), X, method="ml", start="current")
    value = -float(loss(e, e.new_zeros(600, 0))) * 600
    assert best.log_likelihood - value < 0.5
    weights = torch.cat([found.model.mean.weight[0], found.model.mean.bias]).detach()
    gap = (weights.double() - best.fixed.estimate).abs() / best.fixed.std_error
    assert float(gap.max()) < 0.5


@pytest.mark.filterwarnings("ignore:.*which the network has not learned")
@pytest.mark.parametrize("head", ["ml", "gls"])
def test_parts_and_full_take_the_same_steps(head):
    one, other = module(head, "full"), module(head, "parts", rows=37)
    rows = data()
    rows["x"], rows["y"] = rows["x"].double(), rows["y"].double()
    for found in (one, other):
        found.model.double()
        train(found, 5, loader("full", rows))
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_a_checkpoint_predicts_without_the_data(tmp_path):
    found = module()
    trainer = train(found, 3)
    trainer.save_checkpoint(tmp_path / "m.ckpt")
    state = torch.load(tmp_path / "m.ckpt", weights_only=True)["state_dict"]
    other = module()
    other.load_state_dict(state)
    new = {"x": torch.randn(5, 2), "groups": {"g": torch.tensor([0, 3, 19, -1, -1])}}
    for a, b in zip(found.model.predict(new), other.model.predict(new), strict=True):
        torch.testing.assert_close(a, b)
    variance = found.model.predict(new).variance
    assert float(variance[3:].min()) > float(variance[:3].max())
    (predicted,) = trainer.predict(found, torch.utils.data.DataLoader([new], batch_size=None))
    torch.testing.assert_close(predicted.mean, found.model.predict(new).mean)


@pytest.mark.filterwarnings("ignore:.*which the network has not learned")
def test_a_scheduler_steps_each_epoch():
    scheduler = {"_target_": "torch.optim.lr_scheduler.StepLR", "step_size": 1, "gamma": 0.5}
    trainer = train(module(scheduler=scheduler), 3)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.02 / 8)


def test_options_that_do_not_fit():
    with pytest.raises(ValueError, match="`training` is 'magic'"):
        module(training="magic")
    with pytest.raises(ValueError, match="groups training is for head 'ml'"):
        module("gls", training="groups")


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (lambda params: 3, r"`optimizer\(...\)` is 3: expected an Optimizer"),
        (lambda params: torch.optim.SGD(nn.Linear(1, 1).parameters()), "moves none of the model's"),
    ],
)
def test_what_a_function_makes_is_an_optimizer_of_the_model(optimizer, message):
    found = module()
    found = MixedModule(found.model, optimizer, training="full")
    with pytest.raises((TypeError, InputError), match=message):
        train(found, 1)


def test_a_fixed_network_leaves_an_optimizer_nothing_to_alternate_with():
    found = module(training="alternating")
    found.model.mean.requires_grad_(False)
    found = MixedModule(found.model, {"_target_": "torch.optim.Adam"}, training="alternating")
    with pytest.raises(InputError, match="`optimizer` has nothing to train"):
        train(found, 1)


def test_a_network_in_single_precision_has_a_heritability():
    found = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        codes = torch.arange(60) % 10
        y = (torch.randn(10)[codes] + torch.randn(60)).to(dtype)
        mean = nn.Linear(1, 1).to(dtype)
        nn.init.zeros_(mean.weight)
        model = MixedModel(mean, {"g": RandomEffect(10)})
        rows = {"x": torch.ones(60, 1).to(dtype), "y": y, "groups": {"g": codes}}
        own = MixedModule(model, {"_target_": "torch.optim.SGD", "lr": 0.0}, training="full")
        train(own, 1, DataLoader([rows], batch_size=None))
        found.append(heritability(own.result, "g", "cullis").estimate)
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.filterwarnings("ignore:.*training rows have no response")
@pytest.mark.parametrize(
    ("training", "head"),
    [
        ("alternating", "ml"),
        ("full", "ml"),
        ("full", "gls"),
        ("parts", "gls"),
        ("groups", "ml"),
        ("linear", "gls"),
        ("alternating", "gls"),
        ("several", "ml"),
        ("family", "gls"),
    ],
)
def test_two_processes_give_what_one_does(tmp_path, training, head):
    """Loss, gradients, estimates and BLUPs; with full and ml a network for the residual, too."""
    sharing.train(1, training, head, tmp_path / "1.pt")
    done = forked(lambda: sharing.train(2, training, head, tmp_path / "2.pt"), tmp_path)
    assert done.returncode == 0, done.stderr
    one, two = torch.load(tmp_path / "1.pt"), torch.load(tmp_path / "2.pt")
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.filterwarnings("ignore:.*which the network has not learned")
@pytest.mark.parametrize("training", ["alternating", "full", "groups"])
def test_a_run_that_is_resumed_ends_like_one_that_was_not_stopped(tmp_path, training):
    def made():
        mean = nn.Sequential(nn.Linear(2, 16), nn.Dropout(0.2), nn.Tanh(), nn.Linear(16, 1))
        scheduler = {"_target_": "torch.optim.lr_scheduler.StepLR", "step_size": 2}
        return module(mean=mean, training=training, scheduler=scheduler)

    def saving():
        return ModelCheckpoint(tmp_path / "kept", "{epoch}", save_top_k=-1)

    whole = made()
    train(whole, 6, callbacks=[saving()], enable_checkpointing=True)
    resumed = made()
    trainer = quiet(6)
    at = tmp_path / "kept" / "epoch=2.ckpt"
    trainer.fit(resumed, loader(training), ckpt_path=at, weights_only=True)
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.filterwarnings("ignore:.*which the network has not learned")
def test_the_network_never_sees_more_rows_than_a_part():
    seen = []

    class Watched(nn.Linear):
        def forward(self, x):
            seen.append(len(x))
            return super().forward(x)

    train(module(mean=Watched(2, 1), training="parts", rows=50), 2)
    assert max(seen) == 50


def test_mixed_precision_is_the_networks_alone():
    found = module(rows=64)
    train(found, 30, precision="bf16-mixed")
    assert {p.dtype for p in found.model.covariance_parameters()} == {torch.float64}
    sigma2_b, sigma2_e = variances(found)
    assert sigma2_b == pytest.approx(1.5**2, rel=0.6)
    assert sigma2_e == pytest.approx(0.25, rel=0.25)


@pytest.mark.parametrize("way", ["network by L-BFGS", "plateau"])
def test_any_optimizer_and_scheduler(way):
    if way == "plateau":
        found = module(scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau)
    else:
        found = module(training="full")
        found = MixedModule(found.model, {"_target_": "torch.optim.LBFGS", "lr": 0.1}, "full")
    train(found, 15)
    sigma2_b, sigma2_e = variances(found)
    assert sigma2_b == pytest.approx(1.5**2, rel=0.6)
    assert sigma2_e == pytest.approx(0.25, rel=0.3)


def test_batches_of_whole_groups_cut_none_and_hold_every_row_once():
    groups = {"a": torch.randint(0, 30, (500,))}
    groups["b"] = groups["a"] * 3 + torch.randint(0, 3, (500,))
    sets = connected_rows(groups)
    assert torch.equal(sets, torch.unique(groups["a"], return_inverse=True)[1])
    found = whole(sets, 100, torch.Generator().manual_seed(0))
    assert len(found) == 5
    assert torch.equal(torch.cat(found).sort().values, torch.arange(500))
    where = {int(g): i for i, at in enumerate(found) for g in groups["a"][at]}
    assert all(where[int(g)] == i for i, at in enumerate(found) for g in groups["a"][at])
    assert not torch.equal(found[0], whole(sets, 100, torch.Generator().manual_seed(1))[0])


def test_groups_add_up_to_the_likelihood_of_all_rows():
    found, rows = module(training="groups"), data()
    parts = whole(connected_rows(rows["groups"]), 100, torch.Generator().manual_seed(0))
    total = sum(float(found.model.loss(take(rows, at)).detach()) * len(at) for at in parts)
    assert total == pytest.approx(float(found.model.loss(rows).detach()) * 600, rel=1e-6)


def test_mini_batches_that_cannot_be():
    one_level = {
        "x": torch.randn(30, 2),
        "y": torch.randn(30),
        "groups": {"g": torch.full((30,), 4)},
    }
    one_level = loader("full", one_level)
    with pytest.raises(InputError, match=r"training batch 0: it has one level of 'g' in 30 rows"):
        train(module(training="groups"), 1, one_level)
    with pytest.raises(InputError, match=r"level \d+ of 'g' is in more than one mini-batch.*Whole"):
        train(module(training="groups"), 1, loader())
    related = MixedModel(nn.Linear(2, 1), {"g": RandomEffect(20, KnownMatrix(kinship(20)))})
    with pytest.raises(InputError, match="levels of 'g' are correlated"):
        MixedModule(related, training="groups")
    with pytest.raises(InputError, match=r"batch 1: the loader yields several batches.*all rows"):
        train(module(training="full"), 1, loader())


def test_blups_and_the_path_of_the_variances_are_written(tmp_path):
    found = module()
    callbacks = [TraceVariances(tmp_path / "trace.csv"), ExportBLUPs(tmp_path / "blup.csv")]
    train(found, 3, callbacks=callbacks)
    trace = pd.read_csv(tmp_path / "trace.csv")
    assert len(trace) == len(found.history) > 3
    assert trace["residual/sigma^2"].iloc[-1] == pytest.approx(variances(found)[1])
    blups = pd.read_csv(tmp_path / "blup.csv")
    torch.testing.assert_close(
        torch.tensor(blups["blup"].to_numpy()), found.model.random["g"].blup[:, 0]
    )
    assert blups["level"].tolist() == list(range(20))
    assert (blups["std_error"] > 0).all()


@pytest.mark.filterwarnings("ignore:.*which the network has not learned")
@pytest.mark.parametrize("training", ["alternating", "full", "groups"])
def test_training_ends_with_the_blups_of_its_last_mean_and_variances(training):
    found = module(training=training)
    train(found, 3)
    effect = found.model.random["g"]
    blup, variance = effect.blup.clone(), effect.variance.clone()
    found.model.update(data())
    torch.testing.assert_close(blup, effect.blup, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(variance, effect.variance, rtol=1e-6, atol=1e-8)
