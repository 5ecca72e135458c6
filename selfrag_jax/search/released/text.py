"""How the released scripts turn generated tokens into the text of an answer."""

from __future__ import annotations

import re
from collections.abc import Sequence

from selfrag_jax.search.tree import Node
from selfrag_jax.text import reflection
from selfrag_jax.text.tokenizer import Tokenizer


class ScriptText:
    """The scripts' cleaning of texts, for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        known = {*tokenizer.reflection_ids().all, tokenizer.eos_id, tokenizer.pad_id}
        # The one control token that the scripts do not remove.
        self._removed = known - {tokenizer.id(reflection.CONTINUE)}

    def cleaned(self, tokens: Sequence[int]) -> str:
        """The text as the scripts clean it: white space stays."""
        return self.tokenizer.decode([t for t in tokens if t not in self._removed])

    def option(self, tokens: Sequence[int]) -> str:
        """What the short form's votes are counted by."""
        return self.cleaned(tokens).replace("\n", "")

    def short_answer(self, tokens: Sequence[int]) -> str:
        """An answer that was elected, or has no passage."""
        text = self.option(tokens)
        return _without_sign(text, text)

    def short_answer_from_passage(self, tokens: Sequence[int], text: str) -> str:
        """`text` of an answer that was not elected. The script looks at it with its critiques."""
        return _without_sign(text, self.tokenizer.decode(tokens))

    def first_paragraph(self, tokens: Sequence[int]) -> str:
        # Found in the text with all tokens: a critique between two line breaks keeps them apart.
        everything = self.tokenizer.decode(tokens)
        rest = len(everything) - len(everything.split("\n\n")[0])
        text = self.cleaned(tokens)
        return text[: len(text) - rest].removeprefix(" ")

    def up_to_blank_line(self, tokens: list[int]) -> list[int]:
        """The tokens with the one that ends the first blank line, which may hold other text too."""
        for n in range(1, len(tokens) + 1):
            if "\n\n" in self.tokenizer.decode(tokens[:n]):
                return tokens[:n]
        return tokens

    def joined(self, path: Sequence[Node]) -> str:
        return _spaced(" ".join(self.cleaned(n.tokens) for n in path))

    def with_marks(self, path: Sequence[Node]) -> tuple[list[Node], str]:
        """The segments that show, and their text with a citation mark for each last character."""
        shown: dict[str, tuple[int, Node]] = {}
        for i, node in enumerate(path, 1):
            if any(t != self.tokenizer.eos_id for t in node.tokens):
                shown.setdefault(self.cleaned(node.tokens).removeprefix(" "), (i, node))
        text = "".join(f"{text[:-1]} [{i}]. " for text, (i, _) in shown.items())
        text = _spaced(text.removesuffix(" "))
        for mark in (f".{reflection.CONTINUE}", ". [1] "):
            text = text.replace(mark, " [1]. ")
        return [node for _, node in shown.values()], text


def _without_sign(text: str, seen: str) -> str:
    """`text` without its first character, if `seen` begins with a number sign or colon."""
    return text[1:] if seen.startswith(("#", ":")) else text


def _spaced(text: str) -> str:
    """`text` with a space after each end of sentence inside a word."""
    return re.sub(r"(?<=\w)([.!?])(?=\w)", r"\1 ", text)
