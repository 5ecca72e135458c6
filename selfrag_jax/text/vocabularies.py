"""Published vocabularies, from `tokenizer.model` or `tokenizer.json`: sections of text <-> ids.

A section is the text between two control tokens. Control tokens (beginning and end of text,
reflection tokens) are unknown here: tokenizer.py inserts their ids between the sections, so that
text can never become one.

Llama-2's vocabulary exists in both files. The sentencepiece file is the original; tokenizer.json
lists its merges. It gives the same ids if the original's rules are applied: a "▁" in front of each
section and for each space, and bytes for text without a piece. tests/test_vocabulary.py compares
the ids with those of transformers 4.31.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from selfrag_jax.files import atomic_write, kind_by_beginning

MODEL_FILE, JSON_FILE = "tokenizer.model", "tokenizer.json"
_SPACE = "▁"
# A line of tiktoken's vocabularies, which Llama 3 has under the same name: base64, and a rank.
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")
_LLAMA_CONTROLS = ("<unk>", "<s>", "</s>")
_BYTE = re.compile("<0x[0-9A-F]{2}>")


class Vocabulary(Protocol):
    llama: bool  # whether it follows Llama-2's rules
    size: int  # number of pieces, without tokens that were added later
    controls: dict[str, int]  # control tokens that the file itself lists

    def encode(self, section: str) -> list[int]: ...
    def decode(self, run: Sequence[int]) -> str: ...
    def piece(self, i: int) -> str: ...
    def save(self, folder: Path) -> None: ...
    def to_json(self, added: dict[str, int]) -> dict[str, Any]: ...


def is_tiktoken(path: Path) -> bool:
    """Whether a `tokenizer.model` is tiktoken's, not sentencepiece's."""
    with path.open("rb") as f:
        return _TIKTOKEN_LINE.fullmatch(f.readline(1000)) is not None


class SentencePiece:
    """A `tokenizer.model`, such as Llama-2's. Raises ValueError if it cannot be read."""

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
        probe = "a  \ufb01"  # two spaces, and a ligature that NFKC would split
        ids = self._sp.encode(probe)
        first = self._sp.id_to_piece(ids[0])
        if not first.startswith(_SPACE) or self._sp.decode(ids) != probe:
            raise ValueError(
                f"{path}: normalizes text or adds no leading space; "
                "only vocabularies with Llama's rules are supported"
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
        """Returns the same vocabulary as the content of a tokenizer.json."""
        pieces = [self._sp.id_to_piece(i) for i in range(self.size)]
        scores = [self._sp.get_score(i) for i in range(self.size)]
        ids = {piece: i for i, piece in enumerate(pieces)}
        learned = [i for i in range(self.size) if not self._sp.is_byte(i)]
        learned = [i for i in learned if pieces[i] not in self.controls]
        return llama_spec_of_pieces(ids, {pieces[i]: scores[i] for i in learned}, added)


class Bpe:
    """A byte-pair vocabulary as `tokenizer.json` has it.

    Llama-2's follows the original's rules, others their own. Raises ValueError if it cannot be
    read, or is of another type.
    """

    @classmethod
    def read(cls, path: Path) -> Bpe:
        try:
            spec = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as e:
            raise _not_readable(path, e) from None
        return cls(spec, path)

    def __init__(self, spec: Any, path: Path):
        """spec: the content of a tokenizer.json. path: where it comes from, for messages."""
        from tokenizers import Tokenizer as Backend

        try:
            kind, vocabulary = spec["model"]["type"], spec["model"].get("vocab", {})
            added = spec.get("added_tokens") or []
            self.controls = {str(t["content"]): _checked_id(t["id"]) for t in added}
            self.llama = bool(spec["model"].get("byte_fallback")) and _adds_leading_space(spec)
            self._names = (
                {_checked_id(i): t for t, i in vocabulary.items()} if kind == "BPE" else {}
            )
            self.size = max(self._names, default=-1) + 1
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise _not_readable(path, e) from None
        if kind != "BPE":
            raise ValueError(f"{path}: a vocabulary of type {kind!r}; only BPE is supported")
        self._spec = spec
        # The backend knows no control token, so it finds none in text.
        if self.llama:
            plain = _llama_spec(spec, {})
        else:
            plain = spec | {"added_tokens": [], "post_processor": None}
        try:
            self._backend = Backend.from_str(json.dumps(plain))
        except Exception as e:  # tokenizers raises Exception itself
            kind = kind_by_beginning(path) or f"not readable as a tokenizer: {e}"
            raise ValueError(f"{path}: {kind}") from None

    def encode(self, section: str) -> list[int]:
        return self._backend.encode(section, add_special_tokens=False).ids

    def decode(self, run: Sequence[int]) -> str:
        text = self._backend.decode(list(run), skip_special_tokens=False)
        return text.removeprefix(" ") if self.llama else text

    def piece(self, i: int) -> str:
        return self._names.get(i, f"<{i}>")  # a gap, which an added token may fill

    def save(self, folder: Path) -> None:
        """Writes nothing: the caller writes what `to_json` returns."""

    def to_json(self, added: dict[str, int]) -> dict[str, Any]:
        """Returns the content of a tokenizer.json with the `added` control tokens."""
        if self.llama:
            return _llama_spec(self._spec, added)
        known = {t["content"]: t for t in self._spec.get("added_tokens") or []}
        tokens = [known.get(t, _added_token(t, i)) for t, i in _by_id(added)]
        return self._spec | {"added_tokens": tokens}


def _not_readable(path: Path, e: Exception) -> ValueError:
    return ValueError(
        f"{path}: not readable as a tokenizer ({type(e).__name__}: {e}); is it truncated?"
    )


def _checked_id(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a token id")
    return value


def _adds_leading_space(spec: dict[str, Any]) -> bool:
    """Whether a normalizer (transformers 4) or a pre-tokenizer (transformers 5) adds one."""
    normalizer, pre_tokenizer = spec.get("normalizer") or {}, spec.get("pre_tokenizer") or {}
    if {"type": "Prepend", "prepend": _SPACE} in [normalizer, *normalizer.get("normalizers", ())]:
        return True
    return any(
        part.get("type") == "Metaspace" and part.get("prepend_scheme", "always") != "never"
        for part in [pre_tokenizer, *pre_tokenizer.get("pretokenizers", ())]
    )


def llama_spec_of_pieces(
    ids: dict[str, int], scores: dict[str, float], added: dict[str, int]
) -> dict[str, Any]:
    """The content of a tokenizer.json for a vocabulary of sentencepiece's: pieces with scores.

    ids: of all pieces. scores: of the learned ones, neither bytes nor control tokens; the higher
    one is merged first. added: control tokens.
    """
    merges: list[tuple[float, list[str]]] = []
    for piece, score in scores.items():
        splits = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        # If a piece can be merged in several ways, lower ids come first, as in transformers.
        known = sorted(
            (s for s in splits if s[0] in ids and s[1] in ids),
            key=lambda s: (ids[s[0]], ids[s[1]]),
        )
        merges += [(score, list(split)) for split in known]
    merges.sort(key=lambda merge: -merge[0])  # stable
    model = {
        "type": "BPE",
        "unk_token": "<unk>",
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": ids,
        "merges": [pair for _, pair in merges],
    }
    return _llama_spec({"model": model}, added)


def _llama_spec(spec: dict[str, Any], added: dict[str, int]) -> dict[str, Any]:
    """A tokenizer.json with the `added` control tokens that encodes a section as the original does.

    The original is the sentencepiece model.
    """
    # Converted files begin with merges that turn text into a control token or a byte; the original
    # has none.
    reserved = {*_LLAMA_CONTROLS, *filter(_BYTE.fullmatch, spec["model"]["vocab"])}
    pairs = [m if isinstance(m, list) else m.split(" ") for m in spec["model"]["merges"]]
    merges = [pair for pair in pairs if "".join(pair) not in reserved]
    normalizers = [
        {"type": "Prepend", "prepend": _SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
    ]
    decoders = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(t, i) for t, i in _by_id(added)],
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "post_processor": bos_template("<s>", added["<s>"]) if "<s>" in added else None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": spec["model"] | {"merges": merges, "dropout": None},
    }


def bos_template(token: str, i: int) -> dict[str, Any]:
    """The post-processor that puts BOS in front of a text if `transformers` asks for it."""
    first, second = ({"SpecialToken": {"id": token, "type_id": kind}} for kind in (0, 1))
    a, b = ({"Sequence": {"id": name, "type_id": kind}} for kind, name in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [first, a],
        "pair": [first, a, second, b],
        "special_tokens": {token: {"id": token, "ids": [i], "tokens": [token]}},
    }


def _by_id(added: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(added.items(), key=lambda item: item[1])


def _added_token(content: str, i: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": content, "special": True} | flags
