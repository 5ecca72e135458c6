"""Plain generation on the engine: the most likely continuation of each prompt, to end of text."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import Any

from selfrag_jax.engine.engine import Engine, run_searches
from selfrag_jax.engine.requests import Generate, ReadTokens
from selfrag_jax.engine.segments import GeneratedSegments, TokenRules
from selfrag_jax.engine.shapes import Shapes
from selfrag_jax.models.llama import Model
from selfrag_jax.models.params import Params
from selfrag_jax.text.tokenizer import Tokenizer


def generate_greedily(
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    batch: int,
    length_bucket: int,
) -> Iterator[tuple[int, GeneratedSegments]]:
    """Like `continue_prompts`, but raises what a continuation raises."""
    args = (model, params, tokenizer, prompts, max_new_tokens, batch, length_bucket)
    for i, segment in continue_prompts(*args):
        if isinstance(segment, Exception):
            raise segment
        yield i, segment


def continue_prompts(
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    batch: int,
    length_bucket: int,
) -> Iterator[tuple[int, GeneratedSegments | Exception]]:
    """Yields (index of the prompt, its continuation) as continuations end, in any order.

    params: as `place_params` returns them. batch: prompts continued at once. A prompt that fails
    yields its exception.
    """
    if not prompts:
        return
    rules = TokenRules(tokenizer.eos_id, tokenizer.pad_id, None)
    shapes = Shapes(
        num_slots=batch,
        beam_width=1,
        num_passages=1,
        max_new_tokens=max_new_tokens,
        length_bucket=length_bucket,
        longest_prompt=max(map(len, prompts)),
        prefix_grows=False,
    )
    engine = Engine(model, params, rules, shapes)
    searches = ((i, _continue(p, max_new_tokens)) for i, p in enumerate(prompts))
    yield from run_searches(engine, searches, lambda _: [])


def text_of(segment: GeneratedSegments, tokenizer: Tokenizer) -> str:
    """Returns the text of a continuation, without the end of text."""
    return tokenizer.decode([t for t in segment.token_ids() if t != tokenizer.eos_id]).strip()


def _continue(prompt: list[int], limit: int) -> Generator[Any, Any, GeneratedSegments]:
    """What the model generates after a prompt, as requests to the engine."""
    yield ReadTokens([prompt[:-1]], [0])
    segments = yield Generate([[[prompt[-1]]]], [len(prompt) - 1], limit)
    return segments.at((0, 0))
