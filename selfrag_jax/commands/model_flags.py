"""The flags that `ask` and `answer` share: which model and index, how to search, how to load."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfrag_jax import artifacts
from selfrag_jax.answering.config import AnswerConfig
from selfrag_jax.commands.command import Flag, config_flag, config_section, flags_of, given
from selfrag_jax.errors import UserError
from selfrag_jax.search.config import SearchConfig

if TYPE_CHECKING:
    from selfrag_jax.answering.selfrag import SelfRAG

MODEL_FLAGS = (
    Flag("workdir", "of a finished quickstart: stands for --model=W/generator --index=W/index"),
    Flag("model", "a training workdir, a Hugging Face folder, or a hub name (owner/model)"),
    Flag("index", "made by `selfrag index`; without one, the questions' own passages (ctxs) serve"),
)
SEARCH_FLAGS = flags_of(SearchConfig)
LOADING_FLAGS = tuple(f for f in flags_of(AnswerConfig) if f not in SEARCH_FLAGS)
ANSWER_CONFIG_FLAG = config_flag(
    None, "; default: tiny for models of the synthetic world, else any_model, the paper's settings"
)


def search_changes(values: dict[str, Any]) -> dict[str, Any]:
    """The search settings that the user gave."""
    return given(values, SEARCH_FLAGS)


def require_quickstart(workdir: str | Path, *files: Path) -> None:
    """Raises UserError if a file is missing that a finished quickstart leaves in its workdir."""
    if not all(f.is_file() for f in files):
        raise UserError(
            f"{workdir}: holds no finished quickstart; "
            f"run `selfrag quickstart --workdir={workdir}` first"
        )


def load_selfrag(values: dict[str, Any]) -> SelfRAG:
    """The model, index and config that the flags name."""
    from selfrag_jax.answering.selfrag import SelfRAG
    from selfrag_jax.checkpoints import loading
    from selfrag_jax.huggingface import hub

    model, index = values["model"], values["index"]
    if workdir := values["workdir"]:
        defaults = {"generator": model, "index": index}
        needed = [Path(workdir) / name for name, path in defaults.items() if not path]
        require_quickstart(workdir, *map(artifacts.manifest_path, needed))
        model, index = model or Path(workdir) / "generator", index or Path(workdir) / "index"
    if not model:
        raise UserError(
            "give --model (a training workdir, a Hugging Face folder or a hub name) "
            "or --workdir of a finished quickstart"
        )
    if values["config"] is None:
        model = hub.model_folder(model)
        of_tiny_world = loading.read_tokenizer(model).mode == "words"
        values = values | {"config": "tiny" if of_tiny_world else "any_model"}
    config = config_section(values, AnswerConfig, "answer")
    return SelfRAG.load(model, index, replace(config, **given(values, LOADING_FLAGS)))
