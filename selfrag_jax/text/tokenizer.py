"""Text <-> token ids. No other module tokenizes.

Text that a user or a corpus supplies can never become a control token: it is encoded as ordinary text even where it
spells one. Control tokens (reflection tokens, passage markup, prompt headings, end of text) enter only as `Control`
parts, which prompts.py writes. A prompt is therefore a list of parts, not one string:

    tokenizer.encode([Control("### Response:\n"), "Marvin was born in Quenport.", Control("[Fully supported]")])

Modes name how the text between control tokens is cut into ids; the mode is stored beside the vocabulary:

    words       each part starts a new word (a leading space is added), as in the small models trained here
    llama_slow  Llama's, as the released generator was trained (transformers 4.31, slow): white space beside a control
                token is lost, so that "### Response:\n[Retrieval]" loses its newline
    llama_fast  Llama's, as it was served (transformers 4.31, fast): nothing is lost
    json        a tokenizer.json by its own rules, as Llama-3 has one

In the last three a text is encoded as a whole between two control tokens, whatever parts it came in; a control that the
vocabulary lacks, such as a heading, is part of the text.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfrag_jax.files import write_text
from selfrag_jax.text import reflection
from selfrag_jax.text.vocabularies import JSON_FILE, MODEL_FILE, Bpe, SentencePiece, Vocabulary

BOS, EOS, PAD = "<s>", "</s>", "[PAD]"  # whatever a vocabulary calls them
NEWLINE = "\n"
INSTRUCTION, INPUT, RESPONSE = "### Instruction:\n", "\n\n### Input:\n", "\n\n### Response:\n"
HEADINGS = (INSTRUCTION, INPUT, RESPONSE)
MODES = ("words", "llama_slow", "llama_fast", "json")
FILE, MODE_FILE, CONFIG_FILE = JSON_FILE, "tokenizer_mode.json", "tokenizer_config.json"
GENERATION_FILE, TEMPLATE_FILE = "generation_config.json", "chat_template.jinja"


@dataclass(frozen=True)
class Control:
    """A control token by its name; as opposed to text that happens to spell it."""

    token: str


Part = str | Control


class Tokenizer(ABC):
    """A vocabulary, the control tokens, and the mode in which text is cut. Made by `load` or `train`."""

    mode: str
    source: str  # for messages
    bos_id: int
    eos_id: int
    pad_id: int

    @classmethod
    def load(cls, folder: str | Path, mode: str | None = None) -> Tokenizer:
        """Reads the tokenizer of a model folder.

        mode: for a folder that records none (None: llama_fast or json, by what is there).
        Raises FileNotFoundError or ValueError naming the file, and ValueError for a mode that the vocabulary cannot have.
        """
        folder = Path(folder)
        record = folder / MODE_FILE
        if not record.is_file():
            return _Published.read(folder, mode, None)
        try:
            row = json.loads(record.read_text())
            recorded = row["mode"]
            if recorded in MODES and recorded != "words":
                _ids(row["added"]), dict(row["names"])  # raise where they are none
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
        return (
            _Words.read(folder)
            if recorded == "words"
            else _Published.read(folder, mode or recorded, row)
        )

    @abstractmethod
    def save(self, folder: str | Path) -> None:
        """Writes vocabulary and mode, and for published vocabularies what `transformers` reads."""

    @abstractmethod
    def with_reflection_tokens(self) -> Tokenizer:
        """A copy whose vocabulary ends with the reflection tokens, in the released order, or as it is where it has them. Raises
        MissingReflectionTokens where it has only some."""

    @property
    @abstractmethod
    def vocab_size(self) -> int: ...

    def config_ids(self) -> dict[str, Any]:
        """The ids of control tokens that a model's config.json holds, by its names for them."""
        return {
            "bos_token_id": self.bos_id,
            "eos_token_id": self.eos_id,
            "pad_token_id": self.pad_id,
        }

    @abstractmethod
    def encode_segments(
        self, segments: Sequence[Sequence[Part]], before_control: bool = False
    ) -> list[list[Encoded]]:
        """Ids of consecutive lists of parts, of each by itself, a control beside its name. Text does not join across them.

        before_control: a control token will follow (white space before it is lost in mode llama_slow).
        """

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; control tokens are written out as their names. Encoding then decoding restores one text part."""

    @abstractmethod
    def token(self, i: int) -> str:
        """The name of an id, for people."""

    @abstractmethod
    def _id(self, control: str) -> int | None: ...

    # ---- the same in all modes -----------------------------------------------------------------------------------
    def encode(self, parts: Part | Sequence[Part], before_control: bool = False) -> list[int]:
        """Ids of text and control parts. A control that the vocabulary lacks is encoded as its text."""
        parts = [parts] if isinstance(parts, (str, Control)) else parts
        return [i for ids, _ in self.encode_segments([parts], before_control)[0] for i in ids]

    def reflection_ids(self) -> reflection.ReflectionIds:
        return reflection.lookup(self._id, self.source)

    def id(self, control: str) -> int:
        """Id of a control token. Raises ValueError when the vocabulary lacks it."""
        i = self._id(control)
        if i is None:
            raise ValueError(f"{self.source}: has no token {control!r}")
        return i


Encoded = tuple[list[int], str | None]  # ids of a text, or of one control token with its name


class _Words(Tokenizer):
    """A `tokenizers` vocabulary that was trained here."""

    mode = "words"

    def __init__(self, backend, source: str = "tokenizer"):
        self._backend = backend
        self._backend.encode_special_tokens = (
            True  # user text that spells a control token stays text
        )
        self.source = source
        self.bos_id, self.eos_id, self.pad_id = (self.id(t) for t in (BOS, EOS, PAD))

    @classmethod
    def read(cls, folder: Path) -> Tokenizer:
        from tokenizers import Tokenizer as Backend

        path = folder / FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: no such file; a model folder holds {FILE} and {MODE_FILE}"
            )
        try:
            return cls(Backend.from_str(path.read_text()), str(path))
        except Exception as e:  # tokenizers raises Exception itself
            raise ValueError(f"{path}: not readable as a tokenizer: {e}") from e

    def save(self, folder: str | Path) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / FILE, self._backend.to_str())
        write_text(folder / MODE_FILE, json.dumps({"mode": self.mode}) + "\n")
        _write_transformers_config(folder, BOS, EOS, PAD)

    def with_reflection_tokens(self) -> Tokenizer:
        from tokenizers import AddedToken
        from tokenizers import Tokenizer as Backend

        backend = Backend.from_str(self._backend.to_str())
        new = reflection.lacking(self._id, self.source)
        backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in new])
        return _Words(backend, self.source)

    @property
    def vocab_size(self) -> int:
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode_segments(
        self, segments: Sequence[Sequence[Part]], before_control: bool = False
    ) -> list[list[Encoded]]:
        return [[self._encode(part) for part in parts] for parts in segments]

    def _encode(self, part: Part) -> Encoded:
        if isinstance(part, Control):
            control = self._id(part.token)
            if control is not None:
                return [control], part.token
            part = part.token
        return self._backend.encode(part, add_special_tokens=False).ids, None

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=False).removeprefix(
            " "
        )

    def token(self, i: int) -> str:
        return self._backend.id_to_token(int(i)) or f"<{int(i)}>"

    def _id(self, control: str) -> int | None:
        return self._backend.token_to_id(control)


class _Published(Tokenizer):
    """A vocabulary of a published model, with control tokens beside it."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        mode: str,
        controls: dict[str, int],
        names: dict[str, str],
        source: str,
        beside: dict[str, Any] | None = None,
    ):
        """controls: all control tokens; names: what the vocabulary calls BOS, EOS and PAD; beside: see `_read_beside`."""
        self._vocabulary, self.mode, self.source = vocabulary, mode, source
        self._controls, self._names, self._beside = controls, names, beside or {}
        self._control_of = {i: t for t, i in controls.items()}
        self.bos_id, self.eos_id = self.id(BOS), self.id(EOS)
        self.pad_id = (
            self._id(PAD) if self._id(PAD) is not None else self.eos_id
        )  # padding is never looked at

    @classmethod
    def read(cls, folder: Path, mode: str | None, record: dict[str, Any] | None) -> Tokenizer:
        if (folder / MODEL_FILE).is_file():
            source, vocabulary = folder / MODEL_FILE, SentencePiece(folder / MODEL_FILE)
        elif (folder / FILE).is_file():
            source, vocabulary = folder / FILE, Bpe(folder / FILE)
        else:
            raise FileNotFoundError(f"{folder}: no tokenizer here; expected {MODEL_FILE} or {FILE}")
        mode = mode or ("llama_fast" if vocabulary.llama else "json")
        possible = ("llama_slow", "llama_fast") if vocabulary.llama else ("json",)
        if mode not in possible:
            raise ValueError(
                f"{source}: this vocabulary cannot be read as {mode!r}, but as {' or '.join(possible)}"
            )
        if record is not None:
            controls = vocabulary.controls | record["added"]
            # Of a workdir as it was converted; of an export as it stands there now, whoever has changed it since.
            beside = (
                _read_beside(folder) if (folder / "config.json").is_file() else record.get("beside")
            )
            return cls(vocabulary, mode, controls, record["names"], str(source), beside)
        controls, names = _read_controls(folder, vocabulary)
        return cls(vocabulary, mode, controls, names, str(source), _read_beside(folder))

    def save(self, folder: str | Path) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._vocabulary.save(folder)
        write_text(
            folder / FILE,
            json.dumps(self._vocabulary.to_json(self._controls), ensure_ascii=False) + "\n",
        )
        row = {
            "mode": self.mode,
            "names": self._names,
            "added": self._controls,
            "beside": self._beside,
        }
        write_text(folder / MODE_FILE, json.dumps(row, ensure_ascii=False, indent=2) + "\n")
        names = (None if self._id(t) is None else self._names.get(t, t) for t in (BOS, EOS, PAD))
        _write_transformers_config(folder, *names, self._beside.get("tokenizer"))
        if "generation" in self._beside:
            write_text(
                folder / GENERATION_FILE, json.dumps(self._beside["generation"], indent=2) + "\n"
            )

    def with_reflection_tokens(self) -> Tokenizer:
        """Also a padding token, the last in the released vocabulary, where there is none."""
        controls = dict(self._controls)
        for token in (
            *reflection.lacking(self._id, self.source),
            *(() if self._id(PAD) is not None else (PAD,)),
        ):
            controls.setdefault(token, max(self._vocabulary.size, max(controls.values()) + 1))
        beside = self._beside
        if "ids" in beside and self._id(PAD) is None:
            beside = beside | {
                "ids": {k: v for k, v in beside["ids"].items() if k != "pad_token_id"}
            }
        return _Published(self._vocabulary, self.mode, controls, self._names, self.source, beside)

    def config_ids(self) -> dict[str, Any]:
        return super().config_ids() | self._beside.get("ids", {})

    @property
    def vocab_size(self) -> int:
        return max(self._vocabulary.size, max(self._controls.values()) + 1)

    def encode_segments(
        self, segments: Sequence[Sequence[Part]], before_control: bool = False
    ) -> list[list[Encoded]]:
        joined = [self._sections(parts) for parts in segments]
        flat = [one for sections in joined for one in sections]
        out, at = [], 0
        for sections in joined:
            found: list[Encoded] = []
            for one in sections:
                at += 1
                if isinstance(one, Control):
                    found.append(([self._id(one.token)], one.token))
                    continue
                if self.mode == "llama_slow":
                    if at >= 2 and isinstance(flat[at - 2], Control):
                        one = one.lstrip()
                    if isinstance(flat[at], Control) if at < len(flat) else before_control:
                        one = one.rstrip()
                found.append((self._vocabulary.encode(one) if one else [], None))
            out.append(found)
        return out

    def _sections(self, parts: Sequence[Part]) -> list[Part]:
        """Adjacent texts joined, empty ones left out; a control that the vocabulary lacks is text."""
        out: list[Part] = []
        for part in parts:
            if isinstance(part, Control) and self._id(part.token) is not None:
                out.append(part)
                continue
            text = part.token if isinstance(part, Control) else part
            if text and out and isinstance(out[-1], str):
                out[-1] += text
            elif text:
                out.append(text)
        return out

    def decode(self, ids: Sequence[int]) -> str:
        out, run = [], []
        for i in [*map(int, ids), None]:
            if i is not None and i not in self._control_of:
                run.append(i)
                continue
            out.append(self._vocabulary.decode(run) if run else "")
            run = []
            out.append("" if i is None else self._control_of[i])
        return "".join(out)

    def token(self, i: int) -> str:
        i = int(i)
        if i in self._control_of:
            return self._control_of[i]
        return self._vocabulary.piece(i) if i < self._vocabulary.size else f"<{i}>"

    def _id(self, control: str) -> int | None:
        return self._controls.get(self._names.get(control, control))


def _read_controls(folder: Path, vocabulary: Vocabulary) -> tuple[dict[str, int], dict[str, str]]:
    """Control tokens of a folder that `transformers` wrote, and what it calls beginning, end and padding."""
    config, controls = _read(folder / CONFIG_FILE), dict(vocabulary.controls)
    for file, read in (
        (folder / FILE, lambda row: {t["content"]: t["id"] for t in row.get("added_tokens") or []}),
        (folder / "added_tokens.json", lambda row: row),
        (
            folder / CONFIG_FILE,
            lambda row: {
                t["content"]: int(i) for i, t in (row.get("added_tokens_decoder") or {}).items()
            },
        ),
    ):
        try:
            found = _ids(read(_read(file)))
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise ValueError(
                f"{file}: its added tokens cannot be read ({type(e).__name__}: {e})"
            ) from None
        for token, i in found.items():
            if controls.setdefault(token, i) != i:
                raise ValueError(
                    f"{file}: {token!r} has id {i}, elsewhere in this folder {controls[token]}"
                )
            if (
                token not in vocabulary.controls
                and i < vocabulary.size
                and vocabulary.piece(i) not in (token, f"<{i}>")
            ):
                raise ValueError(
                    f"{file}: {token!r} has id {i}, which is {vocabulary.piece(i)!r} in the vocabulary"
                )
    given = {**config, **_read(folder / "special_tokens_map.json")}
    names = {}
    for ours, field in ((BOS, "bos_token"), (EOS, "eos_token"), (PAD, "pad_token")):
        name = given.get(field)
        name = name.get("content") if isinstance(name, dict) else name
        if not isinstance(name, (str, type(None))):
            raise ValueError(f"{folder}: {field}={name!r} is no token")
        if name and name != ours and name in controls and ours not in controls:
            names[ours] = name
    for ours, field in ((BOS, "bos_token"), (EOS, "eos_token")):
        if names.get(ours, ours) not in controls:
            raise ValueError(
                f"{folder}: the tokenizer has no token {ours!r}, and {CONFIG_FILE} names no {field}"
            )
    return controls, names


def _read_beside(folder: Path) -> dict[str, Any]:
    """What a published folder says of its control tokens' use by others. It has no effect here, but goes with the model:
    "ids" (config.json's, of which the end of text may have several), "generation" (its defaults), "tokenizer" (fields of its config,
    the chat template among them)."""
    model, found = _read(folder / "config.json"), {}
    if model:
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        found["ids"] = {"pad_token_id": None} | {name: model[name] for name in ids if name in model}
    if generation := _read(folder / GENERATION_FILE):
        found["generation"] = generation
    config = _read(folder / CONFIG_FILE)
    fields = ("chat_template", "model_max_length", "padding_side", "truncation_side")
    found["tokenizer"] = {name: config[name] for name in fields if name in config}
    if (folder / TEMPLATE_FILE).is_file():
        try:
            found["tokenizer"]["chat_template"] = (folder / TEMPLATE_FILE).read_text(
                encoding="utf-8"
            )
        except UnicodeDecodeError as e:
            raise ValueError(f"{folder / TEMPLATE_FILE}: not UTF-8: {e}") from None
    return found


def _ids(tokens: dict[str, Any]) -> dict[str, int]:
    if bad := [i for i in dict(tokens).values() if type(i) is not int or i < 0]:
        raise ValueError(f"{bad[0]!r} is no id")
    return tokens


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        row = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"{path}: not valid JSON: {e}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return row


def _write_transformers_config(
    folder: Path, bos: str, eos: str, pad: str | None, beside: dict[str, Any] | None = None
) -> None:
    """For AutoTokenizer, which would otherwise build its own rules and change ids (as it does for LlamaTokenizer)."""
    row = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": pad,
    }
    row |= {"clean_up_tokenization_spaces": False, "model_max_length": 10**30} | (beside or {})
    write_text(folder / CONFIG_FILE, json.dumps(row, ensure_ascii=False, indent=2) + "\n")


def train(
    pieces: Sequence[str], words: Sequence[str], vocab_size: int, controls: Sequence[str] = ()
) -> Tokenizer:
    """A byte-level BPE vocabulary learned from word pieces (no leading space) and whole words (with one).

    `controls` are control tokens beside the prompt's headings. Any text can be encoded: bytes are the fallback.
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
    backend.train_from_iterator(
        [p for p in pieces for _ in range(4)] + [" " + w for w in words for _ in range(4)], trainer
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return _Words(backend)
