"""Names by which estimates are found, each of one thing."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations

__all__ = ["distinct", "shortened", "stands_for"]


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


def stands_for(name: str, path: str) -> bool:
    """Whether the parts of a name are those of a path in their order, the first and last alike.

    >>> stands_for("g/rho", "g/g/effects/rho")
    True
    """
    parts, whole = name.split("/"), path.split("/")
    if len(parts) < 2 or parts[0] != whole[0] or parts[-1] != whole[-1]:
        return False
    rest = iter(whole[1:-1])
    return all(part in rest for part in parts[1:-1])


def shortened(paths: Iterable[str]) -> dict[str, str]:
    """For each path the shortest name that stands for it alone, with fewest and earliest parts.

    >>> shortened(["r/g/row/rho", "r/g/col/rho", "r/g/col/sigma^2", "theta"])
    {'r/g/row/rho': 'r/row/rho', 'r/g/col/rho': 'r/col/rho', 'r/g/col/sigma^2': 'r/sigma^2', 'theta': 'theta'}
    """
    given = list(paths)
    found = {}
    for path in given:
        first, *rest = path.split("/")
        names = ["/".join([first, *middle, rest[-1]]) for k in range(len(rest))
                 for middle in combinations(rest[:-1], k)] if rest else []  # fmt: skip
        found[path] = next(
            (n for n in names if n not in given and sum(stands_for(n, p) for p in given) == 1), path
        )
    return found
