"""ARC-Challenge: science questions of primary school (1,172 to test).

    selfrag evaluate --task=arc_challenge --input=arc_challenge_processed.jsonl --model=M

Measures `option_accuracy`. The paper: 67.3 (7B), 73.1 (13B).
Traps: labels 1 to 4 are shown as A to D. The scripts list A to D for every question, an empty D
for those of three, and compare with the label as it stands in the file, so that a right C counts as
wrong where the file says 3: so does arc_challenge:released. The passages vote; only letters count
as options.
"""

from selfrag_jax.evaluation.tasks import Task

TASK = Task(
    name="arc_challenge",
    instruction="Which of the listed answers is the best one? Reply with its letter only.",
    heading="\n\n### Input:\n",
    script_name="arc_c",
    has_choices=True,
    max_new_tokens=50,
    metric="option_accuracy",
    figures={"option_accuracy": {"7b": 67.3, "13b": 73.1}},
    retriever="Contriever-MS MARCO",
    files=("arc_challenge_processed.json*", "arc_challenge*.json*", "arc_c_*.json*"),
)
