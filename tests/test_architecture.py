"""Imports against the layers that docs/architecture.md draws: every import points downwards."""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

from selfrag_jax.search.algorithms import ALGORITHMS
from selfrag_jax.search.config import SCORERS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "selfrag_jax"


def layers():
    """The layer of each folder and module under selfrag_jax/, 0 at the top, as drawn."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    block = re.search(r"<!-- layers -->\n```\w*\n(.*?)```", text, re.DOTALL).group(1)
    lines = [line for line in block.splitlines() if line.strip()]
    names = [re.split(r"  +", line.strip())[0].split() for line in lines]
    return {name: level for level, layer in enumerate(names) for name in layer}


def modules():
    """Dotted name -> file, of every module in the package."""
    found = {}
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports():
    """(importing module, imported module) pairs, lazy imports included."""
    known, pairs = modules(), set()
    for module, file in known.items():
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0 and node.module, f"{file}: relative import"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                names = [name if name in known else node.module for name in names]
            pairs |= {(module, name) for name in names if name in known and name != "selfrag_jax"}
    return pairs


def package_names():
    """(module, name) pairs of every `from selfrag_jax import name` that imports no module."""
    known, pairs = modules(), set()
    for module, file in known.items():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "selfrag_jax":
                names = {alias.name for alias in node.names}
                pairs |= {(module, n) for n in names if f"selfrag_jax.{n}" not in known}
    return pairs


def part(module):
    """The folder or top-level module that a dotted name belongs to."""
    return module.split(".")[1]


def test_every_folder_and_module_is_drawn():
    parts = {part(m) for m in modules() if "." in m} - {"__main__"}
    assert parts == set(layers())


def test_imports_point_downwards():
    level = layers()
    wrong = [
        f"{module} imports {imported}"
        for module, imported in sorted(imports())
        if module not in ("selfrag_jax", "selfrag_jax.__main__")
        and part(module) != part(imported)
        and level[part(module)] >= level[part(imported)]
    ]
    assert not wrong


def test_the_package_imports_nothing_through_its_public_names():
    # They point at modules further down, so an import through them would hide its direction.
    assert {name for _, name in package_names()} <= {"__version__"}


def test_only_commands_and_the_base_model_import_the_world():
    importing = {part(m) for m, imported in imports() if part(imported) == "world"}
    assert importing - {"world"} <= {"commands", "base_model"}


def test_only_commands_import_the_facts():
    importing = {part(m) for m, imported in imports() if part(imported) == "facts"}
    assert importing - {"facts"} <= {"commands"}


def test_no_two_classes_share_a_name():
    trees = [ast.parse(file.read_text()) for file in modules().values()]
    names = [node.name for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)]
    assert {name for name, times in Counter(names).items() if times > 1} == set()


def test_every_scorer_has_its_search():
    assert tuple(ALGORITHMS) == SCORERS


def test_no_modules_import_each_other():
    imports_of = {}
    for module, imported in imports():
        imports_of.setdefault(module, set()).add(imported)
    checked = set()

    def check(module, path):
        if module in path:
            pytest.fail(" imports ".join([*path[path.index(module) :], module]))
        if module not in checked:
            for imported in imports_of.get(module, ()):
                check(imported, [*path, module])
            checked.add(module)

    for module in imports_of:
        check(module, [])
