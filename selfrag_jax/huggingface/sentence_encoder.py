"""Sentence encoders of the BERT family: a folder or a hub name -> encoder, tokenizer and settings.

The settings are what turns hidden states into a vector: pooling, normalization, the length at which
texts are cut, and what is put in front of queries and passages. They come from the files that
sentence-transformers writes (modules.json and those that it names). Other folders, and prefixes
that a folder does not record, go by the encoder's name:

    e5-*           mean, normalized; "query: " and "passage: "
    bge-*-en*      first token, normalized; a sentence in front of queries
    contriever     mean, not normalized
    anything else  mean, not normalized

What the files ask for and is not supported (a Dense module, another pooling) is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfrag_jax.errors import UserError
from selfrag_jax.files import read_json
from selfrag_jax.huggingface.encoder_weights import load_bert
from selfrag_jax.huggingface.hub import encoder_folder
from selfrag_jax.huggingface.weight_files import CONFIG, FORMATS
from selfrag_jax.models.encoder import POOLINGS, Encoder
from selfrag_jax.models.params import Params
from selfrag_jax.text.wordpiece import CONFIG_FILE as TOKENIZER_CONFIG
from selfrag_jax.text.wordpiece import JSON_FILE, VOCAB_FILE, WordPiece

MODULES = "modules.json"
TRANSFORMER, PROMPTS = "sentence_bert_config.json", "config_sentence_transformers.json"
_LIBRARY = "sentence_transformers"
_TEXT_OUTPUT = "token_embeddings"
# pooling_mode of sentence-transformers 6; the field of the same meaning in earlier versions
_POOLING_FIELDS = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
# Names of stored prompts, as encode_query and encode_document of sentence-transformers take them.
_QUERY_PROMPTS, _PASSAGE_PROMPTS = ("query",), ("document", "passage", "corpus")


@dataclass(frozen=True)
class EncoderSettings:
    """How texts become vectors.

    A copy of the folder has another name, so whoever copies an encoder stores its settings, too.
    """

    pooling: str  # one of encoder.POOLINGS
    normalize: bool  # to unit length
    max_length: int  # in tokens, [CLS] and [SEP] included; longer texts are cut
    query_prefix: str  # put in front of queries
    passage_prefix: str  # put in front of passages
    lower_case: bool  # lower-case texts even if the tokenizer's files do not
    notice: str  # where pooling and prefixes come from, for the user

    def __post_init__(self):
        if self.pooling not in POOLINGS:
            raise UserError(f"pooling={self.pooling!r}: must be one of {', '.join(POOLINGS)}")
        if self.max_length < 2:
            raise UserError(f"max_length={self.max_length}: must be at least 2")


@dataclass(frozen=True)
class LoadedEncoder:
    encoder: Encoder
    params: Params  # f32, in host memory, layers stacked
    tokenizer: WordPiece
    settings: EncoderSettings


def load_encoder(
    name: str | Path, dtype: str = "float32", settings: EncoderSettings | None = None
) -> LoadedEncoder:
    """Reads an encoder. name: a folder, or a model of the Hugging Face hub.

    dtype: of activations. settings: default: those of the folder. Raises UserError naming the file,
    field or tensor at fault.
    """
    folder = encoder_folder(name)
    encoder, params = load_bert(folder, dtype)
    settings = settings or read_settings(folder, name, encoder.config.max_length)
    tokenizer = WordPiece.load(folder, settings.lower_case)
    if tokenizer.vocab_size > encoder.config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the vocab_size of "
            f"{CONFIG} is {encoder.config.vocab_size}"
        )
    return LoadedEncoder(encoder, params, tokenizer, settings)


def encoder_files(folder: str | Path) -> list[Path]:
    """The files that make up the encoder of a folder, relative to it: what a copy needs.

    Raises UserError if the folder names a file outside of itself.
    """
    folder = Path(folder)
    candidates = [CONFIG, TOKENIZER_CONFIG, MODULES, TRANSFORMER, PROMPTS]
    candidates += [JSON_FILE if (folder / JSON_FILE).is_file() else VOCAB_FILE]
    for single, index in FORMATS:
        if (folder / index).is_file():
            weight_map = _read_object(folder / index).get("weight_map") or {}
            candidates += [index, *sorted(set(weight_map.values()))]
        if (folder / single).is_file() or (folder / index).is_file():
            candidates += [single]
            break
    if (folder / MODULES).is_file():
        candidates += [f"{path}/{CONFIG}" for _, path in _read_modules(folder) if path]
    files = [Path(name) for name in candidates if (folder / name).is_file()]
    if outside := [file for file in files if file.is_absolute() or ".." in file.parts]:
        raise UserError(f"{folder}: names a file outside of the folder, {outside[0]}")
    return files


# ---- settings --------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Family:
    """Encoders that are recognized by name, and how their authors use them."""

    title: str
    pattern: str  # of the name, lower-cased
    pooling: str
    normalize: bool
    query_prefix: str = ""
    passage_prefix: str = ""


_FAMILIES = (
    _Family(
        "E5", r"(?<!multilingual-)\be5-(small|base|large)", "mean", True, "query: ", "passage: "
    ),
    _Family(
        "BGE",
        r"\bbge-(small|base|large)-en",
        "cls",
        True,
        "Represent this sentence for searching relevant passages: ",
    ),
    _Family("Contriever", r"contriever", "mean", False),
)


def read_settings(
    folder: str | Path, name: str | Path | None = None, max_positions: int = 512
) -> EncoderSettings:
    """Reads the settings of a folder.

    name: what the encoder is called, such as its hub name (default: the folder's name).
    max_positions: the most tokens that the model takes. Raises UserError for a file that cannot be
    read or asks for something unsupported.
    """
    folder = Path(folder)
    config, transformer = _read_object(folder / CONFIG), _read_object(folder / TRANSFORMER)
    family = _find_family(_names(folder, name or folder, config), config)
    if (folder / MODULES).is_file():
        pooling, normalize = _read_pooling(folder)
        source = MODULES
    elif family is not None:
        pooling, normalize = family.pooling, family.normalize
        source = f"as {family.title} encoders are used"
    else:
        pooling, normalize = "mean", False
        source = f"the default, since the folder has no {MODULES}"
    prefixes, prefix_source = _read_prefixes(folder), f"from {PROMPTS}"
    if prefixes is None and family is not None:
        prefixes = family.query_prefix, family.passage_prefix
        prefix_source = f"as {family.title} encoders are used"
    query_prefix, passage_prefix = prefixes or ("", "")
    notice = f"{pooling} pooling, {'' if normalize else 'not '}normalized ({source})"
    if query_prefix or passage_prefix:
        notice += f"; prefixes {query_prefix!r} and {passage_prefix!r} ({prefix_source})"
    _check_transformer(folder / TRANSFORMER, transformer)
    return EncoderSettings(
        pooling=pooling,
        normalize=normalize,
        max_length=_max_length(folder, transformer, max_positions),
        query_prefix=query_prefix,
        passage_prefix=passage_prefix,
        lower_case=bool(transformer.get("do_lower_case")),
        notice=notice,
    )


def _names(folder: Path, name: str | Path, config: dict[str, Any]) -> Iterator[str]:
    """What the encoder may be called: last components, in lower case."""
    yield Path(name).name.lower()
    if source := config.get("_name_or_path"):
        yield Path(str(source)).name.lower()
    resolved = folder.resolve()
    yield resolved.name.lower()
    if resolved.parent.name == "snapshots":  # a download: models--owner--name/snapshots/revision
        yield resolved.parent.parent.name.split("--")[-1].lower()


def _find_family(names: Iterator[str], config: dict[str, Any]) -> _Family | None:
    architectures = config.get("architectures")
    if isinstance(architectures, list):
        names = iter([*names, *(str(a).lower() for a in architectures)])
    for name in names:
        for family in _FAMILIES:
            if re.search(family.pattern, name):
                return family
    return None


def _read_pooling(folder: Path) -> tuple[str, bool]:
    """(pooling, whether vectors are normalized), by modules.json."""
    modules, file = _read_modules(folder), folder / MODULES
    kinds = [kind for kind, _ in modules]
    for kind in kinds:
        if kind not in ("Transformer", "Pooling", "Normalize"):
            raise UserError(
                f"{file}: a module {kind} is not supported; Transformer, Pooling and Normalize are"
            )
    if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]):
        raise UserError(
            f"{file}: modules {', '.join(kinds)}: expected Transformer, Pooling and, optionally, "
            "Normalize"
        )
    if modules[0][1]:
        raise UserError(
            f"{file}: the Transformer is in the subfolder {modules[0][1]}; load the encoder with "
            "sentence-transformers and save it again, which puts it into the folder itself"
        )
    if kinds[2:]:
        normalize = folder / modules[2][1] / CONFIG
        inputs = _read_object(normalize).get("module_input_name", "sentence_embedding")
        if inputs != "sentence_embedding":
            raise UserError(f"{normalize}: module_input_name={inputs!r} is not supported")
    return _read_pooling_mode(folder / modules[1][1] / CONFIG), bool(kinds[2:])


def _read_modules(folder: Path) -> list[tuple[str, str]]:
    """(class, subfolder) of each module. The class is without its module, which has moved."""
    file = folder / MODULES
    rows, modules = read_json(file), []
    for row in rows if isinstance(rows, list) else [rows]:
        kind, path = (row.get("type"), row.get("path")) if isinstance(row, dict) else (None, None)
        if not isinstance(kind, str) or not isinstance(path, str):
            raise UserError(f"{file}: expected a list of modules, each with a type and a path")
        package, *_, name = kind.split(".")
        modules.append((name if package == _LIBRARY else kind, path))
    return modules


def _read_pooling_mode(file: Path) -> str:
    if not file.is_file():
        raise UserError(f"{file}: no such file, though {MODULES} names it")
    row = _read_object(file)
    mode = row.get("pooling_mode")
    if mode is None:  # before sentence-transformers 6: one truth value per mode
        mode = [mode for mode, field in _POOLING_FIELDS.items() if row.get(field)]
    modes = mode if isinstance(mode, list) else [mode]
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise UserError(
            f"{file}: pooling {' with '.join(map(str, modes)) or 'of no kind'} is not supported; "
            f"{' and '.join(POOLINGS)} are"
        )
    if row.get("include_prompt") is False:
        raise UserError(f"{file}: include_prompt=false is not supported: prefixes are pooled, too")
    return modes[0]


def _read_prefixes(folder: Path) -> tuple[str, str] | None:
    """(prefix of queries, of passages) by the stored prompts; None if all of them are empty.

    sentence-transformers writes empty ones for encoders that never had any.
    """
    file = folder / PROMPTS
    row = _read_object(file)
    kind = row.get("model_type") or "SentenceTransformer"
    if kind != "SentenceTransformer":
        raise UserError(f"{file}: model_type={kind!r} is not supported; 'SentenceTransformer' is")
    prompts = row.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(
        isinstance(prompt, str | None) for prompt in prompts.values()
    ):
        raise UserError(f"{file}: prompts: expected an object of texts")
    prompts = {name: prompt for name, prompt in prompts.items() if prompt}
    query, passage = (
        next((prompts[name] for name in names if name in prompts), None)
        for names in (_QUERY_PROMPTS, _PASSAGE_PROMPTS)
    )
    if query is None and passage is None:
        # A default that is for neither is for all texts.
        general = prompts.get(row.get("default_prompt_name"))
        return None if general is None else (general, general)
    return query or "", passage or ""


def _check_transformer(file: Path, row: dict[str, Any]) -> None:
    """Raises UserError for a setting of sentence_bert_config.json that is not supported."""
    supported: dict[str, Any] = {
        "transformer_task": "feature-extraction",
        "module_output_name": _TEXT_OUTPUT,
        "modality_config": {
            "text": {"method": "forward", "method_output_name": "last_hidden_state"}
        },
    }
    for field, value in row.items():
        if field in ("max_seq_length", "do_lower_case") or not value:
            continue
        if value != supported.get(field):
            raise UserError(f"{file}: {field}={value!r} is not supported")


def _max_length(folder: Path, transformer: dict[str, Any], max_positions: int) -> int:
    """In tokens. sentence-transformers 6 writes it as the tokenizer's model_max_length."""
    for file, field, row in (
        (TRANSFORMER, "max_seq_length", transformer),
        (TOKENIZER_CONFIG, "model_max_length", _read_object(folder / TOKENIZER_CONFIG)),
    ):
        length = row.get(field)
        if length is None:
            continue
        is_number = isinstance(length, (int, float)) and not isinstance(length, bool)
        if not is_number or not length >= 2:
            raise UserError(f"{folder / file}: {field}={length!r}: must be a number above 1")
        return int(min(length, max_positions))
    return max_positions


def _read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is no such file."""
    if not file.is_file():
        return {}
    row = read_json(file)
    if not isinstance(row, dict):
        raise UserError(f"{file}: expected a JSON object")
    return row
