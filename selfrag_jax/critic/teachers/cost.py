"""What asking costs: prices, a budget that is never exceeded, an estimate beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from selfrag_jax.config import setting
from selfrag_jax.critic.teachers.teacher import Usage
from selfrag_jax.errors import StageFailed, UserError

BATCH_FACTOR = 0.5  # batch files cost half
# Until replies of this teacher have been measured:
CHARACTERS_PER_TOKEN, REPLY_TOKENS, REPLY_SECONDS = 4.0, 80.0, 3.0
MESSAGE_OVERHEAD = 512  # tokens around a prompt at most, the schema of the reply among them


@dataclass(frozen=True)
class CostConfig:
    price_in: float | None = setting(
        "price of a million tokens of prompts (batch files are counted at half)", default=None
    )
    price_out: float | None = setting("price of a million tokens of replies", default=None)
    max_cost: float | None = setting(
        "stop before this sum is exceeded, over all runs that make this --out; in the prices' "
        "currency",
        default=None,
    )

    def __post_init__(self):
        for name in ("price_in", "price_out", "max_cost"):
            if (value := getattr(self, name)) is not None and not 0 <= value < inf:
                raise UserError(f"--{name}={value}: must be a number, 0 or above")
        if self.max_cost is not None and not self.known:
            raise UserError("--max_cost needs --price_in and --price_out")

    @property
    def known(self) -> bool:
        return self.price_in is not None and self.price_out is not None

    def cost(self, usage: Usage, factor: float = 1.0) -> float:
        """The price of some tokens, 0 if prices are unknown."""
        per_million = usage.tokens_in * (self.price_in or 0.0)
        per_million += usage.tokens_out * (self.price_out or 0.0)
        return factor * per_million / 1e6


class CostLimitReached(StageFailed):
    """The next request could exceed the limit."""


class Budget:
    """Money spent, and set aside for requests that are under way.

    max_tokens: of a reply. factor: on the prices.
    """

    def __init__(self, config: CostConfig, max_tokens: int, factor: float = 1.0):
        self.config, self.max_tokens, self.factor = config, max_tokens, factor
        self.used = self.reserved = Usage()  # whole numbers: they add up without a remainder

    @property
    def spent(self) -> float:
        return self.config.cost(self.used, self.factor)

    def charge(self, used: Usage) -> None:
        """Counts tokens that an earlier run paid for."""
        self.used += used

    def largest_usage(self, prompt: str) -> Usage:
        """The most tokens that a request can take: a token is at least a byte of text."""
        return Usage(len(prompt.encode()) + MESSAGE_OVERHEAD, self.max_tokens)

    def fits(self, usage: Usage) -> bool:
        """Whether a request of this size cannot exceed the limit."""
        if self.config.max_cost is None:
            return True
        cost = self.config.cost(self.used + self.reserved + usage, self.factor)
        return cost <= self.config.max_cost

    def reserve(self, usage: Usage) -> None:
        self.reserved += usage

    def settle(self, reserved: Usage, used: Usage) -> None:
        """Replaces what was set aside for a request by what it took."""
        self.reserved -= reserved
        self.used += used


@dataclass(frozen=True)
class Measured:
    """Sums over replies of a teacher that the cache holds."""

    replies: int = 0
    characters: int = 0  # of prompts
    tokens_in: int = 0
    tokens_out: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Estimate:
    """Of the requests of one kind."""

    kind: str
    requests: int
    cached: int
    usage: Usage
    seconds: float  # of all requests, one after the other

    @property
    def to_ask(self) -> int:
        return self.requests - self.cached


def estimate(kind: str, requests: int, prompts: Sequence[str], measured: Measured) -> Estimate:
    """What asking `prompts` will take; the other requests of the kind are answered already."""
    n, m = len(prompts), measured
    characters = sum(map(len, prompts))
    per_token = m.characters / m.tokens_in if m.tokens_in else CHARACTERS_PER_TOKEN
    reply_tokens = m.tokens_out / m.replies if m.replies else REPLY_TOKENS
    seconds = m.seconds / m.replies if m.replies and m.seconds else REPLY_SECONDS
    usage = Usage(round(characters / per_token), round(n * reply_tokens))
    return Estimate(kind, requests, requests - n, usage, n * seconds)


def table(
    estimates: Sequence[Estimate],
    costs: CostConfig,
    factor: float,
    concurrency: int,
    is_batch: bool,
) -> str:
    """The estimates as a table, with a line of their sums."""
    estimates = [*estimates, _sum(estimates)]
    head = ("", "requests", "answered", "to ask", "tokens in", "tokens out", "cost", "time")
    rows: list[tuple[str, ...]] = [head]
    for e in estimates:
        cost = f"{costs.cost(e.usage, factor):,.2f}" if costs.known else "?"
        time = "<= 24 h" if is_batch and e.to_ask else _duration(e.seconds / concurrency)
        numbers = (e.requests, e.cached, e.to_ask, e.usage.tokens_in, e.usage.tokens_out)
        rows.append((e.kind, *(f"{n:,}" for n in numbers), cost, time))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
    if not costs.known:
        lines.append("cost: unknown; give --price_in and --price_out, per million tokens")
    return "\n".join(lines)


def _sum(estimates: Sequence[Estimate]) -> Estimate:
    usage = sum((e.usage for e in estimates), Usage())
    requests, cached = sum(e.requests for e in estimates), sum(e.cached for e in estimates)
    return Estimate("all", requests, cached, usage, sum(e.seconds for e in estimates))


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{minutes:.0f} min" if minutes >= 1 else f"{seconds:.0f} s"
