"""Vocabularies of published models: sections of ordinary text <-> ids, read from `tokenizer.model` or `tokenizer.json`.

A section is the text between two control tokens. Control tokens (beginning and end of text, reflection tokens) are not
known here: tokenizer.py puts their ids between the sections, so that no text can become one.

Llama-2's vocabulary exists in both files. The sentencepiece file is the original; in a tokenizer.json its merges are
listed, and the same ids come out once the rules are those of the original: "▁" in front of each section and for each
space, bytes for what has no piece (compared with transformers 4.31 in tests/test_vocabulary.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from selfrag_jax.files import atomic_write

MODEL_FILE, JSON_FILE = "tokenizer.model", "tokenizer.json"
_SPACE = "▁"
_LLAMA_CONTROLS = ("<unk>", "<s>", "</s>")
_BYTE = re.compile("<0x[0-9A-F]{2}>")


class Vocabulary(Protocol):
    llama: bool  # whether Llama's rules are followed
    size: int  # ids of pieces, without what was added later
    controls: dict[str, int]  # control tokens that the file itself holds

    def encode(self, section: str) -> list[int]: ...
    def decode(self, run: Sequence[int]) -> str: ...
    def piece(self, i: int) -> str: ...
    def save(self, folder: Path) -> None: ...
    def to_json(self, added: dict[str, int]) -> dict[str, Any]: ...


class SentencePiece:
    """A `tokenizer.model`, as Llama-2 has one. Raises ValueError when it cannot be read."""

    llama = True

    def __init__(self, path: Path):
        import sentencepiece

        self._content = path.read_bytes()
        try:
            self._sp = sentencepiece.SentencePieceProcessor(model_proto=self._content)
        except RuntimeError as e:
            raise ValueError(
                f"{path}: not readable as a sentencepiece model ({e}); is it truncated?"
            ) from None
        self.size = self._sp.get_piece_size()
        pieces = [
            self._sp.id_to_piece(i) for i in self._sp.encode("a  \ufb01")
        ]  # a ligature that NFKC would take apart
        if (
            not pieces[0].startswith(_SPACE)
            or self._sp.decode(self._sp.encode("a  \ufb01")) != "a  \ufb01"
        ):
            raise ValueError(
                f"{path}: changes text before it cuts it, or puts no space in front: not Llama's rules, not supported"
            )
        special = [i for i in range(self.size) if self._sp.is_control(i) or self._sp.is_unknown(i)]
        self.controls = {self._sp.id_to_piece(i): i for i in special}

    def encode(self, section: str) -> list[int]:
        return self._sp.encode(section)

    def decode(self, run: Sequence[int]) -> str:
        return self._sp.decode(list(run))

    def piece(self, i: int) -> str:
        return self._sp.id_to_piece(i)

    def save(self, folder: Path) -> None:
        with atomic_write(folder / MODEL_FILE, "wb") as f:
            f.write(self._content)

    def to_json(self, added: dict[str, int]) -> dict[str, Any]:
        """The same vocabulary as a tokenizer.json."""
        pieces = [self._sp.id_to_piece(i) for i in range(self.size)]
        scores = [self._sp.get_score(i) for i in range(self.size)]
        ids = {piece: i for i, piece in enumerate(pieces)}
        merges = []
        for i, piece in enumerate(pieces):
            if self._sp.is_byte(i) or piece in self.controls:
                continue
            halves = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
            # Of pieces made in several ways, that of the smaller ids first, as transformers lists them.
            known = sorted(
                (h for h in halves if h[0] in ids and h[1] in ids),
                key=lambda h: (ids[h[0]], ids[h[1]]),
            )
            merges += [(scores[i], list(h)) for h in known]
        merges.sort(key=lambda m: -m[0])  # stable
        model = {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
        }
        return _llama_rules(
            {"model": model | {"vocab": ids, "merges": [m for _, m in merges]}}, added
        )


class Bpe:
    """A `tokenizer.json` of byte pairs. Llama-2's follows the rules of its original, others (Llama-3's) their own.

    Raises ValueError when it cannot be read, or is of another kind.
    """

    def __init__(self, path: Path):
        from tokenizers import Tokenizer as Backend

        try:
            spec = json.loads(path.read_text(encoding="utf-8"))
            kind, vocabulary = spec["model"]["type"], spec["model"].get("vocab", {})
            self.controls = {
                str(t["content"]): _id(t["id"]) for t in spec.get("added_tokens") or []
            }
            self.llama = bool(spec["model"].get("byte_fallback")) and _puts_a_space_in_front(spec)
            self._names = {_id(i): t for t, i in vocabulary.items()} if kind == "BPE" else {}
            self.size = max(self._names, default=-1) + 1
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise ValueError(
                f"{path}: not readable as a tokenizer ({type(e).__name__}: {e}); is it truncated?"
            ) from None
        if kind != "BPE":
            raise ValueError(f"{path}: a vocabulary of type {kind!r}; only BPE is supported")
        self._spec = spec
        # No control token is known to the backend, so that it finds none in text.
        plain = (
            _llama_rules(spec, {})
            if self.llama
            else spec | {"added_tokens": [], "post_processor": None}
        )
        try:
            self._backend = Backend.from_str(json.dumps(plain))
        except Exception as e:  # tokenizers raises Exception itself
            raise ValueError(f"{path}: not readable as a tokenizer: {e}") from None

    def encode(self, section: str) -> list[int]:
        return self._backend.encode(section, add_special_tokens=False).ids

    def decode(self, run: Sequence[int]) -> str:
        text = self._backend.decode(list(run), skip_special_tokens=False)
        return text.removeprefix(" ") if self.llama else text

    def piece(self, i: int) -> str:
        return self._names.get(i, f"<{i}>")  # a hole, where an added token may stand

    def save(self, folder: Path) -> None:
        pass  # what `to_json` gives is written

    def to_json(self, added: dict[str, int]) -> dict[str, Any]:
        if self.llama:
            return _llama_rules(self._spec, added)
        known = {t["content"]: t for t in self._spec.get("added_tokens") or []}
        return self._spec | {
            "added_tokens": [known.get(t, _added_token(t, i)) for t, i in _by_id(added)]
        }


def _id(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no id")
    return value


def _puts_a_space_in_front(spec: dict[str, Any]) -> bool:
    """As the normalizer of transformers 4 and the pre-tokenizer of transformers 5 do."""
    normalizer, cutter = spec.get("normalizer") or {}, spec.get("pre_tokenizer") or {}
    if {"type": "Prepend", "prepend": _SPACE} in [normalizer, *normalizer.get("normalizers", ())]:
        return True
    return any(
        one.get("type") == "Metaspace" and one.get("prepend_scheme", "always") != "never"
        for one in [cutter, *cutter.get("pretokenizers", ())]
    )


def _llama_rules(spec: dict[str, Any], added: dict[str, int]) -> dict[str, Any]:
    """A tokenizer.json that encodes each section as the sentencepiece original does, with the `added` control tokens."""
    # A merge that makes a control token or a byte out of text stands first in converted files; the original has none.
    reserved = {*_LLAMA_CONTROLS, *filter(_BYTE.fullmatch, spec["model"]["vocab"])}
    pair = lambda m: m if isinstance(m, list) else m.split(" ")  # noqa: E731
    merges = [m for m in map(pair, spec["model"]["merges"]) if "".join(m) not in reserved]
    decoders = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    first = {
        "SpecialToken": {"id": "<s>", "type_id": 0}
    }  # in front of a text, where `transformers` is asked for it
    sequence = [{"Sequence": {"id": name, "type_id": kind}} for kind, name in enumerate("AB")]
    front = {
        "type": "TemplateProcessing",
        "single": [first, sequence[0]],
        "pair": [first, sequence[0], {"SpecialToken": {"id": "<s>", "type_id": 1}}, sequence[1]],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [added.get("<s>", 1)], "tokens": ["<s>"]}},
    }
    prepend, replace = (
        {"type": "Prepend", "prepend": _SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
    )
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(t, i) for t, i in _by_id(added)],
        "normalizer": {"type": "Sequence", "normalizers": [prepend, replace]},
        "pre_tokenizer": None,
        "post_processor": front if "<s>" in added else None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": spec["model"] | {"merges": merges, "dropout": None},
    }


def _by_id(added: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(added.items(), key=lambda pair: pair[1])


def _added_token(content: str, i: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": content, "special": True} | flags
