"""The garbage collector during the start of the program."""

import gc

import pytest

from openreml_nn.program.collector import resting


@pytest.fixture
def aside():
    """The number of objects that the collector leaves aside, beyond those of before."""
    gc.collect()  # garbage that is left aside would stay
    before = gc.get_freeze_count()
    yield lambda: gc.get_freeze_count() - before
    gc.enable()


def test_the_collector_rests_until_the_start_is_over(aside):
    wake = resting()
    assert not gc.isenabled()
    imported = [[] for _ in range(10_000)]
    wake()
    assert gc.isenabled()
    assert aside() > len(imported)
    more = aside()
    wake()  # of a second run of a sweep
    assert gc.isenabled()
    assert aside() <= more


def test_a_collector_that_rested_is_left_as_it_is(aside):
    gc.disable()
    resting()()
    assert not gc.isenabled()
    assert aside() == 0
