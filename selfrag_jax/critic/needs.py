"""Who decides whether an instruction needs retrieval, when the generator's data are labelled.

    critic    the critic, from the instruction alone (the paper; critic/labelling.py)
    teacher   a teacher, whose labels `selfrag collect` wrote for the same instructions
    self      the generator's own base model: retrieval is needed for what it does not know

`self` asks the base to answer without passages.

- A short output is compared with the answer. The base knows it if the answer contains the output
  after normalising. An output that is a sentence ("Ann was born in Rome.") must be contained as a
  whole, so the base must have learned to answer in such sentences, or see demonstrations of them.
  A lucky guess counts as known: a base that guesses between True and False is right half of the
  time.
- A long output is never generated. Its gain is what the best passage adds to the mean
  log-likelihood of its tokens; retrieval is needed where the gain is above a threshold. The
  threshold is calibrated on short outputs, whose answers tell what the base knows: it is the one
  with the highest balanced accuracy on a dev split of them.
"""

from __future__ import annotations

import difflib
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from selfrag_jax.errors import StageFailed, UserError
from selfrag_jax.progress import progress
from selfrag_jax.records import (
    Instruction,
    critic_example_from,
    read_rows,
    write_jsonl,
)
from selfrag_jax.text.normalising import normalise, without_punctuation
from selfrag_jax.text.reflection import CONTINUE, NO_RETRIEVAL, RETRIEVAL, RETRIEVE

CRITIC, TEACHER, SELF = CHOICES = ("critic", "teacher", "self")
# Thai, Lao, Burmese, Khmer, kana and Chinese characters: no spaces between words.
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")
_TOKEN_CHARACTERS = 64  # more than any token has, but for long runs of spaces
_DRAWS = 20  # rows looked at for each demonstration, at most


@dataclass(frozen=True)
class NeedsConfig:
    """Settings of retrieve_labels = self."""

    seed: int
    shots: int  # demonstrations before each question, for bases that were not taught to answer
    max_new_tokens: int  # of an answer
    short_tokens: int  # outputs of at most so many tokens are compared with the base's answer
    passages: int  # of these top passages, the best one counts for a long output's gain
    dev_share: float  # of the short outputs: calibrates the threshold
    batch: int  # rows answered at once
    length_bucket: int  # prompts are padded to a multiple of it
    max_length: int  # tokens of a prompt with passage and output
    threshold: float | None = None  # of the gain; None: calibrated

    def __post_init__(self):
        for name in ("max_new_tokens", "passages", "batch", "length_bucket"):
            if getattr(self, name) < 1:
                raise UserError(f"config needs: {name}={getattr(self, name)} must be at least 1")
        for name in ("shots", "short_tokens"):
            if getattr(self, name) < 0:
                raise UserError(f"config needs: {name}={getattr(self, name)} must not be below 0")
        if self.threshold is not None and not np.isfinite(self.threshold):
            raise UserError(f"--need_threshold={self.threshold}: must be a number")
        if not 0 <= self.dev_share <= 1:
            raise UserError(f"config needs: dev_share={self.dev_share} must be between 0 and 1")
        if self.max_length <= self.max_new_tokens + 1:
            raise UserError(
                f"config needs: max_length={self.max_length} leaves no room for a prompt before "
                f"max_new_tokens={self.max_new_tokens}"
            )


@dataclass(frozen=True)
class Need:
    """A decision for one instruction."""

    id: str
    token: str  # [Retrieval] or [No Retrieval]
    reason: str  # right, wrong or gain; empty: no output, no passages: none to retrieve
    # Of right and wrong, the probability of the answer (mean over tokens); of gain, the gain.
    value: float | None = None
    answer: str = ""  # of the base


@dataclass(frozen=True)
class Calibration:
    """A threshold of the gain, and its balanced accuracy on the dev rows."""

    threshold: float
    balanced_accuracy: float | None  # None: a given threshold, and no dev rows to check it on
    rows: int
    wrong: int


class Base(Protocol):
    """What is asked of the generator's base; see self_knowledge.SelfModel."""

    def num_tokens(self, text: str) -> int: ...

    def answer(
        self, rows: Sequence[Instruction], demonstrations: Sequence[Sequence[Instruction]]
    ) -> list[tuple[str, float]]:
        """Returns (answer, its probability) of each row, without passages."""
        ...

    def gains(self, rows: Sequence[Instruction]) -> list[float]:
        """Returns what the best passage adds to each output's mean log-likelihood per token."""
        ...


def check_choice(name: str) -> None:
    """Raises UserError unless `name` is one of CHOICES."""
    if name not in CHOICES:
        close = difflib.get_close_matches(name, CHOICES, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise UserError(f"retrieve_labels={name!r} must be one of {', '.join(CHOICES)}{hint}")


def check_ids(rows: Sequence[Instruction]) -> None:
    """Raises UserError if two different rows have the same id."""
    first: dict[str, tuple[str, str]] = {}
    for row in rows:
        content = row.full_instruction, row.output
        if first.setdefault(row.id, content) != content:
            raise UserError(
                f"id {row.id!r} stands at two different rows; whether retrieval is needed is kept "
                "by id, so give each row its own"
            )


# ---- teacher -------------------------------------------------------------------------------------
def teacher_needs(file: str | Path, rows: Sequence[Instruction]) -> dict[str, str]:
    """Returns the teacher's Retrieve token of each row, by id, from critic data.

    file: as `selfrag collect` wrote it; its part for development, beside it, is read too.

    Only labels of the instruction alone count. They are matched by id and instruction, else by
    instruction; of several labels for an instruction, the most frequent. Raises UserError if a row
    has no label, or a label is no Retrieve token.
    """
    check_ids(rows)
    by_id: dict[tuple[str, str], str] = {}
    by_instruction: dict[str, Counter[str]] = {}
    file = Path(file)
    dev = file.with_name(f"{file.stem}.dev.jsonl")  # the other part of what collect wrote
    parts = [read_rows(part) for part in (file, dev) if part is file or part.is_file()]
    for where, row in chain.from_iterable(parts):
        e = critic_example_from(where, row)
        if e.task != "retrieve" or e.preceding or e.evidence is not None:
            continue
        if e.output not in RETRIEVE:
            raise UserError(f"{where}: output {e.output!r} must be one of {', '.join(RETRIEVE)}")
        # Without evidence there is nothing to continue with (see labelling.py, too).
        token = RETRIEVAL if e.output == CONTINUE else e.output
        instruction = e.instruction.strip()
        by_id[e.id, instruction] = token
        by_instruction.setdefault(instruction, Counter())[token] += 1
    needs, missing = {}, []
    for r in rows:
        if r.id and (r.id, r.full_instruction) in by_id:
            needs[r.id] = by_id[r.id, r.full_instruction]
        elif r.full_instruction in by_instruction:
            needs[r.id] = by_instruction[r.full_instruction].most_common(1)[0][0]
        else:
            missing.append(r.id)
    if missing:
        raise UserError(
            f"{file}: has no retrieve label for {len(missing)} of {len(rows)} instructions "
            f"(the first: id {missing[0]!r}); run `selfrag collect --groups=retrieve` on the same "
            "instructions, and let it keep all of them: --config.collect.per_group=none "
            "--config.collect.balance=none"
        )
    return needs


# ---- self ----------------------------------------------------------------------------------------
def is_right(answer: str, gold: str) -> bool:
    """Returns whether an answer contains the gold output after normalising, as whole words.

    In scripts without spaces, anywhere. An output that is nothing but an article, such as the
    choice "A.", must be the whole answer.
    """
    if not normalise(gold):
        gold = without_punctuation(gold)
        return bool(gold) and without_punctuation(answer) == gold
    answer, gold = normalise(answer), normalise(gold)
    if _UNSPACED.search(gold):
        return gold in answer
    return f" {gold} " in f" {answer} "


def best_threshold(gains: Sequence[float], wrong: Sequence[bool]) -> tuple[float, float]:
    """Returns the threshold with the highest balanced accuracy, and that accuracy.

    A gain above the threshold predicts a wrong answer. Of equally good thresholds the lowest is
    taken: a passage too many costs less than one too few. Both right and wrong answers are needed.
    """
    order = np.argsort(gains, kind="stable")
    values, is_wrong = np.asarray(gains, np.float64)[order], np.asarray(wrong, bool)[order]
    num_wrong, num_right = int(is_wrong.sum()), int((~is_wrong).sum())
    # After cut k, the first k gains are below the threshold; equal gains are on the same side.
    right_below = np.concatenate([[0], np.cumsum(~is_wrong)])
    wrong_above = num_wrong - np.concatenate([[0], np.cumsum(is_wrong)])
    cuts = np.concatenate([[0], np.flatnonzero(np.diff(values)) + 1, [len(values)]])
    # In whole numbers, so that equally good cuts are equal.
    score = wrong_above[cuts] * num_right + right_below[cuts] * num_wrong
    k = int(cuts[int(score.argmax())])
    accuracy = float(score.max()) / (2 * num_wrong * num_right)
    if k == 0:
        return float(values[0]) - 1.0, accuracy
    if k == len(values):
        return float(values[-1]), accuracy
    below, above = float(values[k - 1]), float(values[k])
    middle = (below + above) / 2
    return (middle if below < middle < above else below), accuracy


def balanced_accuracy(
    gains: Sequence[float], wrong: Sequence[bool], threshold: float
) -> float | None:
    """Returns the mean accuracy over right and over wrong answers; None if there are none."""
    above = np.asarray(gains) > threshold
    is_wrong = np.asarray(wrong, bool)
    if not is_wrong.any() or is_wrong.all():
        return None
    return float((above[is_wrong].mean() + (~above[~is_wrong]).mean()) / 2)


def demonstrations(
    row: Instruction, pool: Sequence[Instruction], config: NeedsConfig
) -> list[Instruction]:
    """Draws rows to show before a question. None has the row's own question or answer in it.

    There may be fewer than config.shots, if nearly all of the pool has the same answer. From data
    of a closed set alone (True or False) they would all show the other answer, and make the base
    look ignorant; draw them from mixed data.
    """
    if not config.shots or not pool:
        return []
    rng = random.Random(f"shots-{config.seed}-{row.id}")
    question, answer = normalise(row.full_instruction), without_punctuation(row.output)
    drawn: dict[str, Instruction] = {}
    for i in rng.sample(range(len(pool)), min(len(pool), _DRAWS * config.shots)):
        one = pool[i]
        same_answer = without_punctuation(one.output) == answer
        same_answer |= is_right(f"{one.full_instruction} {one.output}", row.output)
        if normalise(one.full_instruction) != question and not same_answer:
            drawn.setdefault(one.full_instruction, one)
        if len(drawn) == config.shots:
            break
    return list(drawn.values())


def decide(
    base: Base, rows: Sequence[Instruction], config: NeedsConfig, parts: Path, chunk: int
) -> tuple[list[Need], Calibration | None]:
    """Returns the decision for each row, and the calibration if there were long outputs.

    Answers and gains are kept in the folder `parts`, a file for each chunk of rows; those that are
    there already are read.
    """
    short, long = [], []
    for row in rows:
        if _is_short(base, row.output, config.short_tokens) and without_punctuation(row.output):
            short.append(row)
        elif row.output.strip() and row.ctxs:
            long.append(row)
    dev = [r for r in short if r.ctxs and _in_dev(r, config)] if long else []

    def answers(some: Sequence[Instruction]) -> list[dict[str, Any]]:
        shown = [demonstrations(r, short, config) for r in some]
        found = zip(some, base.answer(some, shown), strict=True)
        return [{"id": r.id, "answer": text, "value": float(p)} for r, (text, p) in found]

    def gains(some: Sequence[Instruction]) -> list[dict[str, Any]]:
        found = list(zip(some, base.gains(some), strict=True))
        if bad := [r.id for r, gain in found if not np.isfinite(gain)]:
            raise StageFailed(f"the base's likelihoods are not finite for row {bad[0]!r}")
        return [{"id": r.id, "value": float(gain)} for r, gain in found]

    answered = _in_chunks("answers", short, chunk, parts, answers)
    gained = _in_chunks("gains", [*dev, *long], chunk, parts, gains)
    calibration = None
    if long:
        wrong = [not is_right(answered[r.id]["answer"], r.output) for r in dev]
        calibration = calibrate([gained[r.id]["value"] for r in dev], wrong, len(long), config)
    short_ids, long_ids = {r.id for r in short}, {r.id for r in long}
    decisions = []
    for r in rows:
        if r.id in short_ids:
            right = is_right(answered[r.id]["answer"], r.output)
            token, reason = (NO_RETRIEVAL, "right") if right else (RETRIEVAL, "wrong")
            found = answered[r.id]
            decisions.append(Need(r.id, token, reason, found["value"], found["answer"]))
        elif calibration is not None and r.id in long_ids:
            value = gained[r.id]["value"]
            token = RETRIEVAL if value > calibration.threshold else NO_RETRIEVAL
            decisions.append(Need(r.id, token, "gain", value))
        else:
            reason = "no passages" if r.output.strip() else "empty"
            decisions.append(Need(r.id, NO_RETRIEVAL, reason))
    return decisions, calibration


def calibrate(
    gains: Sequence[float], wrong: Sequence[bool], num_long: int, config: NeedsConfig
) -> Calibration:
    """Returns the config's threshold, or the best one on the dev rows.

    Raises UserError if there is none and the dev rows are not both right and wrong.
    """
    num_wrong = sum(wrong)
    if config.threshold is not None:
        accuracy = balanced_accuracy(gains, wrong, config.threshold)
        return Calibration(config.threshold, accuracy, len(wrong), num_wrong)
    if num_wrong in (0, len(wrong)):
        raise UserError(
            f"{num_long} outputs have more than label.needs.short_tokens={config.short_tokens} "
            f"tokens, and no threshold can be calibrated for them: of {len(wrong)} dev rows with "
            f"short outputs the base has {len(wrong) - num_wrong} right and {num_wrong} wrong, "
            "and both are needed. Give --need_threshold (retrieve where the gain in "
            "log-likelihood per token is above it; 0 is neutral), or raise label.needs.dev_share"
        )
    threshold, accuracy = best_threshold(gains, wrong)
    return Calibration(threshold, accuracy, len(wrong), num_wrong)


def _is_short(base: Base, output: str, tokens: int) -> bool:
    # An output of megabytes is not tokenized.
    return len(output) <= _TOKEN_CHARACTERS * tokens and base.num_tokens(output) <= tokens


def _in_dev(row: Instruction, config: NeedsConfig) -> bool:
    return random.Random(f"dev-{config.seed}-{row.id}").random() < config.dev_share


def _in_chunks(
    name: str,
    rows: Sequence[Instruction],
    chunk: int,
    parts: Path,
    work: Callable[[Sequence[Instruction]], list[dict[str, Any]]],
) -> dict[str, dict[str, Any]]:
    """Returns what `work` finds for each row, by id; chunks whose file is there are not redone."""
    found: dict[str, dict[str, Any]] = {}
    with progress(name, len(rows), "instructions") as bar:
        for i in range(0, len(rows), chunk):
            some, file = rows[i : i + chunk], parts / f"{name}-{i:08d}.jsonl"
            if file.is_file():
                bar.skip(len(some))
            else:
                write_jsonl(file, work(some))
                bar.advance(len(some))
            found |= {row["id"]: row for _, row in read_rows(file)}
    return found
