"""What accelerator.py measures: a function and a row of the README for each piece."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Figures = dict[str, Any]


@dataclass(frozen=True)
class Piece:
    measures: str
    run: Callable[[bool], Figures]  # whether it is small
    row: Callable[[Figures], str]  # cells for the README
    needs_torch: bool = False  # on the same device


# ---- training ------------------------------------------------------------------------------------
def train_1b(small: bool) -> Figures:
    import train_step

    flags = ["--size=1b", "--length=2048", "--dtype=bfloat16", "--loss_chunk=512", "--steps=10"]
    tiny = ["--size=tiny", "--vocabulary=500", "--rows=2", "--length=32", "--steps=2"]
    return train_step.measure_ours(train_step.parse_arguments(tiny if small else flags))


def train_1b_torch(small: bool) -> Figures:
    import train_step

    flags = ["--size=1b", "--length=2048", "--dtype=bfloat16", "--loss_chunk=512", "--rounds=1"]
    tiny = ["--size=tiny", "--vocabulary=500", "--rows=2", "--length=32", "--steps=2"]
    return train_step.compare(train_step.parse_arguments(tiny if small else flags))


def attention(small: bool) -> Figures:
    """The platform's kernel beside plain XLA: the largest difference, and the time of each."""
    import jax
    import jax.numpy as jnp

    from selfrag_jax.models.attention_kernels import causal_attention, choose_kernel

    rows, length, heads, dim = (1, 128, 2, 128) if small else (4, 2048, 32, 128)
    kernel = choose_kernel("auto", length, dim, "bfloat16")
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (rows, length, heads, dim), jnp.bfloat16) for key in keys)
    out, figures = {}, {"kernel": kernel}
    for name in dict.fromkeys((kernel, "xla")):
        f = jax.jit(lambda q, k, v, name=name: causal_attention(q, k, v, None, None, name))
        out[name] = f(q, k, v)
        figures[f"{name}_ms"] = 1e3 * _seconds(lambda f=f: f(q, k, v))
    difference = out[kernel].astype(jnp.float32) - out["xla"].astype(jnp.float32)
    return figures | {"largest_difference": float(jnp.abs(difference).max())}


# ---- answering -----------------------------------------------------------------------------------
def _answer_arguments(small: bool, *flags: str) -> argparse.Namespace:
    import answer

    tiny = ["--size=tiny", "--questions=4", "--passages=2", "--new=30", "--rounds=1"]
    return answer.parse_arguments([*(tiny if small else ["--size=7b"]), *flags])


def generate_7b(small: bool) -> Figures:
    import answer

    return {"rows": answer.bandwidth(_answer_arguments(small, "--bandwidth"))}


def generate_7b_int8(small: bool) -> Figures:
    import answer

    return {"rows": answer.bandwidth(_answer_arguments(small, "--bandwidth", "--int8"))}


def short_7b(small: bool) -> Figures:
    import answer

    return answer.compare(_answer_arguments(small), "short")


def long_7b(small: bool) -> Figures:
    import answer

    flags = () if small else ("--questions=8", "--rounds=1")
    return answer.compare(_answer_arguments(small, *flags), "long")


def retrieval_7b(small: bool) -> Figures:
    import answer

    return answer.retrieval(_answer_arguments(small, f"--retrieval={20 if small else 500}"))


def judge_7b(small: bool) -> Figures:
    import label

    flags = ["--size=7b", "--rows=40", "--batch=64"]
    tiny = ["--size=tiny", "--rows=1", "--rounds=1", "--new=3"]
    return label.compare(label.parse_arguments(tiny if small else flags))


# ---- retrieval -----------------------------------------------------------------------------------
def embed(small: bool) -> Figures:
    """An encoder of Contriever's size, passages of 128 tokens, bf16."""
    import jax
    import jax.numpy as jnp

    from selfrag_jax.models import roofline
    from selfrag_jax.models.encoder import BertConfig, Encoder

    size = (1000, 32, 64, 2, 2) if small else (30_522, 768, 3072, 12, 12)
    rows, length = (4, 16) if small else (512, 128)
    encoder = Encoder(BertConfig(*size, 512, 2, 1e-12, "gelu", "bfloat16"))
    params = encoder.init(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (rows, length), 5, size[0])
    lengths = jnp.full(rows, length)
    run = jax.jit(lambda p, t, n: encoder.embed(p, t, n, "mean", False))
    rate = rows / _seconds(lambda: run(params, tokens, lengths))
    figures: Figures = {"passages_per_second": rate}
    if chip := roofline.chip(jax.devices()[0].device_kind):
        flops = roofline.encoder_flops_per_token(encoder.config, length) * length
        figures["share_of_peak"] = rate * flops / chip.bf16_flops
    return figures


def search(small: bool) -> Figures:
    """All vectors of a corpus against 64 queries, exactly and approximately; recall of the latter.

    A quarter of Wikipedia, so that every card holds it: 5 million x 768 in bf16 are 7.7 GB.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from selfrag_jax.models import sharding
    from selfrag_jax.retrieval.device_search import QUERIES, padded_rows, search_program

    n, dim, k = (1000, 32, 10) if small else (5_000_000, 768, 10)
    mesh = sharding.make_mesh(data=-1, devices=jax.local_devices()[:1])
    make = jax.jit(
        lambda key: jax.random.normal(key, (padded_rows(n, 1), dim), jnp.bfloat16),
        out_shardings=jax.NamedSharding(mesh, jax.P(sharding.AXES)),
    )
    vectors, found = make(jax.random.key(0)), {}
    queries = np.random.default_rng(0).standard_normal((QUERIES, dim), np.float32)
    figures: Figures = {"vectors": n}
    for name, approximate in (("exact", False), ("approximate", True)):
        run = search_program(mesh, k, n, approximate)
        found[name] = np.asarray(run(vectors, queries)[1])
        seconds = _seconds(lambda run=run: run(vectors, queries))
        figures[f"{name}_queries_per_second"] = QUERIES / seconds
        figures[f"{name}_bytes_per_second"] = vectors.nbytes / seconds
    same = [np.intersect1d(*rows).size / k for rows in zip(*found.values(), strict=True)]
    return figures | {"recall": float(np.mean(same))}


def _seconds(run: Callable[[], Any], rounds: int = 10) -> float:
    """Returns the median seconds of a call, without the first, which compiles."""
    import jax

    times = []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - begin)
    return sorted(times[1:])[rounds // 2]


# ---- rows of the README --------------------------------------------------------------------------
def _share(figures: Figures, name: str) -> str:
    return f"{100 * figures[name]:.1f}%" if name in figures else "unknown share"


def _beside(unit: str) -> Callable[[Figures], str]:
    def row(f: Figures) -> str:
        return f"{f['theirs']:.4g} {unit} | {f['ours']:.4g} | {f['ratio']:.2f}"

    return row


def _train_row(f: Figures) -> str:
    memory = f"{f['peak_bytes'] / 1e9:.1f} GB" if "peak_bytes" in f else ""
    return f"{f['tokens_per_second']:.0f} tokens/s | MFU {_share(f, 'mfu')} | {memory}"


def _bandwidth_row(f: Figures) -> str:
    copies = f["rows"][0]["copies_bytes_per_second"] / 1e9
    shares = ", ".join(f"{r['questions']}: {100 * r['share_of_copies']:.0f}%" for r in f["rows"])
    best = max(r["tokens_per_second"] for r in f["rows"])
    return f"copies {copies:.0f} GB/s | {shares} | {best:.0f} tokens/s at most"


def _attention_row(f: Figures) -> str:
    kernel, difference = f["kernel"], f["largest_difference"]
    own = f"{kernel} {f[f'{kernel}_ms']:.3g} ms"
    return f"{own} | xla {f['xla_ms']:.3g} ms | largest difference {difference:.1e}"


def _embed_row(f: Figures) -> str:
    peak = _share(f, "share_of_peak")
    return f"{f['passages_per_second']:.0f} passages/s | {peak} of the peak"


def _search_row(f: Figures) -> str:
    return (
        f"exact {f['exact_queries_per_second']:.0f} queries/s | approximate "
        f"{f['approximate_queries_per_second']:.0f} | recall {f['recall']:.3f}"
    )


def _wait_row(f: Figures) -> str:
    return (
        f"others wait {f['waiting']:.1f} s | as it is {f['overlapping']:.1f} | "
        f"found at once {f['at_once']:.1f}"
    )


def _judge_row(f: Figures) -> str:
    return " | ".join(f"{name} {rate:.2f} judgements/s" for name, rate in f.items())


PIECES = {
    "train_1b": Piece(
        "training a 1B model, 4 x 2048 tokens, bf16: MFU, memory", train_1b, _train_row
    ),
    "train_1b_torch": Piece(
        "training a 1B model beside torch", train_1b_torch, _beside("tokens/s"), True
    ),
    "attention": Piece("the attention kernel beside plain XLA", attention, _attention_row),
    "generate_7b": Piece(
        "generating at 7B, bf16, by questions at once: share of the card's copies",
        generate_7b,
        _bandwidth_row,
    ),
    "generate_7b_int8": Piece(
        "generating at 7B with int8 kernels: the same share", generate_7b_int8, _bandwidth_row
    ),
    "short_7b": Piece(
        "short form at 7B beside the released algorithm", short_7b, _beside("questions/s"), True
    ),
    "long_7b": Piece(
        "long form at 7B beside the released algorithm", long_7b, _beside("questions/s"), True
    ),
    "retrieval_7b": Piece("7B, passages that take half a second to find", retrieval_7b, _wait_row),
    "judge_7b": Piece(
        "a 7B critic's judgements beside asking it by generation", judge_7b, _judge_row, True
    ),
    "embed": Piece("embedding at Contriever's size, bf16", embed, _embed_row),
    "search": Piece("search of 5 million vectors on one device", search, _search_row),
}
