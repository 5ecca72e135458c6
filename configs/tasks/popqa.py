"""PopQA: questions about rarely visited Wikipedia pages (1,399 of its long tail in the paper).

    selfrag evaluate --task=popqa --input=popqa_longtail_w_gs.jsonl --model=M

Measures `match`: a gold answer is contained in the output. The paper: 54.9 (7B), 55.8 (13B).
Traps: the paper's figure is of the long tail only, the file of all 14,267 questions scores
otherwise; the published passages come from Contriever and from Google, an index of your own has
others; the script's threshold works the other way round (`popqa:released`).
"""

from selfrag_jax.evaluation.tasks import Task

TASK = Task(
    name="popqa",
    ndocs=10,
    metric="match",
    figures={"match": {"7b": 54.9, "13b": 55.8}},
    retriever="Contriever-MS MARCO and Google",
    files=("popqa_longtail_w_gs.json*", "popqa_longtail*.json*", "popqa*.json*"),
)
