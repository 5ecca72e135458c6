"""ASQA: ambiguous questions, answered at length with citations (948 in ALCE's file).

    selfrag evaluate --task=asqa --input=asqa_eval_gtr_top100.json --model=M

Measures `str_em`, `rouge_lsum`, `mauve`, `citation_precision` and `citation_recall` as ALCE does.
The paper: 30.0, 35.7, 74.3, 66.9, 67.8 (7B); 31.7, 37.0, 71.6, 70.3, 71.3 (13B).
Traps: always retrieves; the passages are GTR's, published with the file. The scripts number marks
by the segment and not by the document, so ALCE judges many sentences against the document before.
Citation scores depend on the judge: the paper's is T5-XXL of 11B. There is no blank line before the
heading, in the scripts as here.
"""

from selfrag_jax.evaluation.tasks import Task

TASK = Task(
    name="asqa",
    instruction="Answer the question below in a few sentences. Where it can be understood in "
    "several ways, give the answer to each of them.",
    heading="## Input:\n\n",
    script_name="asqa",
    mode="always_retrieve",
    threshold=0.0,
    max_depth=7,
    released=(("threshold", 0.2), ("max_new_tokens", 300)),
    metric="str_em",
    figures={
        "str_em": {"7b": 30.0, "13b": 31.7},
        "rouge_lsum": {"7b": 35.7, "13b": 37.0},
        "mauve": {"7b": 74.3, "13b": 71.6},
        "citation_precision": {"7b": 66.9, "13b": 70.3},
        "citation_recall": {"7b": 67.8, "13b": 71.3},
    },
    retriever="GTR-XXL",
    files=("asqa_eval_gtr_top100.json*", "asqa*.json*"),
)
