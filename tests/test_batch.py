"""What a batch holds is read by the model, or refused by name."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from openreml_nn import InputError, MixedModel, RandomEffect
from openreml_nn.covariance import AR1Matrix, ScalarMatrix
from openreml_nn.families import Binomial
from openreml_nn.lightning import MixedModule
from openreml_nn.lightning.batches import connected_rows
from tests.test_neural import quiet

N = 24


def rows(**more):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, 2, generator=generator).double()
    y = torch.bernoulli(torch.full((N,), 0.5), generator=generator).double()
    return {"x": x, "y": y, "groups": {"g": torch.arange(N) % 4}, **more}


def model(kind):
    torch.manual_seed(0)
    mean, effect = nn.Linear(2, 3 if kind == "several" else 1).double(), RandomEffect(4)
    options = {
        "family": {"family": Binomial()},
        "network": {"residual": nn.Linear(2, 1).double()},
        "several": {"responses": 3},
        "several of one variance": {"responses": 3, "residual": ScalarMatrix(1).double()},
        "linear": {"head": "gls"},
    }.get(kind, {})
    if kind == "several of one variance":
        mean = nn.Linear(2, 3).double()
    if kind == "linear":
        mean = nn.Identity()
    if kind == "features":
        effect = RandomEffect(4, effects=2, features=nn.Linear(2, 2).double())
    return MixedModel(mean, {"g": effect}, **options)


def response(kind):
    y = rows()["y"]
    return (
        torch.stack([y, 2 * y + rows()["x"][:, 0], 1 - y + rows()["x"][:, 1]], 1)
        if kind.startswith("several")
        else y
    )


IDLE = {
    "residual": (
        {"residual": torch.arange(N)},
        ["plain", "family", "network", "several", "several of one variance", "linear"],
    ),
    "covariate": ({"covariate": torch.ones(N).double()}, ["plain", "family", "several", "linear"]),
    "places": ({"places": {"g": torch.zeros(N, 2)}}, ["plain", "family", "several", "linear"]),
    "values": ({"values": {"g": torch.ones(N, 2).double()}}, ["features"]),
    "zi": ({"zi": torch.ones(N, 1)}, ["plain", "family", "several", "linear"]),
}


@pytest.mark.parametrize(
    ("key", "kind"), [(key, kind) for key, (_, kinds) in IDLE.items() for kind in kinds]
)
def test_a_part_that_the_model_does_not_read_is_refused(key, kind):
    found, good = model(kind), rows(y=response(kind))
    bad = {**good, **IDLE[key][0]}
    message = rf"`batch\['{key}'\]"
    found.update(good)
    calls = [found.loss, found.update, found.predict, found.covariance, found.log_density]
    if kind != "family":
        calls += [found.objective, found.add]
    for call in calls:
        with pytest.raises(InputError, match=message):
            call(bad)


@pytest.mark.parametrize("stage", ["fit", "validate", "predict"])
@pytest.mark.parametrize("kind", ["plain", "linear", "family", "several"])
def test_a_loaders_batch_with_such_a_part_is_refused_by_its_number(kind, stage):
    good = rows(y=response(kind))
    bad = {**good, "residual": torch.arange(N)}
    training = "full" if kind == "several" else None
    module, trainer = MixedModule(model(kind), training=training), quiet(1)
    loader = DataLoader([bad], batch_size=None)
    module.model.update(good)
    name = {"fit": "training", "validate": "validation", "predict": "prediction"}[stage]
    with pytest.raises(InputError, match=rf"{name} batch 0: `batch\['residual'\]"):
        getattr(trainer, stage)(module, loader)


@pytest.mark.parametrize("kind", ["plain", "family", "several", "linear"])
def test_codes_of_a_factor_that_the_model_does_not_have_are_said(kind):
    made, own = model(kind), rows(y=response(kind))
    more = {**own, "groups": {**own["groups"], "h": own["groups"]["g"]}}
    message = (
        r"batch\['groups'\] has 'h', of which the model has no random effect: they are \['g'\]"
    )
    made.update(own)
    for call in (made.loss, made.update, made.predict, made.covariance):
        with pytest.warns(UserWarning, match=message):
            call(more)
    with pytest.warns(UserWarning, match=message):  # and nothing else: several models may share it
        torch.testing.assert_close(made.loss(more), made.loss(own), rtol=0, atol=0)


def test_cells_are_read_where_residuals_are_correlated():
    cells = {"residual": torch.arange(N)}
    found = MixedModel(nn.Linear(2, 1).double(), {"g": RandomEffect(4)}, AR1Matrix(6).double())
    found.update(rows(**cells))
    assert torch.isfinite(found.loss(rows(**cells)))


def test_no_values_are_none_as_no_weights_are():
    """In a likelihood, in predictions and in a loader's batches."""
    for kind in ("plain", "family", "several", "features"):
        found, good = model(kind), rows(y=response(kind))
        for key in ("values", "places", "weights", "offset", "residual", "zi"):
            none = {**good, key: None}
            assert torch.equal(found.loss(none), found.loss(good))
            found.update(none)
            assert torch.equal(found.predict(none).mean, found.predict(good).mean)
    none = {**rows(), "values": None, "places": None}
    fits = []
    for batch in (none, rows()):
        module = MixedModule(model("plain"))
        quiet(2).fit(module, DataLoader([batch], batch_size=None))
        fits.append(module.result.log_likelihood)
    assert fits[0] == fits[1]
    slopes = MixedModel(nn.Linear(2, 1).double(), {"g": RandomEffect(4, effects=2)})
    with pytest.raises(InputError, match="expected their values"):
        slopes.loss({**rows(), "values": None})


NARROW = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16)


@pytest.mark.parametrize("dtype", NARROW)
def test_codes_may_be_any_integers(dtype):
    """As many rows as levels are of one batch: torch takes ``uint8`` of their number for a mask."""
    first = torch.arange(N) < 4
    cells = torch.arange(N).flip(0)
    random = {"g": RandomEffect(4), "h": RandomEffect(4)}
    found = MixedModel(nn.Linear(2, 1).double(), random, residual=AR1Matrix(24).double())
    wide = rows(groups={"g": torch.arange(N) % 4, "h": torch.arange(N) // 6}, residual=cells)
    codes = {name: own.to(dtype) for name, own in wide["groups"].items()}
    for batch in (
        {**wide, "groups": codes},
        {**wide, "residual": cells.to(dtype)},
        {**wide, "groups": codes, "residual": cells.to(dtype)},
    ):
        assert torch.equal(found.loss(batch), found.loss(wide))
    found.update({**wide, "groups": codes})
    some = {"x": wide["x"][first], "groups": {k: v[first] for k, v in codes.items()}}
    expected = found.predict({**some, "groups": {k: v.long() for k, v in some["groups"].items()}})
    assert torch.equal(found.predict(some).mean, expected.mean)


@pytest.mark.parametrize("training", ["alternating", "groups", "composite", "full"])
def test_loaders_codes_may_be_any_integers(training):
    fits = []
    for dtype in (torch.int64, torch.uint8):
        data = rows(groups={"g": (torch.arange(N) % 4).to(dtype)})
        torch.manual_seed(0)
        module = MixedModule(model("plain"), training=training)
        batches = [{**data, "y": data["x"][:, 0] + data["groups"]["g"]}]
        quiet(1).fit(module, DataLoader(batches, batch_size=None))
        fits.append(module.result.log_likelihood)
    assert fits[0] == fits[1]


def test_groups_of_narrow_codes_with_many_unknown_levels_are_kept_whole():
    codes = torch.cat([torch.full((300,), -1), torch.arange(20).repeat(2)])
    sets = connected_rows({"g": codes})
    assert torch.equal(connected_rows({"g": codes.to(torch.int8)}), sets)
    assert len(sets.unique()) == 320
