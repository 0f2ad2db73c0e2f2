"""What a batch holds is read by the model, or refused by name."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from openreml_nn import InputError, MixedModel, RandomEffect
from openreml_nn.covariance import AR1Matrix, ScalarMatrix
from openreml_nn.families import Binomial
from openreml_nn.lightning import MixedModule
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
    return torch.stack([y, 2 * y, 1 - y], 1) if kind.startswith("several") else y


IDLE = {
    "residual": (
        {"residual": torch.arange(N)},
        ["plain", "family", "network", "several", "several of one variance", "linear"],
    ),
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
