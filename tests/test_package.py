"""What is installed: every file that the package reads is in the wheel."""

import runpy
from pathlib import Path

import setuptools
from setuptools.dist import Distribution

ROOT = Path(__file__).parents[1]


def installed_files(monkeypatch):
    """The files that a wheel would hold, as setup.py declares them; nothing is built."""
    declared = {}
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: declared.update(arguments))
    runpy.run_path("setup.py")
    names = ("packages", "package_dir", "package_data")
    distribution = Distribution({n: declared[n] for n in names} | {"script_name": "setup.py"})
    command = distribution.get_command_obj("build_py")
    command.ensure_finalized()
    modules = {Path(file) for _, _, file in command.find_all_modules()}
    return modules | {
        Path(folder, file) for _, folder, _, files in command.data_files for file in files
    }


def test_every_file_of_the_package_is_installed(monkeypatch):
    here = {
        file.relative_to(ROOT)
        for folder in ("selfrag_jax", "configs")
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert {file.suffix for file in here} >= {".py", ".js", ".css", ".html", ".txt"}
    assert {file.name for file in here - installed_files(monkeypatch)} <= {"README.md"}
