"""Answering long-form questions as in the paper (Section 4.2): up to seven segments, five passages each, two beams.

    selfrag answer --config=long_form --model=selfrag_llama2_7b-safetensors --input=asqa.jsonl --task=asqa --out=answers.jsonl

Variants as in short_form.py; `selfrag compile` takes the longest history that the last segment can stand on. 7b fits
v5e:2x2; 7b_int8 fits v5e:1x1 with --config.answer.search.max_depth=4 --config.answer.max_length=160 only. The paper's scores
(Table 2, 7B: ASQA str-em 30.0, citation precision 66.9 and recall 67.8) come from the authors' scripts, that is from
--scorer=released. With threshold 0, as the paper has it for ASQA, the first segment always retrieves, and a later one unless the
model would rather go on with the passage it has; --mode=always_retrieve leaves it no choice.
"""

import importlib.util
from pathlib import Path

from ml_collections import ConfigDict


def _short_form():
    spec = importlib.util.spec_from_file_location(
        "short_form", Path(__file__).with_name("short_form.py")
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def get_config(variant: str = "7b_int8") -> ConfigDict:
    c = _short_form().get_config(variant)
    c.name = f"long_form:{variant}"
    c.answer.search.update(threshold=0.0, beam_width=2, max_depth=7, ndocs=5)
    c.answer.batch = max(1, c.answer.batch // 2)  # the history grows, passages and all
    return c
