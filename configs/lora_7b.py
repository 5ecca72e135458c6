"""Trains the generator at 7B with low-rank adapters (Hu et al., 2022), on a few chips.

    selfrag train --config=lora_7b --role=generator --data=generator_data.jsonl --workdir=generator
    # Does it fit? Check before you rent the slice:
    selfrag compile --config=lora_7b --topology=v5e:2x4

The paper has no such training, so there is no score to expect. The published data (150k rows) make
3,500 updates. According to the TPU compiler (launch/compile_table.py) training fits the slices
below. The hours are lower bounds from the chips' peak rates; none was measured.

    v5e:2x4  6.9 h    v4:2x2x1  9.9 h    v5p:2x2x1  5.9 h    v6e:2x2  3.0 h
"""

from ml_collections import ConfigDict

from selfrag_jax import config


def get_config() -> ConfigDict:
    """generator_7b with these changes."""
    c = config.load("generator_7b")
    c.name = "lora_7b"
    c.generator.optimizer.learning_rate = c.generator.optimizer.adam_learning_rate = 2e-4
    with c.unlocked():
        # On all matrices of the layers, which stay frozen in bfloat16. The embedding and the head
        # are trained in full.
        c.generator.lora = dict(rank=16, alpha=32.0)
        # Their own rate; none for that of the adapters.
        c.generator.optimizer.embedding_learning_rate = None
    return c
