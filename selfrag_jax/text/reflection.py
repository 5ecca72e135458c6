"""The reflection-token vocabulary of Self-RAG (Asai et al., ICLR 2024, Table 1).

Four groups of tokens let one language model decide when to retrieve and criticise its own segments:

  Retrieve  is retrieval needed for the next segment?
  IsRel     is the passage relevant to the input?
  IsSup     is the segment supported by the passage?
  IsUse     how useful is the whole response, from 1 to 5?

Two markup tokens enclose a passage. Ids are never assumed: they are looked up in a tokenizer (`lookup`), because the
order in which tokens were added to a vocabulary differs between checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from selfrag_jax.errors import UserError

NO_RETRIEVAL, RETRIEVAL, CONTINUE = "[No Retrieval]", "[Retrieval]", "[Continue to Use Evidence]"
IRRELEVANT, RELEVANT = "[Irrelevant]", "[Relevant]"
FULLY, PARTIALLY, NO_SUPPORT = (
    "[Fully supported]",
    "[Partially supported]",
    "[No support / Contradictory]",
)
PARAGRAPH_OPEN, PARAGRAPH_CLOSE = "<paragraph>", "</paragraph>"

RETRIEVE = (NO_RETRIEVAL, RETRIEVAL, CONTINUE)
ISREL = (IRRELEVANT, RELEVANT)
ISSUP = (FULLY, PARTIALLY, NO_SUPPORT)
ISUSE = tuple(f"[Utility:{k}]" for k in range(1, 6))
MARKUP = (PARAGRAPH_OPEN, PARAGRAPH_CLOSE)

GROUPS: dict[str, tuple[str, ...]] = {
    "retrieve": RETRIEVE,
    "isrel": ISREL,
    "issup": ISSUP,
    "isuse": ISUSE,
}

# The order in which the released vocabulary added them (after Llama-2's 32,000 tokens; then a padding token).
RELEASED_ORDER = RETRIEVE + ISREL + MARKUP + ISUSE + ISSUP
ALL = RELEASED_ORDER


@dataclass(frozen=True)
class ReflectionIds:
    """Token ids of each group, in the order of the constants above; hashable, so it can be a static jit argument."""

    retrieve: tuple[int, ...]
    isrel: tuple[int, ...]
    issup: tuple[int, ...]
    isuse: tuple[int, ...]
    markup: tuple[int, ...]

    @property
    def all(self) -> tuple[int, ...]:
        return self.retrieve + self.isrel + self.issup + self.isuse + self.markup

    def group(self, name: str) -> tuple[int, ...]:
        return getattr(self, name)


def lacking(token_to_id: Callable[[str], int | None], name: str = "tokenizer") -> list[str]:
    """The tokens that a tokenizer has to be given, in the released order. Raises MissingReflectionTokens where it has some of the
    four groups but not all: they were lost, and new ones in their place would mean nothing yet."""
    missing = [token for token in ALL if token_to_id(token) is None]
    lost = [token for token in missing if token not in MARKUP]
    if 0 < len(lost) < len(ALL) - len(MARKUP):
        raise MissingReflectionTokens(
            f"{name}: has some reflection tokens, but not {', '.join(lost)}; take the tokenizer that belongs to the model"
        )
    return missing


class MissingReflectionTokens(UserError):
    """A tokenizer lacks reflection tokens; the message names them."""


def lookup(token_to_id: Callable[[str], int | None], name: str = "tokenizer") -> ReflectionIds:
    """Looks the ids up. Raises MissingReflectionTokens naming every token that `token_to_id` doesn't know, and BadInput naming two
    that have one id."""
    ids = {token: token_to_id(token) for token in ALL}
    missing = [token for token, i in ids.items() if i is None]
    if missing:
        raise MissingReflectionTokens(
            f"{name}: lacks {len(missing)} reflection token(s): {', '.join(missing)}. Add them "
            "(Tokenizer.with_reflection_tokens) or take a Self-RAG tokenizer; a plain Llama has none."
        )
    of: dict[int, str] = {}
    for token, i in ids.items():
        if of.setdefault(i, token) != token:
            raise UserError(f"{name}: {of[i]} and {token} have the same id, {i}")
    pick = lambda group: tuple(ids[token] for token in group)  # noqa: E731
    return ReflectionIds(pick(RETRIEVE), pick(ISREL), pick(ISSUP), pick(ISUSE), pick(MARKUP))
