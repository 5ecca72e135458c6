"""The reflection-token vocabulary of Self-RAG (Asai et al., ICLR 2024, Table 1).

Four groups of tokens let one language model decide when to retrieve, and criticise its own
segments:

  Retrieve  is retrieval needed for the next segment?
  IsRel     is the passage relevant to the input?
  IsSup     is the segment supported by the passage?
  IsUse     how useful is the whole response, from 1 to 5?

Two markup tokens enclose a passage. Ids are never assumed but looked up in a tokenizer (`lookup`),
because checkpoints differ in the order in which they added the tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from selfrag_jax.errors import UserError

NO_RETRIEVAL, RETRIEVAL, CONTINUE = "[No Retrieval]", "[Retrieval]", "[Continue to Use Evidence]"
IRRELEVANT, RELEVANT = "[Irrelevant]", "[Relevant]"
FULLY, PARTIALLY = "[Fully supported]", "[Partially supported]"
NO_SUPPORT = "[No support / Contradictory]"
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

# In the order of the released vocabulary, which adds them to Llama-2's 32,000 tokens, followed by a
# padding token.
ALL = RETRIEVE + ISREL + MARKUP + ISUSE + ISSUP


@dataclass(frozen=True)
class ReflectionIds:
    """Token ids of each group, in the order of the constants above.

    Hashable, so it can be a static jit argument.
    """

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


class MissingReflectionTokens(UserError):
    """A tokenizer lacks reflection tokens; the message names them.

    has_none: of the four groups, as a base model.
    """

    def __init__(self, message: str, has_none: bool = False):
        super().__init__(message)
        self.has_none = has_none


def missing_tokens(token_to_id: Callable[[str], int | None], name: str = "tokenizer") -> list[str]:
    """Returns the tokens to add to a tokenizer, in the released order.

    Raises MissingReflectionTokens if it has only some tokens of the four groups: the others were
    lost, and newly added ones would be untrained.
    """
    missing = [token for token in ALL if token_to_id(token) is None]
    lost = [token for token in missing if token not in MARKUP]
    if 0 < len(lost) < len(ALL) - len(MARKUP):
        raise MissingReflectionTokens(
            f"{name}: has some reflection tokens, but not {', '.join(lost)}; "
            "use the tokenizer that belongs to the model"
        )
    return missing


def lookup(token_to_id: Callable[[str], int | None], name: str = "tokenizer") -> ReflectionIds:
    """Returns the ids of all reflection tokens in a tokenizer, which messages call `name`.

    Raises MissingReflectionTokens naming every token without an id, and UserError naming two tokens
    with the same id.
    """
    found = {token: token_to_id(token) for token in ALL}
    ids = {token: i for token, i in found.items() if i is not None}
    missing = [token for token in ALL if token not in ids]
    if missing:
        raise MissingReflectionTokens(
            f"{name}: lacks {len(missing)} reflection token(s): {', '.join(missing)}. "
            "Add them (Tokenizer.with_reflection_tokens) or use a Self-RAG tokenizer; "
            "a plain Llama has none.",
            has_none={*ALL} - {*MARKUP} <= {*missing},
        )
    token_of: dict[int, str] = {}
    for token, i in ids.items():
        if token_of.setdefault(i, token) != token:
            raise UserError(f"{name}: {token_of[i]} and {token} have the same id, {i}")
    groups = (RETRIEVE, ISREL, ISSUP, ISUSE, MARKUP)
    return ReflectionIds(*(tuple(ids[token] for token in group) for group in groups))
