"""What a formula may say of covariances: among effects, among levels, among the rows of a group."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from openreml_nn.support.errors import InputError
from openreml_nn.table.syntax import (
    Call,
    Name,
    Node,
    Number,
    is_call,
    is_operation,
    operands_of,
    parse,
    plain,
)

__all__ = [
    "EFFECTS",
    "FITTED",
    "GRAPHS",
    "KERNELS",
    "ORDERED",
    "RELATIONS",
    "VARIANCES",
    "VARYING",
    "WALKS",
    "ResidualFactor",
    "ResidualPart",
    "Structure",
    "check_dimensions",
    "columns_of",
    "parse_residual",
    "structure_of",
]

#: Kernels of numeric columns, as the group of random effects or within the groups of residuals.
KERNELS = ("exponential", "gaussian", "matern", "spherical", "linear", "rational")
#: In how many dimensions at most a kernel is a covariance, where it is not in all.
_DIMENSIONS = {"linear": 1, "spherical": 3}
#: Structures to which the order of the effects or positions matters.
ORDERED = ("ar1", "hetar1", "toep", "hettoep", "ante")
#: Structures among the effects of a level.
EFFECTS = ("us", "diag", "idv", "cs", "homcs", *ORDERED, "fa")
#: Structures with a variance for each effect or position; ``cs`` of effects is another.
VARYING = ("us", "diag", "hetar1", "hettoep", "ante")
#: Structures among levels that are whole times, whose differences are the lags.
WALKS = ("rw1", "rw2", "ar1")
#: Structures among levels that are areas, by the graph of their neighbours.
GRAPHS = ("car", "icar")
#: Structures among the levels of a group.
RELATIONS = ("ped", "vm", *GRAPHS, *WALKS, *KERNELS, "spline")
#: Variances of residuals that depend on a covariate.
VARIANCES = ("power", "exp", "const_power")
#: What stands for the fitted values in these.
FITTED = "fitted"
#: Structures within groups of residuals.
_WITHIN = ("us", "cs", "homcs", *ORDERED, "car1", "arma", *KERNELS)
#: Prefixes of products: a structure for each stratum, or one for all.
_STRATA = ("diag", "id", "idv")

#: How many neighbours each place depends on: all, without the option.
_NEIGHBOURS: dict[str, tuple[float | None, str, Callable[[float], bool]]] = {
    "neighbours": (None, "a whole number, 1 or more", lambda v: v == int(v) and v >= 1)
}

#: The options of a structure with their defaults, and what each may be.
_OPTIONS: dict[str, dict[str, tuple[float | None, str, Callable[[float], bool]]]] = {
    "fa": {"factors": (1, "a whole number, 1 or more", lambda v: v == int(v) and v >= 1)},
    "matern": {"nu": (1.5, "0.5, 1.5 or 2.5", lambda v: v in (0.5, 1.5, 2.5)), **_NEIGHBOURS},
    "exponential": _NEIGHBOURS,
    "gaussian": _NEIGHBOURS,
    "spherical": _NEIGHBOURS,
    "linear": _NEIGHBOURS,
    "rational": _NEIGHBOURS,
    "vm": {"inverse": (False, "TRUE or FALSE", lambda v: isinstance(v, bool))},
    "spline": {
        "segments": (10, "a whole number from 2 to 500", lambda v: v == int(v) and 2 <= v <= 500)
    },
}


@dataclass(frozen=True)
class Structure:
    """A structure of covariances by its name.

    Attributes:
        name: such as ``ar1``.
        options: such as ``{"nu": 1.5}`` of ``matern``, all that it has.
    """

    name: str
    options: Mapping[str, float] = field(default_factory=dict)

    @property
    def said(self) -> list[str]:
        """The options as a formula says them, those with their default left out."""
        defaults = _OPTIONS.get(self.name, {})
        return [f"{k} = {Number(v)}" for k, v in self.options.items() if v != defaults[k][0]]


@dataclass(frozen=True)
class ResidualFactor:
    """One structure of a product, among the positions within a group.

    Attributes:
        structure: what it is.
        positions: columns of the position; none is the order of the rows.
    """

    structure: Structure
    positions: tuple[str, ...]


@dataclass(frozen=True)
class ResidualPart:
    """The structure of the residuals: a product within each group of rows.

    Attributes:
        text: as written, without the nugget.
        factors: of the product, the first slowest; none where variances differ by stratum only.
        group: the columns whose combinations are the groups; none is one group of all rows.
        strata: the columns whose combinations have parameters of their own.
        variance: how the variance depends on a column, and that column, or :data:`FITTED`.
        nugget: whether independent errors, ``units``, stand beside.
    """

    text: str
    factors: tuple[ResidualFactor, ...] = ()
    group: tuple[str, ...] = ()
    strata: tuple[str, ...] = ()
    variance: tuple[str, str] | None = None
    nugget: bool = False

    def __str__(self) -> str:
        return f"{self.text} + units" if self.nugget else self.text

    @property
    def of_fitted(self) -> bool:
        """Whether the variance depends on the fitted values."""
        return self.variance is not None and self.variance[1] == FITTED

    @property
    def columns(self) -> list[str]:
        """The columns that it uses."""
        positions = [name for factor in self.factors for name in factor.positions]
        variance = [self.variance[1]] if self.variance and not self.of_fitted else []
        return list(dict.fromkeys([*self.strata, *self.group, *positions, *variance]))


def columns_of(node: Node) -> tuple[str, ...] | None:
    """The columns of ``a:b``; None for anything else. ``factor(a)`` is a."""
    node = plain(node)
    if is_call(node, "factor", "as.factor") and isinstance(node, Call):
        (first, *rest) = node.arguments or ((None, Number(0.0)),)
        return columns_of(first[1]) if isinstance(first[1], Name) and not rest else None
    if isinstance(node, Name) and node.name != ".":
        return (node.name,)
    if is_operation(node, ":"):
        sides = [columns_of(side) for side in operands_of(node)]
        if None not in sides:
            return tuple(name for side in sides if side for name in side)
    return None


def structure_of(call: Call, what: str, skipped: int) -> Structure:
    """The structure that a call names, with its options.

    Args:
        call: such as ``matern(east, north, nu=1.5)``.
        what: the formula, in messages.
        skipped: so many of its first arguments are no options.

    Raises:
        InputError: if an option is unknown or has another value than it may have.
    """
    known = _OPTIONS.get(call.function, {})
    found = {name: default for name, (default, _, _) in known.items() if default is not None}
    for key, node in call.arguments[skipped:]:
        name = next(iter(known), None) if key is None else key
        if name not in known:
            options = ", ".join(known) or "none"
            shown = str(node) if key is None else f"{key} = {node}"
            raise InputError(f"{what}: {call.function}() has no option {shown!r}: it has {options}")
        value = plain(node)
        default, expected, good = known[name]
        number = value.value if isinstance(value, Number) else None
        is_flag = isinstance(number, bool)  # which is a number to Python
        if number is None or is_flag != isinstance(default, bool) or not good(number):
            raise InputError(f"{what}: `{name}` is {node}: expected {expected}")
        found[name] = number
    return Structure(call.function, found)


def check_dimensions(kernel: str, count: int, what: str) -> None:
    """Refuse a kernel of more coordinates than it is a covariance in.

    Raises:
        InputError: if it is.
    """
    most = _DIMENSIONS.get(kernel, count)
    if count > most:
        raise InputError(
            f"{what}: {kernel}() of {count} columns: it is a covariance in up to {most}"
        )


# ---------------------------------------------------------------------- residuals


def parse_residual(text: str) -> ResidualPart:
    """Take the structure of the residuals apart.

    ``ar1(time | subject)``, ``cs(subject)`` and ``us(time | subject)`` correlate the rows of a
    subject; ``diag(sex)`` has a variance for each stratum; ``ar1(row):ar1(col)`` is a field, and
    ``diag(site):ar1(row):ar1(col)`` one for each site; ``power(x)`` has variances that depend on x,
    ``power(fitted)`` on the fitted values, and ``power(x):ar1(time | subject)`` correlations beside.

    Raises:
        InputError: if it does not parse.

    >>> parse_residual("ar1(age | Subject)").group
    ('Subject',)
    """
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"residual {text!r}: {_EXPECTED}")
    what = f"residual {text!r}"
    try:
        tree = parse(text, text)
    except InputError as error:
        if text.rstrip().rstrip(")").rstrip().endswith(("|", ":", "(")):
            raise InputError(f"{what}: a column is missing") from None
        raise InputError(str(error).replace("formula", "residual", 1)) from None
    summands = _summands(tree)
    nuggets = [node for node in summands if isinstance(node, Name) and node.name == "units"]
    rest = [node for node in summands if node not in nuggets]
    if len(rest) != 1 or len(nuggets) > 1:
        raise InputError(f"{what}: {_EXPECTED}")
    calls = _product(rest[0])
    if not all(isinstance(call, Call) for call in calls):
        raise InputError(f"{what}: {_EXPECTED}")
    return _Residual(str(rest[0]), what).part(
        [c for c in calls if isinstance(c, Call)], bool(nuggets)
    )


_EXPECTED = (
    "expected one of "
    + ", ".join(f"{name}(…)" for name in (*_WITHIN, *_STRATA[:1], *VARIANCES))
    + " such as 'ar1(time | group)', a product such as 'ar1(row):ar1(col)', or either '+ units'"
)


def _summands(node: Node) -> list[Node]:
    node = plain(node)
    if is_operation(node, "+") and len(operands_of(node)) == 2:
        return [s for operand in operands_of(node) for s in _summands(operand)]
    return [node]


def _product(node: Node) -> list[Node]:
    node = plain(node)
    if is_operation(node, ":"):
        return [f for operand in operands_of(node) for f in _product(operand)]
    return [node]


@dataclass(frozen=True)
class _Residual:
    """The calls of a product, taken apart."""

    text: str
    what: str

    def part(self, calls: list[Call], nugget: bool) -> ResidualPart:
        for call in calls:
            if call.function not in (*_WITHIN, *_STRATA, *VARIANCES):
                raise InputError(f"{self.what}: {call.function}() is unknown: {_EXPECTED}")
        variances = [c for c in calls if c.function in VARIANCES]
        strata = [c for c in calls if c.function in _STRATA]
        within = [c for c in calls if c not in variances and c not in strata]
        if len(variances) > 1 or len(strata) > 1:
            raise InputError(
                f"{self.what}: expected at most one of diag(), id() and one of power(), exp(), "
                "const_power()"
            )
        own, group = self._strata(strata[0]) if strata else ((), ())
        if strata and not own and not within:
            raise InputError(f"{self.what}: id() is a prefix of a product: leave `residual` out")
        variance = self._variance(variances[0]) if variances else None
        alone = len(within) == 1 and not strata
        if variance and nugget:
            raise InputError(
                f"{self.what}: {variance[0]}() beside units is not supported: expected one of them"
            )
        factors = []
        for call in within:
            factor, of = self._factor(call, alone)
            if of and len(within) + len(strata) > 1:
                raise InputError(
                    f"{self.what}: a product has no '|': write id(group):ar1(row):ar1(col) for "
                    "fields alike in each group, diag(group):… for fields with their own parameters"
                )
            factors.append(factor)
            group = group or of
        if nugget and not factors:
            raise InputError(f"{self.what}: units are independent errors beside correlated ones")
        return ResidualPart(self.text, tuple(factors), group, own, variance, nugget)

    def _columns(self, node: Node) -> tuple[str, ...]:
        found = columns_of(node)
        if found is None:
            raise InputError(f"{self.what}: {str(node)!r} is no column: {_EXPECTED}")
        return found

    def _strata(self, call: Call) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The columns of strata with their own parameters, and of groups alike."""
        ((_, node),) = call.arguments if len(call.arguments) == 1 else ((None, Number(0.0)),)
        if is_operation(node, "|"):
            raise InputError(f"{self.what}: {call.function!r} takes a stratum only")
        columns = self._columns(node)
        return (columns, ()) if call.function == "diag" else ((), columns)

    def _variance(self, call: Call) -> tuple[str, str]:
        nodes = [node for key, node in call.arguments if key is None]
        if len(call.arguments) != 1 or len(nodes) != 1 or not isinstance(nodes[0], Name):
            raise InputError(
                f"{self.what}: {call.function}() takes one numeric column, or {FITTED} for the fitted "
                "values"
            )
        return call.function, nodes[0].name

    def _factor(self, call: Call, alone: bool) -> tuple[ResidualFactor, tuple[str, ...]]:
        """A structure with its positions, and the columns of the groups."""
        positional = [node for key, node in call.arguments if key is None]
        if not positional:
            raise InputError(f"{self.what}: {call.function}() lacks a column")
        is_kernel = call.function in KERNELS
        count = len(positional) if is_kernel else 1
        structure = structure_of(_in_order(call), self.what, count)
        if "neighbours" in structure.options:
            raise InputError(
                f"{self.what}: `neighbours` is for random effects of places, not within groups of "
                f"residuals: write (1 | {call.function}(…, neighbours = …)) in the formula"
            )
        *first, last = positional[:count]
        bar = is_operation(last, "|")
        position, group = operands_of(last) if bar else (last, None)
        if is_kernel:
            nodes = [*first, position]
            check_dimensions(call.function, len(nodes), self.what)
            if not all(isinstance(node, Name) for node in nodes):
                raise InputError(f"{self.what}: {call.function}() takes numeric columns")
            names = tuple(node.name for node in nodes if isinstance(node, Name))
        elif alone and not bar:
            names, group = (), position  # the order of the rows within each group
        else:
            names = self._columns(position)
        factor = ResidualFactor(structure, names)
        return factor, () if group is None else self._columns(group)


def _in_order(call: Call) -> Call:
    """The call with its options last."""
    return Call(call.function, tuple(sorted(call.arguments, key=lambda item: item[0] is not None)))
