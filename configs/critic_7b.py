r"""Trains the critic: Llama-2-7B on a teacher's critiques (paper, Section 3.2.1 and Appendix B).

    # Collect critic data from a teacher (add --dry_run to see tokens and cost first):
    selfrag collect --config=critic_7b --teacher_model=MODEL --input=in.jsonl --out=data.jsonl
    selfrag train --config=critic_7b --role=critic --data=data.jsonl --workdir=critic
    selfrag label --config=critic_7b --critic=critic --index=index --input=instructions.jsonl \
        --out=generator_data.jsonl
    # With retrieval where the generator's own base does not know the answer:
    selfrag label --config=critic_7b --critic=critic --index=index --input=instructions.jsonl \
        --retrieve_labels=self --self_model=meta-llama/Llama-2-7b-hf --out=generator_data.jsonl
    # Does it fit? Check before you rent the slice:
    selfrag compile --config=critic_7b --topology=v5e:4x4

The published labels (46.9k, paper Appendix D) make 8,800 updates. According to the TPU compiler
(launch/compile_table.py) training fits the slices below. The hours are lower bounds from the chips'
peak rates; none was measured.

    v5e:4x4  1.4 h    v5e:8x8  0.35 h    v4:2x2x4  1.0 h    v5p:2x2x4  0.6 h    v6e:4x4  0.3 h

Agreement with GPT-4 to expect (paper, Appendix): Retrieve 93.8, IsSup 93.5, IsRel 80.2, IsUse 73.5.
"""

from ml_collections import ConfigDict


def _collect() -> dict:
    """Returns the section of `selfrag collect`."""
    return dict(
        seed=0,
        teacher="openai",
        teacher_error_rate=0.0,  # of the rule teacher
        share=(("retrieve", 1.0), ("isrel", 1.0), ("issup", 1.0), ("isuse", 1.0)),
        passages=5,
        # The published numbers (paper, Appendix D).
        per_group=(("retrieve", 12_600), ("isrel", 19_300), ("issup", 11_200), ("isuse", 3_800)),
        balance=5.0,  # no label more than five times as often as its group's rarest
        dev_share=0.1,
        max_characters=20_000,
        endpoint=dict(
            concurrency=16,
            temperature=0.0,
            max_tokens=300,
            structured=True,
            timeout=120.0,
            retries=6,
            backoff=1.0,
            max_backoff=60.0,
            poll=60.0,
        ),
        local=dict(batch=8, length_bucket=128, brief=False),
    )


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.name, c.kind, c.seed = "critic_7b", "train", 0
    c.base = "meta-llama/Llama-2-7b-hf"  # a folder works too
    c.architecture = "llama2_7b"  # for `selfrag compile`; training takes that of the base
    # As the base has it: for Llama-2 llama_fast, as the released model was served. That was trained
    # with llama_slow (see text/tokenizer.py).
    c.tokenizer = None
    c.new_rows = ()  # all reflection tokens start at the mean of the old rows (paper, Section 3.2)
    c.critic_weights = dict(retrieve=1.0, isrel=1.0, issup=1.0, isuse=1.0)
    c.critic = dict(
        seed=0,
        epochs=3.0,
        steps=None,  # or a number of updates, with epochs=None
        rows=16,  # one example in each
        length=2048,
        packed=False,
        max_targets=None,
        optimizer=dict(
            name="adamw",
            learning_rate=2e-5,
            adam_learning_rate=2e-5,  # read by muon only
            schedule="cosine",
            warmup_fraction=0.01,
            adam_eps=1e-8,
            weight_decay=0.0,
            clip=1.0,
        ),
        # There are 16 rows; further chips split the heads.
        mesh=dict(data=1, fsdp=16, tensor=-1, slices=None),
        dtype="bfloat16",  # of activations; parameters and moments are f32
        remat="full",
        attention="auto",  # splash on a TPU, cudnn on a GPU (models/attention_kernels.py)
        loss_chunk=512,
        pad_vocabulary=128,
        save_every=500,
        log_every=10,
        keep_last=2,  # checkpoints
        keep_best=1,
    )
    c.collect = _collect()
    c.label = dict(
        seed=0,
        critic=dict(batch=64, length_bucket=64, brief=False, min_shared=16),  # full prompts
        passages=5,
        variants=1,
        best_rate=0.8,
        chunk=512,
        retrieve_labels="critic",  # or teacher, or self (critic/needs.py)
        needs=dict(
            seed=0,
            shots=4,
            max_new_tokens=32,
            short_tokens=16,  # names, numbers, choices: longer outputs are compared by likelihood
            passages=5,
            dev_share=0.1,
            batch=16,
            length_bucket=64,
            max_length=2048,
            threshold=None,
        ),
    )
    return c
