"""Text <-> token ids. No other module tokenizes.

Text that a user or a corpus supplies can never become a control token: it is encoded as ordinary text even where it
spells one. Control tokens (reflection tokens, passage markup, prompt headings, end of text) enter only as `Control`
parts, which prompts.py writes. A prompt is therefore a list of parts, not one string:

    tokenizer.encode([Control("### Response:\n"), "Marvin was born in Quenport.", Control("[Fully supported]")])

Modes name how the text between control tokens is cut into ids; the mode is stored beside the vocabulary:

    words   each part starts a new word (a leading space is added), as in the small models trained here
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from selfrag_jax import reflection

BOS, EOS, PAD = "<s>", "</s>", "[PAD]"
NEWLINE = "\n"
INSTRUCTION, INPUT, RESPONSE = "### Instruction:\n", "\n\n### Input:\n", "\n\n### Response:\n"
HEADINGS = (INSTRUCTION, INPUT, RESPONSE)
MODES = ("words",)
FILE, MODE_FILE = "tokenizer.json", "tokenizer_mode.json"


@dataclass(frozen=True)
class Control:
    """A control token by its name; as opposed to text that happens to spell it."""

    token: str


Part = str | Control


class Tokenizer:
    """A `tokenizers` vocabulary plus the mode in which text is cut."""

    def __init__(self, backend, mode: str, source: str = "tokenizer"):
        if mode not in MODES:
            raise ValueError(f"{source}: unknown tokenizer mode {mode!r}; known modes: {', '.join(MODES)}")
        self._backend = backend
        self._backend.encode_special_tokens = True  # user text that spells a control token stays text
        self.mode = mode
        self.source = source
        self.bos_id, self.eos_id, self.pad_id = (self._require(t) for t in (BOS, EOS, PAD))

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Reads tokenizer.json and tokenizer_mode.json. Raises FileNotFoundError or ValueError naming the file."""
        from tokenizers import Tokenizer as Backend

        path, mode_path = Path(folder) / FILE, Path(folder) / MODE_FILE
        for p in (path, mode_path):
            if not p.is_file():
                raise FileNotFoundError(f"{p}: no such file; a model folder holds {FILE} and {MODE_FILE}")
        try:
            mode = json.loads(mode_path.read_text())["mode"]
            return cls(Backend.from_str(path.read_text()), mode, str(path))
        except (ValueError, KeyError) as e:
            raise ValueError(f"{path} or {mode_path}: not readable as a tokenizer: {e}") from e

    def save(self, folder: str | Path) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE).write_text(self._backend.to_str())
        (folder / MODE_FILE).write_text(json.dumps({"mode": self.mode}) + "\n")

    def with_reflection_tokens(self) -> Tokenizer:
        """A copy whose vocabulary ends with the reflection tokens it lacked, in the released order."""
        from tokenizers import AddedToken
        from tokenizers import Tokenizer as Backend

        backend = Backend.from_str(self._backend.to_str())
        new = [t for t in reflection.RELEASED_ORDER if backend.token_to_id(t) is None]
        backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in new])
        return Tokenizer(backend, self.mode, self.source)

    def reflection_ids(self) -> reflection.ReflectionIds:
        return reflection.lookup(self._backend.token_to_id, self.source)

    @property
    def vocab_size(self) -> int:
        return self._backend.get_vocab_size(with_added_tokens=True)

    def id(self, control: str) -> int:
        """Id of a control token. Raises ValueError when the vocabulary lacks it."""
        return self._require(control)

    def encode(self, parts: Part | Sequence[Part]) -> list[int]:
        """Ids of text and control parts. A control that the vocabulary lacks is encoded as its text."""
        ids: list[int] = []
        for part in [parts] if isinstance(parts, (str, Control)) else parts:
            if isinstance(part, Control):
                control = self._backend.token_to_id(part.token)
                if control is not None:
                    ids.append(control)
                    continue
                part = part.token
            ids.extend(self._backend.encode(part, add_special_tokens=False).ids)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; control tokens are written out as their names. Encoding then decoding restores one text part."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=False).removeprefix(" ")

    def token(self, i: int) -> str:
        return self._backend.id_to_token(int(i)) or f"<{int(i)}>"

    def _require(self, token: str) -> int:
        i = self._backend.token_to_id(token)
        if i is None:
            raise ValueError(f"{self.source}: has no token {token!r}")
        return i


def train(pieces: Sequence[str], words: Sequence[str], vocab_size: int, controls: Sequence[str] = ()) -> Tokenizer:
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
    backend.train_from_iterator([p for p in pieces for _ in range(4)] + [" " + w for w in words for _ in range(4)], trainer)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return Tokenizer(backend, "words")
