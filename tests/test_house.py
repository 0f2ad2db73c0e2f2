"""What holds for the whole package: one name for one thing, nothing private from elsewhere, files
of one subject, no import cycle.

Each list of exceptions gives a reason, and is to become shorter.
"""

import ast
import importlib
import subprocess
import sys
from collections import defaultdict
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

import openreml_nn

PACKAGE = Path(__file__).parents[1] / "openreml_nn"

#: Files of more than 400 lines, and why.
LONG_FILES = {
    "lightning/module.py": "Lightning's hooks, one by one",
}
#: Classes of more than 200 lines, and why.
LONG_CLASSES = {
    "covariance/matrix.py: Matrix": "the contract of a matrix, most of it documentation",
    "covariance/operator.py: Operator": "the contract of an operator, most of it documentation",
    "covariance/tree.py: Tree": "values and derivatives go through one order of nodes",
    "estimation/outcome.py: _Builder": "every part of a result, from one evaluation",
    "estimation/marginal_steps.py: MarginalFit": "one Newton iteration with what it keeps",
    "families/family.py: Family": "the contract of a family, most of it documentation",
    "lightning/module.py: MixedModule": "Lightning's hooks, one by one",
    "likelihood/laplace.py: LaplaceLoss": "the contract of the loss, most of it documentation",
    "likelihood/system/sparse/equations.py: Equations": "one pattern, and what is read and written at its places",
}
#: Names that are offered by two modules for two things, neither of them public, and why.
TWO_THINGS = {
    "Cross": "of two solvers' systems",
    "Equations": "of the sparse solver, and of predictions",
    "Factor": "the factor of a matrix, and the levels of a column",
    "Part": "of the sparse solver's equations, and of a formula",
    "Parts": "a way of training, and parts of sums over chunks",
    "Rows": "of the sparse solver's design, and of a table",
    "Term": "of a formula, and of a covariance",
    "check_tensor": "one of the two is to go",
    "evaluate": "a tree of matrices, and a function in a formula",
    "kind_of": "of a matrix, and of a column",
    "predict_table": "the command, and what it calls",
    "shown": "one of the two is to have another name",
    "structure_of": "of a model's residual, and of a formula",
    "visible": "of a tensor, and of text",
    "within": "a matrix within groups, and its square root",
}
#: Modules with the name of a function in them, and why.
NAMED_LIKE_A_FUNCTION = {
    "lightning/optimizers.py": "the function is to have another name",
    "estimation/outcome.py": "the function is to have another name",
    "program/main.py": "the function that the console script runs",
}
#: Private names that are used in another file, and why.
PRIVATE: dict[str, str] = {}
#: Rooms in which a class does not even use the private names that it inherits.
STRICT = ("support/", "terms/", "covariance/", "likelihood/")
#: Private names of torch and of named tuples, by which these are to be used.
THEIRS = {*dir(torch.nn.modules.module), *dir(torch.autograd.forward_ad), "_replace"}
MODULE = nn.Module()


@cache
def files():
    """Path of each file in the package, with its syntax tree and its text."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        found[path.relative_to(PACKAGE).as_posix()] = ast.parse(text), text
    return found


def dotted(file):
    """Name of the module of a file."""
    parts = ["openreml_nn", *Path(file).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules():
    """Modules by name, without those that run when they are imported."""
    names = {dotted(file) for file in files() if not file.endswith("__main__.py")}
    if find_spec("sklearn") is None:
        names = {name for name in names if not name.startswith("openreml_nn.estimators")}
    return {name: importlib.import_module(name) for name in sorted(names)}


def meanings(packages_only):
    """What each name in an ``__all__`` stands for, by the module that lists it."""
    found = defaultdict(dict)
    for module, value in modules().items():
        if hasattr(value, "__path__") or not packages_only:
            for name in getattr(value, "__all__", ()):
                found[name][module] = getattr(value, name)
    return found


def test_a_public_name_means_one_thing():
    for name, by in meanings(packages_only=True).items():
        assert len({id(value) for value in by.values()}) == 1, f"{name}: {sorted(by)}"


def test_a_name_that_modules_offer_means_one_thing():
    for name, by in meanings(packages_only=False).items():
        if name not in TWO_THINGS:
            assert len({id(value) for value in by.values()}) == 1, f"{name}: {sorted(by)}"


def test_what_all_lists_is_there_once():
    for module, value in modules().items():
        listed = list(getattr(value, "__all__", ()))
        assert len(set(listed)) == len(listed), module
        assert all(hasattr(value, name) for name in listed), module


def test_no_module_has_the_name_of_a_function_in_it_or_of_what_its_package_exports():
    for file, (tree, _) in files().items():
        path = Path(file)
        own = path.stem
        if own in ("__init__", "__main__") or file in NAMED_LIKE_A_FUNCTION:
            continue
        defined = {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
        package = modules()[dotted(file).rpartition(".")[0]]
        exported = set(getattr(package, "__all__", ()))
        module = modules()[dotted(file)]
        assert own not in defined, file
        assert own not in exported or getattr(package, own) is module, file


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def private_names(tree):
    """Private names that a file makes itself: functions, classes, variables, attributes."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.id if isinstance(node, ast.Name) else node.attr)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
    return {name for name in found if is_private(name)}


def foreign_private_names(trees):
    """Uses, by file, of private names that another file makes.

    What a class inherits, it may use of itself, but in the strict rooms.
    """
    made = {file: private_names(tree) for file, tree in trees.items()}
    anywhere = set().union(*made.values())
    found = []
    for file, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                if (node.module or "").startswith("openreml_nn"):
                    found += [
                        f"{file}: {alias.name}" for alias in node.names if is_private(alias.name)
                    ]
            elif isinstance(node, ast.Attribute) and is_private(node.attr):
                inherited = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
                inherited |= ast.unparse(node.value) == "super()"
                inherited &= not file.startswith(STRICT)
                theirs = node.attr in THEIRS or hasattr(MODULE, node.attr)
                theirs |= ast.unparse(node.value) == "torch"
                if node.attr in anywhere - made[file] and not (inherited or theirs):
                    found.append(f"{file}: {node.attr}")
    return found


def test_no_file_uses_a_private_name_of_another():
    found = foreign_private_names({file: tree for file, (tree, _) in files().items()})
    assert set(found) <= set(PRIVATE)


def test_a_private_name_of_another_file_is_seen():
    one = ast.parse("class A:\n    def _b(self):\n        return self._b\n\n_c = 1")
    for use, seen in (
        ("from openreml_nn.one import _c", 1),
        ("x = a._b()", 1),
        ("from openreml_nn.one import c\nx._replace(a=1)", 0),
        ("class B(A):\n    def d(self):\n        return self._b", 0),
    ):
        assert len(foreign_private_names({"one.py": one, "two.py": ast.parse(use)})) == seen, use
    assert foreign_private_names({"one.py": one, "terms/two.py": ast.parse(use)})


def too_long():
    """Files of more than 400 lines and classes of more than 200, with how long they are."""
    long_files, long_classes = {}, {}
    for file, (tree, text) in files().items():
        if (lines := len(text.splitlines())) > 400:
            long_files[file] = lines
        for node in tree.body:
            if (
                isinstance(node, ast.ClassDef)
                and (lines := node.end_lineno - node.lineno + 1) > 200
            ):
                long_classes[f"{file}: {node.name}"] = lines
    return long_files, long_classes


def test_files_and_classes_have_one_subject():
    """Those that are too long are just those listed: what was parted leaves the list."""
    long_files, long_classes = too_long()
    assert long_files.keys() == LONG_FILES.keys(), long_files
    assert long_classes.keys() == LONG_CLASSES.keys(), long_classes


def imports(tree):
    """Modules that a file names in an import, wherever it stands, with the names taken from each.

    One within a function, or for the types only, makes a circle of files as well as any.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"line {node.lineno}: a relative import"
            yield node.module, [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)


def needs(trees):
    """Modules that each module needs.

    A module in a package needs the package's ``__init__`` first, but for the packages that it is in
    itself.
    """
    found = {}
    for name, tree in trees.items():
        wanted = set()
        for module, names in imports(tree):
            taken = [f"{module}.{n}" for n in names if f"{module}.{n}" in trees]
            # From a package that one is in, a module is taken, not what `__init__` makes of it.
            if not (len(taken) == len(names) > 0 and name.startswith(f"{module}.")):
                taken.append(module)
            for target in taken:
                parts = target.split(".")
                wanted |= {".".join(parts[: i + 1]) for i in range(len(parts))} - {name}
                # Those it is in are being imported already.
                wanted -= {p for p in wanted if name.startswith(f"{p}.") and p != target}
        found[name] = wanted & set(trees)
    return found


def cycle(graph):
    """Some modules that need each other in a circle; none where there are none."""
    left = dict(graph)
    while free := [name for name, wanted in left.items() if not wanted & set(left)]:
        for name in free:
            del left[name]
    if not left:
        return []
    name, path = next(iter(left)), []
    while name not in path:
        path.append(name)
        name = next(iter(sorted(left[name] & set(left))))
    return path[path.index(name) :]


def test_no_module_needs_itself():
    graph = needs({dotted(file): tree for file, (tree, _) in files().items()})
    assert cycle(graph) == []


@pytest.mark.parametrize(
    ("texts", "found"),
    [
        ({"p": "", "p.a": "from p.b import x", "p.b": "from p.a import y"}, {"p.a", "p.b"}),
        ({"p": "from p.a import x", "p.a": "from p import x"}, {"p", "p.a"}),
        ({"p": "from p.a import x", "p.a": "from p import b", "p.b": ""}, set()),
        ({"p": "", "p.a": "from p.b import x", "p.b": "def f():\n    import p.a"}, {"p.a", "p.b"}),
        (
            {"p": "", "p.a": "import p.b", "p.b": "if TYPE_CHECKING:\n    import p.a"},
            {"p.a", "p.b"},
        ),
        (
            {"p": "", "p.a": "import p.b", "p.b": "try:\n    x\nexcept E:\n    import p.a"},
            {"p.a", "p.b"},
        ),
        ({"p": "", "p.a": "import p.b", "p.b": "import p.c", "p.c": ""}, set()),
    ],
)
def test_a_cycle_is_seen(texts, found):
    assert set(cycle(needs({name: ast.parse(text) for name, text in texts.items()}))) == found


@pytest.mark.parametrize(
    ("code", "late"),
    [
        ("import openreml_nn", ["torch", "numpy", "pandas"]),
        (
            "from openreml_nn import lmm, glmm, MixedModel, REMLLoss, inference, report; "
            "from openreml_nn.program import fit, outputs",
            ["lightning", "torchmetrics", "matplotlib", "numba", "scipy.stats", "scipy.spatial",
             "scipy.special"],
        ),
    ],
)  # fmt: skip
def test_the_package_is_imported_without_what_few_need(code, late):
    """Each takes as long to import as a fit of a thousand rows takes."""
    code = f"import sys; {code}; print(*[name for name in {late} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "\n"), done.stderr


def test_names_of_the_package_are_found_when_they_are_asked_for():
    assert set(openreml_nn.__all__) <= set(dir(openreml_nn))
    for name, home in openreml_nn._HOMES.items():
        assert getattr(openreml_nn, name) is getattr(
            importlib.import_module(f"openreml_nn.{home}"), name
        )
    with pytest.raises(AttributeError, match="'openreml_nn' has no attribute 'lmmm'"):
        _ = openreml_nn.lmmm
    assert openreml_nn.inference is importlib.import_module("openreml_nn.inference")
