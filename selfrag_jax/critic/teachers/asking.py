"""Asks a teacher what the cache cannot answer, and keeps every reply at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, floor, log10

from selfrag_jax.critic.teachers.cache import ReplyCache
from selfrag_jax.critic.teachers.cost import (
    Budget,
    CostLimitReached,
    Estimate,
    Measured,
    estimate,
)
from selfrag_jax.critic.teachers.teacher import LABELS, Request, Teacher, Verdict, kind_of
from selfrag_jax.critic.teachers.teacher import cache_key as key_of


@dataclass(frozen=True)
class Known:
    """What is known of some requests before anything is asked."""

    keys: list[str]
    verdicts: dict[str, Verdict]  # answers of the cache, and failures of this job, by key

    def open(self) -> dict[str, int]:
        """The keys that must be asked, each with the first request that has it."""
        first: dict[str, int] = {}
        for i, key in enumerate(self.keys):
            if key not in self.verdicts:
                first.setdefault(key, i)
        return first


def look_up(
    teacher: Teacher, requests: Sequence[Request], cache: ReplyCache, retry_failed: bool
) -> Known:
    """Looks requests up in the cache. retry_failed: lets failures of this job be asked again."""
    keys = [key_of(teacher, request.query) for request in requests]
    if retry_failed:
        cache.forget_failures(set(keys))
    verdicts = {}
    for key in dict.fromkeys(keys):
        if verdict := cache.answer(key) or cache.failure(key):
            verdicts[key] = verdict
    return Known(keys, verdicts)


def estimates(
    teacher: Teacher, requests: Sequence[Request], known: Known, cache: ReplyCache | None
) -> list[Estimate]:
    """Returns what is left to ask of each kind that occurs; equal prompts count once."""
    to_ask: dict[str, list[str]] = {kind: [] for kind in LABELS}
    for i in known.open().values():
        to_ask[kind_of(requests[i].query)].append(teacher.prompt(requests[i].query))
    distinct = Counter(kind_of(requests[i].query) for i in _firsts(known.keys))
    return [
        estimate(kind, distinct[kind], prompts, cache.measured(kind) if cache else Measured())
        for kind, prompts in to_ask.items()
        if distinct[kind]
    ]


def _firsts(keys: Sequence[str]) -> list[int]:
    """The first index of each key."""
    return list({key: i for i, key in reversed(list(enumerate(keys)))}.values())


def ask(
    teacher: Teacher,
    requests: Sequence[Request],
    known: Known,
    cache: ReplyCache,
    budget: Budget,
    on_answer: Callable[[int], None],
) -> list[Verdict]:
    """Returns the verdict of every request; equal prompts are asked once.

    on_answer: called with the number of requests that were just decided. Raises StageFailed with
    what is needed to go on if the teacher stops.
    """
    first = known.open()
    sharing = Counter(known.keys)
    keys, verdicts = list(first), dict(known.verdicts)
    asked = [requests[i] for i in first.values()]
    try:
        for i, verdict in teacher.ask(asked):
            query = asked[i].query
            cache.store(keys[i], kind_of(query), teacher.prompt(query), verdict)
            if verdict.token is not None or verdict.reason:
                verdicts[keys[i]] = verdict
                on_answer(sharing[keys[i]])
    except CostLimitReached as e:
        left = [asked[i] for i, key in enumerate(keys) if key not in verdicts]
        raise CostLimitReached(f"{e}. {_to_go_on(teacher, left, cache, budget)}") from None
    return [verdicts[key] for key in known.keys]


def _to_go_on(teacher: Teacher, left: Sequence[Request], cache: ReplyCache, budget: Budget) -> str:
    """What it takes to ask the requests that are left."""
    prompts: dict[str, list[str]] = {}
    for request in left:
        prompts.setdefault(kind_of(request.query), []).append(teacher.prompt(request.query))
    parts = [estimate(kind, len(p), p, cache.measured(kind)) for kind, p in prompts.items()]
    needed = sum(budget.config.cost(e.usage, budget.factor) for e in parts)
    longest = max((p for of_kind in prompts.values() for p in of_kind), key=len, default="")
    # The last request is sent only if the longest possible reply to it fits, too.
    margin = budget.config.cost(budget.largest_usage(longest), budget.factor)
    limit = budget.spent + 1.2 * needed + 2 * margin
    return (
        f"All replies are kept; the {len(left):,} requests that are left need about {needed:.4g} "
        f"more: run again with --max_cost={_round_up(limit)}"
    )


def _round_up(value: float) -> str:
    """Two significant digits, not below the value."""
    unit = 10 ** (floor(log10(value)) - 1) if value > 0 else 1.0
    return f"{ceil(value / unit - 1e-9) * unit:.12g}"
