"""Asks through batch files of OpenAI's format, at half the price, within a day.

Requests are written to files, sent, and their results collected. The folder of the batches holds
everything that a later run needs: a run that was killed never sends a file twice, and collects what
it had sent. Requests that a batch did not answer, as it expired or failed in parts, are sent again
in the next round; so are, once, those whose reply is no label.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from selfrag_jax.critic.teachers import chat
from selfrag_jax.critic.teachers.batch_files import BatchFile, BatchFolder, split
from selfrag_jax.critic.teachers.cost import Budget, CostLimitReached
from selfrag_jax.critic.teachers.faults import fault_of, one_line, without_key
from selfrag_jax.critic.teachers.parsing import parse_reply
from selfrag_jax.critic.teachers.prompting import Templates
from selfrag_jax.critic.teachers.settings import EndpointConfig
from selfrag_jax.critic.teachers.teacher import Request, Usage, Verdict, cache_key, kind_of
from selfrag_jax.errors import StageFailed, library
from selfrag_jax.text.prompts import CritiqueQuery

ROUNDS = 4  # a request is sent this often, at most
ENDPOINT = "/v1/chat/completions"
_ENDED = ("completed", "expired", "cancelled", "failed")


@dataclass
class _Open:
    """A request without a verdict yet, and what earlier rounds brought."""

    index: int
    query: CritiqueQuery
    sent: int = 0
    bad_reply: Verdict | None = None  # a reply that was no label: asked again once
    reason: str = ""


class BatchTeacher:
    """A language model that is asked through batch files. folder: where their state is kept."""

    def __init__(self, config: EndpointConfig, templates: Templates, budget: Budget, folder: Path):
        self.config, self.templates, self.budget = config, templates, budget
        self.folder = BatchFolder(folder)
        self.dialect = chat.Dialect(config)
        self.address, self._key = config.address, ""  # the key is read when it is needed

    def identity(self) -> dict[str, Any]:
        # As a single request's: the replies are the same, and so is their key in the cache.
        return chat.identity(self.config)

    def prompt(self, query: CritiqueQuery) -> str:
        return self.templates.fill(query)

    def ask(self, requests: Sequence[Request]) -> Iterator[tuple[int, Verdict]]:
        """Sends files, waits for them, and yields verdicts as batches end.

        Raises StageFailed if the endpoint refuses a file, or a batch was cancelled.
        """
        openai = library("openai", "asking by batch files", "teacher")
        self._key = self.config.api_key()
        queries = [request.query for request in requests]
        unanswered = {cache_key(self, q): _Open(i, q) for i, q in enumerate(queries)}
        client = openai.OpenAI(
            api_key=self._key, base_url=self.address, max_retries=0, timeout=self.config.timeout
        )
        with client:
            self._take_over(client)
            while True:
                while files := self.folder.unfinished():
                    ended = self._wait(client, files)
                    yield from self._collect(client, ended, unanswered)
                    self.folder.mark(ended, "collected")
                if not unanswered:
                    return
                for file in self._write(unanswered):
                    self._send(client, file)

    # ---- writing and sending ---------------------------------------------------------------------
    def _write(self, unanswered: dict[str, _Open]) -> list[BatchFile]:
        """Writes the next round's files, as far as the budget reaches."""
        lines: list[tuple[str, str, Usage]] = []
        for key, item in unanswered.items():
            messages = chat.first_message(self.templates, item.query)
            if item.bad_reply is not None:
                messages = chat.asked_again(messages, item.bad_reply.raw, item.query)
            most = self.budget.largest_usage(chat.spelled(messages))
            if not self.budget.fits(most):
                break
            self.budget.reserve(most)
            item.sent += 1
            body = self.dialect.body(messages, kind_of(item.query))
            line = {"custom_id": key, "method": "POST", "url": ENDPOINT, "body": body}
            lines.append((key, json.dumps(line, ensure_ascii=False) + "\n", most))
        if not lines:
            raise CostLimitReached(
                f"the next request could exceed --max_cost={self.budget.config.max_cost:g}; "
                f"{self.budget.spent:.4g} is spent"
            )
        return [self.folder.add(part) for part in split(lines)]

    def _send(self, client, file: BatchFile) -> None:
        """Sends a file, once.

        A run may be killed, or its connection cut, after the endpoint accepted a batch and before
        its id came. Batches therefore bear the file's name, and are looked for by it.
        """
        self.folder.update(file, state="sending")

        def upload() -> str:
            content = self.folder.path(file).read_bytes()
            return client.files.create(file=(file.name, content), purpose="batch").id

        def create() -> None:
            if self._adopt(client, file):
                return
            batch = client.batches.create(
                input_file_id=file_id,
                endpoint=ENDPOINT,
                completion_window="24h",
                metadata={"selfrag": file.name},
            )
            self.folder.update(file, state="sent", batch_id=batch.id)

        file_id = self._patiently(upload)
        self._patiently(create)

    def _take_over(self, client) -> None:
        """Goes on with the batches of an earlier run; sets aside what they may cost.

        What it wrote and did not send is written anew, under the budget of now.
        """
        for file in self.folder.unfinished():
            if file.batch_id or (file.state == "sending" and self._adopt(client, file)):
                self.budget.reserve(Usage(file.most_in, file.most_out))
            else:
                self.folder.mark([file], "dropped")

    def _adopt(self, client, file: BatchFile) -> bool:
        """Takes over the endpoint's batch of this file, if there is one."""
        for i, batch in enumerate(self._patiently(lambda: client.batches.list(limit=100))):
            if (batch.metadata or {}).get("selfrag") == file.name:
                self.folder.update(file, state="sent", batch_id=batch.id)
                return True
            if i >= 1000:
                break
        return False

    def _patiently(self, call: Callable[[], Any]) -> Any:
        """Calls the endpoint; tries again after faults that pass. Raises StageFailed for others."""
        for attempt in range(self.config.retries + 1):
            try:
                return call()
            except StageFailed:
                raise
            except Exception as e:
                fault = fault_of(e, self.address, self.config.teacher_model)
                reason = without_key(one_line(fault.reason), self._key)
                if not fault.retry or fault.unreachable or attempt == self.config.retries:
                    raise StageFailed(f"{reason}; batches that were sent are kept") from e
                longest = min(self.config.backoff * 2**attempt, self.config.max_backoff)
                time.sleep(max(fault.wait, longest))
        raise AssertionError("unreachable")

    # ---- waiting and collecting ------------------------------------------------------------------
    def _wait(self, client, files: Sequence[BatchFile]) -> list[BatchFile]:
        """Returns the files whose batches are over, once there is one; notes their results."""
        last = ""
        while True:
            ended, done = [], 0
            for file in files:
                batch = self._patiently(partial(client.batches.retrieve, file.batch_id))
                done += batch.request_counts.completed if batch.request_counts else 0
                if batch.status in _ENDED:
                    self.folder.update(
                        file,
                        status=batch.status,
                        results=[f for f in (batch.output_file_id, batch.error_file_id) if f],
                        error=_first_error(batch),
                    )
                    ended.append(file)
            if ended:
                return ended
            state = f"{done:,} of {sum(file.requests for file in files):,} requests are done"
            if state != last:
                print(
                    f"batches: {state}; killed and run again, it goes on waiting", file=sys.stderr
                )
                last = state
            time.sleep(self.config.poll)

    def _collect(
        self, client, files: Sequence[BatchFile], unanswered: dict[str, _Open]
    ) -> Iterator[tuple[int, Verdict]]:
        """Yields the verdicts of batches that are over; the other requests stay open."""
        for file in files:
            self.budget.settle(Usage(file.most_in, file.most_out), Usage())
            for result in file.results:
                content = self._patiently(partial(client.files.content, result)).read()
                for line in content.splitlines():
                    if line.strip():
                        yield from self._take(line, unanswered)
            if file.status in ("failed", "cancelled"):
                self.folder.mark([file], "collected")
                what = f"the batch of {file.name} ({file.batch_id}) {file.status}"
                why = f": {file.error}" if file.error else ""
                raise StageFailed(f"{what}{why}; run again to send its requests anew")
        for key in [k for k, item in unanswered.items() if item.sent >= ROUNDS]:
            item = unanswered.pop(key)
            reason = item.reason or "no result in any batch"
            raw = item.bad_reply.raw if item.bad_reply else ""
            yield item.index, Verdict(None, reason, raw=raw)

    def _take(self, line: bytes, unanswered: dict[str, _Open]) -> Iterator[tuple[int, Verdict]]:
        """Yields the verdict of one line of results, if it is final."""
        key, status, body = _read_line(line)
        item = unanswered.get(key)
        if item is None:
            return
        if status != 200:
            item.reason = without_key(f"HTTP {status}: {_message(body)}", self._key)
            if status in (400, 422) and not self._narrow(item.query, item.reason):
                del unanswered[key]
                yield item.index, Verdict(None, item.reason)
            return
        reply = chat.read_reply(body, self.prompt(item.query))
        self.budget.settle(Usage(), reply.usage)
        verdict = Verdict(None, "a body without choices")
        if reply.text is not None:
            verdict = parse_reply(reply.text, kind_of(item.query))
        if verdict.token is None and (reply.text is None or item.bad_reply is None):
            item.reason = verdict.reason
            item.bad_reply = item.bad_reply if reply.text is None else verdict
            yield item.index, Verdict(None, usage=reply.usage)  # paid for, and still open
            return
        del unanswered[key]
        yield item.index, replace(verdict, usage=reply.usage)

    def _narrow(self, query: CritiqueQuery, message: str) -> bool:
        messages = chat.first_message(self.templates, query)
        # As the refused request was; an earlier line may have narrowed the dialect since.
        body = chat.Dialect(self.config).body(messages, kind_of(query))
        return self.dialect.narrow(body, message)


def _read_line(line: bytes) -> tuple[str, int, Any]:
    """(custom_id, HTTP status, body) of a line of results; status 0 where there is none."""
    try:
        row = json.loads(line)
    except ValueError:
        return "", 0, None
    if not isinstance(row, dict):
        return "", 0, None
    response = row.get("response")
    if isinstance(response, dict):
        return str(row.get("custom_id")), response.get("status_code", 0), response.get("body")
    return str(row.get("custom_id")), 0, row.get("error")


def _message(body: Any) -> str:
    if isinstance(body, dict):
        body = body.get("error", body)
    return one_line(str(body.get("message", body) if isinstance(body, dict) else body))


def _first_error(batch: Any) -> str:
    errors = batch.errors.data if batch.errors is not None else None
    return one_line(errors[0].message or "") if errors else ""
