"""CONTRIBUTING lists what each interface asks of a subclass, as the code has it."""

import ast
import importlib
import inspect
import re
import textwrap
from pathlib import Path

import pytest

import openreml_nn.likelihood
from openreml_nn.likelihood.solvers import SOLVERS

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
    assert len(ROWS) == 11


def base_class(base):
    module, _, name = base.rpartition(".")
    return getattr(importlib.import_module(f"openreml_nn.{module}"), name)


def leaves(cls):
    """Subclasses of the package that have none of their own there."""
    below = [
        sub for sub in cls.__subclasses__() if (sub.__module__ or "").startswith("openreml_nn.")
    ]
    return [leaf for sub in below for leaf in leaves(sub)] if below else [cls]


@pytest.mark.parametrize("base", ROWS)
def test_what_a_subclass_must_supply_is_listed(base):
    cls = base_class(base)
    needed, offered = ROWS[base]
    assert set(needed) <= refusing(cls) <= set(needed) | set(offered)
    assert all(hasattr(cls, method) for method in offered)
    private = re.compile("_[^_]")
    assert not [name for name in (*needed, *offered) if private.match(name)]


@pytest.mark.parametrize("base", ROWS)
def test_every_subclass_supplies_it(base):
    cls = base_class(base)
    found = [leaf for leaf in leaves(cls) if leaf is not cls]
    assert found
    for leaf in found:
        missing = [name for name in ROWS[base][0] if getattr(leaf, name) is getattr(cls, name)]
        assert not missing, leaf


def test_a_solver_is_one_file_and_its_name():
    folder = ROOT / "openreml_nn" / "likelihood" / "solvers"
    assert {path.stem for path in folder.glob("[a-z]*.py")} == set(SOLVERS)
    for name, solver in SOLVERS.items():
        assert solver.__module__ == f"openreml_nn.likelihood.solvers.{name}"
        assert solver.name == name
        assert solver.__name__ in openreml_nn.likelihood.__all__


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
