"""`selfrag answer`: files of answers, and what becomes of an interrupted one."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from plain_search import make_passages, make_rag

from selfrag_jax import locks
from selfrag_jax.commands.answer import answer_file, answering_time
from selfrag_jax.errors import UserError
from selfrag_jax.records import write_jsonl


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def rounded(value):
    """A JSON value whose numbers compare within the rounding of sums in another order."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    # They are written with four digits.
    return pytest.approx(value, abs=2e-4) if isinstance(value, float) else value


def test_an_interrupted_answer_file_is_continued(talkative, tmp_path):
    questions, out, whole = (tmp_path / f"{name}.jsonl" for name in ("q", "a", "whole"))
    write_jsonl(questions, [{"id": str(i), "question": f"Where is {'x' * i}?"} for i in range(10)])
    changes = {"mode": "no_retrieval"}
    assert answer_file(make_rag(talkative), questions, whole, None, dict(changes)) == 10

    rag, answered = make_rag(talkative), []
    make_answer = rag._answer

    def interrupted_answer(search, tree, q, notices):
        if len(answered) == 5:
            raise KeyboardInterrupt
        answered.append(q.id)
        return make_answer(search, tree, q, notices)

    rag._answer = interrupted_answer
    with pytest.raises(KeyboardInterrupt):
        answer_file(rag, questions, out, None, dict(changes))
    assert len(set(answered)) == 5
    [partial] = tmp_path.glob(".a.jsonl.*.partial")
    first_part = sum(row["seconds"] for row in rows_of(partial))
    with open(partial, "a") as f:
        f.write('{"id": "4", "ans')  # as left by a kill in the middle of a line
    assert not out.exists()

    with open(partial, "a") as f:  # another process is answering the same questions
        locks.lock_file(f, out)
        with pytest.raises(UserError, match=r"a\.jsonl: another process is writing it"):
            answer_file(rag, questions, out, None, dict(changes))

    def recording_answer(search, tree, q, notices):
        answered.append(q.id)
        return make_answer(search, tree, q, notices)

    rag = make_rag(talkative)
    rag.config = replace(rag.config, batch=2)  # as after running out of memory
    rag._answer = recording_answer
    assert answer_file(rag, questions, out, None, dict(changes)) == 10
    assert sorted(answered) == [str(i) for i in range(10)]  # none twice
    assert not partial.exists()
    assert rows_of(out) == [rounded(row) for row in rows_of(whole)]
    # Both parts' seconds are in the manifest, and in no row.
    seconds, timed = answering_time(out)
    assert timed == 10 and seconds > first_part > 0 and "seconds" not in rows_of(out)[0]


def test_failed_questions_are_reported_and_tried_again(talkative, tmp_path, capsys):
    passages = make_passages(np.random.default_rng(0), talkative.tokenizer, 2)

    class BrokenForMara:
        def search(self, queries, k):
            if any("Mara" in q for q in queries):
                raise RuntimeError("the index is gone")
            return [passages for _ in queries]

    rag, changes = make_rag(talkative), {"mode": "always_retrieve"}
    rag.retriever = BrokenForMara()
    questions, out = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    texts = ("Who?", "Where is Mara?")
    write_jsonl(questions, [{"id": i, "question": q} for i, q in enumerate(texts)])
    answer_file(rag, questions, out, None, changes)
    printed = capsys.readouterr().err
    assert "1 of 2 questions failed, '1' first" in printed
    assert "retrieved for 1 of 1 questions (100.0%)" in printed
    before = rows_of(out)
    assert [bool(row["error"]) for row in before] == [False, True]
    took, timed = answering_time(out)
    assert timed == 1 and took > 0

    rag.retriever = SimpleNamespace(search=lambda queries, k: [passages for _ in queries])
    answer_file(rag, questions, out, None, changes)
    after = rows_of(out)
    assert answering_time(out)[0] > took and answering_time(out)[1] == 2
    assert after[0] == before[0]  # only the failed one was answered again
    assert after[1]["segments"] and not after[1]["error"]

    # Wrong settings are refused before a file of the user is touched.
    with pytest.raises(UserError, match="--mode='sometimes'"):
        answer_file(rag, questions, questions, None, {"mode": "sometimes"})
