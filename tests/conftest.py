"""Shared fixtures: one tiny world, one tiny model, one finished smoke run of the quickstart."""

import gc
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the time is XLA compiling; the long tests, other processes and the next run find most programs here.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "xla")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

from dataclasses import replace

import jax
import numpy as np
import pytest
from hypothesis import settings

from selfrag_jax.base_model.source import make_tokenizer
from selfrag_jax.checkpoints.loading import LoadedModel
from selfrag_jax.models.llama import LlamaConfig, Model
from selfrag_jax.world.encyclopedia import WorldConfig, build_world

# The same examples in every run, so that a failure is one of the change; HYPOTHESIS_PROFILE=default looks for new ones.
settings.register_profile("same", derandomize=True, deadline=None, database=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


@pytest.fixture(autouse=True)
def few_compiled_programs():
    """Each compiled program takes some of the memory maps that Linux gives a process (65,530), without which XLA ends in a
    segmentation fault; so they are let go in time."""
    yield
    maps = Path("/proc/self/maps")
    if maps.is_file() and maps.read_text().count("\n") > 20_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(autouse=True)
def same_environment():
    """Commands that are run within the process may set variables of their own."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer(4000).with_reflection_tokens()


@pytest.fixture(scope="session")
def tiny_model(tokenizer):
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        embed_dim=32,
        mlp_dim=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_length=512,
        rope_theta=10_000.0,
        norm_eps=1e-5,
        tie_embeddings=True,
        dtype="float32",
        remat="none",
        scan_unroll=1,
    )
    model = Model(config)
    return LoadedModel(model, model.init(jax.random.key(0), 0.5), tokenizer)


@pytest.fixture(scope="session")
def talkative(tiny_model):
    """A tiny model of which every third token is a reflection token, so that segments end, continue and finish in all ways."""
    model = Model(replace(tiny_model.model.config, tie_embeddings=False))
    params = jax.device_get(model.init(jax.random.key(0), 0.5))
    r, head = tiny_model.tokenizer.reflection_ids(), np.array(params["head"]["kernel"])
    head[:, [*r.retrieve, *r.isrel, *r.issup, *r.isuse, tiny_model.tokenizer.eos_id]] *= 2.0
    return replace(tiny_model, model=model, params={**params, "head": {"kernel": head}})


@pytest.fixture(scope="session")
def small_world():
    return build_world(
        WorldConfig(
            seed=3,
            vocabulary="world",
            known=4,
            train=40,
            test=10,
            distractors=10,
            values_per_kind=8,
            person_share=0.6,
            look_alike_rate=0.5,
            known_look_alike_rate=0.1,
            instructions=200,
            wrong_output_rate=0.25,
            questions_per_test_entity=2,
        )
    )


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory):
    """A finished smoke run: (workdir, rows of results.json)."""
    from selfrag_jax import config
    from selfrag_jax.commands import quickstart as flow

    workdir = tmp_path_factory.mktemp("quickstart")
    return workdir, flow.run_quickstart(config.load("tiny:smoke"), workdir)
