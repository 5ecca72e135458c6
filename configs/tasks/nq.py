"""Natural Questions (open): questions that people asked a search engine (3,610 to test).

    selfrag evaluate --task=nq --input=nq_test.jsonl --model=M --index=I

Measures `match`; the paper reports no figure.
Traps: other papers report exact match of short answers, which answers in sentences fail.
"""

from selfrag_jax.evaluation.tasks import Task

TASK = Task(
    name="nq",
    ndocs=10,
    metric="match",
    files=("nq*.json*", "natural_questions*.json*"),
)
