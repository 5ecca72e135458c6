"""Shared fixtures: one tiny world, one tiny model, one finished smoke run of the quickstart."""

import gc
import itertools
import os
import shutil
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the time is XLA compiling; the slow tests, other processes and the next run find most
# programs here.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "xla")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
# torch's threads spin while they wait: with two workers, they would take most of the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from dataclasses import replace

import bucket as buckets
import jax
import longest_first
import numpy as np
import pytest
import repetitions
from hypothesis import settings

from selfrag_jax.base_model.source import make_tokenizer
from selfrag_jax.checkpoints.loading import LoadedModel
from selfrag_jax.huggingface import hub
from selfrag_jax.models.llama import LlamaConfig, Model
from selfrag_jax.world.encyclopedia import WorldConfig, build_world

# The same examples in every run, so that a failure comes from the change;
# HYPOTHESIS_PROFILE=default looks for new ones.
settings.register_profile("same", derandomize=True, deadline=None, database=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="all repetitions of the slow tests")
    parser.addoption("--quickstart", help="workdir of a finished smoke run, to be copied")


def pytest_configure(config):
    repetitions.FULL = config.getoption("full")
    config.option.loadscopereorder = False  # xdist would start with the files of most tests


def pytest_collection_modifyitems(config, items):
    """Workers of xdist take the longest files first."""
    if hasattr(config, "workerinput"):
        longest_first.sort_files(items)


_finished = itertools.count(1)  # tests of this process


@pytest.fixture(autouse=True)
def unknown_hub():
    """Lets each test find models of its own under the same names of the hub."""
    hub.forget_found()


@pytest.fixture(autouse=True)
def few_compiled_programs():
    """Lets compiled programs go before they use up the process's memory maps.

    Linux gives a process 65,530; without any left, XLA ends in a segmentation fault. Counting takes
    up to 20 ms, so it is done after every tenth test.
    """
    yield
    maps = Path("/proc/self/maps")
    if next(_finished) % 10 == 0 and maps.is_file() and maps.read_text().count("\n") > 20_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(autouse=True)
def same_environment():
    """Commands that run within the process may set environment variables."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(autouse=True)
def quick_compilation(request, same_environment):
    """Slow tests of the tiny model are compiled with few optimizations, except with `--full`.

    Most of their time is compilation. The processes that they start compile in the same way. The
    default tests compile as users do.
    """
    slow = request.node.get_closest_marker("slow") and "tiny_model" in request.fixturenames
    quick = bool(slow) and not repetitions.FULL
    if quick:
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # of processes; restored after the test
    jax.config.update("jax_disable_most_optimizations", quick)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


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
    """A tiny model: every third token is a reflection token, so segments end in all ways."""
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
def quickstart(request, tmp_path_factory):
    """A finished smoke run (or a copy of --quickstart): its workdir, rows of results.json."""
    from selfrag_jax import config
    from selfrag_jax.commands import quickstart as flow

    workdir = tmp_path_factory.mktemp("quickstart")
    if finished := request.config.getoption("quickstart"):
        shutil.copytree(finished, workdir, dirs_exist_ok=True)
    return workdir, flow.run_quickstart(config.load("tiny:smoke"), workdir)


@pytest.fixture(scope="session")
def bucket_server():
    with buckets.running() as running:
        yield running


@pytest.fixture
def bucket(bucket_server, tmp_path, monkeypatch):
    """The bucket, with an empty cache of copies on this machine."""
    import gcsfs.core

    for name, value in bucket_server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    gcsfs.core.GCSFileSystem.clear_instance_cache()
    yield bucket_server
    bucket_server.recover()
    gcsfs.core.GCSFileSystem.clear_instance_cache()
