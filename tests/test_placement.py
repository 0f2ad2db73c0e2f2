"""Where a model's numbers are and how precise: predictions follow, and a model without values says so."""

import pytest
import torch
from torch import nn

from openreml_nn import InputError, MixedModel, RandomEffect
from openreml_nn.families import Poisson


def rows(dtype=torch.float64, n=40):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    codes = torch.randint(0, 5, (n,), generator=generator)
    y = x[:, 0] + torch.randn(5, generator=generator, dtype=torch.float64)[codes]
    y = y + torch.randn(n, generator=generator, dtype=torch.float64)
    return {"x": x.to(dtype), "y": y.to(dtype), "groups": {"g": codes}}


def model_of(head="ml", **options):
    torch.manual_seed(0)
    mean = nn.Identity() if head == "gls" else nn.Linear(2, 1).double()
    return MixedModel(mean, {"g": RandomEffect(5)}, head=head, **options)


@pytest.mark.parametrize("head", ["ml", "gls"])
@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
    ],
)
@pytest.mark.parametrize("before", [True, False])
def test_predictions_are_as_precise_as_the_model(head, dtype, expected, before):
    # As the likelihood they are of float32 at least, whenever the model was converted.
    exact = model_of(head)
    exact.update(rows())
    wanted = exact.predict(rows())
    model = model_of(head)
    if before:
        model = model.to(dtype)
        model.update(rows(dtype))
    else:
        model.update(rows())
        model = model.to(dtype)
    found = model.predict(rows(dtype))
    assert {value.dtype for value in found} == {expected}
    assert model.loss(rows(dtype)).dtype == expected
    rough = 100 * torch.finfo(dtype).eps
    for own, value in zip(wanted, found, strict=True):
        torch.testing.assert_close(value.double(), own, rtol=rough, atol=rough)


def test_a_network_in_single_precision_beside_a_covariance_in_double():
    model = model_of()
    model.mean.float()
    model.update(rows() | {"x": rows()["x"].float()})
    found = model.predict({"x": rows()["x"].float(), "groups": rows()["groups"]})
    assert found.mean.dtype == found.variance.dtype == torch.float64


def test_expectations_of_a_family_are_as_precise_as_the_model():
    model = model_of(family=Poisson()).float()
    data = rows(torch.float32)
    data["y"] = data["y"].exp().round()
    model.update(data)
    assert {value.dtype for value in model.predict(data)} == {torch.float32}


@pytest.mark.parametrize("head", ["ml", "gls"])
def test_a_model_without_values_says_so(head):
    with torch.device("meta"):
        empty = model_of(head)
    trained = model_of(head)
    trained.update(rows())
    for model in (empty, trained.to("meta")):
        for method in (model.predict, model.update, model.log_density):
            with pytest.raises(InputError, match="the model is on the meta device") as caught:
                method(rows())
            assert "\n" not in str(caught.value)
        with pytest.raises(InputError, match="meta"):
            model.loss(rows())


@pytest.mark.parametrize("head", ["ml", "gls"])
def test_parameters_alone_without_values(head):
    # As those who load large models make them: buffers have values then.
    model = model_of(head)
    model.random["g"].g.to("meta")
    with pytest.raises(InputError, match="meta device"):
        model.loss(rows())
    with pytest.raises(InputError, match="meta device"):
        model.predict(rows())


@pytest.mark.parametrize("head", ["ml", "gls"])
def test_a_model_that_was_made_without_values_takes_a_checkpoint(head):
    trained = model_of(head)
    trained.update(rows())
    wanted, state = trained.predict(rows()), trained.state_dict()
    with torch.device("meta"):
        assigned, filled = model_of(head), model_of(head)
    assigned.load_state_dict(state, assign=True)
    filled.to_empty(device="cpu").load_state_dict(state)
    for model in (assigned, filled):
        for own, value in zip(wanted, model.predict(rows()), strict=True):
            torch.testing.assert_close(value, own, rtol=0, atol=0)
        torch.testing.assert_close(model.loss(rows()), trained.loss(rows()), rtol=0, atol=0)
