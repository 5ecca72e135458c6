"""StrategyQA: yes-or-no questions whose steps have to be found.

    selfrag evaluate --task=strategyqa --input=strategyqa_dev.jsonl --model=M --index=I

Measures `option_accuracy`; the paper reports no figure.
Traps: gold answers are true and false in the file, yes and no here; saying yes to all is right in
47%.
"""

from selfrag_jax.evaluation.tasks import Task

TASK = Task(
    name="strategyqa",
    instruction="Reply to the question below with yes or no.",
    options=("yes", "no"),
    synonyms=(("true", "yes"), ("false", "no")),
    max_new_tokens=50,
    metric="option_accuracy",
    files=("strategyqa*.json*", "strategy_qa*.json*"),
)
