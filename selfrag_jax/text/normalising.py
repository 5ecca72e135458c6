"""Text as answers are compared: without case, punctuation, articles and extra spaces."""

from __future__ import annotations

import re
import string


def normalise(text: str) -> str:
    """Lower-cases text and drops punctuation, articles and extra spaces, as SQuAD's evaluation."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", without_punctuation(text)).split())


def without_punctuation(text: str) -> str:
    """Lower-cases text and drops punctuation and extra spaces."""
    return " ".join("".join(c for c in text.lower() if c not in string.punctuation).split())
