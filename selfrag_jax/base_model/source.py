"""Training data of the small base model: its vocabulary and an unlimited supply of documents.

The paper starts from Llama-2; the quickstart starts from this small Llama. It learns to read, to
tell look-alike names apart, to copy a value out of a passage and to check a statement against a
passage. It never sees a reflection token, and there are no facts to memorise: every document
(documents.py) draws its own entities (sampler.py), with names and values of the `base` vocabulary.
Quickstart worlds use other pairs of the same words.
"""

from __future__ import annotations

import random
import re

from selfrag_jax.base_model.documents import FAMILIES
from selfrag_jax.base_model.sampler import BaseDataConfig, EntitySampler
from selfrag_jax.data.batches import Example, Span, build_example
from selfrag_jax.text import reflection
from selfrag_jax.text.tokenizer import EOS, Control, Tokenizer, train
from selfrag_jax.world import language
from selfrag_jax.world.language import KINDS


def make_tokenizer(vocab_size: int) -> Tokenizer:
    """Returns a tokenizer with the language's words, passage markup, and bytes for all else."""
    pairs = (*language.VALUE_WORDS.values(), *language.NAME_WORDS.values())
    words = [word for firsts_and_lasts in pairs for part in firsts_and_lasts for word in part]
    texts = [t for k in KINDS.values() for r in k.relations for t in (r.phrase, *r.questions)]
    texts += [t for qs, answer in language.COMMON_KNOWLEDGE for t in (*qs, answer)]
    texts += ["Is it true that True False and Tell me about yes partly no A B C D"]
    texts += ["retrieval relevant supported useful same", *language.VALUE_WORDS]
    for text in texts:
        words += re.findall(r"[A-Za-z]+", re.sub(r"\{.\}", " ", text))
    return train([".", "?", ",", ":"], words, vocab_size, reflection.MARKUP)


class BaseSource:
    """An unbounded source of documents; document i depends only on the seed and i."""

    size = 0

    def __init__(self, config: BaseDataConfig, tokenizer: Tokenizer):
        self.config, self.tokenizer = config, tokenizer
        self.families = [FAMILIES[name] for name, _ in config.family_weights]
        self.weights = [w for _, w in config.family_weights]
        values = {
            kind: language.values_of_kind(kind, config.vocabulary) for kind in language.VALUE_WORDS
        }
        self.sampler = EntitySampler(config, values)

    def spans(self, i: int) -> list[Span]:
        rng = random.Random(f"base-{self.config.seed}-{i}")
        document = rng.choices(self.families, self.weights)[0](self.sampler, rng)
        return [*document, ([Control(EOS)], self.config.copy_weight)]

    def example(self, i: int) -> Example:
        return build_example(self.tokenizer, self.spans(i), {})
