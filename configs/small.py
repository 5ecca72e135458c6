r"""Trains a small model of your own, some 50M to 1B parameters, on a laptop or one GPU.

    selfrag train --config=small --config.base=FOLDER --role=generator \
        --data=generator_data.jsonl --workdir=generator
    selfrag ask --config=small --model=generator --index=index "Your question?"
    # The critic, and the generator's data that it labels:
    selfrag train --config=small --config.base=FOLDER --role=critic --data=critic_data.jsonl \
        --workdir=critic
    selfrag label --config=small --critic=critic --index=index --input=instructions.jsonl \
        --out=generator_data.jsonl
    # Does it fit? On a GPU or TPU that you need not have:
    selfrag compile --config=small --config.base=FOLDER --topology=h100:1

docs/your_own_model.md goes through all of it. Variants: `lora` (the default: low-rank adapters, and
the embedding in full) and `full` (all parameters).

Hardware and time: an update of 2 x 512 tokens, which hold some 15 rows of one sentence each, takes
about 10 CPU-seconds on two cores; the training takes 3.4 GB of memory, with `full` 4.1 (measured
2026-11-29 with SmolLM2-135M). One GPU needs 0.8 GB for weights and optimizer and 2.3 GB of
temporaries, with `full` 1.6 and 2.6 (compiled with remat=none for an H100, not run).

What one would change, in the sections `critic` and `generator`:

    base              the folder or GGUF file of a Llama or Mistral model, or its name on the hub.
                      Its tokenizer and architecture come with it
    epochs, steps     passes over the data, or updates with epochs=none. A few hundred rows want two
                      or three passes, ten thousand one
    rows, length      rows of an update and tokens of a row, in which several documents are packed
                      (packed=false: one each). A document longer than `length` is cut and counted:
                      raise it for long outputs with several passages. Memory follows their product
    max_targets       positions of an update that have a loss: outputs without their passages, about
                      a third. Logits exist for these alone. With several devices: none (all)
    learning_rate     of the adapters (variant lora) or of all layers (full, five times lower)
    embedding_learning_rate, new_rows_factor
                      of the embedding and the head; times the factor for the rows of the reflection
                      tokens, which are new and have the farthest to go
    adam_eps          keeps the rows of words that a batch does not hold where they are. Much lower
                      than 1e-6, and a short training forgets words
    warmup_fraction   of the updates; then the rate falls to 0 in a line
    weight_decay, clip   as everywhere; the recipes of the paper have no decay either
    rank, alpha       of the adapters (lora). A higher rank learns more and forgets more
    new_rows          pairs such as ("[Relevant]", "yes"): that token starts as the row of that
                      word, others at the mean of all rows
    weights           critic_weights and generator_weights: of each group of reflection tokens in
                      the loss, where a text token has 1
    dtype             float32 on a CPU; bfloat16 on a GPU or TPU
    remat, loss_chunk, rows_per_device
                      memory for time: remat=dots keeps the products of matrices and computes the
                      rest again for the gradient, full computes each layer again, none keeps all;
                      loss_chunk holds the logits of at most so many positions at a time;
                      rows_per_device (with max_targets=none) splits an update
    mesh, pad_vocabulary   for several devices: docs/training.md
    attention         the kernel; auto takes the fastest of the device
    save_every, log_every, keep_last, keep_best   checkpoints and reports

and in `answer`: max_depth (segments of an answer; 1 where answers are one sentence), max_new_tokens
(of a segment), ndocs, threshold, and max_length (tokens of a prompt, and of a passage).

A GPU is faster with more rows at a time and in bfloat16 (not run): --config.generator.rows=16
--config.generator.max_targets=3072 --config.generator.dtype=bfloat16.

What to expect: SmolLM2-135M-Instruct learned from 702 rows on cities and countries in one epoch (44
updates), and answered 38 of 40 questions on other cities and countries from 1,388 passages
(2026-11-29; adaptive, which retrieved for each; --max_depth=1 --beam_width=1).
"""

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
        rows=2,  # per update; each holds several short rows of data
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
        remat="dots",
        attention="auto",
        loss_chunk=128,
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
