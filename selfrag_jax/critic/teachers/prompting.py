"""The teacher's prompts: templates filled with a query.

There is one template for each kind of query, a text file with placeholders in braces. Another
folder with files of the same names replaces them. User text is put in as it is, except that control
tokens in it are broken up, so that it cannot answer in the teacher's place.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from selfrag_jax.critic.teachers.teacher import LABELS, kind_of
from selfrag_jax.errors import UserError
from selfrag_jax.text.prompts import CritiqueQuery, escape_controls

BUILT_IN = Path(__file__).parents[1] / "templates"
_PLACEHOLDER = re.compile(r"\{(\w+)\}")
PLACEHOLDERS = {
    "retrieve": {"instruction", "labels"},
    "retrieve_next": {"instruction", "preceding", "evidence", "labels"},
    "isrel": {"instruction", "evidence", "labels"},
    "issup": {"instruction", "evidence", "output", "labels"},
    "isuse": {"instruction", "output", "labels"},
}

TEXT_FORMAT = "Reply in this form:\nExplanation: <your explanation>\nLabel: <the label>"
JSON_FORMAT = 'Reply as a JSON object with two fields, "explanation" and then "label".'


@dataclass(frozen=True)
class Templates:
    """A template for each kind of query."""

    texts: tuple[tuple[str, str], ...]

    @classmethod
    def read(cls, folder: str | Path | None = None) -> Templates:
        """Reads a folder of templates, or the built-in one.

        Raises UserError naming the file if one is missing, or has an unknown placeholder or lacks
        one.
        """
        folder = Path(folder or BUILT_IN)
        if not folder.is_dir():
            raise UserError(f"--templates={folder}: no such folder")
        return cls(tuple((kind, _read_template(folder / f"{kind}.txt", kind)) for kind in LABELS))

    def fill(self, query: CritiqueQuery) -> str:
        """Returns the prompt of a query."""
        kind = kind_of(query)
        values = {
            "instruction": query.instruction,
            "preceding": query.preceding,
            "output": query.output,
            "evidence": "(none)",
        }
        if query.evidence is not None:
            values["evidence"] = f"{query.evidence.title}\n{query.evidence.text}".strip()
        values = {name: escape_controls(text) for name, text in values.items()}
        values["labels"] = "\n".join(LABELS[kind])
        # In one pass: a placeholder that stands in user text stays as it is.
        return _PLACEHOLDER.sub(lambda m: values[m.group(1)], dict(self.texts)[kind])

    def fingerprint(self) -> str:
        return hashlib.sha256(repr(self.texts).encode()).hexdigest()[:16]


def _read_template(path: Path, kind: str) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        names = ", ".join(f"{kind}.txt" for kind in LABELS)
        raise UserError(f"{path}: no such file; a folder of templates has {names}") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not UTF-8 ({e.reason})") from None
    found, expected = set(_PLACEHOLDER.findall(text)), PLACEHOLDERS[kind]
    known = ", ".join(f"{{{name}}}" for name in sorted(expected))
    if unknown := sorted(found - expected):
        raise UserError(f"{path}: unknown placeholder {{{unknown[0]}}}; it takes {known}")
    if missing := sorted(expected - found):
        raise UserError(f"{path}: lacks the placeholder {{{missing[0]}}}; it takes {known}")
    return text.strip()
