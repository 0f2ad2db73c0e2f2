"""The faults of all rooms."""

from tests.faults import covariance, estimation, likelihood, network, program
from tests.faults.fault import Fault

FAULTS: list[Fault] = [
    fault
    for room in (covariance, likelihood, estimation, network, program)
    for fault in room.FAULTS
]
