r"""Biographies, scored by FActScore (500 people in the paper).

    selfrag evaluate --task=factscore_bio --model=M \
        --input=factscore_unlabeled_alpaca_13b_retrieval.jsonl

Measures `fact_precision` where a verifier is given; FActScore itself takes the exported answers.
The paper: 81.2 (7B), 80.2 (13B), by FActScore with ChatGPT and retrieval.
Traps: `output` in the published file is another model's text and no gold answer; citation marks
have to be taken out before FActScore reads the answers.
"""

from selfrag_jax.evaluation.tasks import Task

TASK = Task(
    name="factscore_bio",
    script_name="factscore",
    needs_gold=False,
    max_depth=7,
    released=(("max_new_tokens", 300),),
    metric="fact_precision",
    figures={"fact_precision": {"7b": 81.2, "13b": 80.2}},
    retriever="Contriever-MS MARCO and Google",
    files=("factscore_unlabeled_alpaca_13b_retrieval.json*", "factscore*.json*"),
)
