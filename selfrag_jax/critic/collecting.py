"""Critic data: which queries a teacher is asked, and which of its answers become examples.

See Section 3.2.1 of the paper. The teachers are in teachers/.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from typing import Any, TypeVar

from selfrag_jax.critic.teachers.settings import EndpointConfig, LocalConfig
from selfrag_jax.critic.teachers.teacher import Request, Verdict, kind_of
from selfrag_jax.errors import UserError
from selfrag_jax.records import CriticExample, Instruction
from selfrag_jax.text import reflection
from selfrag_jax.text.prompts import CritiqueQuery
from selfrag_jax.text.sentences import split_sentences

T = TypeVar("T")
TEACHERS = ("rule", "openai", "openai-batch", "local")
RARE = 0.05  # a label below this share of its group does not lower the balance's cap further


@dataclass(frozen=True)
class CollectConfig:
    seed: int
    teacher: str  # one of TEACHERS
    teacher_error_rate: float  # of the rule teacher
    share: tuple[tuple[str, float], ...]  # per critique group: the share of instructions queried
    passages: int  # retrieved passages to query per instruction
    # Per critique group: how many queries to draw, spread evenly over the datasets (and, for
    # retrieve, over its two kinds), instead of a share of the instructions. Empty: by share.
    per_group: tuple[tuple[str, int], ...] | None = ()
    # No label of a group is kept more than `balance` times as often as the group's rarest one, or
    # as RARE of the group if that is more. None: all are kept.
    balance: float | None = None
    dev_share: float = 0.0  # share of the questions whose examples go to out.dev.jsonl
    max_characters: int = 20_000  # of the texts of a query; longer ones are recorded as failed
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    local: LocalConfig = field(default_factory=LocalConfig)

    def __post_init__(self):
        if self.teacher not in TEACHERS:
            raise UserError(
                f"--teacher={self.teacher!r}: unknown; available: {', '.join(TEACHERS)}"
            )
        for name in ("share", "per_group"):
            for group, _ in getattr(self, name) or ():
                if group not in reflection.GROUPS:
                    groups = ", ".join(reflection.GROUPS)
                    raise UserError(f"collect.{name}: no group {group!r}; groups: {groups}")
        if missing := [g for g in reflection.GROUPS if g not in dict(self.share)]:
            raise UserError(f"collect.share: lacks {missing[0]!r}")
        if self.balance is not None and self.balance < 1:
            raise UserError(f"collect.balance={self.balance}: must be at least 1, or none")
        if self.passages < 1 or not 0 <= self.teacher_error_rate <= 1:
            raise UserError("collect: passages must be at least 1, teacher_error_rate from 0 to 1")
        if not 0 <= self.dev_share < 1:
            raise UserError(f"collect.dev_share={self.dev_share}: must be from 0 to below 1")

    def only(self, groups: Sequence[str]) -> CollectConfig:
        """Returns a config that asks about these groups alone.

        Raises UserError for an unknown group.
        """
        if unknown := [g for g in groups if g not in reflection.GROUPS]:
            known = ", ".join(reflection.GROUPS)
            raise UserError(f"--groups: no group {unknown[0]!r}; groups: {known}")
        share = tuple((g, s if g in groups else 0.0) for g, s in self.share)
        per_group = tuple((g, n) for g, n in self.per_group or () if g in groups)
        return replace(self, share=share, per_group=per_group)

    def made_from(self) -> dict[str, Any]:
        """Returns what shapes the output, for the manifest.

        A field at its default is left out, so that files made before it was added stay finished.
        """
        made = asdict(self)
        for name in ("endpoint", "local"):
            del made[name]
        defaults = {f.name: f.default for f in fields(self) if f.default is not MISSING}
        return {k: v for k, v in made.items() if k not in defaults or v != defaults[k]}


# ---- which queries ------------------------------------------------------------------------------
def critique_queries(
    row: Instruction, config: CollectConfig, rng: random.Random
) -> Iterator[CritiqueQuery]:
    """Yields the queries to the teacher about one instruction, by the config's shares."""
    return _queries(row, dict(config.share), config, rng)


def _queries(
    row: Instruction, share: dict[str, float], config: CollectConfig, rng: random.Random
) -> Iterator[CritiqueQuery]:
    text = row.full_instruction
    sentences = [sentence.strip() for sentence in split_sentences(row.output)] or [""]
    if rng.random() < share["retrieve"]:
        yield CritiqueQuery("retrieve", text)
        if row.ctxs:
            length = 0
            for k in range(1, len(sentences)):
                length += len(sentences[k - 1]) + 1
                if length > config.max_characters:
                    break  # from here on, the preceding text alone is too long to ask about
                evidence = rng.choice(row.ctxs[:2])
                yield CritiqueQuery("retrieve", text, " ".join(sentences[:k]), evidence)
    passages = list(row.ctxs[: config.passages])
    for passage in passages:
        if rng.random() < share["isrel"]:
            yield CritiqueQuery("isrel", text, evidence=passage)
    # The first two are mostly about the right entity, the others about similar ones.
    for passage in passages[:2] + ([rng.choice(passages[2:])] if len(passages) > 2 else []):
        if rng.random() < share["issup"]:
            yield CritiqueQuery("issup", text, evidence=passage, output=rng.choice(sentences))
    if rng.random() < share["isuse"]:
        yield CritiqueQuery("isuse", text, output=row.output)


def choose_requests(rows: Sequence[Instruction], config: CollectConfig) -> list[Request]:
    """Returns the queries to ask, in the rows' order: by share, or as many as `per_group` says.

    With `per_group`, each row offers a query of each passage and one of its later sentences, and
    the offers are drawn evenly from every dataset and kind of query.
    """
    if not config.per_group:
        return [
            Request(query, row.id)
            for row in rows
            for query in critique_queries(row, config, _rng("collect", config.seed, row.id))
        ]
    offers: dict[str, dict[tuple[str, str], list[tuple[int, Request]]]] = {}
    number = 0
    for row in rows:
        rng = _rng("collect", config.seed, row.id)
        found = list(_queries(row, dict.fromkeys(reflection.GROUPS, 1.0), config, rng))
        later = [q for q in found if kind_of(q) == "retrieve_next"]
        kept = rng.choice(later) if later else None
        for query in found:
            kind = kind_of(query)
            if kind == "retrieve_next" and query is not kept:
                continue
            stratum = (kind, row.dataset_name)
            of_group = offers.setdefault(query.group, {})
            of_group.setdefault(stratum, []).append((number, Request(query, row.id)))
            number += 1
    chosen = []
    for group, wanted in config.per_group:
        chosen += spread_evenly(offers.get(group, {}), wanted, _rng("draw", config.seed, group))
    return [request for _, request in sorted(chosen, key=lambda pair: pair[0])]


def spread_evenly(
    strata: dict[tuple[str, str], list[T]], wanted: int, rng: random.Random
) -> list[T]:
    """Draws `wanted` items, as equally many from each stratum as there are; all if too few."""
    left, out = wanted, []
    by_size = sorted(strata.items(), key=lambda item: (len(item[1]), item[0]))
    for i, (_, items) in enumerate(by_size):
        n = min(len(items), -(-left // (len(by_size) - i)))
        out += rng.sample(items, n)
        left -= n
    return out


def _rng(purpose: str, seed: int, name: str) -> random.Random:
    return random.Random(f"{purpose}-{seed}-{name}")


def length_of(query: CritiqueQuery) -> int:
    """Returns the characters of a query's texts."""
    evidence = query.evidence
    texts = [query.instruction, query.preceding, query.output]
    texts += [evidence.title, evidence.text] if evidence is not None else []
    return sum(map(len, texts))


# ---- which answers ------------------------------------------------------------------------------
def example_of(request: Request, verdict: Verdict) -> CriticExample:
    """Returns the critic's example that a verdict makes. The verdict must have a token."""
    q = request.query
    if verdict.token is None:
        raise ValueError(f"{request.row_id}: has no token ({verdict.reason})")
    return CriticExample(
        q.group,
        q.instruction,
        verdict.token,
        q.preceding,
        q.evidence,
        q.output,
        request.row_id,
        verdict.explanation,
    )


def failed_row(request: Request, verdict: Verdict) -> dict[str, Any]:
    """Returns the row of the file of failures."""
    q = request.query
    row: dict[str, Any] = {
        "id": request.row_id,
        "task": q.group,
        "kind": kind_of(q),
        "reason": verdict.reason,
    }
    row |= {"instruction": q.instruction[:2000], "preceding": q.preceding[:2000]}
    if q.evidence is not None:
        row["evidence"] = asdict(q.evidence)
    return row | {"segment": q.output[:2000], "reply": verdict.raw}


def balanced(
    examples: Sequence[CriticExample], most: float | None, seed: int
) -> list[CriticExample]:
    """Drops examples of frequent labels, as CollectConfig.balance says; keeps the order.

    Which ones are dropped depends on the seed and the query alone, not on its score or explanation.
    """
    if most is None:
        return list(examples)
    counts: dict[str, Counter[str]] = {}
    for e in examples:
        counts.setdefault(e.task, Counter())[e.output] += 1
    dropped: set[int] = set()
    for group, of_label in counts.items():
        rarest = max(min(of_label.values()), RARE * of_label.total())
        cap = max(1, round(most * rarest))
        for label in of_label:
            of_it = [i for i, e in enumerate(examples) if (e.task, e.output) == (group, label)]
            of_it.sort(key=lambda i: _hash(f"balance-{seed}-{_asked(examples[i])}"))
            dropped.update(of_it[cap:])
    return [e for i, e in enumerate(examples) if i not in dropped]


def split_by_question(
    examples: Sequence[CriticExample], dev_share: float, seed: int
) -> tuple[list[CriticExample], list[CriticExample]]:
    """Returns the examples for training and for development.

    A question is on the same side in every file, as its text and the seed alone decide.
    """
    sides: tuple[list[CriticExample], list[CriticExample]] = ([], [])
    for e in examples:
        question = " ".join(e.instruction.split()).lower()
        sides[_hash(f"split-{seed}-{question}") < dev_share].append(e)
    return sides


def _asked(e: CriticExample) -> tuple[str, ...]:
    """What the teacher was asked."""
    evidence = ("", "") if e.evidence is None else (e.evidence.title, e.evidence.text)
    return e.task, e.id, e.instruction, e.preceding, *evidence, e.segment


def _hash(text: str) -> float:
    """A number from 0 to below 1 that stands for a text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6]) / 2**48
