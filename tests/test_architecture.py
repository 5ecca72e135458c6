"""The order of the layers that docs/architecture.md draws: every import points downwards."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "selfrag_jax"


def layers():
    """The layer of each folder and module under selfrag_jax/, 0 at the top, as drawn."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    block = re.search(r"<!-- layers -->\n```\w*\n(.*?)```", text, re.DOTALL).group(1)
    lines = [line for line in block.splitlines() if line.strip()]
    return {
        name: level
        for level, line in enumerate(lines)
        for name in re.split(r"  +", line.strip())[0].split()
    }


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
            elif isinstance(node, ast.ImportFrom) and node.module:
                assert node.level == 0, f"{file}: relative import"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                names = [name if name in known else node.module for name in names]
            pairs |= {(module, name) for name in names if name in known and name != "selfrag_jax"}
    return pairs


def room(module):
    """The folder or top-level module that a dotted name belongs to."""
    return module.split(".")[1]


def test_every_folder_and_module_is_drawn():
    rooms = {room(m) for m in modules() if "." in m} - {"__main__"}
    assert rooms == set(layers())


def test_imports_point_downwards():
    level = layers()
    wrong = [
        f"{module} imports {imported}"
        for module, imported in sorted(imports())
        if module not in ("selfrag_jax", "selfrag_jax.__main__")
        and room(module) != room(imported)
        and level[room(module)] >= level[room(imported)]
    ]
    assert not wrong


def test_only_commands_and_the_base_model_know_the_world():
    users = {room(m) for m, imported in imports() if room(imported) == "world"}
    assert users - {"world"} <= {"commands", "base_model"}


def test_no_modules_import_each_other():
    below = {}
    for module, imported in imports():
        below.setdefault(module, set()).add(imported)

    def visit(module, path):
        if module in path:
            pytest.fail(" imports ".join([*path[path.index(module) :], module]))
        if module not in done:
            for imported in below.get(module, ()):
                visit(imported, [*path, module])
            done.add(module)

    done = set()
    for module in below:
        visit(module, [])
