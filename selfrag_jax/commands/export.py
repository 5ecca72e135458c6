"""`selfrag export`: answers in, a file for another project's judge out."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from selfrag_jax import artifacts
from selfrag_jax.commands.command import INPUT, Command, Flag
from selfrag_jax.data.questions import read_questions
from selfrag_jax.errors import UserError
from selfrag_jax.evaluation.cited_answers import CitedAnswer, read_answers
from selfrag_jax.evaluation.export_checks import Item
from selfrag_jax.evaluation.exports import FORMATS

EXAMPLE = "selfrag export --for=alce --answers=answers.jsonl --task=questions.jsonl --out=alce.json"
CHECK_EXAMPLE = "selfrag export --for=alce --check=alce.json"
QAMPARI = "qampari"  # in a path, it tells ALCE's eval.py to leave out ROUGE, QA and MAUVE


def export_file(judge: str, answers: str | Path, task: str | Path | None, out: str | Path) -> int:
    """Writes answers in a judge's format; returns their number.

    judge: a name of FORMATS; task: the question file, whose gold answers the judge reads. Raises
    UserError if answers and questions do not belong together, or lack what the judge needs.
    """
    kind = FORMATS[judge]
    inputs = {"answers": answers} | ({"task": task} if task else {})
    artifacts.check_output(out, "export", inputs)
    if kind.needs_questions and not task:
        raise UserError(f"missing --task, the question file; {judge} needs it")
    found = read_answers(answers, read_questions(task) if task else None)
    rows = kind.rows(found)
    artifacts.claim_rewritten(out, "export")
    kind.write(out, rows)
    counts = {"answers": len(rows), "empty": sum(not a.text for a in found)}
    artifacts.write_manifest(out, "export", {"for": judge}, inputs, counts)
    for note in _notes(judge, found, rows, out):
        print(note, file=sys.stderr)
    return len(rows)


def _notes(
    judge: str, found: Sequence[CitedAnswer], rows: Sequence[Item], out: str | Path
) -> Iterator[str]:
    """Yields what the judge's figures would not tell."""
    if empty := sum(not a.text for a in found):
        yield f"{empty:,} of {len(rows):,} answers are empty"
    if (lacking := sum(a.lacks_passages for a in found)) and judge != "factscore":
        yield f"{lacking:,} of {len(rows):,} answers retrieved, but their rows lack the passages"
    if judge == "alce":
        if not any("answer" in row or "annotations" in row for row in rows):
            yield "there is no long answer to compare with: run ALCE's eval.py with --no_rouge"
        # By the path eval.py takes the file for another task.
        if any("answer_groups" in a.question.extra for a in found) != (QAMPARI in str(out)):
            has, does = ("holds", "leaves out") if QAMPARI in str(out) else ("lacks", "scores")
            yield f"{out}: the path {has} {QAMPARI!r}, so ALCE's eval.py {does} ROUGE, QA and MAUVE"


def run(values: dict[str, Any], _: list[str]) -> None:
    judge = values["for"]
    if judge not in FORMATS:
        raise UserError(f"--for={judge}: must be one of {', '.join(FORMATS)}")
    if values["check"]:
        if given := [name for name in ("answers", "task", "out") if values[name]]:
            raise UserError(f"--{given[0]}: does not go with --check; {CHECK_EXAMPLE}")
        print(f"{values['check']}: {FORMATS[judge].check(values['check'])} rows, as {judge} reads")
        return
    if missing := [f"--{name}" for name in ("answers", "out") if not values[name]]:
        raise UserError(f"missing {', '.join(missing)}; for example: {EXAMPLE}")
    n = export_file(judge, values["answers"], values["task"], values["out"])
    print(f"{values['out']}: {n} answers for {judge}")


COMMAND = Command(
    example=f"{EXAMPLE}\n{CHECK_EXAMPLE}",
    flags=(
        Flag("for", f"the judge: {', '.join(FORMATS)}", required=True, choices=tuple(FORMATS)),
        Flag("answers", "the answers, written by `selfrag answer`", group=INPUT),
        Flag(
            "task",
            "the question file with gold answers; needed for factscore and ragchecker. Without it, "
            "alce scores citations only",
            group=INPUT,
        ),
        Flag(
            "out",
            "alce, ragchecker: JSON; factscore, kilt: JSON lines. Written anew every time",
            writes=True,
        ),
        Flag("check", "instead: a file of that format, whose first fault is named", group=INPUT),
    ),
    run=run,
)
