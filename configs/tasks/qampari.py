"""QAMPARI: questions with many answers (1,000 in ALCE's file).

    selfrag evaluate --task=qampari --input=qampari_eval_gtr_top100.json --model=M --index=I

Measures `str_hit`; the paper reports no figure.
Traps: ALCE scores precision and recall over the list, which `selfrag export --for=alce` hands
to it; marks follow each answer there.
"""

from selfrag_jax.evaluation.tasks import Task

TASK = Task(
    name="qampari",
    instruction="List all answers to the question below, with commas between them.",
    mode="always_retrieve",
    threshold=0.0,
    max_depth=7,
    released=(("threshold", 0.2), ("max_new_tokens", 300)),
    metric="str_hit",
    files=("qampari_eval_gtr_top100.json*", "qampari*.json*"),
)
