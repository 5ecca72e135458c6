"""Compares answering speed with the algorithm of Self-RAG's released scripts, run on torch.

    python launch/benchmarks/answer.py  # 100M parameters, f32, on a CPU: short form, then long form
    python launch/benchmarks/answer.py --curves  # ours alone, over passages and batch; and memory
    python launch/benchmarks/answer.py --retrieval=500  # ours alone, passages take half a second
    python launch/benchmarks/answer.py --bandwidth --size=7b  # bytes per second while generating

Both answer the same questions with the same weights and passages, in one run.
Theirs: one question at a time, a prompt for each passage in one batch with a key-value cache,
log-probabilities of the whole vocabulary at every position, generation up to the length limit,
everything read again at every step of the long form.
Ours: all questions together, the prefix that passages share read once, generation up to the end of
the segment.

Needs torch and transformers, which `pip install '.[test]'` brings. Compilation is not timed, but
printed.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch may need its share

import jax
import jax.numpy as jnp
import numpy as np
from random_model import (
    PASSAGE_TOKENS,
    PROMPT_TOKENS,
    SIZES,
    TOKENIZER,
    Question,
    make_questions,
    random_model,
)

from selfrag_jax.engine import programs
from selfrag_jax.engine.engine import compiled, place_params, unstack_layers
from selfrag_jax.engine.segments import TokenRules
from selfrag_jax.engine.shapes import Shapes
from selfrag_jax.models.llama import Model
from selfrag_jax.models.params import Params
from selfrag_jax.models.quantize import quantize
from selfrag_jax.search.config import SearchConfig
from selfrag_jax.search.paper import PaperSearch
from selfrag_jax.search.scoring import Weights


# ---- ours ----------------------------------------------------------------------------------------
def make_search(
    model: Model, params: Params, limit: int, num_passages: int, width: int, depth: int
) -> PaperSearch:
    config = SearchConfig(
        mode="always_retrieve",
        threshold=None,
        normalise="yes_no",
        weights=Weights(),
        beam_width=width,
        max_depth=depth,
        ndocs=num_passages,
        accumulate="sum",
        constraints=(),
        keep_passages=True,
        max_new_tokens=limit,
        length_bucket=8,
        scorer="paper",
        temperature=0.0,
        top_p=1.0,
        seed=0,
    )
    return PaperSearch(model, params, TOKENIZER, config, 4096)


def answer(search: PaperSearch, questions: list[Question]):
    def find_passages(queries):
        return [questions[i][1] for i, _ in queries]

    return search.run([prompt for prompt, _ in questions], find_passages)


@contextlib.contextmanager
def count_rows() -> Iterator[list[int]]:
    """Counts the rows that pass through the model while generating.

    Rows of branches that have ended and wait for others count too.
    """
    decode, rows = programs.decode, [0]

    @functools.wraps(decode)
    def counting_decode(model, params, rules, prefixes, branches, *args):
        before = int(branches.steps_since_fed[0])  # a step adds one to every row
        branches = decode(model, params, rules, prefixes, branches, *args)
        steps = int(branches.steps_since_fed[0]) - before
        rows[0] += steps * branches.steps_since_fed.shape[0]
        return branches

    programs.decode = counting_decode
    try:
        yield rows
    finally:
        programs.decode = decode


def timed(f: Callable[..., Any], *args) -> tuple[Any, float]:
    begin = time.perf_counter()
    out = f(*args)
    return out, time.perf_counter() - begin


# ---- the benchmarks ------------------------------------------------------------------------------
def compare(args, form: str) -> dict[str, float]:
    """Prints and returns both rates, in questions per second, and their ratio."""
    from released_on_torch import ReleasedOnTorch

    if form == "short":
        n, num_passages, limit = args.questions, args.passages or 10, 50
        width, depth, segment_tokens = 1, 1, None
    else:
        n, num_passages, limit = max(1, args.questions // 4), args.passages or 5, args.new
        width, depth, segment_tokens = 2, 7, 25
    model, params = random_model(args.size, segment_tokens)
    questions = make_questions(n, num_passages)

    theirs = ReleasedOnTorch(model.config, params)
    begin = time.perf_counter()
    for question in questions:
        if form == "short":
            theirs.answer_short(*question, limit)
        else:
            theirs.answer_long(*question, limit, width, depth)
    their_seconds = time.perf_counter() - begin

    search = make_search(model, params, limit, num_passages, width, depth)
    del params
    programs_before = len(compiled)
    with count_rows() as rows:
        _, first_seconds = timed(answer, search, questions)
    num_programs = len(compiled) - programs_before
    times = []
    for _ in range(args.rounds):
        trees, seconds = timed(answer, search, questions)
        times.append(seconds)
    our_seconds = sorted(times)[len(times) // 2]
    lengths = [len(node.tokens) for tree in trees for node in tree.nodes]
    tokens_read = n * PROMPT_TOKENS + len(lengths) * PASSAGE_TOKENS

    def operations_ratio(generated: int) -> float:
        """Every token takes the same operations, read or generated."""
        return (theirs.tokens_read + theirs.tokens_generated) / (tokens_read + generated)

    print(
        f"{form} form: {n} questions, {num_passages} passages, {limit} tokens at most, "
        f"{jax.devices()[0].device_kind}"
    )
    print(
        f"  theirs {n / their_seconds:8.4f} questions/s   {theirs.tokens_read} tokens read, "
        f"{theirs.tokens_generated} generated"
    )
    print(
        f"  ours   {n / our_seconds:8.4f} questions/s   {tokens_read} tokens read, {sum(lengths)} "
        f"generated (segments of {np.mean(lengths):.0f})"
    )
    print(
        f"  ratio  {their_seconds / our_seconds:8.2f}   of floating-point operations "
        f"{operations_ratio(sum(lengths)):.2f}, {operations_ratio(rows[0]):.2f} with branches that "
        f"wait for others; {num_programs} programs compiled in "
        f"{max(0.0, first_seconds - our_seconds):.0f} s"
    )
    return {
        "theirs": n / their_seconds,
        "ours": n / our_seconds,
        "ratio": their_seconds / our_seconds,
        "operations_ratio": operations_ratio(sum(lengths)),
        "operations_ratio_with_idle": operations_ratio(rows[0]),
    }


def curves(args) -> None:
    model, params = random_model(args.size, None)

    def seconds(n: int, num_passages: int) -> float:
        questions = make_questions(n, num_passages)
        search = make_search(model, params, 50, num_passages, 1, 1)
        answer(search, questions)  # compiles
        return timed(answer, search, questions)[1]

    print("passages K, 4 questions: seconds for a question")
    for k in (k for k in (1, 2, 5, 10, 20) if k <= args.largest):
        print(f"  K={k:<3} {seconds(4, k) / 4:.3f}")
    print("questions at once, K=5: questions a second")
    for n in (n for n in (1, 2, 4, 8, 16, 32) if n <= args.largest):
        print(f"  {n:<3} {n / seconds(n, 5):.3f}")
    print("most memory beside the weights, 16 questions, K=10, by the compiler: GB")
    for name, shared in (("shared", True), ("copied", False)):
        print(f"  prefix {name:<7} {peak_memory(model, 16, 10, shared) / 1e9:.2f}")


def peak_memory(model: Model, n: int, num_passages: int, shared: bool) -> int:
    """Returns the bytes of arguments, results and temporaries, without the weights.

    Of reading passages or of generating, whichever takes more. shared: the prompt is in a prefix;
    else each branch has a copy.
    """
    limit = 50
    prefix_capacity, fed_capacity = (200, 152) if shared else (1, 352)
    per_layer = unstack_layers(jax.default_backend(), 1)
    rules = token_rules()
    prefixes = jax.eval_shape(lambda: programs.empty_prefixes(model, n, prefix_capacity, per_layer))
    branches = jax.eval_shape(
        lambda: programs.empty_branches(
            model, rules, n, 1, num_passages, fed_capacity, limit, limit, per_layer
        )
    )
    params = jax.tree.map(lambda x: x.update(dtype=model.config.dtype), model.shapes())
    if per_layer:
        params = jax.eval_shape(model.per_layer, params)

    def array(dtype, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    shapes = Shapes(
        num_slots=n,
        beam_width=1,
        num_passages=num_passages,
        max_new_tokens=limit,
        length_bucket=8,
        longest_prompt=prefix_capacity,
        prefix_grows=False,
    )
    num_slots = shapes.batch_slots(num_passages * fed_capacity)
    B = num_slots * num_passages
    fed = (
        array(np.int32, num_slots),  # slots
        array(np.int32, B, fed_capacity),  # tokens
        array(bool, B, fed_capacity),  # valid
        array(np.int32, B),  # start
        array(np.int32, B),  # limit
        array(np.uint32, B, 2),  # key
    )
    held = (model, params, rules, prefixes, branches)
    generating = programs.decode.lower(*held, array(np.int32), None)
    reading = programs.start_branches.lower(*held, *fed)

    def used(lowered) -> int:
        m = lowered.compile().memory_analysis()
        outputs = m.output_size_in_bytes - m.alias_size_in_bytes
        return m.argument_size_in_bytes + outputs + m.temp_size_in_bytes

    return max(used(generating), used(reading)) - num_bytes(params)


def retrieval(args) -> dict[str, float]:
    """Measures how much of the time for finding passages is spent on other questions' segments.

    Prints and returns the seconds of each way. An index that waits stands for any index that takes
    so long.
    """
    model, params = random_model(args.size, 25)
    n, slots, steps, num_passages = 8, 4, 4, args.passages or 5
    questions = make_questions(n, num_passages)
    prompts = [prompt for prompt, _ in questions]
    search = make_search(model, params, 50, num_passages, 1, steps)
    calls = []  # of the last run

    def seconds(wait: float, overlap: bool) -> float:
        def find_passages(queries):
            calls.append(queries)
            time.sleep(wait)
            return [questions[i][1] for i, _ in queries]

        def run() -> None:
            for _ in search.stream(prompts, find_passages, slots, overlap=overlap):
                pass

        calls.clear()
        return timed(run)[1]

    for overlap in (False, True):
        seconds(0.0, overlap)  # compiles
    wait = args.retrieval / 1e3
    waiting, overlapping = seconds(wait, False), seconds(wait, True)
    at_once = seconds(0.0, False)
    print(
        f"{n} questions, {slots} at once, {steps} segments each, passages found in {wait:.2f} s, "
        f"{len(calls)} times"
    )
    print(f"  others wait      {waiting:7.1f} s")
    print(f"  others continue  {overlapping:7.1f} s")
    print(f"  found at once    {at_once:7.1f} s")
    hidden = (waiting - overlapping) / (waiting - at_once)
    print(f"  {100 * hidden:.0f}% of the waiting is hidden")
    return {"waiting": waiting, "overlapping": overlapping, "at_once": at_once}


def copy_bandwidth() -> float:
    """Returns the bytes per second that the device reads and writes, updating 1 GB in place."""
    x, times = jax.device_put(np.zeros(1 << 28, np.float32)), []
    add_one = jax.jit(lambda x: x + 1, donate_argnums=0)
    for _ in range(6):
        begin = time.perf_counter()
        x = jax.block_until_ready(add_one(x))
        times.append(time.perf_counter() - begin)
    return 2 * x.nbytes / min(times[1:])


def bandwidth(args) -> list[dict[str, float]]:
    """Measures generating with all slots taken, after the device's copies.

    The rate is what a step must read, weights and the capacity of all caches, over its time. Prints
    and returns the figures of each number of questions, as far as the device's memory reaches.
    """
    copied, num_passages = copy_bandwidth(), args.passages or 10
    model, params = random_model(args.size, None)
    if args.int8:
        model, params = quantize(model, params)
    params, found = place_params(model, params), []
    kind = jax.devices()[0].device_kind
    print(f"copies {copied / 1e9:.1f} GB/s on {kind}; {num_passages} passages")
    for n in (1, 4, 16, 64):
        try:
            seconds, read = time_of_step(model, params, n, num_passages)
        except jax.errors.JaxRuntimeError as e:
            if "RESOURCE_EXHAUSTED" not in str(e):
                raise
            print(f"  {n:<3} questions: {str(e).splitlines()[0]}")
            break
        rate = read / seconds
        print(
            f"  {n:<3} questions {1e3 * seconds:8.1f} ms a step "
            f"{n * num_passages / seconds:8.0f} tokens/s {read / 1e9:6.2f} GB "
            f"{rate / 1e9:8.1f} GB/s, {100 * rate / copied:.0f}% of copies"
        )
        found.append(
            {
                "questions": n,
                "step_ms": 1e3 * seconds,
                "tokens_per_second": n * num_passages / seconds,
                "bytes_per_second": rate,
                "copies_bytes_per_second": copied,
                "share_of_copies": rate / copied,
            }
        )
    return found


def time_of_step(model: Model, params: Params, n: int, num_passages: int) -> tuple[float, int]:
    """Returns the seconds of a step that generates for n questions, and the bytes it reads."""
    limit, steps = 50, 40
    rules, per_layer = token_rules(), isinstance(params["layers"], tuple)
    prefixes = programs.empty_prefixes(model, n, 200, per_layer)
    branches = programs.empty_branches(
        model, rules, n, 1, num_passages, 152, limit, limit, per_layer
    )
    times = []
    for _ in range(4):
        zeros = functools.partial(jnp.zeros, n * num_passages)
        branches = replace(
            branches,
            done=zeros(bool),
            steps_since_fed=zeros(jnp.int32),
            limit=zeros(jnp.int32) + limit,
        )
        jax.block_until_ready(branches)
        begin = time.perf_counter()
        branches = programs.decode(model, params, rules, prefixes, branches, np.int32(steps), None)
        jax.block_until_ready(branches)
        times.append((time.perf_counter() - begin) / int(branches.steps_since_fed[0]))
    weights = params["layers"], params["head"], params["norm"]
    return min(times[1:]), num_bytes((weights, prefixes, branches.cache))


def token_rules() -> TokenRules:
    return TokenRules(TOKENIZER.eos_id, TOKENIZER.pad_id, TOKENIZER.reflection_ids())


def num_bytes(tree) -> int:
    return sum(x.dtype.itemsize * x.size for x in jax.tree.leaves(tree))


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--size", choices=SIZES, default="100m", help="tiny: to try the script")
    p.add_argument("--form", choices=("short", "long", "both"), default="both")
    p.add_argument(
        "--questions", type=int, default=16, help="of the short form; the long form takes a quarter"
    )
    p.add_argument("--passages", type=int, default=0, help="default: 5 in the long form, else 10")
    p.add_argument(
        "--new",
        type=int,
        default=300,
        help="most tokens of a segment in the long form; the published command has 300",
    )
    p.add_argument("--rounds", type=int, default=3, help="runs of ours; the median counts")
    p.add_argument(
        "--curves", action="store_true", help="ours alone: time over passages and batch; memory"
    )
    p.add_argument(
        "--largest", type=int, default=32, help="of the numbers of passages and questions in curves"
    )
    p.add_argument(
        "--retrieval",
        type=int,
        default=0,
        metavar="MS",
        help="ours alone: finding passages takes that long",
    )
    p.add_argument(
        "--bandwidth", action="store_true", help="ours alone: time and bytes of a generated token"
    )
    p.add_argument("--int8", action="store_true", help="of --bandwidth: int8 kernels")
    return p.parse_args(argv)


def main() -> None:
    args = parse_arguments()
    if args.curves:
        curves(args)
    elif args.bandwidth:
        bandwidth(args)
    elif args.retrieval:
        retrieval(args)
    else:
        for form in ("short", "long") if args.form == "both" else (args.form,):
            compare(args, form)


if __name__ == "__main__":
    main()
