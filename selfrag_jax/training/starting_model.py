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
    """Returns the folder of the small base model that ships with the package."""
    return Path(str(resources.files("selfrag_jax") / "base_model" / "weights"))


def base_folder(c: ConfigDict) -> Path:
    """Returns the folder or GGUF file of the base model `c.base`; downloads a model of the hub.

    Raises UserError if there is none.
    """
    if not c.base:
        raise UserError(
            "config: base is none; it must be a folder, a GGUF file, a model of the Hugging Face "
            "hub, embedded or scratch"
        )
    return embedded_base() if c.base == "embedded" else hub.model_folder(c.base)


def starting_model(c: ConfigDict, load_params: bool = True) -> tuple[loading.LoadedModel, int]:
    """Returns the model that training starts from, and how many reflection tokens were added to it.

    load_params: False leaves the base's parameters on disk; those of the result are None.

    c.base: "embedded", "scratch" (the embedded tokenizer and random weights of the architecture
        c.scratch), a folder, a GGUF file, or a model of the Hugging Face hub.
    c.new_rows: reflection tokens and the words whose embedding rows they start from. Other new
        tokens start at the mean of all rows. Tokens that the base already has keep their rows; from
        scratch all rows are random.
    c.tokenizer: mode of the base's tokenizer (see text/tokenizer.py); None for what its folder
        records or, if it records nothing, what fits its vocabulary: llama_fast for Llama-2's.

    Raises UserError if c.new_rows is missing, or has an unknown token or no words for a token, if
    the base's tokenizer has only some of the reflection tokens, and if it is not of c.tokenizer.
    """
    if c.base == "scratch":
        return _model_from_scratch(c), 0
    load = loading.load if load_params else loading.load_without_params
    tokenizer_mode(c)  # raises an error that names the config's field
    base = load(base_folder(c), c.tokenizer)
    tokenizer = base.tokenizer.with_reflection_tokens()
    like = {tokenizer.id(token): base.tokenizer.encode(words) for token, words in new_row_words(c)}
    old, grown = base.tokenizer.vocab_size, tokenizer.vocab_size
    config, params = vocabulary_rows.grow_vocabulary(
        base.model.config, base.params, old, grown, like
    )
    return loading.LoadedModel(Model(config), params, tokenizer), grown - old


def tokenizer_mode(c: ConfigDict) -> str:
    """Returns the mode of the base's tokenizer: c.tokenizer, or what the base has.

    Raises UserError if the base's tokenizer cannot be read, or is not of the mode c.tokenizer.
    """
    folder = base_folder(c)
    try:
        return loading.read_tokenizer(folder, c.tokenizer).mode
    except UserError as e:
        if c.tokenizer is None:
            raise
        own = loading.read_tokenizer(folder).mode  # raises if the files are what is wrong
        raise UserError(
            f"config tokenizer={c.tokenizer!r}: {e}; the base's own is {own!r}, which "
            "--config.tokenizer=none takes"
        ) from None


def _model_from_scratch(c: ConfigDict) -> loading.LoadedModel:
    tokenizer = loading.load(embedded_base()).tokenizer.with_reflection_tokens()
    fields = c.scratch.to_dict()
    embed_std = fields.pop("embed_std")
    fields |= dict(
        vocab_size=tokenizer.vocab_size,
        dtype="float32",
        remat="none",
        scan_unroll=fields["num_layers"],
    )
    model = Model(configs.build(LlamaConfig, fields, "scratch"))
    params = model.init(jax.random.key(c.seed), embed_std)
    return loading.LoadedModel(model, params, tokenizer)


def new_row_words(c: ConfigDict) -> list[tuple[str, str]]:
    """Returns c.new_rows: pairs of a reflection token and the words whose rows it starts from.

    Raises UserError if the field is missing, a token is unknown, or a token has no words.
    """
    if "new_rows" not in c:
        raise UserError(
            "config: lacks new_rows, pairs of a reflection token and the words it starts as; "
            "() for none"
        )
    tokens = [t for group in reflection.GROUPS.values() for t in group]
    for token, words in c.new_rows:
        if token not in tokens:
            raise UserError(
                f"config new_rows: {token!r} is no reflection token; they are {', '.join(tokens)}"
            )
        if not words.strip():
            raise UserError(
                f"config new_rows: no word for {token}; leave it out to start it at the mean of "
                "all rows"
            )
    return list(c.new_rows)
