"""A training that is killed many times at random moments ends with the parameters of one that was
never interrupted. Run as a program, this file is that training."""

import hashlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from repetitions import some
from test_corpus import contents

SAVE_EVERY = 4
# (kills, steps): more steps than any machine has time for between the kills.
ALL_WEIGHTS, LORA = some((5, 150), (20, 600)), some((2, 80), (8, 600))


def program(workdir, form, num_steps):
    """Prints "step N" before each step, and a hash of the parameters at the end."""
    import jax

    from selfrag_jax.base_model.source import make_tokenizer
    from selfrag_jax.data.generator_examples import GeneratorSource
    from selfrag_jax.models.llama import LlamaConfig, Model
    from selfrag_jax.models.lora import LoraConfig
    from selfrag_jax.records import GeneratorExample
    from selfrag_jax.training import train as trainer
    from selfrag_jax.training.config import MeshConfig, TrainConfig
    from selfrag_jax.training.optimizer import OptimizerConfig

    tokenizer = make_tokenizer(4000).with_reflection_tokens()
    rows = [
        GeneratorExample(str(i), f"Say {i}.", f"[No Retrieval]Number {i}.[Utility:5]")
        for i in range(40)
    ]
    group_weights = dict.fromkeys(("retrieve", "isrel", "issup", "isuse"), 1.0)
    source = GeneratorSource(rows, tokenizer, group_weights)
    shape = dict(embed_dim=16, mlp_dim=32, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8)
    fields = dict(max_length=64, rope_theta=1e4, norm_eps=1e-5, tie_embeddings=True)
    fields |= dict(dtype="float32", remat="none", scan_unroll=1)
    model = Model(LlamaConfig(vocab_size=tokenizer.vocab_size, **shape, **fields))
    step = trainer.run_step

    def announced_step(state, *rest):
        print("step", int(state["step"]), flush=True)
        time.sleep(0.02)  # so that kills hit computing and saving alike
        return step(state, *rest)

    trainer.run_step = announced_step
    config = TrainConfig(
        seed=0,
        steps=num_steps,
        rows=4,
        length=32,
        max_targets=None,
        save_every=SAVE_EVERY,
        log_every=10,
        lora=LoraConfig(4, 8.0) if form == "lora" else None,
        mesh=MeshConfig(1, 1, 1),
        optimizer=OptimizerConfig("adamw", 0.01, 0.01, "linear", 0.1, 1e-8, 0.0, 1.0),
    )
    initial = model.init(jax.random.key(0), 0.3)
    trained = trainer.train(config, model, initial, source, tokenizer, workdir)
    arrays = jax.tree.leaves(jax.device_get(trained["params"]))
    digest = hashlib.sha256(b"".join(x.tobytes() for x in arrays)).hexdigest()
    print(json.dumps({"parameters": digest}), flush=True)


def start(workdir, cache, form, num_steps):
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(cache)}
    env |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [sys.executable, __file__, str(workdir), form, str(num_steps)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=env)


def finish(process):
    """(hash of the parameters, the steps that were run)."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    lines = out.splitlines()
    steps = [int(line.split()[1]) for line in lines if line.startswith("step")]
    return json.loads(lines[-1])["parameters"], steps


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "kills", "num_steps"), [("all weights", *ALL_WEIGHTS), ("lora", *LORA)]
)
def test_many_kills_change_nothing(tmp_path, form, kills, num_steps):
    """6 kills of a training of all weights and 3 of one with LoRA; with --full 20 and 8."""
    rng, cache = random.Random(0), tmp_path / "cache"
    expected, steps = finish(start(tmp_path / "uninterrupted", cache, form, num_steps))
    assert steps == list(range(num_steps))
    last_step, lives = -1, []
    for _ in range(kills):
        process = start(tmp_path / "killed", cache, form, num_steps)
        first = process.stdout.readline() + process.stdout.readline()  # compiled by now
        assert first.startswith("step"), process.communicate()[1][-3000:]
        time.sleep(rng.uniform(0, 0.8))
        process.kill()
        out = process.stdout.read()  # with what was read ahead, which `communicate` would miss
        process.wait()
        complete_lines = (first + out).split("\n")[:-1]
        steps = [int(line.split()[1]) for line in complete_lines]
        # Only steps since the last complete save are lost, and of two saves one is complete.
        assert last_step - 2 * SAVE_EVERY <= steps[0] <= last_step + 1
        last_step = max(last_step, steps[-1])
        lives.append(steps)
    # Every kill hit a training under way.
    assert last_step < num_steps - 1 and sum(map(len, lives)) > 2 * kills
    parameters, steps = finish(start(tmp_path / "killed", cache, form, num_steps))
    assert steps[-1] == num_steps - 1 and parameters == expected
    assert not (tmp_path / "killed" / "damaged").exists()


if __name__ == "__main__":
    program(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))


# ---- embedding and indexing ----------------------------------------------------------------------
@pytest.mark.slow
def test_a_killed_index_ends_with_the_files_of_one_that_was_not(tmp_path):
    """`selfrag index` from a corpus, killed at random while it reads, embeds and builds."""
    words = [f"word{i}" for i in range(500)]
    rng = random.Random(0)
    with open(tmp_path / "p.tsv", "w") as f:
        f.write("id\ttext\ttitle\n")
        for i in range(5000):
            f.write(f"{i}\t{' '.join(rng.choices(words, k=30))}\tTitle {i}\n")
    settings = dict(dim=64, rows_per_file=500)
    index = dict(part_size=2000, leaves=16, sample=1000, structure="codes", memory="4GB")
    flags = [f"--config.encoder.{k}={v}" for k, v in settings.items()]
    flags += [f"--config.index.{k}={v}" for k, v in index.items()]

    def start(out):
        command = [sys.executable, "-m", "selfrag_jax", "index", f"--passages={tmp_path}/p.tsv"]
        return subprocess.Popen(
            [*command, f"--out={out}", *flags],
            stderr=subprocess.PIPE,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )

    began = time.monotonic()
    assert start(tmp_path / "whole").wait() == 0
    took = time.monotonic() - began
    for _ in range(some(3, 20)):
        process = start(tmp_path / "killed")
        time.sleep(rng.uniform(0.1, 0.9) * took)
        process.kill()
        process.wait()
    process = start(tmp_path / "killed")
    _, err = process.communicate()
    assert process.returncode == 0, err.decode()[-2000:]
    for suffix in ("", "_embeddings"):
        whole, killed = (contents(tmp_path / f"{name}{suffix}") for name in ("whole", "killed"))
        assert killed == whole and len(whole) > 5
