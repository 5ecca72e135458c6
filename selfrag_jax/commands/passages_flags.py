"""The flags of `ask` and `answer` for a corpus without an index, which is embedded at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from selfrag_jax.commands.command import Flag, given
from selfrag_jax.errors import UserError
from selfrag_jax.retrieval.corpus import DEFAULT_WORDS, CorpusConfig
from selfrag_jax.retrieval.encoders import EncoderConfig

if TYPE_CHECKING:
    from selfrag_jax.retrieval.instant_index import PassageSource

_GROUP = "Passages without an index"
_DETAILS = (
    Flag(
        "encoder",
        "how passages are found: hashed (by words), minilm (by meaning), the folder of an encoder "
        "model or its hub name (default: minilm where it is installed, else hashed)",
        group=_GROUP,
        is_folder=True,
    ),
    Flag(
        "split",
        f"words of a passage, at most; 0: never split (default: {DEFAULT_WORDS} for .txt, .md, "
        ".rst and long rows)",
        type=int,
        group=_GROUP,
    ),
    Flag(
        "fields",
        "how the file names its fields, e.g. text=abstract,title=name,id=key",
        group=_GROUP,
    ),
)
PASSAGES_FLAGS = (
    Flag(
        "passages",
        "in place of --index: a file of passages (.tsv, .csv, .jsonl), a text (.txt, .md), each "
        "also .gz, or a folder of them. They are embedded at the first question and kept in the "
        "cache; for a large corpus, use `selfrag index`",
        group=_GROUP,
    ),
    *_DETAILS,
)


def passage_source(values: dict[str, Any]) -> PassageSource | None:
    """The corpus that --passages names; None without it.

    Raises UserError if --index is given as well, and for a flag about a corpus that is not there.
    """
    details = given(values, _DETAILS)
    if not values["passages"]:
        if details:
            raise UserError(f"--{next(iter(details))}: goes with --passages, which reads a corpus")
        return None
    if values["index"]:
        raise UserError("give either --index or --passages, not both")
    if details.get("encoder") == "":
        raise UserError("--encoder=: expected hashed, minilm, the folder of a model or a hub name")
    from selfrag_jax.retrieval.instant_index import PassageSource

    encoder = EncoderConfig(details["encoder"]) if "encoder" in details else None
    reading = CorpusConfig(split=details.get("split"), fields=details.get("fields"))
    return PassageSource(values["passages"], encoder, reading)
