"""The files in which `transformers` keeps a tokenizer's control tokens and settings.

They lie in a model folder next to the vocabulary (vocabularies.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from selfrag_jax.files import write_text
from selfrag_jax.text.vocabularies import JSON_FILE, Vocabulary

BOS, EOS, PAD = "<s>", "</s>", "[PAD]"  # our names; a vocabulary may use others
# Our names -> the fields that say what a vocabulary calls them
NAME_FIELDS = {BOS: "bos_token", EOS: "eos_token", PAD: "pad_token"}
CONFIG_FILE, GENERATION_FILE = "tokenizer_config.json", "generation_config.json"
_TEMPLATE_FILE = "chat_template.jinja"


def read_control_tokens(
    folder: Path, vocabulary: Vocabulary
) -> tuple[dict[str, int], dict[str, str]]:
    """Returns the ids of all control tokens of a folder, and its names for BOS, EOS and PAD.

    Only names that differ from ours are listed. Raises ValueError naming the file if two files
    disagree, or if the folder has no BOS or EOS.
    """
    config, controls = _read_object(folder / CONFIG_FILE), dict(vocabulary.controls)
    readers: tuple[tuple[str, Callable[[dict], dict]], ...] = (
        (JSON_FILE, lambda row: {t["content"]: t["id"] for t in row.get("added_tokens") or []}),
        ("added_tokens.json", lambda row: row),
        (CONFIG_FILE, _added_tokens_of_config),
    )
    for name, read in readers:
        file = folder / name
        try:
            found = checked_ids(read(_read_object(file)))
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise ValueError(
                f"{file}: its added tokens cannot be read ({type(e).__name__}: {e})"
            ) from None
        for token, i in found.items():
            _check_id(file, token, i, controls.setdefault(token, i), vocabulary)
    return controls, _control_names(folder, config, controls)


def _added_tokens_of_config(row: dict[str, Any]) -> dict[str, int]:
    return {t["content"]: int(i) for i, t in (row.get("added_tokens_decoder") or {}).items()}


def _check_id(file: Path, token: str, i: int, known: int, vocabulary: Vocabulary) -> None:
    """Raises ValueError if another file, or a piece of the vocabulary, contradicts a token's id."""
    if known != i:
        raise ValueError(f"{file}: {token!r} has id {i}, elsewhere in this folder {known}")
    if token in vocabulary.controls or i >= vocabulary.size:
        return
    piece = vocabulary.piece(i)
    if piece not in (token, f"<{i}>"):
        raise ValueError(f"{file}: {token!r} has id {i}, which is {piece!r} in the vocabulary")


def _control_names(
    folder: Path, config: dict[str, Any], controls: dict[str, int]
) -> dict[str, str]:
    settings = {**config, **_read_object(folder / "special_tokens_map.json")}
    tokens: dict[str, str | None] = {}
    for ours, field in NAME_FIELDS.items():
        name = settings.get(field)
        name = name.get("content") if isinstance(name, dict) else name
        if not isinstance(name, (str, type(None))):
            raise ValueError(f"{folder}: {field}={name!r} is not a token")
        tokens[ours] = name
    names = differing_names(tokens, controls)
    for ours in (BOS, EOS):
        if names.get(ours, ours) not in controls:
            raise ValueError(
                f"{folder}: the tokenizer has no token {ours!r}, and {CONFIG_FILE} names no "
                f"{NAME_FIELDS[ours]}"
            )
    return names


def differing_names(tokens: dict[str, str | None], controls: dict[str, int]) -> dict[str, str]:
    """Returns a vocabulary's names for BOS, EOS and PAD where it lacks ours.

    tokens: its names by ours. controls: the ids of its control tokens.
    """
    return {
        ours: name
        for ours, name in tokens.items()
        if name and name != ours and name in controls and ours not in controls
    }


def read_passthrough(folder: Path) -> dict[str, Any]:
    """Returns the settings of a published folder that other programs use.

    They have no effect here but are saved with the model:
      ids         control-token ids of config.json, which may list several ends of text
      generation  the content of generation_config.json
      tokenizer   fields of tokenizer_config.json, and the chat template
    """
    model, settings = _read_object(folder / "config.json"), {}
    if model:
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        settings["ids"] = {"pad_token_id": None} | {n: model[n] for n in ids if n in model}
    if generation := _read_object(folder / GENERATION_FILE):
        settings["generation"] = generation
    config = _read_object(folder / CONFIG_FILE)
    fields = ("chat_template", "model_max_length", "padding_side", "truncation_side")
    settings["tokenizer"] = {name: config[name] for name in fields if name in config}
    template = folder / _TEMPLATE_FILE
    if template.is_file():
        try:
            settings["tokenizer"]["chat_template"] = template.read_text(encoding="utf-8")
        except UnicodeDecodeError as e:
            raise ValueError(f"{template}: not UTF-8: {e}") from None
    return settings


def write_tokenizer_config(
    folder: Path, bos: str, eos: str, pad: str | None, extra: dict[str, Any] | None = None
) -> None:
    """Writes tokenizer_config.json for AutoTokenizer.

    The class is named explicitly: for LlamaTokenizer, AutoTokenizer would build rules of its own
    and change ids.
    """
    row = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": pad,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,
    }
    content = json.dumps(row | (extra or {}), ensure_ascii=False, indent=2)
    write_text(folder / CONFIG_FILE, content + "\n")


def checked_ids(tokens: dict[str, Any]) -> dict[str, int]:
    """Returns `tokens`. Raises ValueError if a value is not a token id."""
    if bad := [i for i in dict(tokens).values() if type(i) is not int or i < 0]:
        raise ValueError(f"{bad[0]!r} is not a token id")
    return tokens


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        row = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"{path}: not valid JSON: {e}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return row
