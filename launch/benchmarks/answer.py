"""Answering speed beside the algorithm of Self-RAG's released scripts, on torch: the same weights, questions and passages, in
one run.

    python launch/benchmarks/answer.py            # about 100M parameters, f32, on a CPU: short form, then long form
    python launch/benchmarks/answer.py --curves   # ours alone over passages and batch; memory with and without a shared prefix
    python launch/benchmarks/answer.py --retrieval=500  # ours alone where passages take half a second to find
    python launch/benchmarks/answer.py --bandwidth --size=7b  # bytes a second that generating reads, beside the device's copies

Theirs: one question at a time, a prompt for each passage in one batch with a key-value cache, log-probabilities of the whole
vocabulary at every position, generation on to the length limit, everything read again at every step of the long form. Ours:
all questions together, what passages share read once, generation up to the segment's end. Needs torch and transformers, as
`pip install '.[test]'` brings them. Compilation is not timed, but printed.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import time
from dataclasses import replace

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch may need its share

import jax
import jax.numpy as jnp
import numpy as np

from selfrag_jax.engine import programs, segments
from selfrag_jax.engine.engine import compiled, on_device, unstack_layers
from selfrag_jax.engine.shapes import group_size
from selfrag_jax.models.llama import Cache, LlamaConfig, Model
from selfrag_jax.models.params import Params
from selfrag_jax.records import Passage
from selfrag_jax.search.config import SearchConfig
from selfrag_jax.search.paper import BeamSearch
from selfrag_jax.search.scoring import Weights
from selfrag_jax.text import reflection
from selfrag_jax.text.tokenizer import Control

WORDS = 32_000  # the vocabulary's; the reflection tokens stand behind them


class Ids:
    """Stands for a tokenizer: texts are written as their ids."""

    eos_id, pad_id, bos_id = 2, 0, 1
    vocab_size = WORDS + len(reflection.ALL)

    def id(self, control: str) -> int:
        return WORDS + reflection.ALL.index(control) if control in reflection.ALL else 13

    def reflection_ids(self) -> reflection.ReflectionIds:
        return reflection.lookup(self.id)

    def encode(self, parts) -> list[int]:
        return [
            i
            for p in parts
            for i in ([self.id(p.token)] if isinstance(p, Control) else map(int, p.split()))
        ]

    def decode(self, ids) -> str:
        return " ".join(map(str, ids))


def model_of(size: str, segment_tokens: int | None) -> tuple[Model, Params]:
    """Random weights. segment_tokens: how long segments are on average, by the odds of the [Retrieval] token; None: they end at
    the length limit."""
    sizes = {
        "tiny": dict(
            embed_dim=64, mlp_dim=128, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=16
        ),
        "100m": dict(
            embed_dim=640, mlp_dim=1728, num_layers=12, num_heads=10, num_kv_heads=10, head_dim=64
        ),
        "7b": dict(
            embed_dim=4096,
            mlp_dim=11_008,
            num_layers=32,
            num_heads=32,
            num_kv_heads=32,
            head_dim=128,
        ),
    }
    more = dict(
        max_length=4096,
        rope_theta=1e4,
        norm_eps=1e-5,
        tie_embeddings=False,
        remat="none",
        scan_unroll=1,
    )
    dtype = "bfloat16" if size == "7b" else "float32"
    model = Model(LlamaConfig(**sizes[size], **more, vocab_size=Ids.vocab_size, dtype=dtype))
    params = jax.device_get(model.init(jax.random.key(0), 0.5))
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    head = np.array(params["head"]["kernel"])
    quiet = [Ids.eos_id, Ids.pad_id, *(Ids().id(t) for t in reflection.ALL)]
    head[:, quiet] *= 0.1  # never the most likely
    if segment_tokens:
        # Odds of 1 in n against the most likely of 32,000 words, whose logits are normal with the same deviation.
        best = np.sqrt(2 * np.log(WORDS)) - 0.4
        column = Ids().id(reflection.RETRIEVAL)
        head[:, column] *= 10 * best / {10: 1.28, 20: 1.64, 25: 1.75, 50: 2.05}[segment_tokens]
    return model, {**params, "head": {"kernel": head}}


def questions(n: int, prompt: int, passage: int, k: int) -> list[tuple[list[int], list[Passage]]]:
    rng = np.random.default_rng(0)
    words = lambda m: rng.integers(100, WORDS, m)  # noqa: E731
    text = lambda m: " ".join(map(str, words(m)))  # noqa: E731
    return [
        (
            [1, *map(int, words(prompt - 1))],
            [Passage(str(i), "", text(passage - 3)) for i in range(k)],
        )
        for _ in range(n)
    ]


# ---- theirs ----------------------------------------------------------------------------------------------------------
class Released:
    """What run_short_form.py and run_long_form_static.py compute, with transformers in place of their generation engine."""

    def __init__(self, c: LlamaConfig, params: Params):
        import tempfile

        import torch
        import transformers

        from selfrag_jax.huggingface import weights

        self.torch = torch
        with tempfile.TemporaryDirectory() as folder:
            from pathlib import Path

            weights.write_tensors(
                Path(folder), (t for path, a in weights.leaves(params)
                               for t in weights.tensors_of(path, c, a if path[0] == "layers" else [a]))
            )  # fmt: skip
            weights.write_json(
                Path(folder) / weights.CONFIG,
                weights.config_to_json(c, {"eos_token_id": 2}, c.dtype),
            )
            self.model = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype="auto"
            ).eval()
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model.to(self.device)
        self.r, self.ids = Ids().reflection_ids(), Ids()
        self.read = self.written = 0  # tokens

    def generate(self, prompts: list[list[int]], new: int):
        """Greedy, to the end of text or the limit: tokens [B, n], and log-probabilities [n, B, V]."""
        torch = self.torch
        longest = max(map(len, prompts))
        tokens = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=self.device)
        mask = (
            torch.arange(longest, device=self.device)
            >= torch.tensor([[longest - len(p)] for p in prompts], device=self.device)
        ).long()
        self.read += tokens.numel()
        cache, out, logs, done = (
            None,
            [],
            [],
            torch.zeros(len(prompts), dtype=torch.bool, device=self.device),
        )
        with torch.inference_mode():
            for _ in range(new):
                positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
                seen = self.model(
                    tokens,
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=cache,
                    logits_to_keep=1,
                )
                cache, log_probs = seen.past_key_values, seen.logits[:, -1].float().log_softmax(-1)
                tokens = log_probs.argmax(-1, keepdim=True)
                out.append(tokens), logs.append(log_probs)
                done |= tokens[:, 0] == self.ids.eos_id
                mask = torch.cat([mask, torch.ones_like(tokens)], 1)
                self.written += len(prompts)
                if done.all():
                    break
        return torch.cat(out, 1).cpu().numpy(), torch.stack(logs).float().cpu().numpy()

    def step(
        self, prompt: list[int], passages: list[Passage], new: int
    ) -> list[tuple[list[int], float]]:
        """For each passage what is generated, and its score (the long form's, and the short form's without its sequence)."""
        p = self.ids
        fed = [
            prompt
            + p.encode(
                [Control("[Retrieval]"), Control("<paragraph>"), x.text, Control("</paragraph>")]
            )
            for x in passages
        ]
        tokens, logs = self.generate(fed, new)
        out = []
        for i, row in enumerate(tokens):
            relevance = np.exp(logs[0, i, list(self.r.isrel)])
            score = relevance[1] / relevance.sum()
            at = next((j for j, t in enumerate(row) if t in self.r.issup), None)
            if at is not None:
                support = np.exp(logs[at, i, list(self.r.issup)])
                score += (support[0] + 0.5 * support[1]) / support.sum()
            out.append((list(map(int, row)), float(score)))
        return out

    def short(self, prompt, passages, new):
        return max(self.step(prompt, passages, new), key=lambda s: s[1])

    def long(self, prompt, passages, new, width, steps):
        """Level by level; a child's text is cut at its first [Retrieval]. Every child may go on, so that all steps are taken as ours
        are (random weights seldom say it); the scripts go on from those that said it."""
        level = [(prompt, [], 1.0)]
        for _ in range(steps):
            found = []
            for history, said, score in level:
                for row, s in self.step(history + said, passages, new):
                    cut = row.index(p) if (p := self.ids.id("[Retrieval]")) in row else len(row)
                    found.append((history + said, row[:cut], score * s))
            level = sorted(found, key=lambda f: -f[2])[:width]
        return level[0]


# ---- ours ------------------------------------------------------------------------------------------------------------
def search(model: Model, params: Params, new: int, k: int, width: int, depth: int) -> BeamSearch:
    config = SearchConfig(
        mode="always_retrieve", threshold=None, normalise="yes_no", weights=Weights(), beam_width=width, max_depth=depth, ndocs=k,
        accumulate="sum", constraints=(), keep_passages=True, max_new_tokens=new, length_bucket=8,
        scorer="paper", temperature=0.0, top_p=1.0, seed=0,
    )  # fmt: skip
    return BeamSearch(model, params, Ids(), config, 4096)


def ours(s: BeamSearch, asked):
    return s.run([prompt for prompt, _ in asked], lambda queries: [asked[q][1] for q, _ in queries])


@contextlib.contextmanager
def counted():
    """Counts the rows that pass through the model in generating: those of branches that have ended and wait too."""
    decode, rows = programs.decode, [0]

    @functools.wraps(decode)
    def counting(model, params, rules, state, *args):
        before = int(state.age[0])  # every row's grows by one in a step
        state = decode(model, params, rules, state, *args)
        rows[0] += (int(state.age[0]) - before) * state.age.shape[0]
        return state

    programs.decode = counting
    try:
        yield rows
    finally:
        programs.decode = decode


def timed(f):
    begin = time.perf_counter()
    out = f()
    return out, time.perf_counter() - begin


def compare(a, form: str) -> None:
    short = form == "short"
    n, k, new = (
        (a.questions, a.passages or 10, 50)
        if short
        else (max(1, a.questions // 4), a.passages or 5, a.new)
    )
    width, depth = (1, 1) if short else (2, 7)
    model, params = model_of(a.size, None if short else 25)
    asked = questions(n, 200, 150, k)
    theirs = Released(model.config, params)
    _, per_question = timed(
        lambda: [
            theirs.short(*q, new) if short else theirs.long(*q, new, width, depth) for q in asked
        ]
    )
    s = search(model, params, new, k, width, depth)
    del params
    before = len(compiled)
    with counted() as rows:
        _, first = timed(lambda: ours(s, asked))
    programs = len(compiled) - before
    times = []
    for _ in range(a.rounds):
        found, seconds = timed(lambda: ours(s, asked))
        times.append(seconds)
    mine = sorted(times)[len(times) // 2]
    written = [len(node.tokens) for one in found for node in one.nodes]
    read = n * 200 + len(written) * 150
    print(
        f"{form} form: {n} questions, {k} passages, {new} tokens at most, {jax.devices()[0].device_kind}"
    )
    print(
        f"  theirs {n / per_question:8.4f} questions/s   {theirs.read} tokens read, {theirs.written} generated"
    )
    print(
        f"  ours   {n / mine:8.4f} questions/s   {read} tokens read, {sum(written)} generated (segments of {np.mean(written):.0f})"
    )
    of = lambda mine: (theirs.read + theirs.written) / (read + mine)  # noqa: E731  each token takes the same operations
    print(
        f"  ratio  {per_question / mine:8.2f}   of floating-point operations {of(sum(written)):.2f}, {of(rows[0]):.2f} with branches that "
        f"wait for others; {programs} programs compiled in {max(0.0, first - mine):.0f} s"
    )


def curves(a) -> None:
    model, params = model_of(a.size, None)
    print("passages K, 4 questions: seconds for a question")
    for k in (1, 2, 5, 10, 20):
        asked, s = questions(4, 200, 150, k), search(model, params, 50, k, 1, 1)
        ours(s, asked)
        print(f"  K={k:<3} {timed(lambda s=s, asked=asked: ours(s, asked))[1] / 4:.3f}")
    print("questions at once, K=5: questions a second")
    for n in (1, 2, 4, 8, 16, 32):
        asked, s = questions(n, 200, 150, 5), search(model, params, 50, 5, 1, 1)
        ours(s, asked)
        print(f"  {n:<3} {n / timed(lambda s=s, asked=asked: ours(s, asked))[1]:.3f}")
    print("most memory beside the weights, 16 questions, K=10, by the compiler: GB")
    for shared in (True, False):
        print(
            f"  prefix {'shared' if shared else 'copied':<7} {memory(model, 16, 10, shared) / 1e9:.2f}"
        )


def memory(model: Model, n: int, k: int, shared: bool) -> int:
    """Arguments, results and temporaries of reading passages or generating segments, whichever takes more, with the prompt in a
    prefix or in each branch."""
    rules, fed = (
        segments.TokenRules(Ids.eos_id, Ids.pad_id, Ids().reflection_ids()),
        152 if shared else 352,
    )
    layered = unstack_layers(jax.default_backend(), 1)
    prefix = Cache.empty(model.config, n, 200 if shared else 1)
    prefix = prefix.per_layer() if layered else prefix
    state = jax.eval_shape(lambda: programs.empty(model, rules, prefix, k, fed, 50, 50, 1, layered))
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    params = jax.tree.map(lambda s: s.update(dtype=model.config.dtype), model.shapes())
    params = jax.eval_shape(model.per_layer, params) if layered else params
    rows = lambda kind, *shape: jax.ShapeDtypeStruct(shape, kind)  # noqa: E731
    ints, flags, together = (
        functools.partial(rows, np.int32),
        functools.partial(rows, bool),
        group_size(n, k * fed),
    )
    B = together * k
    branches = (
        ints(together),
        ints(B, fed),
        flags(B, fed),
        ints(B),
        ints(B),
        rows(np.uint32, B, 2),
    )
    generating = programs.decode.lower(model, params, rules, state, ints(), None)
    reading = programs.feed.lower(model, params, rules, state, *branches)
    weights = sum(x.dtype.itemsize * x.size for x in jax.tree.leaves(params))
    found = [lowered.compile().memory_analysis() for lowered in (generating, reading)]
    held = lambda m: (
        m.argument_size_in_bytes
        + m.output_size_in_bytes
        - m.alias_size_in_bytes
        + m.temp_size_in_bytes
    )  # noqa: E731
    return max(map(held, found)) - weights


def retrieval(a) -> None:
    """How much of the time that passages take to be found is spent on other questions' segments. Any index that takes so long is
    stood for by one that waits."""
    model, params = model_of(a.size, 25)
    n, at_once, steps = 8, 4, 4
    asked, s = (
        questions(n, 200, 150, a.passages or 5),
        search(model, params, 50, a.passages or 5, 1, steps),
    )
    calls = []  # of the last run

    def seconds(wait: float, overlap: bool) -> float:
        def find(queries):
            calls.append(queries)
            time.sleep(wait)
            return [asked[q][1] for q, _ in queries]

        calls.clear()
        return timed(
            lambda: [*s.stream([prompt for prompt, _ in asked], find, at_once, overlap=overlap)]
        )[1]

    for overlap in (False, True):
        seconds(0.0, overlap)  # compiles
    wait = a.retrieval / 1e3
    kept, beside, free = seconds(wait, False), seconds(wait, True), seconds(0.0, False)
    print(
        f"{n} questions, {at_once} at once, {steps} segments each, passages found in {wait:.2f} s, {len(calls)} times"
    )
    print(
        f"  others wait   {kept:7.1f} s\n  others go on  {beside:7.1f} s\n  found at once {free:7.1f} s"
    )
    print(f"  {100 * (kept - beside) / (kept - free):.0f}% of the waiting is hidden")


def copy_bandwidth() -> float:
    """Bytes per second of the device, read and written, going through 1 GB in place."""
    x, times = jax.device_put(np.zeros(1 << 28, np.float32)), []
    through = jax.jit(lambda x: x + 1, donate_argnums=0)
    for _ in range(6):
        x, seconds = timed(lambda x=x: jax.block_until_ready(through(x)))
        times.append(seconds)
    return 2 * x.nbytes / min(times[1:])


def bandwidth(a) -> None:
    """Generating, of whole slots: what a step must read (weights and caches, as many as are held) over what it takes."""
    model, params = model_of(a.size, None)
    params = on_device(model, params)
    size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))  # noqa: E731
    rules, per_layer = (
        segments.TokenRules(Ids.eos_id, Ids.pad_id, Ids().reflection_ids()),
        isinstance(params["layers"], tuple),
    )
    copied, k, new, steps = copy_bandwidth(), a.passages or 10, 50, 40
    print(f"copies {copied / 1e9:.1f} GB/s on {jax.devices()[0].device_kind}; {k} passages")
    for n in (1, 4, 16, 64):
        try:
            state = programs.empty(
                model,
                rules,
                programs.empty_prefix(model, n, 200, per_layer),
                k,
                152,
                new,
                new,
                1,
                per_layer,
            )
            times, zeros = [], lambda kind, n=n: jnp.zeros(n * k, kind)
            for _ in range(4):
                state = replace(
                    state, done=zeros(bool), age=zeros(jnp.int32), limit=zeros(jnp.int32) + new
                )
                jax.block_until_ready(state)
                run = lambda state: programs.decode(
                    model, params, rules, state, np.int32(steps), None
                )  # noqa: E731
                state, seconds = timed(
                    lambda state=state, run=run: jax.block_until_ready(run(state))
                )
                times.append(seconds / int(state.age[0]))
        except jax.errors.JaxRuntimeError as e:  # the memory is full
            if "RESOURCE_EXHAUSTED" not in str(e):
                raise
            print(f"  {n:<3} questions: {str(e).splitlines()[0]}")
            break
        read = size((params["layers"], params["head"], params["norm"], state.prefix, state.own))
        rate = read / min(times[1:])
        print(
            f"  {n:<3} questions {1e3 * min(times[1:]):8.1f} ms a step {n * k / min(times[1:]):8.0f} tokens/s "
            f"{read / 1e9:6.2f} GB {rate / 1e9:8.1f} GB/s, {100 * rate / copied:.0f}% of copies"
        )
        del state


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--size", choices=("tiny", "100m", "7b"), default="100m", help="tiny: to try the script"
    )
    p.add_argument("--form", choices=("short", "long", "both"), default="both")
    p.add_argument(
        "--questions", type=int, default=16, help="of the short form; the long form takes a quarter"
    )
    p.add_argument("--passages", type=int, default=0, help="default: 5 in the long form, else 10")
    p.add_argument(
        "--new",
        type=int,
        default=300,
        help="tokens of the long form at most; the published command has 300",
    )
    p.add_argument("--rounds", type=int, default=3, help="of ours, of which the median counts")
    p.add_argument(
        "--curves", action="store_true", help="ours alone: time over passages and batch, and memory"
    )
    p.add_argument(
        "--retrieval",
        type=int,
        default=0,
        metavar="MS",
        help="ours alone: with passages that take so long to find",
    )
    p.add_argument(
        "--bandwidth",
        action="store_true",
        help="ours alone: bytes that a generated token takes, and the time",
    )
    a = p.parse_args()
    if a.curves or a.bandwidth or a.retrieval:
        return curves(a) if a.curves else bandwidth(a) if a.bandwidth else retrieval(a)
    for form in ("short", "long") if a.form == "both" else (a.form,):
        compare(a, form)


if __name__ == "__main__":
    main()
