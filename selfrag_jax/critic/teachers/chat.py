"""Chat-completion bodies and replies, the same for single requests and for batch files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from selfrag_jax.critic.teachers.prompting import JSON_FORMAT, TEXT_FORMAT, Templates
from selfrag_jax.critic.teachers.settings import EndpointConfig
from selfrag_jax.critic.teachers.teacher import LABELS, Usage, kind_of
from selfrag_jax.text.prompts import CritiqueQuery

Message = dict[str, str]
_LONGEST_REPLY = 100_000  # characters; more is no answer, and is not kept whole
_REMINDER = "That was not exactly one of the labels. Reply again, with exactly one of:\n"


def identity(config: EndpointConfig) -> dict[str, Any]:
    """All that shapes a reply besides the prompt, which has the template in it."""
    return {
        "teacher": "openai",
        "base_url": config.address,
        "model": config.teacher_model,
        "temperature": config.temperature,
        "max_tokens": config.max_tokens,
        "structured": config.structured,
        "forms": [TEXT_FORMAT, JSON_FORMAT, _REMINDER],
    }


class Dialect:
    """Which optional parameters the endpoint takes; narrowed, once for all, when it refuses one."""

    def __init__(self, config: EndpointConfig):
        self.config = config
        self.structured = config.structured
        self.length_name = "max_tokens"
        self.temperature = True
        self._schema_works = False

    def body(self, messages: Sequence[Message], kind: str) -> dict[str, Any]:
        """The body of a request; the form of the reply is added to the first message."""
        form = JSON_FORMAT if self.structured else TEXT_FORMAT
        first = {**messages[0], "content": f"{messages[0]['content']}\n\n{form}"}
        body: dict[str, Any] = {
            "model": self.config.teacher_model,
            "messages": [first, *messages[1:]],
            self.length_name: self.config.max_tokens,
        }
        if self.temperature:
            body["temperature"] = self.config.temperature
        if self.structured:
            body["response_format"] = _response_format(kind)
        return body

    def accepted(self, body: dict[str, Any]) -> None:
        """Notes that the endpoint answered this body."""
        self._schema_works |= "response_format" in body

    def narrow(self, body: dict[str, Any], message: str) -> bool:
        """Drops the parameter that made the endpoint refuse a body; False if none did.

        True also where another request has dropped it meanwhile.
        """
        if "max_completion_tokens" in message and "max_tokens" in body:
            self.length_name = "max_completion_tokens"
        elif "temperature" in message and "temperature" in body:
            self.temperature = False
        elif "response_format" in body and not self._schema_works and "context" not in message:
            self.structured = False
        else:
            return False
        return True


def _response_format(kind: str) -> dict[str, Any]:
    schema = {
        "type": "object",
        "properties": {
            "explanation": {"type": "string"},
            "label": {"type": "string", "enum": list(LABELS[kind])},
        },
        "required": ["explanation", "label"],
        "additionalProperties": False,
    }
    return {
        "type": "json_schema",
        "json_schema": {"name": "verdict", "strict": True, "schema": schema},
    }


def first_message(templates: Templates, query: CritiqueQuery) -> list[Message]:
    return [{"role": "user", "content": templates.fill(query)}]


def asked_again(messages: Sequence[Message], reply: str, query: CritiqueQuery) -> list[Message]:
    """The conversation after a reply that is no label."""
    labels = "\n".join(LABELS[kind_of(query)])
    return [
        *messages,
        {"role": "assistant", "content": reply[:4000] or "(nothing)"},
        {"role": "user", "content": _REMINDER + labels},
    ]


@dataclass(frozen=True)
class Reply:
    text: str | None  # None: the body has no choices, or is no completion at all
    usage: Usage


def read_reply(body: Any, asked: str) -> Reply:
    """Reads a completion, as JSON data. Tokens that are not reported are estimated."""
    text = None
    if isinstance(body, dict) and isinstance(body.get("choices"), list) and body["choices"]:
        choice = body["choices"][0]
        message = choice.get("message") if isinstance(choice, dict) else None
        if isinstance(message, dict):
            content = message.get("content")
            text = content if isinstance(content, str) else ""
            text = text[:_LONGEST_REPLY].encode("utf-8", "replace").decode()  # lone surrogates
    usage = body.get("usage") if isinstance(body, dict) else None
    usage = usage if isinstance(usage, dict) else {}
    counts = (usage.get("prompt_tokens"), usage.get("completion_tokens"))
    guesses = (len(asked.encode()), len((text or "").encode()))  # a token is at least a byte
    tokens = [
        c if isinstance(c, int) and c >= 0 else guess
        for c, guess in zip(counts, guesses, strict=True)
    ]
    return Reply(text, Usage(*tokens))


def spelled(messages: Sequence[Message]) -> str:
    """All text of a conversation, to count its length."""
    return "\n".join(m["content"] for m in messages) + JSON_FORMAT
