"""Answers with any generator, on one device and in the type of its weights.

`selfrag ask` and `selfrag answer` take this config when no --config is given and the model is not
of the synthetic world.

    selfrag ask --model=selfrag/selfrag_llama2_7b --index=I "Who wrote Middlemarch?"

It is the paper's search (Section 4.2): adaptive retrieval with a threshold of 0.2, five passages,
two beams, up to seven segments, paths ranked by sums. A 7B model in bf16 takes 46 GB of one H100
with four questions at once (compiled, not run). On smaller devices use --quantization=int8, fewer
segments (--max_depth), --config.answer.batch=1, or the configs short_form and long_form, which say
where they fit and what the paper scores.
"""

from ml_collections import ConfigDict

from selfrag_jax import config


def get_config() -> ConfigDict:
    """long_form:7b with these changes."""
    c = config.load("long_form:7b")
    c.name = "any_model"
    c.answer.search.threshold = 0.2
    c.answer.tensor = 1
    c.answer.dtype = None  # the model's
    return c
