"""CONTRIBUTING lists what each interface asks of a subclass, as the code has it."""

import ast
import importlib
import inspect
import re
import textwrap
from pathlib import Path

import pytest

from openreml_nn.likelihood.plan import SOLVERS
from openreml_nn.likelihood.problem import Problem

ROOT = Path(__file__).parents[1]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
ROWS = {
    base: (re.findall(r"`(\w+)`", needed), re.findall(r"`(\w+)`", offered))
    for base, needed, offered in re.findall(
        r"^\| `([\w.]+)` \|([^|]*)\|([^|]*)\|", CONTRIBUTING, re.MULTILINE
    )
}


def refusing(cls):
    """Methods whose body, in the class itself, only raises NotImplementedError."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    found = set()
    for method in tree.body:
        if isinstance(method, ast.FunctionDef):
            first = method.body[1 if ast.get_docstring(method) else 0 :][:1]
            if first and re.match(r"raise NotImplementedError\b", ast.unparse(first[0])):
                found.add(method.name)
    return found


def test_every_interface_is_listed():
    assert len(ROWS) == 8


@pytest.mark.parametrize("base", ROWS)
def test_what_a_subclass_must_supply_is_listed(base):
    module, _, name = base.rpartition(".")
    cls = getattr(importlib.import_module(f"openreml_nn.{module}"), name)
    needed, offered = ROWS[base]
    assert set(needed) <= refusing(cls) <= set(needed) | set(offered)
    assert all(hasattr(cls, method) for method in offered)


def test_every_solver_supplies_it():
    needed, _ = ROWS["likelihood.problem.Problem"]
    for solver in SOLVERS.values():
        assert all(getattr(solver, name) is not getattr(Problem, name) for name in needed)


def house():
    """Rooms in their order, each with the files that are named in it."""
    (text,) = re.findall(r"## The house.*?```text\n(.*?)```", CONTRIBUTING, re.DOTALL)
    found, room = {}, ""
    for line in text.splitlines():
        names = re.findall(r"\w+\.py|\w+/", line.strip().split("   ")[0])
        if line.startswith(" "):
            found[room] += names
        else:
            found.update({name: [] for name in names})
            room = names[-1]
    return found


def test_the_house_is_as_it_is_drawn():
    package = ROOT / "openreml_nn"
    rooms = house()
    for room, files in rooms.items():
        place = package if (package / room).exists() else ROOT
        assert all((place / room / file).exists() for file in ["", *files]), room
    there = {path.name + "/" * path.is_dir() for path in package.glob("[a-z]*")}
    assert there - {"py.typed"} <= set(rooms)


def test_no_room_imports_one_below_it():
    order = [room.removesuffix(".py").strip("/") for room in house()]
    for path in (ROOT / "openreml_nn").rglob("*.py"):
        own = path.relative_to(ROOT / "openreml_nn").with_suffix("").parts[0]
        imported = re.findall(r"from openreml_nn\.(\w+)", path.read_text(encoding="utf-8"))
        above = order[: order.index(own) + 1] if own != "__init__" else order
        assert set(imported) <= set(above), path
