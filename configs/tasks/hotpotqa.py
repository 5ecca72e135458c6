"""HotpotQA: questions that take two Wikipedia pages (7,405 in the development set).

    selfrag evaluate --task=hotpotqa --input=hotpotqa_dev.jsonl --model=M --index=I

Measures `match`; the paper reports no figure.
Traps: one segment retrieves once; the second page often shows only after the first, so this task
takes up to three segments. Yes-or-no questions match by chance.
"""

from selfrag_jax.evaluation.tasks import Task

TASK = Task(
    name="hotpotqa",
    max_depth=3,
    metric="match",
    files=("hotpot*.json*",),
)
