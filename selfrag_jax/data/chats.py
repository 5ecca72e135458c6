"""Chat rows as an instruction and its output.

{"messages": [{"role", "content"}]}, or ShareGPT's {"conversations": [{"from", "value"}]}.
"""

from __future__ import annotations

from typing import Any

from selfrag_jax.errors import UserError

# The names that published chats give the two speakers.
USERS, ASSISTANTS = ("user", "human", "prompter"), ("assistant", "gpt", "chatgpt", "bard", "bing")


_CHATS = ("messages", "conversations")


def is_chat(row: dict[str, Any]) -> bool:
    return any(name in row for name in _CHATS) and "instruction" not in row


def flatten_chat(where: str, row: dict[str, Any]) -> dict[str, Any]:
    """Returns a chat row with `instruction` and `output` in place of its messages.

    They are the last assistant turn and the user turn before it; a system turn stands in front of
    the instruction. Earlier turns are dropped. Raises UserError if there is no such pair.
    """
    name = next(n for n in _CHATS if n in row)
    turns = _turns(where, name, row[name])
    roles = [role for role, _ in turns]
    last = max((i for i, role in enumerate(roles) if role in ASSISTANTS), default=-1)
    asked = max((i for i in range(last) if roles[i] in USERS), default=-1)
    if asked < 0:
        raise UserError(f"{where}: {name}: has no user turn that an assistant turn answers")
    system = "\n\n".join(text for role, text in turns[:asked] if role == "system")
    instruction = f"{system}\n\n{turns[asked][1]}" if system else turns[asked][1]
    rest = {k: v for k, v in row.items() if k != name}
    return rest | {"instruction": instruction, "output": turns[last][1]}


def _turns(where: str, name: str, messages: Any) -> list[tuple[str, str]]:
    """(role, text) of each message in the field `name`."""
    if not isinstance(messages, list):
        raise UserError(f"{where}: field {name!r} must be a list of objects with role, content")
    turns = []
    for i, message in enumerate(messages, 1):
        message = message if isinstance(message, dict) else {}
        role = message.get("role", message.get("from"))
        text = _text(message.get("content", message.get("value")))
        if not isinstance(role, str) or text is None:
            raise UserError(f"{where}: message {i} must be an object with role and content (text)")
        turns.append((role, text))
    return turns


def _text(content: Any) -> str | None:
    """The text of a message: a string, or the text parts of a list. None if it has neither."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        texts = [part.get("text") for part in content if part.get("type", "text") == "text"]
        return "".join(texts) if all(isinstance(t, str) for t in texts) else None
    return None
