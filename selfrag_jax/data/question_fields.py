"""The field names of published question files, one table for all readers.

Of the names for one thing, the first that a row has counts.

PopQA, TriviaQA, NQ         question or instruction; answers, answer or output; ctxs
PopQA (original)            possible_answers: a JSON list as text; s_pop: the popularity
TriviaQA (original)         answer {value, aliases, normalized_aliases}
FlashRAG                    question, golden_answers
KILT                        input, output [{answer, provenance}]
SQuAD                       answers {text: [...]}, context
HotpotQA, 2WikiMultihopQA   _id, question, answer, context [[title, [sentence]]]
StrategyQA, BoolQ           qid, question, answer true or false: yes or no
FEVER, PubHealth            claim, label SUPPORTS or REFUTES, true or false
ARC, OpenBookQA             choices {label, text} or question {stem, choices}, answerKey
MMLU                        choices [text], answer: a position; or columns A, B, C, D
ALCE's ASQA, ELI5, QAMPARI  qa_pairs, annotations, docs; claims; answers [[alias]]
QAMPARI (original)          question_text, answer_list [{answer_text, aliases}]
FActScore                   input, topic, cat; output is another model's text, not gold
the synthetic world         options, the closed set; facts [[relation, value]]
any                         popularity, and its decile: numbers
"""

from __future__ import annotations

from selfrag_jax.records import ROW_ID_FIELDS

QUESTION = (
    "question",
    "instruction",
    "input",
    "query",
    "claim",
    "question_text",
    "question_stem",
    "ambiguous_question",
    "Question",
)
STEM = ("stem", "text")  # within a question that is an object
ID = ROW_ID_FIELDS
GOLD = (
    "answers",
    "golden_answers",
    "possible_answers",
    "answer",
    "output",
    "label",
    "answer_list",
    "Answer",
)
# Of these, text that begins with a bracket is a list that was written as text.
GOLD_LISTS = ("answers", "golden_answers", "possible_answers", "answer_list")
MORE_GOLD = ("answer_aliases",)
CHOICE_KEY = ("answerKey", "answer_idx", "answer_index", *GOLD)
# Within an answer that is an object: TriviaQA, KILT, SQuAD, QAMPARI.
ANSWER_PARTS = (
    "value",
    "Value",
    "answer",
    "answer_text",
    "text",
    "aliases",
    "Aliases",
    "normalized_aliases",
    "NormalizedAliases",
)
ANSWER_GROUPS = "answer_groups"
NUMBERED = "numbered_answer"  # in Question.extra: the right choice's label, if a number
PASSAGES = ("ctxs", "top_contexts", "docs")
CONTEXT = ("context", "contexts", "paragraphs", "passage")
POPULARITY = ("popularity", "s_pop")
DECILE = "decile"  # of popularity, among questions of its like
# The field that holds the rows of a JSON file with one object.
ROWS = ("data", "Data")
