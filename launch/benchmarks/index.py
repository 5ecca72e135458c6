"""Compares the index with FAISS: recall, speed, memory, disk and building time, in one run.

    python launch/benchmarks/index.py                      # 1M x 768: 50 minutes, 12 GB of disk
    python launch/benchmarks/index.py --passages=100000    # 5 minutes
    python launch/benchmarks/index.py --only=codes,int8    # ours alone

The vectors are generated (vectors.py) and stored once as float16; everybody builds from that file.
Each index is built in a process of its own, and searched in another, so that memory is its own.
Memory is what the process took beside the file cache (RssAnon), without what it had before.
Queries are held out, and come in one batch of 2,000. Each index is searched with settings from fast
to thorough; the table shows the fastest with a recall@10 of at least 0.95, or else the best. One
core and two are measured by binding the process to them.

FAISS: `pip install faiss-cpu`. Its indexes are those that its guidelines name for this size:
IVF-PQ with 4-bit fast-scan codes as long as ours, alone and refined by 8-bit vectors, HNSW, flat.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

K, RECALL, NUM_QUERIES, NUM_EXACT = 10, 0.95, 2000, 200
OURS = ("exact", "int8", "codes", "codes4")
FAISS = {
    "faiss flat": "Flat",
    "faiss ivf-pq": "IVF{leaves},PQ{blocks}x4fs",
    "faiss ivf-pq, refined": "IVF{leaves},PQ{blocks}x4fs,Refine(SQ8)",
    "faiss hnsw": "HNSW32",
}
PROBES = (1, 2, 4, 8, 16, 32)  # leaves
CANDIDATES = (20, 30, 50, 100)  # rescored


# ---- what is measured ----------------------------------------------------------------------------
def anonymous_memory() -> int:
    """Bytes of this process that are not file cache."""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("RssAnon"))


class Peak:
    """Samples the memory within a `with` block; `bytes` is the most above the start."""

    def __enter__(self):
        self._before, self.bytes, self._stop = anonymous_memory(), 0, threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self):
        while not self._stop.wait(0.02):
            self.bytes = max(self.bytes, anonymous_memory() - self._before)

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def disk_bytes(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def recall(found: np.ndarray, exact: np.ndarray) -> float:
    return sum(len(np.intersect1d(a, b)) for a, b in zip(found, exact, strict=True)) / exact.size


# ---- ours ----------------------------------------------------------------------------------------
def write_embeddings(args, folder: Path) -> None:
    """What `selfrag embed` would leave, with generated vectors."""
    from vectors import ClusteredVectors

    from selfrag_jax import artifacts
    from selfrag_jax.records import Passage
    from selfrag_jax.retrieval.corpus import Corpus, write_tsv
    from selfrag_jax.retrieval.hashed import HashedEncoder
    from selfrag_jax.retrieval.passages import write_passages
    from selfrag_jax.retrieval.vectors import VectorLayout, write_vectors

    corpus = folder.parent / "passages.tsv"
    write_tsv(corpus, (Passage(str(i), "", f"passage {i}") for i in range(args.passages)))
    write_passages(Corpus(corpus), folder / "passages")
    (folder / "encoder").mkdir()
    HashedEncoder.fit(args.dim, 2.0, ["passage"]).save(folder / "encoder")
    generated = ClusteredVectors(args.passages, args.dim)
    layout = VectorLayout(args.passages, args.dim, "float16", 50_000)
    layout.write(folder / "vectors")
    for i, block in enumerate(generated.blocks()):
        write_vectors(layout.file(folder / "vectors", i), block.astype(np.float16), i * 50_000)
    queries = generated.queries(NUM_QUERIES)
    np.save(folder / "queries.npy", queries)
    artifacts.write_manifest(folder, "embed", {}, {}, {})


def write_exact_results(folder: Path) -> None:
    from selfrag_jax.retrieval.vectors import VectorFiles, search_exactly

    queries = np.load(folder / "queries.npy")
    rows, _ = search_exactly(VectorFiles(folder / "vectors"), queries, K, 1 << 15)
    np.save(folder / "exact.npy", rows)


def our_config(name: str):
    from selfrag_jax.retrieval.plan import IndexConfig

    structure = "codes" if name == "codes4" else name
    return IndexConfig(structure=structure, memory="1TB", recall_queries=0)


def build_ours(args, name: str, embeddings: Path, out: Path) -> None:
    from selfrag_jax.commands import index
    from selfrag_jax.retrieval import plan

    if name == "codes4":  # what the planner takes when memory is too short for codes of two
        index.plan = lambda rows, dim, config: next(
            p for p in plan._options(rows, dim, config) if p.dims_per_block == 4
        )
    index.build_index(embeddings, our_config(name), out)


def open_ours(name: str, out: Path, embeddings: Path):
    """Returns a search function, and its settings from fast to thorough."""
    from selfrag_jax.retrieval.index import Index

    opened = Index(out)
    opened.search(np.zeros((64, opened.encoder.dim), np.float32) + 0.01, K)  # starts the threads

    def search(queries, setting):
        leaves, opened.candidates = setting
        return opened.search(queries, K, leaves)[0]

    if name == "exact":
        return search, [(1, 10)]
    candidates = (100, 200) if name == "codes4" else CANDIDATES
    return search, [(leaves, c) for leaves in PROBES for c in candidates]


# ---- FAISS ---------------------------------------------------------------------------------------
def build_faiss(args, name: str, embeddings: Path, out: Path) -> None:
    import faiss

    from selfrag_jax.retrieval.vectors import VectorFiles

    vectors = VectorFiles(embeddings / "vectors")
    leaves = min(2000, int(args.passages**0.5))
    spec = FAISS[name].format(leaves=leaves, blocks=args.dim // 2)
    built = faiss.index_factory(args.dim, spec, faiss.METRIC_INNER_PRODUCT)
    if not built.is_trained:
        built.train(vectors.sample(100_000, 0, 0, len(vectors)))
    for block in vectors.blocks(50_000):
        built.add(block.astype(np.float32))
    out.mkdir()
    faiss.write_index(built, str(out / "index.faiss"))


def open_faiss(name: str, out: Path, embeddings: Path):
    import faiss

    opened = faiss.read_index(str(out / "index.faiss"))
    faiss.omp_set_num_threads(len(os.sched_getaffinity(0)))
    inner = opened
    if "refined" in name:
        opened.k_factor = 10
        inner = faiss.downcast_index(opened.base_index)

    def search(queries, setting):
        if "ivf" in name:
            faiss.extract_index_ivf(inner).nprobe = setting[0]
            if "refined" in name:
                opened.k_factor = setting[1] / K
        elif "hnsw" in name:
            opened.hnsw.efSearch = setting[0]
        return opened.search(queries, K)[1]

    if "ivf" in name:
        return search, [(p, c) for p in PROBES for c in (CANDIDATES if "ref" in name else (0,))]
    if "hnsw" in name:
        return search, [(ef,) for ef in (16, 32, 64, 128, 256, 512)]
    return search, [()]


# ---- one index, in a process of its own ----------------------------------------------------------
def run_build(args, name: str, embeddings: Path, out: Path) -> dict:
    build = build_ours if name in OURS else build_faiss
    start, cpu = time.monotonic(), cpu_seconds()
    with Peak() as peak:
        build(args, name, embeddings, out)
    linked = 0
    if name in OURS:
        linked = sum(disk_bytes(embeddings / part) for part in ("passages", "vectors", "encoder"))
    return {
        "build_seconds": time.monotonic() - start,
        "build_cpu_seconds": cpu_seconds() - cpu,
        "build_peak": peak.bytes,
        "disk": max(0, disk_bytes(out) - linked),
    }


def run_search(args, name: str, embeddings: Path, out: Path) -> dict:
    queries, exact = np.load(embeddings / "queries.npy"), np.load(embeddings / "exact.npy")
    if name in OURS:
        from selfrag_jax.retrieval.index import Index  # noqa: F401, not counted as the index's
    else:
        import faiss  # noqa: F401
    before = anonymous_memory()
    with Peak() as peak:
        search, settings = (open_ours if name in OURS else open_faiss)(name, out, embeddings)
    flat = name in ("exact", "faiss flat")
    if flat:
        queries, exact = queries[:NUM_EXACT], exact[:NUM_EXACT]
    result = {"resident": anonymous_memory() - before, "open_peak": peak.bytes, "curve": []}
    search(queries[:100], settings[0])
    for setting in settings:
        start = time.monotonic()
        found = search(queries, setting)
        rate = len(queries) / (time.monotonic() - start)
        result["curve"].append((setting, recall(found, exact), rate))
    good = [point for point in result["curve"] if point[1] >= RECALL]
    best = max(good, key=lambda p: p[2]) if good else max(result["curve"], key=lambda p: p[1])
    rates = []
    for _ in range(3):
        start = time.monotonic()
        search(queries, best[0])
        rates.append(len(queries) / (time.monotonic() - start))
    return result | {"setting": best[0], "recall": best[1], "rate": sorted(rates)[1]}


def child(arguments: list[str], cores: int | None = None) -> dict:
    """Runs this script on some cores; returns the JSON of its last line."""

    def bind():
        if cores is not None:
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])

    done = subprocess.run(
        [sys.executable, __file__, *arguments], preexec_fn=bind, stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        sys.exit(f"{' '.join(arguments)} failed")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--passages", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--folder", default="index_benchmark", help="for vectors and indexes")
    parser.add_argument("--only", default=",".join(["int8", "codes", "codes4", *FAISS]))
    parser.add_argument("--out", default="", help="JSON file for all curves")
    parser.add_argument("--step", default="", help=argparse.SUPPRESS)  # of a child process
    args = parser.parse_args()
    folder = Path(args.folder)
    embeddings = folder / "embeddings"
    if args.step:
        name = args.only
        out = folder / name.replace(" ", "_").replace(",", "")
        step = {"build": run_build, "search": run_search}.get(args.step)
        if step is None:
            write_embeddings(args, embeddings)
            write_exact_results(embeddings)
        print(json.dumps(step(args, name, embeddings, out) if step else {}))
        return
    common = [f"--passages={args.passages}", f"--dim={args.dim}", f"--folder={folder}"]
    if not (embeddings / "exact.npy").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        embeddings.mkdir(parents=True)
        child([*common, "--step=data"])
    print(f"{args.passages:,} x {args.dim}, {time.strftime('%Y-%m-%d')}; recall@{K}")
    print(
        "| index | recall | queries/s, 1 core | 2 cores | B/vector in memory | on disk | "
        "build, CPU s | peak of the build, GB |\n|---|---|---|---|---|---|---|---|"
    )
    rows, names = {}, [n.strip() for n in args.only.replace(", ", ";").split(",")]
    for name in [n.replace(";", ", ") for n in names]:
        out = folder / name.replace(" ", "_").replace(",", "")
        built_file = folder / f"{out.name}.json"
        if not built_file.is_file():
            shutil.rmtree(out, ignore_errors=True)
            built = child([*common, f"--only={name}", "--step=build"])
            built_file.write_text(json.dumps(built))
        row = json.loads(built_file.read_text())
        two = child([*common, f"--only={name}", "--step=search"], 2)
        one = child([*common, f"--only={name}", "--step=search"], 1)
        rows[name] = row | {"two_cores": two, "one_core": one}
        n = args.passages
        print(
            f"| {name}, {'/'.join(map(str, one['setting'])) or 'all'} | {one['recall']:.3f} | "
            f"{one['rate']:,.0f} | {two['rate']:,.0f} | {two['resident'] / n:,.0f} | "
            f"{row['disk'] / n:,.0f} | {row['build_cpu_seconds']:,.0f} | "
            f"{row['build_peak'] / 1e9:.2f} |",
            flush=True,
        )
    if args.out:
        Path(args.out).write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
