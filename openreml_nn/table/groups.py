"""The random effects of a table: the level of each row, and the values of the effects there."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from openreml_nn.support.errors import InputError
from openreml_nn.table.algebra import Part
from openreml_nn.table.coordinates import numeric_levels, spline_columns
from openreml_nn.table.encoded import RandomDesign
from openreml_nn.table.formula import RandomPart
from openreml_nn.table.grouping import Grouping
from openreml_nn.table.lags import check_lags, whole_lags
from openreml_nn.table.learned import Group, Learned
from openreml_nn.table.levels import Factor
from openreml_nn.table.matrix import model_matrix
from openreml_nn.table.members import levels_of_all, member_codes, member_values
from openreml_nn.table.relation import Graph, Known, Places, Walk, check_graph, check_kernel
from openreml_nn.table.rows import TableRows
from openreml_nn.table.structure import GRAPHS, KERNELS, ORDERED, WALKS, Structure
from openreml_nn.table.syntax import Call, Name, Number, Operation

#: Whole times of a random walk may span so many steps, each of which is a level.
_MOST_TIMES = 1_000_000

__all__ = ["check_relations", "grow_groups", "ordered_effects", "random_designs", "skeletons"]


def _operands(parts: Sequence[RandomPart]) -> list[tuple[str, RandomPart]]:
    """Each random part with a unique operand name, without '/' and '.'."""
    found = []
    used = {"residual": 1, "units": 1}
    for part in parts:
        base = re.sub(r"[/.]", "_", part.grouping.operand)
        name = f"{base}_{used[base]}" if base in used else base
        used[base] = used.get(base, 0) + 1
        found.append((name, part))
    return found


def check_relations(parts: Sequence[RandomPart], relations: Mapping[str, Known]) -> None:
    """Compare the known matrices with those that a formula names.

    Raises:
        InputError: if one is missing, has no place in the formula, or is not what is said of it
            there: a covariance, or a graph.
    """
    needed = {_needed(part.grouping): part for part in parts if _needed(part.grouping)}
    for name, part in needed.items():
        if name not in relations:
            how = "`pedigree`" if name == "ped" else f"a matrix {name!r} in `kernels`"
            raise InputError(f"{part.grouping.key} needs {how}: there is none")
    for part in parts:
        relation, name = part.grouping.relation, part.grouping.kernel
        if name is not None and relation is not None:
            if relation.name in GRAPHS:
                check_graph(f"kernel {name!r}", relations[name])
            else:
                inverse = bool(relation.options.get("inverse"))
                check_kernel(f"kernel {name!r}", relations[name], inverse)
    for name in relations:
        if name not in needed:
            what = "`pedigree`" if name == "ped" else f"`kernels` has {name!r}, which"
            use = "(1 | ped(animal))" if name == "ped" else f"(1 | vm(level, {name}))"
            raise InputError(f"{what} is not in the formula: expected {use} there")


def _needed(grouping: Grouping) -> str | None:
    if grouping.relation is None or grouping.relation.name not in ("ped", "vm", *GRAPHS):
        return None
    return grouping.kernel or "ped"


def ordered_effects(part: RandomPart, data: TableRows) -> RandomPart:
    """The part where a column of numbers is a factor, as structures in an order take it."""
    if part.structure.name not in (*ORDERED, "fa") or isinstance(part.effects, tuple):
        return part
    (column, *rest) = part.effects.variables or (Number(1.0),)
    if rest or not isinstance(column, Name):
        return part
    if data.kind(column.name) not in ("number", "dates"):
        return part
    factor = Call("factor", ((None, column),))
    effects = Part(Operation("+", (Number(0.0), factor)), part.effects.formula)
    return RandomPart(effects, part.grouping, part.structure)


def random_designs(
    parts: Sequence[RandomPart],
    data: TableRows,
    learned: Learned,
    relations: Mapping[str, Known],
) -> tuple[RandomDesign, ...]:
    """The designs of the random parts for the rows of a table; what is new is learned."""
    designs: list[RandomDesign] = []
    grouped: dict[str, tuple[Tensor, tuple[str, ...], Known | Places | Graph | Walk | None]] = {}
    for name, part in _operands(parts):
        grouping = part.grouping
        if grouping.key not in grouped:
            grouped[grouping.key] = _levels(grouping, data, learned, relations)
        codes, levels, relation = grouped[grouping.key]
        if grouping.bent:
            values, effects = spline_columns(grouping, data)
            learned.effects[name] = list(effects)
            z, idv = torch.from_numpy(values), Structure("idv")
            designs.append(RandomDesign(name, part.group, effects, levels, codes, z, idv))
            continue
        values, effects = _values(part, data)
        if not effects:
            raise data.fault(f"{part} has no effect")
        learned.effects[name] = list(effects)
        places = _places(part, data, effects)
        if places is not None:
            learned.places[name] = list(places)
        _check_structure(part, effects, data)
        z = torch.from_numpy(values)
        designs.append(
            RandomDesign(
                name, part.group, effects, levels, codes, z, part.structure, places, relation,
                _coordinates(grouping, data),
            )
        )  # fmt: skip
    return tuple(designs)


def grow_groups(parts: Sequence[RandomPart], data: TableRows, learned: Learned) -> None:
    """Take in the levels that rows have of groups of independent levels."""
    for grouping in {part.grouping.key: part.grouping for part in parts}.values():
        if grouping.relation is None and grouping.members:
            every = [label for name in grouping.columns for label in data.labels(name).labels()]
            known = learned.groups[grouping.key]
            learned.groups[grouping.key] = known.grown((label,) for label in dict.fromkeys(every))
        elif grouping.relation is None:
            labels = [data.labels(name).labels() for name in grouping.columns]
            rows = pd.DataFrame(dict(enumerate(labels))).drop_duplicates()
            known = learned.groups[grouping.key]
            learned.groups[grouping.key] = known.grown(rows.itertuples(index=False, name=None))


def skeletons(parts: Sequence[RandomPart], rows: int, learned: Learned) -> tuple[RandomDesign, ...]:
    """The designs of random parts with the learned shapes, without the rows of a table."""
    found = []
    for name, part in _operands(parts):
        grouping = part.grouping
        effects = tuple(learned.effects[name])
        levels = learned.groups[grouping.key].labels
        codes = torch.arange(rows) % len(levels)
        if grouping.members:
            codes = codes[:, None].repeat(1, len(grouping.columns))
        values = torch.ones(*codes.shape, len(effects), dtype=torch.float64)
        structure = Structure("idv") if grouping.bent else part.structure
        places = tuple(learned.places[name]) if name in learned.places else None
        relation = _relation(grouping, learned)
        found.append(
            RandomDesign(
                name, part.group, effects, levels, codes, values, structure, places, relation
            )
        )
    return tuple(found)


# ---------------------------------------------------------------------- effects


def _values(part: RandomPart, data: TableRows) -> tuple[np.ndarray, tuple[str, ...]]:
    """Values of the effects (n, k), of rows of m levels each (n, m, k), and their names."""
    if part.grouping.members:
        return member_values(part, data)
    (effects,) = part.parts
    return model_matrix(effects, data)


def _check_structure(part: RandomPart, effects: Sequence[str], data: TableRows) -> None:
    """Refuse a structure that has no meaning for so many effects."""
    name, k = part.structure.name, len(effects)
    if k == 1 and name not in ("us", "diag", "idv"):
        raise data.fault(f"{part} has one effect, {effects[0]!r}: {name}() needs two or more")
    if name == "fa":
        order = int(part.structure.options["factors"])
        if order >= k:
            raise data.fault(
                f"{part} has {order} factors for {k} effects: expected at most {k - 1}"
            )


def _places(part: RandomPart, data: TableRows, effects: Sequence[str]) -> tuple[int, ...] | None:
    """Whole numbers whose differences are the lags of the effects, for structures by lags."""
    name = part.structure.name
    if name not in ORDERED:
        return None
    (own,) = part.parts
    variables = own.variables
    value = data.variable(variables[0]) if len(variables) == 1 else None
    if not isinstance(value, Factor) or len(value.levels) != len(effects):
        raise data.fault(
            f"{part}: {name}() is among the levels of one factor in order: expected "
            f"{name}(0 + time | group)"
        )
    if name == "ante":
        return None
    try:
        times = np.array([float(level) for level in value.levels])
    except ValueError:
        return tuple(range(len(effects)))  # labels without numbers, in their order
    what = f"{data.source}: {part}: the levels of {str(variables[0])!r}"
    places = whole_lags(times, what, lambda i: f"{value.levels[i]!r}")
    if name in ("toep", "hettoep"):
        check_lags(places, what)
    return tuple(places.tolist())


# ---------------------------------------------------------------------- levels


def _coordinates(grouping: Grouping, data: TableRows) -> Tensor | None:
    """Where the rows are (n, d), for levels at places."""
    if grouping.relation is None or grouping.relation.name not in KERNELS:
        return None
    columns = [data.numbers(name) for name in grouping.columns]
    return torch.from_numpy(np.stack(columns, 1))


def _levels(
    grouping: Grouping, data: TableRows, learned: Learned, relations: Mapping[str, Known]
) -> tuple[Tensor, tuple[str, ...], Known | Places | Graph | Walk | None]:
    """Level of each row, or those by each of several columns, the levels, and how they are related."""
    if grouping.bent:
        learned.groups.setdefault(grouping.key, Group([[grouping.key]], [0]))
        return torch.zeros(len(data), dtype=torch.int64), (grouping.key,), None
    if grouping.relation is None:
        factors = [data.labels(name) for name in grouping.columns]
        if grouping.members:
            if grouping.key not in learned.groups:
                every = levels_of_all(factors)
                learned.groups[grouping.key] = Group([every], list(range(len(every))))
            known = learned.groups[grouping.key]
            found = torch.from_numpy(member_codes(factors, known.labels))
            return found, known.labels, None
        codes, levels = _codes(grouping, factors, learned)
        return codes, levels, None
    if grouping.relation.name in WALKS:
        return _times(grouping, data, learned)
    if grouping.relation.name in KERNELS:
        factors = [numeric_levels(name, data) for name in grouping.columns]
        codes, levels = _codes(grouping, factors, learned)
        return codes, levels, _relation(grouping, learned)
    return _known(grouping, data, learned, relations)


def _relation(grouping: Grouping, learned: Learned) -> Known | Places | Graph | Walk | None:
    """How the learned levels of a group are related."""
    relation, levels = grouping.relation, learned.groups[grouping.key]
    if relation is None or grouping.bent:
        return None
    if relation.name in KERNELS:
        coordinates = [[float(x) for x in part] for part in levels.parts]
        return Places(relation, torch.tensor(coordinates, dtype=torch.float64))
    if relation.name in WALKS:
        return Walk(relation.name, len(levels.cells))
    if relation.name in GRAPHS:
        return Graph(relation.name, learned.relations[grouping.kernel or ""][0])
    matrix, is_inverse = learned.relations[grouping.kernel or "ped"]
    is_inverse = is_inverse or bool(relation.options.get("inverse"))
    return Known(tuple(levels.labels), matrix, is_inverse)


def _times(
    grouping: Grouping, data: TableRows, learned: Learned
) -> tuple[Tensor, tuple[str, ...], Known | Places | Graph | Walk | None]:
    """Level of each row among whole times, those between the first and the last without rows too."""
    (name,) = grouping.columns
    what = f"{data.source}: {grouping.key}: column {name!r}"
    values = data.numbers(name)
    if grouping.key not in learned.groups:
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            raise InputError(f"{what} is {values[bad[0]]:g} in row {data.row(int(bad[0]))}")
        lags = whole_lags(values, what, lambda i: f"row {data.row(i)}", _MOST_TIMES)
        size, first = int(lags.max()) + 1, int(values.min())
        assert grouping.relation is not None
        least = 3 if grouping.relation.name == "rw2" else 2
        if size < least:
            raise InputError(
                f"{what} has {size} time{'s' * (size > 1)} at equal steps: expected {least} or more"
            )
        unit = int((values.max() - values.min()) // (size - 1))
        learned.groups[grouping.key] = Group(
            [[str(first + unit * i) for i in range(size)]], list(range(size))
        )
    levels = learned.groups[grouping.key].labels
    first, unit = int(levels[0]), int(levels[1]) - int(levels[0])
    steps = (values - first) / unit
    known = np.isfinite(steps) & (steps == np.round(steps)) & (steps >= 0) & (steps < len(levels))
    codes = np.where(known, steps, -1).astype(np.int64)
    return torch.from_numpy(codes), tuple(levels), _relation(grouping, learned)


def _known(
    grouping: Grouping, data: TableRows, learned: Learned, relations: Mapping[str, Known]
) -> tuple[Tensor, tuple[str, ...], Known | Places | Graph | Walk | None]:
    """Level of each row among those of a known matrix."""
    factors = [data.labels(column) for column in grouping.columns]
    fitting, said = grouping.key not in learned.groups, " and ".join(map(repr, grouping.columns))
    if fitting:
        known = relations[grouping.kernel or "ped"]
        size, names = known.matrix.shape[0], known.names or tuple(levels_of_all(factors))
        if len(names) != size:
            raise InputError(
                f"kernel {grouping.kernel!r} is {size} x {size} without names, but column "
                f"{said} has {len(names)} levels: expected a data frame with the names"
            )
        learned.groups[grouping.key] = Group([list(names)], list(range(size)))
    levels = learned.groups[grouping.key].columns[0]
    codes = member_codes(factors, levels)
    if fitting and (codes < 0).any():
        at, j = np.argwhere(codes < 0)[0]
        where = "the pedigree" if grouping.kernel is None else f"kernel {grouping.kernel!r}"
        raise InputError(
            f"{data.source}: column {grouping.columns[j]!r} has the level {factors[j].labels()[at]!r} "
            f"in row {data.row(int(at))}, which {where} has not: add it there, or leave out its rows"
        )
    codes = codes if grouping.members else codes[:, 0]
    return torch.from_numpy(codes), tuple(levels), _relation(grouping, learned)


def _codes(
    grouping: Grouping, factors: Sequence[Factor], learned: Learned
) -> tuple[Tensor, tuple[str, ...]]:
    """Level of each row; only combinations that occur are levels."""
    known = learned.groups.get(grouping.key)
    columns = [f.levels for f in factors] if known is None else known.columns
    cell = np.zeros(len(factors[0].codes), dtype=np.int64)
    seen = np.ones(len(cell), dtype=bool)
    for factor, levels in zip(factors, columns, strict=True):
        code = factor.codes if known is None else factor.among(levels)
        seen &= code >= 0
        cell = cell * len(levels) + code
    if len(columns) == 1:
        if known is None:
            known = Group(columns, list(range(len(columns[0]))))
            learned.groups[grouping.key] = known
        return torch.from_numpy(cell), known.labels
    if known is None:
        known = Group(columns, np.unique(cell).tolist())
        learned.groups[grouping.key] = known
    cells = np.asarray(known.cells, dtype=np.int64)
    order = np.argsort(cells)
    at = order[np.searchsorted(cells, cell, sorter=order).clip(max=len(cells) - 1)]
    codes = np.where(seen & (cells[at] == cell), at, -1)
    return torch.from_numpy(codes), known.labels
