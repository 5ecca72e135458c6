r"""Answers short-form questions as in the paper (Section 4.2).

One segment for each of ten passages; the critique scores choose the best.

    selfrag answer --config=short_form --model=selfrag/selfrag_llama2_7b \
        --input=popqa.jsonl --out=answers.jsonl
    # Does it fit? Check before you rent the slice:
    selfrag compile --config=short_form --program=decode --topology=v5e:1x1

Variants: 7b_int8 (the default; 8-bit weights, one chip of 16 GB), 7b (bf16, four v5e chips) and 13b
(bf16, eight v5e chips). Each was compiled with the TPU compiler; none was timed. The paper's scores
(Table 2, 7B: PopQA 54.9, TriviaQA 66.4) come from the authors' scripts, that is, from
--scorer=released.
"""

from ml_collections import ConfigDict

VARIANTS = {
    "7b_int8": dict(architecture="llama2_7b", quantization="int8", tensor=1, batch=1),
    "7b": dict(architecture="llama2_7b", quantization=None, tensor=4, batch=8),
    "13b": dict(architecture="llama2_13b", quantization=None, tensor=8, batch=8),
}


def get_config(variant: str = "7b_int8") -> ConfigDict:
    """variant: one of VARIANTS."""
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}; short_form has {', '.join(VARIANTS)}")
    v = VARIANTS[variant]
    c = ConfigDict()
    c.name, c.kind = f"short_form:{variant}", "answer"
    c.architecture = v["architecture"]  # for `selfrag compile`; answering takes the model's
    c.answer = dict(
        search=dict(
            mode="adaptive_retrieval",
            threshold=0.2,
            normalise="yes_no",
            weights=dict(w_rel=1.0, w_sup=1.0, w_use=0.5, w_seq=1.0),
            beam_width=1,
            max_depth=1,
            ndocs=10,
            accumulate="sum",
            constraints=(),
            keep_passages=True,
            max_new_tokens=100,
            length_bucket=64,
            scorer="paper",
            temperature=0.0,
            top_p=1.0,
            seed=0,
        ),
        batch=v["batch"],
        max_length=320,  # tokens of a prompt, and of a passage (about 100 words)
        closed_set=True,
        dtype="bfloat16",
        quantization=v["quantization"],
        tensor=v["tensor"],
    )
    return c
