"""Names by which estimates are found, each of one thing."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["distinct"]


def distinct(names: Iterable[str]) -> tuple[str, ...]:
    """The names, where one that came before gets a number, as R's make.unique has it.

    >>> distinct(["fb", "fb", "x", "fb.1"])
    ('fb', 'fb.2', 'x', 'fb.1')
    """
    given = list(names)
    taken = set(given)
    found: dict[str, None] = {}
    for name in given:
        own, count = name, 0
        while own in found or (count and own in taken):
            count += 1
            own = f"{name}.{count}"
        found[own] = None
    return tuple(found)
