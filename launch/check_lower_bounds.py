"""Installs the lowest versions that setup.py allows, in a fresh environment, and tries them.

    python launch/check_lower_bounds.py                               # the core alone
    python launch/check_lower_bounds.py --extras=train,eval,teacher   # with extras, and their tests

Needs `uv` (pip install uv) and a network. Takes about five minutes on two cores; `eval` downloads
torch. Only wheels are installed, but for two pure Python packages that have none (SDISTS).

The core is tried with the smoke run of the quickstart and a conversion to Hugging Face's format;
each extra with the default tests of the files named in TESTS. Exit status 1: something failed.
"""

import argparse
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
SDISTS = ("rouge-score", "promise")  # promise: of tensorflow-datasets
# Test files that use what an extra brings.
TESTS = {
    "train": ["test_sources.py"],
    "eval": ["test_alce.py"],
    "teacher": ["test_teachers.py"],
}
TOOLS = ["pytest", "hypothesis"]  # any version: they are no part of the bounds
SMOKE = (
    ["quickstart", "--config=tiny:smoke", "--workdir=W"],
    ["convert", "--from=W/generator", "--to=converted", "--format=huggingface"],
)


def requirements(extras: list[str]) -> list[str]:
    """Returns what setup.py requires, of the core and of some extras."""
    import setuptools

    given: dict = {}
    original, setuptools.setup = setuptools.setup, lambda **fields: given.update(fields)
    before = Path.cwd()
    try:
        os.chdir(ROOT)
        runpy.run_path("setup.py")
    finally:
        os.chdir(before)
        setuptools.setup = original
    known = given["extras_require"]
    if unknown := [extra for extra in extras if extra not in known]:
        sys.exit(f"--extras={unknown[0]}: must be of {', '.join(known)}")
    return given["install_requires"] + [r for extra in extras for r in known[extra]]


def install(uv: str, folder: Path, wanted: list[str]) -> Path:
    """Makes an environment with the lowest versions of `wanted`; returns its Python."""
    python = folder / "venv" / "bin" / "python"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    subprocess.run([uv, "venv", "-q", f"--python={version}", folder / "venv"], check=True)
    listed = folder / "requirements.txt"
    listed.write_text("\n".join(wanted))
    pip = [uv, "pip", "install", "-q", f"--python={python}"]
    wheels = ["--only-binary=:all:", *(f"--no-binary={name}" for name in SDISTS)]
    begin = time.monotonic()
    lowest = ["--resolution=lowest-direct", *wheels]
    subprocess.run([*pip, *lowest, "-r", listed], check=True)
    print(f"installed in {time.monotonic() - begin:.0f} s", flush=True)
    subprocess.run([*pip, "--no-deps", ROOT], check=True)
    return python


def main() -> int:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--extras", default="", help="of setup.py, with commas")
    p.add_argument("--folder", help="to work in, and to keep; default: a temporary one")
    args = p.parse_args()
    extras = [extra for extra in args.extras.split(",") if extra]
    uv = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))
    if not Path(uv).exists():
        sys.exit("uv is missing: pip install uv")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        python = install(uv, folder, requirements(extras))
        installed = [uv, "pip", "freeze", f"--python={python}"]
        print(subprocess.run(installed, check=True, capture_output=True, text=True).stdout)
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": ""}
        commands = [[python, "-m", "selfrag_jax", *arguments] for arguments in SMOKE]
        if tests := [str(ROOT / "tests" / file) for extra in extras for file in TESTS[extra]]:
            tools = [uv, "pip", "install", "-q", f"--python={python}", *TOOLS]
            subprocess.run(tools, check=True)
            commands.append([python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests])
        for command in commands:
            print("+", *command[1:], flush=True)
            if code := subprocess.run(command, cwd=folder, env=environment).returncode:
                print(f"failed with status {code}")
                return 1
    print("the lower bounds work")
    return 0


if __name__ == "__main__":
    sys.exit(main())
