"""FEVER: is a claim supported by Wikipedia or refuted?

    selfrag evaluate --task=fever --input=fever_dev.jsonl --model=M --index=I

Measures `option_accuracy`; the paper trains on FEVER and reports no figure.
Traps: the options are true and false, as the scripts ask; claims without enough information
(NOT ENOUGH INFO) have neither as their answer and are left out.
"""

from selfrag_jax.evaluation.tasks import Task

TASK = Task(
    name="fever",
    instruction="Decide whether the claim below is right. Reply true if it is, and false if not.",
    script_name="fever",
    options=("true", "false"),
    synonyms=(("SUPPORTS", "true"), ("REFUTES", "false"), ("true.", "true"), ("false.", "false")),
    max_new_tokens=50,
    metric="option_accuracy",
    files=("fever*.json*",),
)
