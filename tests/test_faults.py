"""The list of faults is alive: each can still be made. ``python -m tests.faults`` plants them."""

from tests.faults.every import FAULTS, outdated


def test_every_fault_can_still_be_made():
    assert outdated(FAULTS) == []
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 60
    assert all(fault.old != fault.new for fault in FAULTS)
