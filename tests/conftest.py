"""What all tests share."""

import gc
import os

import hypothesis
import pytest
import torch

# HYPOTHESIS_PROFILE=thorough looks for new counterexamples.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=2000)
hypothesis.settings.register_profile("fuzz", deadline=None, max_examples=20_000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "tests"))
# The runner uses every core for a test of its own.
torch.set_num_threads(1)


def pytest_collection_finish():
    """What is imported stays: the collector of garbage need not walk it, nor a fork copy it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _double():
    """Random numbers in double precision, the same in every run."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
    ),
]


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param
