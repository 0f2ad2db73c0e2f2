"""Rows without a response: they are predicted, and otherwise as if they were not there."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from openreml_nn import InputError, MixedModel, RandomEffect
from openreml_nn.covariance import AR1Matrix
from openreml_nn.families import Beta, Binomial, Poisson
from openreml_nn.lightning import MixedModule
from openreml_nn.model import take
from tests.test_neural import quiet

MISSING = torch.tensor([0, 7, 8, 23, 59])
LEFT = torch.tensor([i for i in range(60) if i not in MISSING.tolist()])


def batch(seed=0, n=60):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    g = torch.randint(0, 8, (n,), generator=generator)
    g[-1] = -1
    b = torch.randn(8, generator=generator, dtype=torch.float64)
    e = torch.randn(n, generator=generator, dtype=torch.float64)
    y = x[:, 0] + torch.where(g < 0, 0, b[g.clamp(min=0)]) + e / 2
    weights = 0.5 + torch.rand(n, generator=generator, dtype=torch.float64)
    return {"x": x, "y": y, "groups": {"g": g}, "weights": weights, "offset": x[:, 1] / 3}


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)).double()


def linear(outputs=1):
    torch.manual_seed(1)
    return nn.Linear(2, outputs).double()


def unweighted(rows):
    return {key: value for key, value in rows.items() if key != "weights"}


def of_gaussian():
    return MixedModel(network(), {"g": RandomEffect(8)}), batch()


def of_gls():
    return MixedModel(linear(3), {"g": RandomEffect(8)}, head="gls"), batch()


def of_features():
    effect = RandomEffect(8, effects=2, features=linear(2))
    return MixedModel(linear(), {"g": effect}, linear()), batch()


def of_slopes():
    rows = batch()
    effect = RandomEffect(8, effects=2)
    return MixedModel(linear(), {"g": effect}), {**rows, "values": {"g": rows["x"]}}


def of_groups():
    rows = batch()
    rows["groups"]["g"] = rows["groups"]["g"].clamp(min=0)
    rows = {**rows, "residual": torch.arange(60)}
    return MixedModel(linear(), {"g": RandomEffect(8)}, AR1Matrix(6).double()), rows


def of_binary():
    rows = unweighted(batch())
    return MixedModel(network(), {"g": RandomEffect(8)}, family=Binomial()), {
        **rows,
        "y": (rows["y"] > 0).double(),
    }


def of_counts():
    rows = unweighted(batch())
    y = torch.stack([(rows["y"] > 0).double(), torch.ones(60).double()], 1)
    model = MixedModel(linear(2), {"g": RandomEffect(8)}, head="gls", family=Binomial())
    return model, {**rows, "y": y}


def of_poisson():
    rows = unweighted(batch())
    y = rows["y"].exp().round()
    return MixedModel(linear(), {"g": RandomEffect(8)}, family=Poisson()), {**rows, "y": y}


def of_beta():
    rows = unweighted(batch())
    return MixedModel(linear(), {"g": RandomEffect(8)}, family=Beta()), {
        **rows,
        "y": rows["y"].sigmoid(),
    }


MODELS = [
    of_gaussian, of_gls, of_features, of_slopes, of_groups, of_binary, of_counts, of_poisson,
    of_beta,
]  # fmt: skip


def without(rows):
    """The rows with missing responses, and the same without these rows."""
    y = rows["y"].clone()
    y[MISSING] = torch.nan
    if y.dim() == 2:
        y[MISSING[0], 1] = 3.0  # one column that is missing is enough
    return {**rows, "y": y}, take(rows, LEFT)


@pytest.mark.filterwarnings("ignore:.*rows have no response")
@pytest.mark.parametrize("made", MODELS)
def test_a_missing_response_is_a_row_that_is_not_there(made):
    """Loss, gradients, BLUPs, variances and predictions."""
    found = []
    for i in range(2):
        model, rows = made()
        whole, some = without(rows), take(rows, LEFT)
        loss = model.loss(whole[0] if i == 0 else some)
        loss.backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.update(whole[0] if i == 0 else some)
        effect = model.random["g"]
        predicted = model.predict(rows)
        values = [loss.detach(), *gradients, effect.blup, effect.variance, *predicted]
        if model.family is None:
            objective = model.objective(whole[0] if i == 0 else some)
            values.append(objective.evaluate().log_likelihood)
        found.append([torch.as_tensor(v) for v in values])
    assert len(found[0]) > 6
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*rows have no response")
def test_the_gradient_in_parts_is_that_of_the_rows_with_a_response():
    model, rows = of_slopes()
    whole, some = without(rows)
    found = []
    for way in (whole, some):
        model.zero_grad()
        model.backward_in_parts(way, 13)
        found.append([p.grad.clone() for p in model.parameters()])
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-12)


def test_they_are_counted_in_one_line():
    model, rows = of_gaussian()
    with pytest.warns(RuntimeWarning, match="^5 of 60 rows have no response") as caught:
        model.update(without(rows)[0])
    assert len(caught) == 1


def test_the_log_density_of_a_missing_response_is_missing():
    for made in (of_gls, of_poisson):
        model, rows = made()
        model.update(rows)
        whole = without(rows)[0]
        density, expected = model.log_density(whole), model.log_density(rows)
        assert bool(density[MISSING].isnan().all())
        torch.testing.assert_close(density[LEFT], expected[LEFT], rtol=1e-12, atol=1e-12)


WAYS = {
    "alternating": ("ml", None),
    "composite": ("ml", None),
    "full": ("gls", None),
    "parts": ("ml", None),
    "family": ("ml", Poisson()),
}


def trained(way, batches):
    head, family = WAYS[way]
    mean = linear(2 if head == "gls" else 1)
    model = MixedModel(mean, {"g": RandomEffect(8)}, head=head, family=family)
    adam = {"_target_": "torch.optim.Adam", "lr": 0.02}
    module = MixedModule(model, adam, "full" if way == "family" else way)
    quiet(2).fit(module, DataLoader(batches, batch_size=None))
    return module


@pytest.mark.parametrize("way", WAYS)
def test_training_leaves_them_out(way):
    """In batches of 20, of which the middle one has no response at all in mini-batches."""
    rows = batch() if way != "family" else of_poisson()[1]
    rows["groups"]["g"] = rows["groups"]["g"].clamp(min=0)
    parts = [LEFT]
    if way in ("alternating", "composite"):
        parts = [torch.arange(2, 20), torch.arange(40, 60)]
    left = torch.cat(parts)
    y = torch.full_like(rows["y"], torch.nan)
    y[left] = rows["y"][left]
    whole = {**rows, "y": y}
    batches = [whole]
    if len(parts) > 1:
        batches = [take(whole, slice(i, i + 20)) for i in (0, 20, 40)]
    with pytest.warns(RuntimeWarning, match=f"^{60 - len(left)} of 60 training rows") as caught:
        one = trained(way, batches)
    assert sum("no response" in str(w.message) for w in caught) == 1
    other = trained(way, [take(rows, part) for part in parts])
    for (name, a), b in zip(
        one.model.state_dict().items(), other.model.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10, msg=name)


def test_an_optimizer_that_asks_for_a_loss_again_counts_them_once():
    rows = batch()
    rows["y"][:7] = torch.nan
    rows["groups"]["g"] = rows["groups"]["g"].clamp(min=0)
    model = MixedModel(linear(), {"g": RandomEffect(8)})
    module = MixedModule(model, lambda p: torch.optim.LBFGS(p, max_iter=3), "alternating")
    batches = [take(rows, slice(i, i + 20)) for i in (0, 20, 40)]
    with pytest.warns(RuntimeWarning, match="^7 of 60 training rows"):
        quiet(1).fit(module, DataLoader(batches, batch_size=None))


def broken(key, value, row=4, of=batch):
    rows = of()
    target = rows[key]
    if isinstance(target, dict):
        changed = target["g"].clone()
        changed[row] = value
        return {**rows, key: {"g": changed}}
    changed = target.clone()
    changed[row] = value
    return {**rows, key: changed}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("y", torch.inf, r"`batch\['y'\]` is inf in row 4: expected finite numbers, or NaN"),
        ("x", torch.nan, r"`batch\['x'\]` is nan in row 4: expected finite numbers"),
        ("weights", torch.nan, r"`batch\['weights'\]` is nan in row 4: expected finite"),
        ("weights", 0.0, r"`batch\['weights'\]` is 0 in row 4: expected above 0"),
        ("offset", -torch.inf, r"`batch\['offset'\]` is -inf in row 4: expected finite"),
        ("values", torch.nan, r"`batch\['values'\]\['g'\]` is nan in row 4: expected finite"),
    ],
)
def test_other_numbers_that_are_not_finite_are_named(key, value, message):
    model, _ = of_slopes()
    rows = broken(key, value, of=lambda: of_slopes()[1])
    for call in (model.loss, model.update, model.objective):
        with pytest.raises(InputError, match=message):
            call(rows)


@pytest.mark.filterwarnings("ignore:.*rows have no response")
def test_ragged_batches_are_named():
    model, rows = of_slopes()
    whole = without(rows)[0]
    for key, part in (("weights", rows["weights"][1:]), ("x", rows["x"][1:])):
        with pytest.raises(InputError, match=rf"`batch\['{key}'\]` is .*: expected 60 rows"):
            model.loss({**whole, key: part})
    with pytest.raises(InputError, match=r"`batch\['groups'\]\['g'\]` is .*: expected 60 rows"):
        model.loss({**whole, "groups": {"g": rows["groups"]["g"][1:]}})
    with pytest.raises(InputError, match=r"`batch\['y'\]` is NaN in all 60 rows"):
        model.loss({**rows, "y": torch.full_like(rows["y"], torch.nan)})


def test_inputs_of_a_class_of_their_own_need_rows_only_where_one_is_missing():
    class Points:
        def __init__(self, x):
            self.x = x

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = linear()

        def forward(self, points):
            return self.inner(points.x)

    _, rows = of_gaussian()
    model = MixedModel(Network(), {"g": RandomEffect(8)})
    rows = {**rows, "x": Points(rows["x"])}
    assert torch.isfinite(model.loss(rows))
    y = rows["y"].clone()
    y[3] = torch.nan
    with pytest.raises(InputError, match=r"`batch\['x'\]` is a Points, of which no rows"):
        model.loss({**rows, "y": y})
