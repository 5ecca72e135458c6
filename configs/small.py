r"""Trains a small model of your own, some 50M to 1B parameters, on a laptop or one GPU."""

from ml_collections import ConfigDict

from selfrag_jax import config

VARIANTS = ("lora", "full")


def _train(variant: str, seed: int) -> dict:
    """Returns the section of a training. The docstring above says what to change."""
    lora = variant == "lora"
    return dict(
        seed=seed,
        epochs=2.0,  # passes over the data
        steps=None,  # or a number of updates, with epochs=None
        rows=2,  # per update; 2 x 512 tokens hold about eight short rows of data
        length=512,  # tokens
        packed=True,
        max_targets=384,  # positions with a loss, of the 2 x 512
        optimizer=dict(
            name="adamw",
            learning_rate=5e-4 if lora else 1e-4,
            embedding_learning_rate=1e-4,
            adam_learning_rate=1e-4,  # read by muon only
            new_rows_factor=50.0,
            schedule="linear",
            warmup_fraction=0.05,
            adam_eps=1e-6,
            weight_decay=0.0,
            clip=1.0,
        ),
        lora=dict(rank=16, alpha=32.0) if lora else None,
        mesh=dict(data=1, fsdp=1, tensor=1, slices=None),
        dtype="float32",
        remat="none",
        attention="auto",
        loss_chunk=None,
        rows_per_device=None,
        pad_vocabulary=1,
        save_every=50,
        log_every=5,
        keep_last=1,
        keep_best=1,
    )


def get_config(variant: str = "lora") -> ConfigDict:
    """variant: "lora" for low-rank adapters, "full" for fine-tuning of all parameters."""
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}; small has {' and '.join(VARIANTS)}")
    c = config.load("critic_7b")  # its sections collect and label
    with c.unlocked():
        c.name = f"small:{variant}"
        c.base = "HuggingFaceTB/SmolLM2-135M-Instruct"
        c.architecture = None  # for `selfrag compile`: the base's
        c.tokenizer = None  # as the base has it
        c.new_rows = ()
        c.critic = _train(variant, seed=1)
        c.generator = _train(variant, seed=2)
        c.generator.mask = "each"
        c.critic_weights = dict(retrieve=1.0, isrel=1.0, issup=1.0, isuse=1.0)
        c.generator_weights = dict(retrieve=1.0, isrel=1.0, issup=1.0, isuse=1.0)
        c.answer = config.load("any_model").answer
        c.answer.update(batch=8, max_length=384)
        c.answer.search.update(max_depth=3, max_new_tokens=64, length_bucket=32)
    return c
