"""MMLU: exam questions of 57 subjects with four options.

    selfrag evaluate --task=mmlu --input=mmlu.jsonl --model=M --index=I

Measures `option_accuracy`; the paper reports no figure.
Traps: the gold answer is a position, counted from 0, and becomes a letter; figures of other papers
come from prompts with five solved examples, this one has none.
"""

from selfrag_jax.evaluation.tasks import Task

TASK = Task(
    name="mmlu",
    instruction="Which of the listed answers is the best one? Reply with its letter only.",
    heading="\n\n### Input:\n",
    script_name="",
    has_choices=True,
    max_new_tokens=50,
    metric="option_accuracy",
    files=("mmlu*.json*",),
)
