"""Peak memory of `selfrag embed` and `selfrag index`: it should not grow with the corpus.

    python launch/benchmarks/memory.py                        # 30,000 and 300,000 passages
    python launch/benchmarks/memory.py --passages=30000

Generates a corpus of N passages of 100 words, and one of N/10. Runs both commands on each, in
processes of their own (hashed encoder, ScaNN codes), and prints the largest memory of each: what is
the process's own (RssAnon), and with the pages of mapped files that happen to be in memory (VmRSS).
The system takes the latter back when it needs memory.

`embed` holds the texts of one file of vectors and of the next. So both corpora must have several
files: here a file has 8,192 passages (--rows_per_file), by default it has 65,536.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np

_VOCABULARY, _BLOCK = 50_000, 4096
_INTERVAL = 0.05  # seconds between two samples


def passages(n: int, num_words: int, seed: int = 0) -> Iterator:
    """Yields passages of random words, frequent and rare ones as in natural text."""
    from selfrag_jax.records import Passage

    rng = np.random.default_rng(seed)
    letters = np.array(list("etaoinshrdlcumwfgypbvk"))
    words = ["".join(rng.choice(letters, rng.integers(2, 10))) for _ in range(_VOCABULARY)]
    odds = 1 / np.arange(10, _VOCABULARY + 10)
    odds /= odds.sum()
    for start in range(0, n, _BLOCK):
        chosen = rng.choice(_VOCABULARY, (min(_BLOCK, n - start), num_words), p=odds)
        for i, row in enumerate(chosen.tolist(), start):
            text = " ".join([words[word] for word in row])
            yield Passage(str(i), words[row[0]], text)


def memory_of(pid: int) -> tuple[int, int]:
    """(RssAnon, VmRSS) of a process in bytes; zeros if it has ended."""
    try:
        with open(f"/proc/{pid}/status") as f:
            fields = dict(line.split(":", 1) for line in f)
        own, total = (int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "VmRSS"))
    except (OSError, KeyError):
        return 0, 0
    return own, total


def run(*arguments: str) -> tuple[int, int, float]:
    """Runs a command; returns its largest own and total memory, and its seconds."""
    start, most, total = time.monotonic(), 0, 0
    command = [sys.executable, "-m", "selfrag_jax", *arguments]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            now = memory_of(process.pid)
            most, total = max(most, now[0]), max(total, now[1])
            time.sleep(_INTERVAL)
    if process.returncode:
        sys.exit(f"selfrag {arguments[0]} failed")
    return most, total, time.monotonic() - start


def measure(n: int, args, folder: Path) -> dict[str, tuple[int, int, float]]:
    from selfrag_jax.retrieval.corpus import write_tsv

    corpus = folder / "passages.tsv"
    write_tsv(corpus, passages(n, args.words))
    embeddings, out = folder / "embeddings", folder / "index"
    encoder = f"--config.encoder.dim={args.dim}", f"--config.encoder.rows_per_file={args.rows}"
    embed = run(
        "embed", f"--passages={corpus}", "--encoder=hashed", *encoder, f"--out={embeddings}"
    )
    budget = f"--memory={args.memory}"
    index = run("index", f"--embeddings={embeddings}", "--structure=codes", budget, f"--out={out}")
    return {"embed": embed, "index": index}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--passages", type=int, default=300_000)
    parser.add_argument("--words", type=int, default=100, help="of a passage")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--memory", default="2GB", help="budget of the index")
    parser.add_argument("--rows_per_file", dest="rows", type=int, default=8192)
    args = parser.parse_args()
    print("| command | passages | own memory, MB | with mapped files, MB | seconds |")
    print("|---|---|---|---|---|")
    found = {}
    for n in (max(1, args.passages // 10), args.passages):
        with tempfile.TemporaryDirectory() as folder:
            found[n] = measure(n, args, Path(folder))
        for name, (own, total, seconds) in found[n].items():
            print(f"| {name} | {n:,} | {own / 1e6:,.0f} | {total / 1e6:,.0f} | {seconds:,.0f} |")
        sys.stdout.flush()
    few, many = found
    for name in found[many]:
        growth = (found[many][name][0] - found[few][name][0]) / (many - few)
        print(f"{name}: {growth:,.0f} bytes more for each passage more")


if __name__ == "__main__":
    main()
