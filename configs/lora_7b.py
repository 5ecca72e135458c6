"""The generator at 7B with low-rank adapters (Hu et al., 2022), for a few chips.

    selfrag train --config=lora_7b --role=generator --data=generator_data.jsonl --workdir=generator
    selfrag compile --config=lora_7b --topology=v5e:2x4      # does it fit, before you rent it

The paper has no such training, so no score of it is known. The published data (150k rows) are 3,500 updates. It fits the slices
below, as the TPU compiler says (launch/compile_table.py); the hours are the least that the chips' peak rates allow, none was
measured.

    v5e:2x4  6.9 h    v4:2x2x1  9.9 h    v5p:2x2x1  5.9 h    v6e:2x2  3.0 h
"""

from ml_collections import ConfigDict

from selfrag_jax import config


def get_config() -> ConfigDict:
    """generator_7b, but for these."""
    c = config.load("generator_7b")
    c.name = "lora_7b"
    c.generator.optimizer.learning_rate = c.generator.optimizer.adam_learning_rate = 2e-4
    with c.unlocked():
        # Of all matrices in the layers, which are kept in bfloat16; embedding and head are trained whole.
        c.generator.lora = dict(rank=16, alpha=32.0)
    return c
