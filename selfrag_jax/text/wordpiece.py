"""WordPiece, the tokenizer of BERT-family encoders: text -> token ids.

The ids are those of transformers' fast tokenizer, with one difference: text that spells a control
token, such as "[SEP]", is split like any other text, so that text can never end a passage early.
transformers would insert the token itself.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from selfrag_jax.errors import UserError
from selfrag_jax.files import read_json

JSON_FILE, VOCAB_FILE, CONFIG_FILE = "tokenizer.json", "vocab.txt", "tokenizer_config.json"
_KIND = "WordPiece"
# tokenizer_config.json -> BertNormalizer's field, and the value if a folder does not say.
_NORMALIZER_FIELDS: dict[str, tuple[str, bool | None]] = {
    "do_lower_case": ("lowercase", True),
    "strip_accents": ("strip_accents", None),  # None: if text is lower-cased
    "tokenize_chinese_chars": ("handle_chinese_chars", True),
}


class WordPiece:
    """A vocabulary and its rules. Created by `load`.

    vocab_size: one more than the largest id.
    """

    def __init__(self, backend, source: str):
        """backend: of the `tokenizers` library. Raises UserError if it adds no two tokens."""
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True  # text that spells a control token stays text
        self._backend, self._end = backend, backend.encode("").ids[1:]
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        if len(self._end) != 1:
            raise UserError(
                f"{source}: adds {len(self._end) + 1} control tokens to a text; expected two, "
                "such as [CLS] and [SEP]"
            )

    @classmethod
    def load(cls, folder: str | Path, lower_case: bool = False) -> WordPiece:
        """Reads tokenizer.json or else vocab.txt.

        What tokenizer_config.json says about lower case, accents and Chinese characters takes
        precedence, as in transformers. lower_case: lower-cases texts even if the files do not.
        Raises UserError naming the file that is missing, unreadable or of another kind.
        """
        folder = Path(folder)
        file = folder / CONFIG_FILE
        config = read_json(file) if file.is_file() else {}
        if not isinstance(config, dict):
            raise UserError(f"{file}: expected a JSON object")
        rules = {}  # of the normalizer
        for field, (ours, _) in _NORMALIZER_FIELDS.items():
            if field in config:
                value = config[field]
                if not isinstance(value, bool) and (value is not None or ours != "strip_accents"):
                    raise UserError(f"{file}: {field}={value!r}: must be true or false")
                rules[ours] = value
        if lower_case:
            rules["lowercase"] = True
        if (folder / JSON_FILE).is_file():
            return _from_json(folder / JSON_FILE, rules, lower_case)
        if (folder / VOCAB_FILE).is_file():
            return _from_vocabulary(folder / VOCAB_FILE, rules, config)
        raise UserError(f"{folder}: no tokenizer here; expected {JSON_FILE} or {VOCAB_FILE}")

    def encode(
        self, texts: Sequence[str], max_length: int
    ) -> tuple[list[Int32[np.ndarray, " T"]], int]:
        """Returns the ids of each text, [CLS] and [SEP] included, and how many texts were cut.

        max_length: in tokens, at least 2. A text that is cut keeps its [SEP].
        """
        if max_length < 2:
            raise ValueError(f"max_length={max_length}: must be at least 2")
        rows, num_cut = [], 0
        for encoding in self._backend.encode_batch_fast(list(texts)):
            ids = encoding.ids
            if len(ids) > max_length:
                ids, num_cut = ids[: max_length - 1] + self._end, num_cut + 1
            rows.append(np.array(ids, np.int32))
        return rows, num_cut


def _from_json(file: Path, rules: dict[str, Any], lower_case: bool) -> WordPiece:
    from tokenizers import Tokenizer as Backend

    spec = read_json(file)
    kind = spec.get("model", {}).get("type") if isinstance(spec, dict) else None
    if kind != _KIND:
        raise UserError(f"{file}: a tokenizer of type {kind!r} is not supported; {_KIND} is")
    normalizer = spec.get("normalizer") or {}
    if normalizer.get("type") == "BertNormalizer":
        spec["normalizer"] = normalizer | rules
    elif lower_case:
        given = [normalizer] if normalizer else []
        spec["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, *given]}
    try:
        backend = Backend.from_str(json.dumps(spec))
    except Exception as e:  # tokenizers raises Exception itself
        raise UserError(f"{file}: not readable as a tokenizer: {e}") from None
    return WordPiece(backend, str(file))


def _from_vocabulary(file: Path, rules: dict[str, Any], config: dict[str, Any]) -> WordPiece:
    """config: the content of tokenizer_config.json, for the names of the control tokens."""
    from tokenizers import AddedToken, models, normalizers, pre_tokenizers, processors
    from tokenizers import Tokenizer as Backend

    try:
        lines = file.read_text(encoding="utf-8").rstrip("\n").split("\n")
    except UnicodeDecodeError as e:
        raise UserError(f"{file}: not UTF-8: {e}") from None
    vocabulary = {line: i for i, line in enumerate(lines)}

    names = ("unk", "sep", "pad", "cls", "mask")
    # BERT's own names, where the configuration has no others.
    given = {f"{n}_token": f"[{n.upper()}]" for n in names} | {k: v for k, v in config.items() if v}

    def control(field: str) -> str:
        token = given[field]
        token = token.get("content") if isinstance(token, dict) else token
        if token not in vocabulary:
            raise UserError(f"{file}: has no token {token!r}, the {field} of {CONFIG_FILE}")
        return token

    controls = {n: control(f"{n}_token") for n in names}
    backend = Backend(models.WordPiece(vocabulary, unk_token=controls["unk"]))
    defaults = dict(_NORMALIZER_FIELDS.values())
    backend.normalizer = normalizers.BertNormalizer(clean_text=True, **defaults | rules)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = {n: (controls[n], vocabulary[controls[n]]) for n in ("cls", "sep")}
    backend.post_processor = processors.BertProcessing(ends["sep"], ends["cls"])
    backend.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in controls.values()]
    )
    return WordPiece(backend, str(file))
