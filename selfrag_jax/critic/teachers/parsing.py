"""Reads a teacher's reply: exactly one label of the asked group, or a reason why there is none."""

from __future__ import annotations

import json
import re
from typing import Any

from selfrag_jax.critic.teachers.teacher import LABELS, Verdict
from selfrag_jax.text import reflection

_ALL = {label.lower(): label for group in reflection.GROUPS.values() for label in group}
_LABEL = re.compile("|".join(map(re.escape, sorted(_ALL, key=len, reverse=True))), re.IGNORECASE)
_LABEL_LINE = re.compile(r"^[\s*#>-]*label[\s*]*:[\s*]*(.*)$", re.IGNORECASE | re.MULTILINE)
_EXPLANATION = re.compile(r"^[\s*#>-]*explanation[\s*]*:[\s*]*", re.IGNORECASE)
_FENCE = re.compile(r"^```\w*\s*(.*?)\s*```$", re.DOTALL)


def parse_reply(text: str, kind: str) -> Verdict:
    """Returns the label and the explanation of a reply, as text or as JSON.

    kind: of the query, a key of LABELS. A label counts where it is all that stands in its place:
    in the JSON field "label", on a line "Label: ..." or, without such a line, on the last line.
    There the brackets may be missing. Anything else, such as "not [Relevant]" or a reply that was
    cut off, has no token but a reason; so have two different labels, and those of another group.
    """
    text = text.strip()
    fields = _json_fields(text)
    if fields is not None:
        label, explanation = fields.get("label"), fields.get("explanation")
        explanation = explanation if isinstance(explanation, str) else ""
        places = [label] if isinstance(label, str) else []
    else:
        explanation = _EXPLANATION.sub("", _LABEL_LINE.sub("", text)).strip()
        places = _LABEL_LINE.findall(text) or text.splitlines()[-1:]
    labels = [_label_alone(place) for place in places]
    reason = _problem(labels, places, kind)
    return Verdict(None if reason else labels[0], reason, explanation, text)


def _json_fields(text: str) -> dict[str, Any] | None:
    if fenced := _FENCE.match(text):
        text = fenced.group(1)
    if not text.startswith("{"):
        return None
    try:
        fields = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return None
    return fields if isinstance(fields, dict) else None


def _label_alone(place: str) -> str | None:
    """The label that a place holds, if it holds nothing else but marks of emphasis and a stop."""
    bare = place.strip().strip("*`'\".").strip().lower()
    return _ALL.get(bare) or _ALL.get(f"[{bare}]")


def _problem(labels: list[str | None], places: list[str], kind: str) -> str:
    """What keeps these labels from being an answer; empty if nothing does."""
    mentioned = [_ALL[m.lower()] for place in places for m in _LABEL.findall(place)]
    different = list(dict.fromkeys([*filter(None, labels), *mentioned]))
    if not different:
        return "no label in the reply"
    if foreign := [label for label in different if label not in LABELS[kind]]:
        return f"a label that was not asked for: {foreign[0]}"
    if len(different) > 1:
        return f"two labels: {different[0]} and {different[1]}"
    return "" if all(labels) else f"{different[0]} stands among other words"
