"""The tokenizer of a GGUF file, from the fields `tokenizer.*` of its metadata.

Two kinds are read. `gpt2` is byte-level BPE with the merges listed; how text is split before it is
merged is only named (`tokenizer.ggml.pre`), and the patterns are here, as llama.cpp and the
published tokenizer.json files have them. `llama` is sentencepiece's BPE: pieces with scores, from
which the merges follow, with Llama-2's rules.

Either becomes the content of a tokenizer.json, so that text is encoded, and models are exported, as
for a Hugging Face folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from selfrag_jax.text.tokenizer import PublishedTokenizer
from selfrag_jax.text.tokenizer_files import BOS, EOS, PAD, differing_names
from selfrag_jax.text.vocabularies import Bpe, bos_template, llama_spec_of_pieces

_PREFIX = "tokenizer.ggml."
_ID_FIELDS = {BOS: "bos_token_id", EOS: "eos_token_id", PAD: "padding_token_id"}
# llama.cpp's types of tokens. Text never becomes a control token here, or one that was added later
# (user-defined): they enter as `Control` parts alone, as they do with a tokenizer.json.
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 2, 3, 4, 5, 6

_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN_PATTERN = (  # Mistral Nemo
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level(use_regex: bool) -> dict[str, Any]:
    """use_regex: splits by GPT-2's pattern first."""
    flags = {"add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}
    return {"type": "ByteLevel", **flags}


def _split_by(pattern: str) -> list[dict[str, Any]]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    return [split | {"invert": False}, _byte_level(use_regex=False)]


_GPT2 = [_byte_level(use_regex=True)]
_DIGITS = [{"type": "Digits", "individual_digits": True}, *_GPT2]
_LLAMA3, _TEKKEN = _split_by(_LLAMA3_PATTERN), _split_by(_TEKKEN_PATTERN)
# tokenizer.ggml.pre -> pre-tokenizers of the `tokenizers` library
PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": _GPT2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "falcon3": _LLAMA3,
    "tekken": _TEKKEN,
}
# Their tokenizer.json takes a piece that is in the vocabulary as it is, whatever the merges make.
_WHOLE_PIECES = (_LLAMA3, _TEKKEN)


def read_tokenizer(fields: dict[str, Any], path: Path, mode: str | None) -> PublishedTokenizer:
    """The tokenizer of a GGUF file. fields: its metadata; mode: as for Tokenizer.load.

    Raises ValueError naming the file and the field at fault.
    """
    kind = _field(fields, path, "model", str)
    tokens = _field(fields, path, "tokens", list)
    types = _field(fields, path, "token_type", list, [1] * len(tokens))
    if len(types) != len(tokens) or not all(isinstance(t, str) for t in tokens):
        raise ValueError(f"{path}: {_PREFIX}tokens and {_PREFIX}token_type do not belong together")
    control_types = (_UNKNOWN, _CONTROL, _USER_DEFINED)
    controls = {t: i for i, t in enumerate(tokens) if types[i] in control_types}
    # Files pad the vocabulary to the rows of the embedding with tokens that are not used.
    ids = {t: i for i, t in enumerate(tokens) if types[i] != _UNUSED}
    names: dict[str, str | None] = {}
    for ours, field in _ID_FIELDS.items():
        if (i := _field(fields, path, field, int, None)) is not None:
            if i >= len(tokens):
                raise ValueError(f"{path}: {_PREFIX}{field}={i}: there are {len(tokens)} tokens")
            names[ours] = tokens[i]
            ids[tokens[i]] = controls[tokens[i]] = i
    renamed = differing_names(names, controls)
    for ours in (BOS, EOS):
        if renamed.get(ours, ours) not in controls:
            raise ValueError(
                f"{path}: the tokenizer has no token {ours!r}, and there is no "
                f"{_PREFIX}{_ID_FIELDS[ours]}"
            )
    if kind == "gpt2":
        spec = _byte_level_spec(fields, path, ids, controls)
        if fields.get(f"{_PREFIX}add_bos_token"):
            bos = renamed.get(BOS, BOS)
            spec["post_processor"] = bos_template(bos, controls[bos])
    elif kind == "llama":
        spec = _sentencepiece_spec(fields, path, ids, types, controls)
    else:
        raise ValueError(
            f"{path}: {_PREFIX}model={kind!r} is not supported; 'gpt2' (byte-level BPE) and "
            "'llama' (sentencepiece) are"
        )
    vocabulary = Bpe(spec, path)
    mode = PublishedTokenizer.checked_mode(vocabulary, mode, path)
    passthrough = _passthrough(fields)
    return PublishedTokenizer(vocabulary, mode, controls, renamed, str(path), passthrough)


def _field(fields: dict[str, Any], path: Path, name: str, kind: type, otherwise: Any = ...) -> Any:
    """A field of the tokenizer. Raises ValueError if it is missing or of another type."""
    value = fields.get(f"{_PREFIX}{name}", otherwise)
    if value is ...:
        raise ValueError(f"{path}: has no tokenizer; it lacks {_PREFIX}{name}")
    if value is not otherwise and type(value) is not kind:
        raise ValueError(f"{path}: {_PREFIX}{name}={value!r:.80}: expected {kind.__name__}")
    return value


def _passthrough(fields: dict[str, Any]) -> dict[str, Any]:
    """What other programs use; see tokenizer_files.read_passthrough."""
    fields_of_config = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    ids = {n: fields.get(f"{_PREFIX}{_ID_FIELDS[t]}") for n, t in fields_of_config.items()}
    template = fields.get("tokenizer.chat_template")
    return {
        "ids": {n: i for n, i in ids.items() if i is not None or n == "pad_token_id"},
        "tokenizer": {"chat_template": template} if isinstance(template, str) else {},
    }


def _byte_level_spec(
    fields: dict[str, Any], path: Path, ids: dict[str, int], controls: dict[str, int]
) -> dict[str, Any]:
    known = ", ".join(map(repr, PRE_TOKENIZERS))
    pre = _field(fields, path, "pre", str, None)
    if pre is None:
        raise ValueError(
            f"{path}: does not say how text is split ({_PREFIX}pre), as files of before May 2024; "
            "make it again with a newer llama.cpp"
        )
    if pre not in PRE_TOKENIZERS:
        raise ValueError(f"{path}: {_PREFIX}pre={pre!r} is not supported; {known} are")
    _require(fields, path, "add_space_prefix", False)
    merges = [m.split(" ") for m in _field(fields, path, "merges", list)]
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": "",
        "end_of_word_suffix": "",
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": PRE_TOKENIZERS[pre] in _WHOLE_PIECES,
        "vocab": ids,
        "merges": merges,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[pre]},
        "post_processor": None,
        "decoder": _byte_level(use_regex=True) | {"add_prefix_space": True},
        "model": model,
    }


def _sentencepiece_spec(
    fields: dict[str, Any],
    path: Path,
    ids: dict[str, int],
    types: list[int],
    controls: dict[str, int],
) -> dict[str, Any]:
    _require(fields, path, "add_space_prefix", True)
    _require(fields, path, "remove_extra_whitespaces", False)
    scores = _field(fields, path, "scores", list)
    if len(scores) != len(types):
        raise ValueError(f"{path}: {_PREFIX}scores has {len(scores)} of {len(types)} scores")
    if "<unk>" not in ids:
        raise ValueError(f"{path}: {_PREFIX}tokens has no '<unk>', which Llama's rules need")
    learned = {t: scores[i] for t, i in ids.items() if types[i] != _BYTE and t not in controls}
    return llama_spec_of_pieces(ids, learned, controls)


def _require(fields: dict[str, Any], path: Path, name: str, supported: bool) -> None:
    if fields.get(f"{_PREFIX}{name}", supported) is not supported:
        raise ValueError(
            f"{path}: {_PREFIX}{name}={not supported} is not supported with this kind of tokenizer"
        )
