"""Compares judging with asking the critic by free-running generation: judgements a second.

    python launch/benchmarks/label.py  # 100M parameters, f32, on a CPU
    python launch/benchmarks/label.py --size=7b --rows=40 --batch=64  # on a GPU

All judge the same prompts with the same weights, in one run, by turns. The prompts are those of
labelling in full wording: passages of 100 words, instructions and sentences of 20.

    shared prefix      one forward pass each, after the heading and question that a group shares
    whole prompts      one forward pass each
    generating n       greedy generation of up to n tokens from the whole vocabulary by
                       transformers, which takes the place of the released script's engine; that
                       script's batch is 10 prompts and its n 15, which a label that is spelled out
                       needs. The random model never ends earlier; n = 2 is a label that is one
                       token, and the end of text

Prints the median of each, the ratio to the first, and the floating-point operations of a judgement,
which bound the ratio where a device is bound by arithmetic. Judgements a CPU-second are for a busy
machine: run there on one core, since torch's threads spin while they wait for each other,

    OMP_NUM_THREADS=1 taskset -c 0 python launch/benchmarks/label.py --rows=2 --batch=2

Needs torch and transformers, which `pip install '.[test]'` brings. Compilation is not timed.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch may need its share

import jax
import numpy as np
from random_model import NUM_WORDS, SIZES, IdTokenizer, random_model

from selfrag_jax.checkpoints.loading import LoadedModel
from selfrag_jax.critic.critic import Critic, CriticConfig, CritiquePrompt
from selfrag_jax.engine.shapes import bucket
from selfrag_jax.models.llama import LlamaConfig
from selfrag_jax.records import Passage
from selfrag_jax.text.prompts import CritiqueQuery
from selfrag_jax.text.tokenizer import Control

LENGTH_BUCKET = 32
SYLLABLES = ("ra", "to", "mi", "sel", "ken", "dor", "ual", "is", "pem", "cy")


class HashTokenizer(IdTokenizer):
    """A stand-in for a tokenizer of text: words of six letters are a token, longer ones two."""

    def encode(self, parts, before_control: bool = False) -> list[int]:
        ids: list[int] = []
        for part in parts:
            if isinstance(part, Control) and not part.token.startswith(("#", "\n\n#")):
                ids.append(self.id(part.token))
                continue
            text = part.token if isinstance(part, Control) else part
            for word in re.findall(r"\w+|[^\w\s]|\n", text):
                pieces = [word] if len(word) <= 6 else [word[:5], word[5:]]
                ids += [100 + zlib.crc32(p.encode()) % (NUM_WORDS - 100) for p in pieces]
        return ids


def make_queries(rows: int) -> list[CritiqueQuery]:
    """What labelling asks about a segment of each row: five passages, both needs, the use."""
    rng = random.Random(0)

    def words(n: int) -> str:
        n = max(1, round(n * rng.uniform(0.6, 1.4)))
        return " ".join("".join(rng.choices(SYLLABLES, k=rng.randint(1, 3))) for _ in range(n))

    out = []
    for _ in range(rows):
        instruction, sentence, before = words(20), words(20), words(20)
        passages = [Passage(str(i), words(2), words(100)) for i in range(5)]
        out.append(CritiqueQuery("retrieve", instruction))
        out.append(CritiqueQuery("retrieve", instruction, before, passages[0]))
        out.append(CritiqueQuery("isuse", instruction, output=f"{before} {sentence}"))
        out += [CritiqueQuery("isrel", instruction, evidence=p) for p in passages]
        out += [CritiqueQuery("issup", instruction, evidence=p, output=sentence) for p in passages]
    return out


# ---- theirs --------------------------------------------------------------------------------------
def generator(
    loaded: LoadedModel, prompts: list[CritiquePrompt], batch: int
) -> Callable[[int], None]:
    """A function that asks all prompts by generating up to n tokens."""
    import torch
    from released_on_torch import ReleasedOnTorch

    theirs = ReleasedOnTorch(loaded.model.config, loaded.params)
    pad = IdTokenizer.pad_id

    def generate(n: int) -> None:
        for start in range(0, len(prompts), batch):
            some = [prompt.ids for prompt in prompts[start : start + batch]]
            longest = max(map(len, some))
            rows = [[pad] * (longest - len(ids)) + list(ids) for ids in some]
            mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in some]
            with torch.inference_mode():
                out = theirs.model.generate(
                    torch.tensor(rows, device=theirs.device),
                    attention_mask=torch.tensor(mask, device=theirs.device),
                    max_new_tokens=n,
                    do_sample=False,
                    pad_token_id=pad,
                )
            out.cpu()

    return generate


# ---- operations ----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Operations:
    """Floating-point operations of a Llama, products of weights and of attention alone."""

    config: LlamaConfig

    def reading(self, tokens: float, after: float = 0) -> float:
        """Of reading tokens that follow others."""
        c = self.config
        heads = c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
        weights = c.num_layers * c.embed_dim * (heads + 3 * c.mlp_dim)
        pairs = tokens * (after + tokens / 2) * c.num_layers * c.num_heads * c.head_dim
        return 2 * weights * tokens + 4 * pairs

    @property
    def logits(self) -> float:
        """Of one position's logits over the vocabulary."""
        return 2 * self.config.embed_dim * self.config.vocab_size

    def generating(self, tokens: float, n: int) -> float:
        return self.reading(tokens + n - 1) + n * self.logits


def compare(args: argparse.Namespace) -> dict[str, float]:
    """Prints the table; returns the judgements a second of each way."""
    model, params = random_model(args.size, None)
    loaded = LoadedModel(model, params, HashTokenizer())  # type: ignore[arg-type]
    shared = Critic(loaded, CriticConfig(args.batch, LENGTH_BUCKET, False))
    whole = Critic(loaded, CriticConfig(args.batch, LENGTH_BUCKET, False, min_shared=0))
    prompts = shared.prompts(make_queries(args.rows))
    generate = generator(loaded, prompts, args.their_batch)

    ways: dict[str, Callable[[], object]] = {
        "shared prefix": lambda: shared.judge_prompts(prompts),
        "whole prompts": lambda: whole.judge_prompts(prompts),
    }
    for n in args.new:
        ways[f"generating {n}"] = lambda n=n: generate(n)
    both = [np.concatenate(ways[name]()) for name in ("shared prefix", "whole prompts")]  # type: ignore[arg-type]
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for i in range(args.rounds):
        for name, run in ways.items():
            begin, cpu = time.perf_counter(), time.process_time()
            run()
            took = time.perf_counter() - begin, time.process_time() - cpu
            seconds[name].append(took)
            print(f"round {i + 1}: {name} {took[0]:.1f} s", file=sys.stderr, flush=True)

    lengths = [len(p.ids) for p in prompts]
    prefixes = [len(shared.shared_prefix(p.group)) for p in prompts]
    ops, n, mean = Operations(model.config), len(prompts), float(np.mean(lengths))
    after = [ops.reading(t - s, s) + ops.logits for t, s in zip(lengths, prefixes, strict=True)]
    operations = {
        "shared prefix": float(np.mean(after)),
        "whole prompts": float(np.mean([ops.reading(t) + ops.logits for t in lengths])),
    }
    for new in args.new:
        operations[f"generating {new}"] = float(np.mean([ops.generating(t, new) for t in lengths]))
    padded = [bucket(t - s, LENGTH_BUCKET) for t, s in zip(lengths, prefixes, strict=True)]
    print(
        f"{n} judgements, {mean:.0f} tokens on average, {np.mean(prefixes):.0f} of them in the "
        f"shared prefix (what follows it is {np.mean(padded):.0f} padded); batches of {args.batch} "
        f"and {args.their_batch}; {args.size}, {model.config.dtype}, "
        f"{jax.devices()[0].device_kind}, {args.rounds} rounds"
    )
    print(
        f"largest difference of a probability with the prefix: {abs(both[0] - both[1]).max():.1e}"
    )
    print(
        f"{'':16}{'judgements/s':>13}{'ratio':>7}{'a CPU-s':>9}{'ratio':>7}{'GFLOP each':>12}"
        f"{'ratio':>7}"
    )
    medians = {name: np.median(times, axis=0) for name, times in seconds.items()}
    (first, first_cpu), least = medians["shared prefix"], operations["shared prefix"]
    for name, (median, cpu) in medians.items():
        work = operations[name]
        print(
            f"{name:16}{n / median:13.2f}{first / median:7.2f}{n / cpu:9.2f}{first_cpu / cpu:7.2f}"
            f"{work / 1e9:12.2f}{work / least:7.2f}"
        )
    return {name: n / float(median) for name, (median, _) in medians.items()}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--size", choices=SIZES, default="100m", help="tiny: to try the script")
    p.add_argument("--rows", type=int, default=8, help="of 13 judgements each")
    p.add_argument("--rounds", type=int, default=3, help="the median counts")
    p.add_argument("--batch", type=int, default=8, help="of ours")
    p.add_argument("--their_batch", type=int, default=10, help="the released script's default")
    p.add_argument(
        "--new",
        type=lambda text: [int(n) for n in text.split(",")],
        default=[15, 2],
        help="tokens to generate; the released script's default is 15",
    )
    return p.parse_args(argv)


def main() -> None:
    compare(parse_arguments())


if __name__ == "__main__":
    main()
