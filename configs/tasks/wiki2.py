"""2WikiMultihopQA: questions that take two to four Wikipedia pages (12,576 to develop on).

    selfrag evaluate --task=wiki2 --input=2wiki_dev.jsonl --model=M --index=I

Measures `match`; the paper reports no figure.
Traps: as for hotpotqa.
"""

from selfrag_jax.evaluation.tasks import Task

TASK = Task(
    name="wiki2",
    max_depth=3,
    metric="match",
    files=("2wiki*.json*", "wiki2*.json*"),
)
