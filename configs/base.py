"""Makes the quickstart's small base model.

It has 1M parameters and is trained to compare, check, look up, copy, match and judge.

    selfrag base --workdir=W/base --out=my_base
    # A few steps, for tests; no gate:
    selfrag base --workdir=W/base --out=my_base --config=base:smoke

Time: about an hour. Hardware: one CPU core, 2 GB. Scores to expect: those of the model in
selfrag_jax/base_model/weights, which was made with these stages (its made.json has scores and
time).
"""

from ml_collections import ConfigDict

COMMAND = "selfrag base --workdir=W/base --out=selfrag_jax/base_model/weights"


def _train() -> ConfigDict:
    return ConfigDict(
        dict(
            seed=0,
            steps=0,  # each stage has its own, see _stages
            rows=6,
            length=192,
            max_targets=480,
            optimizer=dict(
                name="muon",
                learning_rate=0.02,
                adam_learning_rate=0.003,
                schedule="cosine",
                warmup_fraction=0.05,
                adam_eps=1e-8,
                weight_decay=0.0,
                clip=1.0,
            ),
            mesh=dict(data=1, fsdp=1, tensor=1),
            save_every=200,
            log_every=50,
        )
    )


def _stages() -> tuple:
    """Returns the stages of training, in order.

    Each has a name, steps, rows per batch, Muon's peak learning rate, the loss weight of copied
    text, the share of tempting questions, and its document families with their relative weights.
    """
    compare = (("compare", 1.0),)
    check = (("compare", 0.4), ("statements", 0.25), ("quiz", 0.35))
    read = (
        ("kinds", 0.35), ("quiz", 0.25), ("copy", 0.2), ("statements", 0.08), ("compare", 0.06),
        ("titles", 0.04), ("claim", 0.06), ("choice", 0.02), ("answers", 0.04),
    )  # fmt: skip
    match = (
        ("quiz", 0.42), ("copy", 0.18), ("kinds", 0.1), ("titles", 0.06), ("statements", 0.09),
        ("compare", 0.06), ("claim", 0.08), ("choice", 0.04), ("common", 0.04), ("answers", 0.06),
    )  # fmt: skip
    all_skills = (
        ("quiz", 0.38), ("statements", 0.14), ("copy", 0.1), ("titles", 0.05), ("compare", 0.08),
        ("kinds", 0.03), ("claim", 0.1), ("choice", 0.07), ("common", 0.05), ("answers", 0.08),
    )  # fmt: skip
    settle = (
        ("quiz", 0.46), ("statements", 0.15), ("copy", 0.1), ("kinds", 0.05), ("compare", 0.08),
        ("titles", 0.05), ("claim", 0.08), ("choice", 0.03), ("common", 0.03), ("answers", 0.06),
    )  # fmt: skip
    finish = (
        ("quiz", 0.48), ("titles", 0.12), ("statements", 0.13), ("compare", 0.1), ("copy", 0.06),
        ("claim", 0.08), ("choice", 0.02), ("kinds", 0.02), ("common", 0.02), ("answers", 0.12),
    )  # fmt: skip
    judge = (
        ("quiz", 0.42), ("answers", 0.3), ("copy", 0.1), ("statements", 0.08), ("compare", 0.08),
        ("titles", 0.06), ("claim", 0.03), ("kinds", 0.02), ("common", 0.02),
    )  # fmt: skip
    return (
        ("compare", 600, 6, 0.02, 1.0, 0.0, compare),
        ("check", 1200, 6, 0.02, 0.02, 0.0, check),
        ("read", 800, 12, 0.02, 1.0, 0.0, read),
        ("match", 800, 12, 0.02, 1.0, 0.0, match),
        ("all", 1200, 12, 0.02, 1.0, 0.0, all_skills),
        ("settle", 900, 12, 0.012, 1.0, 0.0, settle),
        ("finish", 1800, 12, 0.012, 1.0, 0.5, finish),
        ("judge", 1200, 12, 0.008, 1.0, 0.5, judge),
    )


def get_config(variant: str = "full") -> ConfigDict:
    """variant: "full", or "smoke" for a few steps of every stage."""
    if variant not in ("full", "smoke"):
        raise ValueError(f"unknown variant {variant!r}; base has full and smoke")
    full = variant == "full"

    c = ConfigDict()
    c.kind = "base"
    c.command = COMMAND
    c.seed = 0
    c.vocab_size = 4000  # an upper limit; the language needs fewer
    c.model = dict(
        embed_dim=128,
        mlp_dim=320,
        num_layers=4,
        num_heads=4,
        num_kv_heads=4,
        head_dim=32,
        max_length=512,
        rope_theta=10_000.0,
        norm_eps=1e-5,
        tie_embeddings=True,
        dtype="float32",
        remat="none",
        scan_unroll=4,
        embed_std=0.5,
    )
    c.data = dict(
        seed=1, vocabulary="base", family_weights=(), verdict_weight=1.0, passages=1, statements=2
    )
    c.train = _train()
    c.stages = tuple((name, steps if full else 3, *rest) for name, steps, *rest in _stages())
    c.gate = dict(seed=8, cases=1000 if full else 20, minimum=0.95 if full else 0.0)
    return c
