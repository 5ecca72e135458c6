"""Finds the folder of a model: a local one, or a model of the Hugging Face hub."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path
from urllib.parse import urlsplit

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy, which safetensors needs

from selfrag_jax.errors import UserError


# ---- folders and hub names -------------------------------------------------------------------------------------------
def model_folder(name: str | Path) -> Path:
    """A local folder as it is; a hub name (`owner/model`) as the folder of its files, downloaded if need be.

    Raises BadInput when there is neither, or no network and no copy of an earlier download.
    """
    path = Path(name)
    if path.exists() or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name)) or ".." in str(name):
        if not path.is_dir():
            raise UserError(
                f"{path}: {'is a file' if path.exists() else 'no such folder'}; expected the folder of a model"
            )
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    files = [
        "model*.safetensors",
        "*.json",
        "*.jinja",
        "tokenizer.model",
    ]  # not consolidated.safetensors, the same once more
    try:
        offline = os.environ.get("HF_HUB_OFFLINE") == "1" or not _hub_answers()
        folder = Path(snapshot_download(str(name), allow_patterns=files, local_files_only=offline))
        if not any(folder.glob("model*.safetensors")):
            raise UserError(f"{name}: the hub has no safetensors of it{_torch_recipe(str(name))}")
        return folder
    except HFValidationError as e:
        raise UserError(
            f"{name}: no such folder, and no name of a model on the Hugging Face hub ({e})"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{name}: no such folder, and the Hugging Face hub has no such model (or wants a login)"
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as e:
        raise UserError(
            f"{name}: no such folder, and as a model of the Hugging Face hub it cannot be fetched "
            f"({'no network' if isinstance(e, LocalEntryNotFoundError) else e}); download it where there is one and give its folder"
        ) from None


def _hub_answers() -> bool:
    """Whether the hub can be reached at all: without this question, every file would wait for its own timeout."""
    from huggingface_hub.constants import ENDPOINT

    if any(
        os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
    ):
        return True  # not asked directly
    host = urlsplit(ENDPOINT)
    try:
        socket.create_connection((host.hostname, host.port or 443), timeout=5).close()
        return True
    except OSError:
        return False


def _torch_recipe(source: str | Path) -> str:
    out = f"{Path(source).name}-safetensors"
    return (
        ". Torch's own format (pytorch_model.bin) can hold any program and is not read here. Make safetensors of it, where torch "
        'and transformers are: python -c "from transformers import AutoModelForCausalLM as M; '
        f"M.from_pretrained('{source}', dtype='auto').save_pretrained('{out}')\", and copy its tokenizer files there"
    )
