"""TriviaQA (unfiltered): trivia questions with many accepted answers (11,313 in the paper).

    selfrag evaluate --task=triviaqa --input=triviaqa_test_w_gs.jsonl --model=M

Measures `match`: any alias is contained in the output. The paper: 66.4 (7B), 69.3 (13B).
Traps: gold answers are the aliases, not `value` alone; short aliases occur in other words.
"""

from selfrag_jax.evaluation.tasks import Task

TASK = Task(
    name="triviaqa",
    ndocs=10,
    metric="match",
    figures={"match": {"7b": 66.4, "13b": 69.3}},
    retriever="Contriever-MS MARCO and Google",
    files=("triviaqa_test_w_gs.json*", "triviaqa*.json*", "trivia_qa*.json*"),
)
