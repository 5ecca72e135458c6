"""Runs the quickstart on real facts, from a pretrained language model.

    selfrag quickstart --workdir=W --config=facts
    selfrag quickstart --workdir=W --config=facts:table  # 600 test questions instead of 200
    selfrag quickstart --workdir=W --config=facts:smoke  # a few steps; scores mean nothing

SmolLM2-135M-Instruct is base of critic, generator and baselines; MiniLM embeds the passages. Both
come from the Hugging Face hub or from packages (docs/facts.md, which also says what is asked). The
smoke run, which has to fit into three minutes, takes the small base that ships with the package,
and mostly compiles.

Hardware: two CPU cores, 4 GB (3.5 at most, in training). Time on two idle cores: about 50 minutes,
85 with `table`, under one with `smoke`. The first two are estimates from the CPU time of single
stages on a busy machine (2026-11-29), in minutes of both cores: retriever 1, critic 6, label 6,
generator 7, baselines 10, evaluation 16; no whole run was timed. --config.world.fact_questions and
test_questions set how many questions are asked, --config.generator.steps how long both the
generator and standard RAG are trained.
"""

from ml_collections import ConfigDict

VARIANTS = ("full", "table", "smoke")

# task -> its share of the training instructions
SHARES = (
    ("facts", 0.44),
    ("unanswerable", 0.1),
    ("claims", 0.1),
    ("multiple_choice", 0.1),
    ("comparison", 0.07),
    ("description", 0.09),
    ("no_need", 0.1),
)


def _world(variant: str) -> dict:
    smoke = variant == "smoke"
    return dict(
        seed=0,
        # The share of each kind among the entities that are asked about.
        kinds=(
            ("film", 0.3),
            ("city", 0.2),
            ("country", 0.15),
            ("person", 0.15),
            ("element", 0.1),
            ("airport", 0.1),
        ),
        train=40 if smoke else 500,
        test={"full": 150, "table": 400, "smoke": 20}[variant],
        distractors=40 if smoke else 2500,
        lacking_rate=0.1,
        absent_rate=0.05,
        second_passage_rate=0.3,
        list_passages=4 if smoke else 100,
        instructions=40 if smoke else 600,
        shares=SHARES,
        wrong_output_rate=0.25,
        known_from=10,  # no entity is taken to be known; 9: the most popular tenth of each kind
        # With six tasks beside `facts`: 200 and 600 questions.
        fact_questions={"full": 80, "table": 240, "smoke": 2}[variant],
        test_questions={"full": 20, "table": 60, "smoke": 2}[variant],
        critic_questions=8 if smoke else 40,
    )


def _train(steps: int, max_targets: int, seed: int, save_every: int) -> dict:
    """Returns the section of a training: low-rank adapters, and the embedding in full."""
    return dict(
        seed=seed,
        steps=steps,
        rows=2,
        length=384,
        packed=True,
        max_targets=max_targets,
        optimizer=dict(
            name="adamw",
            learning_rate=5e-4,  # of the adapters
            embedding_learning_rate=1e-4,
            adam_learning_rate=1e-4,  # read by muon only
            new_rows_factor=50.0,  # the rows of reflection tokens: ten times the adapters' rate
            schedule="linear",
            warmup_fraction=0.05,
            adam_eps=1e-6,  # keeps the rows of words that a batch does not hold where they are
            weight_decay=0.0,
            clip=1.0,
        ),
        lora=dict(rank=16, alpha=32.0),
        mesh=dict(data=1, fsdp=1, tensor=1, slices=None),
        dtype="float32",
        product_dtype="bfloat16",  # faster on recent CPUs; None on others
        remat="dots",
        attention="auto",
        loss_chunk=128,
        rows_per_device=None,
        pad_vocabulary=1,
        save_every=save_every,
        log_every=5,
        keep_last=1,
        keep_best=0,
    )


def _label(smoke: bool) -> dict:
    return dict(
        seed=0,
        critic=dict(batch=16, length_bucket=32, brief=True, min_shared=16),
        passages=2,
        variants=2,
        best_rate=0.5,
        chunk=8 if smoke else 50,
        retrieve_labels="critic",  # or teacher, or self (critic/needs.py)
        needs=dict(
            seed=0,
            shots=4,
            max_new_tokens=24,
            short_tokens=24,
            passages=2,
            dev_share=0.2,
            batch=16,
            length_bucket=32,
            max_length=384,
            threshold=None,
        ),
    )


def _answer(smoke: bool) -> dict:
    return dict(
        search=dict(
            mode="adaptive_retrieval",
            threshold=0.2,
            normalise="yes_no",
            weights=dict(w_rel=1.0, w_sup=1.0, w_use=0.5, w_seq=1.0),
            beam_width=1,  # two beams double the time of answers with several segments
            max_depth=2 if smoke else 3,
            ndocs=5,
            accumulate="mean",
            constraints=(),
            keep_passages=True,
            max_new_tokens=8 if smoke else 24,
            length_bucket=192 if smoke else 32,  # few shapes: the smoke run mostly compiles
            scorer="paper",
            temperature=0.0,
            top_p=1.0,
            seed=0,
        ),
        batch=7 if smoke else 16,
        max_length=192,
        closed_set=False,
        dtype=None,
        quantization=None,
        tensor=1,
        product_dtype="bfloat16",
    )


def get_config(variant: str = "full") -> ConfigDict:
    """variant: "full"; "table" with 600 test questions; or "smoke", a few steps."""
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}; facts has {', '.join(VARIANTS)}")
    smoke = variant == "smoke"
    c = ConfigDict()
    c.kind = "quickstart"
    c.seed = 0
    c.world_kind = "facts"
    c.world = _world(variant)
    c.encoder = dict(name="minilm", vector_dtype="float32")
    c.index = dict(structure="exact")
    c.retrieve_k = 5
    c.collect = dict(
        seed=0,
        teacher="rule",
        teacher_error_rate=0.02,  # of its labels are wrong
        share=(("retrieve", 1.0), ("isrel", 0.25), ("issup", 0.4), ("isuse", 0.6)),
        passages=5,
        per_group=(),
        balance=None,
        dev_share=0.0,
        max_characters=20_000,
    )
    # SmolLM2-135M-Instruct, from the hub or from a package; a folder or another hub name works too.
    # The smoke run takes the small base that ships with the package.
    c.base = "embedded" if smoke else "smollm2"
    c.tokenizer = None  # as the base has it
    c.new_rows = ()  # reflection tokens start at the mean of all rows
    c.critic_weights = dict(retrieve=1.0, isrel=1.0, issup=1.0, isuse=1.0)
    c.generator_weights = dict(retrieve=2.0, isrel=2.0, issup=2.0, isuse=1.0)
    c.critic = _train(2 if smoke else 140, max_targets=64, seed=1, save_every=1 if smoke else 25)
    c.generator = _train(
        2 if smoke else 170, max_targets=256, seed=2, save_every=1 if smoke else 25
    )
    c.generator.mask = "each"  # passages have no loss
    # As many updates with passages as the generator has; without them, rows are a third as long.
    c.baseline_steps = dict(rag=None, closed=2 if smoke else 60)
    c.label = _label(smoke)
    c.answer = _answer(smoke)
    c.plain = dict(
        batch=7 if smoke else 16,
        max_length=448 if smoke else 768,
        max_new_tokens=8 if smoke else 48,
        length_bucket=448 if smoke else 128,
    )
    c.few_shot = dict(seed=0, shots=1 if smoke else 2)
    c.rescore = True  # answers under other weights are made from one search
    c.report = dict(seed=0, examples=2000)
    return c
