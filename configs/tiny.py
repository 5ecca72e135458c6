"""Runs the quickstart: all of Self-RAG in the embedded synthetic world, on a laptop.

    selfrag quickstart --workdir=W
    selfrag quickstart --workdir=W --config=tiny:smoke  # a small run for tests; scores mean nothing

Time: 7 minutes on two cores, 12 on one (measured). Hardware: two CPU cores, 2 GB. Scores to expect:
see the results table in selfrag_jax/world/README.md.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

# The base model reads and writes verdicts as words. Tokens that start as those words need not be
# learned from nothing.
NEW_ROWS = (
    ("[Relevant]", "yes"),
    ("[Irrelevant]", "no"),
    ("[Fully supported]", "yes"),
    ("[Partially supported]", "partly"),
    ("[No support / Contradictory]", "no"),
    ("[Utility:5]", "yes"),
    ("[Utility:3]", "partly"),
    ("[Utility:2]", "no"),
    ("[Utility:1]", "no"),
)

# The architecture of base = "scratch".
SCRATCH = dict(
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
    embed_std=0.5,
)


def _optimizer(rate: float) -> ConfigDict:
    return ConfigDict(
        dict(
            name="muon",
            learning_rate=rate,
            # The base model's own rows and norms must barely move, or its skills are lost within a
            # few steps. The rows of new tokens have far to go.
            adam_learning_rate=0.002,
            new_rows_factor=10.0,
            schedule="cosine",
            warmup_fraction=0.05,
            adam_eps=1e-5,
            weight_decay=0.0,
            clip=1.0,
        )
    )


def _train(steps: int, rows: int, max_targets: int, seed: int, save_every: int) -> ConfigDict:
    return ConfigDict(
        dict(
            seed=seed,
            steps=steps,
            rows=rows,
            length=192,
            max_targets=max_targets,
            optimizer=_optimizer(0.006),
            mesh=dict(data=1, fsdp=1, tensor=1, slices=None),
            save_every=save_every,
            log_every=20,
        )
    )


def _world(pick: Callable) -> dict:
    return dict(
        seed=0,
        vocabulary="world",
        known=pick(8, 4),  # two of each kind
        train=pick(560, 60),
        test=pick(150, 12),
        distractors=pick(150, 12),
        values_per_kind=16,
        person_share=0.6,
        look_alike_rate=0.5,
        known_look_alike_rate=0.3,
        instructions=pick(2400, 120),
        # 21% of all rows: those on well-known entities and common knowledge are never wrong.
        wrong_output_rate=0.3,
        questions_per_test_entity=2,
    )


def _answer(pick: Callable) -> dict:
    """Returns the section `answer`. pick(a, b) is a in the full run and b in the smoke run."""
    return dict(
        search=dict(
            mode="adaptive_retrieval",
            threshold=0.1,  # low, as nearly all answers on rare names are wrong without a passage
            normalise="yes_no",
            weights=dict(w_rel=1.0, w_sup=1.0, w_use=0.5, w_seq=1.0),
            beam_width=2,
            max_depth=pick(4, 2),
            ndocs=5,
            accumulate="mean",
            constraints=(),
            keep_passages=True,
            max_new_tokens=pick(24, 16),
            length_bucket=32,
            scorer="paper",
            temperature=0.0,
            top_p=1.0,
            seed=0,
        ),
        # Fewer than 8 slots are updated one at a time: the smoke run compiles one size, not two.
        batch=pick(50, 6),
        max_length=160,
        closed_set=False,  # in a vote, passages that state nothing outnumber the one that does
        dtype=None,
        quantization=None,
        tensor=1,
    )


def get_config(variant: str = "full") -> ConfigDict:
    """variant: "full", or "smoke" for a one-minute run."""
    if variant not in ("full", "smoke"):
        raise ValueError(f"unknown variant {variant!r}; tiny has full and smoke")
    full = variant == "full"

    def pick(a, b):
        return a if full else b

    c = ConfigDict()
    c.kind = "quickstart"
    c.seed = 0
    c.world_kind = "encyclopedia"
    c.world = _world(pick)
    c.encoder = dict(name="hashed", dim=384, word_weight=2.0, vector_dtype="float32")
    c.index = dict(structure="exact")
    c.retrieve_k = 5
    c.collect = dict(
        seed=0,
        teacher="rule",
        teacher_error_rate=0.02,
        share=(("retrieve", 1.0), ("isrel", 0.25), ("issup", 0.4), ("isuse", 0.6)),
        passages=5,
        per_group=(),
        balance=None,
        dev_share=0.0,
        max_characters=20_000,
    )
    # The small Llama that ships with the package; or "scratch", or the path of another model.
    c.base = "embedded"
    c.tokenizer = None  # as the base records it
    c.new_rows, c.scratch = NEW_ROWS, SCRATCH
    c.critic_weights = dict(retrieve=4.0, isrel=1.0, issup=1.0, isuse=2.0)
    # Relative to a text token's 1. Much of the text cannot be learned: guesses without evidence,
    # and wrong outputs.
    c.generator_weights = dict(retrieve=3.0, isrel=3.0, issup=3.0, isuse=2.0)
    # A critic learns one token per example, a generator whole answers: their batches differ.
    c.critic = _train(pick(280, 6), rows=12, max_targets=128, seed=1, save_every=pick(100, 2))
    # The baselines are trained with the generator's section.
    c.generator = _train(pick(280, 6), rows=8, max_targets=480, seed=2, save_every=pick(100, 2))
    c.generator.mask = "each"  # passages have no loss
    c.baseline_steps = dict(rag=None, closed=None)  # None: as the generator's
    c.label = dict(
        seed=0,
        critic=dict(batch=64, length_bucket=32, brief=True, min_shared=16),
        passages=3,
        variants=2,
        best_rate=0.5,
        chunk=pick(300, 40),
        retrieve_labels="critic",
        needs=dict(
            seed=0,
            shots=0,  # a base of the synthetic world answers only what it was fine-tuned to answer
            max_new_tokens=pick(24, 8),
            short_tokens=24,
            passages=3,
            dev_share=0.2,
            batch=pick(50, 8),
            length_bucket=32,
            max_length=192,
            threshold=None,
        ),
    )
    c.answer = _answer(pick)
    c.plain = dict(
        batch=pick(50, 12), max_length=224, max_new_tokens=pick(64, 16), length_bucket=64
    )
    # True: answers of one segment under other weights, and of adaptive retrieval, are made from
    # those that always and never retrieve, without a model. Here each system searches by itself.
    c.rescore = False
    c.report = dict(seed=0, examples=2000)  # answers in the page, the wrong ones first
    return c
