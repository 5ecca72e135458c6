"""Whether a folder holds a generator that can answer, and what to know before it does.

Everything here is found out from small files, before weights are read.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from selfrag_jax import artifacts
from selfrag_jax.checkpoints import loading, workdirs
from selfrag_jax.errors import UserError
from selfrag_jax.files import read_object
from selfrag_jax.gguf_files.header import is_gguf
from selfrag_jax.huggingface import hub
from selfrag_jax.huggingface.weights import CONFIG
from selfrag_jax.processes.group import current
from selfrag_jax.records import Passage
from selfrag_jax.retrieval.retriever import IndexRetriever, Retriever
from selfrag_jax.text.reflection import MissingReflectionTokens
from selfrag_jax.text.tokenizer import Tokenizer

_WANTED = "a generator: a training workdir, a Hugging Face folder, a GGUF file or a hub name"
# What a folder of these stages holds.
_CONTENTS = {
    "embed": "embeddings",
    "index": "an index, which goes to --index",
    "world": "a synthetic world",
    "prepare": "instructions",
    "report": "a report",
    "evaluate": "an evaluation",
}
_ENCODERS = ("bert", "roberta", "xlm-roberta", "mpnet", "distilbert", "nomic_bert")
_KNOWN_SHARE = 0.95  # of a corpus's words, that a model of the synthetic world has to know
_SAMPLED = 50  # passages of a corpus, about


# ---- what a folder holds -------------------------------------------------------------------------
def find_generator(model: str | Path) -> Path:
    """The folder of a model that generates; a hub name is downloaded.

    Raises UserError that says what the folder holds instead, and for a training without a
    checkpoint. Reflection tokens are not asked for: baselines need none.
    """
    folder = hub.model_folder(model)
    if is_gguf(folder):
        return folder
    if (folder / workdirs.MODEL_FILE).is_file():
        _check_workdir(folder)
    elif (folder / CONFIG).is_file():
        kind = read_object(folder / CONFIG, ()).get("model_type")
        if kind in _ENCODERS:
            raise UserError(
                f"{folder}: is an encoder of texts ({kind}), which --encoder of `selfrag index` "
                f"takes; expected {_WANTED}"
            )
    elif other := _other_contents(folder):
        raise UserError(f"{folder}: {other}")
    return folder


def _check_workdir(folder: Path) -> None:
    """Raises UserError for the workdir of a critic, and for one that cannot be read from yet."""
    made = _made(folder)
    stage, role = made.get("stage", "train"), made.get("config", {}).get("role")
    if role not in (None, "generator"):
        raise UserError(
            f"{folder}: is a {role}; expected a generator, which `selfrag train --role=generator` "
            "makes"
        )
    if stage != "train" and not artifacts.manifest_path(folder).is_file():
        raise UserError(f"{folder}: is unfinished; run `selfrag {stage}` again, which resumes it")
    if not workdirs.saved_steps(folder):
        raise UserError(
            f"{folder}: its training has not saved a checkpoint yet, so there is no model to "
            f"answer with; the same `selfrag train --workdir={folder}` continues it"
        )


def _other_contents(folder: Path) -> str:
    """What a folder without a model holds, and what is wanted; "" for nothing that is known."""
    made = _made(folder)
    if (stage := made.get("stage")) == "train":  # killed before it wrote anything
        return (
            "its training has not saved a checkpoint yet; the same "
            f"`selfrag train --workdir={folder}` continues it"
        )
    if stage:
        if stage == "convert":  # and then something was removed
            return f"lacks {CONFIG}, which `selfrag convert` wrote; convert the model again"
        contents = _CONTENTS.get(stage, "no model")
        return f"was made by `selfrag {stage}` and holds {contents}; expected {_WANTED}"
    if (folder / "generator" / workdirs.MODEL_FILE).is_file():
        return f"is the folder of a quickstart; give --workdir={folder}, or the generator in it"
    for parent in (folder.parent, folder.parent.parent):  # checkpoints/, checkpoints/100/
        if (parent / workdirs.MODEL_FILE).is_file():
            return f"is a part of a training workdir; give all of it, {parent}"
    if not any(folder.glob("*config.json")):  # adapters have an adapter_config.json
        return f"no model here; expected {_WANTED}{hub.gguf_hint(folder)}"
    return ""


def _made(folder: Path) -> dict[str, Any]:
    """The manifest of a folder, finished or begun; {} without one."""
    for file in (folder / "manifest.json", folder / artifacts.STARTED):
        if file.is_file():
            return read_object(file, ())
    return {}


def _train(base: str | Path) -> str:
    return f"`selfrag train --role=generator --config.base={base} --data=DATA --workdir=OUT`"


# ---- reflection tokens ---------------------------------------------------------------------------
def require_reflection_tokens(folder: Path) -> None:
    """Raises UserError for a base model without reflection tokens, or with some of them only."""
    try:
        loading.read_tokenizer(folder).reflection_ids()
    except MissingReflectionTokens as e:
        if not e.has_none:
            raise
        raise MissingReflectionTokens(
            f"{folder}: is a base model without reflection tokens; run `selfrag train` first, "
            f"which adds and teaches them: {_train(folder)}"
        ) from None


# ---- notices -------------------------------------------------------------------------------------
def unfinished_notice(folder: Path) -> str:
    """What to say of a training that is unfinished, and answered with nevertheless; else ""."""
    is_workdir = (folder / workdirs.MODEL_FILE).is_file()
    if not is_workdir or artifacts.manifest_path(folder).is_file():
        return ""
    train = _made(folder).get("config", {}).get("train", {})
    length = ""
    if train.get("steps"):
        length = f" of {train['steps']}"
    elif train.get("epochs"):
        length = f" (of {train['epochs']} epochs)"
    command = f"the same `selfrag train --workdir={folder}`"
    if folder.name == "generator" and (folder.parent / "world").is_dir():
        command = f"`selfrag quickstart --workdir={folder.parent}`"
    return (
        f"{folder}: its training is unfinished; its last checkpoint answers, step "
        f"{workdirs.saved_steps(folder)[-1]}{length}; {command} finishes it"
    )


def knows_only_the_world(tokenizer: Tokenizer) -> bool:
    """Whether a model began as the small base or from scratch: it knows the world's words only."""
    return tokenizer.mode == "words"


def corpus_notice(tokenizer: Tokenizer, passages: Iterable[Passage], model: str | Path) -> str:
    """What to say if a model of the synthetic world meets passages of another corpus; else "".

    In the world's passages, every word in lower case is one token of such a model.
    """
    if not knows_only_the_world(tokenizer):
        return ""
    words = [w for p in passages for w in re.findall(r"[^\W\d_]+", p.text) if not w[0].isupper()]
    known = sum(len(tokenizer.encode([w])) == 1 for w in words)
    if known >= _KNOWN_SHARE * len(words):
        return ""
    return (
        f"{model}: this generator knows only the quickstart's small world, and these passages are "
        "of another corpus: its answers about them mean little. For a model of your own, see "
        "docs/your_own_model.md"
    )


def print_notices(folder: Path, tokenizer: Tokenizer, retriever: Retriever | None) -> None:
    """Prints what to know of a model, and of it with an index."""
    print_notice(unfinished_notice(folder))
    if isinstance(retriever, IndexRetriever):
        size = sum(map(len, retriever.index.segments))
        rows = range(0, size, max(1, size // _SAMPLED))
        print_notice(corpus_notice(tokenizer, map(retriever.index.passage, rows), folder))


def print_notice(text: str) -> None:
    """Prints a notice, if there is any, on stderr; of several processes, the main one does."""
    if text and current().is_main:
        print(f"note: {text}", file=sys.stderr)
