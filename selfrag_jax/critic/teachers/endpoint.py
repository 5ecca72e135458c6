"""Asks any OpenAI-compatible endpoint, many requests at a time."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from selfrag_jax.critic.teachers import chat
from selfrag_jax.critic.teachers.cost import Budget, CostLimitReached
from selfrag_jax.critic.teachers.faults import (
    LONGEST_WAIT,
    Fault,
    asked_wait,
    fault_of,
    one_line,
    without_key,
)
from selfrag_jax.critic.teachers.parsing import parse_reply
from selfrag_jax.critic.teachers.prompting import Templates
from selfrag_jax.critic.teachers.settings import EndpointConfig
from selfrag_jax.critic.teachers.teacher import Request, Usage, Verdict, kind_of
from selfrag_jax.errors import StageFailed, library
from selfrag_jax.text.prompts import CritiqueQuery

# Queries that failed for good, one after the other: all others would fail, too. The first number
# is for an endpoint that has given no label yet, the second for one that has.
GIVE_UP_AFTER = (20, 100)


class EndpointTeacher:
    """A language model behind an OpenAI-compatible endpoint.

    Retries rate limits, server errors, timeouts, cut connections and bodies without choices, a
    bounded number of times; asks once more after a reply that is no label; stops at once where
    every request would fail.
    """

    def __init__(self, config: EndpointConfig, templates: Templates, budget: Budget):
        self.config, self.templates, self.budget = config, templates, budget
        self.dialect = chat.Dialect(config)
        self.address, self._key = config.address, ""  # the key is read when it is needed
        self._jitter = random.Random(0)
        self._closed_until = 0.0  # until then, nobody asks: the endpoint said so
        self._stopped: BaseException | None = None
        self._has_answered = self._has_succeeded = False

    def identity(self) -> dict[str, Any]:
        return chat.identity(self.config)

    def prompt(self, query: CritiqueQuery) -> str:
        return self.templates.fill(query)

    def ask(self, requests: Sequence[Request]) -> Iterator[tuple[int, Verdict]]:
        """Yields verdicts as they come. The event loop runs only while the caller waits for one.

        Raises StageFailed once nothing more can be asked and all replies under way have come.
        """
        with self._interruptible():
            yield from self._ask(requests)

    def _ask(self, requests: Sequence[Request]) -> Iterator[tuple[int, Verdict]]:
        openai = library("openai", "asking an endpoint", "teacher")
        self._key = self.config.api_key()
        loop = asyncio.new_event_loop()
        client = openai.AsyncOpenAI(
            api_key=self._key,
            base_url=self.address,
            max_retries=0,
            timeout=self.config.timeout,
        )
        waiting, tasks, failed = iter(enumerate(requests)), set[asyncio.Task](), 0
        held: list[tuple[int, Verdict]] = []  # failures before the first success
        try:
            while True:
                while self._stopped is None and len(tasks) < self.config.concurrency:
                    if (item := next(waiting, None)) is None:
                        break
                    tasks.add(loop.create_task(self._numbered(client, *item)))
                if not tasks:
                    break
                done, tasks = loop.run_until_complete(
                    asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                )
                for i, verdict in [task.result() for task in done]:
                    failed = 0 if verdict.token is not None else failed + bool(verdict.reason)
                    self._has_succeeded |= verdict.token is not None
                    if failed >= GIVE_UP_AFTER[self._has_succeeded]:
                        which = "last" if self._has_succeeded else "first"
                        again = " with --retry_failed" if self._has_succeeded else ""
                        self._stop(
                            f"{self.address}: the {which} {failed} queries all failed: "
                            f"{verdict.reason}. See --base_url; run the same command{again} to ask "
                            "them again"
                        )
                    held.append((i, verdict))
                if self._has_succeeded:
                    yield from held
                    held.clear()
            # If nothing ever succeeded, the endpoint was at fault: the queries stay open.
            stopped = self._stopped is not None
            yield from ((i, replace(v, reason="") if stopped else v) for i, v in held)
            if self._stopped is not None:
                raise self._stopped
        finally:
            for task in tasks:
                task.cancel()
            if tasks:
                loop.run_until_complete(asyncio.wait(tasks))
            loop.run_until_complete(client.close())
            loop.close()

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """On Ctrl-C and SIGTERM nothing more is asked; what is under way is paid for, so awaited.

        A second signal does not wait.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        ends = {signal.SIGINT: KeyboardInterrupt(), signal.SIGTERM: SystemExit(143)}

        def interrupt(number, frame):
            if self._stopped is not None:
                raise ends[number]
            self._stopped = ends[number]

        before = {number: signal.signal(number, interrupt) for number in ends}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def _numbered(self, client, i: int, request: Request) -> tuple[int, Verdict]:
        return i, await self._judge(client, request.query)

    async def _judge(self, client, query: CritiqueQuery) -> Verdict:
        """Asks, and asks once more if the reply is no label.

        A verdict without token and reason was stopped: the row stays open.
        """
        messages = chat.first_message(self.templates, query)
        kind, usage, start = kind_of(query), Usage(), time.monotonic()
        verdict = Verdict(None)
        for _ in range(2):
            text, reason, used = await self._reply(client, messages, kind)
            usage += used
            if text is None:
                return Verdict(None, reason, raw=verdict.raw, usage=usage)
            verdict = parse_reply(text, kind)
            if verdict.token is not None:
                break
            messages = chat.asked_again(messages, text, query)
        seconds = time.monotonic() - start
        return Verdict(
            verdict.token, verdict.reason, verdict.explanation, verdict.raw, usage, seconds
        )

    async def _reply(
        self, client, messages: list[chat.Message], kind: str
    ) -> tuple[str | None, str, Usage]:
        """Returns (reply, reason, tokens paid for).

        Without a reply there is a reason, or none if all was stopped meanwhile.
        """
        usage, reason, attempt = Usage(), "", 0
        most = self.budget.largest_usage(chat.spelled(messages))
        while attempt <= self.config.retries:
            if not await self._may_ask(most):
                return None, "", usage
            body, used = self.dialect.body(messages, kind), Usage()
            try:
                reply = await self._send(client, body)
                used = reply.usage
                if reply.text is not None:
                    self.dialect.accepted(body)
                    self._has_answered = True
                    return reply.text, "", usage + used
                fault = Fault("a body without choices", retry=True)
            except Exception as e:
                fault = fault_of(e, self.address, self.config.teacher_model)
                used = most if fault.may_be_billed else Usage()
            finally:
                self.budget.settle(most, used)
            usage += used
            reason = without_key(fault.reason, self._key)
            last = attempt == self.config.retries or not self._has_answered
            if fault.stop or (fault.unreachable and last):
                self._stop(reason)
                return None, "", usage
            if fault.refused and self.dialect.narrow(body, reason):
                continue
            if not fault.retry:
                break
            attempt += 1
            if attempt <= self.config.retries:
                await self._back_off(attempt, fault.wait)
        return None, reason, usage

    async def _send(self, client, body: dict[str, Any]) -> chat.Reply:
        """One request. The library's own objects are passed over: a body may be malformed."""
        async with asyncio.timeout(self.config.timeout):
            raw = await client.chat.completions.with_raw_response.create(**body)
        if (wait := asked_wait(raw.headers)) <= LONGEST_WAIT:  # else the next reply is a 429
            self._close_for(wait)
        try:
            data = json.loads(raw.content)
        except (ValueError, RecursionError):
            data = None
        return chat.read_reply(data, chat.spelled(body["messages"]))

    async def _may_ask(self, most: Usage) -> bool:
        """Waits until the endpoint and the budget allow a request; False if all was stopped."""
        while self._stopped is None:
            if (left := self._closed_until - time.monotonic()) > 0:
                await asyncio.sleep(min(left, 0.5))
            elif self.budget.fits(most):
                self.budget.reserve(most)
                return True
            elif self.budget.reserved != Usage():
                await asyncio.sleep(0.02)  # replies under way may cost less than set aside
            else:
                self._stopped = CostLimitReached(
                    "the next request could exceed --max_cost="
                    f"{self.budget.config.max_cost:g}; {self.budget.spent:.4g} is spent"
                )
        return False

    async def _back_off(self, attempt: int, asked: float) -> None:
        """Waits before a retry: as long as the endpoint asks, else twice as long each time."""
        longest = min(self.config.backoff * 2 ** (attempt - 1), self.config.max_backoff)
        wait = longest * (0.5 + 0.5 * self._jitter.random())
        if asked:
            self._close_for(asked)
            wait = asked + self._jitter.random() * min(longest, asked)  # not all at one moment
        until = time.monotonic() + wait
        while self._stopped is None and (left := until - time.monotonic()) > 0:
            await asyncio.sleep(min(left, 0.5))

    def _close_for(self, seconds: float) -> None:
        self._closed_until = max(self._closed_until, time.monotonic() + seconds)

    def _stop(self, reason: str) -> None:
        self._stopped = self._stopped or StageFailed(one_line(reason))
