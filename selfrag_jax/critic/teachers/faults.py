"""What an error of an endpoint means: stop at once, try again, or give the row up."""

from __future__ import annotations

import email.utils
import re
import socket
import ssl
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from selfrag_jax.critic.teachers.settings import API_KEY

LONGEST_WAIT = 3600.0  # seconds; who is told to wait longer than this is told to come again
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")


@dataclass(frozen=True)
class Fault:
    """What to do about an error. By default the row is given up."""

    reason: str
    stop: bool = False  # every other request would fail, too
    retry: bool = False
    wait: float = 0.0  # seconds that the endpoint asks for
    may_be_billed: bool = False  # the endpoint may have worked on it
    unreachable: bool = False  # no server listens
    refused: bool = False  # a 400 or 422: perhaps for a parameter that the endpoint does not know


def fault_of(error: BaseException, address: str, model: str) -> Fault:
    """Sorts an error of the openai library, or of the network, that a request ended in."""
    import openai

    if isinstance(error, openai.APIStatusError):
        headers = error.response.headers
        return status_fault(error.status_code, one_line(error.message), headers, address, model)
    causes = list(_causes(error))
    if isinstance(error, TimeoutError | openai.APITimeoutError):
        return Fault("no reply in time", retry=True, may_be_billed=True)
    if any(isinstance(cause, socket.gaierror) for cause in causes):
        return Fault(f"{address}: no such host; see --base_url", stop=True)
    if any(isinstance(cause, ConnectionRefusedError) for cause in causes) or any(
        "connection attempts failed" in str(cause).lower() for cause in causes
    ):
        return Fault(
            f"{address}: nothing answers there; see --base_url", retry=True, unreachable=True
        )
    if tls := [cause for cause in causes if isinstance(cause, ssl.SSLError)]:
        return Fault(f"{address}: {one_line(str(tls[0]))}; see --base_url", stop=True)
    if isinstance(error, openai.APIConnectionError | OSError):
        return Fault(
            f"the connection was cut ({one_line(str(causes[-1])) or type(causes[-1]).__name__})",
            retry=True,
            may_be_billed=True,
        )
    return Fault(f"not a reply: {one_line(str(error))}", retry=True, may_be_billed=True)


def status_fault(
    status: int, message: str, headers: Mapping[str, str], address: str, model: str
) -> Fault:
    """Sorts an error by its HTTP status."""
    if status in (401, 403):
        # The message is not shown: it may quote the key.
        what = "the key is wrong" if status == 401 else "the key may not use this model"
        return Fault(f"{address}: {what} (HTTP {status}); it is read from {API_KEY}", stop=True)
    if status == 402:
        return Fault(f"{address}: the account has no credit left (HTTP 402)", stop=True)
    if status == 404:
        return Fault(f"{address}: no such address, or no model {model!r} (HTTP 404)", stop=True)
    if status == 429:
        if "insufficient_quota" in message or "exceeded your current quota" in message:
            return Fault(f"{address}: the account's quota is used up (HTTP 429)", stop=True)
        wait = asked_wait(headers)
        if wait > LONGEST_WAIT:
            hours = f"{wait / 3600:.0f} h"
            return Fault(f"{address}: asks to wait {hours} (HTTP 429); run again then", stop=True)
        return Fault("too many requests (HTTP 429)", retry=True, wait=wait)
    if status in (408, 409) or status >= 500:
        wait = min(asked_wait(headers), LONGEST_WAIT)
        return Fault(f"HTTP {status}: {message}", retry=True, wait=wait)
    return Fault(f"refused (HTTP {status}): {message}", refused=status in (400, 422))


def asked_wait(headers: Mapping[str, str]) -> float:
    """Returns the seconds that a reply's headers ask to wait: Retry-After, or a limit's reset."""
    if "retry-after-ms" in headers and (ms := _number(headers["retry-after-ms"])) is not None:
        return ms / 1000
    if after := headers.get("retry-after"):
        if (seconds := _number(after)) is not None:
            return max(0.0, seconds)
        try:
            return max(0.0, email.utils.parsedate_to_datetime(after).timestamp() - time.time())
        except (TypeError, ValueError):
            return 0.0
    waits = [0.0]
    for limit in ("requests", "tokens"):
        remaining = _number(headers.get(f"x-ratelimit-remaining-{limit}", ""))
        if remaining is not None and remaining <= 0:
            waits.append(_seconds(headers.get(f"x-ratelimit-reset-{limit}", "")))
    return max(waits)


def _seconds(text: str) -> float:
    """Seconds of a duration such as 6m0s, 20ms or 1.5."""
    if (plain := _number(text)) is not None:
        return max(0.0, plain)
    return sum(float(n) * _UNITS[unit] for n, unit in _DURATION.findall(text))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def without_key(text: str, key: str) -> str:
    """Hides a key that an endpoint quotes in its message."""
    return text.replace(key, "***") if len(key) > 6 else text


def one_line(text: str, most: int = 300) -> str:
    return " ".join(text.split())[:most]


def _causes(error: BaseException) -> Iterator[BaseException]:
    at: BaseException | None = error
    while at is not None:
        yield at
        if isinstance(at, BaseExceptionGroup):
            yield from at.exceptions
        at = at.__cause__ or at.__context__
