"""The faults of all rooms."""

from collections.abc import Sequence
from pathlib import Path

from tests.faults import covariance, estimation, inference, likelihood, network, program
from tests.faults.fault import ROOT, Fault

__all__ = ["FAULTS", "outdated"]

FAULTS: list[Fault] = [
    fault
    for room in (covariance, likelihood, estimation, inference, network, program)
    for fault in room.FAULTS
]


def outdated(faults: Sequence[Fault], root: Path = ROOT) -> list[str]:
    """A line for each fault whose text has moved."""
    found = []
    for fault in faults:
        try:
            fault.planted(root)
        except ValueError as error:
            found.append(str(error))
    return found
