"""ELI5: why and how questions, explained in a paragraph with citations (1,000 in ALCE's file).

    selfrag evaluate --task=eli5 --input=eli5_eval_bm25_top100.json --model=M

Measures `rouge_lsum`, citation precision and recall; ALCE also asks how many of the claims the
answer entails, which takes its judge. The paper reports no figure.
Traps: as for asqa; gold texts are long, so no containment metric means anything here.
"""

from selfrag_jax.evaluation.tasks import Task

TASK = Task(
    name="eli5",
    instruction="Explain the answer to the question below in one paragraph, in everyday words.",
    heading="## Input:\n\n",
    script_name="eli5",
    mode="always_retrieve",
    threshold=0.0,
    max_depth=7,
    released=(("threshold", 0.2), ("max_new_tokens", 300)),
    metric="rouge_lsum",
    files=("eli5_eval_bm25_top100.json*", "eli5*.json*"),
)
