"""Text <-> token ids. No other module tokenizes.

Text from a user or a corpus never becomes a control token: it is encoded as ordinary text, even if
it spells one. Control tokens (reflection tokens, passage markup, prompt headings, end of text)
enter only as `Control` parts, which prompts.py writes. A prompt is therefore a list of parts, not a
string:

    answer = [Control("### Response:\\n"), "Born in Quenport.", Control("[Fully supported]")]
    tokenizer.encode(answer)

The mode decides how the text between control tokens is split. It is stored next to the vocabulary:

    words       each part starts a new word (a leading space is added); the models trained here
    llama_slow  Llama-2's slow tokenizer (transformers 4.31), with which the released generator was
                trained; white space next to a control token is lost, for example the newline in
                "### Response:\\n[Retrieval]"
    llama_fast  Llama-2's fast tokenizer (transformers 4.31), with which it was served; lossless
    json        a tokenizer.json with its own rules, such as Llama-3's

In the last three modes, all text between two control tokens is encoded as a whole, however many
parts it came in. A control that the vocabulary lacks, such as a heading, is part of that text.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfrag_jax.files import kind_by_beginning, write_text
from selfrag_jax.storage.paths import as_path
from selfrag_jax.text import reflection, tokenizer_files
from selfrag_jax.text.tokenizer_files import BOS, EOS, PAD
from selfrag_jax.text.vocabularies import (
    JSON_FILE,
    MODEL_FILE,
    Bpe,
    SentencePiece,
    Vocabulary,
    is_tiktoken,
)

NEWLINE = "\n"
INSTRUCTION, INPUT, RESPONSE = "### Instruction:\n", "\n\n### Input:\n", "\n\n### Response:\n"
HEADINGS = (INSTRUCTION, INPUT, RESPONSE)
MODES = ("words", "llama_slow", "llama_fast", "json")
MODE_FILE = "tokenizer_mode.json"


@dataclass(frozen=True)
class Control:
    """A control token by name, as opposed to text that happens to spell it."""

    token: str


Part = str | Control

# A piece of an encoded part list: token ids, and the name of the control token they stand for, or
# None for text.
Encoded = tuple[list[int], str | None]


class Tokenizer(ABC):
    """A vocabulary, its control tokens and the mode. Created by `load` or `train`."""

    mode: str
    source: str  # for messages
    bos_id: int
    eos_id: int
    pad_id: int

    @staticmethod
    def is_in(folder: str | Path) -> bool:
        """Whether a folder has a file of a tokenizer."""
        return any((as_path(folder) / f).is_file() for f in (MODE_FILE, MODEL_FILE, JSON_FILE))

    @classmethod
    def load(cls, folder: str | Path, mode: str | None = None) -> Tokenizer:
        """Reads the tokenizer of a model folder.

        mode: overrides the recorded one; None takes the recorded one or, if there is none,
        llama_fast for a vocabulary with Llama-2's rules and json for others.
        Raises FileNotFoundError or ValueError naming the file, and ValueError for a mode that does
        not fit the vocabulary.
        """
        folder = as_path(folder)
        record = folder / MODE_FILE
        if not record.is_file():
            return PublishedTokenizer.read(folder, mode, None)
        try:
            row = json.loads(record.read_text())
            recorded = row["mode"]
            if recorded in MODES and recorded != "words":
                tokenizer_files.checked_ids(row["added"])
                dict(row["names"])  # raises if it is not an object
        except (ValueError, KeyError, TypeError) as e:
            raise ValueError(f"{record}: not readable as the record of a tokenizer: {e}") from None
        if recorded not in MODES:
            raise ValueError(
                f"{record}: unknown tokenizer mode {recorded!r}; known modes: {', '.join(MODES)}"
            )
        if mode not in (None, recorded) and "words" in (mode, recorded):
            raise ValueError(
                f"{record}: this vocabulary is of mode {recorded!r}; it cannot be read as {mode!r}"
            )
        if recorded == "words":
            return WordTokenizer.read(folder)
        return PublishedTokenizer.read(folder, mode or recorded, row)

    @abstractmethod
    def save(self, folder: str | Path) -> None:
        """Writes vocabulary, mode and the files that `transformers` reads."""

    @abstractmethod
    def with_reflection_tokens(self) -> Tokenizer:
        """Returns a copy that has the reflection tokens; new ones get the last ids.

        Raises MissingReflectionTokens if it already has some of them but not all.
        """

    @property
    @abstractmethod
    def vocab_size(self) -> int: ...

    def config_ids(self) -> dict[str, Any]:
        """Returns the control-token ids that a model's config.json records, by its field names."""
        return {
            "bos_token_id": self.bos_id,
            "eos_token_id": self.eos_id,
            "pad_token_id": self.pad_id,
        }

    @abstractmethod
    def encode_spans(
        self, spans: Sequence[Sequence[Part]], before_control: bool = False
    ) -> list[list[Encoded]]:
        """Encodes consecutive lists of parts, each separately: text does not join across lists.

        before_control: whether a control token will follow, in which case mode llama_slow drops
        trailing white space.
        """

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids`, with control tokens spelled out.

        Encoding and then decoding restores a single text part.
        """

    @abstractmethod
    def token(self, i: int) -> str:
        """Returns a readable name of an id."""

    @abstractmethod
    def _id(self, control: str) -> int | None: ...

    # ---- the same in all modes -------------------------------------------------------------------
    def encode(self, parts: Part | Sequence[Part], before_control: bool = False) -> list[int]:
        """Returns the ids of text and control parts.

        A control that the vocabulary lacks is encoded as text. before_control: see encode_spans.
        """
        parts = [parts] if isinstance(parts, (str, Control)) else parts
        return [i for ids, _ in self.encode_spans([parts], before_control)[0] for i in ids]

    def reflection_ids(self) -> reflection.ReflectionIds:
        """Returns all reflection ids. Raises MissingReflectionTokens if one is missing."""
        return reflection.lookup(self._id, self.source)

    def id(self, control: str) -> int:
        """Returns the id of a control token. Raises ValueError if the vocabulary lacks it."""
        i = self._id(control)
        if i is None:
            raise ValueError(f"{self.source}: has no token {control!r}")
        return i


class WordTokenizer(Tokenizer):
    """Mode words: a vocabulary of the `tokenizers` library that was trained here."""

    mode = "words"

    def __init__(self, backend, source: str = "tokenizer"):
        self._backend = backend
        self._backend.encode_special_tokens = True  # text that spells a control token stays text
        self.source = source
        self.bos_id, self.eos_id, self.pad_id = (self.id(t) for t in (BOS, EOS, PAD))

    @classmethod
    def read(cls, folder: Path) -> WordTokenizer:
        from tokenizers import Tokenizer as Backend

        path = folder / JSON_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: no such file, which {MODE_FILE} belongs to; copy it from the folder that "
                "the model came from"
            )
        try:
            backend = Backend.from_str(path.read_text())
        except Exception as e:  # tokenizers raises Exception itself
            kind = kind_by_beginning(path) or f"not readable as a tokenizer: {e}"
            raise ValueError(f"{path}: {kind}") from e
        if missing := [t for t in (BOS, EOS, PAD) if backend.token_to_id(t) is None]:
            raise ValueError(
                f"{path}: has no token {missing[0]!r}, so it is not the one that {MODE_FILE} was "
                "written for; copy the tokenizer files from the folder that the model came from"
            )
        return cls(backend, str(path))

    def save(self, folder: str | Path) -> None:
        folder = as_path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / JSON_FILE, self._backend.to_str())
        write_text(folder / MODE_FILE, json.dumps({"mode": self.mode}) + "\n")
        tokenizer_files.write_tokenizer_config(folder, BOS, EOS, PAD)

    def with_reflection_tokens(self) -> WordTokenizer:
        from tokenizers import AddedToken
        from tokenizers import Tokenizer as Backend

        backend = Backend.from_str(self._backend.to_str())
        new = reflection.missing_tokens(self._id, self.source)
        backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in new])
        return WordTokenizer(backend, self.source)

    @property
    def vocab_size(self) -> int:
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode_spans(
        self, spans: Sequence[Sequence[Part]], before_control: bool = False
    ) -> list[list[Encoded]]:
        return [[self._encode(part) for part in parts] for parts in spans]

    def _encode(self, part: Part) -> Encoded:
        if isinstance(part, Control):
            control = self._id(part.token)
            if control is not None:
                return [control], part.token
            part = part.token
        return self._backend.encode(part, add_special_tokens=False).ids, None

    def decode(self, ids: Sequence[int]) -> str:
        text = self._backend.decode([int(i) for i in ids], skip_special_tokens=False)
        return text.removeprefix(" ")

    def token(self, i: int) -> str:
        return self._backend.id_to_token(int(i)) or f"<{int(i)}>"

    def _id(self, control: str) -> int | None:
        return self._backend.token_to_id(control)


class PublishedTokenizer(Tokenizer):
    """Modes llama_slow, llama_fast and json: a published vocabulary and its control tokens.

    controls: ids of all control tokens.
    names: the vocabulary's names for BOS, EOS and PAD, where they differ from ours.
    passthrough: settings for other programs, which are saved with the model; see
    tokenizer_files.read_passthrough.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        mode: str,
        controls: dict[str, int],
        names: dict[str, str],
        source: str,
        passthrough: dict[str, Any],
    ):
        self._vocabulary, self.mode, self.source = vocabulary, mode, source
        self._controls, self._names, self._passthrough = controls, names, passthrough
        self._control_of = {i: t for t, i in controls.items()}
        self.bos_id, self.eos_id = self.id(BOS), self.id(EOS)
        pad_id = self._id(PAD)
        self.pad_id = self.eos_id if pad_id is None else pad_id  # padding is always masked

    @classmethod
    def read(
        cls, folder: Path, mode: str | None, record: dict[str, Any] | None
    ) -> PublishedTokenizer:
        """record: the content of MODE_FILE, for a folder written here."""
        vocabulary: Vocabulary
        source = folder / MODEL_FILE
        tiktoken = source.is_file() and is_tiktoken(source)
        if source.is_file() and not tiktoken:
            vocabulary = SentencePiece(source)
        elif (source := folder / JSON_FILE).is_file():
            vocabulary = Bpe.read(source)
        elif tiktoken:
            raise ValueError(
                f"{folder / MODEL_FILE}: is tiktoken's, as Llama 3 is published by its authors; "
                f"put the {JSON_FILE} of the same model beside it"
            )
        else:
            raise FileNotFoundError(
                f"{folder}: no tokenizer here; expected {MODEL_FILE} or {JSON_FILE}"
            )
        mode = cls.checked_mode(vocabulary, mode, source)
        if record is None:
            controls, names = tokenizer_files.read_control_tokens(folder, vocabulary)
        else:
            controls, names = vocabulary.controls | record["added"], record["names"]
        # An export's own files take precedence, since they may have been edited; an Orbax workdir
        # has only the record.
        if record is None or (folder / "config.json").is_file():
            passthrough = tokenizer_files.read_passthrough(folder)
        else:
            passthrough = record.get("beside") or {}
        return cls(vocabulary, mode, controls, names, str(source), passthrough)

    @staticmethod
    def checked_mode(vocabulary: Vocabulary, mode: str | None, source: Path) -> str:
        """The mode, or the default of a vocabulary. Raises ValueError for one that does not fit."""
        possible = ("llama_slow", "llama_fast") if vocabulary.llama else ("json",)
        if mode not in (None, *possible):
            raise ValueError(
                f"{source}: this vocabulary cannot be read as {mode!r}, "
                f"but as {' or '.join(possible)}"
            )
        return mode or possible[-1]

    def save(self, folder: str | Path) -> None:
        folder = as_path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._vocabulary.save(folder)
        spec = json.dumps(self._vocabulary.to_json(self._controls), ensure_ascii=False)
        write_text(folder / JSON_FILE, spec + "\n")
        row = {
            "mode": self.mode,
            "names": self._names,
            "added": self._controls,
            "beside": self._passthrough,  # the name that existing folders have
        }
        write_text(folder / MODE_FILE, json.dumps(row, ensure_ascii=False, indent=2) + "\n")
        bos, eos = (self._names.get(t, t) for t in (BOS, EOS))
        pad = None if self._id(PAD) is None else self._names.get(PAD, PAD)
        extra = self._passthrough.get("tokenizer")
        tokenizer_files.write_tokenizer_config(folder, bos, eos, pad, extra)
        if "generation" in self._passthrough:
            generation = json.dumps(self._passthrough["generation"], indent=2)
            write_text(folder / tokenizer_files.GENERATION_FILE, generation + "\n")

    def with_reflection_tokens(self) -> PublishedTokenizer:
        """Also adds a padding token if there is none, last, as in the released vocabulary."""
        controls, passthrough = dict(self._controls), self._passthrough
        new = reflection.missing_tokens(self._id, self.source)
        if self._id(PAD) is None:
            new.append(PAD)
            if "ids" in passthrough:
                ids = {k: v for k, v in passthrough["ids"].items() if k != "pad_token_id"}
                passthrough = passthrough | {"ids": ids}
        for token in new:
            controls.setdefault(token, self._first_free_id(controls))
        return PublishedTokenizer(
            self._vocabulary, self.mode, controls, self._names, self.source, passthrough
        )

    def config_ids(self) -> dict[str, Any]:
        return super().config_ids() | self._passthrough.get("ids", {})

    @property
    def vocab_size(self) -> int:
        return self._first_free_id(self._controls)

    def _first_free_id(self, controls: dict[str, int]) -> int:
        return max(self._vocabulary.size, max(controls.values()) + 1)

    def encode_spans(
        self, spans: Sequence[Sequence[Part]], before_control: bool = False
    ) -> list[list[Encoded]]:
        joined = [self._join_text(parts) for parts in spans]
        flat = [part for parts in joined for part in parts]
        encoded, n = [], 0
        for parts in joined:
            pieces: list[Encoded] = []
            for part in parts:
                n += 1  # the next part's index in `flat`
                if isinstance(part, Control):
                    pieces.append(([self.id(part.token)], part.token))
                    continue
                if self.mode == "llama_slow":
                    after_control = n >= 2 and isinstance(flat[n - 2], Control)
                    is_last = n == len(flat)
                    followed = before_control if is_last else isinstance(flat[n], Control)
                    part = part.lstrip() if after_control else part
                    part = part.rstrip() if followed else part
                pieces.append((self._vocabulary.encode(part) if part else [], None))
            encoded.append(pieces)
        return encoded

    def _join_text(self, parts: Sequence[Part]) -> list[Part]:
        """Joins adjacent text and drops empty text; a control that the vocabulary lacks is text."""
        joined: list[Part] = []
        for part in parts:
            if isinstance(part, Control) and self._id(part.token) is not None:
                joined.append(part)
                continue
            text = part.token if isinstance(part, Control) else part
            if text and joined and isinstance(joined[-1], str):
                joined[-1] += text
            elif text:
                joined.append(text)
        return joined

    def decode(self, ids: Sequence[int]) -> str:
        out: list[str] = []
        run: list[int] = []  # ids of ordinary text since the last control token
        for i in map(int, ids):
            if i not in self._control_of:
                run.append(i)
                continue
            out += [self._decode_text(run), self._control_of[i]]
            run = []
        return "".join([*out, self._decode_text(run)])

    def _decode_text(self, run: list[int]) -> str:
        return self._vocabulary.decode(run) if run else ""

    def token(self, i: int) -> str:
        i = int(i)
        if i in self._control_of:
            return self._control_of[i]
        return self._vocabulary.piece(i) if i < self._vocabulary.size else f"<{i}>"

    def _id(self, control: str) -> int | None:
        return self._controls.get(self._names.get(control, control))


def train(
    pieces: Sequence[str], words: Sequence[str], vocab_size: int, controls: Sequence[str] = ()
) -> Tokenizer:
    """Learns a byte-level BPE vocabulary from pieces (no leading space) and words (with one).

    controls: control tokens besides the prompt headings. Any text can be encoded, as bytes if need
    be.
    """
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend

    special = [PAD, BOS, EOS, NEWLINE, *HEADINGS, *controls]
    backend = Backend(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    texts = [p for p in pieces for _ in range(4)] + [" " + w for w in words for _ in range(4)]
    backend.train_from_iterator(texts, trainer)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return WordTokenizer(backend)
