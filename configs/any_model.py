"""Answering with any generator on one device, in the type of its weights: what `selfrag ask` and `selfrag answer` take for models
other than the synthetic world's, where no --config is given.

    selfrag ask --model=selfrag_llama2_7b-safetensors --index=I "Who wrote Middlemarch?"

The paper's search (Section 4.2): adaptive retrieval with a threshold of 0.2, five passages, two beams, up to seven segments, paths
ranked by sums. A 7B model in bf16 takes 46 GB of one H100 with four questions at once (compiled, not run); on less,
--quantization=int8, fewer segments (--max_depth), --config.answer.batch=1, or the configs short_form and long_form, which say where they
fit and what the paper scores.
"""

import importlib.util
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    spec = importlib.util.spec_from_file_location(
        "long_form", Path(__file__).with_name("long_form.py")
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    c = module.get_config("7b")
    c.name = "any_model"
    c.answer.search.threshold = 0.2
    c.answer.tensor = 1
    c.answer.dtype = None  # the model's
    return c
