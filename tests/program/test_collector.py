"""The garbage collector during the start of the program."""

import gc

import pytest

from openreml_nn.program.collector import started, starting


@pytest.fixture
def aside():
    """The number of objects that the collector leaves aside, beyond those of before."""
    gc.collect()  # garbage that is left aside would stay
    before = gc.get_freeze_count()
    yield lambda: gc.get_freeze_count() - before
    gc.enable()


def test_the_collector_rests_until_the_start_is_over(aside):
    starting()
    assert not gc.isenabled()
    imported = [[] for _ in range(10_000)]
    started()
    assert gc.isenabled()
    assert aside() > len(imported)


def test_a_collector_that_works_is_left_as_it_is(aside):
    started()  # of a second run in a process, or of a program that calls this one
    assert gc.isenabled()
    assert aside() == 0
