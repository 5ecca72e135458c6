"""The model that training starts from: a base with rows for the reflection tokens, or scratch."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import jax
from ml_collections import ConfigDict

from selfrag_jax import config as configs
from selfrag_jax.checkpoints import loading, vocabulary_rows
from selfrag_jax.errors import UserError
from selfrag_jax.huggingface import hub
from selfrag_jax.models.llama import LlamaConfig, Model
from selfrag_jax.text import reflection


def embedded_base() -> Path:
    """The folder of the small base model that is shipped with the package."""
    return Path(str(resources.files("selfrag_jax") / "base_model" / "weights"))


def base_folder(c: ConfigDict) -> Path:
    """Of the model that training starts from; one of the hub is downloaded if need be."""
    return embedded_base() if c.base == "embedded" else hub.model_folder(c.base)


def starting_model(c: ConfigDict, read: bool = True) -> tuple[loading.LoadedModel, int]:
    """The model that training starts from, its vocabulary grown by the reflection tokens, and by how many.

    read: False leaves the base's parameters unread, and those of the result None.

    c.base: "embedded", "scratch" (the embedded tokenizer, random weights of the architecture c.scratch), or a path.
    c.new_rows: for reflection tokens the words whose rows of the embedding they start from; the others start at the
    mean of all rows. Tokens that the base model already has keep their rows, and from scratch all rows are random.
    c.tokenizer: the mode of the base's tokenizer (see tokenizer.py), or None for that which its folder records.
    Raises BadInput when c.new_rows is missing, or names an unknown token or no word, and when the base's tokenizer has some
    reflection tokens but not all.
    """
    if c.base is None:
        raise UserError(
            "config: base is none; it names a folder, a model of the Hugging Face hub, embedded or scratch"
        )
    if c.base != "scratch":
        base = (loading.load if read else loading.load_without_params)(base_folder(c), c.tokenizer)
        tokenizer = base.tokenizer.with_reflection_tokens()
        like = {
            tokenizer.id(token): base.tokenizer.encode(words) for token, words in new_row_words(c)
        }
        old, grown = base.tokenizer.vocab_size, tokenizer.vocab_size
        config, params = vocabulary_rows.grow_vocabulary(
            base.model.config, base.params, old, grown, like
        )
        return loading.LoadedModel(Model(config), params, tokenizer), grown - old
    tokenizer = loading.load(embedded_base()).tokenizer.with_reflection_tokens()
    fields = c.scratch.to_dict()
    std = fields.pop("embed_std")
    extra = dict(
        vocab_size=tokenizer.vocab_size,
        dtype="float32",
        remat="none",
        scan_unroll=fields["num_layers"],
    )
    model = Model(configs.build(LlamaConfig, fields | extra, "scratch"))
    return loading.LoadedModel(model, model.init(jax.random.key(c.seed), std), tokenizer), 0


def new_row_words(c: ConfigDict) -> list[tuple[str, str]]:
    if "new_rows" not in c:
        raise UserError(
            "config: lacks new_rows, pairs of a reflection token and the words it starts as; () for none"
        )
    tokens = [t for group in reflection.GROUPS.values() for t in group]
    for token, words in c.new_rows:
        if token not in tokens:
            raise UserError(
                f"config new_rows: {token!r} is no reflection token; they are {', '.join(tokens)}"
            )
        if not words.strip():
            raise UserError(
                f"config new_rows: no word for {token}; leave it out to start it at the mean of all rows"
            )
    return list(c.new_rows)
