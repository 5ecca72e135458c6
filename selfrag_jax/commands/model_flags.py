"""The flags that `ask` and `answer` share: which model and index, how to search, how to load."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfrag_jax import artifacts
from selfrag_jax.answering.config import AnswerConfig
from selfrag_jax.commands.command import (
    MODEL,
    SEARCH,
    Flag,
    config_flag,
    config_section,
    flags_of,
    given,
)
from selfrag_jax.errors import UserError
from selfrag_jax.files import read_object
from selfrag_jax.search.config import SearchConfig

if TYPE_CHECKING:
    from selfrag_jax.answering.selfrag import SelfRAG

MODEL_FLAGS = (
    Flag(
        "workdir",
        "folder W of a finished quickstart; stands for --model=W/generator --index=W/index",
        group=MODEL,
        is_folder=True,
    ),
    Flag(
        "model",
        "a training workdir, a Hugging Face folder, a GGUF file, or a hub name (owner/model)",
        group=MODEL,
        is_model=True,
        in_place=True,
    ),
    Flag(
        "index",
        "an index made by `selfrag index`; without one, the questions' own passages (ctxs) serve",
        group=MODEL,
        is_folder=True,
    ),
)
CALIBRATION = "calibration.json"  # in a model's folder
CALIBRATION_FIELDS = ("threshold", "model")
SEARCH_FLAGS = flags_of(SearchConfig, "answer.search", SEARCH)
_SEARCH_NAMES = {f.name for f in SEARCH_FLAGS}
LOADING_FLAGS = tuple(
    f for f in flags_of(AnswerConfig, "answer", MODEL) if f.name not in _SEARCH_NAMES
)
_SYSTEMS = "Systems to compare"
SYSTEM_FLAGS = (
    Flag(
        "systems",
        "with a task: what answers, several with commas: selfrag (default), modes, ablations, "
        "baselines, all, or single ones (docs/evaluation.md). Each is a run of its own in "
        "OUT/systems/NAME; the table is OUT/systems.json, .md and .csv",
        group=_SYSTEMS,
        type=tuple,
    ),
    Flag(
        "plain_model",
        "model of the baselines no_retrieval, rag_top1 and rag_topk (default: --model); needs no "
        "reflection tokens",
        group=_SYSTEMS,
        is_model=True,
        in_place=True,
    ),
    Flag(
        "plain_prompt",
        "prompt of the baselines: selfrag (default), prompt_no_input, prompt_open_instruct, "
        "llama_chat_prompt (the released script's), or a JSON file of two templates",
        group=_SYSTEMS,
    ),
    Flag(
        "no_retriever_model",
        "model of the system train_no_retriever: trained on `selfrag label --plain=closed`",
        group=_SYSTEMS,
        is_folder=True,
        in_place=True,
    ),
    Flag(
        "no_critic_model",
        "model of the system train_no_critic: trained on `selfrag label --plain=top1`",
        group=_SYSTEMS,
        is_folder=True,
        in_place=True,
    ),
)
DEFAULT_CONFIG = "any_model"  # of models that are not of the synthetic world
ANSWER_CONFIG_FLAG = config_flag(
    None,
    f"; default: tiny for models of the synthetic world, else {DEFAULT_CONFIG}, the paper's "
    "settings",
    "tiny, any_model, short_form:7b",
)


def search_changes(values: dict[str, Any]) -> dict[str, Any]:
    """The search settings that the user gave.

    A scorer brings defaults of its own where nothing was said. So a weight or an accumulation that
    the user set by --config.answer.search counts as given beside it, and so does the scorer.
    """
    changes = given(values, SEARCH_FLAGS)
    in_config = dict(o.partition("=")[::2] for o in values["overrides"])
    if scorer := in_config.get("answer.search.scorer"):
        changes.setdefault("scorer", scorer)
    for key, text in in_config.items() if "scorer" in changes else ():
        section, _, name = key.rpartition(".")
        if section == "answer.search.weights":
            changes.setdefault(name, _weight(key, text))
        elif key == "answer.search.accumulate":
            changes.setdefault(name, text)
    return changes


def _weight(key: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"--config.{key}={text}: expected a number") from None


def require_quickstart(workdir: str | Path, *files: Path) -> None:
    """Raises UserError if a file is missing that a finished quickstart leaves in its workdir."""
    from selfrag_jax.checkpoints import workdirs

    if not all(f.is_file() for f in files):
        if (Path(workdir) / workdirs.MODEL_FILE).is_file():
            raise UserError(
                f"{workdir}: is the workdir of a training, which goes to --model; expected the "
                "folder of a finished quickstart"
            )
        if Path(workdir).is_file():
            raise UserError(f"{workdir}: is a file; expected the folder of a finished quickstart")
        raise UserError(
            f"{workdir}: holds no finished quickstart; "
            f"run `selfrag quickstart --workdir={workdir}` first"
        )


def config_for(model: str | Path, otherwise: str) -> str:
    """Returns the config to use where none is given: tiny for models of the synthetic world."""
    from selfrag_jax.checkpoints import loading
    from selfrag_jax.huggingface import hub

    mode = loading.read_tokenizer(hub.model_folder(model)).mode
    return "tiny" if mode == "words" else otherwise


def model_and_config(
    values: dict[str, Any], calibrated: bool = True
) -> tuple[Path, Path | None, AnswerConfig]:
    """The model's folder, the index and the settings that the flags name; nothing is loaded.

    calibrated: take the threshold that `selfrag calibrate` left in the model's folder, unless the
    user gave one.
    """
    from selfrag_jax.answering import generator
    from selfrag_jax.checkpoints import workdirs

    model, index = values["model"], values["index"]
    if workdir := values["workdir"]:
        defaults = {"generator": model, "index": index}
        needed = [Path(workdir) / name for name, path in defaults.items() if not path]
        # A training that is unfinished can answer, from its last checkpoint on.
        needed = [path for path in needed if not workdirs.saved_steps(path)]
        require_quickstart(workdir, *map(artifacts.manifest_path, needed))
        model, index = model or Path(workdir) / "generator", index or Path(workdir) / "index"
    if not model:
        raise UserError(
            "give --model (a training workdir, a Hugging Face folder, a GGUF file or a hub name) "
            "or --workdir of a finished quickstart"
        )
    model = generator.find_generator(model)
    if values["config"] is None:
        values = values | {"config": config_for(model, DEFAULT_CONFIG)}
    config = config_section(values, AnswerConfig, "answer")
    if calibrated and not _threshold_is_given(values):
        threshold = _calibrated_threshold(model)
        if threshold is not None:
            config = replace(config, search=replace(config.search, threshold=threshold))
    config = replace(config, **given(values, LOADING_FLAGS))
    return model, Path(index) if index else None, config


def load_from(model: Path, index: Path | None, config: AnswerConfig) -> SelfRAG:
    from selfrag_jax.answering.selfrag import SelfRAG

    return SelfRAG.load(model, index, config)


def load_selfrag(values: dict[str, Any], calibrated: bool = True) -> SelfRAG:
    """The model, index and config that the flags name; calibrated: as for model_and_config."""
    return load_from(*model_and_config(values, calibrated))


def _threshold_is_given(values: dict[str, Any]) -> bool:
    """By flag or config; nor is one needed where the mode or the scorer does not use it."""
    if values["threshold"] is not None or values["scorer"] == "released":
        return True
    if values["mode"] not in (None, "adaptive_retrieval"):
        return True
    return any(o.startswith("answer.search.threshold=") for o in values["overrides"])


def _calibrated_threshold(folder: Path) -> float | None:
    """The threshold in a model's folder. Raises UserError if it was chosen for another model."""
    file = folder / CALIBRATION
    if not file.is_file():
        return None
    made = read_object(file, CALIBRATION_FIELDS)
    if made["model"] != artifacts.fingerprint(folder):
        raise UserError(
            f"{file}: was made for other weights than the folder has now; run `selfrag calibrate` "
            "again, remove it, or give --threshold"
        )
    print(f"threshold {made['threshold']}, from {file}", file=sys.stderr)
    return made["threshold"]
