"""The `answer` stage: a file of questions in, a file of answers out, resumable."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import IO, Any

from selfrag_jax import artifacts
from selfrag_jax.answering.selfrag import Answer, SelfRAG
from selfrag_jax.data.questions import read_questions
from selfrag_jax.engine import engine
from selfrag_jax.progress import progress
from selfrag_jax.records import BadInput, read_rows, write_jsonl


def answer_file(rag: SelfRAG, input_path: str | Path, out: str | Path, task: str | None, changes: dict[str, Any]) -> int:
    """Answers all questions of a file; returns how many.

    Answers are kept in `out`.partial as they come; an interrupted run answers only the remaining questions. Raises
    BadInput for a file without questions, for ids that occur twice, for questions without passages when there is no
    index, and while another process answers the same into the same file.
    """
    rag.check(changes)  # before anything is written
    questions = read_questions(input_path, task or "")
    ids = [q.id for q in questions]
    if twice := next((i for i in ids if ids.count(i) > 1), None) if len(set(ids)) < len(ids) else None:
        raise BadInput(f"{input_path}: id {twice!r} occurs more than once")
    needs_passages = rag.retriever is None and changes.get("mode", rag.config.search.mode) != "no_retrieval"
    if needs_passages and (without := [q.id for q in questions if not q.ctxs]):
        raise BadInput(f"{input_path}: question {without[0]!r} has no passages (ctxs); give --index, or --mode=no_retrieval")
    settings = json.loads(json.dumps(rag.config, default=vars))
    # With less of these an answering goes on that was too large for the device; they change no answer.
    del settings["batch"], settings["tensor"], settings["search"]["length_bucket"]
    config = {"changes": {k: v for k, v in changes.items() if k != "length_bucket"}, "task": task, "answer": settings}
    inputs = {"input": input_path, **rag.sources}
    done: dict[str, dict[str, Any]] = {}
    if artifacts.is_finished(out, "answer", config, inputs):
        done = {row["id"]: row for _, row in read_rows(out) if not row["error"]}
        if len(done) == len(questions):
            return len(questions)
    partial = Path(out).with_name(f".{Path(out).name}.{artifacts.identity('answer', config, inputs)}.partial")
    before = len(engine.compiled)
    partial.parent.mkdir(parents=True, exist_ok=True)
    with open(partial, "a", encoding="utf-8") as f:
        artifacts.lock(f, out)
        done |= {row["id"]: row for row in _whole_rows(partial) if not row.get("error")}  # what failed is tried again
        _answer_into(f, rag, questions, done, changes)
    print(_summary([done[i] for i in ids], engine.compiled[before:]), file=sys.stderr)
    if failed := [i for i in ids if done[i]["error"]]:
        print(f"{len(failed)} of {len(ids)} questions failed, {failed[0]!r} first; their rows say why (error)", file=sys.stderr)
    write_jsonl(out, (done[i] for i in ids))
    artifacts.finish(out, "answer", config, inputs, {"answers": len(ids), "retrieved": sum(done[i]["retrieved"] for i in ids)})
    partial.unlink(missing_ok=True)
    return len(ids)


def _answer_into(f: IO[str], rag: SelfRAG, questions: list, done: dict[str, dict[str, Any]], changes: dict[str, Any]) -> None:
    """Answers what is not done, and notes each answer in `done` and in the file as soon as it is there."""
    with progress("answer", len(questions), "questions", len(done)) as bar:

        def keep(a: Answer) -> None:
            done[a.id] = a.to_row()
            f.write(json.dumps(done[a.id], ensure_ascii=False) + "\n")
            f.flush()
            bar.advance(1)

        rag.answer([q for q in questions if q.id not in done], on_answer=keep, of=len(questions), **changes)


def _summary(rows: list[dict[str, Any]], compiled: list[tuple[str, float]]) -> str:
    """How often retrieval was decided for, and what was compiled on the way."""
    rows = [row for row in rows if not row["error"]]
    first = sum(row["retrieved"] for row in rows)
    segments = [s["action"] for row in rows for s in row["segments"]]
    text = f"retrieved for {first} of {len(rows)} questions ({first / max(len(rows), 1):.1%})"
    if len(segments) > len(rows):
        text += f", for {segments.count('retrieve')} of their {len(segments)} segments"
    if compiled:
        text += f"; {len(compiled)} programs compiled in {sum(s for _, s in compiled):.0f} s"
    return text


def _whole_rows(partial: Path) -> list[dict[str, Any]]:
    """Rows of an interrupted run; a last line that was cut off is dropped from the file."""
    if not partial.is_file():  # another process has just ended with it, and removed it
        return []
    data = partial.read_bytes()
    if not data.endswith(b"\n"):
        os.truncate(partial, data.rfind(b"\n") + 1)
    return [row for _, row in read_rows(partial)]
