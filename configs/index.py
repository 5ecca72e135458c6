"""Encoder and index of a corpus.

    selfrag index --passages=corpus.tsv --out=index

embeds with the hashed encoder (words and trigrams, no download), and builds the fastest index that
half of the free memory holds. For meaning rather than words, name a model:

    selfrag index --passages=corpus.tsv --encoder=sentence-transformers/all-MiniLM-L6-v2 --out=index

Variant `wikipedia`: the paper's retriever, Contriever-MSMARCO over DPR's 21,015,324 passages
(psgs_w100.tsv.gz, 4.5 GB):

    selfrag index --config=index:wikipedia --passages=psgs_w100.tsv.gz --out=wikipedia

Disk: 14 GB of passages, 32 GB of vectors, 8 GB of codes. Memory: 7 GB; with --memory=24GB the
faster structure, which takes 23. Embedding takes most of the time: better on a TPU, or from the
published embeddings (`selfrag embed --vectors='passages_*'`). Whether a TPU slice can hold and
search all vectors, and how fast it can embed:

    selfrag compile --config=index:wikipedia --topology=v5e:2x4 --program=search
    selfrag compile --config=index:wikipedia --topology=v5e:2x4 --program=embed
"""

from ml_collections import ConfigDict


def get_config(variant: str = "any") -> ConfigDict:
    """variant: "any", or "wikipedia"."""
    if variant not in ("any", "wikipedia"):
        raise ValueError(f"unknown variant {variant!r}; index has any and wikipedia")
    wikipedia = variant == "wikipedia"
    c = ConfigDict()
    c.name, c.kind = "index:wikipedia" if wikipedia else "index", "index"
    c.encoder = dict(
        name="facebook/contriever-msmarco" if wikipedia else "hashed",
        dim=384,  # of the hashed encoder
        word_weight=2.0,
        dtype="bfloat16" if wikipedia else "float32",
        vector_dtype="float16",
        rows_per_file=65_536,
    )
    c.index = dict(
        structure="auto",
        memory="10GB" if wikipedia else "",
        exact_below=20_000,
        part_size=4_000_000,
        leaves=2000,
        leaves_search_fraction=0.05,
        candidates=200,
        sample=100_000,
        recall_queries=200,
        seed=0,
    )
    if wikipedia:  # sizes for `selfrag compile`
        # A passage is a title and 100 words; the average of its tokens is an estimate.
        c.corpus = dict(passages=21_015_324, dim=768, tokens_per_passage=140)
        c.encoder_architecture = dict(  # BERT base, uncased: that of Contriever
            vocab_size=30_522,
            embed_dim=768,
            mlp_dim=3072,
            num_layers=12,
            num_heads=12,
            max_length=512,
            num_types=2,
            norm_eps=1e-12,
            activation="gelu",
        )
    return c
