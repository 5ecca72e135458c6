"""OpenBookQA: science questions that take a fact and common sense, with four options.

    selfrag evaluate --task=openbookqa --input=openbookqa.jsonl --model=M --index=I

Measures `option_accuracy`; the paper trains on it and reports no figure.
Traps: the question stem stands apart from the options; the scripts call the task `obqa`.
"""

from selfrag_jax.evaluation.tasks import Task

TASK = Task(
    name="openbookqa",
    instruction="Which of the listed answers is the best one? Reply with its letter only.",
    heading="\n\n### Input:\n",
    script_name="obqa",
    has_choices=True,
    max_new_tokens=50,
    metric="option_accuracy",
    files=("openbookqa*.json*", "obqa*.json*"),
)
