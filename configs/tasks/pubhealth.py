"""PubHealth: is a claim about health true or false? (987 in the paper)

    selfrag evaluate --task=pubhealth --input=health_claims_processed.jsonl --model=M

Measures `option_accuracy`. The paper: 72.4 (7B), 74.5 (13B).
Traps: the scripts call the task `fever` and ask as FEVER does; the passages vote; a model that was
trained on FEVER answers SUPPORTS or REFUTES, which stands for true or false.
"""

from selfrag_jax.evaluation.tasks import Task

TASK = Task(
    name="pubhealth",
    instruction="Decide whether the claim below is right. Reply true if it is, and false if not.",
    script_name="fever",
    options=("true", "false"),
    synonyms=(("SUPPORTS", "true"), ("REFUTES", "false"), ("true.", "true"), ("false.", "false")),
    max_new_tokens=50,
    metric="option_accuracy",
    figures={"option_accuracy": {"7b": 72.4, "13b": 74.5}},
    retriever="Contriever-MS MARCO",
    files=("health_claims_processed.json*", "health_claims*.json*", "pubhealth*.json*"),
)
