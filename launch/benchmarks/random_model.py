"""Models with random weights, and questions of random words, for the benchmarks."""

from __future__ import annotations

import jax
import numpy as np

from selfrag_jax.models.llama import LlamaConfig, Model
from selfrag_jax.models.params import Params, flatten, unflatten
from selfrag_jax.records import Passage
from selfrag_jax.text import reflection
from selfrag_jax.text.tokenizer import Control

NUM_WORDS = 32_000  # of the vocabulary; the reflection tokens follow
PROMPT_TOKENS, PASSAGE_TOKENS = 200, 150
SIZES = {
    "tiny": dict(embed_dim=64, mlp_dim=128, num_layers=2, num_heads=4, head_dim=16),
    "100m": dict(embed_dim=640, mlp_dim=1728, num_layers=12, num_heads=10, head_dim=64),
    "7b": dict(embed_dim=4096, mlp_dim=11_008, num_layers=32, num_heads=32, head_dim=128),
}
# How many standard deviations of a normal logit are exceeded once in n tokens.
DEVIATIONS = {10: 1.28, 20: 1.64, 25: 1.75, 50: 2.05}

Question = tuple[list[int], list[Passage]]  # prompt and passages


class IdTokenizer:
    """A stand-in for a tokenizer: the text of tokens is their ids."""

    eos_id, pad_id, bos_id = 2, 0, 1
    vocab_size = NUM_WORDS + len(reflection.ALL)

    def id(self, control: str) -> int:
        return NUM_WORDS + reflection.ALL.index(control) if control in reflection.ALL else 13

    def reflection_ids(self) -> reflection.ReflectionIds:
        return reflection.lookup(self.id)

    def encode(self, parts) -> list[int]:
        ids: list[int] = []
        for part in parts:
            ids += [self.id(part.token)] if isinstance(part, Control) else map(int, part.split())
        return ids

    def decode(self, ids) -> str:
        return " ".join(map(str, ids))

    def config_ids(self) -> dict[str, int]:
        return {"eos_token_id": self.eos_id}

    def save(self, folder) -> None:
        pass  # there are no files


TOKENIZER = IdTokenizer()


def random_model(size: str, segment_tokens: int | None) -> tuple[Model, Params]:
    """Returns a model with random weights.

    segment_tokens: mean length of a segment, set by the odds of the [Retrieval] token; None: all
    segments end at the length limit.
    """
    dtype = "bfloat16" if size == "7b" else "float32"
    config = LlamaConfig(
        **SIZES[size],
        num_kv_heads=SIZES[size]["num_heads"],
        vocab_size=TOKENIZER.vocab_size,
        max_length=4096,
        rope_theta=1e4,
        norm_eps=1e-5,
        tie_embeddings=False,
        dtype=dtype,
        remat="none",
        scan_unroll=1,
    )
    model = Model(config)
    if size == "7b":
        params = _large_params(model)
    else:
        params = jax.device_get(model.init(jax.random.key(0), 0.5))
    head = np.array(params["head"]["kernel"])
    quiet = [TOKENIZER.eos_id, TOKENIZER.pad_id, *map(TOKENIZER.id, reflection.ALL)]
    head[:, quiet] *= 0.1  # never the most likely
    if segment_tokens:
        # Odds of 1 in n against the most likely of 32,000 words, whose logits are normal with the
        # same deviation.
        best = np.sqrt(2 * np.log(NUM_WORDS)) - 0.4
        head[:, TOKENIZER.id(reflection.RETRIEVAL)] *= 10 * best / DEVIATIONS[segment_tokens]
    return model, {**params, "head": {"kernel": head}}


def _large_params(model: Model) -> Params:
    """Random parameters as Model.init scales them, made one by one in the model's type.

    All at once in f32 they would take 28 GB of the device.
    """
    c, leaves = model.config, []
    for i, (path, leaf) in enumerate(flatten(model.shapes())):
        if path[-1] == "scale":
            value = np.ones(leaf.shape, c.dtype)
        else:
            std = 0.5 if path[0] == "embed" else leaf.shape[-2] ** -0.5
            if path[1:2] in (("o",), ("down",)):
                std *= (2 * c.num_layers) ** -0.5
            key = jax.random.fold_in(jax.random.key(0), i)
            value = jax.device_get(jax.random.normal(key, leaf.shape, c.dtype) * std)
        leaves.append((path, np.asarray(value, c.dtype)))
    return unflatten(leaves)


def make_questions(n: int, num_passages: int) -> list[Question]:
    rng = np.random.default_rng(0)

    def words(count: int) -> list[int]:
        return [int(word) for word in rng.integers(100, NUM_WORDS, count)]

    def passage(i: int) -> Passage:
        return Passage(str(i), "", " ".join(map(str, words(PASSAGE_TOKENS - 3))))

    return [
        ([TOKENIZER.bos_id, *words(PROMPT_TOKENS - 1)], [passage(i) for i in range(num_passages)])
        for _ in range(n)
    ]
