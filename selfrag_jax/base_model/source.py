"""Training data of the small base model: a vocabulary, and documents without end.

The paper starts from Llama-2; the quickstart starts from a small Llama of ours. It learns to read, to match names that
look alike, to copy a value out of a passage and to check a statement against a passage, without any reflection token
and without any fact to memorise: every document (world/documents.py) draws its own entities (world/drawer.py), with names
and values of the `base` vocabulary. Those of quickstart worlds are other pairs of the same words.
"""

from __future__ import annotations

import random
import re

from selfrag_jax.base_model.documents import FAMILIES
from selfrag_jax.base_model.drawer import BaseDataConfig, Drawer, Segments
from selfrag_jax.data.batches import Example, build_example
from selfrag_jax.text import reflection
from selfrag_jax.text.tokenizer import EOS, Control, Tokenizer, train
from selfrag_jax.world import language
from selfrag_jax.world.language import KINDS


def make_tokenizer(vocab_size: int) -> Tokenizer:
    """The vocabulary of the language: its words, the markup of passages, bytes for everything else."""
    words = [
        w
        for lists in (*language.VALUES.values(), *language.NAME_WORDS.values())
        for ws in lists
        for w in ws
    ]
    texts = [t for k in KINDS.values() for r in k.relations for t in (r.phrase, *r.questions)]
    texts += [t for qs, answer in language.COMMON_KNOWLEDGE for t in (*qs, answer)]
    texts += ["Is it true that True False and Tell me about yes partly no A B C D"]
    texts += ["retrieval relevant supported useful same", *language.VALUES]
    for text in texts:
        words += re.findall(r"[A-Za-z]+", re.sub(r"\{.\}", " ", text))
    return train([".", "?", ",", ":"], words, vocab_size, reflection.MARKUP)


class BaseSource:
    """An unbounded source of documents; document i depends on the seed and i alone."""

    size = 0

    def __init__(self, config: BaseDataConfig, tokenizer: Tokenizer):
        self.config, self.tokenizer = config, tokenizer
        self.families = [FAMILIES[name] for name, _ in config.family_weights]
        self.weights = [w for _, w in config.family_weights]
        self.drawer = Drawer(
            config, {kind: language.words(kind, config.vocabulary) for kind in language.VALUES}
        )

    def segments(self, i: int) -> Segments:
        rng = random.Random(f"base-{self.config.seed}-{i}")
        document = rng.choices(self.families, self.weights)[0](self.drawer, rng)
        return [*document, ([Control(EOS)], self.config.copy_weight)]

    def example(self, i: int) -> Example:
        return build_example(self.tokenizer, self.segments(i), {})
