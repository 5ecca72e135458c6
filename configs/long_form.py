r"""Answers long-form questions as in the paper (Section 4.2).

Up to seven segments, five passages for each, two beams.

    selfrag answer --config=long_form --model=selfrag/selfrag_llama2_7b \
        --input=asqa.jsonl --task=asqa --out=answers.jsonl

Variants: those of short_form.py. `selfrag compile` assumes the longest history the last segment
can have. 7b fits v5e:2x2. 7b_int8 fits v5e:1x1 only with --config.answer.search.max_depth=4
--config.answer.max_length=160.

The paper's scores (Table 2, 7B: ASQA str-em 30.0, citation precision 66.9 and recall 67.8) come
from the authors' scripts, that is, from --scorer=released. With a threshold of 0, the paper's for
ASQA, the first segment always retrieves; a later one retrieves unless the model prefers to keep
using the passage it has. --mode=always_retrieve makes every segment retrieve.
"""

from ml_collections import ConfigDict

from selfrag_jax import config


def get_config(variant: str = "7b_int8") -> ConfigDict:
    """short_form:variant with these changes."""
    c = config.load(f"short_form:{variant}")
    c.name = f"long_form:{variant}"
    c.answer.search.update(threshold=0.0, beam_width=2, max_depth=7, ndocs=5)
    c.answer.batch = max(1, c.answer.batch // 2)  # the history, passages included, grows
    return c
