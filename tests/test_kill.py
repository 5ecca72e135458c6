"""Killed twenty times at random moments, a training ends with the parameters of one that nothing disturbed. Run as a program,
this file is that training."""

import hashlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

STEPS, SAVE_EVERY = 600, 4  # more than there is time for while it is killed, on whatever machine


def program(workdir, form):
    """Prints "step N" before each step, and at the end a hash of the parameters."""
    import jax

    from selfrag_jax.base_model.source import make_tokenizer
    from selfrag_jax.data.generator_examples import GeneratorSource
    from selfrag_jax.models.llama import LlamaConfig, Model
    from selfrag_jax.models.lora import LoraConfig
    from selfrag_jax.records import GeneratorExample
    from selfrag_jax.training import config, step
    from selfrag_jax.training import train as trainer
    from selfrag_jax.training.optimizer import OptimizerConfig

    tokenizer = make_tokenizer(4000).with_reflection_tokens()
    rows = [
        GeneratorExample(str(i), f"Say {i}.", f"[No Retrieval]Number {i}.[Utility:5]")
        for i in range(40)
    ]
    source = GeneratorSource(
        rows, tokenizer, dict.fromkeys(("retrieve", "isrel", "issup", "isuse"), 1.0)
    )
    fields = dict(
        vocab_size=tokenizer.vocab_size,
        embed_dim=16,
        mlp_dim=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
    )
    fields |= dict(
        head_dim=8,
        max_length=64,
        rope_theta=1e4,
        norm_eps=1e-5,
        tie_embeddings=True,
        dtype="float32",
    )
    model, step = Model(LlamaConfig(**fields, remat="none", scan_unroll=1)), step.train_step

    def told(state, *rest):
        print("step", int(state["step"]), flush=True)
        time.sleep(0.02)  # so that a kill meets computing and saving alike
        return step(state, *rest)

    step.train_step = told
    config = config.TrainConfig(
        seed=0, steps=STEPS, rows=4, length=32, max_targets=None, save_every=SAVE_EVERY, log_every=10,
        lora=LoraConfig(4, 8.0) if form == "lora" else None, mesh=config.MeshConfig(1, 1, 1), optimizer=OptimizerConfig("adamw", 0.01, 0.01, "linear", 0.1, 1e-8, 0.0, 1.0),
    )  # fmt: skip
    params = trainer.train(
        config, model, model.init(jax.random.key(0), 0.3), source, tokenizer, workdir
    )["params"]
    digest = hashlib.sha256(
        b"".join(x.tobytes() for x in jax.tree.leaves(jax.device_get(params)))
    ).hexdigest()
    print(json.dumps({"parameters": digest}), flush=True)


def start(workdir, cache, form):
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(cache)}
    env |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return subprocess.Popen(
        [sys.executable, __file__, str(workdir), form],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
    )


def finish(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    lines = out.splitlines()
    return json.loads(lines[-1])["parameters"], [
        int(line.split()[1]) for line in lines if line.startswith("step")
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("form", "kills"), [("all weights", 20), ("lora", 8)])
def test_many_kills_change_nothing(tmp_path, form, kills):
    rng, cache = random.Random(0), tmp_path / "cache"
    whole, steps = finish(start(tmp_path / "whole", cache, form))
    assert steps == list(range(STEPS))
    reached, lives = -1, []
    for _ in range(kills):
        process = start(tmp_path / "killed", cache, form)
        first = process.stdout.readline() + process.stdout.readline()  # compiled
        assert first.startswith("step"), process.communicate()[1][-3000:]
        time.sleep(rng.uniform(0, 0.8))
        process.kill()
        out = process.stdout.read()  # with what was read ahead, which `communicate` does not see
        process.wait()
        seen = [int(line.split()[1]) for line in (first + out).split("\n")[:-1]]  # whole lines
        # What is lost are the steps since the last save that was complete; the one before it always is.
        assert reached - 2 * SAVE_EVERY <= seen[0] <= reached + 1
        reached = max(reached, seen[-1])
        lives.append(seen)
    assert (
        reached < STEPS - 1 and sum(map(len, lives)) > 2 * kills
    )  # it was under way whenever it was killed
    ended, rest = finish(start(tmp_path / "killed", cache, form))
    assert rest[-1] == STEPS - 1 and ended == whole
    assert not (tmp_path / "killed" / "damaged").exists()


if __name__ == "__main__":
    program(Path(sys.argv[1]), sys.argv[2])
